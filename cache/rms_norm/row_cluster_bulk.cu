/*---
implements = "rms_norm"
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
optional   = ["weight", "rstd"]
dims       = { cols = "x.shape[-1]", rows = "x.numel // cols", vec = "16 // x.itemsize", aligned = "cols % vec == 0", nvec = "(cols + (vec - 1) * (2 - aligned)) // vec", ng = "ceil_div(ceil_div(nvec, CLUSTER), THREADS * 2)", rg = "min((device.smem_per_block // PER_SM - 2048) // (THREADS * 32), 8 * ng)", clusters = "min(rows, device.sms * PER_SM // CLUSTER // 8 * 8)" }
static     = ["aligned", "ng", "rg"]
where      = ["device.arch >= 90", "x.ndim >= 2", "(dim[0] + x.ndim) % x.ndim == x.ndim - 1", "x.contiguous", "y.contiguous", "weight.contiguous",
              "rstd.contiguous", "y.itemsize == x.itemsize", "cols >= 8192", "rows >= 1", "rows <= 1073741824",
              "device.sms * PER_SM // CLUSTER >= 8", "ng <= 9", "ng * PER_SM >= 2", "(PER_SM - 1) * ng <= 3", "(PER_SM - 1) * ng * (2 - aligned) <= 4", "(1 - aligned) * (vec // 8) * ng <= 6", "2 * rg >= 3 * ng"]
tune       = { CLUSTER = [1, 2, 4, 8], PER_SM = [1, 2], THREADS = [512] }
align      = 16
[[launch]]
kernel  = "rms_cluster_bulk"
grid    = ["CLUSTER * clusters"]
block   = ["THREADS"]
cluster = ["CLUSTER"]
smem    = "THREADS * rg * 32"
args    = ["x", "weight", "y", "rstd", "rows", "cols", "eps"]
---*/
// A persistent cluster works on one row at a time, each block on a fixed share of the row's 16-byte vectors. All shared memory is a
// ring of RG groups of 2 * THREADS vectors that runs through the rows: bulk copies bring a group, pass 1 sums squares, pass 2
// overwrites the group with the result, a bulk copy writes it out, and one group later it is refilled with what comes RG groups
// ahead. The sums cross the cluster by st.async; the weights stay packed in registers. Rows of a length that is no multiple of 16
// bytes: vectors are aligned in memory, a row begins o elements after its first vector, and o is the same for all rows of a
// cluster, because their distance is a multiple of 8 (or there is only one); partial vectors are stored by scalars.
constexpr int GROUP = 2 * THREADS;
constexpr int NV = 2 * NG;
constexpr int E = 16 / sizeof(T);
constexpr int WARPS = THREADS / 32;
constexpr int WW = E * sizeof(T_weight) / 4;  // registers of a vector's weights

// hides that packed weights do not change: otherwise their conversions to float would be kept in registers
__device__ __forceinline__ void stay_packed(uint32_t& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void bulk_store(void* global, uint32_t smem, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(smem), "r"(bytes) : "memory");
}
__device__ __forceinline__ uint32_t in_block(const void* p, uint32_t rank) {
    uint32_t a;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(smem_address(p)), "r"(rank));
    return a;
}
__device__ __forceinline__ void send16(uint32_t to, uint32_t barrier, uint4 v) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier) : "memory");
}

__device__ __forceinline__ uint4 load16(uint32_t smem) {
    uint4 u;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(u.x), "=r"(u.y), "=r"(u.z), "=r"(u.w) : "r"(smem) : "memory");
    return u;
}

