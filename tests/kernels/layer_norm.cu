/*---
implements = "layer_norm"
target     = "cuda"
dtypes     = ["float64", "float32", "float16", "bfloat16"]
optional   = ["weight", "bias", "mean", "rstd"]
dims       = { cols = "x.shape[-1]", rows = "x.numel // cols" }
where      = ["rows >= 1"]
tune       = { THREADS = [128, 256] }
align      = 1
[[launch]]
kernel = "layer_norm"
grid   = ["rows"]
block  = ["THREADS"]
args   = ["x", "weight", "bias", "y", "mean", "rstd", "cols", "eps"]
---*/
// One block per row; two passes over the row, which the caches keep.
extern "C" __global__ void __launch_bounds__(THREADS) layer_norm(const T_x* __restrict__ x, const T_weight* __restrict__ weight,
                                                                 const T_bias* __restrict__ bias, T_y* __restrict__ y, T_mean* mean,
                                                                 T_rstd* rstd, int cols, ACC eps) {
    const int64_t row = blockIdx.x;
    const T_x* in = x + row * cols;
    ACC sum = 0, squares = 0;
    for (int i = threadIdx.x; i < cols; i += THREADS) sum += to_acc(in[i]);
    const ACC mu = block_sum(sum) / ACC(cols);
    for (int i = threadIdx.x; i < cols; i += THREADS) squares += (to_acc(in[i]) - mu) * (to_acc(in[i]) - mu);
    const ACC scale = ACC(1) / sqrt(block_sum(squares) / ACC(cols) + eps);
    for (int i = threadIdx.x; i < cols; i += THREADS) {
        ACC value = (to_acc(in[i]) - mu) * scale;
        if (HAS_WEIGHT) value *= to_acc(weight[i]);
        if (HAS_BIAS) value += to_acc(bias[i]);
        y[row * cols + i] = from_acc<T_y>(value);
    }
    if (HAS_MEAN && threadIdx.x == 0) mean[row] = from_acc<T_mean>(mu);
    if (HAS_RSTD && threadIdx.x == 0) rstd[row] = from_acc<T_rstd>(scale);
}
