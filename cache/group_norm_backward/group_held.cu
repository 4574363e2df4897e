/*---
implements = "group_norm_backward"
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
optional   = ["weight", "grad_weight", "grad_bias"]
dims       = { n = "x.shape[0]", c = "x.shape[1]", hw = "x.numel // (n * c)", cg = "c // group", w = "16 // x.itemsize", hvec = "hw // w", base = "max(1, CLUSTER // cg)", pieces = "base * max(1, ceil_div(hvec * 32, 28672 * base))", pvec = "ceil_div(hvec, pieces)", ub = "cg * pieces // CLUSTER", partbytes = "2 * ub * (THREADS // 32) * 16", slots = "min(64, (230000 - partbytes) // max(32, pvec * 32))", clusters = "min(n * group, device.sms // CLUSTER - (CLUSTER == 4))" }
where      = ["device.arch >= 90", "x.ndim >= 2", "x.contiguous", "grad_y.contiguous", "grad_x.contiguous", "mean.contiguous", "rstd.contiguous",
              "weight.contiguous", "grad_weight.contiguous", "grad_bias.contiguous", "grad_y.itemsize == x.itemsize", "grad_x.itemsize == x.itemsize",
              "grad_y.numel == x.numel", "mean.numel == n * group", "rstd.numel == n * group", "n >= 1", "hw >= 2", "hw % w == 0", "c % group == 0",
              "n * group <= 134217728", "cg * hw <= 268435456", "(cg % CLUSTER == 0) + (CLUSTER % cg == 0) >= 1", "hvec >= 32 * CLUSTER",
              "ub >= 1", "ub <= 32", "partbytes <= 32768", "slots * 4 >= ub * 6", "slots >= ub + 1", "THREADS <= max(256, pvec)", "clusters >= 1"]
tune       = { CLUSTER = [1, 2, 4], THREADS = [256, 416, 512] }
align      = 16
[[workspace]]
name  = "sums"
dtype = "float64"
shape = ["n * c * pieces", "4"]
[[launch]]
kernel  = "gn_backward"
grid    = ["clusters * CLUSTER"]
block   = ["THREADS + 32"]
cluster = ["CLUSTER"]
smem    = "partbytes + slots * pvec * 32"
args    = ["grad_y", "x", "mean", "rstd", "weight", "grad_x", "sums", "hvec", "pvec", "pieces", "ub", "slots", "cg", "group", "n * group"]
[[launch]]
kernel = "gn_channels"
grid   = ["ceil_div(c, 4)"]
block  = ["128"]
pdl    = true
args   = ["sums", "mean", "rstd", "grad_weight", "grad_bias", "n", "c", "pieces", "cg", "group"]
---*/
// A cluster of blocks takes one group after the other, `ub` units per block, a unit being a channel, or one of `pieces` equal parts of it.
// The last warp copies units (grad_y and x) into a ring of slots; all other warps sum each unit as it lands, exchange the sums of the group
// within the cluster, and write gx from the slots, which they free one by one. With d = x - mean, the sums of a unit are b = sum gy,
// s = sum gy * d and t = sum gy * x; the last serves only where Inf or NaN must come out as from PyTorch's formulas:
//   gx = rstd * weight * gy + c2 * x + c3, c2 = (B * mean - T) * rstd^3 / N, c3 = -c2 * mean - B * rstd / N,   B, T = sums over weight * b, t
// elsewhere gx = rstd * weight * gy + c2 * d + c3, c2 = -S * rstd^3 / N, c3 = -B * rstd / N, without cancellation.
#define W (16 / int(sizeof(T_x)))
#define WARPS (THREADS / 32)
#define U ((895 + THREADS) / THREADS)  // vectors per thread of a unit, which has at most 896: see `pieces`

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
__device__ __forceinline__ bool finite(float v) { return fabsf(v) < INFINITY; }
// 1 / n for a whole n > 0, by Newton steps: no division, whose slow path would be a call
__device__ __forceinline__ double inverse(double n) {
    double y = double(__frcp_rn(float(n)));
    y = fma(y, fma(-n, y, 1.0), y);
    return fma(y, fma(-n, y, 1.0), y);
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) gn_backward(
    const T_grad_y* __restrict__ grad_y, const T_x* __restrict__ x, const T_mean* __restrict__ mean, const T_rstd* __restrict__ rstd,
    const T_weight* __restrict__ weight, T_grad_x* __restrict__ grad_x, double* __restrict__ sums,
    int hvec, int pvec, int pieces, int ub, int slots, int cg, int groups, int all) {
    extern __shared__ __align__(128) uint4 dynamic[];
    __shared__ __align__(16) double mailbox[2][CLUSTER][4];
    __shared__ __align__(8) uint64_t full[64];
    __shared__ __align__(8) uint64_t empty[64];
    __shared__ __align__(8) uint64_t mail[2];
    uint4* ring = dynamic;                                                     // [slots][2][pvec]
    float4* part = reinterpret_cast<float4*>(dynamic + slots * (2 * pvec));    // [2][ub][WARPS]
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int rank = CLUSTER > 1 ? int(blockIdx.x % CLUSTER) : 0;
    const int begin = int(blockIdx.x / CLUSTER), step = int(gridDim.x / CLUSTER);
    if (tid == 0) {
        for (int s = 0; s < slots; ++s) {
            mbarrier_init(&full[s], 1);
            mbarrier_init(&empty[s], THREADS);
        }
        mbarrier_init(&mail[0], 1);
        mbarrier_init(&mail[1], 1);
        mbarrier_init_fence();
        mbarrier_arrive_expect(&mail[0], CLUSTER * 32);
        mbarrier_arrive_expect(&mail[1], CLUSTER * 32);
    }
    __syncthreads();
    cluster_sync();
    pdl_launch_dependents();

    if (warp == WARPS) {  // the producer
        if (lane == 0) {
            int slot = 0;
            uint32_t phase = 1;
            bool again = false;
            for (int g = begin; g < all; g += step) {
                for (int u = 0; u < ub; ++u) {
                    if (again) mbarrier_wait(&empty[slot], phase);
                    const int unit = rank * ub + u, ch = unit / pieces, first = (unit - ch * pieces) * pvec;
                    const uint32_t bytes = uint32_t(max(0, min(pvec, hvec - first))) * 16u;
                    uint4* to = ring + slot * (2 * pvec);
                    if (bytes > 0) {
                        const int64_t offset = ((int64_t(g) * cg + ch) * hvec + first) * W;
                        mbarrier_arrive_expect(&full[slot], 2 * bytes);
                        bulk_load(to, grad_y + offset, bytes, &full[slot]);
                        bulk_load(to + pvec, x + offset, bytes, &full[slot]);
                    } else {
                        mbarrier_arrive(&full[slot]);
                    }
                    if (++slot == slots) {
                        slot = 0;
                        phase ^= 1;
                        again = true;
                    }
                }
            }
        }
        __syncwarp();
        return;
    }

    const double inv = inverse(double(hvec) * double(cg * W));
    int slot = 0, turn = 0;
    uint32_t phase = 0, mail_phase = 0;
    float m_next = 0.f, r_next = 0.f;
    if (begin < all) {
        m_next = to_float(mean[begin]);
        r_next = to_float(rstd[begin]);
    }
    for (int g = begin; g < all; g += step) {
        const float m = m_next, r = r_next;
        if (g + step < all) {
            m_next = to_float(mean[g + step]);
            r_next = to_float(rstd[g + step]);
        }
        const int first_channel = (g % groups) * cg;
        int s1 = slot;
        for (int u = 0; u < ub; ++u) {
            const int unit = rank * ub + u;
            const int count = min(pvec, hvec - (unit % pieces) * pvec);
            mbarrier_wait(&full[s1], phase);
            const uint4* gs = ring + s1 * (2 * pvec);
            const uint4* xs = gs + pvec;
            float b = 0.f, s = 0.f, t = 0.f;
            uint4 graw[U], xraw[U];
#pragma unroll
            for (int k = 0; k < U; ++k)
                if (tid + k * THREADS < count) {
                    graw[k] = gs[tid + k * THREADS];
                    xraw[k] = xs[tid + k * THREADS];
                }
#pragma unroll
            for (int k = 0; k < U; ++k)
                if (tid + k * THREADS < count) {
                    const Vec<T_grad_y, W>& gv = reinterpret_cast<const Vec<T_grad_y, W>&>(graw[k]);
                    const Vec<T_x, W>& xv = reinterpret_cast<const Vec<T_x, W>&>(xraw[k]);
                    float ib = 0.f, is = 0.f, it = 0.f;
#pragma unroll
                    for (int j = 0; j < W; ++j) {
                        const float gy = to_float(gv[j]), v = to_float(xv[j]);
                        ib += gy;
                        is = fmaf(gy, v - m, is);
                        it = fmaf(gy, v, it);
                    }
                    b += ib;
                    s += is;
                    t += it;
                }
            // the three sums (and a zero) of the warp together: lanes 0, 8, 16, 24 end up with one each
            const bool up = lane & 16, odd = lane & 8;
            const float p = (up ? t : b) + __shfl_xor_sync(0xffffffffu, up ? b : t, 16);
            const float q = (up ? 0.f : s) + __shfl_xor_sync(0xffffffffu, up ? s : 0.f, 16);
            float v = (odd ? q : p) + __shfl_xor_sync(0xffffffffu, odd ? p : q, 8);
#pragma unroll
            for (int o = 4; o > 0; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
            if (lane % 8 == 0) reinterpret_cast<float*>(part + (turn * ub + u) * WARPS + warp)[lane / 8] = v;  // b, s, t, 0
            if (++s1 == slots) {
                s1 = 0;
                phase ^= 1;
            }
        }
        barrier_sync(1, THREADS);
        if (warp == 0) {
            double B = 0.0, S = 0.0, Q = 0.0;
            if (lane < ub) {
#pragma unroll 4
                for (int i = 0; i < WARPS; ++i) {
                    const float4 p = part[(turn * ub + lane) * WARPS + i];
                    B += double(p.x);
                    S += double(p.y);
                    Q += double(p.z);
                }
                const int mine = rank * ub + lane;
                double2* to = reinterpret_cast<double2*>(sums + (int64_t(g) * cg * pieces + mine) * 4);
                to[0] = make_double2(B, S);
                to[1] = make_double2(Q, 0.0);
                const double f = HAS_WEIGHT ? double(to_float(weight[first_channel + mine / pieces])) : 1.0;
                B *= f;
                S *= f;
                Q *= f;
            }
#pragma unroll
            for (int o = 16; o > 0; o /= 2)
                if (o < ub) {
                    B += __shfl_xor_sync(0xffffffffu, B, o);
                    S += __shfl_xor_sync(0xffffffffu, S, o);
                    Q += __shfl_xor_sync(0xffffffffu, Q, o);
                }
            B = __shfl_sync(0xffffffffu, B, 0);
            S = __shfl_sync(0xffffffffu, S, 0);
            Q = __shfl_sync(0xffffffffu, Q, 0);
            // the factors of S and B are the same in all blocks: what is sent only has to be added
            const double k = double(r) * inv;
            const double sf = S * (double(r) * double(r) * k), bk = B * k;
            const double e = fabs(S) < double(INFINITY) ? -S : B * double(m) - Q;
            if (lane < CLUSTER) {
                const uint32_t to = in_block(&mailbox[turn][rank][0], uint32_t(lane)), barrier = in_block(&mail[turn], uint32_t(lane));
                send16(to, barrier, sf, bk);
                send16(to + 16, barrier, e, B);
            }
        }
        // A message of the group after the next comes only after this block has sent those of the next one, thus after the barrier above
        // in the next turn, when all threads here have read this mailbox: two of them are enough.
        mbarrier_wait_cluster(&mail[turn], mail_phase);
        if (tid == 0) mbarrier_arrive_expect(&mail[turn], CLUSTER * 32);  // for the group after the next
        float c2, c3, shift = m;
        {
            double sf = 0.0, bk = 0.0;
#pragma unroll
            for (int i = 0; i < CLUSTER; ++i) {
                sf += mailbox[turn][i][0];
                bk += mailbox[turn][i][1];
            }
            c2 = float(-sf);
            c3 = float(-bk);
            if (!(finite(c2) && finite(c3))) {  // as PyTorch, for the same Inf and NaN
                double e = 0.0, B = 0.0;
#pragma unroll
                for (int i = 0; i < CLUSTER; ++i) {
                    e += mailbox[turn][i][2];
                    B += mailbox[turn][i][3];
                }
                const double rd = double(r), k = rd * inv;
                e *= rd * rd * k;
                c2 = float(e);
                c3 = float(-e * double(m) - B * k);
                shift = 0.f;
            }
        }
        for (int u = 0; u < ub; ++u) {
            const int unit = rank * ub + u, ch = unit / pieces, first = (unit - ch * pieces) * pvec;
            const int count = min(pvec, hvec - first);
            const float c1 = HAS_WEIGHT ? r * to_float(weight[first_channel + ch]) : r;
            const uint4* gs = ring + slot * (2 * pvec);
            const uint4* xs = gs + pvec;
            T_grad_x* to = grad_x + ((int64_t(g) * cg + ch) * hvec + first) * W;
            uint4 graw[U], xraw[U];
#pragma unroll
            for (int k = 0; k < U; ++k)
                if (tid + k * THREADS < count) {
                    graw[k] = gs[tid + k * THREADS];
                    xraw[k] = xs[tid + k * THREADS];
                }
            mbarrier_arrive(&empty[slot]);  // the slot may be filled again
            if (++slot == slots) slot = 0;
#pragma unroll
            for (int k = 0; k < U; ++k)
                if (tid + k * THREADS < count) {
                    const Vec<T_grad_y, W>& gv = reinterpret_cast<const Vec<T_grad_y, W>&>(graw[k]);
                    const Vec<T_x, W>& xv = reinterpret_cast<const Vec<T_x, W>&>(xraw[k]);
                    Vec<T_grad_x, W> out;
#pragma unroll
                    for (int j = 0; j < W; ++j)
                        out[j] = from_float<T_grad_x>(fmaf(c1, to_float(gv[j]), fmaf(c2, to_float(xv[j]) - shift, c3)));
                    __stcs(reinterpret_cast<uint4*>(to + int64_t(tid + k * THREADS) * W), reinterpret_cast<const uint4&>(out));
                }
        }
        if (turn) mail_phase ^= 1;
        turn ^= 1;
    }
}

// One warp per channel: sums over the batch (and over the pieces of a channel) in double.
extern "C" __global__ void __launch_bounds__(128) gn_channels(
    const double* __restrict__ sums, const T_mean* __restrict__ mean, const T_rstd* __restrict__ rstd,
    T_grad_weight* __restrict__ grad_weight, T_grad_bias* __restrict__ grad_bias, int n, int c, int pieces, int cg, int groups) {
    const int lane = threadIdx.x % 32, ch = blockIdx.x * 4 + threadIdx.x / 32;
    pdl_wait();
    if (ch >= c) return;
    double dw = 0.0, db = 0.0;
    for (int i = lane; i < n; i += 32) {
        const int64_t g = int64_t(i) * groups + ch / cg;
        const double m = double(to_float(mean[g])), r = double(to_float(rstd[g]));
        double B = 0.0, S = 0.0, Q = 0.0;
        for (int p = 0; p < pieces; ++p) {
            const double2* from = reinterpret_cast<const double2*>(sums + ((int64_t(i) * c + ch) * pieces + p) * 4);
            const double2 u = __ldcg(from), v = __ldcg(from + 1);
            B += u.x;
            S += u.y;
            Q += v.x;
        }
        db += B;
        dw += (fabs(S) < double(INFINITY) ? S : Q - B * m) * r;  // Inf and NaN as PyTorch
    }
    dw = warp_sum(dw);
    db = warp_sum(db);
    if (lane == 0) {
#if HAS_GRAD_WEIGHT
        grad_weight[ch] = from_float<T_grad_weight>(float(dw));
#endif
#if HAS_GRAD_BIAS
        grad_bias[ch] = from_float<T_grad_bias>(float(db));
#endif
    }
}
