/*---
implements = ["conv2d.batch_norm.add.relu", "conv2d", "conv2d.relu", "conv2d.batch_norm", "conv2d.batch_norm.relu", "conv2d.add.relu"]
target     = "cuda"
dtypes     = ["float32"]
optional   = ["bias", "bn_weight", "bn_bias", "bn_mean", "bn_var", "residual"]
where      = ["x.ndim == 4", "weight.ndim == 4", "y.ndim == 4", "weight.shape[2] == 1", "weight.shape[3] == 1", "groups == 1",
              "padding[0] == 0", "padding[1] == 0", "y.contiguous == 1", "y.numel <= 2147480000", "y.numel >= 1", "k >= 1",
              "QUAD == (hw % 4 == 0)"]
dims       = { k = "x.shape[1]", oc = "weight.shape[0]", wo = "y.shape[3]", hw = "y.shape[2] * y.shape[3]", total = "y.shape[0] * y.shape[2] * y.shape[3]", kp = "ceil_div(x.shape[1], 64) * 64", items = "ceil_div(y.shape[0] * y.shape[2] * y.shape[3], 128) * ceil_div(weight.shape[0], 128)" }
tune       = { QUAD = [1, 0], CHAIN = [1, 2, 4] }
[[workspace]]
name = "w_cat"
dtype = "float16"
shape = ["oc", "kp * 2"]
[[workspace]]
name = "params"
dtype = "float32"
shape = ["oc", "4"]
[[tensor_map]]
name = "w_map"
over = "w_cat"
dims = ["kp * 2", "oc"]
strides = ["kp * 4"]
box = ["64", "128"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[prepare]]
kernel = "pack_weight"
grid = ["ceil_div(oc, 4)"]
block = ["128"]
args = ["weight", "bias", "bn_weight", "bn_bias", "bn_mean", "bn_var", "w_cat", "params", "oc", "k", "kp", "weight.stride[0]", "weight.stride[1]"]
[[launch]]
kernel = "pointwise"
grid = ["min(device.sms, items)"]
block = ["384"]
pdl = true
smem = "3 * 65536 + 1024"
args = ["w_map", "x", "weight", "params", "bias", "residual", "y", "oc", "k", "hw", "wo", "total", "items",
        "min(4294967295, 4294967296 // hw)", "x.stride[0]", "x.stride[1]", "x.stride[2] * stride[0]", "x.stride[3] * stride[1]",
        "weight.stride[0]", "weight.stride[1]"]
---*/
// Pointwise convolution, y[oc][pixel] = W[oc][c] x[c][pixel], with its whole epilogue, in float32 by three fp16 products.
// Pixels of all images in one row; a tile is 128 output channels x 128 pixels. One producer thread owns a pixel: it reads 64 channels
// of it (coalesced over pixels), brings them to [2^14, 2^15) by a power of two of that pixel, which only falls from block to block of
// 64 channels, splits them to hi + lo and writes two rows of 128 bytes: K-major operands, transposed in registers. Consumers shrink
// the sum so far when the power fell (`ratio`). Row col of the tile holds pixel pixel_of(col), so that a thread's sums are
// four neighbouring pixels of a channel. The residual is read before the products. Rows or pixels with Inf or NaN give NaN sums (lo
// is Inf - Inf) and are made again, plainly.
constexpr int STAGES = 3, STAGE = 65536, SLOTS = STAGES + 1;  // stage: W hi, W lo, x hi, x lo, each 128 rows of 64 channels

