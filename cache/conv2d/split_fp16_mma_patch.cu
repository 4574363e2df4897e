/*---
implements = "conv2d"
target     = "cuda"
dtypes     = ["float32"]
optional   = ["bias"]
where      = ["x.ndim == 4", "groups == 1", "weight.shape[1] == cin", "x.stride[3] == 1", "x.stride[2] >= 0", "weight.stride[3] == 1", "weight.stride[2] == kw", "weight.stride[1] == kh * kw", "weight.stride[0] == k", "y.stride[3] == 1", "y.stride[2] == ow", "y.stride[1] == oh * ow", "y.stride[0] == oc * oh * ow", "x.numel <= 2147483647", "y.numel <= 2147483647", "y.numel >= 1", "k >= 1", "k <= 4096", "ocb <= 65535", "smem_bytes <= device.smem_per_block"]
dims       = { n = "x.shape[0]", cin = "x.shape[1]", h = "x.shape[2]", w = "x.shape[3]", oc = "weight.shape[0]", kh = "weight.shape[2]", kw = "weight.shape[3]", oh = "y.shape[2]", ow = "y.shape[3]", k = "cin * kh * kw", ksteps = "ceil_div(k, 16)", ocb = "ceil_div(oc, 96)", prows = "(ROWS - 1) * stride[0] + (kh - 1) * dilation[0] + 1", pcols = "55 * stride[1] + (kw - 1) * dilation[1] + 1", pitch = "pcols + (kw + 3 * pcols) % 4", plane = "prows * pitch + (kh * kw + 3 * prows * pitch) % 4", tiles = "n * ceil_div(oh, ROWS) * ceil_div(ow, 56)", smem_bytes = "ksteps * 6208 + 256 + (4 // ROWS) * cin * plane * 4" }
tune       = { ROWS = [2, 4] }
align      = 16
[[workspace]]
name  = "wfrag"                      # split weights, mma fragment order: [ocb][kstep][m tile][hi, lo][lane][4 words]
dtype = "int32"
shape = ["ocb * ksteps * 1536"]
[[workspace]]
name  = "wexp"                       # per channel: exponent of the largest |weight|, 1000 where it is not finite
dtype = "int32"
shape = ["ocb * 96"]
[[launch]]
kernel = "split_weights"
grid   = ["ocb * 96"]
block  = ["128"]
args   = ["weight", "wfrag", "wexp", "oc", "k", "ksteps"]
[[launch]]
kernel = "conv_split"
grid   = ["min(device.sms, ceil_div(tiles, 4 // ROWS))", "ocb"]
block  = ["384"]
smem   = "smem_bytes"
args   = ["x", "weight", "bias", "y", "wfrag", "wexp", "cin", "h", "w", "oc", "kh", "kw", "oh", "ow", "k", "ksteps", "prows", "pcols", "pitch", "plane", "tiles", "x.stride[0]", "x.stride[1]", "x.stride[2]"]
---*/
// Implicit GEMM, M = 96 channels, N = ROWS output rows x 56 pixels per warp group, K = cin*kh*kw padded to 16.
// A warp: 32 channels x one output row of 56 pixels = 2 x 7 mma tiles. value = (hi + lo / 2048) * 2^scale for x and weight;
// hi*hi starts from zero at every K step of 16 and is added to float registers; lo*hi + hi*lo chain in a second accumulator.
// Fragment element i (0..3) of lane%4 = j stands for k = 16*step + 4*i + j, the same for A and B.

#define GROUPS (4 / ROWS)
#define GT (ROWS * 96)          // threads of a group
#define GW (ROWS * 3)           // warps of a group

__device__ __forceinline__ int exponent_of(uint32_t magnitude) {   // floor(log2), finite; -150 for zero
    const int e = int(magnitude >> 23);
    return e ? e - 127 : -118 - __clz(int(magnitude));
}
__device__ __forceinline__ float pow2(int e) { return __int_as_float((e + 127) << 23); }   // -126 <= e <= 127
__device__ __forceinline__ void split(float v, __half& hi, __half& lo) {
    hi = __float2half_rn(v);
    lo = __float2half_rn((v - __half2float(hi)) * 2048.0f);
}
__device__ __forceinline__ void mma16816(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
__device__ __forceinline__ void group_sync(int group) { asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(GT) : "memory"); }
__device__ __forceinline__ void copy4(uint32_t smem, const float* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem), "l"(from), "r"(valid ? 4 : 0) : "memory");
}

