/*---
implements = "layer_norm"
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
optional   = ["weight", "bias", "mean", "rstd"]
dims       = { cols = "normalized_shape.product", rows = "x.numel // cols", w = "16 // x.itemsize", nvec = "cols // w", share = "ceil_div(nvec, G)", groups = "min(rows, device.sms // G)", sw = "7 * (NV == 8) + 8 * (NV == 7) + 8 * (NV == 6) + 11 * (NV == 5) + 12 * (NV < 5) - 3 * (NV == 3)", slots = "56 // NV // sw * sw" }
where      = ["device.arch >= 90", "x.contiguous", "y.contiguous", "weight.contiguous", "bias.contiguous", "mean.contiguous", "rstd.contiguous",
              "cols % w == 0", "nvec >= 1024", "rows >= 1", "rows <= 1073741824", "device.sms >= G", "share * (G - 1) < nvec",
              "share >= 192", "256 * NV >= share", "256 * (NV - 1) < share", "slots * (NV * 4096 + 32) + 64 <= device.smem_per_block"]
tune       = { G = [1, 2, 4, 8, 16, 32, 64, 128], NV = [1, 2, 3, 4, 5, 6, 7, 8] }
align      = 16
[[workspace]]
name  = "partial"
dtype = "int64"
shape = ["rows", "G", "2"]
zero  = true
[[launch]]
kernel      = "ln_strips"
grid        = ["groups * G"]
block       = ["256 + 32 * sw"]
smem        = "slots * NV * 4096"
cooperative = true
args        = ["x", "weight", "bias", "y", "mean", "rstd", "partial", "rows", "cols", "groups"]
---*/
// G blocks form a group; block b of it owns the same strip of columns of every row of the group (rows group, group + groups, ...).
// Strips arrive by bulk copies in a ring of SLOTS. Statistics warp s takes the slots s, s + SW, ...: its strip's sum and squared
// deviations go, in double, to `partial` [row][block] as the complement of their bits, which is 0 exactly until it is written; then
// it gathers its row's G pairs and hands (mean hi, mean lo, rstd) to the 256 normaliser threads, which hold their columns' weight and
// bias in registers for the whole kernel, store the row's strip, and refill the slot.
// Order: the publication of row i waits at most for the totals of earlier rows, and all blocks are resident (cooperative launch).
enum {
    W = 16 / int(sizeof(T_x)),
    NT = 256,                    // normaliser threads, warps 0 to 7
    SW = NV == 8 ? 7 : NV == 7 ? 8 : NV == 6 ? 8 : NV == 5 ? 11 : NV == 3 ? 9 : 12,  // statistics warps
    SLOTS = 56 / NV / SW * SW,   // a slot belongs to one statistics warp, which so sees every phase of its barrier
    SLOTVECS = NV * NT,
    BV = 32 / W,                 // vectors of a lane's batch: 32 elements
    GL = (G + 31) / 32
};

#if defined(P_EPS)
#define EPSILON P_EPS
#elif defined(P_LAYER_NORM_EPS)
#define EPSILON P_LAYER_NORM_EPS
#else
#error "the parameter eps has another name"
#endif

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
__device__ __forceinline__ uint64_t encode(double v) {
    const uint64_t bits = v != v ? 0x7ff8000000000000ull : uint64_t(__double_as_longlong(v));
    return ~bits;
}
__device__ __forceinline__ double decode(uint64_t word) { return __longlong_as_double((long long)(~word)); }
__device__ __forceinline__ void publish(uint64_t* to, uint64_t a, uint64_t b) {
    asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(a), "l"(b) : "memory");
}
__device__ __forceinline__ void look(const uint64_t* from, uint64_t& a, uint64_t& b) {
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(from) : "memory");
}

// keeps 16-bit weights packed: the compiler may not widen them outside the loop over the rows
template <class V> __device__ __forceinline__ void stay_packed(V& v) {
    if constexpr (sizeof(v[0]) == 2) {
        uint32_t (&u)[sizeof(V) / 4] = reinterpret_cast<uint32_t (&)[sizeof(V) / 4]>(v);
#pragma unroll
        for (int i = 0; i < int(sizeof(V) / 4); ++i) asm volatile("" : "+r"(u[i]));
    }
}

