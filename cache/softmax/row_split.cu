/*---
implements = ["softmax", "log_softmax", "scale.softmax"]
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
dims       = { rows = "x.shape[0]", cols = "x.shape[1]", xp = "x.stride[0]", yp = "y.stride[0]", w = "16 // x.itemsize", nvec = "ceil_div(cols, w)", few = "(rows * 4 <= device.sms) * (cols >= 4096)", aligned = "(cols % w == 0) * (xp % w == 0) * (yp % w == 0)", rpb = "max(1, 256 // GROUP * (GROUP < 64))" }
where      = ["x.ndim == 2", "(dim + 2) % 2 == 1", "x.stride[1] == 1", "y.stride[1] == 1", "cols >= 1", "cols <= 32768",
              "rows >= 1", "rows <= 134217728", "VEC == aligned", "SPLIT >= 1 + 3 * few", "SPLIT <= 1 + 7 * few",
              "GROUP * NV >= nvec", "GROUP * NV < max(2 * nvec, 5)", "NV * w <= 32", "GROUP >= 64 * (SPLIT > 1)"]
tune       = { SPLIT = [1, 4, 8], GROUP = [4, 8, 16, 32, 64, 128, 256, 512, 1024], NV = [1, 2, 4, 8], VEC = [0, 1] }
align      = 16
[[launch]]
kernel  = "softmax_rows"
grid    = ["ceil_div(rows, rpb) * SPLIT"]
block   = ["max(GROUP, 256 * (GROUP < 64))"]
args    = ["x", "y", "rows", "cols", "xp", "yp"]
---*/
// GROUP threads hold a row in registers (GROUP < 64: several rows per block of 256 threads, shuffles only). Where rows are few,
// SPLIT blocks work on the same row: each reads all of it (out of L2) and reduces it in the same order, then
// stores only its own range of columns. The factor 1 / total is taken in double and applied as hi + lo.
constexpr int W = 16 / int(sizeof(T_x));
constexpr int E = NV * W;
constexpr int BLOCK = GROUP < 64 ? 256 : GROUP;
constexpr int RPB = BLOCK / GROUP;
constexpr int WARPS = BLOCK / 32;

#if OP_SCALE
#if defined(P_SCALE)
#define SCALED(v) ((v) * float(P_SCALE))
#elif defined(P_SCALE_SCALE)
#define SCALED(v) ((v) * float(P_SCALE_SCALE))
#elif defined(P_SCALE_FACTOR)
#define SCALED(v) ((v) * float(P_SCALE_FACTOR))
#else
#error "the parameter of the scale stage has another name"
#endif
#else
#define SCALED(v) (v)
#endif

