/*---
implements = ["layer_norm", "add.layer_norm"]
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
optional   = ["weight", "bias", "mean", "rstd", "residual"]
dims       = { cols = "normalized_shape.product", rows = "x.numel // cols", w = "16 // x.itemsize", nvec = "ceil_div(cols, w)", rpb = "max(1, 256 // GROUP * (GROUP < 64))" }
where      = ["x.contiguous", "y.contiguous", "weight.contiguous", "bias.contiguous", "mean.contiguous", "rstd.contiguous", "residual.contiguous",
              "cols >= 1", "rows >= 1", "rows <= 2147483647", "VEC == (cols % w == 0)", "GROUP * NV >= nvec", "2 * GROUP * NV <= 3 * nvec + 14",
              "GROUP >= 16 * (nvec > 32)", "GROUP <= 256 + 768 * max(nvec > 2048, max(VEC == 0, HAS_RESIDUAL))",
              "NV <= 8 + 8 * (GROUP == 32)", "(VEC == 1) + (NV * w <= 32) >= 1", "(HAS_RESIDUAL == 0) + (NV * w <= 32) >= 1", "GROUP * NV <= 4096"]
tune       = { GROUP = [8, 16, 32, 64, 128, 256, 512, 1024], NV = [1, 2, 3, 4, 6, 8, 16], VEC = [0, 1] }
align      = 16
[[launch]]
kernel = "ln_registers"
grid   = ["ceil_div(rows, rpb)"]
block  = ["max(GROUP, 256 * (GROUP < 64))"]
args   = ["x", "residual", "weight", "bias", "y", "mean", "rstd", "rows", "cols"]
---*/
// GROUP threads per row (below 64: several rows per block of 256 threads, shuffles only). Each thread takes the statistics of its
// own elements in two passes over its registers, deviations from about its own mean in float, and re-expands them in double about
// the row's first element K: sum (x - K)^2 <= (1 + cols) * sum (x - mean)^2, so nothing is lost there and one reduction does.
constexpr int W = 16 / int(sizeof(T_x));
constexpr int E = NV * W;
constexpr int BLOCK = GROUP < 64 ? 256 : GROUP;
constexpr int RPB = BLOCK / GROUP;
constexpr int WARPS = BLOCK / 32;
constexpr int LANES = GROUP < 32 ? GROUP : 32;
#define EARLY (VEC == 1 && NV <= 2)  // weight and bias wait in registers

#if defined(P_EPS)
#define EPSILON P_EPS
#elif defined(P_LAYER_NORM_EPS)
#define EPSILON P_LAYER_NORM_EPS
#else
#error "the parameter eps has another name"
#endif

#if HAS_RESIDUAL
typedef float Stored;
#else
typedef T_x Stored;
#endif

__device__ __forceinline__ Vec<T_x, W> stream(const T_x* p) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
    return *reinterpret_cast<const Vec<T_x, W>*>(&bits);
}
template <int N> struct Tree {
    static __device__ __forceinline__ float sum(const float* a) { return Tree<N / 2>::sum(a) + Tree<N / 2>::sum(a + N / 2); }
};
template <> struct Tree<1> {
    static __device__ __forceinline__ float sum(const float* a) { return a[0]; }
};
__device__ __forceinline__ float affine(float n, float w, float b) {
    if (HAS_WEIGHT && HAS_BIAS) return fmaf(n, w, b);
    if (HAS_WEIGHT) return n * w;
    if (HAS_BIAS) return n + b;
    return n;
}

