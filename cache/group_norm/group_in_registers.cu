/*---
implements = ["group_norm", "group_norm.relu", "group_norm.silu"]
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
optional   = ["weight", "bias", "mean", "rstd"]
dims       = { n = "x.shape[0]", c = "x.shape[1]", hw = "x.numel // (n * c)", cg = "c // group", gsize = "cg * hw", w = "16 // x.itemsize", unit = "max(1, w * (MODE > 0))", nvec = "gsize // unit", share = "ceil_div(nvec, CLUSTER)", per = "1 + 3 * (MODE == 0)", whole = "ceil_div(nvec, per)", part = "ceil_div(share, per)", threads = "min(512, 32 * ceil_div(part, 32 * NV))" }
where      = ["device.arch >= 90", "x.ndim >= 2", "x.contiguous", "y.contiguous", "weight.contiguous", "bias.contiguous", "mean.contiguous", "rstd.contiguous",
              "n >= 1", "c >= 1", "hw >= 1", "c % group == 0", "gsize <= 268435456", "n * group <= 268435455",
              "MODE == (gsize % w == 0) + (hw % w == 0)",
              "LANES == 8 * (whole <= 16) + 32 * (whole > 16) * (whole <= 256)",
              "(LANES == 0) + (CLUSTER == 1) * (LANES * NV >= whole) * (LANES * NV < 2 * whole + LANES) >= 1",
              "(LANES > 0) + (threads * NV >= min(part, 4096)) * (part >= 96 * NV * (NV > 1)) >= 1",
              "CLUSTER * 4096 >= min(whole, 32768)", "whole >= 1536 * CLUSTER * (CLUSTER > 1)"]
tune       = { CLUSTER = [1, 2, 4, 8], NV = [1, 2, 4, 7, 8], LANES = [0, 8, 32], MODE = [0, 1, 2] }
align      = 16
[[launch]]
kernel  = "group_norm_registers"
grid    = ["ceil_div(n * group, max(1, 256 // max(LANES, 1) * (LANES > 0))) * CLUSTER"]
block   = ["threads * (LANES == 0) + 256 * (LANES > 0)"]
cluster = ["CLUSTER"]
args    = ["x", "weight", "bias", "y", "mean", "rstd", "nvec", "hw", "cg", "group", "n * group"]
---*/
// A cluster per group, a contiguous share per block, held in registers as loaded: NV vectors per thread, blockDim.x threads. Small
// groups: LANES lanes each. What exceeds 8 blocks of 512 threads is streamed, and read again, last first, for the output.
// MODE 2: 16-byte vectors within a channel; 1: vectors that may straddle channels; 0: scalars (group size no multiple of a vector).
// Each thread sums deviations from about its own mean in float, re-expanded in double about the group's first element K:
// sum (x - K)^2 <= (1 + N) * sum (x - mean)^2, so that the variance loses at most a factor N of 2^-53 there.
constexpr int W = MODE ? 16 / int(sizeof(T_x)) : 1;
constexpr int S = MODE ? NV : 4 * NV;  // vectors per thread
constexpr int U = MODE ? 4 : 8;
#define STREAM (CLUSTER == 8 && NV == 8)  // see `where`: elsewhere all of a share is held
#define LEAN (MODE == 2 && LANES == 0 && sizeof(T_x) == 4 && !STREAM && !HAS_MEAN)
constexpr int REGISTERS = LEAN && NV == 7 ? 48 : LEAN ? 64 : 128;
constexpr int STEPS = LANES ? LANES : 32;

#if defined(P_EPS)
#define EPSILON P_EPS
#elif defined(P_GROUP_NORM_EPS)
#define EPSILON P_GROUP_NORM_EPS
#else
#error "the parameter eps has another name"
#endif

__device__ __forceinline__ uint32_t in_block(const void* p, uint32_t rank) {
    uint32_t a;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(smem_address(p)), "r"(rank));
    return a;
}
__device__ __forceinline__ void send16(uint32_t to, uint32_t barrier, double a, double b) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(to), "r"(__double2loint(a)), "r"(__double2hiint(a)), "r"(__double2loint(b)), "r"(__double2hiint(b)),
                   "r"(barrier) : "memory");
}
// i / d for i < 2^31 and magic = 2^32 / d rounded up
__device__ __forceinline__ uint32_t divide(uint32_t i, uint32_t d, uint32_t magic) {
    if (d == 1) return i;
    const uint32_t q = __umulhi(i, magic);
    return q * d > i ? q - 1 : q;
}
__device__ __forceinline__ float activate(float v) {
#if OP_RELU
    v = v < 0.f ? 0.f : v;  // NaN stays
#elif OP_SILU
    v = v / (1.f + expf(-v));
#endif
    return v;
}
__device__ __forceinline__ Vec<T_x, W> read(const T_x* p) {
    if constexpr (MODE) {
        const uint4 bits = __ldg(reinterpret_cast<const uint4*>(p));
        return *reinterpret_cast<const Vec<T_x, W>*>(&bits);
    } else {
        return load_vec<W>(p);
    }
}
__device__ __forceinline__ void add(const Vec<T_x, W>& v, double k, double& s, double& q) {
#pragma unroll
    for (int j = 0; j < W; ++j) {
        const double d = double(to_float(v[j])) - k;
        s += d;
        q = fma(d, d, q);
    }
}

