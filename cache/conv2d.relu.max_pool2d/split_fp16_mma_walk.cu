/*---
implements = "conv2d.relu.max_pool2d"
target     = "cuda"
dtypes     = ["float32"]
optional   = ["bias"]
where      = ["x.ndim == 4", "groups == 1", "max_pool2d_kernel_size[0] == 3", "max_pool2d_kernel_size[1] == 3", "max_pool2d_stride[0] == 2", "max_pool2d_stride[1] == 2", "max_pool2d_padding[0] == 0", "max_pool2d_padding[1] == 0", "max_pool2d_dilation[0] == 1", "max_pool2d_dilation[1] == 1", "max_pool2d_ceil_mode == 0", "weight.shape[1] == cin", "x.stride[3] == 1", "weight.stride[3] == 1", "weight.stride[2] == kw", "weight.stride[1] == kh * kw", "weight.stride[0] == k", "y.stride[3] == 1", "y.stride[2] == pw", "y.stride[1] == ph * pw", "y.stride[0] == oc * ph * pw", "x.numel <= 2147483647", "y.numel <= 500000000", "y.numel >= 1", "k >= 1", "k <= 4096", "ocb <= 65535", "smem_bytes <= device.smem_per_block", "steps <= 2147483647"]
dims       = { n = "x.shape[0]", cin = "x.shape[1]", h = "x.shape[2]", w = "x.shape[3]", oc = "weight.shape[0]", kh = "weight.shape[2]", kw = "weight.shape[3]", ph = "y.shape[2]", pw = "y.shape[3]", oh = "(h + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1", k = "cin * kh * kw", ksteps = "ceil_div(k, 16)", ocb = "ceil_div(oc, 96)", rows = "2", prows = "(rows - 1) * stride[0] + (kh - 1) * dilation[0] + 1", pcols = "55 * stride[1] + (kw - 1) * dilation[1] + 1", pitch = "pcols + (kw + 3 * pcols) % 4", plane = "prows * pitch + (kh * kw + 3 * prows * pitch) % 4", pwords = "max(cin * plane, rows * 2688)", steps = "n * ceil_div(pw, 27) * (ph + 1)", blocks = "min(device.sms, ceil_div(steps, 2))", smem_bytes = "ksteps * 6208 + 256 + 2 * pwords * 4" }
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
kernel = "prepare"
grid   = ["ocb * 96"]
block  = ["128"]
args   = ["weight", "y", "wfrag", "wexp", "oc", "k", "ksteps", "ph", "pw", "steps", "2 * blocks"]
[[launch]]
kernel = "conv_relu_pool"
grid   = ["blocks", "ocb"]
block  = ["384"]
smem   = "smem_bytes"
args   = ["x", "weight", "bias", "y", "wfrag", "wexp", "cin", "h", "w", "oc", "kh", "kw", "oh", "ph", "pw", "k", "ksteps", "prows", "pcols", "pitch", "plane", "pwords", "steps", "x.stride[0]", "x.stride[1]", "x.stride[2]"]
---*/
// Implicit GEMM with split fp16: value = (hi + lo / 2048) * 2^scale for x (scale per pair of rows) and weight (per channel); hi*hi
// and lo*hi + hi*lo start from zero at every K step of 16 and are added to float registers. A group is 6 warps: 2 conv rows of 56 x
// 3 times 32 channels. The patch is split once, in place, into packed (hi, lo) words; offset(k) = k mod 4 makes the stride-4 gather
// conflict free. Fragment element i (0..3) of lane%4 = j stands for k = 16*step + 4*i + j, the same for A and B.
// Step = (image, column strip of 27 pooled columns, pair s): conv rows 2s, 2s+1; s = 0..ph.

#define ROWS 2
#define THREADS 384
#define GT 192
#define GW 6
#define RED (group * 16)
#define SYNC() group_sync(group)
__device__ __forceinline__ void group_sync(int group) { asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(GT) : "memory"); }

