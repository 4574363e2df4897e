/*---
implements = "layer_norm"
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
optional   = ["bias", "mean", "rstd"]
dims       = { cols = "weight.numel", rows = "x.numel // cols", vec = "16 // x.itemsize", nvec = "cols // vec" }
where      = ["x.ndim <= 3", "x.ndim >= 2", "x.stride[-1] == 1", "x.stride[-2] == x.shape[-1]", "x.stride[0] * x.shape[0] == x.numel",
              "y.stride[-1] == 1", "y.stride[-2] == x.stride[-2]", "y.stride[0] == x.stride[0]", "weight.numel == x.shape[-1]",
              "weight.stride[-1] == 1",
              "cols % vec == 0", "THREADS * NV >= nvec", "THREADS * (NV - 1) < nvec", "THREADS <= nvec + 31"]
tune       = { THREADS = [64, 128, 256, 512, 1024], NV = [1, 2, 3, 4, 6, 8] }
align      = 16
[[launch]]
kernel = "ln_rows"
grid = ["rows"]
block = ["THREADS"]
args = ["x", "weight", "bias", "y", "mean", "rstd", "cols", "eps"]
---*/
// One block per row, the row in registers: one read of x, one write of y. The sum is taken in double over the vectors'
// float tree sums; the mean is used as float(mean) + correction, so neither the mean nor the variance sees a biased sum.
constexpr int W = 16 / sizeof(T);
constexpr int WARPS = THREADS / 32;

// one use per call site and kernel: no barrier is needed before the write
template <class V> __device__ __forceinline__ V block_sum_once(V a, V* part) {
    a = warp_sum(a);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = a;
    __syncthreads();
    V p = threadIdx.x % 32 < WARPS ? part[threadIdx.x % 32] : V(0);
#pragma unroll
    for (int o = (WARPS > 16 ? 16 : WARPS > 8 ? 8 : WARPS > 4 ? 4 : WARPS > 2 ? 2 : 1); o > 0; o /= 2)
        p += __shfl_xor_sync(0xffffffffu, p, o);
    return __shfl_sync(0xffffffffu, p, 0);
}

extern "C" __global__ void __launch_bounds__(THREADS) ln_rows(
    const T* __restrict__ x, const T_weight* __restrict__ weight, const T_bias* __restrict__ bias, T_y* __restrict__ y,
    T_mean* __restrict__ mean, T_rstd* __restrict__ rstd, int cols, float eps) {
    __shared__ double part_s[32];
    __shared__ float part_q[32];
    const int nvec = cols / W;
    const int64_t base = int64_t(blockIdx.x) * cols;
    Vec<T, W> raw[NV];
#pragma unroll
    for (int k = 0; k < NV; ++k) {
        const int i = threadIdx.x + k * THREADS;
        if (i < nvec) {
            const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(x + base) + i);
            raw[k] = *reinterpret_cast<const Vec<T, W>*>(&bits);
        }
    }
    const double inv = 1.0 / double(cols);
    float v[NV][W];
    double sum = 0.0;
#pragma unroll
    for (int k = 0; k < NV; ++k) {
        if (threadIdx.x + k * THREADS < nvec) {
            float t[W];
#pragma unroll
            for (int j = 0; j < W; ++j) t[j] = v[k][j] = to_float(raw[k][j]);
#pragma unroll
            for (int h = W / 2; h > 0; h /= 2)
#pragma unroll
                for (int j = 0; j < h; ++j) t[j] += t[j + h];
            sum += double(t[0]);
        }
    }
    const double m0d = block_sum_once(sum, part_s) * inv;
    const float m0 = float(m0d);
    const float corr = float(m0d - double(m0));  // NaN where the mean is Inf or NaN
    float q = 0.f;
#pragma unroll
    for (int k = 0; k < NV; ++k) {
        if (threadIdx.x + k * THREADS < nvec) {
            float qk = 0.f;
#pragma unroll
            for (int j = 0; j < W; ++j) { v[k][j] = (v[k][j] - m0) - corr; qk = fmaf(v[k][j], v[k][j], qk); }
            q += qk;
        }
    }
    q = block_sum_once(q, part_q);
    const float var = float(double(q) * inv);
    const float r = 1.f / sqrtf(var + eps);
#pragma unroll
    for (int k = 0; k < NV; ++k) {
        const int i = threadIdx.x + k * THREADS;
        if (i < nvec) {
            const Vec<T_weight, W> w = load_vec<W>(weight + i * W);
            Vec<T_bias, W> b;
            if (HAS_BIAS) b = load_vec<W>(bias + i * W);
            Vec<T_y, W> out;
#pragma unroll
            for (int j = 0; j < W; ++j) {
                const float n = v[k][j] * r;
                out[j] = from_float<T_y>(HAS_BIAS ? fmaf(n, to_float(w[j]), to_float(b[j])) : n * to_float(w[j]));
            }
            if constexpr (sizeof(out) == 16) __stcs(reinterpret_cast<uint4*>(y + base) + i, *reinterpret_cast<const uint4*>(&out));
            else store_vec<W>(y + base + int64_t(i) * W, out);
        }
    }
    if (threadIdx.x == 0) {
        if (HAS_MEAN) mean[blockIdx.x] = from_float<T_mean>(m0 + corr);
        if (HAS_RSTD) rstd[blockIdx.x] = from_float<T_rstd>(r);
    }
}
