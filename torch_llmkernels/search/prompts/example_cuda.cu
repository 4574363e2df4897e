/*---
implements = "row_l2_normalize"
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
optional   = ["scale"]
where      = ["x.ndim == 2", "x.stride[1] == 1", "y.stride[1] == 1", "y.stride[0] == cols"]
dims       = { rows = "x.shape[0]", cols = "x.shape[1]", pitch = "x.stride[0]" }
tune       = { THREADS = [128, 256, 512] }
align      = 1
[[launch]]
kernel = "row_l2_normalize"
grid   = ["rows"]
block  = ["THREADS"]
args   = ["x", "scale", "y", "cols", "pitch", "eps"]
---*/
// y[r, c] = x[r, c] / sqrt(sum_c x[r, c]^2 + eps) * scale[c]: one block per row; any number of columns, any row pitch.

extern "C" __global__ void __launch_bounds__(THREADS)
row_l2_normalize(const T_x* __restrict__ x, const T* __restrict__ scale, T_y* __restrict__ y, int cols, long long pitch, float eps) {
    const T_x* row = x + blockIdx.x * pitch;
    T_y* out = y + blockIdx.x * (long long)cols;
    ACC sum = ACC(0);
    for (int c = threadIdx.x; c < cols; c += THREADS) {
        const ACC v = to_acc(row[c]);
        sum += v * v;
    }
    const ACC norm = ACC(1) / sqrtf(block_sum(sum) + eps);
    for (int c = threadIdx.x; c < cols; c += THREADS) {  // the row is in cache now
        ACC v = to_acc(row[c]) * norm;
#if HAS_SCALE
        v *= to_acc(scale[c]);
#endif
        out[c] = from_acc<T_y>(v);
    }
}
