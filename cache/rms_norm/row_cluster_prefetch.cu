/*---
implements = "rms_norm"
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
optional   = ["weight", "rstd"]
dims       = { cols = "x.shape[-1]", rows = "x.numel // cols", nd = "x.ndim", vec = "16 // x.itemsize", nvec = "ceil_div(cols, vec)", nv = "ceil_div(ceil_div(ceil_div(nvec, CLUSTER), 8) * 8, THREADS)", per = "(nv > 4) * (1024 // THREADS) + (nv <= 4) * (1536 // THREADS)", ahead = "max(device.sms * per // CLUSTER, 1)" }
static     = ["nd", "nv", "per"]
where      = ["device.arch >= 90", "x.ndim >= 1", "x.contiguous", "y.contiguous", "weight.contiguous", "rstd.contiguous", "y.itemsize == x.itemsize",
              "nvec >= 1024", "rows >= 1", "rows <= 100000000", "nv >= 3", "nv <= 8"]
tune       = { CLUSTER = [1, 2, 4, 8, 16], THREADS = [256, 512], PART = [0, 1, 2, 4] }
align      = 16
[[launch]]
kernel  = "rms_plain"
grid    = ["rows * CLUSTER"]
block   = ["THREADS"]
cluster = ["CLUSTER"]
smem    = "nv * THREADS * 16"
args    = ["x", "weight", "y", "rstd", "rows", "cols", "ahead", "eps"]
---*/
// One cluster a row, one strip of columns a block, NV vectors a thread in registers; PER blocks on a multiprocessor cover each other's
// latency; PART quarters of the strip that the cluster's successor will take are prefetched into L2 while this row's sums cross the
// cluster and its results are stored, so that DRAM reads go on. The strip's weights come into shared memory by one bulk copy while x is read. One double per block crosses the cluster by
// st.async; a block leaves after it has received all of them. Rows whose length is no multiple of a vector go element by element.
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
    BULK = HAS_WEIGHT && sizeof(T_weight) == sizeof(T),           // weights pass through shared memory
    TENSOR = sizeof(T) == 2 && !(HAS_RSTD && sizeof(T_rstd) > 2)  // tensor cores truncate sums: enough for 16-bit results
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
__device__ __forceinline__ double inverse_root(double v) {
    if (v > 1e-30 && v < 1e30) {  // one Newton step from 22 bits
        const double r = double(rsqrtf(float(v)));
        return fma(0.5 * r, fma(-v * r, r, 1.0), r);
    }
    return 1.0 / sqrt(v);
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
// with A = (a0, 0, a2, 0) and B = (a0, a2) the diagonal of A * B holds the sums of squares of A's rows
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

extern "C" __global__ void __launch_bounds__(THREADS, PER)
rms_plain(const T_x* __restrict__ x, const T_weight* __restrict__ weight, T_y* __restrict__ y, T_rstd* __restrict__ rstd,
          int rows, int cols, int ahead, double eps) {
    extern __shared__ __align__(128) uint4 wring[];
    __shared__ __align__(16) double mailbox[CLUSTER];
    __shared__ __align__(8) uint64_t mail, wfull;
    __shared__ double part[WARPS];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int rank = CLUSTER > 1 ? int(cluster_rank()) : 0;
    const int64_t row = int64_t(blockIdx.x) / CLUSTER;
    const bool whole = cols % E == 0;
    const int nvec = (cols + E - 1) / E;
    const int share = ((nvec + CLUSTER - 1) / CLUSTER + 7) / 8 * 8;  // at most NV * THREADS
    const int first = rank * share;
    const int count = max(0, min(share, nvec - first));              // vectors; in rows that are not whole the last one is cut
    const int ecount = max(0, min(share * E, cols - first * E));     // elements
    const T_x* src = x + (row * cols + int64_t(first) * E);
    T_y* dst = y + (row * cols + int64_t(first) * E);

    if (tid == 0) {
        mbarrier_init(&mail, 1);
        mbarrier_init(&wfull, 1);
        mbarrier_init_fence();
        fence_async_shared();
        if (CLUSTER > 1) mbarrier_arrive_expect(&mail, CLUSTER * 8);
        if (BULK && whole && count > 0) {
            mbarrier_arrive_expect(&wfull, uint32_t(count) * 16);
            bulk_load(wring, weight + int64_t(first) * E, uint32_t(count) * 16, &wfull);
        }
    }
    __syncwarp();
    // relaxed: what the others need is the initialised barrier, which its own fence has released; a release by all threads would be a fence
    // of the whole device before the first load
    if (CLUSTER > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");

    uint4 v[NV];
    double q;
    if (whole) {
        const uint4* from = reinterpret_cast<const uint4*>(src) + tid;
#pragma unroll
        for (int k = 0; k < NV; ++k) {
            v[k] = make_uint4(0u, 0u, 0u, 0u);
            if (tid + k * THREADS < count) v[k] = __ldcs(from + k * THREADS);
        }
        Squares<T_x, bool(TENSOR)> squares;
#pragma unroll
        for (int k = 0; k < NV; ++k) squares.add(v[k]);
        q = squares.total(lane);
    } else {
        float s[4] = {0.f, 0.f, 0.f, 0.f};
        int i = tid;
#pragma unroll 1
        for (; i + 3 * THREADS < ecount; i += 4 * THREADS) {
            float f[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) f[j] = to_float(src[i + j * THREADS]);
#pragma unroll
            for (int j = 0; j < 4; ++j) s[j] = fmaf(f[j], f[j], s[j]);
        }
#pragma unroll 1
        for (; i < ecount; i += THREADS) {
            const float f = to_float(src[i]);
            s[0] = fmaf(f, f, s[0]);
        }
        q = (double(s[0]) + double(s[1])) + (double(s[2]) + double(s[3]));
    }
    q = warp_sum(q);
    if (lane == 0) part[warp] = q;
    __syncthreads();  // the sums are there, the barriers are initialised
    if (PART > 0 && whole && warp == WARPS - 1) {
        // All loads of the block have landed: DRAM goes on with the same strip of the row that the successor of this cluster will take.
        // A hint only: nothing waits for it.
        const uint32_t bytes = uint32_t(count) * (4 * PART) / 16 * 16;  // PART quarters
        if (lane == 0 && bytes > 0 && row + ahead < rows)
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(src + int64_t(ahead) * cols), "r"(bytes) : "memory");
        __syncwarp();
    }
    if (CLUSTER == 1) {
        q = warp_sum(lane < WARPS ? part[lane % WARPS] : 0.0);
    } else {
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // every block's barriers are ready
        if (warp == 0) {
            q = warp_sum(lane < WARPS ? part[lane % WARPS] : 0.0);
            if (lane < CLUSTER) send8(in_block(&mailbox[rank], lane), in_block(&mail, lane), q);
            __syncwarp();
        }
        mbarrier_wait(&mail, 0);
        double m[CLUSTER];
#pragma unroll
        for (int i = 0; i < CLUSTER; ++i) m[i] = mailbox[i];
#pragma unroll
        for (int d = 1; d < CLUSTER; d *= 2)
#pragma unroll
            for (int i = 0; i + d < CLUSTER; i += 2 * d) m[i] += m[i + d];
        q = m[0];
    }
    const double r = inverse_root(fma(q, 1.0 / double(cols), eps));
    const float hi = float(r);
    float lo = 0.f;  // for float32 output: x * (hi + lo) has one rounding
    if (sizeof(T) == 4 && fabsf(hi) < INFINITY) lo = float(r - double(hi));
#if HAS_RSTD
    if (rank == 0 && tid == 0) rstd[row] = from_float<T_rstd>(hi);
#endif
    if (whole) {
        if (BULK && count > 0) mbarrier_wait(&wfull, 0);
        const uint32_t wat = smem_address(wring) + tid * 16;
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
                Vec<T_weight, E> wv;
                if constexpr (BULK) {
                    const uint4 u = load16(wat + k * (THREADS * 16));
                    wv = *reinterpret_cast<const Vec<T_weight, E>*>(&u);
                } else {
#pragma unroll
                    for (int j = 0; j < E; ++j) wv[j] = weight[int64_t(first + li) * E + j];
                }
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
                __stcs(reinterpret_cast<uint4*>(dst) + li, *reinterpret_cast<const uint4*>(&out));
            }
        }
    } else {
#pragma unroll 4
        for (int i = tid; i < ecount; i += THREADS) {
            const float f = to_float(src[i]);
            float g = sizeof(T) == 4 ? fmaf(f, hi, f * lo) : f * hi;
#if HAS_WEIGHT
            g *= to_float(weight[int64_t(first) * E + i]);
#endif
            dst[i] = from_float<T_y>(g);
        }
    }
}