// a lane's sums about K: n elements, s = sum (x - K), q = sum (x - K)^2
struct Lane {
    double K, s, q;
    float n;
};
// vectors at, at + 32, ... (BV of them, of `count` in all) of the strip join the lane's sums
template <bool FULL> __device__ __forceinline__ void take(Lane& l, const Vec<T_x, W>* strip, int at, int count) {
    float t[BV];
    Vec<T_x, W> v[BV];
    int have = 0;
#pragma unroll
    for (int k = 0; k < BV; ++k) {
        t[k] = 0.f;
        if (FULL || at + 32 * k < count) {
            v[k] = strip[at + 32 * k];
            float a[W];
#pragma unroll
            for (int j = 0; j < W; ++j) a[j] = to_float(v[k][j]);
            t[k] = Tree<W>::sum(a);
            ++have;
        }
    }
    if (!FULL && have == 0) return;
    const float n = FULL ? 32.f : float(have * W);
    const float total = Tree<BV>::sum(t);
    const float m = FULL ? total * 0.03125f : __fdividef(total, n);  // any number near the mean will do
    float es[BV], eq[BV];
#pragma unroll
    for (int k = 0; k < BV; ++k) {
        es[k] = eq[k] = 0.f;
        if (FULL || at + 32 * k < count) {
            float a[W];
#pragma unroll
            for (int j = 0; j < W; ++j) {
                a[j] = to_float(v[k][j]) - m;
                eq[k] = fmaf(a[j], a[j], eq[k]);
            }
            es[k] = Tree<W>::sum(a);
        }
    }
    const float e1 = Tree<BV>::sum(es), e2 = Tree<BV>::sum(eq);
    if (e2 < INFINITY) {
        if (l.n == 0.f) l.K = double(m);
        const double d = double(m) - l.K, nd = double(n) * d;
        l.s += nd + double(e1);
        l.q += fma(d, nd + 2.0 * double(e1), double(e2));
    } else {  // float overflowed, or there is a NaN or Inf
        if (l.n == 0.f) l.K = double(to_float(strip[at][0]));
#pragma unroll 1
        for (int k = 0; k < BV; ++k)
            if (FULL || at + 32 * k < count) {
                const Vec<T_x, W> u = strip[at + 32 * k];
#pragma unroll
                for (int j = 0; j < W; ++j) {
                    const double d = double(to_float(u[j])) - l.K;
                    l.s += d;
                    l.q = fma(d, d, l.q);
                }
            }
    }
    l.n += n;
}