__device__ __forceinline__ void store16(uint32_t smem, uint4 u) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(u.x), "r"(u.y), "r"(u.z), "r"(u.w) : "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, PER_SM)
rms_cluster_bulk(const T* __restrict__ x, const T_weight* __restrict__ weight, T_y* __restrict__ y, T_rstd* __restrict__ rstd,
                 int rows, int cols, double eps) {
    extern __shared__ __align__(128) uint4 ring[];
    __shared__ __align__(16) uint4 mailbox[2][CLUSTER];
    __shared__ __align__(8) uint64_t mail[2], full[RG];
    __shared__ double part[2][WARPS];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int rank = CLUSTER > 1 ? int(cluster_rank()) : 0;
    const int step = gridDim.x / CLUSTER;
    int row = blockIdx.x / CLUSTER;
    const int o = ALIGNED ? 0 : int((int64_t(row) * cols) % E);
    const int total = o + cols;  // elements from the row's first vector to the row's end
    const int nvec = (total + E - 1) / E;
    const int share = ((nvec + CLUSTER - 1) / CLUSTER + 7) / 8 * 8;
    const int first = rank * share;
    const int count = max(0, min(share, nvec - first));
    const int skip = first + tid == 0 ? o : 0;
    const int whole = total / E;  // vectors before this one do not pass the row's end
    const int64_t origin = int64_t(first + tid) * E - o;

    // the group to fetch next, by thread 0; it runs RG groups ahead
    int frow = row, fg = 0, fslot = 0;
    auto fetch = [&]() {
        if (frow < rows) {
            const int from = first + fg * GROUP, to = min(first + min(count, (fg + 1) * GROUP), whole);
            if (to > from) {
                const uint32_t bytes = uint32_t(to - from) * 16;
                mbarrier_arrive_expect(&full[fslot], bytes);
                bulk_load(ring + fslot * GROUP, x + (int64_t(frow) * cols - o + int64_t(from) * E), bytes, &full[fslot]);
            } else {
                mbarrier_arrive(&full[fslot]);
            }
            if (++fg == NG) {
                fg = 0;
                frow += step;
            }
            if (++fslot == RG) fslot = 0;
        }
    };
    if (tid == 0) {
        for (int k = 0; k < RG; ++k) mbarrier_init(&full[k], 1);
        mbarrier_init(&mail[0], 1);
        mbarrier_init(&mail[1], 1);
        mbarrier_init_fence();
#pragma unroll 1
        for (int k = 0; k < RG; ++k) fetch();
    }
#if HAS_WEIGHT
    uint32_t w[NV][WW];
#pragma unroll
    for (int k = 0; k < NV; ++k) {
        const int li = tid + k * THREADS, c = (first + li) * E - o;
        if (ALIGNED) {
            Vec<uint32_t, WW> q = {};
            if (li < count) q = load_vec<WW>(reinterpret_cast<const uint32_t*>(weight + c));
#pragma unroll
            for (int j = 0; j < WW; ++j) w[k][j] = q[j];
        } else {
#pragma unroll
            for (int j = 0; j < WW; ++j) {
                Vec<T_weight, 4 / sizeof(T_weight)> q;
#pragma unroll
                for (int h = 0; h < 4 / sizeof(T_weight); ++h) {
                    const int e = c + j * int(4 / sizeof(T_weight)) + h;
                    q[h] = li < count && e >= 0 && e < cols ? weight[e] : from_float<T_weight>(0.f);
                }
                w[k][j] = *reinterpret_cast<const uint32_t*>(&q);
            }
        }
#pragma unroll
        for (int j = 0; j < WW; ++j) stay_packed(w[k][j]);
    }
#endif
    __syncthreads();
    if (CLUSTER > 1) cluster_sync();  // every block's barriers are ready

    const double inverse = 1.0 / double(cols);
    const uint32_t base = smem_address(ring);
    int head = 0;         // the ring position of the row's first group
    uint32_t phase = 0;   // and its barrier's parity
    for (uint32_t it = 0; row < rows; row += step, ++it) {
        float s[4] = {0.f, 0.f, 0.f, 0.f};
        int slot = head;
#pragma unroll 2
        for (int g = 0; g < NG; ++g) {
            mbarrier_wait(&full[slot], phase);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int li = tid + (2 * g + h) * THREADS;
                if (li < count) {
                    const uint32_t at = base + (slot * GROUP + h * THREADS + tid) * 16;
                    if (!ALIGNED) {
                        const int v = first + li;
                        if (v == 0 || v >= whole) {  // at most two threads of a row
                            T* e = reinterpret_cast<T*>(ring + (slot * GROUP + h * THREADS + tid));
                            const T* src = x + (int64_t(row) * cols - o + int64_t(v) * E);
                            for (int j = 0; j < E; ++j) {
                                const int c = v * E + j;
                                if (c < o || c >= total) e[j] = from_float<T>(0.f);
                                else if (v >= whole) e[j] = src[j];  // no bulk copy brings it
                            }
                        }
                    }
                    const uint4 u = load16(at);
                    const Vec<T, E> x8 = *reinterpret_cast<const Vec<T, E>*>(&u);
#pragma unroll
                    for (int j = 0; j < E; ++j) {
                        const float f = to_float(x8[j]);
                        s[j % 4] = fmaf(f, f, s[j % 4]);
                    }
                }
            }
            if (++slot == RG) {
                slot = 0;
                phase ^= 1;
            }
        }
        const uint32_t box = it & 1;
        double q = warp_sum((double(s[0]) + double(s[1])) + (double(s[2]) + double(s[3])));
        if (lane == 0) part[box][warp] = q;
        __syncthreads();  // also: the mailbox of the row before is read
        if (CLUSTER == 1) {
            q = warp_sum(lane < WARPS ? part[box][lane % WARPS] : 0.0);
        } else {
            if (warp == 0) {
                q = warp_sum(lane < WARPS ? part[box][lane % WARPS] : 0.0);
                if (lane == 0) mbarrier_arrive_expect(&mail[box], CLUSTER * 16);
                __syncwarp();
                if (lane < CLUSTER)
                    send16(in_block(&mailbox[box][rank], lane), in_block(&mail[box], lane),
                           make_uint4(uint32_t(__double2loint(q)), uint32_t(__double2hiint(q)), 0u, 0u));
            }
            mbarrier_wait_cluster(&mail[box], (it >> 1) & 1);
            uint4 m = make_uint4(0u, 0u, 0u, 0u);
            if (lane < CLUSTER) m = mailbox[box][lane % CLUSTER];
            q = warp_sum(__hiloint2double(int(m.y), int(m.x)));
        }
        const double r = 1.0 / sqrt(q * inverse + eps);
        const float hi = float(r);
        float lo = 0.f;  // for float32 output: x * (hi + lo) has one rounding
        if (sizeof(T) == 4 && fabsf(hi) < INFINITY) lo = float(r - double(hi));
#if HAS_RSTD
        if (rank == 0 && tid == 0) rstd[row] = from_float<T_rstd>(hi);
#endif
        slot = head;
        int li = tid;
        T_y* dst = y + (int64_t(row) * cols + origin);
#pragma unroll
        for (int k = 0; k < NV; ++k) {
            const uint32_t at = base + (slot * GROUP + k % 2 * THREADS + tid) * 16;
            if (li < count) {
                const uint4 u = load16(at);
                const Vec<T, E> v = *reinterpret_cast<const Vec<T, E>*>(&u);
#if HAS_WEIGHT
                Vec<T_weight, E> wv;
#pragma unroll
                for (int j = 0; j < WW; ++j) {
                    stay_packed(w[k][j]);
                    reinterpret_cast<uint32_t*>(&wv)[j] = w[k][j];
                }
#endif
                Vec<T_y, E> out;
#pragma unroll
                for (int j = 0; j < E; ++j) {
                    const float f = to_float(v[j]);
                    float g = sizeof(T) == 4 ? fmaf(f, hi, f * lo) : f * hi;
#if HAS_WEIGHT
                    g *= to_float(wv[j]);
#endif
                    out[j] = from_float<T_y>(g);
                }
                const int end = ALIGNED ? E : min(total - (first + li) * E, E);
                const int begin = !ALIGNED && k == 0 ? skip : 0;
                if (ALIGNED || end - begin == E) {
                    store16(at, *reinterpret_cast<const uint4*>(&out));
                } else {
#pragma unroll
                    for (int j = 0; j < E; ++j)
                        if (j >= begin && j < end) dst[j] = out[j];
                }
            }
            li += THREADS;
            dst += THREADS * E;
            if (k % 2 == 1) {
                fence_async_shared();
                __syncthreads();  // the group is ready to be written out
                if (tid == 0) {
                    const int lo = first + k / 2 * GROUP;
                    const int from = max(lo, o > 0 ? 1 : 0), to = min(first + min(count, (k / 2 + 1) * GROUP), whole);
                    if (to > from)
                        bulk_store(y + (int64_t(row) * cols - o + int64_t(from) * E), base + (slot * GROUP + from - lo) * 16,
                                   uint32_t(to - from) * 16);
                    tma_store_commit();
                    if (k > 1) {
                        tma_store_wait<1>();  // the group before is read
                        fetch();
                    }
                    if (k == NV - 1) {
                        tma_store_wait<0>();
                        fetch();
                    }
                }
                if (++slot == RG) slot = 0;
            }
        }
        head = slot;
    }
    if (CLUSTER > 1) cluster_sync();  // no block leaves while others may still send to it
}
