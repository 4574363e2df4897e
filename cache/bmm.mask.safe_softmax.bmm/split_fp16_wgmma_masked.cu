/*---
implements = ["bmm.mask.safe_softmax.bmm", "bmm.mask.softmax.bmm"]
target     = "cuda"
dtypes     = ["float32"]
where      = ["device.arch == 90", "q.itemsize == 4", "k.itemsize == 4", "v.itemsize == 4", "y.itemsize == 4",
              "q.ndim == 3", "k.ndim == 3", "v.ndim == 3", "y.ndim == 3", "mask.ndim == 4",
              "d >= 1", "d <= 64", "nq >= 1", "nk >= 1", "heads >= 1",
              "k.numel == heads * nk * d", "v.numel == heads * nk * d", "y.numel == q.numel", "v.shape[2] == d", "y.shape[1] == nq",
              "q.shape[0] == k.shape[0]", "q.shape[0] == v.shape[0]", "q.shape[0] == y.shape[0]",
              "q.stride[2] == 1", "v.stride[2] == 1", "y.stride[2] == 1", "(k.stride[2] == 1) + (k.stride[1] == 1) >= 1",
              "bmm_size[0] * mask_heads == heads", "bmm_size[2] == nq", "bmm_size[3] == nk", "mask_heads >= 1",
              "mask.itemsize >= 2", "mask.itemsize <= 4", "(mask.shape[3] == nk) + (mask.shape[3] == 1) >= 1",
              "(mask.shape[2] == nq) + (mask.shape[2] == 1) >= 1", "(mask.shape[1] == mask_heads) + (mask.shape[1] == 1) >= 1",
              "(mask.shape[0] == bmm_size[0]) + (mask.shape[0] == 1) >= 1",
              "heads * ceil_div(nq, 128) < 2000000000", "nk < 2000000000", "nq < 2000000000"]
dims       = { d = "q.shape[2]", nq = "q.shape[1]", nk = "v.shape[1]", heads = "q.shape[0]", mask_heads = "bmm_size[1]", kmajor = "1 - (k.stride[2] == 1)" }
static     = ["kmajor"]
tune       = { STAGES = [3], ORDER = [0, 1] }
align      = 16
[[launch]]
kernel = "attention_f32"
grid   = ["min(device.sms, heads * ceil_div(nq, 128))"]
block  = ["384"]
smem   = "1024 + STAGES * 32768 + 512 + 16384 * mask.itemsize"
args   = ["q", "k", "mask", "v", "y", "heads", "mask_heads", "nq", "nk", "d", "q.stride[0]", "q.stride[1]",
          "k.stride[0]", "k.stride[1] * k.stride[2]", "v.stride[0]", "v.stride[1]", "y.stride[0]", "y.stride[1]",
          "mask.stride[0] * (mask.shape[0] > 1)", "mask.stride[1] * (mask.shape[1] > 1)", "mask.stride[2] * (mask.shape[2] > 1)",
          "mask.stride[3] * (mask.shape[3] > 1)"]
---*/
// softmax(q k + mask) v in strict float32 from three float16 wgmma products, width up to 64 (padded with zeros); q, k, v are [batch * heads, ...],
// the mask [batch or 1, heads or 1, queries or 1, keys or 1]. Each consumer thread copies the mask elements of its own scores by cp.async into slots of
// its own, one block of keys ahead: nobody else reads them, so no barrier is needed.
// Warpgroup 0 loads K and V blocks (64 keys) as float32, scales each by a power of two, and writes float16 hi and lo tiles into a ring.
// Warpgroups 1 and 2 hold 64 queries each: S = Q K of block j and P V of block j - 1 are in flight together, the softmax of j runs under P V.
// Small products first; P V of a block starts from zero and is promoted with o = o * alpha + acc. Every scale is an exact power of two.
// Non-finite or gigantic values (the block maxima show them) send the warps that meet them through a scalar float32 path at the end.

constexpr int BM = 128, BN = 64;
constexpr int TILE_BYTES = 8192;              // 64 rows of 64 float16
constexpr int PAIR_BYTES = 2 * TILE_BYTES;    // hi, lo
constexpr int RING_BYTES = STAGES * PAIR_BYTES;
#define K_ROWS_ARE_KEYS (KMAJOR != 0)
static_assert(P_DIM == -1 || P_DIM == 3, "softmax must be over the keys");
#define SAFE (OP_SAFE_SOFTMAX > 0)