__device__ __forceinline__ float pow2(int e) { return __int_as_float((e + 127) << 23); }
// exponent of the power of two that brings a largest magnitude (as bits) to [2^14, 2^15); -114 where it is Inf or NaN
__device__ __forceinline__ int scale_of(uint32_t top) { return min(141 - int(min(top, 0x7f800000u) >> 23), 126); }
// acc * a * b for powers of two a, b: the smaller one first cannot overflow
__device__ __forceinline__ float unscale(float acc, float a, float b) { return acc * fminf(a, b) * fmaxf(a, b); }
__device__ __forceinline__ int pixel_of(int col) {
    const int t = col % 8 / 2, i = col / 8 % 2 * 2 + col % 2;
    return col / 16 * 16 + (QUAD ? 4 * t + i : 4 * i + t);
}
// p = image * hw + q; magic is 2^32 / hw, rounded down
__device__ __forceinline__ void locate(uint32_t p, uint32_t hw, uint32_t magic, uint32_t& image, uint32_t& q) {
    image = __umulhi(p, magic);
    q = p - image * hw;
    if (q >= hw) ++image, q -= hw;
}
// what follows the convolution; f: scale of the row of weight (not used here), mean, factor, addend
__device__ __forceinline__ float finish(float v, const Vec<float, 4>& f, float bias, float residual) {
#if OP_BATCH_NORM
#if HAS_BIAS
    v += bias;
#endif
    v = fmaf(v - f[1], f[2], f[3]);
#elif HAS_BIAS
    v += f[3];
#endif
#if HAS_RESIDUAL
    v += residual;
#endif
#if OP_RELU
    v = v < 0.0f ? 0.0f : v;  // NaN stays
#endif
    return v;
}
// d (64 x 64, fp32) = [d +] a (64 x 16) * b (64 x 16)^T in fp16
__device__ __forceinline__ void wgmma_k16(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 0, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(accumulate));
}
template <int N> __device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// one warp per output channel
extern "C" __global__ void __launch_bounds__(128)
pack_weight(const float* __restrict__ weight, const float* __restrict__ bias, const float* __restrict__ bn_weight,
            const float* __restrict__ bn_bias, const float* __restrict__ bn_mean, const float* __restrict__ bn_var,
            half* __restrict__ w_cat, float* __restrict__ params, int oc, int k, int kp, long long w_s0, long long w_s1) {
    pdl_launch_dependents();
    const int r = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (r >= oc) return;
    const float* row = weight + r * w_s0;
    uint32_t top = 0;
    for (int c = lane; c < k; c += 32) top = max(top, __float_as_uint(row[c * w_s1]) & 0x7fffffffu);
    top = warp_max(top);
    const int e = scale_of(top);
    const float s = pow2(e);
    half* to = w_cat + (long long)r * 2 * kp;
    for (int c = lane; c < kp; c += 32) {
        const float u = c < k ? row[c * w_s1] * s : 0.0f;
        const half h = __float2half_rn(u);
        half* at = to + c / 64 * 128 + c % 64;
        at[0] = h;
        at[64] = __float2half_rn(u - __half2float(h));
    }
    if (lane == 0) {
        Vec<float, 4> f = {{pow2(-e), 0.0f, 1.0f, 0.0f}};
#if OP_BATCH_NORM
        const float inv = float((HAS_BN_WEIGHT ? double(bn_weight[r]) : 1.0) / sqrt(double(bn_var[r]) + double(P_BATCH_NORM_EPS)));
        f[1] = bn_mean[r];
        f[2] = inv;
        f[3] = HAS_BN_BIAS ? bn_bias[r] : 0.0f;
#elif HAS_BIAS
        f[3] = bias[r];
#endif
        store_vec(params + 4ll * r, f);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
pointwise(const __grid_constant__ TensorMap w_map, const float* __restrict__ x, const float* __restrict__ weight,
          const float* __restrict__ params, const float* __restrict__ bias, const float* __restrict__ residual, float* __restrict__ y,
          int oc, int k, int hw, int wo, int total, int items, long long magic64, long long x_s0, long long x_s1, long long x_s2,
          long long x_s3, long long w_s0, long long w_s1) {
    extern __shared__ uint8_t raw[];
    __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
    __shared__ __align__(16) float ratio[STAGES][128];  // by which the sums so far are to be multiplied
    __shared__ __align__(16) float x_inv[SLOTS][128];   // by tile: what undoes the scale of a pixel
    uint8_t* ring = raw + ((1024u - (smem_address(raw) & 1023u)) & 1023u);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tiles_oc = ceil_div(oc, 128), blocks = ceil_div(k, 64);
    const uint32_t magic = uint32_t(magic64);

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(&full[s], 129);  // 128 producers, and the one that expects the weights once more
            mbarrier_init(&empty[s], 8);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    pdl_wait();  // packed weights, and whatever came before

    if (warp >= 8) {
        setmaxnreg_dec<104>();
        const int col = threadIdx.x - 256, offset = pixel_of(col);
        if (col == 0) tma_prefetch(w_map);
        float v[64];
        const float* from = x;
        bool valid = false;
        auto seek = [&](int item) {
            const uint32_t p = uint32_t(item / tiles_oc) * 128u + offset;
            valid = p < uint32_t(total);
            uint32_t image = 0, q = 0;
            if (valid) locate(p, hw, magic, image, q);
            const uint32_t line = q / uint32_t(wo);
            from = x + image * x_s0 + line * x_s2 + (q - line * uint32_t(wo)) * x_s3;
        };
        auto load = [&](int b) {
            const int left = valid ? k - b * 64 : 0;
            const float* at = from + (long long)b * 64 * x_s1;
            if (left >= 64) {
#pragma unroll
                for (int c = 0; c < 64; ++c) {
                    v[c] = __ldg(at);
                    at += x_s1;
                }
            } else {
#pragma unroll
                for (int c = 0; c < 64; ++c) {
                    v[c] = 0.0f;
                    if (c < left) v[c] = __ldg(at);
                    at += x_s1;
                }
            }
        };
        int item = blockIdx.x, b = 0, s = 0, phase = 0, slot = 0, e = 126;
        seek(item);  // the grid has no more blocks than items
        load(0);
        while (item < items) {
            uint32_t top = 0;
#pragma unroll
            for (int c = 0; c < 64; ++c) top = max(top, __float_as_uint(v[c]) & 0x7fffffffu);
            const int before = b ? e : 126;
            e = min(before, scale_of(top));
            const float scale = pow2(e);
            uint8_t* stage = ring + s * STAGE;
            mbarrier_wait(&empty[s], phase ^ 1);
            if (col == 0) {
                const int row = item % tiles_oc * 128;
                mbarrier_arrive_expect(&full[s], 32768);
                tma_load_2d(stage, w_map, &full[s], b * 128, row);
                tma_load_2d(stage + 16384, w_map, &full[s], b * 128 + 64, row);
            }
            __syncwarp();
            uint8_t* to = stage + 32768 + col * 128;
#pragma unroll
            for (int g = 0; g < 8; ++g) {
                Vec<half2, 4> h, l;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float u0 = v[8 * g + 2 * i] * scale, u1 = v[8 * g + 2 * i + 1] * scale;
                    h[i] = __floats2half2_rn(u0, u1);
                    const float2 f = __half22float2(h[i]);
                    l[i] = __floats2half2_rn(u0 - f.x, u1 - f.y);
                }
                const int place = (g ^ (col & 7)) * 16;
                store_vec(reinterpret_cast<half2*>(to + place), h);
                store_vec(reinterpret_cast<half2*>(to + 16384 + place), l);
            }
            ratio[s][col] = b ? pow2(max(e - before, -126)) : 1.0f;
            if (b == blocks - 1) x_inv[slot][col] = pow2(-e);
            fence_async_shared();
            mbarrier_arrive(&full[s]);
            if (++s == STAGES) s = 0, phase ^= 1;
            if (++b == blocks) {
                b = 0;
                item += gridDim.x;
                if (++slot == SLOTS) slot = 0;
                if (item < items) seek(item);
            }
            if (item < items) load(b);
        }
    } else {
        setmaxnreg_inc<200>();
        const int group = warp / 4, t = lane % 4;
        const int my_row = group * 64 + warp % 4 * 16 + lane / 4;
        float master[64], acc[32];
#if HAS_RESIDUAL
        float res[64];
#endif
        int s = 0, phase = 0, slot = 0;
        for (int item = blockIdx.x; item < items; item += gridDim.x) {
            const int row0 = item % tiles_oc * 128;
            int row = row0 + my_row, pixel0 = item / tiles_oc * 128;
            // element (h, J, i) is row + 8 h, pixel0 + 16 J + (QUAD ? 4 t + i : 4 i + t)
#if HAS_RESIDUAL
#pragma unroll
            for (int J = 0; J < 8; ++J) {
                asm volatile("" : "+r"(pixel0));
#if QUAD
                const uint32_t p = pixel0 + 16 * J + 4 * t;
                uint32_t image, q;
                locate(p, hw, magic, image, q);
                const float* at = residual + ((image * uint32_t(oc) + row) * uint32_t(hw) + q);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float4 f = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    if (p < uint32_t(total) && row + 8 * h < oc) f = __ldcs(reinterpret_cast<const float4*>(at + 8 * h * (long long)hw));
                    res[J * 8 + h * 4] = f.x, res[J * 8 + h * 4 + 1] = f.y, res[J * 8 + h * 4 + 2] = f.z, res[J * 8 + h * 4 + 3] = f.w;
                }
#else
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t p = pixel0 + 16 * J + 4 * i + t;
                    uint32_t image, q;
                    locate(p, hw, magic, image, q);
                    const float* at = residual + ((image * uint32_t(oc) + row) * uint32_t(hw) + q);
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        res[J * 8 + h * 4 + i] = 0.0f;
                        if (p < uint32_t(total) && row + 8 * h < oc) res[J * 8 + h * 4 + i] = __ldcs(at + 8 * h * (long long)hw);
                    }
                }
#endif
            }
#endif
#pragma unroll
            for (int i = 0; i < 64; ++i) master[i] = 0.0f;
#pragma unroll
            for (int i = 0; i < 32; ++i) acc[i] = 0.0f;
            const bool live = row0 + group * 64 < oc;
#pragma unroll 1
            for (int b = 0; b < blocks; ++b) {
                mbarrier_wait(&full[s], phase);
                if (live) {
                    const uint8_t* stage = ring + s * STAGE;
                    const uint64_t w_hi = wgmma_descriptor_128(stage + group * 8192), w_lo = w_hi + (16384 >> 4);
#pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        const uint64_t x_hi = wgmma_descriptor_128(stage + 32768 + n * 8192), x_lo = x_hi + (16384 >> 4);
#pragma unroll
                        for (int c = 0; c < 4; c += CHAIN) {
                            wgmma_fence();
#pragma unroll
                            for (int u = 0; u < CHAIN; ++u) {  // smallest products first
                                wgmma_k16(acc, w_lo + 2 * (c + u), x_hi + 2 * (c + u), u != 0);
                                wgmma_k16(acc, w_hi + 2 * (c + u), x_lo + 2 * (c + u), 1);
                            }
#pragma unroll
                            for (int u = 0; u < CHAIN; ++u) wgmma_k16(acc, w_hi + 2 * (c + u), x_hi + 2 * (c + u), 1);
                            wgmma_commit();
                            wgmma_wait<0>();
                            pin(acc);
                            if (c == 0) {
#pragma unroll
                                for (int j = 0; j < 8; ++j) {
                                    const auto f = load_vec<2>(&ratio[s][n * 64 + 8 * j + 2 * t]);
#pragma unroll
                                    for (int i = 0; i < 4; ++i)
                                        master[n * 32 + 4 * j + i] = fmaf(master[n * 32 + 4 * j + i], f[i % 2], acc[4 * j + i]);
                                }
                            } else {
#pragma unroll
                                for (int i = 0; i < 32; ++i) master[n * 32 + i] += acc[i];
                            }
                        }
                    }
                }
                __syncwarp();
                if (lane == 0) mbarrier_arrive(&empty[s]);
                if (++s == STAGES) s = 0, phase ^= 1;
            }
            if (live) {
                bool bad = false;
                asm volatile("" : "+r"(pixel0), "+r"(row));  // addresses are computed again, not kept in registers
                Vec<float, 4> f[2] = {{{1.0f, 0.0f, 1.0f, 0.0f}}, {{1.0f, 0.0f, 1.0f, 0.0f}}};
                float add[2] = {0.0f, 0.0f};
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (row + 8 * h < oc) {
                        f[h] = load_vec<4>(params + 4ll * (row + 8 * h));
#if HAS_BIAS
                        add[h] = bias[row + 8 * h];
#endif
                    }
                }