__device__ __forceinline__ int exponent_of(uint32_t magnitude) {   // floor(log2), finite; -150 for zero
    const int e = int(magnitude >> 23);
    return e ? e - 127 : -118 - __clz(int(magnitude));
}
__device__ __forceinline__ float pow2(int e) { return __int_as_float((e + 127) << 23); }   // -126 <= e <= 127
__device__ __forceinline__ float max_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
__device__ __forceinline__ void split(float v, __half& hi, __half& lo) {
    hi = __float2half_rn(v);
    lo = __float2half_rn((v - __half2float(hi)) * 2048.0f);
}
// d = a * b + c
__device__ __forceinline__ void mma16816(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
__device__ __forceinline__ void copy4(uint32_t smem, const float* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem), "l"(from), "r"(valid ? 4 : 0) : "memory");
}

// One channel's weights: largest exponent, then hi and lo*2^11 of the scaled values in mma fragment order.
__device__ __forceinline__ void split_channel(const float* weight, __half* wfrag, int* wexp, int oc, int k, int ksteps, int channel) {
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

// NaN or Inf in reach of the tile (or products near overflow): plain FMA, straight from global memory, into the row maxima
// hmax[ROWS][96][28] (three neighbouring conv columns each).
__device__ __noinline__ void slow_tile(const float* xn, const float* weight, const float* bias, float* hmax, int cin, int h, int w,
                                       int oc, int kh, int kw, int oh, int pw, int channel0, int oy0, int px0, int thread,
                                       long long sxc, long long sxh) {
    for (int i = thread; i < 96 * ROWS * 27; i += GT) {
        const int px = px0 + i % 27, row = i / 27 % ROWS, oy = oy0 + row, channel = channel0 + i / (27 * ROWS);
        if (px >= pw || oy >= oh || channel >= oc) continue;
        const float* wc = weight + (long long)channel * cin * kh * kw;
        float best = -INFINITY;
        for (int d = 0; d < 3; ++d) {
            const int ox = px * 2 + d;
            float sum = 0.0f;
            for (int c = 0; c < cin; ++c) {
                float part = 0.0f;
                for (int ky = 0; ky < kh; ++ky) {
                    const int iy = oy * P_STRIDE_0 - P_PADDING_0 + ky * P_DILATION_0;
                    for (int kx = 0; kx < kw; ++kx) {
                        const int ix = ox * P_STRIDE_1 - P_PADDING_1 + kx * P_DILATION_1;
                        const bool in = iy >= 0 && iy < h && ix >= 0 && ix < w;
                        part = fmaf(in ? xn[c * sxc + iy * sxh + ix] : 0.0f, wc[(c * kh + ky) * kw + kx], part);
                    }
                }
                sum += part;
            }
#if HAS_BIAS
            sum += bias[channel];
#endif
            best = max_nan(best, sum);
        }
        hmax[(row * 96 + channel - channel0) * 28 + i % 27] = best;
    }
}

extern "C" __global__ void __launch_bounds__(128)
prepare(const float* __restrict__ weight, int* __restrict__ y, __half* __restrict__ wfrag, int* __restrict__ wexp, int oc, int k,
        int ksteps, int ph, int pw, int steps, int groups) {
    const int channel = blockIdx.x;
    split_channel(weight, wfrag, wexp, oc, k, ksteps, channel);
    if (channel >= oc) return;
    const int strips = (pw + 26) / 27;
    for (int i = threadIdx.x; i < groups * 27; i += 128) {             // pooled rows that two ranges share start at zero
        const int start = int((long long)steps * (i / 27) / groups);
        const int s = start % (ph + 1), px = start / (ph + 1) % strips * 27 + i % 27, image = start / (ph + 1) / strips;
        if (start < steps && s > 0 && px < pw) y[(((long long)image * oc + channel) * ph + s - 1) * pw + px] = 0;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
conv_relu_pool(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, float* __restrict__ y,
               const uint4* __restrict__ wfrag, const int* __restrict__ wexp, int cin, int h, int w, int oc, int kh, int kw, int oh,
               int ph, int pw, int k, int ksteps, int prows, int pcols, int pitch, int plane, int pwords, int steps,
               long long sxn, long long sxc, long long sxh) {
    extern __shared__ uint4 shared[];
    uint4* a_smem = shared;                                            // ksteps * 384
    int4* offsets = reinterpret_cast<int4*>(shared + ksteps * 384);    // ksteps * 4: byte offsets of k = 16*step + {0,4,8,12} + j
    uint32_t* scratch = reinterpret_cast<uint32_t*>(offsets + ksteps * 4);   // 64 words
    const int group = threadIdx.x / GT, gt = threadIdx.x % GT, gw = gt / 32, lane = threadIdx.x % 32;
    uint32_t* patch = scratch + 64 + group * pwords;
    float* hmax = reinterpret_cast<float*>(patch);                     // [2][96][28], after the products
    const int row = gw / 3, mw = gw % 3, j = lane % 4, q = lane / 4;
    const int channel0 = blockIdx.y * 96;
    const int strips = (pw + 26) / 27, lines = cin * prows;
    const int groups = gridDim.x * 2, id = blockIdx.x * 2 + group;
    const int first = int((long long)steps * id / groups), last = int((long long)steps * (id + 1) / groups);

    auto load_patch = [&](int at) {
        const int s = at % (ph + 1), strip = at / (ph + 1);
        const float* xn = x + strip / strips * sxn;
        const int ix0 = strip % strips * 54 * P_STRIDE_1 - P_PADDING_1, iy0 = 2 * s * P_STRIDE_0 - P_PADDING_0;
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

    if (threadIdx.x == 0) scratch[40] = uint32_t(-1000);
    __syncthreads();
    // group 1 fetches the weights while group 0 fetches its first patch: the groups then run out of phase
    if (group == 1) {
        const uint4* from = wfrag + (long long)blockIdx.y * ksteps * 384;
        for (int i = gt; i < ksteps * 384; i += GT) cp_async16(a_smem + i, from + i);
        cp_async_commit();
    } else if (first < last) {
        load_patch(first);
    }
    if (threadIdx.x < 96) atomicMax(reinterpret_cast<int*>(scratch + 40), wexp[channel0 + threadIdx.x]);
    for (int i = threadIdx.x; i < ksteps * 16; i += THREADS) {
        int at = 0;                                                    // padded k: any finite value, its weight is zero
        if (i < k) {
            const int c = i / (kh * kw), ky = i / kw % kh, kx = i % kw;
            at = (c * plane + ky * P_DILATION_0 * pitch + kx * P_DILATION_1) * 4;
        }
        reinterpret_cast<int*>(offsets)[i / 16 * 16 + i % 4 * 4 + i % 16 / 4] = at;
    }
    cp_async_wait<0>();
    __syncthreads();
    const int guard = 127 - 3 - (32 - __clz(k)) - int(scratch[40]);    // xe below it: no product sum can reach 2^127

    float carry[14];
#pragma unroll
    for (int i = 0; i < 14; ++i) carry[i] = 0.0f;
#pragma unroll 1
    for (int at = first; at < last; ++at) {
        if (group == 1 || at > first) load_patch(at);
        cp_async_wait<0>();
        uint32_t most = 0;
        for (int line = gw; line < lines; line += GW) {
            const int c = line / prows;
            const uint32_t* from = patch + c * plane + (line - c * prows) * pitch;
#pragma unroll 4
            for (int col = lane; col < pcols; col += 32) most = max(most, from[col] & 0x7fffffffu);
        }
        most = __reduce_max_sync(0xffffffffu, most);
        if (lane == 0) scratch[RED + gw] = most;
        SYNC();
#pragma unroll
        for (int i = 0; i < GW; ++i) most = max(most, scratch[RED + i]);
        const int xe = exponent_of(most);

        const int s = at % (ph + 1), strip = at / (ph + 1), px0 = strip % strips * 27, image = strip / strips;
        if (most >= 0x7f800000u || xe >= guard) {
            slow_tile(x + image * sxn, weight, bias, hmax, cin, h, w, oc, kh, kw, oh, pw, channel0, 2 * s, px0, gt, sxc, sxh);
        } else {
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
            SYNC();

            float sum[2][7][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int t = 0; t < 7; ++t)
#pragma unroll
                    for (int i = 0; i < 4; ++i) sum[m][t][i] = 0.0f;
            const char* pixel = reinterpret_cast<const char*>(patch + row * P_STRIDE_0 * pitch + q * P_STRIDE_1);
            const uint4* a = a_smem + mw * 128 + lane;
            const int4* offset = offsets + j;
#pragma unroll 1
            for (int step = 0; step < ksteps; ++step, a += 384, offset += 4) {
                const int4 o = *offset;
                const uint4 ah[2] = {a[0], a[64]}, al[2] = {a[32], a[96]};
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
                    float major[2][4], minor[2][4];
#pragma unroll
                    for (int m = 0; m < 2; ++m) mma16816(minor[m], al[m], bh0, bh1, zero);
#pragma unroll
                    for (int m = 0; m < 2; ++m) mma16816(major[m], ah[m], bh0, bh1, zero);
#pragma unroll
                    for (int m = 0; m < 2; ++m) mma16816(minor[m], ah[m], bl0, bl1, minor[m]);
#pragma unroll
                    for (int m = 0; m < 2; ++m)
#pragma unroll
                        for (int i = 0; i < 4; ++i) sum[m][t][i] += fmaf(minor[m][i], 1.0f / 2048.0f, major[m][i]);
                }
            }
            SYNC();                                                    // the patch has been read: its memory takes the row maxima

#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int local = mw * 32 + m * 16 + half * 8 + q;
                    const int e = max(xe + wexp[channel0 + local] - 28, -252), e1 = e / 2;
                    const float f1 = pow2(e1), f2 = pow2(e - e1);
                    float b = 0.0f;
#if HAS_BIAS
                    if (channel0 + local < oc) b = bias[channel0 + local];
#endif
                    float v[8][2];
#pragma unroll
                    for (int t = 0; t < 7; ++t)
#pragma unroll
                        for (int i = 0; i < 2; ++i) v[t][i] = sum[m][t][half * 2 + i] * f1 * f2 + b;
                    v[7][0] = 0.0f;
#pragma unroll
                    for (int t = 0; t < 7; ++t) {                      // pooled column 4t+j: conv columns 8t+2j, +1 and the next lane's
                        const float next = __shfl_sync(0xffffffffu, j == 0 ? v[t + 1][0] : v[t][0], (lane & ~3) | ((j + 1) & 3));
                        hmax[(row * 96 + local) * 28 + 4 * t + j] = max_nan(max_nan(v[t][0], v[t][1]), next);
                    }
                }
        }
        SYNC();
        const bool cut_before = at == first, cut_after = at + 1 == last && s < ph;
        const long long out0 = ((long long)image * oc + channel0) * ph;
#pragma unroll
        for (int i = 0; i < 14; ++i) {                                 // 14 * 192 = 96 * 28
            const int at_pool = gt + i * GT, local = at_pool / 28, px = px0 + at_pool % 28;
            const float h0 = hmax[at_pool], h1 = hmax[at_pool + 96 * 28];
            const bool valid = at_pool % 28 < 27 && px < pw && channel0 + local < oc;
            float* out = y + (out0 + (long long)local * ph + s) * pw + px;   // pooled row s
            if (valid && s > 0) {                                      // conv row 2s completes pooled row s-1
                if (cut_before) atomicMax(reinterpret_cast<int*>(out - pw), __float_as_int(max_nan(h0, 0.0f)));
                else out[-pw] = max_nan(max_nan(carry[i], h0), 0.0f);
            }
            carry[i] = max_nan(h0, h1);
            if (valid && cut_after) atomicMax(reinterpret_cast<int*>(out), __float_as_int(max_nan(carry[i], 0.0f)));
        }
        SYNC();                                                        // the row maxima have been read
    }
}
