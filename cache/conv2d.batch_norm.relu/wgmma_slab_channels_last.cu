/*---
implements = ["conv2d.batch_norm.relu", "conv2d", "conv2d.relu", "conv2d.batch_norm", "conv2d.batch_norm.add.relu", "conv2d.add.relu",
              "conv2d.add", "conv2d.batch_norm.add", "conv2d.silu", "conv2d.batch_norm.silu", "conv2d.hardswish", "conv2d.batch_norm.hardswish"]
target     = "cuda"
dtypes     = ["float16", "bfloat16"]
optional   = ["bias", "bn_weight", "bn_bias", "bn_mean", "bn_var", "residual"]
where      = ["device.arch == 90", "x.ndim == 4", "weight.ndim == 4", "y.ndim == 4", "groups == 1", "y.numel >= 1", "c % 8 == 0", "c >= 8",
              "y.itemsize == 2", "weight.itemsize == 2", "weight.shape[1] == c",
              "x.stride[1] == 1", "xp % 8 == 0", "x.stride[2] == wi * xp", "x.stride[0] == hi * wi * xp", "npix <= 2000000000",
              "y.stride[1] == 1", "y.stride[3] == oc", "y.stride[2] == wo * oc", "y.stride[0] == ho * wo * oc", "total <= 2000000000",
              "weight.stride[1] == 1", "weight.stride[0] == taps * c",
              "(kw == 1) + (weight.stride[3] == c) >= 1", "(kh == 1) + (weight.stride[2] == kw * c) >= 1",
              "residual.contiguous + HAS_RESIDUAL <= 1", "items <= 2000000000", "kblocks <= 100000000",
              "(BN == 64) + (oc > 64) >= 1", "xst >= 2"]
dims       = { c = "x.shape[1]", hi = "x.shape[2]", wi = "x.shape[3]", xp = "x.stride[3]", npix = "x.shape[0] * x.shape[2] * x.shape[3]", oc = "weight.shape[0]", kh = "weight.shape[2]", kw = "weight.shape[3]", taps = "kh * kw", ho = "y.shape[2]", wo = "y.shape[3]", total = "y.shape[0] * y.shape[2] * y.shape[3]", kblocks = "ceil_div(c, 64) * taps", tiles_n = "ceil_div(oc, BN)", items = "ceil_div(total, 64 * NWG) * tiles_n", span = "64 * NWG + ceil_div(64 * NWG - 1, max(1, wo)) * max(0, wi - wo) + ceil_div(64 * NWG - 1, max(1, ho * wo)) * max(0, hi - ho) * wi + (kh - 1) * dilation[0] * wi + (kw - 1) * dilation[1]", budget = "(device.smem_per_block - 4096 - WST * BN * 128 - NWG * BN * 32) // 128", slab = "(stride[0] == 1) * (stride[1] == 1) * (wo <= wi) * (ho <= hi) * (2 * span <= budget) * (span <= taps * 64 * NWG)", rows = "slab * span + (1 - slab) * 64 * NWG", xst = "min(4, budget // rows)" }
tune       = { NWG = [3, 2], BN = [128, 64], WST = [4] }
[[tensor_map]]
name = "w_map"
over = "weight"
dims = ["c", "taps", "oc"]
strides = ["c * 2", "taps * c * 2"]
box = ["64", "1", "BN"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[launch]]
kernel = "conv"
grid = ["min(device.sms, items)"]
block = ["128 * NWG + 128"]
smem = "1024 + WST * BN * 128 + NWG * BN * 32 + 128 + xst * rows * 128"
args = ["w_map", "x", "weight", "bias", "bn_weight", "bn_bias", "bn_mean", "bn_var", "residual", "y", "c", "oc", "hi", "wi", "ho", "wo",
        "kh", "kw", "npix", "total", "items", "tiles_n", "kblocks", "slab", "rows", "xst", "xp",
        "min(4294967295, 4294967296 // (ho * wo))", "min(4294967295, 4294967296 // wo)"]
---*/
// Convolution in channels_last with its epilogue: implicit GEMM, M = consecutive output pixels (n, oy, ox), 64 a warpgroup; N = output
// channels; K = blocks of 64 input channels outside, taps inside. The input pixels in shared memory ("rows", 128 bytes = 64 channels,
// 16-byte chunks XORed by row) are, with stride 1, one slab of consecutive pixels that serves all taps of a channel block; otherwise one row per
// output pixel and tap. A lane owns one pixel and passes the address of its row for a tap (or of a row of zeros in the padding) to
// ldmatrix: A of wgmma in registers. Weights: TMA, own ring. Padding multiplies zeros: NaN sums of pixels that touch it are made again.
#define BM (64 * NWG)
#define XMAX 4

