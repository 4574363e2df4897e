/*---
implements = "attention"
target     = "cuda"
dtypes     = ["float16", "bfloat16"]
where      = ["device.arch == 90", "is_causal == 0", "q.ndim == 4", "k.ndim == 4", "v.ndim == 4", "y.ndim == 4", "q.shape[3] == 64",
              "k.shape[3] == 64", "v.shape[3] == 64", "y.shape[3] == 64", "k.shape[0] == q.shape[0]",
              "v.shape[0] == q.shape[0]", "k.shape[1] == q.shape[1]", "v.shape[1] == q.shape[1]",
              "v.shape[2] == k.shape[2]", "q.shape[2] >= 1", "k.shape[2] >= 1", "q.shape[0] >= 1", "q.shape[1] >= 1",
              "q.itemsize == 2", "q.shape[2] < 2000000000", "k.shape[2] < 2000000000", "q.stride[3] == 1",
              "q.stride[0] > 0", "q.stride[0] % 8 == 0", "q.stride[1] > 0", "q.stride[1] % 8 == 0", "q.stride[2] > 0",
              "q.stride[2] % 8 == 0", "k.stride[3] == 1", "k.stride[0] > 0", "k.stride[0] % 8 == 0", "k.stride[1] > 0",
              "k.stride[1] % 8 == 0", "k.stride[2] > 0", "k.stride[2] % 8 == 0", "v.stride[3] == 1", "v.stride[0] > 0",
              "v.stride[0] % 8 == 0", "v.stride[1] > 0", "v.stride[1] % 8 == 0", "v.stride[2] > 0", "v.stride[2] % 8 == 0",
              "y.stride[3] == 1", "y.stride[0] > 0", "y.stride[0] % 8 == 0", "y.stride[1] > 0", "y.stride[1] % 8 == 0",
              "y.stride[2] > 0", "y.stride[2] % 8 == 0", "q.shape[0] * q.shape[1] * ceil_div(q.shape[2], 64) < 2000000000",
              "smem_bytes <= device.smem_per_block"]
dims       = { batch = "q.shape[0]", heads = "q.shape[1]", nq = "q.shape[2]", nk = "k.shape[2]", smem_bytes = "1024 + 24576 + 2 * 3 * BN * 128 + 36864 + 256" }
tune       = { BN = [128], TURNS = [0, 1] }
align      = 16
[[tensor_map]]
name = "q_map"
over = "q"
dims = ["64", "nq", "heads", "batch"]
strides = ["q.stride[2] * q.itemsize", "q.stride[1] * q.itemsize", "q.stride[0] * q.itemsize"]
box = ["64", "192", "1", "1"]
swizzle = "128"
l2 = "128"
oob = "zero"
[[tensor_map]]
name = "k_map"
over = "k"
dims = ["64", "nk", "heads", "batch"]
strides = ["k.stride[2] * k.itemsize", "k.stride[1] * k.itemsize", "k.stride[0] * k.itemsize"]
box = ["64", "BN", "1", "1"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "v_map"
over = "v"
dims = ["64", "nk", "heads", "batch"]
strides = ["v.stride[2] * v.itemsize", "v.stride[1] * v.itemsize", "v.stride[0] * v.itemsize"]
box = ["64", "BN", "1", "1"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[launch]]
kernel = "attention"
grid   = ["min(device.sms, batch * heads * ceil_div(nq, 192))"]
block  = ["512"]
smem   = "smem_bytes"
args   = ["q_map", "k_map", "v_map", "q", "k", "v", "y", "batch", "heads", "nq", "nk", "scale", "y.stride[0]", "y.stride[1]", "y.stride[2]"]
---*/
// softmax(q k^T * scale) v, head dimension 64. Persistent: each block walks tiles of 192 query rows of one head, three consumer groups of
// 64 rows. The partial last round is cut into units of 64 rows: there the three groups share the rows and split the KV blocks, and
// group 0 merges the three results through shared memory. Warpgroup 0: one thread feeds Q and rings of K and V tiles by TMA.
// Blocks go from the last to the first; TMA fills tokens past the end with zeros and their scores become -inf.

