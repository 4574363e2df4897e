/*---
implements = "attention"
target     = "cuda"
dtypes     = ["float16", "bfloat16"]
optional   = ["logsumexp"]
where      = ["device.arch == 90", "is_causal == 0", "q.ndim == 4", "k.ndim == 4", "v.ndim == 4", "y.ndim == 4", "mask.ndim == 4",
              "q.shape[3] == 64", "k.shape[3] == 64", "v.shape[3] == 64", "y.shape[3] == 64",
              "k.shape[0] == q.shape[0]", "v.shape[0] == q.shape[0]", "k.shape[1] == q.shape[1]", "v.shape[1] == q.shape[1]",
              "v.shape[2] == k.shape[2]", "q.shape[0] >= 1", "q.shape[1] >= 1", "q.shape[2] >= 1", "k.shape[2] >= 1", "q.itemsize == 2", "mask.itemsize == 2",
              "(mask.shape[0] == 1) + (mask.shape[0] == q.shape[0]) >= 1", "(mask.shape[1] == 1) + (mask.shape[1] == q.shape[1]) >= 1",
              "(mask.shape[2] == 1) + (mask.shape[2] == q.shape[2]) >= 1", "mask.shape[3] == k.shape[2]",
              "logsumexp.contiguous", "(HAS_LOGSUMEXP == 0) + (nq % 32 == 0) >= 1",
              "(mask.stride[3] == 1) + (k.shape[2] == 1) >= 1", "mask.stride[0] >= 0", "mask.stride[1] >= 0", "mask.stride[2] >= 0",
              "mask_batch % 2 == 0", "mask_head % 2 == 0", "mask_row % 2 == 0",
              "q.stride[3] == 1", "k.stride[3] == 1", "v.stride[3] == 1", "y.stride[3] == 1",
              "q.stride[2] > 0", "k.stride[2] > 0", "v.stride[2] > 0", "y.stride[2] > 0",
              "q.stride[1] > 0", "k.stride[1] > 0", "v.stride[1] > 0", "y.stride[1] > 0",
              "q.stride[0] > 0", "k.stride[0] > 0", "v.stride[0] > 0", "y.stride[0] > 0",
              "q.stride[2] % 8 == 0", "k.stride[2] % 8 == 0", "v.stride[2] % 8 == 0", "y.stride[2] % 8 == 0",
              "q.stride[1] % 8 == 0", "k.stride[1] % 8 == 0", "v.stride[1] % 8 == 0", "y.stride[1] % 8 == 0",
              "q.stride[0] % 8 == 0", "k.stride[0] % 8 == 0", "v.stride[0] % 8 == 0", "y.stride[0] % 8 == 0",
              "k.shape[2] <= 262144", "batch * heads * m_tiles < 2000000000"]
dims       = { batch = "q.shape[0]", heads = "q.shape[1]", nq = "q.shape[2]", nk = "k.shape[2]", m_tiles = "ceil_div(nq, 128)", n_blocks = "ceil_div(nk, 128)", mask_batch = "mask.stride[0] * (mask.shape[0] > 1)", mask_head = "mask.stride[1] * (mask.shape[1] > 1)", mask_row = "mask.stride[2] * (mask.shape[2] > 1)", longest = "min(4, ceil_div(batch * heads * m_tiles, device.sms))", runs = "ceil_div(heads, longest)" }
tune       = { AHEAD = [2, 3], TURNS = [0, 1] }
align      = 16
[[tensor_map]]
name = "q_map"
over = "q"
dims = ["64", "nq", "heads", "batch"]
strides = ["q.stride[2] * q.itemsize", "q.stride[1] * q.itemsize", "q.stride[0] * q.itemsize"]
box = ["64", "128", "1", "1"]
swizzle = "128"
l2 = "128"
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
name = "y_map"
over = "y"
dims = ["64", "nq", "heads", "batch"]
strides = ["y.stride[2] * y.itemsize", "y.stride[1] * y.itemsize", "y.stride[0] * y.itemsize"]
box = ["64", "64", "1", "1"]
swizzle = "128"
l2 = "none"
oob = "zero"
[[launch]]
kernel = "attention"
grid   = ["m_tiles * runs * batch"]
block  = ["384"]
smem   = "1024 + 2 * 16384 + 4 * 16384 + 131072 + 256"
args   = ["q_map", "k_map", "v_map", "y_map", "q", "k", "v", "mask", "y", "logsumexp", "heads", "nq", "nk", "m_tiles", "n_blocks", "runs",
          "mask_batch", "mask_head", "mask_row", "scale"]
---*/
// softmax(q k^T * scale + mask) v, head dimension 64, additive mask. One launch, nothing is scanned or skipped.
// A block owns 128 query rows of a batch and a run of heads, and walks (head, block of 128 keys) as one flat pipeline. Warp group 0: one
// thread feeds Q (two buffers) and K, V (two stages each) by TMA. Warp groups 1, 2: 64 query rows each; S of a step and O += P V of the
// step before are in flight together, also across a change of head. Each consumer warp copies the mask of its own 16 rows with cp.async
// into four private slots of 16 x 128; where the mask is shared by the heads and has at most 4 blocks of keys, they are filled once and
// stay for all heads of the run, otherwise they are a ring. Its values are read by ldmatrix, which yields the accumulator's fragment.
// Scores are scaled, masked and compared in natural units, so that a mask of the type's lowest number is no infinity.