template <class A, class B> struct Same { enum { value = 0 }; };
template <class A> struct Same<A, A> { enum { value = 1 }; };

// d (64 x BN) += a (64 x 16, registers) * b (BN x 16)^T
#if BN == 64
#define WGMMA(E) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." E "." E " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
        "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#endif
#if BN == 128
#define WGMMA(E) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." E "." E " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
        "{%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#endif
__device__ __forceinline__ void wgmma_rs(float (&d)[BN / 2], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (Same<T, bfloat16>::value) WGMMA("bf16");
    else WGMMA("f16");
}
__device__ __forceinline__ void tma_weights(void* smem, const TensorMap& map, uint64_t* full, int c0, int tap, int row) {
    mbarrier_arrive_expect(full, BN * 128);
    tma_load_3d(smem, map, full, c0, tap, row);
}
__device__ __forceinline__ void cp_async_arrive(uint64_t* barrier) {  // when all of this thread's copies so far have landed
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(barrier)) : "memory");
}
// p = q * d + rest; magic is 2^32 / d, rounded down
__device__ __forceinline__ void divide(uint32_t p, uint32_t d, uint32_t magic, uint32_t& q, uint32_t& rest) {
    q = __umulhi(p, magic);
    rest = p - q * d;
    if (rest >= d) ++q, rest -= d;
}
// what follows the convolution; f: bias - mean, 1 / sqrt(var + eps), weight, bias of the norm
__device__ __forceinline__ float finish(float v, const Vec<float, 4>& f, float residual) {
#if OP_BATCH_NORM
    v = fmaf((v + f[0]) * f[1], f[2], f[3]);
#elif HAS_BIAS
    v += f[0];
#endif
#if HAS_RESIDUAL
    v += residual;
#endif
#if OP_RELU
    v = v < 0.0f ? 0.0f : v;  // NaN stays
#elif OP_SILU
    v = v / (1.0f + expf(-v));
#elif OP_HARDSWISH
    v = v * fminf(fmaxf(v + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
#endif
    return v;
}
__device__ __forceinline__ uint32_t pack(float a, float b) {
    if constexpr (Same<T_y, half>::value) {
        const half2 v = __floats2half2_rn(a, b);
        return *reinterpret_cast<const uint32_t*>(&v);
    } else {
        const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
        return *reinterpret_cast<const uint32_t*>(&v);
    }
}
__device__ __forceinline__ float2 unpack(uint32_t v) {
    if constexpr (Same<T_y, half>::value) return __half22float2(*reinterpret_cast<const half2*>(&v));
    else return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v));
}
// 4 x 4 among the lanes of a quad: u[i] of lane t becomes u[t] of lane i
__device__ __forceinline__ void quad_transpose(uint32_t (&u)[4], int t) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, t & 1 ? u[i] : u[i + 1], 1);
        if (t & 1) u[i] = got; else u[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, t & 2 ? u[i] : u[i + 2], 2);
        if (t & 2) u[i] = got; else u[i + 2] = got;
    }
}
__device__ __forceinline__ void store16(void* to, const uint32_t (&u)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(u[0]), "r"(u[1]), "r"(u[2]), "r"(u[3]) : "memory");
}
struct Where { int n, oy, ox; };
__device__ __forceinline__ Where locate(uint32_t p, int hw, int wo, uint32_t magic_hw, uint32_t magic_w) {
    uint32_t n, q, oy, ox;
    divide(p, hw, magic_hw, n, q);
    divide(q, wo, magic_w, oy, ox);
    return {int(n), int(oy), int(ox)};
}

