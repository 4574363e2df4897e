/*---
implements = "layer_norm"
target     = "cpu"
dtypes     = ["float64", "float32", "float16", "bfloat16"]
optional   = ["weight", "bias", "mean", "rstd"]
dims       = { cols = "x.shape[-1]", rows = "x.numel // cols" }
tune       = { GRAIN = [1, 8] }
align      = 1
[[launch]]
kernel = "layer_norm"
args = ["x", "weight", "bias", "y", "mean", "rstd", "rows", "cols", "eps"]
---*/
// One row per iteration: mean, then the centred sum of squares, then the affine write.
extern "C" void layer_norm(const T_x* x, const T_weight* weight, const T_bias* bias, T_y* y, T_mean* mean, T_rstd* rstd,
                           int64_t rows, int64_t cols, double eps) {
    #pragma omp parallel for schedule(static, GRAIN)
    for (int64_t row = 0; row < rows; row++) {
        const T_x* in = x + row * cols;
        ACC sum = 0, squares = 0;
        #pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < cols; i++) sum += to_acc(in[i]);
        const ACC mu = sum / ACC(cols);
        #pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < cols; i++) squares += (to_acc(in[i]) - mu) * (to_acc(in[i]) - mu);
        const ACC scale = ACC(1) / std::sqrt(squares / ACC(cols) + ACC(eps));
        for (int64_t i = 0; i < cols; i++) {
            ACC value = (to_acc(in[i]) - mu) * scale;
            if (HAS_WEIGHT) value *= to_acc(weight[i]);
            if (HAS_BIAS) value += to_acc(bias[i]);
            y[row * cols + i] = from_acc<T_y>(value);
        }
        if (HAS_MEAN) mean[row] = from_acc<T_mean>(mu);
        if (HAS_RSTD) rstd[row] = from_acc<T_rstd>(scale);
    }
}
