/*---
implements = "attention_math"
target     = "cuda"
dtypes     = ["float16", "bfloat16"]
where      = ["device.arch == 90", "q.ndim == 4", "k.ndim == 4", "v.ndim == 4", "y.ndim == 4", "mask.ndim == 4",
              "q.itemsize == 2", "k.itemsize == 2", "v.itemsize == 2", "y.itemsize == 2", "mask.itemsize == 2",
              "q.shape[3] == 64", "k.shape[3] == 64", "v.shape[3] == 64", "y.shape[3] == 64",
              "k.shape[0] == q.shape[0]", "v.shape[0] == q.shape[0]", "y.shape[0] == q.shape[0]",
              "k.shape[1] == q.shape[1]", "v.shape[1] == q.shape[1]", "y.shape[1] == q.shape[1]",
              "v.shape[2] == k.shape[2]", "y.shape[2] == q.shape[2]",
              "q.shape[0] >= 1", "q.shape[1] >= 1", "q.shape[2] >= 1", "k.shape[2] >= 1",
              "q.shape[2] < 2000000000", "k.shape[2] < 2000000000", "total < 1000000000",
              "q.stride[3] == 1", "q.stride[0] > 0", "q.stride[0] % 8 == 0", "q.stride[1] > 0", "q.stride[1] % 8 == 0",
              "q.stride[2] > 0", "q.stride[2] % 8 == 0",
              "k.stride[3] == 1", "k.stride[0] > 0", "k.stride[0] % 8 == 0", "k.stride[1] > 0", "k.stride[1] % 8 == 0",
              "k.stride[2] > 0", "k.stride[2] % 8 == 0",
              "v.stride[3] == 1", "v.stride[0] > 0", "v.stride[0] % 8 == 0", "v.stride[1] > 0", "v.stride[1] % 8 == 0",
              "v.stride[2] > 0", "v.stride[2] % 8 == 0",
              "y.stride[3] == 1", "y.stride[0] % 8 == 0", "y.stride[1] % 8 == 0", "y.stride[2] % 8 == 0",
              "mask.shape[3] == k.shape[2]", "mask.stride[3] == 1",
              "(mask.shape[0] == 1) + (mask.shape[0] == q.shape[0]) >= 1",
              "(mask.shape[1] == 1) + (mask.shape[1] == q.shape[1]) >= 1",
              "mask.shape[2] == q.shape[2]", "mask.stride[0] > 0", "mask.stride[0] % 8 == 0", "mask.stride[1] > 0",
              "mask.stride[1] % 8 == 0", "mask.stride[2] > 0", "mask.stride[2] % 8 == 0", "smem_bytes <= device.smem_per_block"]
dims       = { batch = "q.shape[0]", heads = "q.shape[1]", nq = "q.shape[2]", nk = "k.shape[2]", mask_batch = "mask.shape[0]", mask_heads = "mask.shape[1]", total = "batch * heads * ceil_div(nq, 128)", per = "ceil_div(total, min(device.sms, total))", smem_bytes = "1024 + 4 * 32768 + 2 * 16384 + 4 * 16384 + 256" }
tune       = { TURNS = [0, 1] }
align      = 16
[[tensor_map]]
name = "q_map"
over = "q"
dims = ["64", "nq", "heads", "batch"]
strides = ["q.stride[2] * q.itemsize", "q.stride[1] * q.itemsize", "q.stride[0] * q.itemsize"]
box = ["64", "128", "1", "1"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "k_map"
over = "k"
dims = ["64", "nk", "heads", "batch"]
strides = ["k.stride[2] * k.itemsize", "k.stride[1] * k.itemsize", "k.stride[0] * k.itemsize"]
box = ["64", "128", "1", "1"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "v_map"
over = "v"
dims = ["64", "nk", "heads", "batch"]
strides = ["v.stride[2] * v.itemsize", "v.stride[1] * v.itemsize", "v.stride[0] * v.itemsize"]
box = ["64", "128", "1", "1"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "mask_map"
over = "mask"
dims = ["nk", "nq", "mask_heads", "mask_batch"]
strides = ["mask.stride[2] * mask.itemsize", "mask.stride[1] * mask.itemsize", "mask.stride[0] * mask.itemsize"]
box = ["64", "128", "1", "1"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[launch]]
kernel = "attention_math"
grid   = ["ceil_div(total, per)"]
block  = ["384"]
smem   = "smem_bytes"
args   = ["q_map", "k_map", "v_map", "mask_map", "q", "k", "v", "mask", "y", "heads", "nq", "nk", "mask_batch", "mask_heads", "total", "per", "scale_q", "scale_k", "y.stride[0]", "y.stride[1]", "y.stride[2]"]
---*/
// y = softmax(q k^T * scale_q * scale_k + mask) v, head dimension 64. A tile is 128 query rows of one head; a block owns `per` consecutive
// tiles, heads fastest, so that the mask strip of its rows (up to 4 slots of 128 keys) stays in shared memory for all its heads; with more
// keys, or a mask by head, the slots are a ring. Warpgroup 0: one thread feeds Q, K, V and mask by TMA; groups 1 and 2: 64 rows each.
// The loop runs over all (tile, KV block) steps: scores of step n are multiplied beside P V of step n - 1, also across tiles.