extern "C" __global__ void __launch_bounds__(128 * NWG + 128, 1)
conv(const __grid_constant__ TensorMap w_map, const T* __restrict__ x, const T_weight* __restrict__ weight, const T_bias* __restrict__ bias,
     const T_bn_weight* __restrict__ bn_weight, const T_bn_bias* __restrict__ bn_bias, const T_bn_mean* __restrict__ bn_mean,
     const T_bn_var* __restrict__ bn_var, const T_residual* __restrict__ residual, T_y* __restrict__ y, int c, int oc, int hi, int wi, int ho,
     int wo, int kh, int kw, int npix, int total, int items, int tiles_n, int kblocks, int slab, int rows, int xst, long long xp,
     long long magic_hw64, long long magic_w64) {
    extern __shared__ uint8_t raw[];
    __shared__ uint64_t w_full[WST], w_empty[WST], x_full[XMAX], x_empty[XMAX];
    uint8_t* w_ring = raw + ((1024u - (smem_address(raw) & 1023u)) & 1023u);
    uint8_t* table = w_ring + WST * BN * 128;           // per warpgroup and parity of tile: BN times what `finish` wants
    uint8_t* zeros = table + NWG * BN * 32;             // 128 bytes
    uint8_t* x_ring = zeros + 128;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stage_bytes = rows * 128, hw = ho * wo;
    const uint32_t magic_hw = uint32_t(magic_hw64), magic_w = uint32_t(magic_w64);

    if (threadIdx.x < 32) reinterpret_cast<uint32_t*>(zeros)[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        for (int s = 0; s < WST; ++s) {
            mbarrier_init(&w_full[s], 1);
            mbarrier_init(&w_empty[s], NWG * 4);
        }
        for (int s = 0; s < xst; ++s) {
            mbarrier_init(&x_full[s], 96);
            mbarrier_init(&x_empty[s], NWG * 128);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warp >= NWG * 4) {
        setmaxnreg_dec<56>();
        if (warp == NWG * 4) {
            if (lane == 0) {  // weights
                tma_prefetch(w_map);
                const int taps = kh * kw;
                int s = 0, phase = 1;
                for (int item = blockIdx.x; item < items; item += gridDim.x) {
                    const int row = item % tiles_n * BN;
                    int c0 = 0, tap = 0;
#pragma unroll 1
                    for (int k = 0; k < kblocks; ++k) {
                        mbarrier_wait(&w_empty[s], phase);
                        tma_weights(w_ring + s * (BN * 128), w_map, &w_full[s], c0, tap, row);
                        if (++tap == taps) tap = 0, c0 += 64;
                        if (++s == WST) s = 0, phase ^= 1;
                    }
                }
            }
        } else {  // pixels
            const int t = threadIdx.x - NWG * 128 - 32, chunk = t % 8, first = t / 8;
            int s = 0, phase = 1;
            if (slab) {
                for (int item = blockIdx.x; item < items; item += gridDim.x) {
                    const Where at = locate(uint32_t(item / tiles_n) * BM, hw, wo, magic_hw, magic_w);
                    const int lo = (at.n * hi + at.oy - P_PADDING_0) * wi + at.ox - P_PADDING_1;
#pragma unroll 1
                    for (int c0 = chunk * 8; c0 - chunk * 8 < c; c0 += 64) {
                        mbarrier_wait(&x_empty[s], phase);
                        const uint32_t stage = smem_address(x_ring) + s * stage_bytes;
                        const T* from = x + c0;
                        const bool in = c0 < c;
#pragma unroll 4
                        for (int j = first; j < rows; j += 12) {
                            const int pixel = lo + j;
                            const bool ok = in && uint32_t(pixel) < uint32_t(npix);
                            const T* source = ok ? from + pixel * xp : x;
                            asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                                         ::"r"(stage + j * 128 + ((chunk ^ (j & 7)) << 4)), "l"(source), "r"(ok ? 16 : 0) : "memory");
                        }
                        cp_async_arrive(&x_full[s]);
                        if (++s == xst) s = 0, phase ^= 1;
                    }
                }
            } else {
                for (int item = blockIdx.x; item < items; item += gridDim.x) {
                    const uint32_t p0 = uint32_t(item / tiles_n) * BM;
                    int r = 0, q = 0, c0 = chunk * 8;
#pragma unroll 1
                    for (int k = 0; k < kblocks; ++k) {
                        mbarrier_wait(&x_empty[s], phase);
                        const uint32_t stage = smem_address(x_ring) + s * stage_bytes;
                        const T* from = x + c0;
                        const bool in = c0 < c;
#pragma unroll 2
                        for (int j = first; j < BM; j += 12) {
                            const Where at = locate(p0 + j, hw, wo, magic_hw, magic_w);
                            const int iy = at.oy * P_STRIDE_0 - P_PADDING_0 + r * P_DILATION_0;
                            const int ix = at.ox * P_STRIDE_1 - P_PADDING_1 + q * P_DILATION_1;
                            const bool ok = in && p0 + j < uint32_t(total) && uint32_t(iy) < uint32_t(hi) && uint32_t(ix) < uint32_t(wi);
                            const T* source = ok ? from + ((at.n * hi + iy) * wi + ix) * xp : x;
                            asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                                         ::"r"(stage + j * 128 + ((chunk ^ (j & 7)) << 4)), "l"(source), "r"(ok ? 16 : 0) : "memory");
                        }
                        cp_async_arrive(&x_full[s]);
                        if (++s == xst) s = 0, phase ^= 1;
                        if (++q == kw) {
                            q = 0;
                            if (++r == kh) r = 0, c0 += 64;
                        }
                    }
                }
            }
            asm volatile("cp.async.wait_all;" ::: "memory");
        }
    } else {
        setmaxnreg_inc<(NWG == 3 ? 152 : 224)>();
        const int group = warp / 4, g = lane / 4, t = lane % 4;
        const int local = warp * 16 + lane % 16;                 // this lane's pixel of the tile, for ldmatrix
        const uint32_t half_k = uint32_t(lane / 16) << 4;
        const uint32_t zero_row = smem_address(zeros), x_base = smem_address(x_ring);
        float acc[BN / 2];
        uint32_t a0[4][4], a1[4][4];
        int ws = 0, w_phase = 0, xs = 0, x_phase = 0, parity = 0;
        for (int item = blockIdx.x; item < items; item += gridDim.x, parity ^= 1) {
            const int n0 = item % tiles_n * BN;
            const uint32_t p0 = uint32_t(item / tiles_n) * BM;
            Vec<float, 4>* const mine = reinterpret_cast<Vec<float, 4>*>(table) + (group * 2 + parity) * BN;
            for (int i = threadIdx.x % 128; i < BN; i += 128) {
                const int ch = n0 + i;
                Vec<float, 4> f = {{0.0f, 1.0f, 1.0f, 0.0f}};
                if (ch < oc) {
#if HAS_BIAS
                    f[0] = to_float(bias[ch]);
#endif
#if OP_BATCH_NORM
                    f[0] -= to_float(bn_mean[ch]);
                    f[1] = 1.0f / sqrtf(to_float(bn_var[ch]) + float(P_BATCH_NORM_EPS));
#if HAS_BN_WEIGHT
                    f[2] = to_float(bn_weight[ch]);
#endif
#if HAS_BN_BIAS
                    f[3] = to_float(bn_bias[ch]);
#endif
#endif
                }
                mine[i] = f;
            }
            int iy0 = -(1 << 28), ix0 = 0, row = local;          // outside everything: no pixel
            if (slab) {
                const Where first = locate(p0, hw, wo, magic_hw, magic_w);
                if (p0 + local < uint32_t(total)) {
                    const Where at = locate(p0 + local, hw, wo, magic_hw, magic_w);
                    iy0 = at.oy - P_PADDING_0;
                    ix0 = at.ox - P_PADDING_1;
                    row = ((at.n - first.n) * hi + at.oy - first.oy) * wi + at.ox - first.ox;
                }
            } else {
                iy0 = 0;  // the producer has filled in the zeros
            }
            int r = 0, q = 0, shift = 0;
            bool fresh = true;
            // the next k-block of this warp's 16 pixels
            auto load = [&](uint32_t (&a)[4][4]) {
                if (fresh) mbarrier_wait(&x_full[xs], x_phase);
                int at = row;
                bool ok = true, last = true;
                if (slab) {
                    at += shift;
                    ok = uint32_t(iy0 + r * P_DILATION_0) < uint32_t(hi) && uint32_t(ix0 + q * P_DILATION_1) < uint32_t(wi);
                    ++q;
                    shift += P_DILATION_1;
                    last = false;
                    if (q == kw) {
                        q = 0;
                        ++r;
                        shift += P_DILATION_0 * wi - kw * P_DILATION_1;
                        if (r == kh) r = 0, shift = 0, last = true;
                    }
                }
                const uint32_t from = ok ? x_base + xs * stage_bytes + at * 128 : zero_row;
                const uint32_t flip = (ok ? uint32_t(at & 7) << 4 : 0u) ^ half_k;
#pragma unroll
                for (int u = 0; u < 4; ++u)
                    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(a[u][0]), "=r"(a[u][1]), "=r"(a[u][2]), "=r"(a[u][3]) : "r"(from + (flip ^ (u << 5))) : "memory");
                fresh = last;
                if (last) {
                    mbarrier_arrive(&x_empty[xs]);
                    if (++xs == xst) xs = 0, x_phase ^= 1;
                }
            };
            auto issue = [&](uint32_t (&a)[4][4]) {
                mbarrier_wait(&w_full[ws], w_phase);
                const uint64_t b = wgmma_descriptor_128(w_ring + ws * (BN * 128));
                wgmma_fence();
#pragma unroll
                for (int u = 0; u < 4; ++u) wgmma_rs(acc, a[u], b + 2 * u);
                wgmma_commit();
            };
            auto retire = [&](uint32_t (&a)[4][4]) {
                wgmma_wait<0>();
                if (oc < 0) {  // never: keeps a alive until here
#pragma unroll
                    for (int u = 0; u < 4; ++u)
                        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(zero_row + 16 * u), "r"(a[u][0]), "r"(a[u][1]), "r"(a[u][2]), "r"(a[u][3]) : "memory");
                }
                if (lane == 0) mbarrier_arrive(&w_empty[ws]);
                if (++ws == WST) ws = 0, w_phase ^= 1;
            };
