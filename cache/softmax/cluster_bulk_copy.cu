/*---
implements = "softmax"
target     = "cuda"
dtypes     = ["float32"]
dims       = { rows = "x.shape[0]", cols = "x.shape[1]", nvec = "cols // 4", xp = "x.stride[0]", yp = "y.stride[0]" }
where      = ["x.ndim == 2", "(dim + 2) % 2 == 1", "x.stride[1] == 1", "y.stride[1] == 1", "xp % 4 == 0", "yp % 4 == 0", "cols % 4 == 0",
              "cols >= 4096", "rows <= 67108864", "CLUSTER * THREADS * NV >= nvec", "CLUSTER * THREADS * (NV - 1) < nvec",
              "(1024 // THREADS) * (THREADS * NV * 16 + 2048) <= device.smem_per_block"]
tune       = { CLUSTER = [2, 4, 8], THREADS = [256, 512, 1024], NV = [2, 4, 8] }
align      = 16
[[launch]]
kernel  = "softmax_cluster"
grid    = ["CLUSTER * min(rows, device.sms * (1024 // THREADS) // CLUSTER)"]
block   = ["THREADS"]
cluster = ["CLUSTER"]
smem    = "THREADS * NV * 16"
args    = ["x", "y", "rows", "nvec", "xp", "yp"]
---*/
// A cluster works on one row at a time, each block on a share of ceil(nvec / CLUSTER) float4. The share arrives in shared
// memory by one bulk copy, goes to registers (NV float4 per thread), and the slot is refilled with the next row at once.
// Every block sends (max, sum of exp(x - max)) to all blocks by st.async; the factor exp(max - row max) / total is taken in
// double and applied as hi + lo, so that the result has one rounding.
constexpr int WARPS = THREADS / 32;

__device__ __forceinline__ void copy_row_async(void* smem, const void* global, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(smem_address(smem)), "l"(global), "r"(bytes), "r"(smem_address(barrier)) : "memory");
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
__device__ __forceinline__ void wait_cluster(uint64_t* barrier, uint32_t phase) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra over;\nbra again;\nover:\n}" ::"r"(smem_address(barrier)), "r"(phase) : "memory");
}
__device__ __forceinline__ float max4(float4 v) { return fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)); }  // a NaN comes back in the sum
__device__ __forceinline__ float wmax(float m) {
#pragma unroll
    for (int o = 16; o > 0; o /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, o));
    return m;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
softmax_cluster(const float* __restrict__ x, float* __restrict__ y, int rows, int nvec, int64_t xp, int64_t yp) {
    extern __shared__ __align__(128) float4 slot[];
    __shared__ __align__(16) uint4 mailbox[2][CLUSTER];
    __shared__ __align__(8) uint64_t full, mail[2];
    __shared__ float part_m[WARPS];
    __shared__ double part_s[WARPS];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const uint32_t rank = cluster_rank();
    const int share = (nvec + CLUSTER - 1) / CLUSTER;
    const int first = int(rank) * share;
    const int count = max(0, min(share, nvec - first));
    const int step = gridDim.x / CLUSTER;
    const uint32_t bytes = uint32_t(count) * 16;
    int row = blockIdx.x / CLUSTER;  // where: rows <= 2^26

    if (tid == 0) {
        mbarrier_init(&full, 1);
        mbarrier_init(&mail[0], 1);
        mbarrier_init(&mail[1], 1);
        mbarrier_init_fence();
        if (count > 0 && row < rows) {
            mbarrier_arrive_expect(&full, bytes);
            copy_row_async(slot, x + int64_t(row) * xp + int64_t(first) * 4, bytes, &full);
        }
    }
    __syncthreads();
    cluster_sync();  // every block's barriers are ready

    for (uint32_t it = 0; row < rows; row += step, ++it) {
        if (count > 0) mbarrier_wait(&full, it & 1);
        float4 r[NV];
        float m = -INFINITY;
#pragma unroll
        for (int k = 0; k < NV; ++k) {
            r[k] = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
            if (tid + k * THREADS < count) r[k] = slot[tid + k * THREADS];
            m = fmaxf(m, max4(r[k]));
        }
        m = wmax(m);
        if (lane == 0) part_m[warp] = m;
        __syncthreads();  // the slot is read
        if (tid == 0 && count > 0 && row + step < rows) {
            mbarrier_arrive_expect(&full, bytes);
            copy_row_async(slot, x + (int64_t(row) + step) * xp + int64_t(first) * 4, bytes, &full);
        }
        m = wmax(lane < WARPS ? part_m[lane] : -INFINITY);
        const float ref = m == -INFINITY ? 0.f : m;
        float st = 0.f;
#pragma unroll
        for (int k = 0; k < NV; ++k) {
            r[k].x = expf(r[k].x - ref); r[k].y = expf(r[k].y - ref); r[k].z = expf(r[k].z - ref); r[k].w = expf(r[k].w - ref);
            st += (r[k].x + r[k].y) + (r[k].z + r[k].w);
        }
        double s = warp_sum(double(st));
        if (lane == 0) part_s[warp] = s;
        __syncthreads();  // also: the mailbox of the row before is read
        const uint32_t box = it & 1;
        if (warp == 0) {
            s = warp_sum(lane < WARPS ? part_s[lane] : 0.0);
            if (lane == 0) mbarrier_arrive_expect(&mail[box], CLUSTER * 16);
            if (lane < CLUSTER)
                send16(in_block(&mailbox[box][rank], lane), in_block(&mail[box], lane),
                       make_uint4(__float_as_uint(m), 0u, uint32_t(__double2loint(s)), uint32_t(__double2hiint(s))));
        }
        wait_cluster(&mail[box], (it >> 1) & 1);
        uint4 msg = make_uint4(__float_as_uint(-INFINITY), 0u, 0u, 0u);
        if (lane < CLUSTER) msg = mailbox[box][lane];
        const float mr = __uint_as_float(msg.x);
        const float top = wmax(mr);
        const double e = exp(double(mr) - double(top));  // NaN where the whole row is -inf, or the maximum +inf
        const double total = warp_sum(lane < CLUSTER ? e * __hiloint2double(int(msg.w), int(msg.z)) : 0.0);
        const double f = __shfl_sync(0xffffffffu, e, int(rank)) / total;
        const float hi = float(f), lo = float(f - double(hi));
        float4* dst = reinterpret_cast<float4*>(y + int64_t(row) * yp) + first;
#pragma unroll
        for (int k = 0; k < NV; ++k)
            if (tid + k * THREADS < count)
                __stcs(dst + tid + k * THREADS, make_float4(fmaf(r[k].x, hi, r[k].x * lo), fmaf(r[k].y, hi, r[k].y * lo),
                                                            fmaf(r[k].z, hi, r[k].z * lo), fmaf(r[k].w, hi, r[k].w * lo)));
    }
    cluster_sync();
}
