/*---
implements = "layer_norm_backward"
target     = "cpu"
dtypes     = ["float32"]
optional   = ["grad_x", "bias"]
where      = ["x.contiguous", "grad_y.contiguous"]
dims       = { cols = "x.shape[-1]", rows = "x.numel // cols" }
align      = 1
[[launch]]
kernel = "layer_norm_backward"
args = ["grad_y", "x", "mean", "rstd", "weight", "bias", "grad_x", "grad_weight", "grad_bias", "rows", "cols"]
---*/
// Sums in double, column by column for the parameters and row by row for the input.
extern "C" void layer_norm_backward(const T_grad_y* grad_y, const T_x* x, const T_mean* mean, const T_rstd* rstd,
                                    const T_weight* weight, const T_bias* bias, T_grad_x* grad_x, T_grad_weight* grad_weight,
                                    T_grad_bias* grad_bias, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < cols; i++) {
        double by_weight = 0, by_bias = 0;
        for (int64_t row = 0; row < rows; row++) {
            const double g = grad_y[row * cols + i];
            by_weight += g * (double(x[row * cols + i]) - mean[row]) * rstd[row];
            by_bias += g;
        }
        grad_weight[i] = float(by_weight);
        grad_bias[i] = float(by_bias);
    }
    if (!HAS_GRAD_X) return;
    for (int64_t row = 0; row < rows; row++) {
        double sum = 0, dot = 0;
        for (int64_t i = 0; i < cols; i++) {
            const double g = double(grad_y[row * cols + i]) * weight[i], n = (double(x[row * cols + i]) - mean[row]) * rstd[row];
            sum += g;
            dot += g * n;
        }
        for (int64_t i = 0; i < cols; i++) {
            const double g = double(grad_y[row * cols + i]) * weight[i], n = (double(x[row * cols + i]) - mean[row]) * rstd[row];
            grad_x[row * cols + i] = float(rstd[row] * (g - sum / cols - n * dot / cols));
        }
    }
}