#pragma unroll
            for (int i = 0; i < BN / 2; ++i) acc[i] = 0.0f;
            load(a0);
            int k = 0;
#pragma unroll 1
            for (; k + 2 < kblocks; k += 2) {
                issue(a0);
                load(a1);
                retire(a0);
                issue(a1);
                load(a0);
                retire(a1);
            }
            if (k + 1 < kblocks) {
                issue(a0);
                load(a1);
                retire(a0);
                issue(a1);
                retire(a1);
            } else {
                issue(a0);
                retire(a0);
            }
#if P_PADDING_0 || P_PADDING_1
            uint32_t bad_lo = 0, bad_hi = 0;
#pragma unroll
            for (int i = 0; i < BN / 2; ++i) {
                uint32_t& word = i < 32 ? bad_lo : bad_hi;
                word |= acc[i] != acc[i] ? 1u << i % 32 : 0u;
                if (i % 4 == 3) asm volatile("" : "+r"(word));
            }
#endif
            barrier_sync(1 + group, 128);  // the table is written
            const uint32_t p_low = p0 + warp * 16 + g;  // acc[4 j + 2 h + e] is pixel p_low + 8 h, channel n0 + 8 j + 2 t + e
            const bool whole = oc % 8 == 0;              // 16 bytes at a time
