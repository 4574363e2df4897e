/*---
implements = "layer_norm_backward"
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
optional   = ["weight", "bias", "grad_weight", "grad_bias"]
dims       = { cols = "normalized_shape.product", rows = "x.numel // cols", vec = "16 // x.itemsize", nvec = "cols // vec", steprows = "221184 // (THREADS * NV * 32 * PER_SM * R)", depth = "min(6, steprows)", blocks = "min(rows, device.sms * PER_SM)" }
where      = ["device.arch >= 90", "x.contiguous", "grad_y.contiguous", "grad_x.contiguous", "mean.contiguous", "rstd.contiguous", "weight.contiguous",
              "grad_weight.contiguous", "grad_bias.contiguous", "grad_y.itemsize == x.itemsize", "grad_x.itemsize == x.itemsize", "grad_y.numel == x.numel",
              "mean.numel == rows", "rstd.numel == rows", "rows >= 1", "rows <= 1073741824", "cols >= 1", "cols % vec == 0", "THREADS * NV >= nvec",
              "THREADS * (NV - 1) < nvec", "THREADS <= max(128, nvec + 31)", "THREADS * PER_SM >= 512", "STAGES == depth",
              "THREADS * PER_SM * (28 + NV * (3 * vec + 8 * R)) <= 65536"]
tune       = { THREADS = [128, 256, 512, 1024], NV = [1, 2, 4], PER_SM = [1, 2, 4], R = [1, 2], STAGES = [2, 3, 4, 5, 6] }
align      = 16
[[workspace]]
name = "partial"
dtype = "float32"
shape = ["blocks", "2 * cols"]
[[launch]]
kernel = "rows_pass"
grid = ["blocks"]
block = ["THREADS"]
smem = "STAGES * R * NV * THREADS * 32"
args = ["grad_y", "x", "mean", "rstd", "weight", "bias", "grad_x", "partial", "rows", "cols"]
[[launch]]
kernel = "columns_pass"
grid = ["ceil_div(2 * cols, 32)"]
block = ["512"]
pdl = true
args = ["partial", "grad_weight", "grad_bias", "blocks", "cols"]
---*/
// A persistent grid; each block has a contiguous run of rows and takes R of them per step. A thread owns the same NV 16-byte columns of
// every row and copies them, STAGES steps ahead, into slots of shared memory that only it reads: no barrier but that of the reduction.
// Between both passes over a row it is held packed in registers; the column sums stay in registers and are added up by columns_pass.
#define W (16 / int(sizeof(T)))
#define WARPS (THREADS / 32)
#define V (2 * R)
using Packed = Vec<T, W>;
__device__ __forceinline__ float at(const uint4& raw, int j) { return to_float(reinterpret_cast<const Packed&>(raw)[j]); }

extern "C" __global__ void __launch_bounds__(THREADS, PER_SM) rows_pass(
    const T_grad_y* __restrict__ grad_y, const T_x* __restrict__ x, const T_mean* __restrict__ mean, const T_rstd* __restrict__ rstd,
    const T_weight* __restrict__ weight, const T_bias* __restrict__ bias, T_grad_x* __restrict__ grad_x, float* __restrict__ partial,
    int rows, int cols) {
    extern __shared__ uint4 ring[];  // [STAGES][R][NV][2][THREADS]
    __shared__ float part[2][WARPS * V];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int nvec = cols / W;
    const float n = float(cols);
    const int begin = int(int64_t(blockIdx.x) * rows / gridDim.x), end = int((int64_t(blockIdx.x) + 1) * rows / gridDim.x);

    auto fetch = [&](int row, int stage) {  // the step that starts with `row`, without committing
#pragma unroll
        for (int r = 0; r < R; ++r) {
            if (row + r < end) {
                const T_grad_y* gp = grad_y + int64_t(row + r) * cols;
                const T_x* xp = x + int64_t(row + r) * cols;
#pragma unroll
                for (int k = 0; k < NV; ++k) {
                    const int i = tid + k * THREADS;
                    if (i < nvec) {
                        uint4* slot = ring + ((stage * R + r) * NV + k) * (2 * THREADS) + tid;
                        cp_async16(slot, gp + i * W);
                        cp_async16(slot + THREADS, xp + i * W);
                    }
                }
            }
        }
    };
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
        fetch(begin + s * R, s);
        cp_async_commit();
    }
    float w[NV][W], dw[NV][W], db[NV][W];
