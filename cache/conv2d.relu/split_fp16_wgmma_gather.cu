/*---
implements = ["conv2d.relu", "conv2d", "conv2d.batch_norm", "conv2d.batch_norm.relu", "conv2d.add.relu", "conv2d.batch_norm.add.relu",
              "conv2d.silu", "conv2d.hardswish", "conv2d.batch_norm.hardswish", "conv2d.batch_norm.silu"]
target     = "cuda"
dtypes     = ["float32"]
optional   = ["bias", "bn_weight", "bn_bias", "bn_mean", "bn_var", "residual"]
where      = ["device.arch == 90", "bias.contiguous * bn_weight.contiguous * bn_bias.contiguous * bn_mean.contiguous * bn_var.contiguous * residual.contiguous == 1",
              "x.ndim == 4", "weight.ndim == 4", "groups == 1", "y.contiguous == 1", "x.shape[1] == weight.shape[1]", "y.numel >= 1", "c >= 1",
              "total <= 2000000000", "c * kh * kw <= 1000000000", "oc <= 1000000",
              "FLAT == (ceil_div(c, 64) * 192 > c * 4)",
              "(OCT == 64) * (oc % 128 >= 1) * (oc % 128 <= 64) + (OCT == 128) * (oc > 64) >= 1",
              "FLAT * max(x.stride[1], x.stride[2] * dilation[0] * kh, x.stride[3] * dilation[1] * kw) <= 500000000", "SPLIT <= kb", "(SPLIT == 1) + (tiles * SPLIT <= 4 * device.sms) >= 1"]
dims       = { c = "x.shape[1]", oc = "y.shape[1]", kh = "weight.shape[2]", kw = "weight.shape[3]", area = "y.shape[2] * y.shape[3]", total = "y.shape[0] * area", kb = "FLAT * ceil_div(c * kh * kw, 64) + (1 - FLAT) * kh * kw * ceil_div(c, 64)", oct = "ceil_div(oc, OCT)", tiles = "oct * ceil_div(total, 16384 // OCT)" }
static     = ["kh", "kw"]
tune       = { OCT = [128, 64], SPLIT = [1, 2, 4], FLAT = [0, 1] }
align      = 16
[[workspace]]
name = "w_packed"
dtype = "float16"
shape = ["oct * kb * OCT * 128 + 64"]
[[workspace]]
name = "w_inverse"
dtype = "float32"
shape = ["oct * kb * OCT + 32"]
[[prepare]]
kernel = "pack_weight"
grid = ["kb", "oct * OCT // 16"]
block = ["128"]
args = ["weight", "w_packed", "w_inverse", "oc", "c", "kb", "weight.stride[0]", "weight.stride[1]", "weight.stride[2]", "weight.stride[3]"]
[[launch]]
kernel = "conv"
grid = ["(SPLIT == 1) * min(tiles, device.sms) + (SPLIT > 1) * tiles * SPLIT"]
block = ["512"]
cluster = ["SPLIT"]
smem = "(OCT == 128) * 198976 + (OCT == 64) * 165440"
pdl = true
args = ["x", "w_packed", "w_inverse", "weight", "bias", "bn_weight", "bn_bias", "bn_mean", "bn_var", "residual", "y",
        "total", "area", "y.shape[3]", "c", "x.shape[2]", "x.shape[3]", "oc", "kb", "oct", "tiles",
        "x.stride[0]", "x.stride[1]", "x.stride[2]", "x.stride[3]",
        "weight.stride[0]", "weight.stride[1]", "weight.stride[2]", "weight.stride[3]"]
---*/
// Strict float32 convolution (NCHW) as an implicit product of fp16 splits: v = 2^-e (hi + lo), w*x = hi*hi + hi*lo + lo*hi.
// D[oc][pixel]; a tile is OCT output channels x PX output pixels, flattened over (n, oy, ox), so that it spans small images.
// K comes in blocks of 64: one tap x 64 channels (taps innermost, so that L1 keeps what neighbouring taps share), or, where channels
// fit 64 badly (FLAT), 64 consecutive (channel, tap) pairs. Weights are packed once, in the order of the blocks, swizzled, with a power of
// two per (block, channel); they come by bulk copies. x is gathered: a producer thread owns a pixel, loads its 64 values (coalesced
// over the lanes), finds their scale alone, and writes hi and lo into the swizzled tile. Two producer warpgroups (OCT = 128: alternate
// stages; 64: each half of the pixels), two consumer warpgroups of 64 x 128. A block's products start from zero, small ones first, and are
// promoted with both scales. NaN, Inf and values beyond 2^100 make a scale NaN, and outputs that are not finite are computed again, plainly.
// SPLIT > 1: a cluster shares the K blocks of one tile and adds its parts through distributed shared memory, in a fixed order.

