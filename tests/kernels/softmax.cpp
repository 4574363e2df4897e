/*---
implements = "softmax"
target     = "cpu"
dtypes     = ["float32", "float16", "bfloat16"]
where      = ["x.contiguous", "y.contiguous", "dim == x.ndim - 1"]
dims       = { cols = "x.shape[-1]", rows = "x.numel // cols" }
align      = 1
[[launch]]
kernel = "softmax"
args = ["x", "y", "rows", "cols"]
---*/
// One row per iteration: maximum, sum of exponentials, quotient. NaN anywhere in a row makes the sum NaN.
extern "C" void softmax(const T_x* x, T_y* y, int64_t rows, int64_t cols) {
    #pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T_x* in = x + row * cols;
        ACC top = to_acc(in[0]), sum = 0;
        for (int64_t i = 1; i < cols; i++) top = std::max(top, to_acc(in[i]));
        for (int64_t i = 0; i < cols; i++) sum += std::exp(to_acc(in[i]) - top);
        for (int64_t i = 0; i < cols; i++) y[row * cols + i] = from_acc<T_y>(std::exp(to_acc(in[i]) - top) / sum);
    }
}