extern "C" __global__ void __launch_bounds__(128)
split_weights(const float* __restrict__ weight, __half* __restrict__ wfrag, int* __restrict__ wexp, int oc, int k, int ksteps) {
    const int channel = blockIdx.x;
    const float* row = weight + (long long)channel * k;
    const bool real = channel < oc;
    int most = 0;
    for (int i = threadIdx.x; i < k; i += 128)
        if (real) most = max(most, __float_as_int(row[i]) & 0x7fffffff);
    most = block_max(most);
    const bool finite = most < 0x7f800000;
    const int e = exponent_of(uint32_t(finite ? most : 0));
    if (threadIdx.x == 0) wexp[channel] = finite ? e : 1000;
    const int s = 14 - e, s1 = s / 2;
    const float f1 = pow2(s1), f2 = pow2(s - s1);
    const int block = channel / 96, mtile = channel % 96 / 16, m = channel % 16;
    for (int i = threadIdx.x; i < ksteps * 16; i += 128) {
        const float v = real && finite && i < k ? row[i] * f1 * f2 : 0.0f;
        __half hi, lo;
        split(v, hi, lo);
        const int step = i / 16, e4 = i % 16 / 4, j = i % 4;
        const int reg = (m >= 8 ? 1 : 0) + (e4 >= 2 ? 2 : 0);
        const long long at = ((((long long)block * ksteps + step) * 6 + mtile) * 2 * 32 + (m % 8) * 4 + j) * 8 + reg * 2 + (e4 & 1);
        wfrag[at] = hi;
        wfrag[at + 256] = lo;
    }
}

