/*---
implements = ["conv2d.batch_norm.add.relu", "conv2d.batch_norm.relu", "conv2d.batch_norm", "conv2d", "conv2d.relu", "conv2d.add.relu", "conv2d.add",
              "conv2d.batch_norm.add", "conv2d.silu", "conv2d.batch_norm.silu", "conv2d.hardswish", "conv2d.batch_norm.hardswish"]
target     = "cuda"
dtypes     = ["float16", "bfloat16"]
optional   = ["bias", "bn_weight", "bn_bias", "bn_mean", "bn_var", "residual"]
where      = ["device.arch == 90", "x.ndim == 4", "weight.ndim == 4", "y.ndim == 4", "groups == 1", "weight.shape[2] == 1", "weight.shape[3] == 1",
              "stride[0] == 1", "stride[1] == 1", "padding[0] == 0", "padding[1] == 0", "y.numel >= 1", "c >= 8", "c % 8 == 0", "oc >= 8", "oc % 8 == 0",
              "weight.shape[1] == c", "x.itemsize == 2", "weight.itemsize == 2", "y.itemsize == 2", "x.stride[1] == 1", "xp % 8 == 0", "xp >= c",
              "x.stride[2] == wi * xp", "x.stride[0] == hi * wi * xp", "y.stride[1] == 1", "y.stride[3] == oc", "y.stride[2] == wi * oc",
              "y.stride[0] == hi * wi * oc", "weight.stride[1] == 1", "weight.stride[0] == c", "residual.channels_last", "pixels <= 2000000000",
              "oc <= 8192", "tiles <= 2000000000", "(BN == 64) + (oc > 64) >= 1", "BN * CTAS <= 256", "CTAS * (smem_bytes + 1200) <= device.smem_per_block + 1024"]
dims       = { c = "x.shape[1]", hi = "x.shape[2]", wi = "x.shape[3]", xp = "x.stride[3]", oc = "weight.shape[0]", pixels = "x.shape[0] * x.shape[2] * x.shape[3]", tiles_n = "ceil_div(oc, BN)", tiles = "ceil_div(pixels, 128) * tiles_n", smem_bytes = "1024 + STAGES * (16384 + BN * 128) + tiles_n * BN * 12" }
tune       = { BN = [64, 128], STAGES = [2, 3, 4], CTAS = [2, 3] }
align      = 16
[[tensor_map]]
name = "x_map"
over = "x"
dims = ["c", "pixels"]
strides = ["xp * 2"]
box = ["64", "128"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "w_map"
over = "weight"
dims = ["c", "oc"]
strides = ["c * 2"]
box = ["64", "BN"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[launch]]
kernel = "pointwise"
grid   = ["min(tiles, device.sms * CTAS)"]
block  = ["288"]
smem   = "smem_bytes"
args   = ["x_map", "w_map", "x", "weight", "bias", "bn_weight", "bn_bias", "bn_mean", "bn_var", "residual", "y", "c", "oc", "pixels", "tiles_n", "tiles"]
---*/
// 1x1 convolution of channels-last tensors: [pixels, c] * weight^T, then batch norm (in inference), residual and activation, rounded once.
// Persistent, CTAS blocks on an SM: one warp feeds a ring of 128 pixels x 64 channels and BN weights x 64 channels by TMA, across tiles; two
// warp groups multiply (64 pixels x BN each). The residual of a tile is loaded before its products begin. A thread's sums lie in pairs of
// columns; a 4 x 4 transpose among the lanes of a quad makes 16 bytes of them, for the residual's loads as for the stores.

enum { EARLY = BN == 64 ? 2 : 1, A_BYTES = 16384, B_BYTES = BN * 128, STAGE = A_BYTES + B_BYTES, QUADS = BN / 32 };
#define HAS_SHIFT (OP_BATCH_NORM != 0 || HAS_BIAS)

template <class E> struct is_half { static constexpr bool value = false; };
template <> struct is_half<__half> { static constexpr bool value = true; };

#if BN == 64
#define WGMMA(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;\n}" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) : "l"(a), "l"(b), "r"(accumulate))
#else
#define WGMMA(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;\n}" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) : "l"(a), "l"(b), "r"(accumulate))
#endif

