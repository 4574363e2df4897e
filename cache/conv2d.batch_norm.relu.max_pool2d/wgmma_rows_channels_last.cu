/*---
implements = "conv2d.batch_norm.relu.max_pool2d"
target     = "cuda"
dtypes     = ["float16"]
optional   = ["bias", "bn_weight", "bn_bias"]
where      = ["x.ndim == 4", "device.arch == 90", "x.shape[1] == 3", "weight.shape[1] == 3", "weight.shape[2] == 7", "weight.shape[3] == 7", "groups == 1", "stride[0] == 2", "stride[1] == 2", "padding[0] == 3", "padding[1] == 3", "dilation[0] == 1", "dilation[1] == 1", "max_pool2d_kernel_size[0] == 3", "max_pool2d_kernel_size[1] == 3", "max_pool2d_stride[0] == 2", "max_pool2d_stride[1] == 2", "max_pool2d_padding[0] == 1", "max_pool2d_padding[1] == 1", "max_pool2d_dilation[0] == 1", "max_pool2d_dilation[1] == 1", "max_pool2d_ceil_mode == 0", "w % 8 == 0", "h >= 1", "x.stride[1] == 1", "x.stride[3] == 3", "x.stride[2] % 8 == 0", "x.stride[0] % 8 == 0", "weight.stride[0] == 147", "weight.stride[1] == 1", "weight.stride[2] == 21", "weight.stride[3] == 3", "oc % 64 == 0", "oc // 64 <= 65535", "y.stride[1] == 1", "y.stride[0] % 2 == 0", "y.stride[2] % 2 == 0", "y.stride[3] % 2 == 0", "y.numel >= 1", "y.numel <= 2147483647", "x.numel <= 2147483647"]
dims       = { n = "x.shape[0]", h = "x.shape[2]", w = "x.shape[3]", oc = "weight.shape[0]", oh = "(x.shape[2] - 1) // 2 + 1", ph = "y.shape[2]", pw = "y.shape[3]", tiles = "max(1, ceil_div(y.shape[3] - 2, 54))", units = "n * tiles * ph", smem_bytes = "RING * 10752 + 1792 + STAGES * 2784 + 18816 + 256" }
tune       = { RING = [6, 7], STAGES = [3, 5] }
align      = 16
[[launch]]
kernel = "stem"
grid   = ["min(2 * device.sms, units)", "oc // 64"]
block  = ["256"]
smem   = "smem_bytes"
args   = ["x", "weight", "bias", "bn_weight", "bn_bias", "bn_mean", "bn_var", "y", "h", "w", "oh", "ph", "pw", "tiles", "units", "x.stride[0]", "x.stride[2]", "y.stride[0]", "y.stride[2]", "y.stride[3]"]
---*/
// conv 7x7 / 2 of 3 channels, BN, ReLU, max pool 3x3 / 2 of NHWC halves in one kernel. A block walks down runs of pooled rows; tile k holds
// convolution columns 108k .. 108k + 111 (pooled 54k .. 54k + 55; the first two of tiles k > 0 belong to tile k - 1).
// wgmma m64n112k16: M = channels (weights in registers; rows g, g + 8 of a warp are channels 2g, 2g + 1), N = pixels of one row, B = im2col
// along x that the producer warp group builds: an input row is 3 planes [112 pixels][8 halves] with the 24 halves from element 6 * ox - 10 of the
// row (the first and the last two zero: 7 taps x 3 channels are contiguous). Ring of pairs of input rows (2q - 3, 2q - 2); convolution row oy
// uses pairs oy .. oy + 3 and frees pair oy. K: 7 steps (chunks 0, 1 of row ky), 3 (chunk 2 of both rows of a pair), 1 (chunk 2 of row 6, zeros).

#define PAIR_BYTES 10752
#define ROW_BYTES 5376
#define PLANE_BYTES 1792
#define RAW_ROW 1392