constexpr int D = 64, PANELS = D / 64, CONSUMERS = 3, BM = 64 * CONSUMERS;
constexpr int STAGES = 3;
constexpr int Q_PANEL = BM * 128, Q_BYTES = Q_PANEL * PANELS;     // panels of 64 columns: rows of 128 bytes, swizzle 128
constexpr int KV_PANEL = BN * 128, KV_BYTES = KV_PANEL * PANELS;
constexpr int SN = BN / 2, PN = BN / 4, ON = D / 2;                 // registers of S, P and O
#define CAUSAL (P_IS_CAUSAL != 0)

template <class E> struct is_half { static constexpr bool value = false; };
template <> struct is_half<__half> { static constexpr bool value = true; };

#if BN == 128
#define WGMMA_QK(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;\n}" \
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]), "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]), "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]), "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]), "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31]), "+f"(s[32]), "+f"(s[33]), "+f"(s[34]), "+f"(s[35]), "+f"(s[36]), "+f"(s[37]), "+f"(s[38]), "+f"(s[39]), "+f"(s[40]), "+f"(s[41]), "+f"(s[42]), "+f"(s[43]), "+f"(s[44]), "+f"(s[45]), "+f"(s[46]), "+f"(s[47]), "+f"(s[48]), "+f"(s[49]), "+f"(s[50]), "+f"(s[51]), "+f"(s[52]), "+f"(s[53]), "+f"(s[54]), "+f"(s[55]), "+f"(s[56]), "+f"(s[57]), "+f"(s[58]), "+f"(s[59]), "+f"(s[60]), "+f"(s[61]), "+f"(s[62]), "+f"(s[63]) \
        : "l"(a), "l"(b), "n"(Accumulate))
#endif

#define WGMMA_PV(TYPE) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n" \
        : "+f"(o[0]), "+f"(o[1]), "+f"(o[2]), "+f"(o[3]), "+f"(o[4]), "+f"(o[5]), "+f"(o[6]), "+f"(o[7]), "+f"(o[8]), "+f"(o[9]), "+f"(o[10]), "+f"(o[11]), "+f"(o[12]), "+f"(o[13]), "+f"(o[14]), "+f"(o[15]), "+f"(o[16]), "+f"(o[17]), "+f"(o[18]), "+f"(o[19]), "+f"(o[20]), "+f"(o[21]), "+f"(o[22]), "+f"(o[23]), "+f"(o[24]), "+f"(o[25]), "+f"(o[26]), "+f"(o[27]), "+f"(o[28]), "+f"(o[29]), "+f"(o[30]), "+f"(o[31]) \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b))