enum { BM = 128, BN = 128, Q_BYTES = BM * 128, KV_BYTES = BN * 128, SLOT = 4096, STEADY = 1024 };

template <class E> struct is_half { static constexpr bool value = false; };
template <> struct is_half<__half> { static constexpr bool value = true; };

#define WGMMA_QK(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, " \
        "%8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, " \
        "%24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, " \
        "%40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, " \
        "%56, %57, %58, %59, %60, %61, %62, %63" \
        "}, %64, %65, p, 1, 1, 0, 0;\n}" \
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]), \
          "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]), \
          "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]), "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]), \
          "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31]), \
          "+f"(s[32]), "+f"(s[33]), "+f"(s[34]), "+f"(s[35]), "+f"(s[36]), "+f"(s[37]), "+f"(s[38]), "+f"(s[39]), \
          "+f"(s[40]), "+f"(s[41]), "+f"(s[42]), "+f"(s[43]), "+f"(s[44]), "+f"(s[45]), "+f"(s[46]), "+f"(s[47]), \
          "+f"(s[48]), "+f"(s[49]), "+f"(s[50]), "+f"(s[51]), "+f"(s[52]), "+f"(s[53]), "+f"(s[54]), "+f"(s[55]), \
          "+f"(s[56]), "+f"(s[57]), "+f"(s[58]), "+f"(s[59]), "+f"(s[60]), "+f"(s[61]), "+f"(s[62]), "+f"(s[63]) \
        : "l"(a), "l"(b), "n"(Accumulate))

#define WGMMA_PV(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, " \
        "%8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, " \
        "%24, %25, %26, %27, %28, %29, %30, %31" \
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}" \
        : "+f"(o[0]), "+f"(o[1]), "+f"(o[2]), "+f"(o[3]), "+f"(o[4]), "+f"(o[5]), "+f"(o[6]), "+f"(o[7]), \
          "+f"(o[8]), "+f"(o[9]), "+f"(o[10]), "+f"(o[11]), "+f"(o[12]), "+f"(o[13]), "+f"(o[14]), "+f"(o[15]), \
          "+f"(o[16]), "+f"(o[17]), "+f"(o[18]), "+f"(o[19]), "+f"(o[20]), "+f"(o[21]), "+f"(o[22]), "+f"(o[23]), \
          "+f"(o[24]), "+f"(o[25]), "+f"(o[26]), "+f"(o[27]), "+f"(o[28]), "+f"(o[29]), "+f"(o[30]), "+f"(o[31]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

