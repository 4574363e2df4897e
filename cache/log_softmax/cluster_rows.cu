/*---
implements = ["log_softmax", "softmax"]
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
dims       = { cols = "x.shape[-1]", rows = "x.numel // cols", w = "16 // x.itemsize", nvec = "ceil_div(cols, w)", held = "CLUSTER * THREADS * 8" }
where      = ["(dim + x.ndim) % x.ndim == x.ndim - 1", "x.contiguous", "y.contiguous", "x.itemsize == y.itemsize", "device.arch >= 90",
              "rows >= 1", "rows <= 134217728", "cols >= 1", "cols <= 1073741824", "VEC == (cols % w == 0)",
              "held < max(2 * nvec, 4096)", "2 * held >= min(nvec, 65536)"]
tune       = { CLUSTER = [1, 2, 4, 8], THREADS = [256, 512, 1024], VEC = [0, 1] }
align      = 16
[[launch]]
kernel  = "softmax_shares"
grid    = ["rows * CLUSTER"]
block   = ["THREADS"]
cluster = ["CLUSTER"]
args    = ["x", "y", "cols"]
---*/
// A cluster per row, each block on a share of ceil(nvec / CLUSTER) vectors of 16 bytes. The first KEEP * THREADS vectors of the share
// stay in registers between the reduction and the output; what is beyond is reduced online first and read again (from L2) at the end.
constexpr int W = 16 / int(sizeof(T_x));
constexpr int WARPS = THREADS / 32;
constexpr int KEEP = 8;
constexpr int BATCH = 4;

