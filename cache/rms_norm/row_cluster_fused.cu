/*---
implements = "rms_norm"
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
optional   = ["weight", "rstd"]
dims       = { cols = "x.shape[-1]", rows = "x.numel // cols", nd = "x.ndim", vec = "16 // x.itemsize", nvec = "cols // vec", nv = "ceil_div(ceil_div(nvec, CLUSTER), THREADS)", parts = "(nv > 8) * 3 + 1", cv = "ceil_div(nv, parts)", slots = "min((device.smem_per_block // PER_SM - 2048) // (THREADS * cv * 16), 16)", clusters = "min(rows, device.sms * PER_SM // CLUSTER // 8 * 8)" }
static     = ["nd", "nv", "parts", "cv", "slots"]
where      = ["device.arch >= 90", "x.ndim >= 1", "x.contiguous", "y.contiguous", "weight.contiguous", "rstd.contiguous", "y.itemsize == x.itemsize",
              "cols % vec == 0", "nvec >= 1024", "nvec >= CLUSTER * THREADS", "rows >= 1", "rows <= 1073741824",
              "device.sms * PER_SM // CLUSTER >= 8", "nv <= 16", "nv * PER_SM <= 16", "2 * slots >= 3 * parts"]
tune       = { CLUSTER = [1, 2, 4, 8], PER_SM = [1, 2], THREADS = [512] }
align      = 16
[[launch]]
kernel  = "rms_slots"
grid    = ["CLUSTER * clusters"]
block   = ["THREADS"]
cluster = ["CLUSTER"]
smem    = "THREADS * cv * 16 * slots"
args    = ["x", "weight", "y", "rstd", "rows", "cols", "eps"]
---*/
// A persistent cluster works on one row at a time, each block on a fixed share of its columns, NV vectors of 16 bytes a thread.
// Shared memory is only a prefetch ring: PARTS slots hold a block's share of a row (one, unless the share is very large). A row goes
// from its slots to registers, squares are summed, and one __syncthreads both collects the warps' sums and frees the slots, which are
// refilled at once. The blocks' sums cross the cluster by st.async; the result is stored from registers. Squares of 16-bit types are
// summed by tensor cores: with A = (a0, 0, a2, 0) and B = (a0, a2) the diagonal of A * B holds the sums of squares of A's rows.
#if defined(P_DIM_1) || defined(P_NORMALIZED_SHAPE_1)
#error "only the last dimension"
#endif
#if defined(P_DIM_0)
#if (P_DIM_0 + ND) % ND != ND - 1
#error "only the last dimension"
#endif
#elif defined(P_DIM)
#if (P_DIM + ND) % ND != ND - 1
#error "only the last dimension"
#endif
#endif

enum {
    E = 16 / int(sizeof(T)),
    WARPS = THREADS / 32,
    SLOTVECS = CV * THREADS,
    WW = E * int(sizeof(T_weight)) / 4,                     // registers of a vector's weights
    KEEP = HAS_WEIGHT && NV * (4 + WW) * PER_SM <= 64,      // weights stay in registers
    TENSOR = sizeof(T) == 2 && !(HAS_RSTD && sizeof(T_rstd) > 2),  // tensor cores truncate sums: enough for 16-bit results
    FETCHER = 32                                            // the thread that issues the bulk copies
};

__device__ __forceinline__ void stay_packed(uint32_t& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ uint32_t in_block(const void* p, uint32_t rank) {
    uint32_t a;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(smem_address(p)), "r"(rank));
    return a;
}
__device__ __forceinline__ void send8(uint32_t to, uint32_t barrier, double v) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];"
                 ::"r"(to), "l"(__double_as_longlong(v)), "r"(barrier) : "memory");
}
__device__ __forceinline__ uint4 load16(uint32_t smem) {
    uint4 u;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(u.x), "=r"(u.y), "=r"(u.z), "=r"(u.w) : "r"(smem) : "memory");
    return u;
}

