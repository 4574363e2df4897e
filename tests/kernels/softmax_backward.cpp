/*---
implements = "softmax_backward"
target     = "cpu"
dtypes     = ["float32"]
where      = ["y.contiguous", "grad_y.contiguous", "grad_x.contiguous", "dim == y.ndim - 1"]
dims       = { cols = "y.shape[-1]", rows = "y.numel // cols" }
align      = 1
[[launch]]
kernel = "softmax_backward"
args = ["grad_y", "y", "grad_x", "rows", "cols"]
---*/
// grad_x = y * (grad_y - sum(y * grad_y)), row by row
extern "C" void softmax_backward(const T_grad_y* grad_y, const T_y* y, T_grad_x* grad_x, int64_t rows, int64_t cols) {
    for (int64_t row = 0; row < rows; row++) {
        const T_grad_y* g = grad_y + row * cols;
        const T_y* p = y + row * cols;
        double dot = 0;
        for (int64_t i = 0; i < cols; i++) dot += double(p[i]) * double(g[i]);
        for (int64_t i = 0; i < cols; i++) grad_x[row * cols + i] = float(double(p[i]) * (double(g[i]) - dot));
    }
}
