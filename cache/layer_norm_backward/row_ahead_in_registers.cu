/*---
implements = "layer_norm_backward"
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
optional   = ["bias", "grad_bias"]
dims       = { cols = "weight.numel", rows = "x.numel // cols", vec = "16 // x.itemsize", nvec = "cols // vec", blocks = "min(rows, device.sms * PER_SM)" }
where      = ["x.ndim >= 2", "x.shape[-1] == cols", "x.contiguous", "grad_y.contiguous", "grad_x.contiguous", "mean.contiguous", "rstd.contiguous",
              "weight.contiguous", "grad_y.itemsize == x.itemsize", "grad_x.itemsize == x.itemsize", "grad_y.numel == x.numel", "mean.numel == rows",
              "rstd.numel == rows", "rows >= 1", "rows <= 1073741824", "cols % vec == 0", "THREADS * NV >= nvec", "THREADS * (NV - 1) < nvec", "THREADS <= nvec + 31", "THREADS * PER_SM * (16 + 7 * NV * vec) <= 65536"]
tune       = { THREADS = [128, 256, 512, 1024], NV = [1, 2, 4], PER_SM = [1, 2, 4] }
align      = 16
[[workspace]]
name = "partial"
dtype = "float32"
shape = ["blocks", "2 * cols"]
[[launch]]
kernel = "rows_pass"
grid = ["blocks"]
block = ["THREADS"]
smem = "0"
args = ["grad_y", "x", "mean", "rstd", "weight", "bias", "grad_x", "partial", "rows", "cols"]
[[launch]]
kernel = "columns_pass"
grid = ["ceil_div(2 * cols, 32)"]
block = ["512"]
pdl = true
args = ["partial", "grad_weight", "grad_bias", "blocks", "cols"]
---*/
// A persistent grid; a block holds a row of grad_y and x in registers. As soon as the packed values are unpacked, the loads of its next
// row are issued into the same registers, so that memory is busy while the row is reduced and written. Column sums stay in registers.
constexpr int W = 16 / sizeof(T);
constexpr int WARPS = THREADS / 32;
using Packed = Vec<T, W>;
__device__ __forceinline__ float at(const uint4& raw, int j) { return to_float(reinterpret_cast<const Packed&>(raw)[j]); }
// bytes of W results, streamed past the caches
__device__ __forceinline__ void store_stream(T_grad_x* to, const Packed& out) { __stcs(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4&>(out)); }
__device__ __forceinline__ float2 warp_sum2(float2 v) {
#pragma unroll
    for (int o = 16; o > 0; o /= 2) {
        v.x += __shfl_xor_sync(0xffffffffu, v.x, o);
        v.y += __shfl_xor_sync(0xffffffffu, v.y, o);
    }
    return v;
}