// d (64 x 64) = or += a (64 x 16 float16, registers) * b (16 x 64, shared; Trans: rows along k, 64 contiguous values each)
template <int Accumulate, int Trans> __device__ __forceinline__ void wgmma_64(float (&s)[32], const uint32_t* a, uint64_t b) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]),
          "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]),
          "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]), "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]),
          "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(Accumulate), "n"(Trans));
}
// lo * hi, hi * lo, hi * hi, from zero; `hi_tile` is the descriptor of the hi tile, the lo tile follows it
template <int Trans> __device__ __forceinline__ void product(float (&acc)[32], const uint32_t (&hi)[16], const uint32_t (&lo)[16], uint64_t hi_tile) {
    constexpr int STEP = Trans ? 128 : 2;  // 16 rows, or 32 bytes along a row
    const uint64_t lo_tile = hi_tile + (TILE_BYTES >> 4);
    wgmma_64<0, Trans>(acc, lo, hi_tile);
    wgmma_64<1, Trans>(acc, lo + 4, hi_tile + STEP);
    wgmma_64<1, Trans>(acc, lo + 8, hi_tile + 2 * STEP);
    wgmma_64<1, Trans>(acc, lo + 12, hi_tile + 3 * STEP);
    wgmma_64<1, Trans>(acc, hi, lo_tile);
    wgmma_64<1, Trans>(acc, hi + 4, lo_tile + STEP);
    wgmma_64<1, Trans>(acc, hi + 8, lo_tile + 2 * STEP);
    wgmma_64<1, Trans>(acc, hi + 12, lo_tile + 3 * STEP);
    wgmma_64<1, Trans>(acc, hi, hi_tile);
    wgmma_64<1, Trans>(acc, hi + 4, hi_tile + STEP);
    wgmma_64<1, Trans>(acc, hi + 8, hi_tile + 2 * STEP);
    wgmma_64<1, Trans>(acc, hi + 12, hi_tile + 3 * STEP);
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
// exp(t), t <= 0: log2(e) in two terms
__device__ __forceinline__ float exp_two_term(float t) { return exp2_fast(fmaf(t, 1.44269502162933349609f, t * 1.92596299112661746887e-8f)); }
__device__ __forceinline__ float max_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
// two floats (scaled below 2^16) as float16 pairs whose sum they are to 2^-23
__device__ __forceinline__ void split2(float x0, float x1, uint32_t& hi, uint32_t& lo) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(hi) : "f"(x1), "f"(x0));
    float h0, h1;
    asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}" : "=f"(h0), "=f"(h1) : "r"(hi));
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(lo) : "f"(x1 - h1), "f"(x0 - h0));
}
__device__ __forceinline__ float power_of_two(int e) { return __uint_as_float(uint32_t(e + 127) << 23); }  // -126 <= e <= 127
// exponent that lifts a maximum (bits of its absolute value) into [2^14, 2^15), at most 126
__device__ __forceinline__ int lift(uint32_t bits) {
    const int e = 141 - int(min(bits >> 23, 254u));
    return e < 126 ? e : 126;
}
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
    return (uint64_t(address & 0x3ffff) >> 4) | (uint64_t(1) << 16) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 62);
}