#define BN 128
constexpr int STAGES = 2;
constexpr int SN = BN / 2, PN = BN / 4, MN = BN / 8, ON = 32;  // registers of S, each part of P, half the mask and O
constexpr int Q_BYTES = 128 * 128, KV_BYTES = BN * 128;
#define LOG2E 1.4426950408889634f

template <class E> struct is_half { static constexpr bool value = false; };
template <> struct is_half<__half> { static constexpr bool value = true; };

#define WGMMA_QK(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;\n}" \
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]), "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]), "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]), "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]), "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31]), "+f"(s[32]), "+f"(s[33]), "+f"(s[34]), "+f"(s[35]), "+f"(s[36]), "+f"(s[37]), "+f"(s[38]), "+f"(s[39]), "+f"(s[40]), "+f"(s[41]), "+f"(s[42]), "+f"(s[43]), "+f"(s[44]), "+f"(s[45]), "+f"(s[46]), "+f"(s[47]), "+f"(s[48]), "+f"(s[49]), "+f"(s[50]), "+f"(s[51]), "+f"(s[52]), "+f"(s[53]), "+f"(s[54]), "+f"(s[55]), "+f"(s[56]), "+f"(s[57]), "+f"(s[58]), "+f"(s[59]), "+f"(s[60]), "+f"(s[61]), "+f"(s[62]), "+f"(s[63]) \
        : "l"(a), "l"(b), "n"(Accumulate))
#define WGMMA_PV(TYPE) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n" \
        : "+f"(o[0]), "+f"(o[1]), "+f"(o[2]), "+f"(o[3]), "+f"(o[4]), "+f"(o[5]), "+f"(o[6]), "+f"(o[7]), "+f"(o[8]), "+f"(o[9]), "+f"(o[10]), "+f"(o[11]), "+f"(o[12]), "+f"(o[13]), "+f"(o[14]), "+f"(o[15]), "+f"(o[16]), "+f"(o[17]), "+f"(o[18]), "+f"(o[19]), "+f"(o[20]), "+f"(o[21]), "+f"(o[22]), "+f"(o[23]), "+f"(o[24]), "+f"(o[25]), "+f"(o[26]), "+f"(o[27]), "+f"(o[28]), "+f"(o[29]), "+f"(o[30]), "+f"(o[31]) \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b))