// s (64 x 128) = or += a (64 x 16, shared, K-major) * b (128 x 16, shared, K-major)^T
template <int Accumulate> __device__ __forceinline__ void wgmma_qk(float (&s)[64], uint64_t a, uint64_t b) {
    if constexpr (is_half<T>::value) { WGMMA_QK("f16"); } else { WGMMA_QK("bf16"); }
}
// o (64 x 64) = or += a (64 x 16, registers) * b (16 x 64, shared, rows of 64 contiguous values: transposed operand)
__device__ __forceinline__ void wgmma_pv(float (&o)[32], const uint32_t* a, uint64_t b, int accumulate) {
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
__device__ __forceinline__ void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
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
__device__ __forceinline__ void tma_load_4d(uint32_t smem, const TensorMap& map, uint64_t* barrier, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
                 ::"r"(smem), "l"(&map), "r"(smem_address(barrier)), "r"(0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
__device__ __forceinline__ void tma_store_4d(const TensorMap& map, uint32_t smem, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 ::"l"(&map), "r"(smem), "r"(0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
    return (uint64_t(address & 0x3ffff) >> 4) | (uint64_t(1) << 16) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 62);
}


__device__ __forceinline__ float log2e() { return 1.4426950408889634f; }
__device__ __forceinline__ float2 pair_of(uint32_t packed) {
    if constexpr (is_half<T>::value) return __half22float2(*reinterpret_cast<const __half2*>(&packed));
    else return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&packed));
}

__device__ __forceinline__ float max_nan(float a, float b) {  // NaN stays
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
__device__ __forceinline__ void tma_prefetch_4d(const TensorMap& map, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];"
                 ::"l"(&map), "r"(0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

// One tile of online softmax on the scores of a thread: rows g and g + 8 of its warp's 16. s becomes exp(s - top).
// The weights refer to 2^(top * log2(e)), that product rounded where |top| < STEADY for the whole warp (one operation less per score;
// the rounding is the same for all of a row), exact elsewhere.
__device__ __forceinline__ void softmax_step(float (&s)[64], float (&top)[2], float (&sum)[2], float (&alpha)[2]) {
    float before[2], shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float a = max_nan(s[2 * r], s[2 * r + 1]), b = max_nan(s[4 + 2 * r], s[5 + 2 * r]);
#pragma unroll
        for (int j = 2; j < 16; j += 2) {
            a = max_nan(a, max_nan(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
            b = max_nan(b, max_nan(s[4 * j + 4 + 2 * r], s[4 * j + 5 + 2 * r]));
        }
        a = max_nan(a, b);
        a = max_nan(a, __shfl_xor_sync(0xffffffffu, a, 1));
        a = max_nan(a, __shfl_xor_sync(0xffffffffu, a, 2));
        before[r] = top[r];
        top[r] = max_nan(top[r], a);
        shift[r] = top[r] == -INFINITY ? 0.f : top[r];
    }
    float t0[2] = {0.f, 0.f}, t1[2] = {0.f, 0.f};
    if (__all_sync(0xffffffffu, fabsf(shift[0]) < float(STEADY) && fabsf(shift[1]) < float(STEADY))) {
        float minus[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            minus[r] = -__fmul_rn(shift[r], log2e());
            alpha[r] = exp2_fast(__fadd_rn(__fmul_rn(before[r], log2e()), minus[r]));
        }
#pragma unroll
        for (int j = 0; j < 16; ++j) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float p0 = exp2_fast(fmaf(s[4 * j + 2 * r], log2e(), minus[r]));
                const float p1 = exp2_fast(fmaf(s[4 * j + 2 * r + 1], log2e(), minus[r]));
                s[4 * j + 2 * r] = p0;
                s[4 * j + 2 * r + 1] = p1;
                t0[r] += p0;
                t1[r] += p1;
            }
        }
    } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) alpha[r] = exp2_fast((before[r] - shift[r]) * log2e());
#pragma unroll
        for (int j = 0; j < 16; ++j) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float p0 = exp2_fast((s[4 * j + 2 * r] - shift[r]) * log2e());
                const float p1 = exp2_fast((s[4 * j + 2 * r + 1] - shift[r]) * log2e());
                s[4 * j + 2 * r] = p0;
                s[4 * j + 2 * r + 1] = p1;
                t0[r] += p0;
                t1[r] += p1;
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = fmaf(sum[r], alpha[r], t0[r] + t1[r]);
}

// The copies of 16 rows x 128 columns of the mask into a slot of the warp: rows of 256 bytes, the index of a 16-byte chunk XORed with
// row % 8. Columns from nk on stay what they were: their scores are overwritten.
__device__ __forceinline__ void fill_slot(uint32_t slot, const T* plane, int first, int nq, long long mask_row, int column, int nk, bool wide,
                                          int lane) {
    const int chunk = lane & 15, at = column + chunk * 8;
    if (wide && column + BN <= nk) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int r = (lane >> 4) + 2 * i;
            const T* from = plane + min(first + r, nq - 1) * mask_row + at;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(slot + r * 256 + ((chunk ^ (r & 7)) << 4)), "l"(from) : "memory");
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < 8; ++i) {
            const int r = (lane >> 4) + 2 * i;
            const T* from = plane + min(first + r, nq - 1) * mask_row + at;
            const uint32_t to = slot + r * 256 + ((chunk ^ (r & 7)) << 4);
            if (wide && at + 8 <= nk) {
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
            } else {
#pragma unroll 1
                for (int e = 0; e < 8; e += 2) {
                    if (at + e + 1 < nk) {
                        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to + 2 * e), "l"(from + e) : "memory");
                    } else if (at + e < nk) {
                        asm volatile("st.shared.u16 [%0], %1;" ::"r"(to + 2 * e), "h"(*reinterpret_cast<const unsigned short*>(from + e)) : "memory");
                    }
                }
            }
        }
    }
    __syncwarp();
}

