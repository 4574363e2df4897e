/*---
implements = "conv2d.relu.max_pool2d"
target     = "cuda"
dtypes     = ["float16", "bfloat16"]
optional   = ["bias"]
where      = ["device.arch == 90", "x.ndim == 4", "groups == 1", "n >= 1", "poh >= 1", "pow >= 1", "oh >= 1", "ow >= 1",
              "stride[0] == 1", "stride[1] == 1", "dilation[0] >= 1", "dilation[1] >= 1", "padding[0] >= 0", "padding[1] >= 0",
              "weight.shape[1] == c", "c >= 16", "c % 16 == 0", "oc % 8 == 0", "kh <= 7", "kw <= 7",
              "x.stride[1] == 1", "x.stride[3] % 8 == 0", "x.stride[2] % 8 == 0", "x.stride[0] % 8 == 0", "x.stride[3] >= c",
              "x.stride[2] >= x.stride[3]", "x.stride[0] >= x.stride[3]",
              "y.stride[1] == 1", "y.stride[3] % 8 == 0", "y.stride[2] % 8 == 0", "y.stride[0] % 8 == 0", "y.stride[3] >= oc",
              "y.stride[2] >= y.stride[3]", "y.stride[0] >= y.stride[3]",
              "weight.stride[1] == 1", "weight.stride[3] % 8 == 0", "weight.stride[0] % 8 == 0", "weight.stride[3] >= c",
              "weight.stride[2] == kw * weight.stride[3]", "bias.contiguous",
              "pk == max_pool2d_kernel_size[1]", "pk >= 2", "pk <= 3", "max_pool2d_stride[0] == 2", "max_pool2d_stride[1] == 2",
              "max_pool2d_padding[0] <= 1", "max_pool2d_padding[1] <= 1", "max_pool2d_dilation[0] == 1", "max_pool2d_dilation[1] == 1",
              "RESIDENT == fits", "nb >= 2", "boxw <= 256", "boxh <= 256", "octiles <= device.sms", "ptiles < 1073741824", "c * taps < 1073741824",
              "(NT != 112) + (poh % 14 > 0) * (poh <= 42) >= 1"]
tune       = { NT = [256, 224, 112], HALO = [1, 0], RESIDENT = [1, 0] }
static     = ["kh", "kw"]
[dims]
n = "x.shape[0]"
c = "x.shape[1]"
oc = "weight.shape[0]"
kh = "weight.shape[2]"
kw = "weight.shape[3]"
taps = "kh * kw"
hh = "x.shape[2]"
ww = "x.shape[3]"
oh = "hh + 2 * padding[0] - dilation[0] * (kh - 1)"
ow = "ww + 2 * padding[1] - dilation[1] * (kw - 1)"
pk = "max_pool2d_kernel_size[0]"
poh = "y.shape[2]"
pow = "y.shape[3]"
pwt = "(8 - pk) // 2 + 1"
pht = "(NT // 8 - pk) // 2 + 1"
boxw = "8 + HALO * (kw - 1) * dilation[1]"
boxh = "NT // 8 + (kh - 1) * dilation[0]"
slot = "ceil_div(boxw * boxh * 128, 1024) * 1024"
fits = "(c <= 64) * ((212992 - taps * 8192) // slot >= 2)"
nb = "(212992 - (RESIDENT * taps + (1 - RESIDENT) * 6) * 8192) // slot"
tiles_x = "ceil_div(pow, pwt)"
tiles_y = "ceil_div(poh, pht)"
ptiles = "tiles_x * tiles_y * n"
pairs = "ceil_div(ptiles, 2)"
octiles = "ceil_div(oc, 64)"
[[tensor_map]]
name = "x_map"
over = "x"
dims = ["c", "ww", "hh", "n"]
strides = ["x.stride[3] * 2", "x.stride[2] * 2", "x.stride[0] * 2"]
box = ["64", "boxw", "boxh", "1"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "w_map"
over = "weight"
dims = ["c", "taps", "oc"]
strides = ["weight.stride[3] * 2", "weight.stride[0] * 2"]
box = ["64", "1", "64"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "y_map"
over = "y"
dims = ["oc", "pow", "poh", "n"]
strides = ["y.stride[3] * 2", "y.stride[2] * 2", "y.stride[0] * 2"]
box = ["64", "pwt", "pht", "1"]
swizzle = "128"
l2 = "none"
oob = "zero"
[[launch]]
kernel = "conv_relu_pool"
grid = ["min(pairs, device.sms // octiles) * octiles"]
block = ["384"]
smem = "229376 + 1024"
args = ["x_map", "w_map", "y_map", "x", "weight", "bias", "y", "x.stride[0]", "x.stride[2]", "x.stride[3]", "weight.stride[0]", "weight.stride[3]",
        "n", "c", "hh", "ww", "oc", "oh", "ow", "poh", "pow", "tiles_x", "tiles_y", "ptiles", "pairs", "octiles"]
---*/
// Convolution (stride 1) + bias + ReLU + max pool (2x2 or 3x3, stride 2), half precision, channels last, one kernel.
// D[64 output channels][NT pixels] = W[64][64 c] * X[NT][64 c]^T, summed over taps and blocks of 64 channels. The pixels of a tile are 8 wide and
// NT / 8 high, so a thread holds the columns 2 q, 2 q + 1 (q = lane % 4) of every row: pooling stays in registers (3x3: one shuffle).
// HALO: one haloed box (128B swizzle, zero fill is the padding) serves all taps; a tap moves the descriptor's start by whole rows of 128 bytes, the
// stride between groups of 8 pixels is the pitch of the box. The swizzle is a function of the address. HALO = 0: a box per kx, 8 wide.
// RESIDENT: the weights of all taps stay in shared memory (c <= 64); the two consumer warpgroups take turns, one's epilogue runs under the other's
// products. Otherwise both run side by side on two tiles and share a ring of weight slots.