// s (64 x BN) = or += a (64 x 16, shared, K-major) * b (BN x 16, shared, K-major)^T
template <int Accumulate> __device__ __forceinline__ void wgmma_qk(float (&s)[SN], uint64_t a, uint64_t b) {
    if constexpr (is_half<T>::value) { WGMMA_QK("f16"); } else { WGMMA_QK("bf16"); }
}
// o (64 x 64) += a (64 x 16, registers) * b (16 x 64, shared, transposed operand)
__device__ __forceinline__ void wgmma_pv(float (&o)[ON], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {
    if constexpr (is_half<T>::value) { WGMMA_PV("f16"); } else { WGMMA_PV("bf16"); }
}
template <int N> __device__ __forceinline__ void pin(float (&r)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <int N> __device__ __forceinline__ void pin(uint32_t (&r)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(r[i])::"memory");
}
__device__ __forceinline__ float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ uint32_t pack2(float lo, float hi) {
    uint32_t r;
    if constexpr (is_half<T>::value) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
__device__ __forceinline__ float2 unpack_mask(uint32_t pair) {  // two elements of the mask
    if constexpr (is_half<T_mask>::value) {
        __half2 h;
        *reinterpret_cast<uint32_t*>(&h) = pair;
        return __half22float2(h);
    } else {
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    }
}
__device__ __forceinline__ void load_matrix(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_box(uint32_t smem, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
                 ::"r"(smem), "l"(&map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {  // swizzle 128, 8 rows are 1024 bytes
    return (uint64_t(address & 0x3ffff) >> 4) | (uint64_t(1) << 16) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 62);
}
__device__ __forceinline__ void product_qk(float (&s)[SN], uint64_t qd, uint64_t kd) {
    wgmma_qk<0>(s, qd, kd);
#pragma unroll
    for (int t = 1; t < 4; ++t) wgmma_qk<1>(s, qd + t * 2, kd + t * 2);
}
// o += (hi + lo) V: both parts of P go into the same sums
__device__ __forceinline__ void product_pv(float (&o)[ON], const uint32_t (&p)[PN], const uint32_t (&pl)[PN], uint64_t vd) {
#pragma unroll
    for (int t = 0; t < BN / 16; ++t) {
        wgmma_pv(o, pl[4 * t], pl[4 * t + 1], pl[4 * t + 2], pl[4 * t + 3], vd + t * (2048 >> 4));
        wgmma_pv(o, p[4 * t], p[4 * t + 1], p[4 * t + 2], p[4 * t + 3], vd + t * (2048 >> 4));
    }
}
// P * BIAS as two 16-bit numbers: hi is P truncated and lo the rest of P * BIAS, which is above 0 wherever P is, so that Inf in V
// meets no 0 and no negative number; BIAS is divided out at the end.
constexpr float BIAS = is_half<T>::value ? 1.0625f : 1.001953125f;  // 1 + 2^-4, 1 + 2^-9
__device__ __forceinline__ void pack_p(uint32_t (&p)[PN], uint32_t (&pl)[PN], const float (&s)[SN]) {
#pragma unroll
    for (int i = 0; i < PN; ++i) {
        const float p0 = s[2 * i], p1 = s[2 * i + 1];
        float h0, h1;
        uint32_t hi;
        if constexpr (is_half<T>::value) {
            asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(hi) : "f"(p1), "f"(p0));
            __half2 h;
            *reinterpret_cast<uint32_t*>(&h) = hi;
            const float2 f = __half22float2(h);
            h0 = f.x, h1 = f.y;
        } else {
            asm("cvt.rz.bf16x2.f32 %0, %1, %2;" : "=r"(hi) : "f"(p1), "f"(p0));
            h0 = __uint_as_float(hi << 16), h1 = __uint_as_float(hi & 0xffff0000u);
        }
        p[i] = hi;
        pl[i] = pack2(fmaf(p0, BIAS, -h0), fmaf(p1, BIAS, -h1));
    }
}
// columns of the tile from `limit` on are past the end of the keys
__device__ __forceinline__ void cut_tile(float (&s)[SN], int limit, int lane) {
    limit -= (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < SN; ++i)
        if ((i / 4) * 8 + (i & 1) >= limit) s[i] = -INFINITY;
}
// keys 64 * Half to 64 * Half + 63
template <int Half> __device__ __forceinline__ void add_mask(float (&s)[SN], const uint32_t (&mk)[MN], float scale) {
#pragma unroll
    for (int i = 0; i < MN; ++i) {
        const float2 m = unpack_mask(mk[i]);
        s[2 * (Half * MN + i)] = fmaf(s[2 * (Half * MN + i)], scale, m.x);
        s[2 * (Half * MN + i) + 1] = fmaf(s[2 * (Half * MN + i) + 1], scale, m.y);
    }
}

// One tile of online softmax on the scores of a thread (natural units): rows g and g + 8 of its warp's 16. s becomes
// 2^LIFT * exp(s - top), where top follows the maximum only when that is more than 2 in the log2 domain above it: p stays below
// 2^(LIFT + 2), which keeps 16-bit p clear of denormals, and O seldom needs its factor alpha. Where |top| > 1e38 (masks of finfo.min), scores
// that are not equal to it are so far away that any factor serves instead of log2(e): 0.5 does not overflow.
// Returns whether any row of the warp needs alpha.
__device__ __forceinline__ bool softmax_step(float (&s)[SN], float (&top)[2], float (&shift)[2], float (&sum)[2], float (&alpha)[2]) {
    constexpr float LIFT = is_half<T>::value ? 13.f : 0.f;
    bool changed[2];
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float a = fmaxf(s[2 * r], s[2 * r + 1]), b = fmaxf(s[4 + 2 * r], s[5 + 2 * r]);
#pragma unroll
        for (int j = 2; j < SN / 4; j += 2) {
            a = fmaxf(a, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
            b = fmaxf(b, fmaxf(s[4 * j + 4 + 2 * r], s[4 * j + 5 + 2 * r]));
        }
        a = fmaxf(a, b);  // a dropped NaN returns in the exponentials
        a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 1));
        a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 2));
        changed[r] = !(a <= top[r] + 1.3862944f);
        const float old = top[r], old_shift = shift[r];
        if (changed[r]) top[r] = a;
        factor[r] = fabsf(top[r]) > 1e38f ? 0.5f : LOG2E;
        shift[r] = top[r] == -INFINITY ? 0.f : fmaf(top[r], factor[r], -LIFT);
        const float grown = old == -INFINITY ? 0.f : exp2_fast(old_shift - shift[r]);
        alpha[r] = changed[r] ? grown : 1.f;
    }
    const bool any = __any_sync(0xffffffffu, changed[0] || changed[1]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float t0 = 0.f, t1 = 0.f;
#pragma unroll
        for (int j = 0; j < SN / 4; ++j) {
            const float p0 = exp2_fast(fmaf(s[4 * j + 2 * r], factor[r], -shift[r]));
            const float p1 = exp2_fast(fmaf(s[4 * j + 2 * r + 1], factor[r], -shift[r]));
            s[4 * j + 2 * r] = p0;
            s[4 * j + 2 * r + 1] = p1;
            t0 += p0;
            t1 += p1;
        }
        sum[r] = fmaf(sum[r], alpha[r], t0 + t1);
    }
    return any;
}

