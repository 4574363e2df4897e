/*---
implements = ["scale.mask.softmax", "mask.softmax"]
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
dims       = { cols = "x.shape[3]", rows = "x.numel // cols", h = "x.shape[1]", q = "x.shape[2]", w = "16 // x.itemsize", nvec = "ceil_div(cols, w)", m0 = "mask.stride[0] * (mask.shape[0] > 1)", m1 = "mask.stride[1] * (mask.shape[1] > 1)", m2 = "mask.stride[2] * (mask.shape[2] > 1)", m3 = "mask.stride[3] * (mask.shape[3] > 1)", aligned = "(cols % w == 0) * (m0 % w == 0) * (m1 % w == 0) * (m2 % w == 0) * (m3 == 1)", rpb = "max(1, 256 // GROUP * (GROUP < 64))" }
where      = ["x.ndim == 4", "mask.ndim == 4", "(dim + 4) % 4 == 3", "x.contiguous", "y.contiguous", "y.numel == x.numel", "cols >= 1", "cols <= 32768", "rows >= 1", "rows <= 134217728",
              "VEC == aligned", "GROUP * NV >= nvec", "GROUP * NV < max(2 * nvec, 5)", "NV * w <= 32"]
tune       = { GROUP = [4, 8, 16, 32, 64, 128, 256, 512, 1024], NV = [1, 2, 4, 8], VEC = [0, 1] }
align      = 16
[[launch]]
kernel = "masked_softmax_rows"
grid   = ["ceil_div(rows, rpb)"]
block  = ["max(GROUP, 256 * (GROUP < 64))"]
args   = ["x", "mask", "y", "rows", "cols", "h", "q", "m0", "m1", "m2", "m3"]
---*/
// GROUP threads hold a row in registers (GROUP < 64: several rows per block of 256 threads, shuffles only). The mask row is read
// through L1 with its own strides (0 where it is broadcast). The factor 1 / total is taken in double and applied as hi + lo.
constexpr int W = 16 / int(sizeof(T_x));
constexpr int E = NV * W;
constexpr int BLOCK = GROUP < 64 ? 256 : GROUP;
constexpr int RPB = BLOCK / GROUP;
constexpr int WARPS = BLOCK / 32;
constexpr int LANES = GROUP < 32 ? GROUP : 32;