// 64 x 64 floats to 128 threads: thread t has rows 8 i + t / 16, columns 4 (t % 16) .. + 3; zeros outside of `rows` x `cols`
__device__ __forceinline__ void load_tile(float (&buf)[32], const float* __restrict__ base, long long stride, int rows, int cols, bool vec, int thread) {
    const int row = thread >> 4, col = (thread & 15) * 4;
    const float* p = base + row * stride + col;
    if (vec && rows >= 64 && cols >= 64) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float4 x = __ldg(reinterpret_cast<const float4*>(p + i * 8 * stride));
            buf[4 * i] = x.x;
            buf[4 * i + 1] = x.y;
            buf[4 * i + 2] = x.z;
            buf[4 * i + 3] = x.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const bool ok = row + 8 * i < rows;
            const float* r = p + i * 8 * stride;
#pragma unroll
            for (int c = 0; c < 4; ++c) buf[4 * i + c] = ok && col + c < cols ? __ldg(r + c) : 0.f;
        }
    }
}
// the same tile into L2, ahead of its load
__device__ __forceinline__ void prefetch_tile(const float* base, long long stride, int rows, int cols, int thread) {
    const int row = thread >> 1, col = (thread & 1) * 32;
    if (row < rows && col < cols) asm volatile("prefetch.global.L2 [%0];" ::"l"(base + row * stride + col));
}
// bits of the greatest absolute value of the tile (NaN above infinity), the same for all 128 threads
__device__ __forceinline__ uint32_t tile_max(const float (&buf)[32], uint32_t* slots, int thread) {
    float a = 0.f, b = 0.f;
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        a = max_nan(a, fabsf(buf[i]));
        b = max_nan(b, fabsf(buf[i + 1]));
    }
    const uint32_t top = __reduce_max_sync(0xffffffffu, __float_as_uint(max_nan(a, b)) & 0x7fffffffu);
    if ((thread & 31) == 0) slots[thread >> 5] = top;
    barrier_sync(3, 128);
    return max(max(slots[0], slots[1]), max(slots[2], slots[3]));
}
__device__ __forceinline__ void store_tile(const float (&buf)[32], uint32_t tile, float mul, int thread) {
    const int row = thread >> 4, col4 = thread & 15;  // row % 8 is the same in all steps
    const uint32_t at = tile + row * 128 + (((col4 >> 1) ^ row) << 4) + (col4 & 1) * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        uint32_t h0, h1, l0, l1;
        split2(buf[4 * i] * mul, buf[4 * i + 1] * mul, h0, l0);
        split2(buf[4 * i + 2] * mul, buf[4 * i + 3] * mul, h1, l1);
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at + i * 1024), "r"(h0), "r"(h1) : "memory");
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at + TILE_BYTES + i * 1024), "r"(l0), "r"(l1) : "memory");
    }
}

// the A fragments' places of a thread's two rows (row, row + 8): raw[8 k + ..] = row (2 t, 2 t + 1), row + 8, then columns + 8
__device__ __forceinline__ void load_q(float (&raw)[32], const float* __restrict__ base, long long stride, int row, int nq, int d, bool vec, int lane) {
    const int t = (lane & 3) * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const bool ok = row + 8 * r < nq;
        const float* p = base + (row + 8 * r) * stride + t;
        if (vec && d == 64) {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                float2 x = make_float2(0.f, 0.f);
                if (ok) x = __ldg(reinterpret_cast<const float2*>(p + 8 * c));
                raw[8 * (c / 2) + 4 * (c & 1) + 2 * r] = x.x;
                raw[8 * (c / 2) + 4 * (c & 1) + 2 * r + 1] = x.y;
            }
        } else {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                raw[8 * (c / 2) + 4 * (c & 1) + 2 * r] = ok && 8 * c + t < d ? __ldg(p + 8 * c) : 0.f;
                raw[8 * (c / 2) + 4 * (c & 1) + 2 * r + 1] = ok && 8 * c + t + 1 < d ? __ldg(p + 8 * c + 1) : 0.f;
            }
        }
    }
}

