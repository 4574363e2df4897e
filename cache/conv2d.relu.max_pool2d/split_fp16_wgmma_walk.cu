/*---
implements = "conv2d.relu.max_pool2d"
target     = "cuda"
dtypes     = ["float32"]
optional   = ["bias"]
where      = ["x.ndim == 4", "groups == 1", "stride[0] == 4", "stride[1] == 4", "dilation[0] == 1", "dilation[1] == 1", "padding[1] % 2 == 0", "max_pool2d_kernel_size[0] == 3", "max_pool2d_kernel_size[1] == 3", "max_pool2d_stride[0] == 2", "max_pool2d_stride[1] == 2", "max_pool2d_padding[0] == 0", "max_pool2d_padding[1] == 0", "max_pool2d_dilation[0] == 1", "max_pool2d_dilation[1] == 1", "max_pool2d_ceil_mode == 0", "w % 2 == 0", "x.stride[0] % 2 == 0", "x.stride[1] % 2 == 0", "x.stride[2] % 2 == 0", "weight.shape[1] == cin", "cin >= 1", "kw <= 12", "kh >= 4", "x.stride[3] == 1", "x.stride[2] >= 0", "weight.stride[3] == 1", "weight.stride[2] == kw", "weight.stride[1] == kh * kw", "weight.stride[0] == k", "y.stride[3] == 1", "y.stride[2] == pw", "y.stride[1] == ph * pw", "y.stride[0] == oc * ph * pw", "x.numel <= 2147483647", "y.numel <= 500000000", "y.numel >= 1", "units <= 2147483647", "k <= 4096", "ocb <= 65535", "smem_bytes <= device.smem_per_block"]
dims       = { n = "x.shape[0]", cin = "x.shape[1]", h = "x.shape[2]", w = "x.shape[3]", oc = "weight.shape[0]", kh = "weight.shape[2]", kw = "weight.shape[3]", ph = "y.shape[2]", pw = "y.shape[3]", k = "cin * kh * kw", kg = "ceil_div(kw, 4)", ocb = "ceil_div(oc, 96)", tw = "min(2 * pw + 1, 57)", units = "n * (ph + 1) * ceil_div(pw, 28)", blocks = "min(device.sms, units)", wr = "kh + 4", ring = "kh + 12", nch = "tw + kg - 1", pitch = "nch + (kg + 8 - nch % 8) % 8", plane = "ring * pitch + (kh * kg + 7 * (ring * pitch)) % 8", ksteps = "ceil_div(ceil_div(cin * kh * kg, 4), CHAIN) * CHAIN", patch_bytes = "cin * plane * 16", smem_bytes = "ksteps * 6144 + patch_bytes + ksteps * 16 + 11728" }
tune       = { CHAIN = [5] }
align      = 16
[[workspace]]
name  = "wsplit"                     # split weights as they lie in shared memory: [ocb][step][k core 2][hi 12, lo 12][8 channels][8 halves]
dtype = "int32"
shape = ["ocb * ksteps * 1536"]
[[workspace]]
name  = "wexp"                       # per channel: exponent of the largest |weight|, 1000 where it is not finite
dtype = "int32"
shape = ["ocb * 96"]
[[launch]]
kernel = "prepare"
grid   = ["ocb * 96 + blocks"]
block  = ["512"]
args   = ["weight", "wsplit", "wexp", "y", "oc", "cin", "kh", "kw", "ksteps", "ph", "pw", "units", "blocks"]
[[launch]]
kernel = "conv_relu_pool"
grid   = ["blocks", "ocb"]
block  = ["384"]
smem   = "smem_bytes"
pdl    = true
args   = ["x", "weight", "bias", "y", "wsplit", "wexp", "cin", "h", "w", "oc", "kh", "kw", "ph", "pw", "k", "ksteps", "wr", "ring", "nch", "pitch", "plane", "patch_bytes", "units", "x.stride[0]", "x.stride[1]", "x.stride[2]"]
---*/
// Implicit GEMM by wgmma m64n96k16: M = pixels of one convolution row, N = 96 channels (weights by descriptor), K = groups (c, ky, 4 taps),
// 4 groups a step; fragments of the pixels from registers. The patch is a ring of input rows [c][row][chunk], a chunk of 16 bytes =
// {4 hi, 4 lo} of 4 columns = one pixel step, so that the fragments of a pixel are one 128-bit load. value = (hi + lo / 2048) * 2^scale.
// Unit = (image, strip of 28 pooled columns, pair s): convolution rows 2s (consumer warp group 0) and 2s + 1 (group 1), s = 0..ph. The
// producer warp group loads the 8 new input rows of a unit while the consumers work on the one before. A warp has the 16 pixels from 14 * warp:
// rows q, q + 8 of its tile are pixels 2p, 2p + 1 with p = q, bits 0 and 1 exchanged: a thread's maximum over three columns wants one
// shuffle, 7 pooled columns belong to a warp, and the 8 lanes of a phase of a 128-bit load, 4 groups (consecutive chunks mod 8, by the choice
// of the pitch) times pixels 4 apart, meet all banks once. The vertical maximum passes through shared memory in the thread's own place:
// group 0 puts row 2s there, group 1 takes the maximum with row 2s + 1, group 0 takes that with row 2s + 2 and stores. Pooled rows that two
// blocks share are zeroed first and taken by atomicMax (not negative; NaN is the largest). Sums go to float registers every CHAIN steps.
// wgmma reads its A registers asynchronously: three sets of them, so that none that may be in flight is written.

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
__device__ __forceinline__ float max_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
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