constexpr int PX = 16384 / OCT, TAPS = KH * KW;
constexpr int STAGES = OCT == 128 ? 3 : 2;
constexpr int XT = PX * 128, WT = OCT * 128;           // bytes of one tile of halves
constexpr int STAGE = 2 * XT + 2 * WT;                 // x hi, x lo, w hi, w lo
constexpr int SCALES = OCT * 4 + PX * 2;               // w_inverse (float), inverse of the pixels (upper half of a float)
constexpr int BARRIERS = STAGES * (STAGE + SCALES);
constexpr uint32_t HUGE_TOP = 0x71800000u;             // 2^100

// where the packed weights start in their workspace: bulk copies and 16-byte stores need a multiple of 16
template <class E> __device__ __forceinline__ E* aligned(E* p) {
    return p + ((0u - uint32_t(reinterpret_cast<unsigned long long>(p))) & 15u) / uint32_t(sizeof(E));
}
__device__ __forceinline__ float pow2(int e) { return __int_as_float((e + 127) << 23); }
__device__ __forceinline__ int scale_of(uint32_t top) { return min(141 - int(top >> 23), 126); }
__device__ __forceinline__ float max_abs(float a, float b) {  // NaN stays
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(fabsf(b)));
    return r;
}
__device__ __forceinline__ float load_if(const float* p, bool take) {
    float v;
    asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\nmov.f32 %0, 0f00000000;\n@p ld.global.nc.f32 %0, [%1];\n}"
                 : "=f"(v) : "l"(p), "r"(int(take)));
    return v;
}
__device__ __forceinline__ void split2(float a, float b, float s, uint32_t& hi, uint32_t& lo) {
    const __half2 h = __floats2half2_rn(a * s, b * s);
    const float2 f = __half22float2(h);
    const __half2 l = __floats2half2_rn(fmaf(a, s, -f.x), fmaf(b, s, -f.y));
    hi = *reinterpret_cast<const uint32_t*>(&h);
    lo = *reinterpret_cast<const uint32_t*>(&l);
}
__device__ __forceinline__ void store16(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void store_pair(float* to, float a, float b) {  // 8-byte aligned
    asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "f"(a), "f"(b) : "memory");
}
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(accumulate));
}
__device__ __forceinline__ void pin(float (&d)[64]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// one thread: 8 k values of one row (output channel); 8 lanes share a row of 64
extern "C" __global__ void __launch_bounds__(128)
pack_weight(const float* __restrict__ weight, half* __restrict__ packed, float* __restrict__ inverse, int oc, int c, int kb,
            long long wn, long long wc, long long wh, long long ww) {
    pdl_launch_dependents();
    const int b = blockIdx.x, row = blockIdx.y * 16 + threadIdx.x / 8, chunk = threadIdx.x % 8;
    float v[8], top = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int q = chunk * 8 + i;
#if FLAT
        const int k = b * 64 + q, ch = k / TAPS, tap = k % TAPS;
#else
        const int ch = b / TAPS * 64 + q, tap = b % TAPS;
#endif
        v[i] = 0.0f;
        if (row < oc && ch < c) v[i] = weight[row * wn + ch * wc + tap / KW * wh + tap % KW * ww];
        top = max_abs(top, v[i]);
    }
    uint32_t bits = __float_as_uint(top) & 0x7fffffffu;
#pragma unroll
    for (int d = 1; d < 8; d *= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, d));
    const int e = scale_of(bits);
    const float s = pow2(e);
    Vec<uint32_t, 4> hi, lo;
#pragma unroll
    for (int i = 0; i < 4; ++i) split2(v[2 * i], v[2 * i + 1], s, hi[i], lo[i]);
    const int r = row % OCT;
    const long long block = (long long)(row / OCT) * kb + b;
    half* to = aligned(packed) + block * (OCT * 128) + r * 64 + (chunk ^ (r & 7)) * 8;
    store_vec(reinterpret_cast<uint32_t*>(to), hi);
    store_vec(reinterpret_cast<uint32_t*>(to + OCT * 64), lo);
    if (chunk == 0) aligned(inverse)[block * OCT + r] = bits >= HUGE_TOP ? __int_as_float(0x7fffffff) : pow2(-e);
}

