/*---
implements = "conv2d"
target     = "cuda"
dtypes     = ["float32"]
optional   = ["bias"]
where      = ["x.ndim == 4", "groups == 1", "stride[0] == 4", "stride[1] == 4", "dilation[0] == 1", "dilation[1] == 1", "padding[1] % 2 == 0", "w % 2 == 0", "x.stride[0] % 2 == 0", "x.stride[1] % 2 == 0", "x.stride[2] % 2 == 0", "weight.shape[1] == cin", "cin >= 1", "kw <= 12", "kh >= 4", "x.stride[3] == 1", "x.stride[2] >= 0", "weight.stride[3] == 1", "weight.stride[2] == kw", "weight.stride[1] == kh * kw", "weight.stride[0] == k", "y.stride[3] == 1", "y.stride[2] == ow", "y.stride[1] == oh * ow", "y.stride[0] == oc * oh * ow", "x.numel <= 2147483647", "y.numel <= 2147483647", "y.numel >= 1", "k <= 4096", "ocb <= 65535", "smem_bytes <= device.smem_per_block"]
dims       = { n = "x.shape[0]", cin = "x.shape[1]", h = "x.shape[2]", w = "x.shape[3]", oc = "weight.shape[0]", kh = "weight.shape[2]", kw = "weight.shape[3]", oh = "y.shape[2]", ow = "y.shape[3]", k = "cin * kh * kw", kg = "ceil_div(kw, 4)", ocb = "ceil_div(oc, 96)", tw = "min(ow, 64)", units = "n * ceil_div(oh, 2) * ceil_div(ow, 64)", wr = "kh + 4", ring = "kh + 12", nch = "tw + kg - 1", pitch = "nch + (12 - nch % 8) % 8", plane = "ring * pitch", ksteps = "ceil_div(ceil_div(cin * kh * kg, 4), CHAIN) * CHAIN", patch_bytes = "cin * plane * 16", smem_bytes = "ksteps * 6144 + patch_bytes + ksteps * 16 + 912" }
tune       = { CHAIN = [1, 5] }
align      = 16
[[workspace]]
name  = "wsplit"                     # split weights as they lie in shared memory: [ocb][step][hi, lo][k core 2][12][8 channels][8 halves]
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
args   = ["weight", "wsplit", "wexp", "oc", "cin", "kh", "kw", "ksteps"]
[[launch]]
kernel = "conv_wgmma"
grid   = ["min(device.sms, units)", "ocb"]
block  = ["384"]
smem   = "smem_bytes"
pdl    = true
args   = ["x", "weight", "bias", "y", "wsplit", "wexp", "cin", "h", "w", "oc", "kh", "kw", "oh", "ow", "k", "ksteps", "wr", "ring", "nch", "pitch", "plane", "patch_bytes", "units", "x.stride[0]", "x.stride[1]", "x.stride[2]"]
---*/
// Implicit GEMM by wgmma m64n96k16: M = pixels of one output row (a consumer warp group each; fragments from registers), N = 96 channels
// (weights by descriptor), K = groups (c, ky, 4 taps), 4 groups a step. The patch is a ring of input rows [c][row][chunk], a chunk of 16
// bytes = {4 hi, 4 lo} of 4 columns = one pixel step, so that the fragments of a pixel are one 128-bit load. value = (hi + lo / 2048) * 2^scale.
// A block walks down its run of units (2 output rows each); the producer warp group loads only the 8 new input rows of a unit while the
// consumers work on the one before. hi*hi is added to float registers every CHAIN steps; hi*lo + lo*hi chain in a second accumulator.
// wgmma reads its A registers asynchronously: they may only be written after the wait, so loads go to other registers in the meantime.