#pragma unroll
            for (int J = 0; J < BN / 8; J += 4) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const uint32_t p = p_low + 8 * h;
                    const long long line = (long long)p * oc;
                    int ch = n0 + 8 * J;
                    asm volatile("" : "+r"(ch)::"memory");  // in this order, not all loads at once
                    const bool ok = whole && p < uint32_t(total) && ch + 8 * t < oc;
                    uint32_t add[4] = {0, 0, 0, 0}, out[4];
#if HAS_RESIDUAL
                    if (ok)
                        asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                                     : "=r"(add[0]), "=r"(add[1]), "=r"(add[2]), "=r"(add[3]) : "l"(residual + line + ch + 8 * t));
                    quad_transpose(add, t);
                    if (!whole) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int at = ch + 8 * i + 2 * t;
                            float u[2] = {0.0f, 0.0f};
#pragma unroll
                            for (int e = 0; e < 2; ++e)
                                if (p < uint32_t(total) && at + e < oc) u[e] = to_float(residual[line + at + e]);
                            add[i] = pack(u[0], u[1]);
                        }
                    }
#endif
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int at = 8 * (J + i) + 2 * t;
                        const float2 extra = unpack(add[i]);
                        out[i] = pack(finish(acc[4 * (J + i) + 2 * h], mine[at], extra.x), finish(acc[4 * (J + i) + 2 * h + 1], mine[at + 1], extra.y));
                    }
                    if (whole) {
                        quad_transpose(out, t);
                        if (ok) store16(y + line + ch + 8 * t, out);
                    } else {
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            const int at = ch + 8 * i + 2 * t;
                            uint16_t* to = reinterpret_cast<uint16_t*>(y) + line + at;
                            if (p < uint32_t(total) && at < oc) to[0] = uint16_t(out[i]);
                            if (p < uint32_t(total) && at + 1 < oc) to[1] = uint16_t(out[i] >> 16);
                        }
                    }
                }
            }