struct Image {
    const float* x;
    const float* weight;
    int total, area, ow, c, h, w, oc;
    long long xn, xc, xh, xw, wn, wc, wh, ww;
};

// one output of the convolution alone, for what the fast path leaves as not finite
__device__ __forceinline__ float plain(const Image& g, int ch, int px) {
    const int n = px / g.area, rest = px % g.area;
    const int iy0 = rest / g.ow * P_STRIDE_0 - P_PADDING_0, ix0 = rest % g.ow * P_STRIDE_1 - P_PADDING_1;
    double sum = 0.0;
#pragma unroll 1
    for (int tap = 0; tap < TAPS; ++tap) {
        const int iy = iy0 + tap / KW * P_DILATION_0, ix = ix0 + tap % KW * P_DILATION_1;
        if (iy < 0 || iy >= g.h || ix < 0 || ix >= g.w) continue;
        const float* a = g.x + n * g.xn + iy * g.xh + ix * g.xw;
        const float* b = g.weight + ch * g.wn + tap / KW * g.wh + tap % KW * g.ww;
#pragma unroll 4
        for (int q = 0; q < g.c; ++q) sum = fma(double(a[q * g.xc]), double(b[q * g.wc]), sum);
    }
    return float(sum);
}

struct Channel {  // what the epilogue knows of one output channel
    float bias, mean, factor, shift;
};
struct Epilogue {
    const float *bias, *bn_weight, *bn_bias, *bn_mean, *bn_var;
    __device__ __forceinline__ Channel channel(int ch, int oc) const {
        Channel r = {0.0f, 0.0f, 1.0f, 0.0f};
        if (ch < oc) {
#if HAS_BIAS
            r.bias = bias[ch];
#endif
#if OP_BATCH_NORM
            r.mean = bn_mean[ch];
            r.factor = 1.0f / sqrtf(bn_var[ch] + float(P_BATCH_NORM_EPS));
#if HAS_BN_WEIGHT
            r.factor *= bn_weight[ch];
#endif
#if HAS_BN_BIAS
            r.shift = bn_bias[ch];
#endif
#endif
        }
        return r;
    }
};
__device__ __forceinline__ float finish(float v, const Channel& r, float residual) {
#if HAS_BIAS
    v += r.bias;
#endif
#if OP_BATCH_NORM
    v = fmaf(v - r.mean, r.factor, r.shift);
#endif
#if OP_ADD
    v += residual;
#endif
#if OP_RELU
    v = v < 0.0f ? 0.0f : v;
#endif
#if OP_SILU
    v = v / (1.0f + expf(-v));
#endif
#if OP_HARDSWISH
    v = v * fminf(fmaxf(v + 3.0f, 0.0f), 6.0f) / 6.0f;
#endif
    return v;
}
__device__ __forceinline__ float residual_at(const float* residual, long long at) {
#if OP_ADD
    return residual[at];
#else
    return 0.0f;
#endif
}
__device__ __forceinline__ bool not_finite(float v) { return (__float_as_uint(v) & 0x7f800000u) == 0x7f800000u; }

// columns px and px + 1 of channels ch (v0, v1) and ch + 8 (v2, v3); the result has a bit for each value that is not finite
__device__ __forceinline__ uint32_t emit(float v0, float v1, float v2, float v3, int ch, int px, const Channel& r0, const Channel& r1,
                                         const Image& g, const float* __restrict__ residual, float* __restrict__ y) {
    if (px >= g.total || ch >= g.oc) return 0;
    const int n = px / g.area, p = px - n * g.area;
    const bool upper = ch + 8 < g.oc;
    const long long at = ((long long)n * g.oc + ch) * g.area + p, down = 8LL * g.area;
    uint32_t bad = uint32_t(not_finite(v0)) | uint32_t(upper && not_finite(v2)) << 2;
    if (g.area % 2 == 0) {  // the pair is of one image, px + 1 exists, and at is even
        bad |= uint32_t(not_finite(v1)) << 1 | uint32_t(upper && not_finite(v3)) << 3;
        float2 f = {0.0f, 0.0f};
#if OP_ADD
        f.x = residual[at], f.y = residual[at + 1];
#endif
        store_pair(y + at, finish(v0, r0, f.x), finish(v1, r0, f.y));
        if (upper) {
#if OP_ADD
            f.x = residual[at + down], f.y = residual[at + down + 1];
#endif
            store_pair(y + at + down, finish(v2, r1, f.x), finish(v3, r1, f.y));
        }
    } else {
        y[at] = finish(v0, r0, residual_at(residual, at));
        if (upper) y[at + down] = finish(v2, r1, residual_at(residual, at + down));
        if (px + 1 < g.total) {
            bad |= uint32_t(not_finite(v1)) << 1 | uint32_t(upper && not_finite(v3)) << 3;
            const long long next = p + 1 < g.area ? at + 1 : at + 1 - g.area + (long long)g.oc * g.area;
            y[next] = finish(v1, r0, residual_at(residual, next));
            if (upper) y[next + down] = finish(v3, r1, residual_at(residual, next + down));
        }
    }
    return bad;
}