// sums of squares of a thread's (tensor cores: a warp's) vectors
template <class X, bool MMA> struct Squares {
    float s[4] = {0.f, 0.f, 0.f, 0.f};
    __device__ __forceinline__ void add(const uint4& u) {
        const Vec<X, E> x = *reinterpret_cast<const Vec<X, E>*>(&u);
#pragma unroll
        for (int j = 0; j < E; ++j) {
            const float f = to_float(x[j]);
            s[j % 4] = fmaf(f, f, s[j % 4]);
        }
    }
    __device__ __forceinline__ double total(int) const { return (double(s[0]) + double(s[1])) + (double(s[2]) + double(s[3])); }
};
template <class X> struct Squares<X, true> {
    float d0[4] = {0.f, 0.f, 0.f, 0.f}, d1[4] = {0.f, 0.f, 0.f, 0.f};
    __device__ __forceinline__ void add(const uint4& u) {
        const uint32_t a0[4] = {u.x, 0u, u.y, 0u}, b0[2] = {u.x, u.y};
        const uint32_t a1[4] = {u.z, 0u, u.w, 0u}, b1[2] = {u.z, u.w};
        mma_m16n8k16<X>(d0, a0, b0);
        mma_m16n8k16<X>(d1, a1, b1);
    }
    // lane 4 * g + t holds columns 2 * t and 2 * t + 1 of row g: the diagonal is where t == g / 2
    __device__ __forceinline__ double total(int lane) const {
        const int g = lane / 4;
        const float a = g % 2 ? d0[1] : d0[0], b = g % 2 ? d1[1] : d1[0];
        return lane % 4 == g / 2 ? double(a) + double(b) : 0.0;
    }
};

__device__ __forceinline__ double inverse_root(double v) {
    if (v > 1e-30 && v < 1e30) {  // one Newton step from 22 bits
        const double r = double(rsqrtf(float(v)));
        return fma(0.5 * r, fma(-v * r, r, 1.0), r);
    }
    return 1.0 / sqrt(v);
}