#pragma unroll
    for (int k = 0; k < NV; ++k) {
        const int i = tid + k * THREADS;
#pragma unroll
        for (int j = 0; j < W; ++j) {
            w[k][j] = HAS_WEIGHT && i < nvec ? to_float(weight[i * W + j]) : 1.f;
            dw[k][j] = db[k][j] = 0.f;
        }
    }
    float m_next[R], r_next[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const bool valid = begin + r < end;
        m_next[r] = valid ? to_float(mean[begin + r]) : 0.f;
        r_next[r] = valid ? to_float(rstd[begin + r]) : 0.f;
    }

    int stage = 0, phase = 0;
    for (int row = begin; row < end; row += R, phase ^= 1) {
        float m[R], rs[R];
        uint4 graw[R][NV], xraw[R][NV];
        float v[V];
        cp_async_wait<STAGES - 1>();
#pragma unroll
        for (int r = 0; r < R; ++r) {
            m[r] = m_next[r];
            rs[r] = r_next[r];
#pragma unroll
            for (int k = 0; k < NV; ++k) {
                graw[r][k] = xraw[r][k] = make_uint4(0, 0, 0, 0);
                if (row + r < end && tid + k * THREADS < nvec) {
                    const uint4* slot = ring + ((stage * R + r) * NV + k) * (2 * THREADS) + tid;
                    graw[r][k] = slot[0];
                    xraw[r][k] = slot[THREADS];
                }
            }
        }
        fetch(row + STAGES * R, stage);  // into the slot just read by this thread
        cp_async_commit();
        if (++stage == STAGES) stage = 0;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const int next = row + R + r;
            if (next < end) {
                m_next[r] = to_float(mean[next]);
                r_next[r] = to_float(rstd[next]);
            }
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
            v[2 * r] = v[2 * r + 1] = 0.f;
            if (row + r < end) {
#pragma unroll
                for (int k = 0; k < NV; ++k) {
                    if (tid + k * THREADS < nvec) {
                        float a = 0.f, b = 0.f;
#pragma unroll
                        for (int j = 0; j < W; ++j) {
                            const float gj = at(graw[r][k], j);
                            const float xhat = (at(xraw[r][k], j) - m[r]) * rs[r];
                            dw[k][j] = fmaf(gj, xhat, dw[k][j]);
                            db[k][j] += gj;
                            const float g = gj * w[k][j];
                            a += g;
                            b = fmaf(g, xhat, b);
                        }
                        v[2 * r] += a;
                        v[2 * r + 1] += b;
                    }
                }
            }
        }
        // the V sums of the warp together: halves of the warp take halves of the values
        {
            float s;
            if constexpr (R == 2) {
                const bool up = lane & 16, odd = lane & 8;
                const float p = (up ? v[2] : v[0]) + __shfl_xor_sync(0xffffffffu, up ? v[0] : v[2], 16);
                const float q = (up ? v[V - 1] : v[1]) + __shfl_xor_sync(0xffffffffu, up ? v[1] : v[V - 1], 16);
                s = (odd ? q : p) + __shfl_xor_sync(0xffffffffu, odd ? p : q, 8);
            } else {
                const bool up = lane & 16;
                s = (up ? v[1] : v[0]) + __shfl_xor_sync(0xffffffffu, up ? v[0] : v[1], 16);
                s += __shfl_xor_sync(0xffffffffu, s, 8);
            }
#pragma unroll
            for (int o = 4; o > 0; o /= 2) s += __shfl_xor_sync(0xffffffffu, s, o);
            if (lane % (32 / V) == 0) part[phase][warp * V + lane / (32 / V)] = s;
        }
        __syncthreads();  // one barrier a step: the buffer alternates, so that the next step cannot overwrite what is still read
        {
            float s = 0.f;
#pragma unroll
            for (int i = 0; i < (WARPS * V + 31) / 32; ++i)
                if (i * 32 + lane < WARPS * V) s += part[phase][i * 32 + lane];
#pragma unroll
            for (int o = V; o < 32; o *= 2) s += __shfl_xor_sync(0xffffffffu, s, o);
#pragma unroll
            for (int i = 0; i < V; ++i) v[i] = __shfl_sync(0xffffffffu, s, i);
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
            if (row + r < end) {
                const float scale = rs[r] / n;
                T_grad_x* to = grad_x + int64_t(row + r) * cols;
#pragma unroll
                for (int k = 0; k < NV; ++k) {
                    const int i = tid + k * THREADS;
                    if (i < nvec) {
                        Vec<T_grad_x, W> out;
#pragma unroll
                        for (int j = 0; j < W; ++j) {
                            const float g = at(graw[r][k], j) * w[k][j];
                            const float xhat = (at(xraw[r][k], j) - m[r]) * rs[r];
                            out[j] = from_float<T_grad_x>(scale * (fmaf(n, g, -v[2 * r]) - xhat * v[2 * r + 1]));
                        }
                        __stcs(reinterpret_cast<uint4*>(to + i * W), reinterpret_cast<const uint4&>(out));
                    }
                }
            }
        }
    }
    cp_async_wait<0>();
    pdl_launch_dependents();
    float* to = partial + int64_t(blockIdx.x) * 2 * cols;
#pragma unroll
    for (int k = 0; k < NV; ++k) {
        const int i = tid + k * THREADS;
        if (i < nvec) {
#pragma unroll
            for (int j = 0; j < W; j += 4) {
                *reinterpret_cast<float4*>(to + i * W + j) = make_float4(dw[k][j], dw[k][j + 1], dw[k][j + 2], dw[k][j + 3]);
                *reinterpret_cast<float4*>(to + cols + i * W + j) = make_float4(db[k][j], db[k][j + 1], db[k][j + 2], db[k][j + 3]);
            }
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
#if HAS_GRAD_WEIGHT
        if (c < cols) grad_weight[c] = from_float<T_grad_weight>(float(sum));
#endif
#if HAS_GRAD_BIAS
        if (c >= cols) grad_bias[c - cols] = from_float<T_grad_bias>(float(sum));
#endif
    }
}