enum : int { PK = P_MAX_POOL2D_KERNEL_SIZE_0, PPH = P_MAX_POOL2D_PADDING_0, PPW = P_MAX_POOL2D_PADDING_1 };
enum : int { DH = P_DILATION_0, DW = P_DILATION_1, PADH = P_PADDING_0, PADW = P_PADDING_1 };
enum : int { ROWS = NT / 8, PW = (8 - PK) / 2 + 1, PH = (ROWS - PK) / 2 + 1 };  // of a tile; pooled
enum : bool { MASK = PPH != 0 || PPW != 0 || P_MAX_POOL2D_CEIL_MODE != 0 };     // windows may hold places outside of the convolution
enum : int { TAPS = KH * KW, EXTW = 8 + (KW - 1) * DW, BOXH = ROWS + (KH - 1) * DH };
enum : int { BOXW = HALO ? EXTW : 8, STAGES = HALO ? 1 : KW, TPS = TAPS / STAGES };  // boxes per 64 channels, taps per box
enum : int { B_BYTES = BOXW * BOXH * 128, B_SLOT = (B_BYTES + 1023) / 1024 * 1024 };
enum : int { W_SLOT = 8192, NW = RESIDENT ? TAPS : 6, NB0 = (212992 - NW * W_SLOT) / B_SLOT, NB = NB0 < 8 ? NB0 : 8 };
enum : int { NWB = RESIDENT ? 1 : NW };        // barriers for weights
enum : int { PAIRS2 = (NT / 16 + 1) / 2 };     // pairs of pooled rows
static_assert(NB >= 2 && TAPS * 8192 < (1 << 20), "shared memory");

template <class E> struct IsHalf { enum : bool { value = false }; };
template <> struct IsHalf<half> { enum : bool { value = true }; };