// the sums of N vectors of this thread, those below `valid`
template <int N> __device__ __forceinline__ void add_float(const Vec<T_x, W> (&v)[N], int valid, double k, double& s, double& q) {
    float t = 0.f;
#pragma unroll
    for (int u = 0; u < N; ++u)
        if (u < valid) {
            float a = to_float(v[u][0]);
#pragma unroll
            for (int j = 1; j < W; ++j) a += to_float(v[u][j]);
            t += a;
        }
    const float n = float(valid * W);
    const float m = valid > 0 ? t / n : 0.f;  // any number near the mean will do
    float es = 0.f, eq = 0.f;
#pragma unroll
    for (int u = 0; u < N; ++u)
        if (u < valid) {
            float as = 0.f, aq = 0.f;
#pragma unroll
            for (int j = 0; j < W; ++j) {
                const float e = to_float(v[u][j]) - m;
                as += e;
                aq = fmaf(e, e, aq);
            }
            es += as;
            eq += aq;
        }
    if (valid > 0) {
        const double d = double(m) - k, nd = double(n) * d;
        s = nd + double(es);
        q = fma(d, nd + 2.0 * double(es), double(eq));
    }
}

struct Output {
    const T_weight* weight;
    const T_bias* bias;
    uint32_t per;    // MODE 2: vectors per channel, else elements per channel
    uint32_t magic;
    float hi, lo;
    double r;
    __device__ __forceinline__ void factors(uint32_t ch, float& a, float& b) const {
        a = HAS_WEIGHT ? float(r * double(to_float(weight[ch]))) : float(r);
        b = HAS_BIAS ? to_float(bias[ch]) : 0.f;
    }
    // vector i of the group, to p
    __device__ __forceinline__ void write(T_y* p, const Vec<T_x, W>& v, uint32_t i) const {
        uint32_t ch = divide(MODE == 2 ? i : i * W, per, magic);
        uint32_t within = MODE == 2 ? 0u : i * W - ch * per;
        float a, b;
        factors(ch, a, b);
        Vec<T_y, W> out;
#pragma unroll
        for (int j = 0; j < W; ++j) {
            if (MODE != 2 && j > 0 && ++within == per) {
                within = 0;
                factors(++ch, a, b);
            }
            const float d = (to_float(v[j]) - hi) - lo;
            out[j] = from_float<T_y>(activate(HAS_BIAS ? fmaf(d, a, b) : d * a));
        }
        if constexpr (sizeof(out) == 16) __stcs(reinterpret_cast<uint4*>(p), *reinterpret_cast<const uint4*>(&out));
        else store_vec<W>(p, out);
    }
};

