/*---
implements = ["conv2d.batch_norm.relu", "conv2d", "conv2d.relu", "conv2d.silu", "conv2d.hardswish", "conv2d.batch_norm", "conv2d.batch_norm.hardswish", "conv2d.batch_norm.silu"]
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
optional   = ["bias", "bn_weight", "bn_bias", "bn_mean", "bn_var"]
where      = ["x.ndim == 4", "weight.ndim == 4", "y.ndim == 4", "groups == c", "groups >= 2", "weight.shape[0] == c", "weight.shape[1] == 1", "x.contiguous", "y.contiguous",
              "weight.stride[3] == 1", "weight.stride[2] == kw", "weight.stride[0] == kh * kw", "kh * kw <= 49", "kh >= 1", "kw >= 1",
              "stride[0] <= 3", "stride[1] <= 3", "dilation[0] * (kh - 1) <= 12", "dilation[1] * (kw - 1) <= 12",
              "x.numel >= 1", "y.numel >= 1", "h * w < 1073741824", "planes_all < 1073741824", "tiles < 2147480000 // planes_all", "smem_bytes <= device.smem_per_block"]
dims       = { c = "x.shape[1]", h = "x.shape[2]", w = "x.shape[3]", oh = "y.shape[2]", ow = "y.shape[3]", kh = "weight.shape[2]", kw = "weight.shape[3]", planes_all = "x.shape[0] * c", tx = "min(ceil_div(ow, 4), 32)", ty = "min(ceil_div(oh, ROWS), max(1, MOST // tx))", planes = "min(max(1, MOST // (tx * ty)), planes_all)", tr = "(ty * ROWS - 1) * stride[0] + (kh - 1) * dilation[0] + 1", tc = "(tx - 1) * 4 * stride[1] + ceil_div(3 * stride[1] + (kw - 1) * dilation[1] + 1, 4) * 4", tiles = "ceil_div(ow, tx * 4) * ceil_div(oh, ty * ROWS)", smem_bytes = "planes * tr * tc * 8" }
static     = ["kh", "kw", "tx", "ty", "planes", "tr", "tc"]
tune       = { ROWS = [4, 7], MOST = [128, 256], PER = [4, 6] }
[[launch]]
kernel = "depthwise"
grid   = ["ceil_div(ow, tx * 4)", "ceil_div(oh, ty * ROWS)", "min(min(ceil_div(planes_all, planes), ceil_div(device.sms * PER, tiles)), 65535)"]
block  = ["tx * ty * planes"]
smem   = "smem_bytes"
args   = ["x", "weight", "bias", "bn_weight", "bn_bias", "bn_mean", "bn_var", "y", "c", "h", "w", "oh", "ow", "planes_all"]
---*/
// Depthwise convolution with its epilogue, NCHW. A block stages the input tile of PLANES (image, channel) planes, halo and zero padding
// included, as float, and the next planes' while it computes these (cp.async where no conversion is needed); a thread owns 4 columns x ROWS rows of outputs and walks down the input rows of its tile: a row is a few 16-byte
// loads from shared memory that serve every output row they reach. Sums are float, in the order of the taps. A weight that is not finite
// would make NaN of a padded zero: such a channel is computed tap by tap, inside the image only.

enum { SY = P_STRIDE_0, SX = P_STRIDE_1, PY = P_PADDING_0, PX = P_PADDING_1, DY = P_DILATION_0, DX = P_DILATION_1 };
enum { THREADS = TX * TY * PLANES, TILE = TR * TC, NEED = 3 * SX + (KW - 1) * DX + 1, QUADS = (NEED + 3) / 4, DEEP = (ROWS - 1) * SY + (KH - 1) * DY + 1 };
enum { WIDE = THREADS >= 16 ? 16 : 1, LINES = THREADS / WIDE };  // threads beside each other in a row of the tile, rows at a time

// the tiles of PLANES planes from `first` on, zero outside the image and behind the last plane
__device__ __forceinline__ void stage(float* to, const T_x* __restrict__ x, int first, int planes_all, int y0, int x0, int h, int w, long long area) {
    const int c0 = threadIdx.x % WIDE, line = threadIdx.x / WIDE;
    if (line < LINES) {
#pragma unroll 1
        for (int p = 0; p < PLANES; ++p) {
            const T_x* from = x + (first + p) * area;
            const bool there = first + p < planes_all;
#pragma unroll 2
            for (int r = line; r < TR; r += LINES) {
                const int gy = y0 + r;
                const bool row = there && unsigned(gy) < unsigned(h);
#pragma unroll
                for (int k = 0; k < (TC + WIDE - 1) / WIDE; ++k) {
                    const int col = c0 + k * WIDE, gx = x0 + col;
                    if (TC % WIDE == 0 || col < TC) {
                        const bool in = row && unsigned(gx) < unsigned(w);
                        float* place = to + p * TILE + r * TC + col;
                        if (sizeof(T_x) == 4) {
                            const T_x* source = in ? from + (long long)gy * w + gx : x;
                            asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_address(place)), "l"(source), "r"(in ? 4 : 0) : "memory");
                        } else {
                            *place = in ? to_float(from[(long long)gy * w + gx]) : 0.0f;
                        }
                    }
                }
            }
        }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