// A tile with NaN or Inf in reach (or products near overflow): plain FMA, straight from global memory.
__device__ __noinline__ void slow_tile(const float* xn, const float* weight, const float* bias, float* yn, int cin, int h, int w,
                                       int oc, int kh, int kw, int oh, int ow, int channel0, int oy0, int ox0, int thread,
                                       long long sxc, long long sxh) {
    for (int i = thread; i < 96 * ROWS * 56; i += GT) {
        const int ox = ox0 + i % 56, oy = oy0 + i / 56 % ROWS, channel = channel0 + i / (56 * ROWS);
        if (ox >= ow || oy >= oh || channel >= oc) continue;
        const float* wc = weight + (long long)channel * cin * kh * kw;
        float sum = 0.0f;
        for (int c = 0; c < cin; ++c) {
            float part = 0.0f;
            for (int ky = 0; ky < kh; ++ky) {
                const int iy = oy * P_STRIDE_0 - P_PADDING_0 + ky * P_DILATION_0;
                for (int kx = 0; kx < kw; ++kx) {
                    const int ix = ox * P_STRIDE_1 - P_PADDING_1 + kx * P_DILATION_1;
                    const bool in = iy >= 0 && iy < h && ix >= 0 && ix < w;
                    const float v = in ? xn[c * sxc + iy * sxh + ix] : 0.0f;
                    part = fmaf(v, wc[(c * kh + ky) * kw + kx], part);
                }
            }
            sum += part;
        }
#if HAS_BIAS
        sum += bias[channel];
#endif
        yn[((long long)channel * oh + oy) * ow + ox] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
conv_split(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, float* __restrict__ y,
           const uint4* __restrict__ wfrag, const int* __restrict__ wexp, int cin, int h, int w, int oc, int kh, int kw, int oh, int ow,
           int k, int ksteps, int prows, int pcols, int pitch, int plane, int tiles, long long sxn, long long sxc, long long sxh) {
    extern __shared__ uint4 shared[];
    uint4* a_smem = shared;                                            // ksteps * 384
    int4* offsets = reinterpret_cast<int4*>(shared + ksteps * 384);    // ksteps * 4: byte offsets of k = 16*step + {0,4,8,12} + j
    uint32_t* scratch = reinterpret_cast<uint32_t*>(offsets + ksteps * 4);   // 64 words
    const int group = threadIdx.x / GT, gt = threadIdx.x % GT, gw = gt / 32, lane = threadIdx.x % 32;
    uint32_t* patch = scratch + 64 + group * cin * plane;
    const int row = gw / 3, mw = gw % 3, j = lane % 4, q = lane / 4;
    const int channel0 = blockIdx.y * 96;
    const int xtiles = (ow + 55) / 56, ytiles = (oh + ROWS - 1) / ROWS;
    const int lines = cin * prows;

    auto load_patch = [&](int tile) {
        const int ox0 = tile % xtiles * 56, oy0 = tile / xtiles % ytiles * ROWS, image = tile / xtiles / ytiles;
        const float* xn = x + image * sxn;
        const int ix0 = ox0 * P_STRIDE_1 - P_PADDING_1, iy0 = oy0 * P_STRIDE_0 - P_PADDING_0;
        for (int line = gw; line < lines; line += GW) {
            const int c = line / prows, r = line - c * prows, iy = iy0 + r;
            const bool in_y = iy >= 0 && iy < h;
            const float* from = xn + c * sxc + iy * sxh + ix0;
            const uint32_t to = smem_address(patch + c * plane + r * pitch);
            for (int col = lane; col < pcols; col += 32) {
                const bool in = in_y && ix0 + col >= 0 && ix0 + col < w;
                copy4(to + col * 4, in ? from + col : x, in);
            }
        }
        cp_async_commit();
    };

    int tile = blockIdx.x * GROUPS + group;
    const int tile_step = gridDim.x * GROUPS;
    if (threadIdx.x == 0) scratch[32] = uint32_t(-1000);
    __syncthreads();
    // the last group fetches the weights while the first fetches its patch: the groups then run out of phase
    if (group == GROUPS - 1) {
        const uint4* from = wfrag + (long long)blockIdx.y * ksteps * 384;
        for (int i = gt; i < ksteps * 384; i += GT) cp_async16(a_smem + i, from + i);
        cp_async_commit();
    }
    if (group == 0 && tile < tiles) load_patch(tile);
    if (threadIdx.x < 96) atomicMax(reinterpret_cast<int*>(scratch + 32), wexp[channel0 + threadIdx.x]);
    for (int i = threadIdx.x; i < ksteps * 16; i += 384) {
        int at = 0;                                                    // padded k: any finite value, its weight is zero
        if (i < k) {
            const int c = i / (kh * kw), ky = i / kw % kh, kx = i % kw;
            at = (c * plane + ky * P_DILATION_0 * pitch + kx * P_DILATION_1) * 4;
        }
        reinterpret_cast<int*>(offsets)[i / 16 * 16 + i % 4 * 4 + i % 16 / 4] = at;
    }
    cp_async_wait<0>();
    __syncthreads();
    const int wmax = int(scratch[32]);
    const int guard = 127 - 3 - (32 - __clz(k)) - wmax;                // xe below it: no product sum can reach 2^127

    bool loaded = group == 0;
    for (; tile < tiles; tile += tile_step) {
        if (!loaded) load_patch(tile);
        loaded = false;
        cp_async_wait<0>();
        uint32_t most = 0;
        for (int line = gw; line < lines; line += GW) {
            const int c = line / prows;
            const uint32_t* from = patch + c * plane + (line - c * prows) * pitch;
#pragma unroll 4
            for (int col = lane; col < pcols; col += 32) most = max(most, from[col] & 0x7fffffffu);
        }
        most = __reduce_max_sync(0xffffffffu, most);
        if (lane == 0) scratch[group * 16 + gw] = most;
        group_sync(group);
#pragma unroll
        for (int i = 0; i < GW; ++i) most = max(most, scratch[group * 16 + i]);

        const int ox0 = tile % xtiles * 56, oy0 = tile / xtiles % ytiles * ROWS, image = tile / xtiles / ytiles;
        const int xe = exponent_of(most);
        if (most >= 0x7f800000u || xe >= guard) {
            slow_tile(x + image * sxn, weight, bias, y + (long long)image * oc * oh * ow, cin, h, w, oc, kh, kw, oh, ow,
                      channel0, oy0, ox0, gt, sxc, sxh);
            group_sync(group);
            continue;
        }
        {
            if (gt == 0) scratch[group * 16 + 15] = uint32_t(xe);      // read after the products
            const int s = 14 - xe, s1 = s / 2;
            const float f1 = pow2(s1), f2 = pow2(s - s1);
            for (int line = gw; line < lines; line += GW) {
                const int c = line / prows;
                uint32_t* at = patch + c * plane + (line - c * prows) * pitch;
#pragma unroll 4
                for (int col = lane; col < pcols; col += 32) {
                    __half hi, lo;
                    split(__uint_as_float(at[col]) * f1 * f2, hi, lo);
                    at[col] = uint32_t(__half_as_ushort(hi)) | (uint32_t(__half_as_ushort(lo)) << 16);
                }
            }
        }
        group_sync(group);

        float sum[2][7][4], cross[2][7][4];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int t = 0; t < 7; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[m][t][i] = cross[m][t][i] = 0.0f;

        const char* pixel = reinterpret_cast<const char*>(patch + row * P_STRIDE_0 * pitch + q * P_STRIDE_1);
        const uint4* a = a_smem + mw * 128 + lane;
        const int4* offset = offsets + j;
#pragma unroll 1
        for (int step = 0; step < ksteps; ++step, a += 384, offset += 4) {
            const int4 o = *offset;
            const uint4 ah0 = a[0], al0 = a[32], ah1 = a[64], al1 = a[96];
            const uint32_t* p0 = reinterpret_cast<const uint32_t*>(pixel + o.x);
            const uint32_t* p1 = reinterpret_cast<const uint32_t*>(pixel + o.y);
            const uint32_t* p2 = reinterpret_cast<const uint32_t*>(pixel + o.z);
            const uint32_t* p3 = reinterpret_cast<const uint32_t*>(pixel + o.w);
#pragma unroll
            for (int t = 0; t < 7; ++t) {
                const uint32_t v0 = p0[t * 8 * P_STRIDE_1], v1 = p1[t * 8 * P_STRIDE_1];
                const uint32_t v2 = p2[t * 8 * P_STRIDE_1], v3 = p3[t * 8 * P_STRIDE_1];
                const uint32_t bh0 = __byte_perm(v0, v1, 0x5410), bl0 = __byte_perm(v0, v1, 0x7632);
                const uint32_t bh1 = __byte_perm(v2, v3, 0x5410), bl1 = __byte_perm(v2, v3, 0x7632);
                const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                float d0[4], d1[4];
                mma16816(d0, ah0, bh0, bh1, zero);
                mma16816(d1, ah1, bh0, bh1, zero);
                mma16816(cross[0][t], al0, bh0, bh1, cross[0][t]);
                mma16816(cross[1][t], al1, bh0, bh1, cross[1][t]);
                mma16816(cross[0][t], ah0, bl0, bl1, cross[0][t]);
                mma16816(cross[1][t], ah1, bl0, bl1, cross[1][t]);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sum[0][t][i] += d0[i];
                    sum[1][t][i] += d1[i];
                }
            }
        }

        asm volatile("" : "+r"(tile));      // decode the tile again rather than hold its coordinates through the products
        const int first_x = tile % xtiles * 56 + j * 2, oy = tile / xtiles % ytiles * ROWS + row, image_ = tile / xtiles / ytiles;
        const int xe_ = int(scratch[group * 16 + 15]);
        if (oy < oh) {
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int channel = channel0 + mw * 32 + m * 16 + half * 8 + q;
                    if (channel < oc) {
                        const int e = max(xe_ + wexp[channel] - 28, -252), e1 = e / 2;
                        const float f1 = pow2(e1), f2 = pow2(e - e1);
                        float b = 0.0f;
#if HAS_BIAS
                        b = bias[channel];
#endif
                        float* out = y + (((long long)image_ * oc + channel) * oh + oy) * ow;
#pragma unroll
                        for (int t = 0; t < 7; ++t)
#pragma unroll
                            for (int i = 0; i < 2; ++i) {
                                const int ox = first_x + t * 8 + i;
                                const float v = fmaf(cross[m][t][half * 2 + i], 1.0f / 2048.0f, sum[m][t][half * 2 + i]);
                                float result = v * f1 * f2;
#if HAS_BIAS
                                result += b;
#endif
                                if (ox < ow) out[ox] = result;
                            }
                    }
                }
        }
        group_sync(group);   // everyone has read the patch
    }
}