extern "C" __global__ void __maxnreg__(REGISTERS) group_norm_registers(
    const T_x* __restrict__ x, const T_weight* __restrict__ weight, const T_bias* __restrict__ bias, T_y* __restrict__ y,
    T_mean* __restrict__ mean, T_rstd* __restrict__ rstd, int nvec, int hw, int cg, int groups, int64_t all) {
    __shared__ __align__(16) double mailbox[CLUSTER][2];
    __shared__ double part[16][2];
    __shared__ __align__(8) uint64_t mail;
    const int tid = threadIdx.x;
    const int width = LANES ? LANES : int(blockDim.x), lane = LANES ? tid % STEPS : tid;
    const int rank = CLUSTER > 1 ? int(blockIdx.x % CLUSTER) : 0;
    const int64_t g = LANES ? int64_t(blockIdx.x) * (256 / STEPS) + tid / STEPS : int64_t(blockIdx.x / CLUSTER);
    const int share = (nvec + CLUSTER - 1) / CLUSTER;
    const int first = rank * share;
    const int count = g < all ? max(0, min(share, nvec - first)) : 0;
    const int res = min(count, S * width);
    const T_x* base = x + g * nvec * W;
    const T_x* src = base + int64_t(first) * W;
    T_y* dst = y + (g * nvec + first) * W;

    if constexpr (CLUSTER > 1) {
        if (tid == 0) {
            mbarrier_init(&mail, 1);
            mbarrier_init_fence();
            mbarrier_arrive_expect(&mail, CLUSTER * 16);
        }
        __syncwarp();
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");  // waited for before the first message
    }
    Vec<T_x, W> v[S];
#pragma unroll
    for (int u = 0; u < S; ++u)
        if (u * width < res - lane) v[u] = read(src + int64_t(lane + u * width) * W);
    const double k = g < all ? double(to_float(base[0])) : 0.0;
    const int valid = lane < res ? (res - lane + width - 1) / width : 0;

    double s = 0.0, q = 0.0;
    add_float<S>(v, valid, k, s, q);
    if constexpr (STREAM) for (int i = res + lane; i < count; i += U * width) {
        Vec<T_x, W> t[U];
#pragma unroll
        for (int u = 0; u < U; ++u)
            if (i + u * width < count) t[u] = read(src + int64_t(i + u * width) * W);
#pragma unroll
        for (int u = 0; u < U; ++u)
            if (i + u * width < count) add(t[u], k, s, q);
    }
#pragma unroll
    for (int o = STEPS / 2; o > 0; o /= 2) {
        s += __shfl_xor_sync(0xffffffffu, s, o);
        q += __shfl_xor_sync(0xffffffffu, q, o);
    }
    if constexpr (LANES == 0) {
        const int warps = int(blockDim.x) / 32;
        if (warps > 1) {
            if (tid % 32 == 0) {
                part[tid / 32][0] = s;
                part[tid / 32][1] = q;
            }
            __syncthreads();
            s = tid % 16 < warps ? part[tid % 16][0] : 0.0;
            q = tid % 16 < warps ? part[tid % 16][1] : 0.0;
#pragma unroll
            for (int o = 8; o > 0; o /= 2) {
                s += __shfl_xor_sync(0xffffffffu, s, o);
                q += __shfl_xor_sync(0xffffffffu, q, o);
            }
        }
    }
    if constexpr (CLUSTER > 1) {
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // every block has started and armed its mailbox
        if (tid < CLUSTER) send16(in_block(&mailbox[rank][0], uint32_t(tid)), in_block(&mail, uint32_t(tid)), s, q);
        mbarrier_wait_cluster(&mail, 0);  // all CLUSTER messages are here; nobody writes to this block any more
        s = q = 0.0;
#pragma unroll
        for (int r = 0; r < CLUSTER; ++r) {
            s += mailbox[r][0];
            q += mailbox[r][1];
        }
    }
    const double total = double(nvec) * double(W);
    const double shift = s / total;  // mean - K
    double var = (q - s * shift) / total;
    if (var < 0.0) var = 0.0;        // NaN stays
    const double m = k + shift;
    Output out;
    const uint32_t channel = uint32_t(g % groups) * uint32_t(cg);
    out.weight = weight + (HAS_WEIGHT ? channel : 0u);
    out.bias = bias + (HAS_BIAS ? channel : 0u);
    out.per = uint32_t(MODE == 2 ? hw / W : hw);
    out.magic = 0xffffffffu / out.per + 1u;
    out.hi = float(m);
    out.lo = float(m - double(out.hi));  // NaN where the mean is Inf or NaN
    out.r = 1.0 / sqrt(var + double(EPSILON));
    if (rank == 0 && lane == 0 && g < all) {
        if (HAS_MEAN) mean[g] = from_float<T_mean>(float(m));
        if (HAS_RSTD) rstd[g] = from_float<T_rstd>(float(out.r));
    }

    if constexpr (STREAM) {  // what was not held: the part read last first, L2 still has it
        const int steps = (count - res + U * width - 1) / (U * width);
        for (int t = steps - 1; t >= 0; --t) {
            const int i = res + t * U * width + lane;
            Vec<T_x, W> v[U];
#pragma unroll
            for (int u = 0; u < U; ++u)
                if (i + u * width < count) v[u] = read(src + int64_t(i + u * width) * W);
#pragma unroll
            for (int u = 0; u < U; ++u)
                if (i + u * width < count)
                    out.write(dst + int64_t(i + u * width) * W, v[u], uint32_t(first + i + u * width));
        }
    }
#pragma unroll
    for (int u = 0; u < S; ++u) {
        if (u * width < res - lane) out.write(dst + int64_t(lane + u * width) * W, v[u], uint32_t(first + lane + u * width));
        if constexpr (MODE == 0) asm volatile("" ::: "memory");  // no loads of weights for later elements: too many registers
    }
}
