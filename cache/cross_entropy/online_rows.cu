/*---
implements = "cross_entropy"
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
dims       = { rows = "x.shape[0]", cols = "x.shape[1]", xp = "x.stride[0]" }
where      = ["x.ndim == 2", "target.ndim == 1", "(dim + 2) % 2 == 1", "x.stride[1] == 1", "target.contiguous", "y.contiguous",
              "rows >= 1", "rows <= 134217728", "cols >= 1", "cols <= 1073741824"]
tune       = { THREADS = [256, 512], UNROLL = [2, 4, 8] }
align      = 16
[[workspace]]
name  = "loss"
dtype = "float64"
shape = ["rows"]
[[launch]]
kernel = "row_losses"
grid   = ["rows"]
block  = ["THREADS"]
args   = ["x", "target", "y", "loss", "cols", "xp"]
[[launch]]
kernel = "total_loss"
grid   = ["1"]
block  = ["1024"]
pdl    = true
args   = ["target", "loss", "y", "rows"]
---*/
// A block per row: one pass over the logits with an online (max, sum of exp(x - max)) per thread, UNROLL 16-byte loads in flight each;
// the row's loss goes to a workspace in double. A second block adds the losses in a fixed order.
constexpr int W = 16 / int(sizeof(T_x));
constexpr int WARPS = THREADS / 32;

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
struct Online {
    float m = -INFINITY, s = 0.f;
    __device__ __forceinline__ float move(float top) {  // to the maximum `top`; what is to be subtracted from now on
        const float ref = top == -INFINITY ? 0.f : top;
        s *= exp_of(m - ref);
        m = top;
        return ref;
    }
    __device__ __forceinline__ void add(float v) {
        const float ref = move(fmaxf(m, v));
        s += exp_of(v - ref);
    }
    template <int N> __device__ __forceinline__ void add(const uint4 (&r)[N]) {
        float top = m;
#pragma unroll
        for (int b = 0; b < N; ++b)
#pragma unroll
            for (int j = 0; j < W; ++j) top = fmaxf(top, element(r[b], j));
        const float ref = move(top);
        float sum = 0.f;
#pragma unroll
        for (int b = 0; b < N; ++b) {
            float t = (exp_of(element(r[b], 0) - ref) + exp_of(element(r[b], 1) - ref)) +
                      (exp_of(element(r[b], 2) - ref) + exp_of(element(r[b], 3) - ref));
            if constexpr (W == 8)
                t += (exp_of(element(r[b], 4) - ref) + exp_of(element(r[b], 5) - ref)) +
                     (exp_of(element(r[b], 6) - ref) + exp_of(element(r[b], 7) - ref));
            sum += t;
        }
        s += sum;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, (UNROLL == 2 ? 1536 : 1024) / THREADS)
row_losses(const T_x* __restrict__ x, const T_target* __restrict__ target, T_y* __restrict__ y, double* __restrict__ loss, int cols, int64_t xp) {
    __shared__ float part_m[WARPS];
    __shared__ double part_s[WARPS];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    pdl_launch_dependents();
    const T_x* row = x + blockIdx.x * xp;
    float wanted = 0.f;
    bool ignored = false;
    if (tid == 0) {
        const int64_t t = int64_t(target[blockIdx.x]);
        ignored = t == int64_t(P_IGNORE_INDEX);
        wanted = NAN;
        if (t >= 0 && t < cols) wanted = to_float(row[t]);
    }

    const int head = min(cols, int((16 - (reinterpret_cast<uint64_t>(row) & 15)) & 15) / int(sizeof(T_x)));
    const int nvec = (cols - head) / W;
    const uint4* from = reinterpret_cast<const uint4*>(row + head);
    Online acc;
    int i = tid;
    for (; i + (UNROLL - 1) * THREADS < nvec; i += UNROLL * THREADS) {
        uint4 r[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) r[u] = __ldcs(from + i + u * THREADS);
        acc.add(r);
    }
    if (i < nvec) {  // fewer than UNROLL are left for this thread
        const Vec<T_x, 2> two = {{from_float<T_x>(-INFINITY), from_float<T_x>(-INFINITY)}};
        uint32_t blank = 0xff800000u;
        if constexpr (sizeof(T_x) == 2) blank = *reinterpret_cast<const uint32_t*>(&two);
        uint4 r[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            r[u] = make_uint4(blank, blank, blank, blank);
            if (i + u * THREADS < nvec) r[u] = __ldcs(from + i + u * THREADS);
        }
        acc.add(r);
    }
    if (tid < head) acc.add(to_float(row[tid]));
    if (head + nvec * W + tid < cols) acc.add(to_float(row[head + nvec * W + tid]));  // fewer than W are left

    float m = wmax(acc.m);
    float ref = m == -INFINITY ? 0.f : m;
    const double s = warp_sum(double(acc.s * exp_of(acc.m - ref)));
    if (lane == 0) {
        part_m[warp] = m;
        part_s[warp] = s;
    }
    __syncthreads();
    if (warp == 0) {
        const float mw = lane < WARPS ? part_m[lane] : -INFINITY;
        m = wmax(mw);
        ref = m == -INFINITY ? 0.f : m;
        const double total = warp_sum(lane < WARPS ? part_s[lane] * exp(double(mw) - double(ref)) : 0.0);
        if (lane == 0) {
            const double value = ignored ? 0.0 : (double(m) - double(wanted)) + log(total);
            loss[blockIdx.x] = value;
#if P_REDUCTION == 0
            y[blockIdx.x] = from_float<T_y>(float(value));
#endif
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024)
total_loss(const T_target* __restrict__ target, const double* loss, T_y* __restrict__ y, int rows) {
#if P_REDUCTION == 0
    pdl_wait();
#else
    int count = 0;
    for (int r = threadIdx.x; r < rows; r += 1024) count += int64_t(target[r]) != int64_t(P_IGNORE_INDEX);
    count = block_sum(count);
    pdl_wait();
    double a = 0.0, b = 0.0;
    int r = threadIdx.x;
    for (; r + 7 * 1024 < rows; r += 8 * 1024) {
        double v[8];
#pragma unroll
        for (int u = 0; u < 8; ++u) v[u] = loss[r + u * 1024];
        a += (v[0] + v[1]) + (v[2] + v[3]);
        b += (v[4] + v[5]) + (v[6] + v[7]);
    }
    for (; r < rows; r += 1024) a += loss[r];
    const double sum = block_sum(a + b);
    if (threadIdx.x == 0) y[0] = from_float<T_y>(float(P_REDUCTION == 1 ? sum / double(count) : sum));
#endif
}