// The mask's values of a thread's scores: bias[2 * j + r] holds row g + 8 * r, columns 8 * j + 2 * (lane % 4) + {0, 1}
__device__ __forceinline__ void read_slot(uint32_t (&bias)[32], uint32_t from) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(bias[4 * i]), "=r"(bias[4 * i + 1]), "=r"(bias[4 * i + 2]), "=r"(bias[4 * i + 3])
                     : "r"(from ^ (i << 5)) : "memory");
}
// s = s * scale + mask, and -inf past the last key
__device__ __forceinline__ void apply_mask(float (&s)[64], const uint32_t (&bias)[32], float scale, int column, int nk, bool tail) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float2 pair = pair_of(bias[2 * j + r]);
            s[4 * j + 2 * r] = fmaf(s[4 * j + 2 * r], scale, pair.x);
            s[4 * j + 2 * r + 1] = fmaf(s[4 * j + 2 * r + 1], scale, pair.y);
        }
    }
    if (tail) {
#pragma unroll
        for (int i = 0; i < 64; ++i)
            if (column + (i / 4) * 8 + (i & 1) >= nk) s[i] = -INFINITY;
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
          const __grid_constant__ TensorMap y_map, const T* q, const T* k, const T* v, const T* __restrict__ mask, T_y* y, float* logsumexp,
          int heads, int nq, int nk, int m_tiles, int n_blocks, int runs, long long mask_batch, long long mask_head, long long mask_row,
          float scale) {
    extern __shared__ uint8_t raw[];
    const uint32_t base = (smem_address(raw) + 1023u) & ~1023u;
    const uint32_t q_smem = base, k_smem = base + 2 * Q_BYTES, v_smem = k_smem + 2 * KV_BYTES, mask_smem = v_smem + 2 * KV_BYTES;
    uint64_t* bars = reinterpret_cast<uint64_t*>(raw + (base - smem_address(raw)) + 2 * Q_BYTES + 4 * KV_BYTES + 32 * SLOT);
    uint64_t *q_full = bars, *q_empty = bars + 2, *k_full = bars + 4, *k_empty = bars + 6, *v_full = bars + 8, *v_empty = bars + 10;

    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    const int m_tile = blockIdx.x % m_tiles, rest = blockIdx.x / m_tiles, run = rest % runs, b = rest / runs;
    const int first_head = int((long long)run * heads / runs), n_heads = int((long long)(run + 1) * heads / runs) - first_head;
    const int total = n_heads * n_blocks;  // steps

    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            mbarrier_init(q_full + i, 1);
            mbarrier_init(q_empty + i, 256);
            mbarrier_init(k_full + i, 1);
            mbarrier_init(k_empty + i, 8);
            mbarrier_init(v_full + i, 1);
            mbarrier_init(v_empty + i, 8);
        }
        mbarrier_init_fence();
        fence_async_shared();
        mbarrier_arrive_expect(q_full, Q_BYTES);
        tma_load_4d(q_smem, q_map, q_full, m_tile * BM, first_head, b);
        mbarrier_arrive_expect(k_full, KV_BYTES);
        tma_load_4d(k_smem, k_map, k_full, 0, first_head, b);
    }

    const int wg = group - 1;
    const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const bool leader = lane == 0, storer = threadIdx.x % 128 == 0;

    // the mask: the slots of this (consumer) warp
    const bool resident = mask_head == 0 && n_blocks <= 4;
    const bool wide = ((mask_batch | mask_head | mask_row) & 7) == 0;
    const uint32_t slots = mask_smem + (wg * 4 + warp) * (4 * SLOT);
    const int first_row = m_tile * BM + wg * 64 + warp * 16;
    const T* fill_plane = mask + b * mask_batch + first_head * mask_head;
    const int fill_end = resident ? n_blocks : total;
    int fill = 0, fill_at = 0;
    auto fill_next = [&]() {  // one commit group per step, whether it copies or not
        if (fill < fill_end) {
            fill_slot(slots + (fill & 3) * SLOT, fill_plane, first_row, nq, mask_row, fill_at * BN, nk, wide, lane);
            ++fill;
            if (++fill_at == n_blocks) {
                fill_at = 0;
                fill_plane += mask_head;
            }
        }
        cp_async_commit();
    };
    if (group > 0) {
#pragma unroll 1
        for (int i = 0; i < AHEAD; ++i) fill_next();
    }
    __syncthreads();  // the barriers are there

    if (group == 0) {  // ---------------- producer
        setmaxnreg_dec<24>();
        if (threadIdx.x == 0) {
            tma_prefetch(v_map);
            tma_prefetch(y_map);
            const int share = min(m_tiles, 4), own = m_tile % share;  // blocks of the same heads share the prefetches
            int h = first_head, at = 0;                              // of step t
            int ahead_h = first_head, ahead_at = 0;                  // of step `ahead`
            int ahead = 0;
            int before_h = first_head, before_at = 0;                // of step t - 1
            for (int t = 0; t <= total; ++t) {  // K of a step, then V of the one before
                if (t < total) {
                    if (t > 0) {
                        const int stage = t & 1, use = t >> 1;
                        if (at == 0) {
                            const int n = h - first_head;
                            if (n >= 2) mbarrier_wait(q_empty + (n & 1), ((n >> 1) - 1) & 1);
                            mbarrier_arrive_expect(q_full + (n & 1), Q_BYTES);
                            tma_load_4d(q_smem + (n & 1) * Q_BYTES, q_map, q_full + (n & 1), m_tile * BM, h, b);
                        }
                        if (use > 0) mbarrier_wait(k_empty + stage, (use - 1) & 1);
                        mbarrier_arrive_expect(k_full + stage, KV_BYTES);
                        tma_load_4d(k_smem + stage * KV_BYTES, k_map, k_full + stage, at * BN, h, b);
                    }
                }
                if (t > 0) {
                    const int stage = (t - 1) & 1, use = (t - 1) >> 1;
                    if (use > 0) mbarrier_wait(v_empty + stage, (use - 1) & 1);
                    mbarrier_arrive_expect(v_full + stage, KV_BYTES);
                    tma_load_4d(v_smem + stage * KV_BYTES, v_map, v_full + stage, before_at * BN, before_h, b);
                    // what comes later, into L2
                    while (ahead < total && ahead <= t + 4) {
                        if (ahead >= 2 && ahead % share == own) {
                            tma_prefetch_4d(k_map, ahead_at * BN, ahead_h, b);
                            tma_prefetch_4d(v_map, ahead_at * BN, ahead_h, b);
                        }
                        if (ahead > 0 && ahead_at == 0) tma_prefetch_4d(q_map, m_tile * BM, ahead_h, b);
                        ++ahead;
                        if (++ahead_at == n_blocks) { ahead_at = 0; ++ahead_h; }
                    }
                }
                before_h = h;
                before_at = at;
                if (++at == n_blocks) { at = 0; ++h; }
            }
        }
    } else {  // ---------------- consumers
        setmaxnreg_inc<240>();
        const int turn = 1 + wg, next_turn = 2 - wg;  // named barriers 1, 2
        const int own = 3 + wg;                       // and one for each group alone
        const uint64_t q_desc = descriptor(q_smem + wg * 8192);
        const uint64_t k_desc = descriptor(k_smem), v_desc = descriptor(v_smem);
        const uint32_t o_row = q_smem + wg * 8192 + (warp * 16 + (lane >> 2)) * 128 + (lane & 3) * 4;
        // ldmatrix: lane i names row i % 8 of tile i / 8; the tiles are (rows 0-7, 8-15) of a chunk, then of the next
        const uint32_t slot_lane = slots + ((lane & 7) + (lane & 8)) * 256 + (((lane >> 4) ^ (lane & 7)) << 4);
        const int own_column = (lane & 3) * 2;

        float s[64], o[32], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f}, alpha[2];
        uint32_t p[32], bias[32];