extern "C" __global__ void __launch_bounds__(BLOCK) ln_registers(
    const T_x* __restrict__ x, const T_residual* __restrict__ residual, const T_weight* __restrict__ weight,
    const T_bias* __restrict__ bias, T_y* __restrict__ y, T_mean* __restrict__ mean, T_rstd* __restrict__ rstd, int64_t rows, int cols) {
    __shared__ double part[WARPS][2];
    const int tid = threadIdx.x, lane = tid % GROUP;
    const int64_t row = int64_t(blockIdx.x) * RPB + tid / GROUP;
    const int count = row < rows ? cols : 0;
    const T_x* src = x + row * cols;
    [[maybe_unused]] const T_residual* res = residual + (HAS_RESIDUAL ? row * cols : 0);
    T_y* dst = y + row * cols;

    // element j of vector k: VEC (k * GROUP + lane) * W + j, else (k * W + j) * GROUP + lane
    Stored v[E];
    int valid;  // VEC: vectors, else elements of this thread
    if constexpr (VEC) {
        const int nvec = count / W;
        valid = lane < nvec ? (nvec - lane + GROUP - 1) / GROUP : 0;
#if HAS_RESIDUAL
        Vec<T_x, W> a[NV];
        Vec<T_residual, W> b[NV];
#pragma unroll
        for (int k = 0; k < NV; ++k)
            if (k < valid) {
                a[k] = stream(src + (k * GROUP + lane) * W);
                b[k] = load_vec<W>(res + (k * GROUP + lane) * W);
            }
#pragma unroll
        for (int k = 0; k < E; ++k) v[k] = to_float(a[k / W][k % W]) + to_float(b[k / W][k % W]);
#else
#pragma unroll
        for (int k = 0; k < NV; ++k)
            if (k < valid) {
                const Vec<T_x, W> a = stream(src + (k * GROUP + lane) * W);
#pragma unroll
                for (int j = 0; j < W; ++j) v[k * W + j] = a[j];
            }
#endif
    } else {
        valid = lane < count ? (count - lane + GROUP - 1) / GROUP : 0;
#pragma unroll
        for (int k = 0; k < E; ++k)
            if (k < valid) {
#if HAS_RESIDUAL
                v[k] = to_float(src[lane + k * GROUP]) + to_float(res[lane + k * GROUP]);
#else
                v[k] = src[lane + k * GROUP];
#endif
            }
    }
    Vec<T_weight, W> wv[EARLY ? NV : 1];
    Vec<T_bias, W> bv[EARLY ? NV : 1];
    if constexpr (EARLY) {
#pragma unroll
        for (int k = 0; k < NV; ++k)
            if (k < valid) {
                if (HAS_WEIGHT) wv[k] = load_vec<W>(weight + (k * GROUP + lane) * W);
                if (HAS_BIAS) bv[k] = load_vec<W>(bias + (k * GROUP + lane) * W);
            }
    }
    double base = 0.0;
    if (count > 0) {
        base = double(to_float(src[0]));
#if HAS_RESIDUAL
        base += double(to_float(res[0]));
#endif
    }

    constexpr int UNIT = VEC ? W : 1;  // elements that are valid together
    float t = 0.f;
#pragma unroll
    for (int k = 0; k < E / UNIT; ++k)
        if (k < valid) {
            float a[UNIT];
#pragma unroll
            for (int j = 0; j < UNIT; ++j) a[j] = to_float(v[k * UNIT + j]);
            t += Tree<UNIT>::sum(a);
        }
    const float n = float(valid * UNIT);
    const float m = valid > 0 ? __fdividef(t, n) : 0.f;  // any number near the mean will do
    float es = 0.f, eq = 0.f;
#pragma unroll
    for (int k = 0; k < E / UNIT; ++k)
        if (k < valid) {
            float a[UNIT], aq = 0.f;
#pragma unroll
            for (int j = 0; j < UNIT; ++j) {
                a[j] = to_float(v[k * UNIT + j]) - m;
                aq = fmaf(a[j], a[j], aq);
            }
            es += Tree<UNIT>::sum(a);
            eq += aq;
        }
    double s = 0.0, q = 0.0;
    if (valid > 0) {
        const double d = double(m) - base, nd = double(n) * d;
        s = nd + double(es);
        q = fma(d, nd + 2.0 * double(es), double(eq));
    }
#pragma unroll
    for (int o = LANES / 2; o > 0; o /= 2) {
        s += __shfl_xor_sync(0xffffffffu, s, o);
        q += __shfl_xor_sync(0xffffffffu, q, o);
    }
    if constexpr (GROUP >= 64) {
        if (tid % 32 == 0) {
            part[tid / 32][0] = s;
            part[tid / 32][1] = q;
        }
        __syncthreads();
        s = part[tid % WARPS][0];
        q = part[tid % WARPS][1];
#pragma unroll
        for (int o = WARPS / 2; o > 0; o /= 2) {
            s += __shfl_xor_sync(0xffffffffu, s, o);
            q += __shfl_xor_sync(0xffffffffu, q, o);
        }
    }
    const double inv = 1.0 / double(cols);
    const double shift = s * inv;  // mean - K
    double var = (q - s * shift) * inv;
    if (var < 0.0) var = 0.0;      // NaN stays
    const double md = base + shift;
    const float hi = float(md), lo = float(md - double(hi));  // NaN where the mean is Inf or NaN
    const float r = float(1.0 / sqrt(var + double(EPSILON)));
    if (lane == 0 && count > 0) {
        if (HAS_MEAN) mean[row] = from_float<T_mean>(float(md));
        if (HAS_RSTD) rstd[row] = from_float<T_rstd>(r);
    }

    if constexpr (VEC) {
#pragma unroll
        for (int k = 0; k < NV; ++k)
            if (k < valid) {
                const int at = (k * GROUP + lane) * W;
                if constexpr (!EARLY) {
                    if (HAS_WEIGHT) wv[0] = load_vec<W>(weight + at);
                    if (HAS_BIAS) bv[0] = load_vec<W>(bias + at);
                }
                const Vec<T_weight, W>& wk = wv[EARLY ? k : 0];
                const Vec<T_bias, W>& bk = bv[EARLY ? k : 0];
                Vec<T_y, W> out;
#pragma unroll
                for (int j = 0; j < W; ++j)
                    out[j] = from_float<T_y>(affine(((to_float(v[k * W + j]) - hi) - lo) * r, HAS_WEIGHT ? to_float(wk[j]) : 1.f,
                                                    HAS_BIAS ? to_float(bk[j]) : 0.f));
                if constexpr (sizeof(out) == 16) __stcs(reinterpret_cast<uint4*>(dst + at), *reinterpret_cast<const uint4*>(&out));
                else store_vec<W>(dst + at, out);
            }
    } else {
#pragma unroll
        for (int k = 0; k < E; ++k)
            if (k < valid) {
                const int at = lane + k * GROUP;
                dst[at] = from_float<T_y>(affine(((to_float(v[k]) - hi) - lo) * r, HAS_WEIGHT ? to_float(weight[at]) : 1.f,
                                                 HAS_BIAS ? to_float(bias[at]) : 0.f));
            }
    }
}