// scores past the last key to -inf. Element i: key + 8 * (i / 4) + i % 2
__device__ __forceinline__ void hide_tail(float (&s)[32], int key, int nk) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const int column = key + (i / 4) * 8 + (i & 1);
        if (column >= nk) s[i] = -INFINITY;
    }
}
constexpr int MASK_PAIR = 2 * sizeof(T_mask), MASK_SLOTS = 16 * 256 * MASK_PAIR;  // bytes of a pair, of a block's slots
// pair 2 c + r of the thread (row 8 r, keys 8 c + 0 and 1 behind `from`) into its slot; zeros where `keys` or `rows` end. `ready`: pairs are aligned and contiguous
__device__ __forceinline__ void fetch_mask(const T_mask* from, long long m_row, long long m_key, bool ready, uint32_t slots, int keys, int rows) {
    if (ready && keys >= 58 && rows > 8) {
#pragma unroll
        for (int i = 0; i < 16; ++i)
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(slots + i * 256 * MASK_PAIR), "l"(from + (i & 1) * 8 * m_row + (i >> 1) * 8), "n"(MASK_PAIR)
                         : "memory");
    } else {
#pragma unroll 1
        for (int i = 0; i < 16; ++i) {
            const int column = (i >> 1) * 8, r = (i & 1) * 8;
            const T_mask* p = from + r * m_row + column * m_key;
            const T_mask x = r < rows && column < keys ? p[0] : T_mask(0.f), y = r < rows && column + 1 < keys ? p[m_key] : T_mask(0.f);
            if constexpr (sizeof(T_mask) == 4) {
                asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(slots + i * 256 * MASK_PAIR), "r"(__float_as_uint(to_float(x))), "r"(__float_as_uint(to_float(y))) : "memory");
            } else {
                T_mask both[2] = {x, y};
                asm volatile("st.shared.b32 [%0], %1;" ::"r"(slots + i * 256 * MASK_PAIR), "r"(*reinterpret_cast<uint32_t*>(both)) : "memory");
            }
        }
    }
    cp_async_commit();
}
// scores (scaled by 1 / f) become scores + mask
__device__ __forceinline__ void add_mask(float (&s)[32], const float (&f)[2], uint32_t slots) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const int r = i & 1, at = 4 * (i >> 1) + 2 * r;
        float x, y;
        if constexpr (sizeof(T_mask) == 4) {
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(slots + i * 256 * MASK_PAIR) : "memory");
        } else {
            uint32_t both;
            asm volatile("ld.shared.b32 %0, [%1];" : "=r"(both) : "r"(slots + i * 256 * MASK_PAIR) : "memory");
            x = to_float(reinterpret_cast<const T_mask*>(&both)[0]);
            y = to_float(reinterpret_cast<const T_mask*>(&both)[1]);
        }
        s[at] = fmaf(s[at], f[r], x);
        s[at + 1] = fmaf(s[at + 1], f[r], y);
    }
}
// s becomes exp(s - max) * 2^14; a row that is hidden so far has the maximum -inf and subtracts zero
__device__ __forceinline__ void softmax_step(float (&s)[32], float (&top)[2], float (&sum)[2], float (&alpha)[2], bool& bad) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float a = max_nan(s[2 * r], s[2 * r + 1]), b = max_nan(s[4 + 2 * r], s[5 + 2 * r]);
#pragma unroll
        for (int j = 2; j < 8; j += 2) {
            a = max_nan(a, max_nan(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
            b = max_nan(b, max_nan(s[4 * j + 4 + 2 * r], s[4 * j + 5 + 2 * r]));
        }
        a = max_nan(a, b);
        a = max_nan(a, __shfl_xor_sync(0xffffffffu, a, 1));
        a = max_nan(a, __shfl_xor_sync(0xffffffffu, a, 2));
        bad = bad || !(a < INFINITY);  // a NaN or +inf of the mask
        const float now = fmaxf(top[r], a), shift = now == -INFINITY ? 0.f : now;
        alpha[r] = exp_two_term(top[r] - shift);
        top[r] = now;
        float part[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const float p = exp_two_term(s[4 * j + 2 * r + c] - shift) * 16384.f;
                s[4 * j + 2 * r + c] = p;
                part[2 * (j & 1) + c] += p;
            }
        }
        sum[r] = fmaf(sum[r], alpha[r], (part[0] + part[1]) + (part[2] + part[3]));
    }
}