// O / sum of rows row0 + g and row0 + g + 8, where below nq: 16-byte stores after a 4 x 4 transpose among the lanes of a quad
__device__ __forceinline__ void store_rows(const float (&o)[ON], const float (&sum)[2], T_y* out, long long pitch, int row0, int nq, int lane) {
    const int t = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float total = sum[r];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const float inverse = total == 0.f ? 1.f : 1.f / (total * BIAS);  // a row of -inf scores gives zeros
        const int row = row0 + (lane >> 2) + 8 * r;
#pragma unroll
        for (int g = 0; g < 2; ++g) {
            uint32_t w[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) w[i] = pack2(o[16 * g + 4 * i + 2 * r] * inverse, o[16 * g + 4 * i + 2 * r + 1] * inverse);
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
            if (row < nq) *reinterpret_cast<uint4*>(out + row * pitch + (4 * g + t) * 8) = make_uint4(w[0], w[1], w[2], w[3]);
        }
    }
}

constexpr int MASK_SLOTS = 4, MASK_BYTES = 128 * 128 * 2;  // a slot: two panels of 64 keys x 128 rows, swizzle 128
constexpr int MASK_ALL = MASK_SLOTS * MASK_BYTES;
// the warp's fragments of 16 rows x 64 keys: mk[i] belongs to s[2 * i] and s[2 * i + 1] of its half; `at` is the lane's address, keys 0 to 15
template <int Half> __device__ __forceinline__ void read_mask(uint32_t (&mk)[MN], uint32_t at) {
#pragma unroll
    for (int t = 0; t < 4; ++t)
        load_matrix(mk[4 * t], mk[4 * t + 1], mk[4 * t + 2], mk[4 * t + 3], (at ^ (t << 5)) + Half * (128 * 128));
}