extern "C" __global__ void __launch_bounds__(512)
prepare(const float* __restrict__ weight, __half* __restrict__ wsplit, int* __restrict__ wexp, int* __restrict__ y, int oc, int cin, int kh,
        int kw, int ksteps, int ph, int pw, int units, int blocks) {
    pdl_launch_dependents();
    const int channels = gridDim.x - blocks;
    if (int(blockIdx.x) >= channels) {                                     // pooled rows that two blocks share start at zero
        const int strips = (pw + 27) / 28;
        const int start = int((long long)units * (int(blockIdx.x) - channels) / blocks);
        const int s = start % (ph + 1), px = start / (ph + 1) % strips * 28, image = start / (ph + 1) / strips;
        if (s == 0) return;
        int* to = y + ((long long)image * oc * ph + s - 1) * pw + px;
        for (int i = threadIdx.x; i < oc * 32; i += 512) {
            const int channel = i / 32, column = i % 32;
            if (column < 28 && px + column < pw) to[(long long)channel * ph * pw + column] = 0;
        }
        return;
    }
    const int channel = blockIdx.x, k = cin * kh * kw, kg = (kw + 3) / 4;
    const float* row = weight + (long long)channel * k;
    const bool real = channel < oc;
    int most = 0;
    for (int i = threadIdx.x; i < k; i += 512)
        if (real) most = max(most, __float_as_int(row[i]) & 0x7fffffff);
    most = block_max(most);
    const bool finite = most < 0x7f800000;
    const int e = exponent_of(uint32_t(finite ? most : 0));
    if (threadIdx.x == 0) wexp[channel] = finite ? e : 1000;
    const int s = 14 - e, s1 = s / 2;
    const float f1 = pow2(s1), f2 = pow2(s - s1);
    for (int i = threadIdx.x; i < ksteps * 16; i += 512) {
        const int step = i / 16, kk = i % 16;
        // k of a step: thread j of a quad holds 4 taps of group 4 * step + j: taps 0, 1 as k = 2j, 2j + 1, taps 2, 3 as k = 2j + 8, 2j + 9
        const int g = step * 4 + kk % 8 / 2, tap = kk / 8 * 2 + kk % 2;
        const int kx = g % kg * 4 + tap, ky = g / kg % kh, c = g / kg / kh;
        const bool in_w = real && finite && kx < kw && ky < kh && c < cin;
        const float v = in_w ? row[(c * kh + ky) * kw + kx] * f1 * f2 : 0.0f;
        __half hi, lo;
        split(v, hi, lo);
        const long long at = ((long long)(channel / 96) * ksteps + step) * 3072 + kk / 8 * 1536 + channel % 96 * 8 + kk % 8;
        wsplit[at] = hi;
        wsplit[at + 768] = lo;
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
conv_relu_pool(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, float* __restrict__ y,
               const uint4* __restrict__ wsplit, const int* __restrict__ wexp, int cin, int h, int w, int oc, int kh, int kw, int ph, int pw,
               int k, int ksteps, int wr, int ring, int nch, int pitch, int plane, int patch_bytes, int units,
               long long sxn, long long sxc, long long sxh) {
    extern __shared__ uint4 shared[];
    uint8_t* patch = reinterpret_cast<uint8_t*>(shared);
    uint8_t* weights = patch + patch_bytes;
    float* rows_max = reinterpret_cast<float*>(weights + ksteps * 6144);     // [24][4 warps * 28 lanes]
    uint64_t* full = reinterpret_cast<uint64_t*>(rows_max + 2688);           // [2]
    uint64_t* empty = full + 2;                                              // [2]
    uint64_t* even_done = full + 4;                                          // [4]: rows_max of a warp holds row 2s
    uint64_t* odd_done = full + 8;                                           // [4]: ... and row 2s + 1
    int* info = reinterpret_cast<int*>(full + 12);                           // [2]: exponent of the scale; 1000: plain FMA
    uint32_t* scratch = reinterpret_cast<uint32_t*>(info + 2);               // [4], and the largest wexp at 8
    uint32_t* offsets = reinterpret_cast<uint32_t*>(full + 24);              // of a group: ky << 20 | byte offset
    int2* channel_info = reinterpret_cast<int2*>(offsets + ksteps * 4 + 4);  // [96]: wexp, bias
    const int channel0 = blockIdx.y * 96;
    const int strips = (pw + 27) / 28, pairs = ph + 1;
    const int begin = int((long long)units * blockIdx.x / gridDim.x), end = int((long long)units * (blockIdx.x + 1) / gridDim.x);
    const int kg = (kw + 3) / 4;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            mbarrier_init(full + i, 128);
            mbarrier_init(empty + i, 256);
        }
        for (int i = 0; i < 8; ++i) mbarrier_init(even_done + i, 32);      // and odd_done
        mbarrier_init_fence();
        scratch[8] = uint32_t(-1000);
    }
    for (int i = threadIdx.x; i < ksteps * 4 + 4; i += 384) {
        const int g = i % kg, ky = i / kg % kh, c = i / kg / kh;
        offsets[i] = c < cin ? (uint32_t(ky) << 20) | uint32_t((c * plane + ky * pitch + g) * 16) : 0u;   // beyond K: weights are zero
    }
    if (begin < end) {                                                     // the first window is on its way to L2
        const int pieces = (w + 31) / 32, image = begin / pairs / strips, iy0 = begin % pairs * 8 - P_PADDING_0;
        const float* xn = x + image * sxn;
        for (int i = threadIdx.x; i < cin * wr * pieces; i += 384) {
            const int line = i / pieces, c = line / wr, iy = iy0 + line - c * wr;
            if (uint32_t(iy) < uint32_t(h))
                asm volatile("prefetch.global.L2 [%0];" ::"l"(xn + c * sxc + iy * sxh + (i - line * pieces) * 32));
        }
    }
    __syncthreads();
    pdl_wait();                                                            // the split weights are there
    if (threadIdx.x >= 128) {
        const uint4* from = wsplit + (long long)blockIdx.y * ksteps * 384;
        for (int i = threadIdx.x - 128; i < ksteps * 384; i += 256) cp_async16(weights + i * 16, from + i);
        cp_async_commit();
    } else if (threadIdx.x < 96) {
        const int channel = channel0 + threadIdx.x, e = wexp[channel];
        atomicMax(reinterpret_cast<int*>(scratch + 8), e);
        float b = 0.0f;
#if HAS_BIAS
        if (channel < oc) b = bias[channel];
#endif
        channel_info[threadIdx.x] = make_int2(e, __float_as_int(b));
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
            const int pair = unit % pairs, ox0 = unit / pairs % strips * 56, image = unit / pairs / strips;
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
        const int p = (q & 4) | ((q & 1) << 1) | ((q >> 1) & 1);           // tile row q: pixel 2p, row q + 8: 2p + 1
        const int p_next = min(p + 1, 7), next_lane = ((p_next & 4) | ((p_next & 1) << 1) | ((p_next >> 1) & 1)) * 4 + j;
        const uint64_t b_desc = uint64_t(smem_address(weights) >> 4) | (uint64_t(3072 >> 4) << 16) | (uint64_t(128 >> 4) << 32);
        const uint32_t zero = uint32_t(k) >> 20;                           // k <= 4096: zero, but not to the compiler
        const int last_pixel = nch - kg, px = (wt & 3) * 14 + p * 2;
        const int p0 = min(px, last_pixel), p1 = (min(px + 1, last_pixel) - p0) * 16;
        int base = 0, count = 0;
#pragma unroll 1
        for (int unit = begin; unit < end; ++unit, ++count) {
            // group 1 starts an image (and the block) half a unit behind the other, so that epilogues do not coincide
            const bool apart = unit % pairs < ph && (count == 0 || unit % pairs == 0);
            if (wg == 1 && apart) barrier_sync(3, 256);
            mbarrier_wait(full + (count & 1), (count >> 1) & 1);
            const int scale = info[count & 1];
            const int s = unit % pairs, strip = unit / pairs % strips, image = unit / pairs / strips;
            const bool working = wg == 0 || s < ph, cut = unit + 1 == end;
            int row0 = base + wg * 4;
            if (row0 >= ring) row0 -= ring;
            base += 8;
            if (base >= ring) base -= ring;
            const int column = strip * 28 + (wt & 3) * 7 + p;              // pooled column
            const bool valid = p < 7 && column < pw;
            const int first_channel = channel0 + j * 2, area = ph * pw;
            // pooled row s - 1 (group 0), s (group 1) of channel first_channel
            float* out = y + (((long long)image * oc + first_channel) * ph + s - (wg == 0 ? 1 : 0)) * pw + column;
            auto wait_turn = [&]() {                                       // the warp of the other group that has the same pixels has been here
                if (wg == 1) mbarrier_wait(even_done + (wt & 3), count & 1);
                else if (count > 0) mbarrier_wait(odd_done + (wt & 3), (count - 1) & 1);
            };
            auto combine = [&](int t, int i, float v) {                    // channel first_channel + t * 8 + i, maximum over three columns
                float* place = rows_max + (t * 2 + i) * 112 + (wt & 3) * 28 + lane;
                float* to = out + (long long)(t * 8 + i) * area;
                const bool real = first_channel + t * 8 + i < oc;
                if (wg == 0) {
                    if (s > 0) {                                           // row 2s completes pooled row s - 1
                        if (count > 0) {
                            const float m = max_nan(max_nan(*place, v), 0.0f);
                            if (real) *to = m;
                        } else if (real) {
                            atomicMax(reinterpret_cast<int*>(to), __float_as_int(max_nan(v, 0.0f)));
                        }
                    }
                    *place = v;
                } else {
                    const float m = max_nan(*place, v);
                    if (!cut) *place = m;
                    else if (real) atomicMax(reinterpret_cast<int*>(to), __float_as_int(max_nan(m, 0.0f)));
                }
            };
            auto end_turn = [&]() {
                __syncwarp();
                mbarrier_arrive((wg == 0 ? even_done : odd_done) + (wt & 3));
            };
            if (scale == 1000 || !working) {
                __syncwarp();
                mbarrier_arrive(empty + (count & 1));
                if (wg == 0 && apart) barrier_arrive(3, 256);
                wait_turn();
                if (working && valid) {                                    // NaN or Inf in reach: plain FMA, straight from global memory
                    const float* xn = x + image * sxn;
                    const int iy0 = (s * 2 + wg) * 4 - P_PADDING_0;
#pragma unroll 1
                    for (int idx = 0; idx < 24; ++idx) {
                        const int channel = first_channel + idx / 2 * 8 + idx % 2;
                        float best = -INFINITY;
                        if (channel < oc) {
                            const float* wc = weight + (long long)channel * k;
#pragma unroll 1
                            for (int d = 0; d < 3; ++d) {
                                const int ix0 = (column * 2 + d) * 4 - P_PADDING_1;
                                float total = 0.0f;
#pragma unroll 1
                                for (int c = 0; c < cin; ++c) {
                                    float one = 0.0f;
#pragma unroll 1
                                    for (int ky = 0; ky < kh; ++ky) {
                                        const int iy = iy0 + ky;
#pragma unroll 1
                                        for (int kx = 0; kx < kw; ++kx) {
                                            const int ix = ix0 + kx;
                                            const bool in = iy >= 0 && iy < h && ix >= 0 && ix < w;
                                            one = fmaf(in ? xn[c * sxc + iy * sxh + ix] : 0.0f, wc[(c * kh + ky) * kw + kx], one);
                                        }
                                    }
                                    total += one;
                                }
#if HAS_BIAS
                                total += bias[channel];
#endif
                                best = max_nan(best, total);
                            }
                        }
                        combine(idx / 2, idx % 2, best);
                    }
                }
                end_turn();
                continue;
            }
            float sum[48], cross[48], part[48];
#pragma unroll
            for (int i = 0; i < 48; ++i) sum[i] = cross[i] = part[i] = 0.0f;
            const uint8_t* pixel = patch + (row0 * pitch + p0) * 16;
            const uint32_t limit = uint32_t(ring - row0) << 20;
            const uint32_t* offset = offsets + j;
            const int wrap = ring * pitch * 16;
            uint32_t a[3][8];                                              // hi: 0-3, lo: 4-7
#pragma unroll
            for (int i = 0; i < 8; ++i) a[0][i] = a[1][i] = a[2][i] = zero;
            uint4 u, v;                                                    // what comes next
            auto fetch = [&]() {
                const uint32_t o = *offset;
                offset += 4;
                const uint8_t* at = pixel + int(o & 0xfffffu) - (o >= limit ? wrap : 0);
                u = *reinterpret_cast<const uint4*>(at);
                v = *reinterpret_cast<const uint4*>(at + p1);
            };
            uint64_t b = b_desc;
            const int half = wg == 0 && apart ? ksteps / (2 * CHAIN) * CHAIN : -1;
            fetch();
#pragma unroll 1
            for (int step = 0; step < ksteps; step += CHAIN) {
                if (step == half) barrier_arrive(3, 256);
#pragma unroll
                for (int i = 0; i < CHAIN; ++i, b += 384) {
                    // the fragments of step i - 3, done since the wait before step i - 1, stay alive until here: those of i - 1 and i - 2,
                    // which may still be read, cannot be overwritten, even if the compiler moves this up over the wait
                    uint32_t (&f)[8] = a[i % 3];
                    f[0] = (f[0] & zero) | u.x, f[1] = (f[1] & zero) | v.x, f[2] = (f[2] & zero) | u.y, f[3] = (f[3] & zero) | v.y;
                    f[4] = (f[4] & zero) | u.z, f[5] = (f[5] & zero) | v.z, f[6] = (f[6] & zero) | u.w, f[7] = (f[7] & zero) | v.w;
                    wgmma_fence();
                    mma96(part, f[0], f[1], f[2], f[3], b, i > 0);
                    mma96(cross, f[0], f[1], f[2], f[3], b + 96, 1);
                    mma96(cross, f[4], f[5], f[6], f[7], b, 1);
                    wgmma_commit();
                    fetch();                                               // one step too many at the end: offset 0
                    if (i < CHAIN - 1) wgmma_wait<1>();                    // the step before has read its fragments
                }
                wgmma_wait<0>();
#pragma unroll
                for (int i = 0; i < 48; ++i) sum[i] += part[i];
            }
            __syncwarp();
            mbarrier_arrive(empty + (count & 1));           // the ring has been read

            float best[24];                                                // maxima over three columns
#pragma unroll
            for (int t = 0; t < 12; ++t) {
                const int4 both = *reinterpret_cast<const int4*>(channel_info + j * 2 + t * 8);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int e = max(scale + (i ? both.z : both.x) - 28, -252), e1 = e / 2;
                    const float f1 = pow2(e1), f2 = pow2(e - e1);
                    float v0 = fmaf(cross[t * 4 + i], 1.0f / 2048.0f, sum[t * 4 + i]) * f1 * f2;
                    float v1 = fmaf(cross[t * 4 + 2 + i], 1.0f / 2048.0f, sum[t * 4 + 2 + i]) * f1 * f2;
                    if (HAS_BIAS) v0 += __int_as_float(i ? both.w : both.y), v1 += __int_as_float(i ? both.w : both.y);
                    const float v2 = __shfl_sync(0xffffffffu, v0, next_lane);
                    best[t * 2 + i] = max_nan(max_nan(v0, v1), v2);
                }
            }
            wait_turn();
            if (valid) {                                                   // `combine` for all 24 channels
                float* place = rows_max + (wt & 3) * 28 + lane;
                const int left = oc - first_channel;                       // channel t * 8 + i is real where it is less
                if (wg == 0) {
                    if (s > 0 && count > 0) {
                        float m[24];
#pragma unroll
                        for (int i = 0; i < 24; ++i) m[i] = place[i * 112];
#pragma unroll
                        for (int i = 0; i < 24; ++i) place[i * 112] = best[i];
                        float* to = out;
#pragma unroll
                        for (int i = 0; i < 24; i += 2, to += 8 * (long long)area) {
                            if (i * 4 < left) to[0] = max_nan(max_nan(m[i], best[i]), 0.0f);
                            if (i * 4 + 1 < left) to[area] = max_nan(max_nan(m[i + 1], best[i + 1]), 0.0f);
                        }
                    } else {
#pragma unroll
                        for (int i = 0; i < 24; ++i) place[i * 112] = best[i];
                        if (s > 0) {
#pragma unroll
                            for (int i = 0; i < 24; ++i)
                                if (i / 2 * 8 + i % 2 < left)
                                    atomicMax(reinterpret_cast<int*>(out + (long long)(i / 2 * 8 + i % 2) * area), __float_as_int(max_nan(best[i], 0.0f)));
                        }
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < 24; ++i) best[i] = max_nan(best[i], place[i * 112]);
                    if (!cut) {
#pragma unroll
                        for (int i = 0; i < 24; ++i) place[i * 112] = best[i];
                    } else {
#pragma unroll
                        for (int i = 0; i < 24; ++i)
                            if (i / 2 * 8 + i % 2 < left)
                                atomicMax(reinterpret_cast<int*>(out + (long long)(i / 2 * 8 + i % 2) * area), __float_as_int(max_nan(best[i], 0.0f)));
                    }
                }
            }
            end_turn();
        }
    }
}
