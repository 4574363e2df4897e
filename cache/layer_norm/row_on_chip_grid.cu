/*---
implements = "layer_norm"
target     = "cuda"
dtypes     = ["float32"]
where      = ["x.ndim == 4", "y.ndim == 4", "weight.ndim == 3", "bias.ndim == 3", "weight.numel == cols", "bias.numel == cols", "cols % 4 == 0",
              "x.stride[3] == 1", "x.stride[2] == x.shape[3]", "x.stride[1] == x.shape[2] * x.shape[3]", "x.stride[0] == cols",
              "y.stride[3] == 1", "y.stride[2] == x.shape[3]", "y.stride[1] == x.shape[2] * x.shape[3]", "y.stride[0] == cols",
              "weight.stride[2] == 1", "weight.stride[1] == x.shape[3]", "weight.stride[0] == x.shape[2] * x.shape[3]",
              "bias.stride[2] == 1", "bias.stride[1] == x.shape[3]", "bias.stride[0] == x.shape[2] * x.shape[3]",
              "rows >= 1", "cols >= 4", "device.sms <= 256",
              "THREADS * VPT >= 8000", "THREADS * VPT <= 8200", "per <= THREADS * VPT", "THREADS // 448 * EARLY == 0", "16 * per <= device.smem_per_block - 2048"]
dims       = { rows = "x.shape[0]", cols = "x.shape[1] * x.shape[2] * x.shape[3]", vecs = "cols // 4", per = "ceil_div(vecs, device.sms)" }
tune       = { THREADS = [256, 384, 448], VPT = [18, 21, 32], EARLY = [0, 2, 5] }
align      = 16
[[workspace]]
name  = "slots"
dtype = "float64"
shape = ["rows", "device.sms", "2"]
zero  = true
[[launch]]
kernel = "layer_norm"
grid   = ["device.sms"]
block  = ["THREADS"]
smem   = "min(device.smem_per_block - 2048, 32 * per)"
cooperative = true
args   = ["x", "weight", "bias", "y", "slots", "rows", "cols", "vecs", "per", "min(device.smem_per_block - 2048, 32 * per) // 16 - per", "eps"]
---*/
// Layer norm over very long rows: the whole grid works on one row at a time. A block owns `per` <= THREADS * VPT float4 of every row and keeps
// its slice of x in registers (VPT float4 per thread), its slices of weight and bias in shared memory for the whole kernel (what
// does not fit of bias, a fifth of the slice here, comes from L2): x is read once, y written once, weight and bias read once.
// The grid exchanges moments without a counter: a block publishes mean and m2 as two 64-bit words that are never zero,
// so a word validates itself (the workspace starts as zeros), and eight warps of each block read all slots until none is zero: one trip through
// L2 instead of three. EARLY vectors of the next row are loaded before that wait; the others replace x as soon as it was used, so
// reads of the next row run under the stores of this one.

constexpr int WARPS = THREADS / 32;
constexpr int GROUPS = 8;  // warps that merge the partials of the grid, one block a lane: up to 256 blocks
constexpr int LATE = VPT / 4;  // the last vectors, whose bias is fetched before the wait

// Moments of a set: count n, mean, and m2 = sum of squared distances from the mean. Merged in double, always as
// sum(m2 + n * (mean - common mean)^2): no difference of large sums anywhere.
struct Moments {
    double mean, m2;
};
// 1 / n for a positive n, and 1 / sqrt(v) rounded once to float, by Newton steps (divisions and square roots are calls that cost
// registers everywhere)
__device__ __forceinline__ float inverse_approx(float n) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(n));
    return r;
}
__device__ __forceinline__ double inverse(double n) {
    double r = double(inverse_approx(float(n)));
    r = fma(r, fma(-n, r, 1.0), r);
    return fma(r, fma(-n, r, 1.0), r);
}
__device__ __forceinline__ float inverse_sqrt(double v) {
    const float start = rsqrtf(float(v));
    if (!(start > 0.f && start < INFINITY)) return start;  // 0 for an infinite variance, NaN for NaN
    const double r = double(start);
    return float(fma(r * 0.5, fma(-v * r, r, 1.0), r));
}
// the moments of a thread (n elements) over its warp; `total` receives the warp's count
__device__ __forceinline__ Moments warp_merge(Moments a, int n, int& total) {
    total = __reduce_add_sync(0xffffffffu, n);
    const double sum = warp_sum(n ? a.mean * n : 0.0);
    const double mean = total ? sum * inverse(double(total)) : 0.0;
    const double d = a.mean - mean;
    return {mean, warp_sum(n ? a.m2 + d * d * n : 0.0)};
}