#pragma unroll
        for (int i = 0; i < 32; ++i) o[i] = 0.f;

        // normalise O of the run's head n, stage it in this group's half of its Q, and store it
        auto finish = [&](int n, const float (&most)[2], const float (&part)[2]) {
            const int h = first_head + n;
            float inverse[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float all = part[r];
                all += __shfl_xor_sync(0xffffffffu, all, 1);
                all += __shfl_xor_sync(0xffffffffu, all, 2);
                inverse[r] = all == 0.f ? 1.f : 1.f / all;  // a row that hides every key gives zeros
#if HAS_LOGSUMEXP
                const int row = first_row + (lane >> 2) + 8 * r;
                if ((lane & 3) == 0 && row < nq) {
                    float rounding = 0.f;  // of top * log2(e)
                    if (fabsf(most[r]) < float(STEADY)) rounding = fmaf(most[r], log2e(), -__fmul_rn(most[r], log2e()));
                    logsumexp[((long long)b * heads + h) * nq + row] = most[r] + (logf(all) - rounding * 0.69314718f);
                }
#endif
            }
            named_sync(own, 128);  // the whole group's products have read Q
            const uint32_t to = o_row + (n & 1) * Q_BYTES;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const uint32_t chunk = (j ^ ((lane >> 2) & 7)) * 16;  // swizzle 128: row % 8 == lane / 4 for both rows
                asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + chunk), "r"(pack2(o[4 * j] * inverse[0], o[4 * j + 1] * inverse[0])) : "memory");
                asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + 1024 + chunk), "r"(pack2(o[4 * j + 2] * inverse[1], o[4 * j + 3] * inverse[1])) : "memory");
            }
            fence_async_shared();
            named_sync(own, 128);
            if (storer) {
                const int m = m_tile * BM + wg * 64;
                if (m < nq) tma_store_4d(y_map, q_smem + (n & 1) * Q_BYTES + wg * 8192, m, h, b);
                tma_store_commit();
            }
            __syncwarp();
        };
        auto hand_back = [&](int n) {  // Q's buffer, once the store has read it
            if (storer) tma_store_wait<0>();
            __syncwarp();
            mbarrier_arrive(q_empty + (n & 1));
        };