extern "C" __global__ void __launch_bounds__(384, 1)
attention_math(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
               const __grid_constant__ TensorMap mask_map, const T_q* q, const T_k* k, const T_v* v, const T_mask* mask, T_y* y,
               int heads, int nq, int nk, int mask_batch, int mask_heads, int total, int per, double scale_q, double scale_k,
               long long y_batch, long long y_head, long long y_row) {
    extern __shared__ uint8_t raw[];
    const uint32_t base = (smem_address(raw) + 1023u) & ~1023u;
    uint8_t* aligned = raw + (base - smem_address(raw));
    const uint32_t mask_smem = base, q_smem = base + MASK_ALL, k_smem = q_smem + 2 * Q_BYTES, v_smem = k_smem + STAGES * KV_BYTES;
    uint64_t* bars = reinterpret_cast<uint64_t*>(aligned + MASK_ALL + 2 * Q_BYTES + 2 * STAGES * KV_BYTES);
    uint64_t *q_full = bars, *q_empty = bars + 2, *k_full = bars + 4, *k_empty = k_full + STAGES, *v_full = k_empty + STAGES,
             *v_empty = v_full + STAGES;
    uint64_t *m_full = v_empty + STAGES, *m_empty = m_full + MASK_SLOTS;

    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            mbarrier_init(q_full + i, 1);
            mbarrier_init(q_empty + i, 8);
        }
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(k_full + i, 1);
            mbarrier_init(v_full + i, 1);
            mbarrier_init(k_empty + i, 8);
            mbarrier_init(v_empty + i, 8);
        }
        for (int i = 0; i < MASK_SLOTS; ++i) {
            mbarrier_init(m_full + i, 1);
            mbarrier_init(m_empty + i, 256);
        }
        mbarrier_init_fence();
        fence_async_shared();
    }
    __syncthreads();
    const int m_tiles = (nq + 127) / 128;
    const int blocks = (nk + BN - 1) / BN;
    const int first = blockIdx.x * per, last = min(total, first + per), step = 1;  // first < total
    const bool by_head = mask_heads > 1;
    const bool ring = blocks > MASK_SLOTS;                  // the strip does not fit: its slots are filled anew for every tile
    const int m_wrap = ring ? MASK_SLOTS : blocks;

    if (group == 0) {  // ---------------- producer
        setmaxnreg_dec<40>();
        if (threadIdx.x == 0) {
            tma_prefetch(q_map);
            tma_prefetch(k_map);
            tma_prefetch(v_map);
            tma_prefetch(mask_map);
            int ms = 0;
            uint32_t mp = 1;
            int ks = 0, vs = 0, qs = 0;
            uint32_t kp = 1, vp = 1, qp = 1;  // a fresh barrier lets a wait for the phase before the first pass
            int vb = 0, vh = 0, vj = -1;      // the V block that is due
#pragma unroll 1
            for (int tile = first; tile < last; tile += step) {
                const int strip = tile / heads, h = tile - strip * heads;
                const int b = strip / m_tiles, m = (strip - b * m_tiles) * 128;
                const bool load = ring || by_head || h == 0 || tile == first;
                mbarrier_wait(q_empty + qs, qp);
                mbarrier_arrive_expect(q_full + qs, Q_BYTES);
                load_box(q_smem + qs * Q_BYTES, q_map, q_full + qs, 0, m, h, b);
                qs ^= 1;
                if (qs == 0) qp ^= 1;
#pragma unroll 1
                for (int j = 0; j < blocks; ++j) {  // K and mask of this step, then V of the one before
                    mbarrier_wait(k_empty + ks, kp);
                    mbarrier_arrive_expect(k_full + ks, KV_BYTES);
                    load_box(k_smem + ks * KV_BYTES, k_map, k_full + ks, 0, j * BN, h, b);
                    if (++ks == STAGES) { ks = 0; kp ^= 1; }
                    if (load) {
                        mbarrier_wait(m_empty + ms, mp);
                        mbarrier_arrive_expect(m_full + ms, MASK_BYTES);
                        const uint32_t to = mask_smem + ms * MASK_BYTES;
                        const int mh = by_head ? h : 0, mb = mask_batch > 1 ? b : 0;
                        load_box(to, mask_map, m_full + ms, j * BN, m, mh, mb);
                        load_box(to + MASK_BYTES / 2, mask_map, m_full + ms, j * BN + 64, m, mh, mb);
                        if (++ms == m_wrap) { ms = 0; mp ^= 1; }
                    }
                    if (vj >= 0) {
                        mbarrier_wait(v_empty + vs, vp);
                        mbarrier_arrive_expect(v_full + vs, KV_BYTES);
                        load_box(v_smem + vs * KV_BYTES, v_map, v_full + vs, 0, vj * BN, vh, vb);
                        if (++vs == STAGES) { vs = 0; vp ^= 1; }
                    }
                    vj = j, vh = h, vb = b;
                }
            }
            mbarrier_wait(v_empty + vs, vp);
            mbarrier_arrive_expect(v_full + vs, KV_BYTES);
            load_box(v_smem + vs * KV_BYTES, v_map, v_full + vs, 0, vj * BN, vh, vb);
        }
        __syncwarp();
    } else {  // ---------------- consumers
        setmaxnreg_inc<232>();
        const int wg = group - 1;
        const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
        const int turn = 1 + wg, next_turn = 2 - wg;  // named barriers 1 and 2
        const float scale = (float)(scale_q * scale_k);
        const uint64_t q_desc = descriptor(q_smem + wg * 8192), k_desc = descriptor(k_smem), v_desc = descriptor(v_smem);
        const int warp_row = wg * 64 + warp * 16;
        // ldmatrix: lanes 0-7 rows 0-7, 8-15 rows 8-15, 16-31 the same rows, 8 keys on; the 16-byte chunk is XORed with row % 8
        const uint32_t mask_at = mask_smem + (warp_row + (lane & 15)) * 128 + (((lane >> 4) ^ (lane & 7)) << 4);
        int ms = 0;
        uint32_t mp = 0;
        int ks = 0, vs = 0, qs = 0;
        uint32_t kp = 0, vp = 0, qp = 0;
        if constexpr (TURNS) {
            if (wg == 0) barrier_arrive(turn, 256);  // the first turn is free
        }

        float s[SN], o[ON], top[2] = {-INFINITY, -INFINITY}, shift[2] = {0.f, 0.f}, sum[2] = {0.f, 0.f}, alpha[2];
        uint32_t p[PN], pl[PN], mk[MN];
#pragma unroll
        for (int i = 0; i < ON; ++i) o[i] = 0.f;
        int tile = first, j = 0;
        int strip = tile / heads, h = tile - strip * heads, b = strip / m_tiles, m = (strip - b * m_tiles) * 128;
        bool release = ring || by_head || h == heads - 1 || tile + 1 >= last;  // the mask is not needed after this tile

        mbarrier_wait(q_full, 0);
        mbarrier_wait(k_full, 0);
        pin(s);
        wgmma_fence();
        product_qk(s, q_desc, k_desc);
        wgmma_commit();
        mbarrier_wait(m_full + ms, mp);
        read_mask<0>(mk, mask_at + ms * MASK_BYTES);
        wgmma_wait<0>();
        pin(s);
        if (lane == 0) {
            mbarrier_arrive(k_empty);
            if (blocks == 1) mbarrier_arrive(q_empty);
        }
        ks = 1;
        add_mask<0>(s, mk, scale);
        read_mask<1>(mk, mask_at + ms * MASK_BYTES);
        if (release) mbarrier_arrive(m_empty + ms);
        if (++ms == m_wrap) { ms = 0; mp ^= release ? 1u : 0u; }
        add_mask<1>(s, mk, scale);
        if (nk < BN) cut_tile(s, nk, lane);
        softmax_step(s, top, shift, sum, alpha);
        pack_p(p, pl, s);
        if (blocks > 1 || tile + step < last) mbarrier_wait(k_full + ks, kp);

#pragma unroll 1
        while (true) {
            // on to the next step; where a new tile begins, the old one's O is stored after its last product below
            const bool boundary = ++j == blocks;
            T_y* out = y + b * y_batch + h * y_head;
            const int out_row = m + warp_row;
            if (boundary) {
                tile += step;
                if (tile >= last) break;
                j = 0;
                strip = tile / heads, h = tile - strip * heads, b = strip / m_tiles, m = (strip - b * m_tiles) * 128;
                release = ring || by_head || h == heads - 1 || tile + 1 >= last;
                qs ^= 1;
                if (qs == 0) qp ^= 1;
                mbarrier_wait(q_full + qs, qp);
            }
            if constexpr (TURNS) barrier_sync(turn, 256);
            pin(o);
            pin(p);
            pin(pl);
            pin(s);
            wgmma_fence();
            product_qk(s, q_desc + qs * (Q_BYTES >> 4), k_desc + ks * (KV_BYTES >> 4));
            wgmma_commit();
            mbarrier_wait(v_full + vs, vp);
            product_pv(o, p, pl, v_desc + vs * (KV_BYTES >> 4));
            wgmma_commit();
            if constexpr (TURNS) barrier_arrive(next_turn, 256);
            mbarrier_wait(m_full + ms, mp);
            read_mask<0>(mk, mask_at + ms * MASK_BYTES);
            wgmma_wait<1>();
            pin(s);
            if (lane == 0) {
                mbarrier_arrive(k_empty + ks);
                if (j == blocks - 1) mbarrier_arrive(q_empty + qs);
            }
            if (++ks == STAGES) { ks = 0; kp ^= 1; }
            add_mask<0>(s, mk, scale);
            read_mask<1>(mk, mask_at + ms * MASK_BYTES);
            if (release) mbarrier_arrive(m_empty + ms);
            if (++ms == m_wrap) { ms = 0; mp ^= release ? 1u : 0u; }
            add_mask<1>(s, mk, scale);
            if (nk - j * BN < BN) cut_tile(s, nk - j * BN, lane);
            const float old_sum[2] = {sum[0], sum[1]};
            if (boundary) {
#pragma unroll
                for (int r = 0; r < 2; ++r) top[r] = -INFINITY, shift[r] = 0.f, sum[r] = 0.f;
            }
            const bool rescale = softmax_step(s, top, shift, sum, alpha);
            pin(s);
            // the next K, awaited here: a branch that keeps ptxas from hoisting the wait for P V above the exponentials
            if (j + 1 < blocks || tile + step < last) mbarrier_wait(k_full + ks, kp);
            wgmma_wait<0>();
            pin(o);
            pin(p);
            pin(pl);
            if (lane == 0) mbarrier_arrive(v_empty + vs);
            if (++vs == STAGES) { vs = 0; vp ^= 1; }
            pack_p(p, pl, s);
            if (boundary) {
                store_rows(o, old_sum, out, y_row, out_row, nq, lane);
#pragma unroll
                for (int i = 0; i < ON; ++i) o[i] = 0.f;
            } else if (rescale) {
#pragma unroll
                for (int i = 0; i < ON; ++i) o[i] *= alpha[(i >> 1) & 1];
            }
        }

        mbarrier_wait(v_full + vs, vp);
        pin(o);
        pin(p);
        pin(pl);
        wgmma_fence();
        product_pv(o, p, pl, v_desc + vs * (KV_BYTES >> 4));
        wgmma_commit();
        wgmma_wait<0>();
        pin(o);
        pin(p);
        pin(pl);
        if (lane == 0) mbarrier_arrive(v_empty + vs);
        store_rows(o, sum, y + b * y_batch + h * y_head, y_row, m + warp_row, nq, lane);
    }
}