__device__ __forceinline__ float activated(float v) {
#if OP_RELU
    v = v < 0.0f ? 0.0f : v;
#elif OP_SILU
    v = v / (1.0f + expf(-v));
#elif OP_HARDSWISH
    v = v * fminf(fmaxf(v + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
#endif
    return v;
}

extern "C" __global__ void __launch_bounds__(THREADS)
depthwise(const T_x* __restrict__ x, const T_weight* __restrict__ weight, const T_bias* __restrict__ bias,
          const T_bn_weight* __restrict__ bn_weight, const T_bn_bias* __restrict__ bn_bias, const T_bn_mean* __restrict__ bn_mean,
          const T_bn_var* __restrict__ bn_var, T_y* __restrict__ y, int c, int h, int w, int oh, int ow, int planes_all) {
    extern __shared__ float4 memory[];
    float* stages = reinterpret_cast<float*>(memory);
    const int t = threadIdx.x, plane = t / (TX * TY), j = t % TX, i = t / TX % TY;
    const int ox = (blockIdx.x * TX + j) * 4, oy = (blockIdx.y * TY + i) * ROWS;
    const int x0 = blockIdx.x * (TX * 4) * SX - PX, y0 = blockIdx.y * (TY * ROWS) * SY - PY;
    const long long area = (long long)h * w;
    int buffer = 0;
    if (blockIdx.z * PLANES < planes_all) stage(stages, x, blockIdx.z * PLANES, planes_all, y0, x0, h, w, area);
    for (int first = blockIdx.z * PLANES; first < planes_all; first += gridDim.z * PLANES, buffer ^= 1) {
        const float* tile = stages + buffer * (PLANES * TILE);
        const int next = first + gridDim.z * PLANES;
        if (next < planes_all) {
            stage(stages + (buffer ^ 1) * (PLANES * TILE), x, next, planes_all, y0, x0, h, w, area);
        }
        const int mine = first + plane, channel = mine % c;
        const bool active = mine < planes_all && ox < ow && oy < oh;
        float taps[KH * KW];
        bool finite = true;
        if (active) {
#pragma unroll
            for (int k = 0; k < KH * KW; ++k) {
                taps[k] = to_float(weight[channel * (KH * KW) + k]);
                finite = finite && fabsf(taps[k]) < INFINITY;
            }
        }
        if (next < planes_all) {
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
        __syncthreads();
        if (active) {
            float sums[ROWS][4];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int q = 0; q < 4; ++q) sums[r][q] = 0.0f;
            }
            if (finite) {
                const float4* from = reinterpret_cast<const float4*>(tile + plane * TILE + i * (ROWS * SY) * TC + j * 4 * SX);
#pragma unroll
                for (int d = 0; d < DEEP; ++d) {
                    float line[QUADS * 4];
#pragma unroll
                    for (int q = 0; q < QUADS; ++q) {
                        const float4 v = from[d * (TC / 4) + q];
                        line[4 * q] = v.x, line[4 * q + 1] = v.y, line[4 * q + 2] = v.z, line[4 * q + 3] = v.w;
                    }
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) {
                        const int down = d - r * SY;
                        if (down >= 0 && down % DY == 0 && down / DY < KH) {
#pragma unroll
                            for (int k = 0; k < KW; ++k) {
#pragma unroll
                                for (int q = 0; q < 4; ++q) sums[r][q] = fmaf(line[q * SX + k * DX], taps[down / DY * KW + k], sums[r][q]);
                            }
                        }
                    }
                }
            } else {
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                    for (int q = 0; q < 4; ++q) {
#pragma unroll 1
                        for (int k = 0; k < KH * KW; ++k) {
                            const int gy = (oy + r) * SY - PY + k / KW * DY, gx = (ox + q) * SX - PX + k % KW * DX;
                            if (unsigned(gy) < unsigned(h) && unsigned(gx) < unsigned(w)) {
                                sums[r][q] = fmaf(to_float(x[mine * area + (long long)gy * w + gx]), to_float(weight[channel * (KH * KW) + k]), sums[r][q]);
                            }
                        }
                    }
                }
            }
            float shift = 0.0f;
#if HAS_BIAS
            shift = to_float(bias[channel]);
#endif
#if OP_BATCH_NORM
            const float mean = to_float(bn_mean[channel]), scale = 1.0f / sqrtf(to_float(bn_var[channel]) + float(P_BATCH_NORM_EPS));
            float gain = 1.0f, beta = 0.0f;
#if HAS_BN_WEIGHT
            gain = to_float(bn_weight[channel]);
#endif
#if HAS_BN_BIAS
            beta = to_float(bn_bias[channel]);
#endif
#endif
            T_y* out = y + (long long)mine * oh * ow + (long long)oy * ow + ox;
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (oy + r < oh) {
                    Vec<T_y, 4> made;
#pragma unroll
                    for (int q = 0; q < 4; ++q) {
                        float v = sums[r][q];
#if HAS_BIAS
                        v += shift;
#endif
#if OP_BATCH_NORM
                        v = fmaf((v - mean) * scale, gain, beta);
#endif
                        made[q] = from_float<T_y>(activated(v));
                    }
                    if (ow % 4 == 0) {
                        *reinterpret_cast<Vec<T_y, 4>*>(out + (long long)r * ow) = made;
                    } else {
#pragma unroll
                        for (int q = 0; q < 4; ++q) {
                            if (ox + q < ow) out[(long long)r * ow + q] = made[q];
                        }
                    }
                }
            }
        }
        __syncthreads();
    }
}