__device__ __forceinline__ Moments warp_merge(Moments a, double n, double& total) {
    total = warp_sum(n);
    const double sum = warp_sum(n > 0.0 ? a.mean * n : 0.0);
    const double mean = total > 0.0 ? sum * inverse(total) : 0.0;
    const double d = a.mean - mean;
    return {mean, warp_sum(n > 0.0 ? a.m2 + d * d * n : 0.0)};
}
// elements of a row that a block owns
__device__ __forceinline__ double block_share(int block, int per, int vecs) {
    const long long left = (long long)vecs - (long long)block * per;
    return block < int(gridDim.x) && left > 0 ? 4.0 * double(min(left, (long long)per)) : 0.0;
}

// a double as a word that is not zero: 0.0 becomes the smallest denormal
__device__ __forceinline__ long long published(double v) {
    const long long bits = __double_as_longlong(v);
    return bits ? bits : 1;
}

// mean as an unevaluated sum of two floats, so that a large mean costs no digits of x - mean
__device__ __forceinline__ float apply1(float x, float hi, float lo, float rstd, float w, float b) {
    return fmaf(((x - hi) - lo) * rstd, w, b);
}
__device__ __forceinline__ float4 apply(float4 x, float hi, float lo, float rstd, float4 w, float4 b) {
    return make_float4(apply1(x.x, hi, lo, rstd, w.x, b.x), apply1(x.y, hi, lo, rstd, w.y, b.y), apply1(x.z, hi, lo, rstd, w.z, b.z),
                       apply1(x.w, hi, lo, rstd, w.w, b.w));
}