extern "C" __global__ void __launch_bounds__(512, 1)
conv(const float* __restrict__ x, const half* __restrict__ w_packed, const float* __restrict__ w_inverse, const float* __restrict__ weight,
     const float* __restrict__ bias, const float* __restrict__ bn_weight, const float* __restrict__ bn_bias, const float* __restrict__ bn_mean,
     const float* __restrict__ bn_var, const float* __restrict__ residual, float* __restrict__ y,
     int total, int area, int ow, int c, int h, int w, int oc, int kb, int oct, int tiles,
     long long xn, long long xc, long long xh, long long xw, long long wn, long long wc, long long wh, long long ww) {
    extern __shared__ __align__(1024) uint8_t ring[];
    uint64_t* full = reinterpret_cast<uint64_t*>(ring + BARRIERS);
    uint64_t* empty = full + STAGES;
    if (threadIdx.x == 0) {
        if (smem_address(ring) & 1023) __trap();
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(&full[s], PX + 1);  // every producer of the stage, and the bulk copies
            mbarrier_init(&empty[s], OCT == 128 ? 384 : 256);    // every consumer: each releases what it has read itself
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    pdl_wait();

    const int lane = threadIdx.x % 32;
    const int group = __shfl_sync(0xffffffffu, int(threadIdx.x / 128), 0);
#if SPLIT > 1
    const int rank = int(cluster_rank()), first = int(blockIdx.x) / SPLIT, step = tiles;
    const int b0 = int((long long)kb * rank / SPLIT), b1 = int((long long)kb * (rank + 1) / SPLIT);
#else
    const int first = int(blockIdx.x), step = int(gridDim.x), b0 = 0, b1 = kb;
#endif

    if (group >= 2) {
        // producers
        setmaxnreg_dec<96>();
        const int part = group - 2, t = threadIdx.x % 128;
        const int row = OCT == 64 ? part * 128 + t : t;  // of the tile: the pixel
        const uint32_t turn = row & 7;
        const uint32_t mine = smem_address(ring) + row * 128;
        int start = 0;  // number of this block's K blocks before the current tile
        for (int unit = first; unit < tiles; unit += step, start += b1 - b0) {
            const int px = unit / oct * PX + row, tile = unit % oct;
            const int n = px / area, rest = px - n * area;
            const int oy = rest / ow;
            const int iy0 = px < total ? oy * P_STRIDE_0 - P_PADDING_0 : -1073741824;  // far outside of the image
            const int ix0 = (rest - oy * ow) * P_STRIDE_1 - P_PADDING_1;
            const float* image = x + n * xn;
#pragma unroll 1
            for (int b = OCT == 128 ? b0 + ((start ^ part) & 1) : b0; b < b1; b += OCT == 128 ? 2 : 1) {
                const int it = start + b - b0, s = it % STAGES;
                float v[64];
#if FLAT
                {
                    int ch = b * 64 / TAPS, dy = b * 64 % TAPS / KW, dx = b * 64 % TAPS % KW;
                    const float* q = image + ch * xc + (iy0 + dy * P_DILATION_0) * xh + (ix0 + dx * P_DILATION_1) * xw;
                    const int next_row = int(P_DILATION_0 * xh - (KW - 1) * P_DILATION_1 * xw);
                    const int next_channel = int(xc - (KH - 1) * P_DILATION_0 * xh - (KW - 1) * P_DILATION_1 * xw);
#pragma unroll
                    for (int i = 0; i < 64; ++i) {
                        const int iy = iy0 + dy * P_DILATION_0, ix = ix0 + dx * P_DILATION_1;
                        v[i] = load_if(q, ch < c && uint32_t(iy) < uint32_t(h) && uint32_t(ix) < uint32_t(w));
                        if (dx < KW - 1) {
                            ++dx, q += int(P_DILATION_1 * xw);
                        } else if (dy < KH - 1) {
                            dx = 0, ++dy, q += next_row;
                        } else {
                            dx = 0, dy = 0, ++ch, q += next_channel;
                        }
                    }
                }
#else
                {
                    const int cb = b / TAPS, tap = b % TAPS;
                    const int iy = iy0 + tap / KW * P_DILATION_0, ix = ix0 + tap % KW * P_DILATION_1;
                    const int count = uint32_t(iy) < uint32_t(h) && uint32_t(ix) < uint32_t(w) ? c - cb * 64 : 0;
                    const float* q = image + iy * xh + ix * xw + (long long)cb * 64 * xc;
#pragma unroll
                    for (int i = 0; i < 64; ++i) {
                        v[i] = load_if(q, i < count);
                        q += xc;
                    }
                }
#endif
                uint8_t* scales = ring + STAGES * STAGE + s * SCALES;
                mbarrier_wait(&empty[s], (it / STAGES & 1) ^ 1);
                if (t == 0 && (OCT == 128 || part == 0)) {
                    const long long block = (long long)tile * kb + b;
                    mbarrier_arrive_expect(&full[s], 2 * WT + OCT * 4);
                    bulk_load(ring + s * STAGE + 2 * XT, aligned(w_packed) + block * (OCT * 128), 2 * WT, &full[s]);
                    bulk_load(scales, aligned(w_inverse) + block * OCT, OCT * 4, &full[s]);
                }
                __syncwarp();
                float top[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                for (int i = 0; i < 64; ++i) top[i % 4] = max_abs(top[i % 4], v[i]);
                const uint32_t bits = __float_as_uint(max_abs(max_abs(top[0], top[1]), max_abs(top[2], top[3]))) & 0x7fffffffu;
                const int e = scale_of(bits);
                const float scale = pow2(e);
                const uint32_t to = mine + s * STAGE;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    uint32_t hi[4], lo[4];
#pragma unroll
                    for (int k = 0; k < 4; ++k) split2(v[8 * i + 2 * k], v[8 * i + 2 * k + 1], scale, hi[k], lo[k]);
                    const uint32_t at = to + ((i ^ turn) << 4);
                    store16(at, hi[0], hi[1], hi[2], hi[3]);
                    store16(at + XT, lo[0], lo[1], lo[2], lo[3]);
                }
                reinterpret_cast<uint16_t*>(scales + OCT * 4)[row] = bits >= HUGE_TOP ? uint16_t(0x7fc0) : uint16_t((127 - e) << 7);
                fence_async_shared();
                __syncwarp();
                if (OCT == 128) mbarrier_arrive(&empty[s]);  // the other warpgroup writes this stage next; must come before `full`
                mbarrier_arrive(&full[s]);
            }
        }
#if SPLIT > 1
        __syncwarp();
        cluster_sync();
        cluster_sync();
#endif
    } else {
        // consumers
        setmaxnreg_inc<160>();
        const Image g = {x, weight, total, area, ow, c, h, w, oc, xn, xc, xh, xw, wn, wc, wh, ww};
        const Epilogue epilogue = {bias, bn_weight, bn_bias, bn_mean, bn_var};
        const int row = (OCT == 128 ? group * 64 : 0) + threadIdx.x / 32 % 4 * 16 + lane / 4;  // channel of the tile; also row + 8
        const int col = (OCT == 64 ? group * 128 : 0) + lane % 4 * 2;                         // pixel of the tile; also + 1, + 8 j
        int s = 0, phase = 0;
        for (int unit = first; unit < tiles; unit += step) {
            float master[64], acc[64];
#pragma unroll
            for (int i = 0; i < 64; ++i) master[i] = acc[i] = 0.0f;
#pragma unroll 1
            for (int b = b0; b < b1; ++b) {
                mbarrier_wait(&full[s], phase);
                const uint8_t* stage = ring + s * STAGE;
                const uint8_t* scales = ring + STAGES * STAGE + s * SCALES;
                const uint64_t xhi = wgmma_descriptor_128(stage + (OCT == 64 ? group * 16384 : 0)), xlo = xhi + XT / 16;
                const uint64_t whi = wgmma_descriptor_128(stage + 2 * XT + (OCT == 128 ? group * 8192 : 0)), wlo = whi + WT / 16;
                wgmma_fence();
#pragma unroll
                for (int q = 0; q < 4; ++q) {
                    wgmma_m64n128k16(acc, whi + 2 * q, xlo + 2 * q, q != 0);
                    wgmma_m64n128k16(acc, wlo + 2 * q, xhi + 2 * q, 1);
                }
#pragma unroll
                for (int q = 0; q < 4; ++q) wgmma_m64n128k16(acc, whi + 2 * q, xhi + 2 * q, 1);
                wgmma_commit();
                const float w0 = reinterpret_cast<const float*>(scales)[row], w1 = reinterpret_cast<const float*>(scales)[row + 8];
                uint32_t pair[16];
#pragma unroll
                for (int j = 0; j < 16; ++j) pair[j] = *reinterpret_cast<const uint32_t*>(scales + OCT * 4 + (col + 8 * j) * 2);
                wgmma_wait<0>();
                pin(acc);
                __syncwarp();
                mbarrier_arrive(&empty[s]);
#pragma unroll
                for (int j = 0; j < 16; ++j) {
                    const float p0 = __uint_as_float(pair[j] << 16), p1 = __uint_as_float(pair[j] & 0xffff0000u);
                    master[4 * j] = fmaf(acc[4 * j] * w0, p0, master[4 * j]);
                    master[4 * j + 1] = fmaf(acc[4 * j + 1] * w0, p1, master[4 * j + 1]);
                    master[4 * j + 2] = fmaf(acc[4 * j + 2] * w1, p0, master[4 * j + 2]);
                    master[4 * j + 3] = fmaf(acc[4 * j + 3] * w1, p1, master[4 * j + 3]);
                }
                if (++s == STAGES) s = 0, phase ^= 1;
            }

            const int ch = unit % oct * OCT + row, px = unit / oct * PX + col;
            const Channel r0 = epilogue.channel(ch, oc), r1 = epilogue.channel(ch + 8, oc);
            uint64_t bad = 0;
#if SPLIT > 1
            barrier_sync(1, 256);  // both warpgroups are through with the ring
#pragma unroll
            for (int j = 0; j < 16; ++j)
                store_vec(reinterpret_cast<float*>(ring) + (j * 256 + threadIdx.x) * 4,
                          Vec<float, 4>{{master[4 * j], master[4 * j + 1], master[4 * j + 2], master[4 * j + 3]}});
            cluster_sync();
            const uint32_t here = smem_address(ring) + threadIdx.x * 16;
#pragma unroll
            for (int jj = 0; jj < 16 / SPLIT; ++jj) {
                const int j = jj * SPLIT + rank;
                float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                for (int k = 0; k < SPLIT; ++k) {
                    float a, b, d, f;
                    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %4, %5;\n"
                                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
                                 : "=f"(a), "=f"(b), "=f"(d), "=f"(f) : "r"(here + j * 4096), "r"(k) : "memory");
                    sum[0] += a, sum[1] += b, sum[2] += d, sum[3] += f;
                }
                bad |= uint64_t(emit(sum[0], sum[1], sum[2], sum[3], ch, px + 8 * j, r0, r1, g, residual, y)) << (4 * j);
            }
            __syncwarp();
            cluster_sync();  // nobody leaves while its part may be read
#else
#pragma unroll
            for (int j = 0; j < 16; ++j)
                bad |= uint64_t(emit(master[4 * j], master[4 * j + 1], master[4 * j + 2], master[4 * j + 3], ch, px + 8 * j, r0, r1, g,
                                     residual, y)) << (4 * j);
#endif
#pragma unroll 1
            while (bad) {
                const int i = __ffsll((long long)bad) - 1;
                bad &= bad - 1;
                const int to_ch = ch + (i & 2) * 4, to_px = px + 8 * (i / 4) + i % 2;
                const float v = plain(g, to_ch, to_px);
                const int n = to_px / area;
                const long long at = ((long long)n * oc + to_ch) * area + (to_px - n * area);
                y[at] = finish(v, epilogue.channel(to_ch, oc), residual_at(residual, at));
            }
            __syncwarp();  // together again for the next tile's wgmma
        }
    }
}