__device__ __forceinline__ float exp_of(float v) {
    if constexpr (sizeof(T_x) == 2) return __expf(v);
    else return expf(v);
}
__device__ __forceinline__ float element(const uint4& bits, int j) {
    return to_float(reinterpret_cast<const Vec<T_x, W>*>(&bits)->data[j]);
}
__device__ __forceinline__ float wmax(float m) {  // a NaN is dropped here and comes back in the sum
#pragma unroll
    for (int o = 16; o > 0; o /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, o));
    return m;
}
// v - (hi + lo) with one rounding
__device__ __forceinline__ float minus_level(float v, float hi, float lo) {
    const float s = v - hi;
    if constexpr (sizeof(T_y) == 2) {
        return s - lo;
    } else {
        const float b = s - v;
        const float err = (v - (s - b)) + (-hi - b);
        const float r = s + (err - lo);
        return fabsf(s) < INFINITY ? r : s;
    }
}
// step k of this thread: W neighbouring elements, or (VEC = 0) W elements that are THREADS apart; -Inf beyond the share
template <bool Last> __device__ __forceinline__ uint4 fetch(const T_x* from, int k, int count) {
    uint4 bits;
    if constexpr (VEC) {
        const Vec<T_x, 2> two = {{from_float<T_x>(-INFINITY), from_float<T_x>(-INFINITY)}};
        if constexpr (sizeof(T_x) == 4) bits.x = 0xff800000u;
        else bits.x = *reinterpret_cast<const uint32_t*>(&two);
        bits.y = bits.z = bits.w = bits.x;
        const int i = k * THREADS + int(threadIdx.x);
        if (i < count / W) {
            const uint4* p = reinterpret_cast<const uint4*>(from) + i;
            bits = Last ? __ldcs(p) : __ldg(p);
        }
    } else {
        Vec<T_x, W> v;
#pragma unroll
        for (int j = 0; j < W; ++j) {
            const int i = (k * W + j) * THREADS + int(threadIdx.x);
            v[j] = i < count ? from[i] : from_float<T_x>(-INFINITY);
        }
        bits = *reinterpret_cast<const uint4*>(&v);
    }
    return bits;
}
__device__ __forceinline__ void put(T_y* to, int k, int count, const Vec<T_y, W>& v) {
    if constexpr (VEC) {
        const int i = k * THREADS + int(threadIdx.x);
        if (i < count / W) __stcs(reinterpret_cast<uint4*>(to) + i, *reinterpret_cast<const uint4*>(&v));
    } else {
#pragma unroll
        for (int j = 0; j < W; ++j) {
            const int i = (k * W + j) * THREADS + int(threadIdx.x);
            if (i < count) to[i] = v[j];
        }
    }
}
__device__ __forceinline__ float sum_of_exp(const uint4& bits, float ref) {
    float e[W];
#pragma unroll
    for (int j = 0; j < W; ++j) e[j] = exp_of(element(bits, j) - ref);
    float t = (e[0] + e[1]) + (e[2] + e[3]);
    if constexpr (W == 8) t += (e[4] + e[5]) + (e[6] + e[7]);
    return t;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
softmax_shares(const T_x* __restrict__ x, T_y* __restrict__ y, int cols) {
    __shared__ float part_m[WARPS];
    __shared__ double part_s[WARPS];
    __shared__ float box_m[CLUSTER];
    __shared__ double box_s[CLUSTER];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    uint32_t rank = 0;
    if constexpr (CLUSTER > 1) {
        rank = cluster_rank();
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");  // "this block runs"
    }
    const int64_t row = blockIdx.x / CLUSTER;
    const int share = ((cols + W - 1) / W + CLUSTER - 1) / CLUSTER * W;
    const int64_t first = int64_t(rank) * share;
    const int count = int(max(0ll, min(int64_t(share), int64_t(cols) - first)));
    const int steps = (count + THREADS * W - 1) / (THREADS * W);
    const T_x* src = x + row * cols + first;
    T_y* dst = y + row * cols + first;

    float tail_m = -INFINITY, tail_s = 0.f;
    for (int k = KEEP; k < steps; k += BATCH) {
        uint4 r[BATCH];
        float top = tail_m;
#pragma unroll
        for (int b = 0; b < BATCH; ++b) r[b] = fetch<false>(src, min(k + b, steps), count);  // step `steps` is empty
#pragma unroll
        for (int b = 0; b < BATCH; ++b)
#pragma unroll
            for (int j = 0; j < W; ++j) top = fmaxf(top, element(r[b], j));
        const float ref = top == -INFINITY ? 0.f : top;
        tail_s *= exp_of(tail_m - ref);
        float t = 0.f;
#pragma unroll
        for (int b = 0; b < BATCH; ++b) t += sum_of_exp(r[b], ref);
        tail_s += t;
        tail_m = top;
    }

    uint4 r[KEEP];
#pragma unroll
    for (int k = 0; k < KEEP; ++k) r[k] = fetch<true>(src, k, count);
    float m = tail_m;
#pragma unroll
    for (int k = 0; k < KEEP; ++k)
#pragma unroll
        for (int j = 0; j < W; ++j) m = fmaxf(m, element(r[k], j));
    m = wmax(m);
    if (lane == 0) part_m[warp] = m;
    __syncthreads();
    m = wmax(lane < WARPS ? part_m[lane] : -INFINITY);
    const float ref = m == -INFINITY ? 0.f : m;

    float sums[2] = {tail_s * exp_of(tail_m - ref), 0.f};
#pragma unroll
    for (int k = 0; k < KEEP; ++k) {
        float e[W];
#pragma unroll
        for (int j = 0; j < W; ++j) e[j] = exp_of(element(r[k], j) - ref);
        float t = (e[0] + e[1]) + (e[2] + e[3]);
        if constexpr (W == 8) t += (e[4] + e[5]) + (e[6] + e[7]);
        sums[k % 2] += t;
#if !OP_LOG_SOFTMAX
        if constexpr (W == 4) r[k] = make_uint4(__float_as_uint(e[0]), __float_as_uint(e[1]), __float_as_uint(e[2]), __float_as_uint(e[3]));
#endif
    }
    double s = warp_sum(double(sums[0]) + double(sums[1]));
    if (lane == 0) part_s[warp] = s;
    __syncthreads();
    s = warp_sum(lane < WARPS ? part_s[lane] : 0.0);

    double top = double(m), total = s, own = 1.0;  // own: what exp(v - m) is to be multiplied by, to be exp(v - top)
    if constexpr (CLUSTER > 1) {
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // all blocks run
        if (tid < CLUSTER) {
            uint32_t to_m, to_s;
            asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to_m) : "r"(smem_address(&box_m[rank])), "r"(tid));
            asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to_s) : "r"(smem_address(&box_s[rank])), "r"(tid));
            asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to_m), "f"(m) : "memory");
            asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(to_s), "d"(s) : "memory");
        }
        __syncwarp();
        cluster_sync();
        const float mr = lane < CLUSTER ? box_m[lane] : -INFINITY;
        const float all = wmax(mr);
        const double e = exp(double(mr) - double(all));  // NaN where the whole row is -Inf, or the maximum +Inf
        total = warp_sum(lane < CLUSTER ? e * box_s[lane] : 0.0);
        own = __shfl_sync(0xffffffffu, e, int(rank));
        top = double(all);
    }
#if OP_LOG_SOFTMAX
    (void)own;
    const double level = top + log(total);
#else
    const double level = own / total;
#endif
    const float hi = float(level), lo = float(level - double(hi));
#pragma unroll
    for (int k = 0; k < KEEP; ++k) {
        Vec<T_y, W> out;
#pragma unroll
        for (int j = 0; j < W; ++j) {
            const float v = element(r[k], j);
#if OP_LOG_SOFTMAX
            out[j] = from_float<T_y>(minus_level(v, hi, lo));
#else
            if constexpr (W == 4) out[j] = from_float<T_y>(fmaf(v, hi, v * lo));
            else out[j] = from_float<T_y>(exp_of(v - ref) * hi);
#endif
        }
        put(dst, k, count, out);
    }
    for (int k = steps - 1; k >= KEEP; --k) {
        const uint4 bits = fetch<true>(src, k, count);
        Vec<T_y, W> out;
#pragma unroll
        for (int j = 0; j < W; ++j) {
            const float v = element(bits, j);
#if OP_LOG_SOFTMAX
            out[j] = from_float<T_y>(minus_level(v, hi, lo));
#else
            const float e = exp_of(v - ref);
            out[j] = from_float<T_y>(sizeof(T_y) == 2 ? e * hi : fmaf(e, hi, e * lo));
#endif
        }
        put(dst, k, count, out);
    }
}
