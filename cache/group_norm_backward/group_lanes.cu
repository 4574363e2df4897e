/*---
implements = "group_norm_backward"
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
optional   = ["weight", "grad_weight", "grad_bias"]
dims       = { n = "x.shape[0]", c = "x.shape[1]", hw = "x.numel // (n * c)", cg = "c // group", w = "16 // x.itemsize", hvec = "hw // w", cpb = "cg // CLUSTER" }
where      = ["device.arch >= 90", "x.ndim >= 2", "x.contiguous", "grad_y.contiguous", "grad_x.contiguous", "mean.contiguous", "rstd.contiguous",
              "weight.contiguous", "grad_weight.contiguous", "grad_bias.contiguous", "grad_y.itemsize == x.itemsize", "grad_x.itemsize == x.itemsize",
              "grad_y.numel == x.numel", "mean.numel == n * group", "rstd.numel == n * group", "n >= 1", "hw >= 2", "hw % w == 0", "c % group == 0",
              "n * group <= 134217728", "cg * hw <= 268435456", "cg % CLUSTER == 0", "cpb >= 1", "cpb * LANES <= 384", "cpb * LANES >= 96",
              "LANES * NV >= hvec", "LANES * NV * 8 <= hvec * 10"]
tune       = { CLUSTER = [1, 2, 4, 8], LANES = [32, 64, 128, 160, 224], NV = [2, 3, 5, 7] }
align      = 16
[[workspace]]
name  = "sums"
dtype = "float64"
shape = ["n * c", "4"]
[[launch]]
kernel  = "gn_backward"
grid    = ["n * group * CLUSTER"]
block   = ["cpb * LANES"]
cluster = ["CLUSTER"]
smem    = "0"
args    = ["grad_y", "x", "mean", "rstd", "weight", "grad_x", "sums", "hvec", "cpb", "group"]
[[launch]]
kernel = "gn_channels"
grid   = ["ceil_div(c, 4)"]
block  = ["128"]
pdl    = true
args   = ["sums", "mean", "rstd", "grad_weight", "grad_bias", "n", "c", "cg", "group"]
---*/
// A cluster per group, `cpb` channels per block, LANES threads per channel, which hold their NV vectors of grad_y and of x in registers between
// the sums and the results. With d = x - mean, the sums of a channel are b = sum gy, s = sum gy * d and t = sum gy * x; the last serves only
// where Inf or NaN must come out as from PyTorch's formulas:
//   gx = rstd * weight * gy + c2 * x + c3, c2 = (B * mean - T) * rstd^3 / N, c3 = -c2 * mean - B * rstd / N,   B, T = sums over weight * b, t
// elsewhere gx = rstd * weight * gy + c2 * d + c3, c2 = -S * rstd^3 / N, c3 = -B * rstd / N, without cancellation.
#define W (16 / int(sizeof(T_x)))
#define TEAM (LANES / 32)
#define REGISTERS (sizeof(T_x) == 4 ? (NV == 7 ? 80 : 64) : NV == 7 ? 128 : 80)

// the same place in the shared memory of block `rank` of the cluster
__device__ __forceinline__ double* in_block(double* p, uint32_t rank) {
    uint64_t there;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
    return reinterpret_cast<double*>(there);
}
__device__ __forceinline__ bool finite(float v) { return fabsf(v) < INFINITY; }
// 1 / n for a whole n > 0, by Newton steps: no division, whose slow path would be a call
__device__ __forceinline__ double inverse(double n) {
    double y = double(__frcp_rn(float(n)));
    y = fma(y, fma(-n, y, 1.0), y);
    return fma(y, fma(-n, y, 1.0), y);
}