#pragma unroll
                for (int J = 0; J < 8; ++J) {
                    float inv[4];
#pragma unroll
                    for (int i = 0; i < 4; i += 2) {
                        const auto two = load_vec<2>(&x_inv[slot][16 * J + 4 * i + 2 * t]);
                        inv[i] = two[0], inv[i + 1] = two[1];
                    }
                    float out[2][4];
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const float m = master[8 * J + 4 * (i / 2) + 2 * h + i % 2];
                            bad |= m != m;
#if HAS_RESIDUAL
                            const float r = res[J * 8 + h * 4 + i];
#else
                            const float r = 0.0f;
#endif
                            out[h][i] = finish(unscale(m, f[h][0], inv[i]), f[h], add[h], r);
                        }
                    }
#if QUAD
                    const uint32_t p = pixel0 + 16 * J + 4 * t;
                    uint32_t image, q;
                    locate(p, hw, magic, image, q);
                    float* at = y + ((image * uint32_t(oc) + row) * uint32_t(hw) + q);
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        if (p < uint32_t(total) && row + 8 * h < oc)
                            *reinterpret_cast<float4*>(at + 8 * h * (long long)hw) = make_float4(out[h][0], out[h][1], out[h][2], out[h][3]);
#else
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const uint32_t p = pixel0 + 16 * J + 4 * i + t;
                        uint32_t image, q;
                        locate(p, hw, magic, image, q);
                        float* at = y + ((image * uint32_t(oc) + row) * uint32_t(hw) + q);