__device__ __forceinline__ uint32_t bits(__half2 v) { return *reinterpret_cast<uint32_t*>(&v); }
// BN of a channel as (v - shift) * scale + add
struct Norm { float shift, scale, add; };
__device__ __forceinline__ Norm norm_of(const T_bias* bias, const T_bn_weight* bn_weight, const T_bn_bias* bn_bias, const T_bn_mean* bn_mean,
                                        const T_bn_var* bn_var, int channel) {
    Norm r;
    r.shift = to_float(bn_mean[channel]);
#if HAS_BIAS
    r.shift -= to_float(bias[channel]);
#endif
    r.scale = 1.0f / sqrtf(to_float(bn_var[channel]) + float(P_BATCH_NORM_EPS));
#if HAS_BN_WEIGHT
    r.scale *= to_float(bn_weight[channel]);
#endif
    r.add = 0.0f;
#if HAS_BN_BIAS
    r.add = to_float(bn_bias[channel]);
#endif
    return r;
}
__device__ __forceinline__ __half2 apply(const Norm& n, float a, float b) {
    return __floats2half2_rn(fmaf(a - n.shift, n.scale, n.add), fmaf(b - n.shift, n.scale, n.add));
}
__device__ __forceinline__ bool infinite(const Norm& n) { return !(fabsf(n.scale) < INFINITY); }
// two taps (k = pos, pos + 1 of the 24 of kernel row ky; 0, 22 and 23 are padding) of a channel's 147 weights
__device__ __forceinline__ uint32_t two_taps(const uint16_t* of_channel, int ky, int pos) {
    const uint32_t lo = pos >= 1 && pos <= 21 ? of_channel[ky * 21 + pos - 1] : 0;
    const uint32_t hi = pos + 1 <= 21 ? of_channel[ky * 21 + pos] : 0;
    return lo | hi << 16;
}

__device__ __forceinline__ void mma112(float (&d)[56], const uint32_t (&a)[4], uint64_t b, int keep) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %61, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n112k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55}, "
        "{%56, %57, %58, %59}, %60, p, 1, 1, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));
}
// B by descriptor, no swizzle: address and K stride in 16 bytes, N stride 128 bytes
__device__ __forceinline__ uint64_t b_desc(uint32_t at, uint32_t k_stride) { return uint64_t(8) << 32 | (k_stride << 16 | at); }