__device__ __forceinline__ void mma96(float (&d)[48], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, int keep) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %53, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
        "{%48, %49, %50, %51}, %52, p, 1, 1, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(keep));
}
__device__ __forceinline__ int exponent_of(uint32_t magnitude) {   // floor(log2), finite; -150 for zero
    const int e = int(magnitude >> 23);
    return e ? e - 127 : -118 - __clz(int(magnitude));
}
__device__ __forceinline__ float pow2(int e) { return __int_as_float((e + 127) << 23); }   // -126 <= e <= 127
__device__ __forceinline__ void split(float v, __half& hi, __half& lo) {
    hi = __float2half_rn(v);
    lo = __float2half_rn((v - __half2float(hi)) * 2048.0f);
}
__device__ __forceinline__ uint32_t as_bits(__half2 v) { return *reinterpret_cast<uint32_t*>(&v); }
// hi and lo * 2048 of two values
__device__ __forceinline__ void split2(float a, float b, uint32_t& hi, uint32_t& lo) {
    const __half2 both = __floats2half2_rn(a, b);
    const float2 back = __half22float2(both);
    hi = as_bits(both);
    lo = as_bits(__floats2half2_rn((a - back.x) * 2048.0f, (b - back.y) * 2048.0f));
}

extern "C" __global__ void __launch_bounds__(128)
split_weights(const float* __restrict__ weight, __half* __restrict__ wsplit, int* __restrict__ wexp, int oc, int cin, int kh, int kw,
              int ksteps) {
    pdl_launch_dependents();
    const int channel = blockIdx.x, k = cin * kh * kw, kg = (kw + 3) / 4;
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
    for (int i = threadIdx.x; i < ksteps * 16; i += 128) {
        const int step = i / 16, kk = i % 16;
        // k of a step: thread j of a quad holds 4 taps of group 4 * step + j: taps 0, 1 as k = 2j, 2j + 1, taps 2, 3 as k = 2j + 8, 2j + 9
        const int g = step * 4 + kk % 8 / 2, tap = kk / 8 * 2 + kk % 2;
        const int kx = g % kg * 4 + tap, ky = g / kg % kh, c = g / kg / kh;
        const bool in_w = real && finite && kx < kw && ky < kh && c < cin;
        const float v = in_w ? row[(c * kh + ky) * kw + kx] * f1 * f2 : 0.0f;
        __half hi, lo;
        split(v, hi, lo);
        const long long at = ((long long)(channel / 96) * ksteps + step) * 3072 + kk / 8 * 768 + channel % 96 * 8 + kk % 8;
        wsplit[at] = hi;
        wsplit[at + 1536] = lo;
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
conv_wgmma(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, float* __restrict__ y,
           const uint4* __restrict__ wsplit, const int* __restrict__ wexp, int cin, int h, int w, int oc, int kh, int kw, int oh, int ow,
           int k, int ksteps, int wr, int ring, int nch, int pitch, int plane, int patch_bytes, int units,
           long long sxn, long long sxc, long long sxh) {
    extern __shared__ uint4 shared[];
    uint8_t* patch = reinterpret_cast<uint8_t*>(shared);
    uint8_t* weights = patch + patch_bytes;
    uint64_t* full = reinterpret_cast<uint64_t*>(weights + ksteps * 6144);   // [2]
    uint64_t* empty = full + 2;                                              // [2]
    int* info = reinterpret_cast<int*>(full + 4);                            // [2]: exponent of the scale; 1000: plain FMA
    uint32_t* scratch = reinterpret_cast<uint32_t*>(info + 2);               // [2][4], then the largest wexp
    const int channel0 = blockIdx.y * 96;
    const int xtiles = (ow + 63) / 64, ypairs = (oh + 1) / 2;
    const int begin = int((long long)units * blockIdx.x / gridDim.x), end = int((long long)units * (blockIdx.x + 1) / gridDim.x);

    const int kg = (kw + 3) / 4;
    uint32_t* offsets = reinterpret_cast<uint32_t*>(shared) + (patch_bytes + ksteps * 6144 + 128) / 4;   // of a group: ky << 20 | byte offset
    int2* channels = reinterpret_cast<int2*>(offsets + ksteps * 4 + 4);                                  // [96]: exponent, bias
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            mbarrier_init(full + i, 128);
            mbarrier_init(empty + i, 8);
        }
        mbarrier_init_fence();
        scratch[8] = uint32_t(-1000);
    }
    for (int i = threadIdx.x; i < ksteps * 4 + 4; i += 384) {
        const int g = i % kg, ky = i / kg % kh, c = i / kg / kh;
        offsets[i] = c < cin ? (uint32_t(ky) << 20) | uint32_t((c * plane + ky * pitch + g) * 16) : 0u;   // beyond K: weights are zero
    }
    __syncthreads();
    pdl_wait();                                                            // the split weights are there
    if (threadIdx.x >= 128) {
        const uint4* from = wsplit + (long long)blockIdx.y * ksteps * 384;
        for (int i = threadIdx.x - 128; i < ksteps * 384; i += 256) cp_async16(weights + i * 16, from + i);
        cp_async_commit();
    } else if (threadIdx.x < 96) {
        const int exponent = wexp[channel0 + threadIdx.x];
        float b = 0.0f;
#if HAS_BIAS
        if (channel0 + threadIdx.x < oc) b = bias[channel0 + threadIdx.x];
#endif
        channels[threadIdx.x] = make_int2(exponent, __float_as_int(b));
        atomicMax(reinterpret_cast<int*>(scratch + 8), exponent);
    }
    __syncthreads();

    const int lane = threadIdx.x % 32;
    if (threadIdx.x < 128) {                                               // producers
        setmaxnreg_dec<88>();
        const int warp = threadIdx.x / 32;
        const int wmax = int(scratch[8]);
        const int guard = 127 - 3 - (32 - __clz(k)) - wmax;               // exponents below it: no sum of products can reach 2^127
        const uint32_t by_nch = 0xffffffffu / uint32_t(nch) + 1;          // i / nch = i * by_nch >> 32
        uint32_t before = 0;                                              // largest magnitude among the rows brought by the unit before
        int scale = 0, base = 0, count = 0;
        bool stale = true;                                                // the ring holds nothing of use
#pragma unroll 1
        for (int unit = begin; unit < end; ++unit, ++count) {
            const int pair = unit % ypairs, ox0 = unit / ypairs % xtiles * 64, image = unit / ypairs / xtiles;
            const float* xn = x + image * sxn;
            const int iy0 = pair * 8 - P_PADDING_0, ix0 = ox0 * 4 - P_PADDING_1;
            // rows [first, first + rows) of the window: the largest magnitude; written to the ring with the scale, if asked
            auto sweep = [&](int first, int rows, bool write) {
                const int s = 14 - scale, s1 = s / 2;
                const float f1 = pow2(s1), f2 = pow2(s - s1);
                const int chunks = rows * cin * nch;
                const uint32_t by_rows = 0xffffffffu / uint32_t(rows) + 1;
                uint32_t most = 0;
#pragma unroll 1
                for (int i0 = threadIdx.x; i0 < chunks; i0 += 128 * 6) {
                    float2 u[6], v[6];
                    int to[6];
#pragma unroll
                    for (int b = 0; b < 6; ++b) {
                        const uint32_t i = i0 + b * 128;
                        const int line = nch > 1 ? int(__umulhi(i, by_nch)) : int(i), ch = int(i) - line * nch;
                        const int c = rows > 1 ? int(__umulhi(uint32_t(line), by_rows)) : line;
                        const int r = first + line - c * rows, iy = iy0 + r, ix = ix0 + ch * 4;
                        int slot = base + r;
                        if (slot >= ring) slot -= ring;
                        to[b] = int(i) < chunks ? (c * plane + slot * pitch + ch) * 16 : -1;
                        const bool in_y = int(i) < chunks && uint32_t(iy) < uint32_t(h);
                        const float* from = xn + c * sxc + iy * sxh + ix;
                        u[b] = v[b] = make_float2(0.0f, 0.0f);
                        if (in_y && uint32_t(ix) < uint32_t(w)) u[b] = *reinterpret_cast<const float2*>(from);
                        if (in_y && uint32_t(ix + 2) < uint32_t(w)) v[b] = *reinterpret_cast<const float2*>(from + 2);
                    }
#pragma unroll
                    for (int b = 0; b < 6; ++b) {
                        most = max(most, max(max(__float_as_uint(u[b].x) & 0x7fffffffu, __float_as_uint(u[b].y) & 0x7fffffffu),
                                             max(__float_as_uint(v[b].x) & 0x7fffffffu, __float_as_uint(v[b].y) & 0x7fffffffu)));
                        if (write && to[b] >= 0) {
                            uint4 out;
                            split2(u[b].x * f1 * f2, u[b].y * f1 * f2, out.x, out.z);
                            split2(v[b].x * f1 * f2, v[b].y * f1 * f2, out.y, out.w);
                            *reinterpret_cast<uint4*>(patch + to[b]) = out;
                        }
                    }
                }
                return most;
            };
            auto reduce = [&](uint32_t most) {
                most = __reduce_max_sync(0xffffffffu, most);
                barrier_sync(1, 128);                                     // the scratch has been read
                if (lane == 0) scratch[warp] = most;
                barrier_sync(1, 128);
                return max(max(scratch[0], scratch[1]), max(scratch[2], scratch[3]));
            };
            bool fresh = stale || pair == 0, slow = false;
            if (count >= 2) mbarrier_wait(empty + (count & 1), ((count - 2) >> 1) & 1);   // the slots of the 8 new rows are free
            if (!fresh) {                                                 // optimistic: the scale will do
                const uint32_t most = reduce(sweep(wr - 8, 8, true)), window = max(most, before);
                const int e = exponent_of(window);
                slow = window >= 0x7f800000u || e >= guard;
                fresh = !slow && (e > scale || e < scale - 6);
                before = most;
            }
            if (fresh) {
                const uint32_t most = reduce(sweep(0, wr, false));
                const int e = exponent_of(most);
                slow = most >= 0x7f800000u || e >= guard;
                before = most;
                if (!slow) {
                    scale = e + 1;
                    sweep(wr - 8, 8, true);
                    if (count >= 1) mbarrier_wait(empty + ((count - 1) & 1), ((count - 1) >> 1) & 1);
                    if (wr > 8) sweep(0, wr - 8, true);
                }
            }
            stale = slow;
            if (threadIdx.x == 0) info[count & 1] = slow ? 1000 : scale;
            mbarrier_arrive(full + (count & 1));
            base += 8;
            if (base >= ring) base -= ring;
        }
    } else {                                                               // consumers
        setmaxnreg_inc<208>();
        cp_async_wait<0>();
        fence_async_shared();
        barrier_sync(2, 256);                                              // the weights are there
        const int ct = threadIdx.x - 128, wg = ct / 128, wt = ct / 32, j = lane % 4, q = lane / 4;
        const uint64_t b_desc = uint64_t(smem_address(weights) >> 4) | (uint64_t(1536 >> 4) << 16) | (uint64_t(128 >> 4) << 32);
        const uint32_t zero = uint32_t(k) >> 20;                           // k <= 4096: zero, but not to the compiler
        const int last_pixel = nch - kg, px = (wt & 3) * 16 + q;
        const int p0 = min(px, last_pixel), p1 = (min(px + 8, last_pixel) - p0) * 16;
        int base = 0, count = 0;
        if (wg == 1 && begin < end) barrier_sync(3, 256);                  // half a unit behind the other: epilogues do not coincide
#pragma unroll 1
        for (int unit = begin; unit < end; ++unit, ++count) {
            mbarrier_wait(full + (count & 1), (count >> 1) & 1);
            const int scale = info[count & 1];
            const int pair = unit % ypairs, ox0 = unit / ypairs % xtiles * 64, image = unit / ypairs / xtiles;
            if (scale == 1000) {                                           // NaN or Inf in reach: plain FMA, straight from global memory
                __syncwarp();
                if (lane == 0) mbarrier_arrive(empty + (count & 1));
                if (wg == 0 && count == 0) barrier_arrive(3, 256);
                const float* xn = x + image * sxn;
#pragma unroll 1
                for (int i = ct; i < 96 * 128; i += 256) {
                    const int ox = ox0 + i % 64, oy = pair * 2 + i / 64 % 2, channel = channel0 + i / 128;
                    if (ox >= ow || oy >= oh || channel >= oc) continue;
                    const float* wc = weight + (long long)channel * k;
                    float total = 0.0f;
#pragma unroll 1
                    for (int c = 0; c < cin; ++c) {
                        float one = 0.0f;
#pragma unroll 1
                        for (int ky = 0; ky < kh; ++ky) {
                            const int iy = oy * 4 - P_PADDING_0 + ky;
#pragma unroll 1
                            for (int kx = 0; kx < kw; ++kx) {
                                const int ix = ox * 4 - P_PADDING_1 + kx;
                                const bool in = iy >= 0 && iy < h && ix >= 0 && ix < w;
                                one = fmaf(in ? xn[c * sxc + iy * sxh + ix] : 0.0f, wc[(c * kh + ky) * kw + kx], one);
                            }
                        }
                        total += one;
                    }
#if HAS_BIAS
                    total += bias[channel];
#endif
                    y[(((long long)image * oc + channel) * oh + oy) * ow + ox] = total;
                }
                base += 8;
                if (base >= ring) base -= ring;
                continue;
            }
            float sum[48], cross[48], part[48];
#pragma unroll
            for (int i = 0; i < 48; ++i) sum[i] = cross[i] = part[i] = 0.0f;
            int row0 = base + wg * 4;
            if (row0 >= ring) row0 -= ring;
            const uint8_t* pixel = patch + (row0 * pitch + p0) * 16;
            const uint32_t limit = uint32_t(ring - row0) << 20;
            const uint32_t* offset = offsets + j;
            const int wrap = ring * pitch * 16;
            uint32_t a[8] = {0, 0, 0, 0, 0, 0, 0, 0};                      // hi: 0-3, lo: 4-7
            uint4 u, v;                                                    // what comes next
            auto fetch = [&]() {
                const uint32_t o = *offset;
                offset += 4;
                const uint8_t* at = pixel + int(o & 0xfffffu) - (o >= limit ? wrap : 0);
                u = *reinterpret_cast<const uint4*>(at);
                v = *reinterpret_cast<const uint4*>(at + p1);
            };
            uint64_t b = b_desc;
            const int half = wg == 0 && count == 0 ? ksteps / (2 * CHAIN) * CHAIN : -1;
            fetch();
#pragma unroll 1
            for (int step = 0; step < ksteps; step += CHAIN) {
                if (step == half) barrier_arrive(3, 256);
#pragma unroll
                for (int s = 0; s < CHAIN; ++s, b += 384) {
                    // the old fragments stay alive until here, after the wait: the loads into u and v cannot take their registers
                    a[0] = (a[0] & zero) | u.x, a[1] = (a[1] & zero) | v.x, a[2] = (a[2] & zero) | u.y, a[3] = (a[3] & zero) | v.y;
                    a[4] = (a[4] & zero) | u.z, a[5] = (a[5] & zero) | v.z, a[6] = (a[6] & zero) | u.w, a[7] = (a[7] & zero) | v.w;
                    wgmma_fence();
                    mma96(part, a[0], a[1], a[2], a[3], b, s > 0);
                    wgmma_commit();
                    mma96(cross, a[0], a[1], a[2], a[3], b + 192, 1);
                    mma96(cross, a[4], a[5], a[6], a[7], b, 1);
                    wgmma_commit();
                    fetch();                                               // one step too many at the end: offset 0
                    if (s == CHAIN - 1) {                                  // while the corrections are under way
                        wgmma_wait<1>();
#pragma unroll
                        for (int i = 0; i < 48; ++i) sum[i] += part[i];
                    }
                    wgmma_wait<0>();
                }
            }
            __syncwarp();
            if (lane == 0) mbarrier_arrive(empty + (count & 1));           // the ring has been read
            base += 8;
            if (base >= ring) base -= ring;

            const int oy = pair * 2 + wg, ox = ox0 + px, area = oh * ow;
            if (oy < oh) {
                float* out = y + (((long long)image * oc + channel0 + j * 2) * oh + oy) * ow + ox;
                const bool in0 = ox < ow, in1 = ox + 8 < ow;
#pragma unroll
                for (int t = 0; t < 12; ++t)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int local = t * 8 + j * 2 + i;
                        const int2 channel = channels[local];
                        const int e = max(scale + channel.x - 28, -252), e1 = e / 2;
                        const float f1 = pow2(e1), f2 = pow2(e - e1), b = __int_as_float(channel.y);
                        const float v0 = fmaf(cross[t * 4 + i], 1.0f / 2048.0f, sum[t * 4 + i]) * f1 * f2;
                        const float v1 = fmaf(cross[t * 4 + 2 + i], 1.0f / 2048.0f, sum[t * 4 + 2 + i]) * f1 * f2;
                        float* to = out + (long long)(t * 8 + i) * area;
                        const bool real = channel0 + local < oc;
                        if (real && in0) to[0] = HAS_BIAS ? v0 + b : v0;
                        if (real && in1) to[8] = HAS_BIAS ? v1 + b : v1;
                    }
            }
        }
    }
}