#pragma unroll
                        for (int h = 0; h < 2; ++h)
                            if (p < uint32_t(total) && row + 8 * h < oc) at[8 * h * (long long)hw] = out[h][i];
                    }
#endif
                }
                if (bad) {  // NaN or Inf in a row of weight or a pixel: this thread's elements again, plainly
#pragma unroll 1
                    for (int n = 0; n < 64; ++n) {
                        const int r = row + 8 * (n % 2), i = n / 2 % 4;
                        const uint32_t p = pixel0 + 16 * (n / 8) + (QUAD ? 4 * t + i : 4 * i + t);
                        if (r >= oc || p >= uint32_t(total)) continue;
                        uint32_t image, q;
                        locate(p, hw, magic, image, q);
                        const uint32_t line = q / uint32_t(wo);
                        const float* from = x + image * x_s0 + line * x_s2 + (q - line * uint32_t(wo)) * x_s3;
                        const float* by = weight + r * w_s0;
                        double sum = 0.0;
#pragma unroll 1
                        for (int c = 0; c < k; ++c) sum = fma(double(from[c * x_s1]), double(by[c * w_s1]), sum);
                        const uint32_t at = (image * uint32_t(oc) + r) * uint32_t(hw) + q;
                        float extra = 0.0f, bias_r = 0.0f;
#if HAS_RESIDUAL
                        extra = residual[at];
#endif
#if HAS_BIAS
                        bias_r = bias[r];
#endif
                        y[at] = finish(float(sum), load_vec<4>(params + 4ll * r), bias_r, extra);
                    }
                }
                __syncwarp();
            }
            if (++slot == SLOTS) slot = 0;
        }
    }
}