__device__ __forceinline__ float scaled_masked(float v, float mask) {
#if OP_SCALE
#if defined(P_SCALE)
    return fmaf(v, float(P_SCALE), mask);
#elif defined(P_SCALE_SCALE)
    return fmaf(v, float(P_SCALE_SCALE), mask);
#elif defined(P_SCALE_FACTOR)
    return fmaf(v, float(P_SCALE_FACTOR), mask);
#else
#error "the parameter of the scale stage has another name"
#endif
#else
    return v + mask;
#endif
}
__device__ __forceinline__ float exp_of(float v) {
    if constexpr (sizeof(T_x) == 2 && sizeof(T_y) == 2) return __expf(v);
    else return expf(v);
}
template <int N> struct Tree {
    static __device__ __forceinline__ float sum(const float* a) { return Tree<N / 2>::sum(a) + Tree<N / 2>::sum(a + N / 2); }
};
template <> struct Tree<1> {
    static __device__ __forceinline__ float sum(const float* a) { return a[0]; }
};
// over aligned groups of N lanes; a NaN is dropped by the maximum and comes back in the sum
template <int N> __device__ __forceinline__ float group_top(float m) {
#pragma unroll
    for (int o = N / 2; o > 0; o /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, o));
    return m;
}
template <int N> __device__ __forceinline__ double group_sum(double s) {
#pragma unroll
    for (int o = N / 2; o > 0; o /= 2) s += __shfl_xor_sync(0xffffffffu, s, o);
    return s;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
masked_softmax_rows(const T_x* __restrict__ x, const T_mask* __restrict__ mask, T_y* __restrict__ y, int rows, int cols, int h, int q,
                    int64_t m0, int64_t m1, int64_t m2, int64_t m3) {
    __shared__ float part_m[WARPS];
    __shared__ double part_s[WARPS];
    const int tid = threadIdx.x, lane = tid % GROUP;
    const uint32_t row = uint32_t(blockIdx.x) * RPB + tid / GROUP;  // where: rows <= 2^27
    const int count = row < uint32_t(rows) ? cols : 0;
    const T_x* src = x + int64_t(row) * cols;
    T_y* dst = y + int64_t(row) * cols;

    uint4 raw[NV];
    if constexpr (VEC) {
#pragma unroll
        for (int k = 0; k < NV; ++k) {
            const int i = k * GROUP + lane;
            if (i * W < count) raw[k] = __ldcs(reinterpret_cast<const uint4*>(src) + i);
        }
    }
    const uint32_t heads = row / uint32_t(q);
    const uint32_t batch = heads / uint32_t(h);
    const T_mask* line = mask + batch * m0 + (heads - batch * uint32_t(h)) * m1 + (row - heads * uint32_t(q)) * m2;

    float e[E];
    if constexpr (VEC) {
#pragma unroll
        for (int k = 0; k < NV; ++k) {
            const int i = k * GROUP + lane;
            if (i * W < count) {
                const Vec<T_mask, W> add = load_vec<W>(line + i * W);
                const Vec<T_x, W>& v = *reinterpret_cast<const Vec<T_x, W>*>(&raw[k]);
#pragma unroll
                for (int j = 0; j < W; ++j) e[k * W + j] = scaled_masked(to_float(v[j]), to_float(add[j]));
            } else {
#pragma unroll
                for (int j = 0; j < W; ++j) e[k * W + j] = -INFINITY;
            }
        }
    } else {
#pragma unroll
        for (int k = 0; k < E; ++k) {
            const int i = k * GROUP + lane;
            e[k] = i < count ? scaled_masked(to_float(src[i]), to_float(line[i * m3])) : -INFINITY;
        }
    }

    float m = -INFINITY;
#pragma unroll
    for (int k = 0; k < E; ++k) m = fmaxf(m, e[k]);
    m = group_top<LANES>(m);
    if constexpr (GROUP >= 64) {
        if (tid % 32 == 0) part_m[tid / 32] = m;
        __syncthreads();
        m = group_top<32>(tid % 32 < WARPS ? part_m[tid % 32] : -INFINITY);
    }
    const float ref = m == -INFINITY ? 0.f : m;  // a row of -Inf: sum 0, factor Inf, 0 * Inf
#pragma unroll
    for (int k = 0; k < E; ++k) e[k] = exp_of(e[k] - ref);
    double total = group_sum<LANES>(double(Tree<E>::sum(e)));
    if constexpr (GROUP >= 64) {
        if (tid % 32 == 0) part_s[tid / 32] = total;
        __syncthreads();
        total = group_sum<32>(tid % 32 < WARPS ? part_s[tid % 32] : 0.0);
    }
    const double factor = 1.0 / total;
    const float hi = float(factor), lo = float(factor - double(hi));
#pragma unroll
    for (int k = 0; k < NV; ++k) {
        Vec<T_y, W> out;
#pragma unroll
        for (int j = 0; j < W; ++j) {
            const float v = e[k * W + j];
            out[j] = from_float<T_y>(sizeof(T_y) == 2 ? v * hi : fmaf(v, hi, v * lo));
        }
        if constexpr (VEC) {
            const int i = k * GROUP + lane;
            if (i * W < count) {
                if constexpr (sizeof(out) == 16) __stcs(reinterpret_cast<uint4*>(dst) + i, *reinterpret_cast<const uint4*>(&out));
                else store_vec<W>(dst + i * W, out);
            }
        } else {
#pragma unroll
            for (int j = 0; j < W; ++j) {
                const int i = (k * W + j) * GROUP + lane;
                if (i < count) dst[i] = out[j];
            }
        }
    }
}