// A thread's vectors are in registers: mean as pivot + mean(x - pivot), then squares around the rounded mean, corrected in double.
template <int N> __device__ __forceinline__ Moments thread_moments(const float4 (&x)[N], int count) {  // the first `count` vectors are valid
    const float pivot = x[0].x;
    float s0 = 0.f, s1 = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (i < count) {
            s0 += (x[i].x - pivot) + (x[i].y - pivot);
            s1 += (x[i].z - pivot) + (x[i].w - pivot);
        }
    const float offset = count ? (s0 + s1) * inverse_approx(float(4 * count)) : 0.f;
    const float center = pivot + offset;
    float q0 = 0.f, q1 = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (i < count) {
            const float a = x[i].x - center, b = x[i].y - center, c = x[i].z - center, d = x[i].w - center;
            q0 += fmaf(a, a, b * b);
            q1 += fmaf(c, c, d * d);
        }
    const double mean = double(pivot) + double(offset), slip = double(center) - mean;
    const double m2 = double(q0) + double(q1) - 4.0 * count * slip * slip;
    return {mean, m2 < 0.0 ? 0.0 : m2};
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
layer_norm(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, float* __restrict__ y,
           double* slots, int rows, long long cols, int vecs, int per, int bias_here, double eps) {
    extern __shared__ __align__(128) float4 kept[];  // weight: per vectors, then bias: bias_here vectors
    __shared__ Moments warp_part[WARPS];
    __shared__ int warp_count[WARPS];
    __shared__ Moments group_part[GROUPS];
    __shared__ double group_count[GROUPS];
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const long long begin = min((long long)blockIdx.x * per, (long long)vecs);
    const int mine = int(min((long long)vecs - begin, (long long)per));
    const int count = mine > tid ? (mine - tid + THREADS - 1) / THREADS : 0;  // this thread's vectors: tid + i * THREADS
    const float4* x_from = reinterpret_cast<const float4*>(x) + begin + tid;
    float4* y_to = reinterpret_cast<float4*>(y) + begin + tid;
    const float4* b_from = reinterpret_cast<const float4*>(bias) + begin + tid;
    const float4* w_here = kept + tid;
    const float4* b_here = kept + per + tid;
    const long long pitch = cols / 4;

    float4 v[VPT];
#pragma unroll
    for (int i = 0; i < VPT; ++i) {
        v[i] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (i < count) v[i] = __ldcs(x_from + i * THREADS);
    }
    for (int i = 0; i < count; ++i) {  // every thread reads back only what it copied itself
        const int at = tid + i * THREADS;
        cp_async16(kept + at, reinterpret_cast<const float4*>(weight) + begin + at);
        if (at < bias_here) cp_async16(kept + per + at, b_from + i * THREADS);
    }
    cp_async_commit();
    cp_async_wait<0>();

#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
        const Moments own = thread_moments(v, count);
        x_from += pitch;
        const bool more = row + 1 < rows;
        float4 early[EARLY > 0 ? EARLY : 1];
#pragma unroll
        for (int i = 0; i < EARLY; ++i)
            if (more && i < count) early[i] = __ldcs(x_from + i * THREADS);
        int total;
        const Moments of_warp = warp_merge(own, 4 * count, total);
        if (lane == 0) {
            warp_part[warp] = of_warp;
            warp_count[warp] = total;
        }
        __syncthreads();
        float4 late[LATE];
#pragma unroll
        for (int i = 0; i < LATE; ++i) {
            const int k = VPT - LATE + i;
            if (k < count) late[i] = tid + k * THREADS < bias_here ? b_here[k * THREADS] : __ldg(b_from + k * THREADS);
        }
        if (warp == 0) {
            const bool has = lane < WARPS;
            int all;
            const Moments of_block = warp_merge(has ? warp_part[lane] : Moments{0.0, 0.0}, has ? warp_count[lane] : 0, all);
            unsigned long long* words = reinterpret_cast<unsigned long long*>(slots) + 2ll * row * gridDim.x;
            if (lane == 0)
                asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(words + 2 * blockIdx.x),
                             "l"(published(of_block.mean)), "l"(published(of_block.m2)) : "memory");
        }
        if (warp < GROUPS) {
            const int block = warp * 32 + lane;
            const double n = block_share(block, per, vecs);
            long long word0 = 1, word1 = 1;
            do {
                if (block < int(gridDim.x))
                    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
                                 : "=l"(word0), "=l"(word1) : "l"(slots + 2 * ((long long)row * gridDim.x + block)) : "memory");
            } while (__any_sync(0xffffffffu, word0 == 0 || word1 == 0));
            double elements;
            const Moments of_group = warp_merge({__longlong_as_double(word0), __longlong_as_double(word1)}, n, elements);
            if (lane == 0) {
                group_part[warp] = of_group;
                group_count[warp] = elements;
            }
        }
        __syncthreads();
        double elements;
        const Moments of_row = warp_merge(lane < GROUPS ? group_part[lane] : Moments{0.0, 0.0}, lane < GROUPS ? group_count[lane] : 0.0, elements);
        const float hi = float(of_row.mean), lo = float(of_row.mean - double(hi));
        const float rstd = inverse_sqrt(of_row.m2 * inverse(elements) + eps);
#pragma unroll
        for (int i = 0; i < VPT; ++i)
            if (i < count) {
                float4 b;
                if (i >= VPT - LATE) b = late[i >= VPT - LATE ? i - (VPT - LATE) : 0];
                else b = tid + i * THREADS < bias_here ? b_here[i * THREADS] : __ldg(b_from + i * THREADS);
                __stcs(y_to + i * THREADS, apply(v[i], hi, lo, rstd, w_here[i * THREADS], b));
                if (i < EARLY) v[i] = early[i < EARLY ? i : 0];
                else if (more) v[i] = __ldcs(x_from + i * THREADS);
            }
        y_to += pitch;
    }
}