// d (64 x NT, fp32) = [d +] a (64 x 16) * b (NT x 16)^T
#if NT == 256
#define WGMMA(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
        "%128, %129, p, 1, 1, 0, 0;\n}" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
          "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
          "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
          "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
          "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), \
          "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
          "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
          "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127]) \
        : "l"(a), "l"(b), "r"(accumulate))
#elif NT == 224
#define WGMMA(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %114, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n224k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111}, " \
        "%112, %113, p, 1, 1, 0, 0;\n}" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
          "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
          "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
          "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
          "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), \
          "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]) \
        : "l"(a), "l"(b), "r"(accumulate))
#elif NT == 112
#define WGMMA(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %58, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n112k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55}, " \
        "%56, %57, p, 1, 1, 0, 0;\n}" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]) \
        : "l"(a), "l"(b), "r"(accumulate))
#endif
__device__ __forceinline__ void wgmma_tile(float (&d)[NT / 2], uint64_t a, uint64_t b, int accumulate) {
    if constexpr (IsHalf<T>::value) WGMMA("f16");
    else WGMMA("bf16");
}
// keeps the compiler from moving uses of the accumulators above the wait in front of this
__device__ __forceinline__ void pin(float (&d)[NT / 2]) {
#pragma unroll
    for (int i = 0; i < NT / 2; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
__device__ __forceinline__ float max_nan(float a, float b) {
    float m;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
    return m;
}
__device__ __forceinline__ uint32_t pack(float a, float b) {  // a in the low half
    uint32_t r;
    if constexpr (IsHalf<T>::value) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
}
__device__ __forceinline__ void stmatrix_x2_trans(uint32_t address, uint32_t a, uint32_t b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void tma_store_4d(const TensorMap& map, const void* smem, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 ::"l"(&map), "r"(smem_address(smem)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

extern "C" __global__ void __launch_bounds__(384, 1)
conv_relu_pool(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap y_map,
               const T_x* __restrict__ x, const T_weight* __restrict__ weight, const T_bias* __restrict__ bias, T_y* __restrict__ y,
               long long xs_n, long long xs_h, long long xs_w, long long ws_o, long long ws_t,
               int n, int c, int h, int w, int oc, int oh, int ow, int poh, int pow_, int tiles_x, int tiles_y, int ptiles, int pairs, int octiles) {
    extern __shared__ uint8_t raw[];
    __shared__ __align__(8) uint64_t full_b[NB], empty_b[NB], full_w[NWB], empty_w[NWB], turn[2];
    uint8_t* ring_w = raw + ((1024u - (smem_address(raw) & 1023u)) & 1023u);
    uint8_t* staging = ring_w + NW * W_SLOT;  // 8 KiB a consumer warpgroup
    uint8_t* ring_b = staging + 16384;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int s = 0; s < NB; ++s) {
            mbarrier_init(&full_b[s], 1);
            mbarrier_init(&empty_b[s], 4);
        }
        for (int s = 0; s < NWB; ++s) {
            mbarrier_init(&full_w[s], 1);
            mbarrier_init(&empty_w[s], 8);
        }
        mbarrier_init(&turn[0], 4);
        mbarrier_init(&turn[1], 4);
        mbarrier_init_fence();
        tma_prefetch(x_map);
        tma_prefetch(w_map);
        tma_prefetch(y_map);
    }
    __syncthreads();
    const int cblocks = RESIDENT ? 1 : ceil_div(c, 64);
    const int oc0 = int(blockIdx.x) % octiles * 64, first = int(blockIdx.x) / octiles, step = int(gridDim.x) / octiles;

    if (warp >= 8) {
        setmaxnreg_dec<40>();
        if (warp == 8 && lane == 0) {
            int sb = 0, pb = 1;
            const auto load_pixels = [&](int tile, int cb, int s) {
                const int x0 = tile % tiles_x * (2 * PW) - PPW - PADW + (HALO ? 0 : s * DW);
                const int y0 = tile / tiles_x % tiles_y * (2 * PH) - PPH - PADH;
                const int n0 = tile / tiles_x / tiles_y;  // beyond the last image: zeros
                mbarrier_wait(&empty_b[sb], pb);
                mbarrier_arrive_expect(&full_b[sb], B_BYTES);
                tma_load_4d(ring_b + sb * B_SLOT, x_map, &full_b[sb], cb * 64, x0, y0, n0);
                if (++sb == NB) sb = 0, pb ^= 1;
            };
#if RESIDENT
            mbarrier_arrive_expect(&full_w[0], TAPS * W_SLOT);
            for (int t = 0; t < TAPS; ++t) tma_load_3d(ring_w + t * W_SLOT, w_map, &full_w[0], 0, t, oc0);
#pragma unroll 1
            for (int pair = first; pair < pairs; pair += step)
#pragma unroll 1
                for (int i = 0; i < 2 * STAGES; ++i) load_pixels(2 * pair + i / STAGES, 0, i % STAGES);
#else
            int sw = 0, pw = 1;
#pragma unroll 1
            for (int pair = first; pair < pairs; pair += step)
#pragma unroll 1
                for (int cb = 0; cb < cblocks; ++cb)
#pragma unroll 1
                    for (int s = 0; s < STAGES; ++s) {
                        load_pixels(2 * pair, cb, s);
                        load_pixels(2 * pair + 1, cb, s);
#pragma unroll 1
                        for (int i = 0; i < TPS; ++i) {
                            const int kx = HALO ? i / KH : s, ky = i % KH;
                            mbarrier_wait(&empty_w[sw], pw);
                            mbarrier_arrive_expect(&full_w[sw], W_SLOT);
                            tma_load_3d(ring_w + sw * W_SLOT, w_map, &full_w[sw], cb * 64, ky * KW + kx, oc0);
                            if (++sw == NW) sw = 0, pw ^= 1;
                        }
                    }
#endif
        }
    } else {
        setmaxnreg_inc<232>();
        const int group = warp / 4, part = warp % 4;
        const uint64_t a_base = wgmma_descriptor_128(ring_w);
        // 128B swizzle, groups of 8 pixels one box row (of BOXW pixels) apart
        const uint64_t b_base = (uint64_t(smem_address(ring_b) & 0x3ffff) >> 4) | (uint64_t(1) << 16) | (uint64_t(BOXW * 8) << 32) | (uint64_t(1) << 62);
        uint8_t* out = staging + group * 8192;
        float shift[2] = {0.0f, 0.0f};
#if HAS_BIAS
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int o = oc0 + part * 16 + lane / 4 + 8 * r;
            if (o < oc) shift[r] = to_float(bias[o]);
        }
#endif
        float d[NT / 2];
        int sb = 0, pb = 0, round = 0;
        const auto advance = [&](int by) {
#pragma unroll
            for (int i = 0; i < by; ++i)
                if (++sb == NB) sb = 0, pb ^= 1;
        };
        const auto release = [&](uint64_t* barrier) {
            if (lane == 0) mbarrier_arrive(barrier);
        };
        if (group == 1) advance(RESIDENT ? STAGES : 1);
#if !RESIDENT
        int sw = 0, pw = 0;
#endif
#pragma unroll 1
        for (int pair = first; pair < pairs; pair += step, ++round) {
#if RESIDENT
            mbarrier_wait(&full_w[0], 0);
            mbarrier_wait(&turn[group], (round & 1) ^ (group == 0 ? 1 : 0));
            int last = 0;
#pragma unroll
            for (int s = 0; s < STAGES; ++s) {
                mbarrier_wait(&full_b[sb], pb);
                const uint64_t b = b_base + sb * (B_SLOT / 16);
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < TPS; ++i) {
                    const int kx = HALO ? i / KH : s, ky = i % KH;
                    const int tap = ky * KW + kx, pixel = ky * DH * BOXW + (HALO ? kx * DW : 0);
#pragma unroll
                    for (int q = 0; q < 4; ++q) wgmma_tile(d, a_base + (tap * (W_SLOT / 16) + 2 * q), b + (pixel * 8 + 2 * q), (s | i | q) != 0);
                }
                wgmma_commit();
                if (s > 0) {
                    wgmma_wait<1>();
                    release(&empty_b[last]);
                }
                last = sb;
                advance(1);
            }
            release(&turn[1 - group]);  // all products are on their way: the other warpgroup may follow
            wgmma_wait<0>();
            release(&empty_b[last]);
            advance(STAGES);  // those of the other warpgroup
#else
#pragma unroll 1
            for (int cb = 0; cb < cblocks; ++cb) {
#pragma unroll
                for (int s = 0; s < STAGES; ++s) {
                    mbarrier_wait(&full_b[sb], pb);
                    const uint64_t b = b_base + sb * (B_SLOT / 16);
                    int last = 0;
#pragma unroll
                    for (int i = 0; i < TPS; ++i) {
                        mbarrier_wait(&full_w[sw], pw);
                        const uint64_t a = a_base + sw * (W_SLOT / 16);
                        wgmma_fence();
                        const int pixel = i % KH * DH * BOXW + (HALO ? i / KH * DW : 0);
#pragma unroll
                        for (int q = 0; q < 4; ++q) wgmma_tile(d, a + 2 * q, b + (pixel * 8 + 2 * q), (s | i | q) != 0 ? 1 : cb);
                        wgmma_commit();
                        if (i > 0) {
                            wgmma_wait<1>();
                            release(&empty_w[last]);
                        }
                        last = sw;
                        if (++sw == NW) sw = 0, pw ^= 1;
                    }
                    wgmma_wait<0>();
                    release(&empty_w[last]);
                    release(&empty_b[sb]);
                    advance(2);
                }
            }
#endif
            pin(d);

            // epilogue: d[4 j + 2 r + b] is channel oc0 + 16 part + lane / 4 + 8 r at row j, column 2 * (lane % 4) + b of the tile
            const int tile = 2 * pair + group;
            if (tile < ptiles) {
                const int px = tile % tiles_x * PW, py = tile / tiles_x % tiles_y * PH, image = tile / tiles_x / tiles_y;
                const int cx = 2 * px - PPW, cy = 2 * py - PPH;
                float v[2][2 * PAIRS2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float across[ROWS];
#pragma unroll
                    for (int j = 0; j < ROWS; ++j) {
                        float s0 = d[4 * j + 2 * r], s1 = d[4 * j + 2 * r + 1];
#if HAS_BIAS
                        s0 += shift[r];
                        s1 += shift[r];
#endif
                        if (MASK) {
                            const int column = cx + lane % 4 * 2;
                            const bool row = unsigned(cy + j) < unsigned(oh);
                            if (!(row && unsigned(column) < unsigned(ow))) s0 = -INFINITY;
                            if (!(row && unsigned(column + 1) < unsigned(ow))) s1 = -INFINITY;
                        }
                        across[j] = max_nan(s0, s1);
                        if (PK == 3) across[j] = max_nan(across[j], __shfl_down_sync(0xffffffffu, s0, 1));
                    }
#pragma unroll
                    for (int i = 0; i < 2 * PAIRS2; ++i) {
                        if (i < PH) {
                            float m = max_nan(across[2 * i], across[2 * i + 1]);
                            if (PK == 3) m = max_nan(m, across[2 * i + PK - 1 < ROWS ? 2 * i + PK - 1 : 0]);
                            v[r][i] = max_nan(m, 0.0f);
                        } else {
                            v[r][i] = 0.0f;
                        }
                    }
                }
                // In the padding 0 * Inf and 0 * NaN of the weight added NaN: where a NaN's window reaches there, again from the inputs, the warp together
                if (cx < PADW || cy < PADH || cx - PADW + EXTW > w || cy - PADH + BOXH > h) {
                    uint32_t bad = 0, any;
#pragma unroll
                    for (int r = 0; r < 2; ++r)
#pragma unroll
                        for (int i = 0; i < PH; ++i)
                            if (v[r][i] != v[r][i]) bad |= 1u << (16 * r + i);
                    if (lane % 4 >= PW || px + lane % 4 >= pow_) bad = 0;
                    if (py + PH > poh) bad &= ((1u << (poh - py)) - 1u) * 0x10001u;
                    if (oc0 + part * 16 + lane / 4 >= oc) bad &= 0xffff0000u;
                    if (oc0 + part * 16 + lane / 4 + 8 >= oc) bad &= 0x0000ffffu;
#pragma unroll 1
                    while ((any = __ballot_sync(0xffffffffu, bad != 0)) != 0) {
                        const int from = __ffs(any) - 1;
                        const int bit = __ffs(__shfl_sync(0xffffffffu, bad, from)) - 1;
                        const int o = oc0 + part * 16 + from / 4 + bit / 16 * 8;
                        const int wy = 2 * (py + bit % 16) - PPH, wx = 2 * (px + from % 4) - PPW;  // the window
                        if (wy < PADH || wx < PADW || wy - PADH + PK - 1 + (KH - 1) * DH >= h || wx - PADW + PK - 1 + (KW - 1) * DW >= w) {
                            float best = 0.0f;  // the ReLU
#pragma unroll 1
                            for (int q = 0; q < PK * PK; ++q) {
                                const int oy = wy + q / PK, ox = wx + q % PK;
                                if (oy < 0 || oy >= oh || ox < 0 || ox >= ow) continue;
                                float sum = 0.0f;
#pragma unroll 1
                                for (int k = lane; k < c * TAPS; k += 32) {
                                    const int t = k / c, ci = k - t * c;
                                    const int iy = oy - PADH + t / KW * DH, ix = ox - PADW + t % KW * DW;
                                    if (iy >= 0 && iy < h && ix >= 0 && ix < w)
                                        sum = fmaf(to_float(x[image * xs_n + iy * xs_h + ix * xs_w + ci]), to_float(weight[o * ws_o + t * ws_t + ci]), sum);
                                }
                                sum = warp_sum(sum);
#if HAS_BIAS
                                sum += to_float(bias[o]);
#endif
                                best = max_nan(best, sum);
                            }
#pragma unroll
                            for (int r = 0; r < 2; ++r)
#pragma unroll
                                for (int i = 0; i < PH; ++i)
                                    if (lane == from && bit == 16 * r + i) v[r][i] = best;
                        }
                        if (lane == from) bad &= bad - 1;
                        __syncwarp();
                    }
                }
                // [pixel][64 channels], swizzled; a matrix is 8 channels x (4 columns x 2 pooled rows), stored transposed
                if (threadIdx.x % 128 == 0) tma_store_wait<0>();
                barrier_sync(1 + group, 128);
                const int place = lane % 8, chunk = 2 * part + lane / 8 % 2, column = place / 2;
#pragma unroll
                for (int m = 0; m < PAIRS2; ++m) {
                    const int i = 2 * m + place % 2;
                    const int pixel = PK == 2 ? i * 4 + column : (column < 3 ? i * 3 + column : 48 + i);  // the last ones are not stored
                    stmatrix_x2_trans(smem_address(out) + pixel * 128 + ((chunk ^ (pixel & 7)) << 4), pack(v[0][2 * m], v[0][2 * m + 1]),
                                      pack(v[1][2 * m], v[1][2 * m + 1]));
                }
                fence_async_shared();
                barrier_sync(1 + group, 128);
                if (threadIdx.x % 128 == 0) {
                    tma_store_4d(y_map, out, oc0, px, py, image);
                    tma_store_commit();
                }
            }
        }
        if (threadIdx.x % 128 == 0) tma_store_wait<0>();
    }
}