extern "C" __global__ void __launch_bounds__(NT + 32 * SW, 1) ln_strips(
    const T_x* __restrict__ x, const T_weight* __restrict__ weight, const T_bias* __restrict__ bias, T_y* __restrict__ y,
    T_mean* __restrict__ mean, T_rstd* __restrict__ rstd, uint64_t* partial, int rows, int cols, int groups) {
    extern __shared__ __align__(128) Vec<T_x, W> ring[];
    __shared__ __align__(16) float4 stat[SLOTS];
    __shared__ __align__(8) uint64_t full[SLOTS], ready[SLOTS];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int block = int(blockIdx.x) % G, group = int(blockIdx.x) / G;
    const int nvec = cols / W;
    const int share = (nvec + G - 1) / G;
    const int first = block * share;
    const int count = min(share, nvec - first);  // where: at least 1
    const uint32_t bytes = uint32_t(count) * 16;

    if (tid == 0) {
        for (int s = 0; s < SLOTS; ++s) {
            mbarrier_init(&full[s], 1);
            mbarrier_init(&ready[s], 32);
        }
        mbarrier_init_fence();
        fence_async_shared();
    }
    __syncthreads();

    if (warp < NT / 32) {
        if (tid == 0) {
            for (int s = 0; s < SLOTS; ++s) {
                const int64_t row = group + int64_t(s) * groups;
                if (row < rows) {
                    mbarrier_arrive_expect(&full[s], bytes);
                    bulk_load(ring + s * SLOTVECS, x + row * cols + int64_t(first) * W, bytes, &full[s]);
                }
            }
        }
        Vec<T_weight, W> wv[NV];
        Vec<T_bias, W> bv[NV];
#pragma unroll
        for (int k = 0; k < NV; ++k)
            if (tid + k * NT < count) {
                if (HAS_WEIGHT) wv[k] = load_vec<W>(weight + (int64_t(first) + tid + k * NT) * W);
                if (HAS_BIAS) bv[k] = load_vec<W>(bias + (int64_t(first) + tid + k * NT) * W);
            }
        int slot = 0;
        uint32_t phase = 0;
        for (int64_t row = group; row < rows; row += groups) {
            mbarrier_wait(&ready[slot], phase);
            mbarrier_wait(&full[slot], phase);  // long complete; makes the copy visible to this thread
            const float4 st = stat[slot];
            const Vec<T_x, W>* strip = ring + slot * SLOTVECS;
            Vec<T_x, W> v[NV];
#pragma unroll
            for (int k = 0; k < NV; ++k)
                if (tid + k * NT < count) v[k] = strip[tid + k * NT];
            barrier_sync(1, NT);  // the slot is read by all
            if (tid == 0) {
                const int64_t next = row + int64_t(SLOTS) * groups;
                if (next < rows) {
                    mbarrier_arrive_expect(&full[slot], bytes);
                    bulk_load(ring + slot * SLOTVECS, x + next * cols + int64_t(first) * W, bytes, &full[slot]);
                }
            }
            T_y* dst = y + row * cols + int64_t(first) * W;
#pragma unroll
            for (int k = 0; k < NV; ++k)
                if (tid + k * NT < count) {
                    Vec<T_y, W> out;
                    stay_packed(v[k]);
                    if (HAS_WEIGHT) stay_packed(wv[k]);
                    if (HAS_BIAS) stay_packed(bv[k]);
#pragma unroll
                    for (int j = 0; j < W; ++j)
                        out[j] = from_float<T_y>(affine(((to_float(v[k][j]) - st.x) - st.y) * st.z, HAS_WEIGHT ? to_float(wv[k][j]) : 1.f,
                                                        HAS_BIAS ? to_float(bv[k][j]) : 0.f));
                    T_y* to = dst + (tid + k * NT) * W;
                    if constexpr (sizeof(out) == 16) __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&out));
                    else store_vec<W>(to, out);
                }
            if (++slot == SLOTS) {
                slot = 0;
                phase ^= 1;
            }
        }
    } else {
        const int me = warp - NT / 32;
        const double n_mine = double(count * W), n_share = double(share * W), n_last = double((nvec - share * (G - 1)) * W);
        const double inv_share = 1.0 / n_share, inv_last = 1.0 / n_last, inv_all = 1.0 / double(cols);
        const double inv_mine = 1.0 / n_mine;
        int slot = me;
        uint32_t phase = 0;
        for (int64_t row = group + int64_t(me) * groups; row < rows; row += int64_t(SW) * groups) {
            mbarrier_wait(&full[slot], phase);
            const Vec<T_x, W>* strip = ring + slot * SLOTVECS;
            Lane l = {0.0, 0.0, 0.0, 0.f};
            int at = 0;
#pragma unroll 1
            for (; at + 32 * BV <= count; at += 32 * BV) take<true>(l, strip, at + lane, count);
            if (at < count) take<false>(l, strip, at + lane, count);
            // about lane 0's K, which always has elements
            const double K = __shfl_sync(0xffffffffu, l.K, 0);
            double s = l.s, q = l.q;
            if (l.n > 0.f) {
                const double d = l.K - K, nd = double(l.n) * d;
                q = fma(d, nd + 2.0 * s, q);
                s += nd;
            }
#pragma unroll
            for (int o = 16; o > 0; o /= 2) {
                s += __shfl_xor_sync(0xffffffffu, s, o);
                q += __shfl_xor_sync(0xffffffffu, q, o);
            }
            double m2 = q - s * (s * inv_mine);
            if (m2 < 0.0) m2 = 0.0;  // NaN stays
            uint64_t* line = partial + row * (2 * G);
            if (lane == 0) publish(line + 2 * block, encode(fma(n_mine, K, s)), encode(m2));

            uint64_t a[GL], b[GL];
#pragma unroll
            for (int j = 0; j < GL; ++j) a[j] = b[j] = 0;
            while (true) {
                bool missing = false;
#pragma unroll
                for (int j = 0; j < GL; ++j)
                    if (lane + 32 * j < G && (a[j] == 0 || b[j] == 0)) {
                        look(line + 2 * (lane + 32 * j), a[j], b[j]);
                        missing = true;
                    }
                if (!missing) break;
                bool again = false;
#pragma unroll
                for (int j = 0; j < GL; ++j) again = again || (lane + 32 * j < G && (a[j] == 0 || b[j] == 0));
                if (!again) break;
                __nanosleep(100);
            }
            __syncwarp();
            double sum = 0.0;
#pragma unroll
            for (int j = 0; j < GL; ++j)
                if (lane + 32 * j < G) sum += decode(a[j]);
            const double md = warp_sum(sum) * inv_all;
            double dev = 0.0;
#pragma unroll
            for (int j = 0; j < GL; ++j)
                if (lane + 32 * j < G) {
                    const bool last = lane + 32 * j == G - 1;
                    const double d = decode(a[j]) * (last ? inv_last : inv_share) - md;
                    dev += fma((last ? n_last : n_share) * d, d, decode(b[j]));
                }
            const double var = warp_sum(dev) * inv_all;
            const float hi = fabs(md) < INFINITY ? float(md) : NAN, lo = float(md - double(hi));
            const float r = float(1.0 / sqrt(var + double(EPSILON)));
            if (lane == 0) {
                stat[slot] = make_float4(hi, lo, r, 0.f);
                if (block == 0) {
                    if (HAS_MEAN) mean[row] = from_float<T_mean>(hi);
                    if (HAS_RSTD) rstd[row] = from_float<T_rstd>(r);
                }
            }
            mbarrier_arrive(&ready[slot]);
            slot += SW;
            if (slot >= SLOTS) {
                slot -= SLOTS;
                phase ^= 1;
            }
        }
    }
}