extern "C" __global__ void __launch_bounds__(256, 2)
stem(const T* __restrict__ x, const T* __restrict__ weight, const T_bias* __restrict__ bias, const T_bn_weight* __restrict__ bn_weight,
     const T_bn_bias* __restrict__ bn_bias, const T_bn_mean* __restrict__ bn_mean, const T_bn_var* __restrict__ bn_var, T* __restrict__ y,
     int h, int w, int oh, int ph, int pw, int tiles, int units, long long sxn, long long sxh, long long syn, long long syh, long long syw) {
    extern __shared__ uint4 shared[];
    uint8_t* ring = reinterpret_cast<uint8_t*>(shared);
    uint8_t* zeros = ring + RING * PAIR_BYTES;
    uint8_t* raw = zeros + PLANE_BYTES;
    uint8_t* weights = raw + STAGES * 2 * RAW_ROW;
    uint64_t* full = reinterpret_cast<uint64_t*>(weights + 18816);           // [RING]
    uint64_t* empty = full + RING;                                           // [RING]
    const int begin = int((long long)units * blockIdx.x / gridDim.x), end = int((long long)units * (blockIdx.x + 1) / gridDim.x);
    const int lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        for (int i = 0; i < RING; ++i) {
            mbarrier_init(full + i, 1);
            mbarrier_init(empty + i, 4);
        }
        mbarrier_init_fence();
    }
    if (threadIdx.x < PLANE_BYTES / 16) {
        *reinterpret_cast<uint4*>(zeros + threadIdx.x * 16) = make_uint4(0, 0, 0, 0);
        fence_async_shared();
    }
    __syncthreads();

    if (threadIdx.x < 128) {                                                 // producers
        setmaxnreg_dec<48>();
        const int tid = threadIdx.x;
        int u = begin, q = 0, qend = 0, issued = 0, e0 = 0;
        const T* xn = x;
        // chunks of a pair: 2 x 87; thread i copies i and i + 128
        const int r0 = tid >= 87, m0 = tid - r0 * 87, m1 = tid + 41;
        auto load_next = [&](int stage) {
            if (q == qend && u < end) {
                const int p = u % ph, it = u / ph, tile = it % tiles, image = it / tiles, pe = min(ph, p + (end - u));
                q = max(2 * p - 1, 0);
                qend = min(2 * pe - 1, oh - 1) + 4;
                e0 = tile * 648 - 16;
                xn = x + image * sxn;
                u += pe - p;
            }
            if (q < qend) {
                uint8_t* to = raw + stage * (2 * RAW_ROW);
                const int iy0 = 2 * q - 3;
                {
                    const int e = e0 + m0 * 8, iy = iy0 + r0;
                    const bool in = uint32_t(iy) < uint32_t(h) && e >= 0 && e < 3 * w;
                    cp_async16_zero_fill(to + tid * 16, in ? xn + iy * sxh + e : x, in);
                }
                if (tid < 46) {
                    const int e = e0 + m1 * 8, iy = iy0 + 1;
                    const bool in = uint32_t(iy) < uint32_t(h) && e >= 0 && e < 3 * w;
                    cp_async16_zero_fill(to + (tid + 128) * 16, in ? xn + iy * sxh + e : x, in);
                }
                ++q;
                ++issued;
            }
            cp_async_commit();
        };
        for (int i = 0; i < STAGES - 1; ++i) load_next(i);
        int slot = 0, last = -1, stage = 0, ahead = STAGES - 1;
        uint32_t phase = 0;
#pragma unroll 1
        for (int c = 0; c < issued; ++c) {
            cp_async_wait<STAGES - 2>();
            barrier_sync(1, 128);                        // raw pair c has come; pair c - 1 has been read and written to the ring by all
            if (tid == 0 && last >= 0) mbarrier_arrive(full + last);
            load_next(ahead);
            mbarrier_wait(empty + slot, phase ^ 1);
            if (tid < 112) {
                const uint32_t* from = reinterpret_cast<const uint32_t*>(raw + stage * (2 * RAW_ROW)) + 3 + 3 * tid;
                uint8_t* to = ring + slot * PAIR_BYTES + tid * 16;
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    uint32_t v[12];
#pragma unroll
                    for (int i = 0; i < 11; ++i) v[i] = from[r * (RAW_ROW / 4) + i];
                    v[0] &= 0xffff0000u;                 // the pixel before
                    v[11] = 0;
#pragma unroll
                    for (int i = 0; i < 3; ++i)
                        *reinterpret_cast<uint4*>(to + r * ROW_BYTES + i * PLANE_BYTES) = make_uint4(v[i * 4], v[i * 4 + 1], v[i * 4 + 2], v[i * 4 + 3]);
                }
                fence_async_shared();
            }
            last = slot;
            if (++slot == RING) slot = 0, phase ^= 1;
            if (++stage == STAGES) stage = 0;
            if (++ahead == STAGES) ahead = 0;
        }
        cp_async_wait<0>();
        barrier_sync(1, 128);
        if (tid == 0 && last >= 0) mbarrier_arrive(full + last);
    } else {                                                                 // consumers
        setmaxnreg_inc<208>();
        const int ct = threadIdx.x - 128, warp = ct / 32, g = lane / 4, t = lane % 4;
        {
            const uint8_t* from = reinterpret_cast<const uint8_t*>(weight + (long long)blockIdx.y * (64 * 147));
            for (int i = ct; i < 1176; i += 128) cp_async16(weights + i * 16, from + i * 16);
            cp_async_commit();
        }
        const int local = warp * 16 + 2 * g, channel = blockIdx.y * 64 + local;
        const Norm na = norm_of(bias, bn_weight, bn_bias, bn_mean, bn_var, channel);
        const Norm nb = norm_of(bias, bn_weight, bn_bias, bn_mean, bn_var, channel + 1);
        const bool rough = __any_sync(0xffffffffu, infinite(na) || infinite(nb));   // then eager's rounding decides between Inf and NaN
        cp_async_wait<0>();
        barrier_sync(2, 128);
        uint32_t a[11][4];
        {
            const uint16_t* wa = reinterpret_cast<const uint16_t*>(weights) + local * 147;
            const uint16_t* wb = wa + 147;
#pragma unroll
            for (int s = 0; s < 11; ++s) {
                const int ky0 = s < 7 ? s : (s - 7) * 2, ky1 = s < 7 ? s : ky0 + 1;
                const int pos0 = (s < 7 ? 0 : 16) + 2 * t, pos1 = (s < 7 ? 8 : 16) + 2 * t;
                a[s][0] = two_taps(wa, ky0, pos0);
                a[s][1] = two_taps(wb, ky0, pos0);
                a[s][2] = s < 10 ? two_taps(wa, ky1, pos1) : 0u;
                a[s][3] = s < 10 ? two_taps(wb, ky1, pos1) : 0u;
            }
        }
        const uint32_t ring16 = smem_address(ring) >> 4, zeros16 = smem_address(zeros) >> 4;
        const int neighbour = (lane & 28) | ((lane + 3) & 3);
        const __half2 zero2 = __floats2half2_rn(0.0f, 0.0f);
        float acc[56];
#pragma unroll
        for (int i = 0; i < 56; ++i) acc[i] = 0.0f;
        int head = 0, tail = 0;                                              // slots: next to come, first in use
        uint32_t phase = 0;
        auto wait_pair = [&]() {
            mbarrier_wait(full + head, phase);
            if (++head == RING) head = 0, phase ^= 1;
        };
#pragma unroll 1
        for (int u = begin; u < end;) {
            const int p0 = u % ph, it = u / ph, tile = it % tiles, image = it / tiles, pe = min(ph, p0 + (end - u));
            const int first = max(2 * p0 - 1, 0), final = min(2 * pe - 1, oh - 1);
            u += pe - p0;
            const int skip = tile ? 2 : 0, columns = pw - tile * 54;         // local pooled columns to write: skip .. columns - 1
            T* out0 = y + image * syn + (long long)(tile * 54 + t) * syw + channel;
            __half2 m[28];                                                   // running maximum: [column group][channel]
#pragma unroll
            for (int i = 0; i < 28; ++i) m[i] = zero2;
#pragma unroll 1
            for (int i = 0; i < 3; ++i) wait_pair();
#pragma unroll 1
            for (int oy = first; oy <= final; ++oy) {
                wait_pair();
                uint32_t at[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int s = tail + i;
                    at[i] = ring16 + (s >= RING ? s - RING : s) * (PAIR_BYTES / 16);
                }
                wgmma_fence();
#pragma unroll
                for (int s = 0; s < 7; ++s)
                    mma112(acc, a[s], b_desc(at[s / 2] + (s & 1) * (ROW_BYTES / 16), PLANE_BYTES / 16), s > 0);
#pragma unroll
                for (int i = 0; i < 3; ++i) mma112(acc, a[7 + i], b_desc(at[i] + 2 * PLANE_BYTES / 16, ROW_BYTES / 16), 1);
                {
                    const uint32_t from = at[3] + 2 * PLANE_BYTES / 16;
                    mma112(acc, a[10], b_desc(from, zeros16 - from), 1);
                }
                wgmma_commit();
                wgmma_wait<0>();
                if (lane == 0) mbarrier_arrive(empty + tail);
                if (++tail == RING) tail = 0;

                if (rough) {
#pragma unroll
                    for (int i = 0; i < 56; ++i) acc[i] = __half2float(__float2half_rn(acc[i]));
                }
                const bool odd = oy & 1;
                const int p = oy >> 1;
                if (odd || oy == oh - 1) {                                   // the last row of a pool window: its maxima, and the carry
                    const bool write = p >= p0;
                    __half2 before = zero2;
                    T* out = out0 + p * syh;
#pragma unroll
                    for (int j = 0; j < 14; ++j) {
                        const __half2 va = apply(na, acc[j * 4], acc[j * 4 + 1]), vb = apply(nb, acc[j * 4 + 2], acc[j * 4 + 3]);
                        const __half2 ma = __hmax2_nan(m[j * 2], va), mb = __hmax2_nan(m[j * 2 + 1], vb);
                        m[j * 2] = va;
                        m[j * 2 + 1] = vb;
                        const __half2 lo = __lows2half2(ma, mb), hi = __highs2half2(ma, mb);   // columns 8j + 2t and the next, of both channels
                        const __half2 side = __shfl_sync(0xffffffffu, hi, neighbour);
                        const __half2 left = t ? side : before;
                        before = side;
                        const __half2 most = __hmax2_nan(__hmax2_nan(lo, hi), __hmax2_nan(left, zero2));
                        const int column = j * 4 + t;
                        if (write && column >= skip && column < columns) *reinterpret_cast<__half2*>(out) = most;
                        out += 4 * syw;
                    }
                } else {
#pragma unroll
                    for (int j = 0; j < 14; ++j) {
                        m[j * 2] = __hmax2_nan(m[j * 2], apply(na, acc[j * 4], acc[j * 4 + 1]));
                        m[j * 2 + 1] = __hmax2_nan(m[j * 2 + 1], apply(nb, acc[j * 4 + 2], acc[j * 4 + 3]));
                    }
                }
            }
#pragma unroll 1
            for (int i = 0; i < 3; ++i) {                                    // the rest of the segment's pairs
                if (lane == 0) mbarrier_arrive(empty + tail);
                if (++tail == RING) tail = 0;
            }
        }
    }
}