#if TURNS
        if (wg == 1 && total > 1) named_arrive(next_turn, 256);  // group 0's first turn
#endif

        // step 0
        mbarrier_wait(q_full, 0);
        mbarrier_wait(k_full, 0);
        pin(s);
        wgmma_fence();
        wgmma_qk<0>(s, q_desc, k_desc);
        wgmma_qk<1>(s, q_desc + 2, k_desc + 2);
        wgmma_qk<1>(s, q_desc + 4, k_desc + 4);
        wgmma_qk<1>(s, q_desc + 6, k_desc + 6);
        wgmma_commit();
        fill_next();
        cp_async_wait<AHEAD>();
        __syncwarp();
        read_slot(bias, slot_lane);
        wgmma_wait<0>();
        pin(s);
        if (leader) mbarrier_arrive(k_empty);
        __syncwarp();
        apply_mask(s, bias, scale, own_column, nk, BN > nk);
        softmax_step(s, top, sum, alpha);
#pragma unroll
        for (int i = 0; i < 32; ++i) p[i] = pack2(s[2 * i], s[2 * i + 1]);

        int at = 0, n = 0;       // block and head of the step
        bool pending = false;    // the Q buffer of head n - 1 is to be handed back
#pragma unroll 1
        for (int t = 1; t < total; ++t) {
            if (++at == n_blocks) {
                at = 0;
                ++n;
                if (pending) {  // heads of one block: the producer waits for this buffer before it goes on
                    hand_back(n);
                    pending = false;
                }
                mbarrier_wait(q_full + (n & 1), (n >> 1) & 1);
            }
            const int ks = t & 1, vs = ks ^ 1;
            mbarrier_wait(k_full + ks, (t >> 1) & 1);
#if TURNS
            named_sync(turn, 256);
#endif
            pin(o);
            pin(p);
            pin(s);
            wgmma_fence();
            {
                const uint64_t qd = q_desc + (n & 1) * (Q_BYTES >> 4), kd = k_desc + ks * (KV_BYTES >> 4);
                wgmma_qk<0>(s, qd, kd);
                wgmma_qk<1>(s, qd + 2, kd + 2);
                wgmma_qk<1>(s, qd + 4, kd + 4);
                wgmma_qk<1>(s, qd + 6, kd + 6);
            }
            wgmma_commit();
            mbarrier_wait(v_full + vs, ((t - 1) >> 1) & 1);
            {
                const uint64_t vd = v_desc + vs * (KV_BYTES >> 4);
#pragma unroll
                for (int i = 0; i < 8; ++i) wgmma_pv(o, p + 4 * i, vd + i * (2048 >> 4), 1);
            }
            wgmma_commit();
#if TURNS
            if (wg == 0 || t + 1 < total) named_arrive(next_turn, 256);
#endif
            if (pending) {
                hand_back(n - 1);
                pending = false;
            }
            fill_next();
            cp_async_wait<AHEAD>();
            __syncwarp();
            read_slot(bias, slot_lane + (resident ? at : t & 3) * SLOT);
            wgmma_wait<1>();
            pin(s);
            if (leader) mbarrier_arrive(k_empty + ks);
            __syncwarp();
            const float last_top[2] = {top[0], top[1]}, last_sum[2] = {sum[0], sum[1]};
            if (at == 0) {
                top[0] = top[1] = -INFINITY;
                sum[0] = sum[1] = 0.f;
            }
            apply_mask(s, bias, scale, at * BN + own_column, nk, at * BN + BN > nk);
            softmax_step(s, top, sum, alpha);
            pin(s);
            wgmma_wait<0>();
            pin(o);
            pin(p);
            if (leader) mbarrier_arrive(v_empty + vs);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 32; ++i) p[i] = pack2(s[2 * i], s[2 * i + 1]);
            if (at == 0) {
                finish(n - 1, last_top, last_sum);
                pending = true;
#pragma unroll
                for (int i = 0; i < 32; ++i) o[i] = 0.f;
            } else if (__any_sync(0xffffffffu, !(alpha[0] == 1.f && alpha[1] == 1.f))) {
#pragma unroll
                for (int i = 0; i < 32; ++i) o[i] *= alpha[(i >> 1) & 1];
            }
        }

        {
            const int vs = (total - 1) & 1;
            mbarrier_wait(v_full + vs, ((total - 1) >> 1) & 1);
            pin(o);
            pin(p);
            wgmma_fence();
            const uint64_t vd = v_desc + vs * (KV_BYTES >> 4);
#pragma unroll
            for (int i = 0; i < 8; ++i) wgmma_pv(o, p + 4 * i, vd + i * (2048 >> 4), 1);
            wgmma_commit();
            wgmma_wait<0>();
            pin(o);
            pin(p);
        }
        finish(n, top, sum);
        cp_async_wait<0>();
        if (storer) tma_store_wait<0>();
    }
}