extern "C" __global__ void __launch_bounds__(THREADS, PER_SM)
rms_slots(const T_x* __restrict__ x, const T_weight* __restrict__ weight, T_y* __restrict__ y, T_rstd* __restrict__ rstd,
          int rows, int cols, double eps) {
    extern __shared__ __align__(128) uint4 ring[];
    __shared__ __align__(16) double mailbox[2][CLUSTER];
    __shared__ __align__(8) uint64_t mail[2], full[SLOTS];
    __shared__ double part[2][WARPS];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int rank = CLUSTER > 1 ? int(cluster_rank()) : 0;
    const int step = int(gridDim.x) / CLUSTER;
    const int nvec = cols / E;
    const int share = ((nvec + CLUSTER - 1) / CLUSTER + 7) / 8 * 8;
    const int first = rank * share;
    const int count = max(0, min(share, nvec - first));
    int row = int(blockIdx.x) / CLUSTER;

    // the slot to fill next, by thread FETCHER: part fpart of row frow
    int64_t frow = row;
    int fpart = 0, fslot = 0;
    auto fetch = [&]() {
        if (frow < rows) {
            const int from = fpart * SLOTVECS, n = min(count - from, int(SLOTVECS));
            if (n > 0) {
                mbarrier_arrive_expect(&full[fslot], uint32_t(n) * 16);
                bulk_load(ring + fslot * SLOTVECS, x + frow * cols + int64_t(first + from) * E, uint32_t(n) * 16, &full[fslot]);
            } else {
                mbarrier_arrive(&full[fslot]);
            }
            if (++fpart == PARTS) {
                fpart = 0;
                frow += step;
            }
            if (++fslot == SLOTS) fslot = 0;
        }
    };
    if (tid == FETCHER) {
        for (int k = 0; k < SLOTS; ++k) mbarrier_init(&full[k], 1);
        mbarrier_init(&mail[0], 1);
        mbarrier_init(&mail[1], 1);
        mbarrier_init_fence();
        fence_async_shared();
#pragma unroll 1
        for (int k = 0; k < SLOTS; ++k) fetch();
    }
    uint32_t w[KEEP ? NV : 1][WW];
    if (KEEP) {
#pragma unroll
        for (int k = 0; k < (KEEP ? NV : 1); ++k) {
            const int li = tid + k * THREADS;
            Vec<uint32_t, WW> q = {};
            if (li < count) q = load_vec<WW>(reinterpret_cast<const uint32_t*>(weight + int64_t(first + li) * E));
#pragma unroll
            for (int j = 0; j < WW; ++j) {
                w[k][j] = q[j];
                stay_packed(w[k][j]);
            }
        }
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_sync();  // every block's barriers are ready

    const double inverse = 1.0 / double(cols);
    const uint32_t base = smem_address(ring) + tid * 16;
    int slot = 0;
    uint32_t phase = 0;
    for (uint32_t it = 0; row < rows; ++it) {
        uint4 v[NV];
        Squares<T_x, bool(TENSOR)> squares;
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            mbarrier_wait(&full[slot], phase);
            const uint32_t at = base + uint32_t(slot) * (SLOTVECS * 16);
#pragma unroll
            for (int k = 0; k < CV; ++k) {
                if (p * CV + k < NV) {
                    const int n = p * CV + k;
                    v[n] = make_uint4(0u, 0u, 0u, 0u);
                    if (tid + n * THREADS < count) v[n] = load16(at + k * (THREADS * 16));
                }
            }
#pragma unroll
            for (int k = 0; k < CV; ++k)
                if (p * CV + k < NV) squares.add(v[p * CV + k]);
            if (++slot == SLOTS) {
                slot = 0;
                phase ^= 1;
            }
        }
        const uint32_t box = it & 1;
        double q = warp_sum(squares.total(lane));
        if (lane == 0) part[box][warp] = q;
        __syncthreads();  // the sums are there, the slots are read, and so is the mailbox of the row before
        if (CLUSTER == 1) {
            q = warp_sum(lane < WARPS ? part[box][lane % WARPS] : 0.0);
        } else {
            if (warp == 0) {
                q = warp_sum(lane < WARPS ? part[box][lane % WARPS] : 0.0);
                if (lane == 0) mbarrier_arrive_expect(&mail[box], CLUSTER * 8);
                __syncwarp();
                if (lane < CLUSTER) send8(in_block(&mailbox[box][rank], lane), in_block(&mail[box], lane), q);
            }
        }
        if (tid == FETCHER) {
#pragma unroll 1
            for (int p = 0; p < PARTS; ++p) fetch();
        }
        __syncwarp();
        if (CLUSTER > 1) {
            mbarrier_wait(&mail[box], (it >> 1) & 1);  // shared memory only: scope cluster would invalidate the L1 cache
            double m[CLUSTER];
#pragma unroll
            for (int i = 0; i < CLUSTER; ++i) m[i] = mailbox[box][i];
#pragma unroll
            for (int d = 1; d < CLUSTER; d *= 2)
#pragma unroll
                for (int i = 0; i + d < CLUSTER; i += 2 * d) m[i] += m[i + d];
            q = m[0];
        }
        const double r = inverse_root(fma(q, inverse, eps));
        const float hi = float(r);
        float lo = 0.f;  // for float32 output: x * (hi + lo) has one rounding
        if (sizeof(T) == 4 && fabsf(hi) < INFINITY) lo = float(r - double(hi));
#if HAS_RSTD
        if (rank == 0 && tid == 0) rstd[row] = from_float<T_rstd>(hi);
#endif
        T_y* dst = y + (int64_t(row) * cols + int64_t(first + tid) * E);
#pragma unroll
        for (int k = 0; k < NV; ++k) {
            const int li = tid + k * THREADS;
            if (li < count) {
                stay_packed(v[k].x);
                stay_packed(v[k].y);
                stay_packed(v[k].z);
                stay_packed(v[k].w);
                const Vec<T_x, E> xv = *reinterpret_cast<const Vec<T_x, E>*>(&v[k]);
#if HAS_WEIGHT
                Vec<uint32_t, WW> wq;
                if (KEEP) {
#pragma unroll
                    for (int j = 0; j < WW; ++j) {
                        stay_packed(w[KEEP ? k : 0][j]);
                        wq[j] = w[KEEP ? k : 0][j];
                    }
                } else {
                    wq = load_vec<WW>(reinterpret_cast<const uint32_t*>(weight + int64_t(first + li) * E));
                }
                const Vec<T_weight, E>& wv = *reinterpret_cast<const Vec<T_weight, E>*>(&wq);
#endif
                Vec<T_y, E> out;
#pragma unroll
                for (int j = 0; j < E; ++j) {
                    const float f = to_float(xv[j]);
                    float g = sizeof(T) == 4 ? fmaf(f, hi, f * lo) : f * hi;
#if HAS_WEIGHT
                    g *= to_float(wv[j]);
#endif
                    out[j] = from_float<T_y>(g);
                }
                __stcs(reinterpret_cast<uint4*>(dst + k * (THREADS * E)), *reinterpret_cast<const uint4*>(&out));
            }
        }
        if (rows - row <= step) break;
        row += step;
    }
    if (CLUSTER > 1) cluster_sync();  // no block leaves while others may still send to it
}