extern "C" __global__ void __launch_bounds__(THREADS, PER_SM) rows_pass(
    const T_grad_y* __restrict__ grad_y, const T_x* __restrict__ x, const T_mean* __restrict__ mean, const T_rstd* __restrict__ rstd,
    const T_weight* __restrict__ weight, const T_bias* __restrict__ bias, T_grad_x* __restrict__ grad_x, float* __restrict__ partial,
    int rows, int cols) {
    __shared__ float2 part[2][32];
    const int nvec = cols / W;
    const float n = float(cols);
    float w[NV][W], dw[NV][W], db[NV][W];
#pragma unroll
    for (int k = 0; k < NV; ++k) {
        const int i = threadIdx.x + k * THREADS;
#pragma unroll
        for (int j = 0; j < W; ++j) {
            w[k][j] = i < nvec ? to_float(weight[i * W + j]) : 0.f;
            dw[k][j] = db[k][j] = 0.f;
        }
    }
    uint4 graw[NV], xraw[NV];
    float m_next = 0.f, r_next = 0.f;
    auto fetch = [&](int row) {  // of one row, with its statistics
#pragma unroll
        for (int k = 0; k < NV; ++k) {
            const int i = threadIdx.x + k * THREADS;
            graw[k] = xraw[k] = make_uint4(0, 0, 0, 0);
            if (i < nvec) {
                graw[k] = __ldcs(reinterpret_cast<const uint4*>(grad_y + int64_t(row) * cols) + i);
                xraw[k] = __ldcs(reinterpret_cast<const uint4*>(x + int64_t(row) * cols) + i);
            }
        }
        m_next = to_float(mean[row]);
        r_next = to_float(rstd[row]);
    };
    int phase = 0, row = blockIdx.x;
    fetch(row);
    for (; row < rows; row += gridDim.x, phase ^= 1) {
        const float m = m_next, r = r_next;
        float xhat[NV][W], g[NV][W];
        float2 a = make_float2(0.f, 0.f);
#pragma unroll
        for (int k = 0; k < NV; ++k) {
            if (threadIdx.x + k * THREADS >= nvec) continue;
            float ak = 0.f, bk = 0.f;
#pragma unroll
            for (int j = 0; j < W; ++j) {
                const float gj = at(graw[k], j);
                xhat[k][j] = (at(xraw[k], j) - m) * r;
                dw[k][j] = fmaf(gj, xhat[k][j], dw[k][j]);
                db[k][j] += gj;
                g[k][j] = gj * w[k][j];
                ak += g[k][j];
                bk = fmaf(g[k][j], xhat[k][j], bk);
            }
            a.x += ak; a.y += bk;
        }
        if (rows - row > int(gridDim.x)) fetch(row + gridDim.x);
        a = warp_sum2(a);
        if (threadIdx.x % 32 == 0) part[phase][threadIdx.x / 32] = a;
        __syncthreads();  // one barrier a row: the buffer alternates, so the next row cannot overwrite what is still read
        const float2 s = warp_sum2(threadIdx.x % 32 < WARPS ? part[phase][threadIdx.x % 32] : make_float2(0.f, 0.f));
        const float scale = r / n;
#pragma unroll
        for (int k = 0; k < NV; ++k) {
            const int i = threadIdx.x + k * THREADS;
            if (i < nvec) {
                Packed out;
#pragma unroll
                for (int j = 0; j < W; ++j) out[j] = from_float<T_grad_x>(scale * (fmaf(n, g[k][j], -s.x) - xhat[k][j] * s.y));
                store_stream(grad_x + int64_t(row) * cols + i * W, out);
            }
        }
    }
    pdl_launch_dependents();
    float* to = partial + int64_t(blockIdx.x) * 2 * cols;
#pragma unroll
    for (int k = 0; k < NV; ++k) {
        const int i = threadIdx.x + k * THREADS;
        if (i < nvec) {
#pragma unroll
            for (int j = 0; j < W; ++j) { to[i * W + j] = dw[k][j]; to[cols + i * W + j] = db[k][j]; }
        }
    }
}

// Sum of the blocks' partial rows: 32 columns a block, 16 threads a column, double sums.
extern "C" __global__ void __launch_bounds__(512)
columns_pass(const float* __restrict__ partial, T_grad_weight* __restrict__ grad_weight, T_grad_bias* __restrict__ grad_bias,
             int blocks, int cols) {
    __shared__ double part[16][33];
    const int lane = threadIdx.x % 32, group = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    double sum = 0.0;
    pdl_wait();
    if (c < 2 * cols) {
#pragma unroll 8
        for (int b = group; b < blocks; b += 16) sum += double(__ldcg(partial + int64_t(b) * 2 * cols + c));
    }
    part[group][lane] = sum;
    __syncthreads();
    if (group == 0 && c < 2 * cols) {
#pragma unroll
        for (int g = 1; g < 16; ++g) sum += part[g][lane];
        if (c < cols) grad_weight[c] = from_float<T_grad_weight>(float(sum));
#if HAS_GRAD_BIAS
        else grad_bias[c - cols] = from_float<T_grad_bias>(float(sum));
#endif
    }
}