// s (64 x BN) = or += a (64 x 16, shared, K-major) * b (BN x 16, shared, K-major)^T
template <int Accumulate> __device__ __forceinline__ void wgmma_qk(float (&s)[SN], uint64_t a, uint64_t b) {
    if constexpr (is_half<T>::value) { WGMMA_QK("f16"); } else { WGMMA_QK("bf16"); }
}
// o (64 x D) += a (64 x 16, registers) * b (16 x D, shared, panels of 64 columns: transposed operand)
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
__device__ __forceinline__ void release(uint64_t* barrier, int lane) {  // this warp is done with a stage of K or V
    if (lane == 0) mbarrier_arrive(barrier);
}
__device__ __forceinline__ void load_box(uint32_t smem, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
                 ::"r"(smem), "l"(&map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
// swizzle 128; leading: bytes between panels (transposed operand wider than 64 only), 8 rows are 1024 bytes
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading) {
    return (uint64_t(address & 0x3ffff) >> 4) | (uint64_t(leading >> 4) << 16) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 62);
}
__device__ __forceinline__ void product_qk(float (&s)[SN], uint64_t qd, uint64_t kd) {
    wgmma_qk<0>(s, qd, kd);
#pragma unroll
    for (int t = 1; t < D / 16; ++t)
        wgmma_qk<1>(s, qd + (t / 4) * (Q_PANEL >> 4) + (t % 4) * 2, kd + (t / 4) * (KV_PANEL >> 4) + (t % 4) * 2);
}
__device__ __forceinline__ void product_pv(float (&o)[ON], const uint32_t (&p)[PN], uint64_t vd) {
#pragma unroll
    for (int t = 0; t < BN / 16; ++t) wgmma_pv(o, p[4 * t], p[4 * t + 1], p[4 * t + 2], p[4 * t + 3], vd + t * (2048 >> 4));
}
__device__ __forceinline__ void pack_p(uint32_t (&p)[PN], const float (&s)[SN]) {
#pragma unroll
    for (int i = 0; i < PN; ++i) p[i] = pack2(s[2 * i], s[2 * i + 1]);
}
__device__ __forceinline__ void negate(float (&s)[SN]) {
    if constexpr (double(P_SCALE) < 0.0) {
#pragma unroll
        for (int i = 0; i < SN; ++i) s[i] = -s[i];
    }
}
// limit0, limit1: how many columns of the tile rows g and g + 8 may see
__device__ __forceinline__ void mask_tile(float (&s)[SN], int limit0, int limit1, int lane) {
    limit0 -= (lane & 3) * 2;
    limit1 -= (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < SN; ++i)
        if ((i / 4) * 8 + (i & 1) >= ((i & 2) ? limit1 : limit0)) s[i] = -INFINITY;
}