#if P_PADDING_0 || P_PADDING_1
            __syncwarp();
            uint64_t bad = uint64_t(bad_hi) << 32 | bad_lo;
            while (bad) {  // NaN sums of pixels that touch the padding, where zero times Inf may have come in: again, plainly
                const int i = __ffsll((long long)bad) - 1;
                bad &= bad - 1;
                const uint32_t p = p_low + 8 * (i / 2 % 2);
                const int at = 8 * (i / 4) + 2 * t + i % 2;
                if (p >= uint32_t(total) || n0 + at >= oc) continue;
                const Where px = locate(p, hw, wo, magic_hw, magic_w);
                const int iy = px.oy * P_STRIDE_0 - P_PADDING_0, ix = px.ox * P_STRIDE_1 - P_PADDING_1;
                if (iy >= 0 && ix >= 0 && iy + (kh - 1) * P_DILATION_0 < hi && ix + (kw - 1) * P_DILATION_1 < wi) continue;
                float sum = 0.0f;
#pragma unroll 1
                for (int rr = 0; rr < kh; ++rr) {
                    if (uint32_t(iy + rr * P_DILATION_0) >= uint32_t(hi)) continue;
#pragma unroll 1
                    for (int qq = 0; qq < kw; ++qq) {
                        if (uint32_t(ix + qq * P_DILATION_1) >= uint32_t(wi)) continue;
                        const T* u = x + ((px.n * hi + iy + rr * P_DILATION_0) * wi + ix + qq * P_DILATION_1) * xp;
                        const T_weight* v = weight + ((long long)(n0 + at) * (kh * kw) + rr * kw + qq) * c;
                        float part = 0.0f;
#pragma unroll 1
                        for (int e = 0; e < c; e += 8) {
                            const auto uu = load_vec<8>(u + e);
                            const auto vv = load_vec<8>(v + e);
                            float eight = 0.0f;
#pragma unroll
                            for (int m = 0; m < 8; ++m) eight = fmaf(to_float(uu[m]), to_float(vv[m]), eight);
                            part += eight;
                        }
                        sum += part;
                    }
                }
                const long long to = (long long)p * oc + n0 + at;
                float extra = 0.0f;
#if HAS_RESIDUAL
                extra = to_float(residual[to]);
#endif
                y[to] = from_float<T_y>(finish(sum, mine[at], extra));
            }
            __syncwarp();
#endif
        }
    }
}