__device__ __forceinline__ float exp_of(float v) {
    if constexpr (sizeof(T_x) == 2 && sizeof(T_y) == 2) return __expf(v);
    else return expf(v);
}
// maximum of the warp; no lane holds a NaN
__device__ __forceinline__ float warp_top(float m) {
    int key = __float_as_int(m);
    key ^= (key >> 31) & 0x7fffffff;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    key = __reduce_max_sync(0xffffffffu, key);
#else
#pragma unroll
    for (int o = 16; o > 0; o /= 2) key = max(key, __shfl_xor_sync(0xffffffffu, key, o));
#endif
    return __int_as_float(key ^ ((key >> 31) & 0x7fffffff));
}
template <int N> struct Tree {
    static __device__ __forceinline__ float sum(const float* a) { return Tree<N / 2>::sum(a) + Tree<N / 2>::sum(a + N / 2); }
};
template <> struct Tree<1> {
    static __device__ __forceinline__ float sum(const float* a) { return a[0]; }
};
// over aligned groups of N lanes
template <int N> __device__ __forceinline__ float group_top(float m) {
    if constexpr (N == 32) {
        m = warp_top(m);
    } else {
#pragma unroll
        for (int o = N / 2; o > 0; o /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, o));
    }
    return m;
}
template <int N> __device__ __forceinline__ double group_sum(double s) {
#pragma unroll
    for (int o = N / 2; o > 0; o /= 2) s += __shfl_xor_sync(0xffffffffu, s, o);
    return s;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
softmax_rows(const T_x* __restrict__ x, T_y* __restrict__ y, int64_t rows, int cols, int64_t xp, int64_t yp) {
    __shared__ float part_m[WARPS];
    __shared__ double part_s[WARPS];
    const int tid = threadIdx.x, lane = tid % GROUP;
    const int64_t row = int64_t(blockIdx.x / SPLIT) * RPB + tid / GROUP;
    const int count = row < rows ? cols : 0;
    const T_x* src = x + row * xp;
    T_y* dst = y + row * yp;

    float e[E];
    if constexpr (VEC) {
        Vec<T_x, W> raw[NV];
#pragma unroll
        for (int k = 0; k < NV; ++k) {
            const int i = k * GROUP + lane;
            if (i * W < count) {
                const uint4* p = reinterpret_cast<const uint4*>(src) + i;
                const uint4 bits = SPLIT > 1 ? __ldg(p) : __ldcs(p);
                raw[k] = *reinterpret_cast<const Vec<T_x, W>*>(&bits);
            }
        }
#pragma unroll
        for (int k = 0; k < NV; ++k)
#pragma unroll
            for (int j = 0; j < W; ++j)
                e[k * W + j] = (k * GROUP + lane) * W < count ? SCALED(to_float(raw[k][j])) : -INFINITY;
    } else {
#pragma unroll
        for (int k = 0; k < E; ++k)
            e[k] = k * GROUP < count - lane ? SCALED(to_float(src[lane + k * GROUP])) : -INFINITY;
    }

    float m = -INFINITY;
#pragma unroll
    for (int k = 0; k < E; ++k) m = fmaxf(m, e[k]);  // a NaN is dropped here and comes back in the sum
    m = group_top<(GROUP < 32 ? GROUP : 32)>(m);
    if constexpr (GROUP >= 64) {
        if (tid % 32 == 0) part_m[tid / 32] = m;
        __syncthreads();
        m = warp_top(tid % 32 < WARPS ? part_m[tid % 32] : -INFINITY);
    }
    const float ref = m == -INFINITY ? 0.f : m;  // a row of -Inf: sum 0, factor Inf, 0 * Inf
#if OP_LOG_SOFTMAX
    float t[E];
#else
    float (&t)[E] = e;
#endif
#pragma unroll
    for (int k = 0; k < E; ++k) t[k] = exp_of(e[k] - ref);
    double total = group_sum<(GROUP < 32 ? GROUP : 32)>(double(Tree<E>::sum(t)));
    if constexpr (GROUP >= 64) {
        if (tid % 32 == 0) part_s[tid / 32] = total;
        __syncthreads();
        total = group_sum<32>(tid % 32 < WARPS ? part_s[tid % 32] : 0.0);
    }
#if OP_LOG_SOFTMAX
    const double level = double(m) + log(total);
#else
    const double level = 1.0 / total;
#endif
    const float hi = float(level), lo = float(level - double(hi));

    // the columns [from, to) are this block's to store
    int from = 0, to = count;
    if constexpr (SPLIT > 1) {
        const int share = ((cols + W - 1) / W + SPLIT - 1) / SPLIT * W;
        from = int(blockIdx.x % SPLIT) * share;
        to = min(count, from + share);
    }
#pragma unroll
    for (int k = 0; k < NV; ++k) {
        Vec<T_y, W> out;
#pragma unroll
        for (int j = 0; j < W; ++j) {
            const float v = e[k * W + j];
#if OP_LOG_SOFTMAX
            out[j] = from_float<T_y>((v - hi) - lo);
#else
            out[j] = from_float<T_y>(sizeof(T_y) == 2 ? v * hi : fmaf(v, hi, v * lo));
#endif
        }
        if constexpr (VEC) {
            const int i = k * GROUP + lane;
            if (i * W >= from && i * W < to) {
                if constexpr (sizeof(out) == 16 && SPLIT == 1)
                    __stcs(reinterpret_cast<uint4*>(dst) + i, *reinterpret_cast<const uint4*>(&out));
                else
                    store_vec<W>(dst + i * W, out);
            }
        } else {
#pragma unroll
            for (int j = 0; j < W; ++j)
                if ((k * W + j) * GROUP >= from - lane && (k * W + j) * GROUP < to - lane)
                    dst[lane + (k * W + j) * GROUP] = out[j];
        }
    }
}