// One tile of online softmax on the scores of a thread: rows g and g + 8 of its warp's 16. s becomes exp2(s * c - top * c), where top
// follows the maximum only when that is more than `margin` (8 in the log2 domain) above it: p stays below 2^8,
// and O seldom needs its factor alpha. Returns whether any row of the warp needs it.
__device__ __forceinline__ bool softmax_step(float (&s)[SN], float (&top)[2], float (&sum)[2], float (&alpha)[2], float c, float margin) {
    bool changed[2];
    float shift[2];
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
        changed[r] = !(a <= top[r] + margin);
        const float old = top[r];
        if (changed[r]) top[r] = a;
        shift[r] = top[r] == -INFINITY ? 0.f : top[r] * c;
        float grown = old * c - shift[r];
        grown = old == -INFINITY ? -INFINITY : grown;
        alpha[r] = exp2_fast(changed[r] ? grown : 0.f);
    }
    const bool any = __any_sync(0xffffffffu, changed[0] || changed[1]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float t0 = 0.f, t1 = 0.f;
#pragma unroll
        for (int j = 0; j < SN / 4; ++j) {
            const float p0 = exp2_fast(fmaf(s[4 * j + 2 * r], c, -shift[r]));
            const float p1 = exp2_fast(fmaf(s[4 * j + 2 * r + 1], c, -shift[r]));
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
        const float inverse = total == 0.f ? 1.f : 1.f / total;  // a row of -inf scores gives zeros, as PyTorch's attention does
        const int row = row0 + (lane >> 2) + 8 * r;
#pragma unroll
        for (int g = 0; g < D / 32; ++g) {
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

extern "C" __global__ void __launch_bounds__(512, 1)
attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
          const T_q* q, const T_k* k, const T_v* v, T_y* y, int batch, int heads, int nq, int nk, float scale,
          long long y_batch, long long y_head, long long y_row) {
    extern __shared__ uint8_t raw[];
    const uint32_t base = (smem_address(raw) + 1023u) & ~1023u;
    uint8_t* aligned = raw + (base - smem_address(raw));
    const uint32_t q_smem = base, k_smem = base + Q_BYTES, v_smem = k_smem + STAGES * KV_BYTES;
    constexpr int MERGE = 36 * 128 * 4;  // O, top and sum of a group
    float* merge = reinterpret_cast<float*>(aligned + Q_BYTES + 2 * STAGES * KV_BYTES);
    uint64_t* bars = reinterpret_cast<uint64_t*>(aligned + Q_BYTES + 2 * STAGES * KV_BYTES + (CONSUMERS - 1) * MERGE);
    uint64_t *q_full = bars, *q_empty = bars + 1, *k_full = bars + 2, *k_empty = k_full + STAGES, *v_full = k_empty + STAGES,
             *v_empty = v_full + STAGES;

    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        mbarrier_init(q_full, 1);
        mbarrier_init(q_empty, 4 * CONSUMERS);
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(k_full + i, 1);
            mbarrier_init(v_full + i, 1);
            mbarrier_init(k_empty + i, 4 * CONSUMERS);
            mbarrier_init(v_empty + i, 4 * CONSUMERS);
        }
        mbarrier_init_fence();
        fence_async_shared();
    }
    __syncthreads();
    const int first = blockIdx.x, step = gridDim.x;
    const int m_tiles = (nq + BM - 1) / BM;
    const int tiles = batch * heads * m_tiles;
    const int blocks = (nk + BN - 1) / BN;
    // the last, partial round: its tiles are cut into units of 64 rows whose KV blocks are shared out among the consumer groups
    const int rest = tiles % step;
    const bool split = rest > 0 && rest * CONSUMERS <= (CONSUMERS - 1) * step && blocks >= 2 * CONSUMERS;
    const int whole = split ? tiles - rest : tiles;
    const int units = split ? rest * CONSUMERS : 0;

    if (group == 0) {  // ---------------- producer
        setmaxnreg_dec<32>();
        if (threadIdx.x == 0) {
            tma_prefetch(q_map);
            tma_prefetch(k_map);
            tma_prefetch(v_map);
            int ks = 0, vs = 0;
            uint32_t kp = 1, vp = 1, qp = 1;  // a fresh barrier lets a wait for the phase before the first pass
            for (int item = first; item < whole + units; item += step) {
                const bool unit = item >= whole;
                const int tile = unit ? whole + (item - whole) / CONSUMERS : item;
                const int head_index = tile / m_tiles;
                const int m = (tile - head_index * m_tiles) * BM + (unit ? (item - whole) % CONSUMERS * 64 : 0);
                if (m >= nq) continue;
                const int b = head_index / heads, h = head_index - b * heads;
                mbarrier_wait(q_empty, qp);
                qp ^= 1;
                mbarrier_arrive_expect(q_full, Q_BYTES);
#pragma unroll
                for (int i = 0; i < PANELS; ++i) load_box(q_smem + i * Q_PANEL, q_map, q_full, 64 * i, m, h, b);
                for (int j = blocks - 1; j >= -1; --j) {  // K of block j, then V of block j + 1
                    if (j >= 0) {
                        mbarrier_wait(k_empty + ks, kp);
                        mbarrier_arrive_expect(k_full + ks, KV_BYTES);
#pragma unroll
                        for (int i = 0; i < PANELS; ++i)
                            load_box(k_smem + ks * KV_BYTES + i * KV_PANEL, k_map, k_full + ks, 64 * i, j * BN, h, b);
                        if (++ks == STAGES) { ks = 0; kp ^= 1; }
                    }
                    if (j + 1 < blocks) {
                        mbarrier_wait(v_empty + vs, vp);
                        mbarrier_arrive_expect(v_full + vs, KV_BYTES);
#pragma unroll
                        for (int i = 0; i < PANELS; ++i)
                            load_box(v_smem + vs * KV_BYTES + i * KV_PANEL, v_map, v_full + vs, 64 * i, (j + 1) * BN, h, b);
                        if (++vs == STAGES) { vs = 0; vp ^= 1; }
                    }
                }
            }
        }
        __syncwarp();
    } else {  // ---------------- consumers
        setmaxnreg_inc<160>();
        const int wg = group - 1;
        const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
        const int turn = 1 + wg, next_turn = 1 + (wg + 1 == CONSUMERS ? 0 : wg + 1);  // named barriers 1..CONSUMERS
        const float c = (double(P_SCALE) < 0.0 ? -scale : scale) * 1.4426950408889634f;
        const float margin = 8.f / c;
        const uint64_t q_desc = descriptor(q_smem + wg * 8192, 16);
        const uint64_t k_desc = descriptor(k_smem, 16), v_desc = descriptor(v_smem, PANELS > 1 ? KV_PANEL : 16);
        int ks = 0, vs = 0;
        uint32_t kp = 0, vp = 0, qp = 0;
        if constexpr (TURNS) {
            if (wg == 0) named_arrive(turn, 256);  // the first turn is free
        }

        for (int tile = first; tile < whole; tile += step) {
            const int head_index = tile / m_tiles;
            const int m = (tile - head_index * m_tiles) * (BM);
            const int b = head_index / heads, h = head_index - b * heads;
            const int row0 = m + wg * 64;
            float s[SN], o[ON], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f}, alpha[2];
            uint32_t p[PN];
#pragma unroll
            for (int i = 0; i < ON; ++i) o[i] = 0.f;

            mbarrier_wait(q_full, qp);
            qp ^= 1;
            mbarrier_wait(k_full + ks, kp);
            pin(s);
            wgmma_fence();
            product_qk(s, q_desc, k_desc + ks * (KV_BYTES >> 4));
            wgmma_commit();
            wgmma_wait<0>();
            pin(s);
            release(k_empty + ks, lane);
            if (blocks == 1 && lane == 0) mbarrier_arrive(q_empty);
            if (++ks == STAGES) { ks = 0; kp ^= 1; }
            negate(s);
            if (nk - (blocks - 1) * BN < BN) mask_tile(s, nk - (blocks - 1) * BN, nk - (blocks - 1) * BN, lane);
            softmax_step(s, top, sum, alpha, c, margin);
            pack_p(p, s);

#pragma unroll 1
            for (int j = blocks - 2; j >= 0; --j) {
                mbarrier_wait(k_full + ks, kp);
                if constexpr (TURNS) named_sync(turn, 256);
                pin(o);
                pin(p);
                pin(s);
                wgmma_fence();
                product_qk(s, q_desc, k_desc + ks * (KV_BYTES >> 4));
                wgmma_commit();
                mbarrier_wait(v_full + vs, vp);
                product_pv(o, p, v_desc + vs * (KV_BYTES >> 4));
                wgmma_commit();
                if constexpr (TURNS) named_arrive(next_turn, 256);
                wgmma_wait<1>();
                pin(s);
                release(k_empty + ks, lane);
                if (j == 0 && lane == 0) mbarrier_arrive(q_empty);
                if (++ks == STAGES) { ks = 0; kp ^= 1; }
                negate(s);
                const bool rescale = softmax_step(s, top, sum, alpha, c, margin);
                pin(s);
                wgmma_wait<0>();
                pin(o);
                pin(p);
                release(v_empty + vs, lane);
                if (++vs == STAGES) { vs = 0; vp ^= 1; }
                pack_p(p, s);
                if (rescale) {
#pragma unroll
                    for (int i = 0; i < ON; ++i) o[i] *= alpha[(i >> 1) & 1];
                }
            }

            mbarrier_wait(v_full + vs, vp);
            pin(o);
            pin(p);
            wgmma_fence();
            product_pv(o, p, v_desc + vs * (KV_BYTES >> 4));
            wgmma_commit();
            wgmma_wait<0>();
            pin(o);
            pin(p);
            release(v_empty + vs, lane);
            if (++vs == STAGES) { vs = 0; vp ^= 1; }
            store_rows(o, sum, y + b * y_batch + h * y_head, y_row, row0 + warp * 16, nq, lane);
        }

        if (first < units) {  // whole is a multiple of step: unit u belongs to block u % step
            const uint64_t unit_q = descriptor(q_smem, 16);
            for (int u = first; u < units; u += step) {
                const int tile = whole + u / CONSUMERS;
                const int head_index = tile / m_tiles;
                const int row0 = (tile - head_index * m_tiles) * BM + u % CONSUMERS * 64;
                if (row0 >= nq) continue;
                const int b = head_index / heads, h = head_index - b * heads;
                float s[SN], o[ON], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f}, alpha[2];
                uint32_t p[PN];
#pragma unroll
                for (int i = 0; i < ON; ++i) o[i] = 0.f;
                mbarrier_wait(q_full, qp);
                qp ^= 1;
                int mine = wg;
#pragma unroll 1
                for (int j = blocks - 1; j >= 0; --j) {
                    mbarrier_wait(k_full + ks, kp);
                    if (mine == 0) {
                        pin(s);
                        wgmma_fence();
                        product_qk(s, unit_q, k_desc + ks * (KV_BYTES >> 4));
                        wgmma_commit();
                        wgmma_wait<0>();
                        pin(s);
                    }
                    release(k_empty + ks, lane);
                    if (j == 0 && lane == 0) mbarrier_arrive(q_empty);
                    if (++ks == STAGES) { ks = 0; kp ^= 1; }
                    if (mine == 0) {
                        negate(s);
                        if (nk - j * BN < BN) mask_tile(s, nk - j * BN, nk - j * BN, lane);
                        if (softmax_step(s, top, sum, alpha, c, margin)) {
#pragma unroll
                            for (int i = 0; i < ON; ++i) o[i] *= alpha[(i >> 1) & 1];
                        }
                        pack_p(p, s);
                    }
                    mbarrier_wait(v_full + vs, vp);
                    if (mine == 0) {
                        pin(o);
                        pin(p);
                        wgmma_fence();
                        product_pv(o, p, v_desc + vs * (KV_BYTES >> 4));
                        wgmma_commit();
                        wgmma_wait<0>();
                        pin(o);
                        pin(p);
                    }
                    release(v_empty + vs, lane);
                    if (++vs == STAGES) { vs = 0; vp ^= 1; }
                    if (--mine < 0) mine = CONSUMERS - 1;
                }
                const int thread = threadIdx.x & 127;
                named_sync(8, 128 * CONSUMERS);  // the previous unit's merge is over
                if (wg > 0) {
                    float* to = merge + (wg - 1) * (MERGE / 4) + thread;
#pragma unroll
                    for (int i = 0; i < ON; ++i) to[i * 128] = o[i];
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        to[(32 + r) * 128] = top[r];
                        to[(34 + r) * 128] = sum[r];
                    }
                }
                named_sync(9, 128 * CONSUMERS);
                if (wg == 0) {
#pragma unroll 1
                    for (int g = 0; g < CONSUMERS - 1; ++g) {
                        const float* from = merge + g * (MERGE / 4) + thread;
                        float mine_factor[2], its_factor[2];
#pragma unroll
                        for (int r = 0; r < 2; ++r) {
                            const float its = from[(32 + r) * 128];
                            const float both = top[r] != top[r] || top[r] > its ? top[r] : its;  // a NaN stays
                            const float shift = both == -INFINITY ? 0.f : both * c;
                            mine_factor[r] = top[r] == -INFINITY ? 0.f : exp2_fast(top[r] * c - shift);
                            its_factor[r] = its == -INFINITY ? 0.f : exp2_fast(its * c - shift);
                            sum[r] = sum[r] * mine_factor[r] + from[(34 + r) * 128] * its_factor[r];
                            top[r] = both;
                        }
#pragma unroll
                        for (int i = 0; i < ON; ++i)
                            o[i] = o[i] * mine_factor[(i >> 1) & 1] + from[i * 128] * its_factor[(i >> 1) & 1];
                    }
                    store_rows(o, sum, y + b * y_batch + h * y_head, y_row, row0 + warp * 16, nq, lane);
                }
            }
        }
    }
}