extern "C" __global__ void __maxnreg__(REGISTERS) gn_backward(
    const T_grad_y* __restrict__ grad_y, const T_x* __restrict__ x, const T_mean* __restrict__ mean, const T_rstd* __restrict__ rstd,
    const T_weight* __restrict__ weight, T_grad_x* __restrict__ grad_x, double* __restrict__ sums, int hvec, int cpb, int groups) {
    __shared__ __align__(16) double mailbox[CLUSTER][4];
    __shared__ __align__(16) float4 part[12];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int team = tid / LANES, l = tid - team * LANES;
    const int rank = CLUSTER > 1 ? int(blockIdx.x % CLUSTER) : 0;
    const int g = int(blockIdx.x / CLUSTER), cg = cpb * CLUSTER;
    const int64_t offset = ((int64_t(g) * cg + rank * cpb + team) * hvec + l) * W;
    uint4 graw[NV], xraw[NV];
#pragma unroll
    for (int k = 0; k < NV; ++k)
        if (l + k * LANES < hvec) {
            graw[k] = __ldcs(reinterpret_cast<const uint4*>(grad_y + offset) + k * LANES);
            xraw[k] = __ldcs(reinterpret_cast<const uint4*>(x + offset) + k * LANES);
        }
    pdl_launch_dependents();
    const int channel = (g % groups) * cg + rank * cpb;  // the first of this block
    const float m = to_float(mean[g]), r = to_float(rstd[g]);
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");  // waited for before the first message
#endif

    float b = 0.f, s = 0.f, t = 0.f;
#pragma unroll
    for (int k = 0; k < NV; ++k)
        if (l + k * LANES < hvec) {
            const Vec<T_grad_y, W>& gv = reinterpret_cast<const Vec<T_grad_y, W>&>(graw[k]);
            const Vec<T_x, W>& xv = reinterpret_cast<const Vec<T_x, W>&>(xraw[k]);
            float ib = 0.f, is = 0.f, it = 0.f;
#pragma unroll
            for (int i = 0; i < W; ++i) {
                const float gy = to_float(gv[i]), v = to_float(xv[i]);
                ib += gy;
                is = fmaf(gy, v - m, is);
                it = fmaf(gy, v, it);
            }
            b += ib;
            s += is;
            t += it;
        }
    // the three sums (and a zero) of the warp together: lanes 0, 8, 16, 24 end up with one each
    {
        const bool up = lane & 16, odd = lane & 8;
        const float p = (up ? t : b) + __shfl_xor_sync(0xffffffffu, up ? b : t, 16);
        const float q = (up ? 0.f : s) + __shfl_xor_sync(0xffffffffu, up ? s : 0.f, 16);
        float v = (odd ? q : p) + __shfl_xor_sync(0xffffffffu, odd ? p : q, 8);
#pragma unroll
        for (int o = 4; o > 0; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
        if (lane % 8 == 0) reinterpret_cast<float*>(part + warp)[lane / 8] = v;  // b, s, t, 0
    }
    __syncthreads();
#if CLUSTER > 1
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");  // every block has started: its shared memory is there
#endif
    if (warp == 0) {
        double B = 0.0, S = 0.0, Q = 0.0;
        if (lane < cpb) {  // a channel each
#pragma unroll 1
            for (int i = 0; i < TEAM; ++i) {
                const float4 p = part[lane * TEAM + i];
                B += double(p.x);
                S += double(p.y);
                Q += double(p.z);
            }
            double2* to = reinterpret_cast<double2*>(sums + (int64_t(g) * cg + rank * cpb + lane) * 4);
            to[0] = make_double2(B, S);
            to[1] = make_double2(Q, 0.0);
            const double f = HAS_WEIGHT ? double(to_float(weight[channel + lane])) : 1.0;
            B *= f;
            S *= f;
            Q *= f;
        }
#pragma unroll 1
        for (int o = 16; o > 0; o /= 2)
            if (o < cpb) {
                B += __shfl_xor_sync(0xffffffffu, B, o);
                S += __shfl_xor_sync(0xffffffffu, S, o);
                Q += __shfl_xor_sync(0xffffffffu, Q, o);
            }
        B = __shfl_sync(0xffffffffu, B, 0);
        S = __shfl_sync(0xffffffffu, S, 0);
        Q = __shfl_sync(0xffffffffu, Q, 0);
        const double exact = fabs(S) < double(INFINITY) ? -S : B * double(m) - Q;
#if CLUSTER > 1
        if (lane < CLUSTER) {
            double2* to = reinterpret_cast<double2*>(in_block(&mailbox[rank][0], uint32_t(lane)));
            to[0] = make_double2(S, B);
            to[1] = make_double2(exact, B);
        }
        __syncwarp();
#else
        if (lane == 0) mailbox[0][0] = S, mailbox[0][1] = B, mailbox[0][2] = exact;
#endif
    }
#if CLUSTER > 1
    // all messages are here; nobody writes to another block any more
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
    // where this thread is, once more: kept in registers since the loads, it would cost spills
    uint32_t block2, tid2;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block2));
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid2));
    const int team2 = int(tid2) / LANES, l2 = int(tid2) - team2 * LANES;
    const int g2 = int(block2 / CLUSTER), first2 = int(block2 % CLUSTER) * cpb + team2;
    const int64_t offset2 = ((int64_t(g2) * (cpb * CLUSTER) + first2) * hvec + l2) * W;
    const float c1 = HAS_WEIGHT ? r * to_float(weight[(g2 % groups) * (cpb * CLUSTER) + first2]) : r;
    float c2, c3, shift = m;
    {
        double S = 0.0, B = 0.0;
#pragma unroll 2
        for (int i = 0; i < CLUSTER; ++i) {
            S += mailbox[i][0];
            B += mailbox[i][1];
        }
        const double rd = double(r), k = rd * inverse(double(hvec) * double(cpb * CLUSTER * W));
        c2 = float(-S * (rd * rd * k));
        c3 = float(-B * k);
        if (!(finite(c2) && finite(c3))) {  // as PyTorch, for the same Inf and NaN
            double e = 0.0;
#pragma unroll 1
            for (int i = 0; i < CLUSTER; ++i) e += mailbox[i][2];
            e *= rd * rd * k;
            c2 = float(e);
            c3 = float(-e * double(m) - B * k);
            shift = 0.f;
        }
    }