// One warp, 16 rows, in scalar float32 with the sums of eager: where an input is not finite or gigantic
__device__ __forceinline__ void slow_rows(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v, float* y,
                                          const T_mask* __restrict__ mask, long long q_row, long long k_row, long long v_row, long long y_row,
                                          long long m_row, long long m_key, int first, int nq, int nk, int d, int lane) {
    const long long k_key = K_ROWS_ARE_KEYS ? k_row : 1, k_dim = K_ROWS_ARE_KEYS ? 1 : k_row;
#pragma unroll 1
    for (int row = first; row < first + 16 && row < nq; ++row) {
        const float* qr = q + row * q_row;
        const T_mask* mr = mask + row * m_row;
        float top = -INFINITY;
#pragma unroll 1
        for (int base = 0; base < nk; base += 32) {
            float s = -INFINITY;
            if (base + lane < nk) {
                const float* kp = k + (base + lane) * k_key;
                float dot = 0.f;
#pragma unroll 4
                for (int i = 0; i < d; ++i) dot = fmaf(qr[i], kp[i * k_dim], dot);
                s = dot + to_float(mr[(base + lane) * m_key]);
            }
            top = max_nan(top, s);
        }
        top = warp_max(top);
        const float shift = SAFE && top == -INFINITY ? 0.f : top;
        float sum = 0.f, o0 = 0.f, o1 = 0.f;
#pragma unroll 1
        for (int base = 0; base < nk; base += 32) {
            float e = 0.f;
            if (base + lane < nk) {
                const float* kp = k + (base + lane) * k_key;
                float dot = 0.f;
#pragma unroll 4
                for (int i = 0; i < d; ++i) dot = fmaf(qr[i], kp[i * k_dim], dot);
                e = expf(dot + to_float(mr[(base + lane) * m_key]) - shift);
            }
            sum += e;
            float c0 = 0.f, c1 = 0.f;
            const int some = min(32, nk - base);
#pragma unroll 1
            for (int i = 0; i < some; ++i) {
                const float p = __shfl_sync(0xffffffffu, e, i);
                const float* vp = v + (base + i) * v_row + lane;
                if (lane < d) c0 = fmaf(p, vp[0], c0);
                if (lane + 32 < d) c1 = fmaf(p, vp[32], c1);
            }
            o0 += c0;
            o1 += c1;
        }
        sum = warp_sum(sum);
        if (SAFE && top == -INFINITY) sum = 1.f;  // all keys hidden: probabilities of zero
        o0 /= sum;
        o1 /= sum;
        float* yr = y + row * y_row;
        if (lane < d) yr[lane] = o0;
        if (lane + 32 < d) yr[lane + 32] = o1;
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
attention_f32(const float* __restrict__ q, const float* __restrict__ k, const T_mask* __restrict__ mask, const float* __restrict__ v, float* y, int heads,
              int mask_heads, int nq, int nk, int d, long long q_head, long long q_row, long long k_head, long long k_row, long long v_head, long long v_row,
              long long y_head, long long y_row, long long m_batch, long long m_head, long long m_row, long long m_key) {
    extern __shared__ uint8_t raw_smem[];
    const uint32_t base = (smem_address(raw_smem) + 1023u) & ~1023u;
    uint8_t* aligned = raw_smem + (base - smem_address(raw_smem));
    const uint32_t k_smem = base, v_smem = base + RING_BYTES;
    uint64_t* bars = reinterpret_cast<uint64_t*>(aligned + 2 * RING_BYTES);
    uint64_t *k_full = bars, *k_empty = k_full + STAGES, *v_full = k_empty + STAGES, *v_empty = v_full + STAGES;
    float* k_inverse = reinterpret_cast<float*>(bars + 4 * STAGES);  // 2^-e of the block in the stage; NaN: it needs the slow path
    float* v_inverse = k_inverse + STAGES;
    float* v_ratio = v_inverse + STAGES;  // this block's 2^e over the previous one's
    uint32_t* slots = reinterpret_cast<uint32_t*>(v_ratio + STAGES);  // 2 x 4
    const uint32_t mask_smem = base + 2 * RING_BYTES + 512;  // two blocks' slots, [16][256 threads]

    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(k_full + i, 4);
            mbarrier_init(v_full + i, 4);
            mbarrier_init(k_empty + i, 8);
            mbarrier_init(v_empty + i, 8);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    const int m_tiles = (nq + BM - 1) / BM;
    const int tiles = heads * m_tiles;
    const int lane = threadIdx.x & 31;

    if (group == 0) {  // ---------------- loads and splits K and V
        setmaxnreg_dec<112>();
        const int thread = threadIdx.x;
        const bool k_vec = ((k_row | k_head) & 3) == 0, v_vec = ((v_row | v_head) & 3) == 0;
        int ks = 0, vs = 0;
        int slot = 0;             // two sets of maxima in turn: the barrier of one tile frees the other set
        uint32_t kp = 1, vp = 1;  // a fresh barrier lets a wait for the phase before the first pass
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const int head_index = tile / m_tiles;
            const int blocks = (nk + BN - 1) / BN;
            const float* k_base = k + head_index * k_head;
            const float* v_base = v + head_index * v_head;
            uint32_t v_top = 0;
            int v_exponent = 0;
            float kb[32], vb[32];
            load_tile(kb, k_base, k_row, K_ROWS_ARE_KEYS ? nk : d, K_ROWS_ARE_KEYS ? d : nk, k_vec, thread);
#pragma unroll 1
            for (int j = 0; j <= blocks; ++j) {  // K of block j, then V of block j - 1
                if (j + 2 < blocks) {
                    const long long key = (j + 2) * BN;
                    if constexpr (K_ROWS_ARE_KEYS) prefetch_tile(k_base + key * k_row, k_row, nk - int(key), d, thread);
                    else prefetch_tile(k_base + key, k_row, d, nk - int(key), thread);
                }
                if (j + 1 < blocks) prefetch_tile(v_base + (long long)(j + 1) * BN * v_row, v_row, nk - (j + 1) * BN, d, thread);
                if (j > 0) load_tile(vb, v_base + (long long)(j - 1) * BN * v_row, v_row, nk - (j - 1) * BN, d, v_vec, thread);
                if (j < blocks) {
                    const uint32_t top = tile_max(kb, slots + (slot ^= 4), thread);
                    const int e = lift(top);
                    mbarrier_wait(k_empty + ks, kp);
                    store_tile(kb, k_smem + ks * PAIR_BYTES, power_of_two(e), thread);
                    if (thread == 0) k_inverse[ks] = (top >> 23) >= 187u ? NAN : power_of_two(-e);
                    fence_async_shared();
                    __syncwarp();
                    if (lane == 0) mbarrier_arrive(k_full + ks);
                    if (++ks == STAGES) { ks = 0; kp ^= 1; }
                }
                if (j + 1 < blocks) {
                    const int key = (j + 1) * BN;
                    if constexpr (K_ROWS_ARE_KEYS) load_tile(kb, k_base + key * k_row, k_row, nk - key, d, k_vec, thread);
                    else load_tile(kb, k_base + key, k_row, d, nk - key, k_vec, thread);
                }
                if (j > 0) {
                    const uint32_t top = tile_max(vb, slots + (slot ^= 4), thread);
                    v_top = max(v_top, top);
                    const int e = lift(v_top);
                    if (j == 1) v_exponent = e;
                    const int change = max(e - v_exponent, -126);
                    v_exponent = e;
                    mbarrier_wait(v_empty + vs, vp);
                    store_tile(vb, v_smem + vs * PAIR_BYTES, power_of_two(e), thread);
                    if (thread == 0) {
                        v_inverse[vs] = (v_top >> 23) >= 227u ? NAN : power_of_two(-e);
                        v_ratio[vs] = power_of_two(change);
                    }
                    fence_async_shared();
                    __syncwarp();
                    if (lane == 0) mbarrier_arrive(v_full + vs);
                    if (++vs == STAGES) { vs = 0; vp ^= 1; }
                }
            }
        }
    } else {  // ---------------- consumers
        setmaxnreg_inc<192>();
        const int wg = group - 1;
        const int warp = (threadIdx.x >> 5) & 3;
        const int turn = 1 + wg, next_turn = 2 - wg;  // named barriers 1 and 2
        const bool q_vec = ((q_row | q_head) & 1) == 0, y_vec = ((y_row | y_head) & 1) == 0;
        const uint64_t k_desc = descriptor(k_smem), v_desc = descriptor(v_smem);
        const int warp_row = wg * 64 + warp * 16, own_row = warp_row + (lane >> 2);
        const bool leader = lane == 0;
        const bool m_ready = m_key == 1 && ((m_row | m_head | m_batch) & 1) == 0;
        const uint32_t own_slots = mask_smem + (threadIdx.x - 128) * MASK_PAIR;
        int ks = 0, vs = 0;
        uint32_t kp = 0, vp = 0;
        if (ORDER && wg == 0) barrier_arrive(turn, 256);  // the first turn is free

        float raw[32];
        {
            const int head_index = blockIdx.x / m_tiles;
            const int m = (blockIdx.x - head_index * m_tiles) * BM;
            load_q(raw, q + head_index * q_head, q_row, m + own_row, nq, d, q_vec, lane);
        }
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const int head_index = tile / m_tiles;
            const int m = (tile - head_index * m_tiles) * BM;
            const int blocks = (nk + BN - 1) / BN;
            const int row = m + own_row;
            const int own_key = (lane & 3) * 2;
            const T_mask* own_mask = mask + (head_index / mask_heads) * m_batch + (head_index % mask_heads) * m_head + row * m_row + own_key * m_key;
            fetch_mask(own_mask, m_row, m_key, m_ready, own_slots, nk - own_key, nq - row);

            float s[32], acc[32], o[32], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f}, alpha[2], before[2], f[2], q_inverse[2];
            uint32_t qh[16], ql[16], ph[16], pl[16];
            bool bad = false;
#pragma unroll
            for (int i = 0; i < 32; ++i) o[i] = 0.f;
            {
                float mul[2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float a = 0.f;
#pragma unroll
                    for (int i = 0; i < 8; ++i) a = max_nan(a, max_nan(fabsf(raw[4 * i + 2 * r]), fabsf(raw[4 * i + 2 * r + 1])));
                    a = max_nan(a, __shfl_xor_sync(0xffffffffu, a, 1));
                    a = max_nan(a, __shfl_xor_sync(0xffffffffu, a, 2));
                    const uint32_t bits = __float_as_uint(a) & 0x7fffffffu;
                    const int e = lift(bits);
                    bad = bad || (bits >> 23) >= 187u;
                    mul[r] = power_of_two(e);
                    q_inverse[r] = power_of_two(-e);
                }
#pragma unroll
                for (int i = 0; i < 16; ++i) split2(raw[2 * i] * mul[i & 1], raw[2 * i + 1] * mul[i & 1], qh[i], ql[i]);
            }

            if (blocks > 1) fetch_mask(own_mask + BN * m_key, m_row, m_key, m_ready, own_slots + MASK_SLOTS, nk - BN - own_key, nq - row);
            else cp_async_commit();
            mbarrier_wait(k_full + ks, kp);
            float k_inv = k_inverse[ks];
            pin(s);
            pin(qh);
            pin(ql);
            wgmma_fence();
            product<K_ROWS_ARE_KEYS ? 0 : 1>(s, qh, ql, k_desc + ks * (PAIR_BYTES >> 4));
            wgmma_commit();
            bad = bad || !(k_inv == k_inv);
            f[0] = fmaxf(q_inverse[0] * k_inv, 1.17549435e-38f);
            f[1] = fmaxf(q_inverse[1] * k_inv, 1.17549435e-38f);
            wgmma_wait<0>();
            pin(s);
            pin(qh);
            pin(ql);
            __syncwarp();
            if (leader) mbarrier_arrive(k_empty + ks);
            if (++ks == STAGES) { ks = 0; kp ^= 1; }
            cp_async_wait<1>();
            add_mask(s, f, own_slots);
            if (BN > nk) hide_tail(s, own_key, nk);
            softmax_step(s, top, sum, before, bad);
#pragma unroll
            for (int i = 0; i < 16; ++i) split2(s[2 * i], s[2 * i + 1], ph[i], pl[i]);

#pragma unroll 1
            for (int j = 1; j < blocks; ++j) {
                if (j == 1) mbarrier_wait(k_full + ks, kp);
                k_inv = k_inverse[ks];
                if (ORDER) barrier_sync(turn, 256);
                pin(s);
                pin(acc);
                pin(qh);
                pin(ql);
                pin(ph);
                pin(pl);
                wgmma_fence();
                product<K_ROWS_ARE_KEYS ? 0 : 1>(s, qh, ql, k_desc + ks * (PAIR_BYTES >> 4));
                wgmma_commit();
                mbarrier_wait(v_full + vs, vp);
                product<1>(acc, ph, pl, v_desc + vs * (PAIR_BYTES >> 4));
                wgmma_commit();
                if (ORDER) barrier_arrive(next_turn, 256);
                bad = bad || !(k_inv == k_inv);
                f[0] = fmaxf(q_inverse[0] * k_inv, 1.17549435e-38f);
                f[1] = fmaxf(q_inverse[1] * k_inv, 1.17549435e-38f);
                const float ratio = v_ratio[vs], v_inv = v_inverse[vs];
                bad = bad || !(v_inv == v_inv);
                before[0] *= ratio;
                before[1] *= ratio;
                const int other = (j & 1) * MASK_SLOTS;
                if (j + 1 < blocks) fetch_mask(own_mask + (j + 1) * BN * m_key, m_row, m_key, m_ready, own_slots + (MASK_SLOTS - other), nk - (j + 1) * BN - own_key, nq - row);
                else cp_async_commit();
                wgmma_wait<1>();
                pin(s);
                __syncwarp();
                if (leader) mbarrier_arrive(k_empty + ks);
                if (++ks == STAGES) { ks = 0; kp ^= 1; }
                cp_async_wait<1>();
                add_mask(s, f, own_slots + other);
                if ((j + 1) * BN > nk) hide_tail(s, j * BN + own_key, nk);
                softmax_step(s, top, sum, alpha, bad);
                pin(s);
                if (j + 1 < blocks) mbarrier_wait(k_full + ks, kp);  // a branch: ptxas must not move the softmax below the next wait
                wgmma_wait<0>();
                pin(acc);
                pin(ph);
                pin(pl);
                pin(qh);
                pin(ql);
                __syncwarp();
                if (leader) mbarrier_arrive(v_empty + vs);
                if (++vs == STAGES) { vs = 0; vp ^= 1; }
#pragma unroll
                for (int i = 0; i < 32; ++i) o[i] = fmaf(o[i], before[(i >> 1) & 1], acc[i]);
                before[0] = alpha[0];
                before[1] = alpha[1];
#pragma unroll
                for (int i = 0; i < 16; ++i) split2(s[2 * i], s[2 * i + 1], ph[i], pl[i]);
            }

            mbarrier_wait(v_full + vs, vp);
            const float ratio = v_ratio[vs], v_inv = v_inverse[vs];
            pin(acc);
            pin(ph);
            pin(pl);
            wgmma_fence();
            product<1>(acc, ph, pl, v_desc + vs * (PAIR_BYTES >> 4));
            wgmma_commit();
            bad = bad || !(v_inv == v_inv);
            {   // the next queries arrive while the tensor cores work (after the last tile: the same once more, unused)
                const int next = tile + gridDim.x < tiles ? tile + gridDim.x : tile;
                const int next_head = next / m_tiles;
                const int next_m = (next - next_head * m_tiles) * BM;
                load_q(raw, q + next_head * q_head, q_row, next_m + own_row, nq, d, q_vec, lane);
            }
            float inverse[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                before[r] *= ratio;
                float total = sum[r];
                total += __shfl_xor_sync(0xffffffffu, total, 1);
                total += __shfl_xor_sync(0xffffffffu, total, 2);
                inverse[r] = top[r] != -INFINITY ? 1.f / total : SAFE ? 0.f : NAN;
            }
            wgmma_wait<0>();
            pin(acc);
            pin(ph);
            pin(pl);
            __syncwarp();
            if (leader) mbarrier_arrive(v_empty + vs);
            if (++vs == STAGES) { vs = 0; vp ^= 1; }

            float* y_head_base = y + head_index * y_head;
            if (__any_sync(0xffffffffu, bad)) {
                slow_rows(q + head_index * q_head, k + head_index * k_head, v + head_index * v_head, y_head_base,
                          mask + (head_index / mask_heads) * m_batch + (head_index % mask_heads) * m_head, q_row, k_row, v_row, y_row, m_row,
                          m_key, m + warp_row, nq, nk, d, lane);
            } else {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    if (row + 8 * r < nq) {
                        float* out = y_head_base + (row + 8 * r) * y_row + (lane & 3) * 2;
#pragma unroll
                        for (int c = 0; c < 8; ++c) {
                            const float y0 = fmaf(o[4 * c + 2 * r], before[r], acc[4 * c + 2 * r]) * inverse[r] * v_inv;
                            const float y1 = fmaf(o[4 * c + 2 * r + 1], before[r], acc[4 * c + 2 * r + 1]) * inverse[r] * v_inv;
                            if (y_vec && d == 64) *reinterpret_cast<float2*>(out + 8 * c) = make_float2(y0, y1);
                            else {
                                if (8 * c + (lane & 3) * 2 < d) out[8 * c] = y0;
                                if (8 * c + (lane & 3) * 2 + 1 < d) out[8 * c + 1] = y1;
                            }
                        }
                    }
                }
            }
            __syncwarp();
        }
    }
}