// d (64 x BN) = [d +] a (64 x 16) * b (BN x 16)^T, both K-major in shared memory
__device__ __forceinline__ void wgmma(float (&d)[BN / 2], uint64_t a, uint64_t b, int accumulate) {
    if constexpr (is_half<T>::value) { WGMMA("f16"); } else { WGMMA("bf16"); }
}
__device__ __forceinline__ void pin(float (&d)[BN / 2]) {
#pragma unroll
    for (int i = 0; i < BN / 2; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
__device__ __forceinline__ uint32_t pack2(float lo, float hi) {
    uint32_t r;
    if constexpr (is_half<T>::value) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
__device__ __forceinline__ float2 unpack2(uint32_t packed) {
    if constexpr (is_half<T>::value) return __half22float2(*reinterpret_cast<const __half2*>(&packed));
    else return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&packed));
}
// word i of lane t of each quad goes to word t of lane i
__device__ __forceinline__ void transpose(uint32_t (&w)[4], int t) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, (t & 1) ? w[i] : w[i + 1], 1);
        if (t & 1) w[i] = got; else w[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, (t & 2) ? w[i] : w[i + 2], 2);
        if (t & 2) w[i] = got; else w[i + 2] = got;
    }
}
// 8 values of this row and of the row 8 below, where there are any
__device__ __forceinline__ void load_pair(uint32_t (&a)[4], uint32_t (&b)[4], const T* from, int pitch, int rows, bool inside) {
    uint4 first = make_uint4(0, 0, 0, 0), second = first;
    if (inside && rows > 0) first = *reinterpret_cast<const uint4*>(from);
    if (inside && rows > 8) second = *reinterpret_cast<const uint4*>(from + 8ll * pitch);
    a[0] = first.x, a[1] = first.y, a[2] = first.z, a[3] = first.w;
    b[0] = second.x, b[1] = second.y, b[2] = second.z, b[3] = second.w;
}
__device__ __forceinline__ float activated(float v) {
#if OP_RELU
    v = v < 0.0f ? 0.0f : v;
#elif OP_SILU
    v = v / (1.0f + __expf(-v));
#elif OP_HARDSWISH
    v = v * fminf(fmaxf(v + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
#endif
    return v;
}

extern "C" __global__ void __launch_bounds__(288, CTAS)
pointwise(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const T* x, const T* weight, const T_bias* __restrict__ bias,
          const T_bn_weight* __restrict__ bn_weight, const T_bn_bias* __restrict__ bn_bias, const T_bn_mean* __restrict__ bn_mean,
          const T_bn_var* __restrict__ bn_var, const T* __restrict__ residual, T* __restrict__ y, int c, int oc, int pixels, int tiles_n, int tiles) {
    extern __shared__ uint8_t raw[];
    __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
    uint8_t* ring = raw + ((1024u - (smem_address(raw) & 1023u)) & 1023u);
#if HAS_SHIFT
    float2* factors = reinterpret_cast<float2*>(ring + STAGES * STAGE);  // of every output channel: what is taken off, the factor,
    float* added = reinterpret_cast<float*>(factors + tiles_n * BN);     // and what is added then (in this order an infinite factor is eager's)
#endif
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int blocks = (c + 63) / 64;

    if (threadIdx.x == 256) {
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(&full[s], 1);
            mbarrier_init(&empty[s], 8);
        }
        mbarrier_init_fence();
        fence_async_shared();
        tma_prefetch(x_map);
        tma_prefetch(w_map);
    }
#if HAS_SHIFT
    for (int i = threadIdx.x; i < tiles_n * BN; i += 288) {
        float less = 0.0f, scale = 1.0f, shift = 0.0f;
        if (i < oc) {
#if HAS_BIAS
            less = -to_float(bias[i]);
#endif
#if OP_BATCH_NORM
            less += to_float(bn_mean[i]);
            scale = rsqrtf(to_float(bn_var[i]) + float(P_BATCH_NORM_EPS));
#if HAS_BN_WEIGHT
            scale *= to_float(bn_weight[i]);
#endif
#if HAS_BN_BIAS
            shift = to_float(bn_bias[i]);
#endif
#endif
        }
        added[i] = shift;
        factors[i] = make_float2(less, scale);
    }
#endif
    __syncthreads();

    if (warp == 8) {  // ---------------- the warp that loads
        if (lane == 0) {
            int s = 0, phase = 1;  // a fresh barrier lets a wait for the phase before the first pass
            for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                const int m = tile / tiles_n * 128, n = tile % tiles_n * BN;
                for (int k = 0; k < blocks; ++k) {
                    mbarrier_wait(&empty[s], phase);
                    mbarrier_arrive_expect(&full[s], STAGE);
                    tma_load_2d(ring + s * STAGE, x_map, &full[s], k * 64, m);
                    tma_load_2d(ring + s * STAGE + A_BYTES, w_map, &full[s], k * 64, n);
                    if (++s == STAGES) { s = 0; phase ^= 1; }
                }
            }
        }
        return;
    }

    // ---------------- the warp groups that multiply
    const int wg = warp / 4, t = lane & 3;
    const uint64_t a0 = wgmma_descriptor_128(ring + wg * 8192), b0 = wgmma_descriptor_128(ring + A_BYTES);
    int s = 0, phase = 0;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int n = tile % tiles_n * BN;
        const int row = tile / tiles_n * 128 + warp * 16 + (lane >> 2);
        const long long at = (long long)row * oc + n + t * 8;
        float acc[BN / 2];
#if OP_ADD
        uint32_t more[2][EARLY][4];  // of the first columns; the others' come behind the products, where registers are free
#pragma unroll
        for (int g = 0; g < EARLY; ++g) load_pair(more[0][g], more[1][g], residual + at + g * 32, oc, pixels - row, n + g * 32 + t * 8 < oc);
#endif
        int before = 0;
#pragma unroll 1
        for (int k = 0; k < blocks; ++k) {
            mbarrier_wait(&full[s], phase);
            const uint64_t a = a0 + s * (STAGE >> 4), b = b0 + s * (STAGE >> 4);
            wgmma_fence();
            wgmma(acc, a, b, k != 0);
            wgmma(acc, a + 2, b + 2, 1);
            wgmma(acc, a + 4, b + 4, 1);
            wgmma(acc, a + 6, b + 6, 1);
            wgmma_commit();
            if (k > 0) {
                wgmma_wait<1>();
                if (lane == 0) mbarrier_arrive(&empty[before]);
            }
            before = s;
            if (++s == STAGES) { s = 0; phase ^= 1; }
        }
        wgmma_wait<0>();
        pin(acc);
        if (lane == 0) mbarrier_arrive(&empty[before]);

#pragma unroll
        for (int g = 0; g < QUADS; ++g) {
            uint32_t out[2][4];
#if OP_ADD
            uint32_t mine[2][4];
            if (g < EARLY) {
#pragma unroll
                for (int i = 0; i < 4; ++i) mine[0][i] = more[0][g % EARLY][i], mine[1][i] = more[1][g % EARLY][i];
            } else {
                load_pair(mine[0], mine[1], residual + at + g * 32, oc, pixels - row, n + g * 32 + t * 8 < oc);
            }
            transpose(mine[0], t);
            transpose(mine[1], t);
#endif
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int j = 4 * g + i;
#if HAS_SHIFT
                const float4 f = *reinterpret_cast<const float4*>(factors + n + 8 * j + 2 * t);
                const float2 shift = *reinterpret_cast<const float2*>(added + n + 8 * j + 2 * t);
#endif
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float v0 = acc[4 * j + 2 * r], v1 = acc[4 * j + 2 * r + 1];
#if HAS_SHIFT
                    v0 = fmaf(v0 - f.x, f.y, shift.x), v1 = fmaf(v1 - f.z, f.w, shift.y);
#endif
#if OP_ADD
                    const float2 pair = unpack2(mine[r][i]);
                    v0 += pair.x, v1 += pair.y;
#endif
                    out[r][i] = pack2(activated(v0), activated(v1));
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                transpose(out[r], t);
                if (row + 8 * r < pixels && n + g * 32 + t * 8 < oc)
                    *reinterpret_cast<uint4*>(y + at + (long long)(8 * r) * oc + g * 32) = make_uint4(out[r][0], out[r][1], out[r][2], out[r][3]);
            }
        }
    }
}