#pragma unroll
    for (int k = 0; k < NV; ++k)
        if (l2 + k * LANES < hvec) {
            const Vec<T_grad_y, W>& gv = reinterpret_cast<const Vec<T_grad_y, W>&>(graw[k]);
            const Vec<T_x, W>& xv = reinterpret_cast<const Vec<T_x, W>&>(xraw[k]);
            Vec<T_grad_x, W> out;
#pragma unroll
            for (int i = 0; i < W; ++i)
                out[i] = from_float<T_grad_x>(fmaf(c1, to_float(gv[i]), fmaf(c2, to_float(xv[i]) - shift, c3)));
            __stcs(reinterpret_cast<uint4*>(grad_x + offset2) + k * LANES, reinterpret_cast<const uint4&>(out));
        }
}

// One warp per channel: sums over the batch in double.
extern "C" __global__ void __launch_bounds__(128) gn_channels(
    const double* __restrict__ sums, const T_mean* __restrict__ mean, const T_rstd* __restrict__ rstd,
    T_grad_weight* __restrict__ grad_weight, T_grad_bias* __restrict__ grad_bias, int n, int c, int cg, int groups) {
    const int lane = threadIdx.x % 32, ch = blockIdx.x * 4 + threadIdx.x / 32;
    pdl_wait();
    if (ch >= c) return;
    double dw = 0.0, db = 0.0;
    for (int i = lane; i < n; i += 32) {
        const int64_t g = int64_t(i) * groups + ch / cg;
        const double2* from = reinterpret_cast<const double2*>(sums + (int64_t(i) * c + ch) * 4);
        const double2 u = __ldcg(from), v = __ldcg(from + 1);
        const double m = double(to_float(mean[g])), r = double(to_float(rstd[g]));
        db += u.x;
        dw += (fabs(u.y) < double(INFINITY) ? u.y : v.x - u.x * m) * r;  // Inf and NaN as PyTorch
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
