/*---
implements = "attention"
target     = "cuda"
dtypes     = ["float16", "bfloat16"]
where      = ["is_causal == 0", "q.ndim == 4", "k.ndim == 4", "v.ndim == 4", "y.ndim == 4",
              "q.shape[3] == 64", "k.shape[3] == 64", "v.shape[3] == 64", "y.shape[3] == 64",
              "k.shape[0] == q.shape[0]", "v.shape[0] == q.shape[0]", "k.shape[1] == q.shape[1]", "v.shape[1] == q.shape[1]",
              "v.shape[2] == k.shape[2]", "q.shape[2] >= 1", "k.shape[2] >= 1", "q.itemsize == 2",
              "q.stride[3] == 1", "k.stride[3] == 1", "v.stride[3] == 1", "y.stride[3] == 1",
              "q.stride[2] > 0", "k.stride[2] > 0", "v.stride[2] > 0", "y.stride[2] > 0",
              "q.stride[1] > 0", "k.stride[1] > 0", "v.stride[1] > 0", "y.stride[1] > 0",
              "q.stride[0] > 0", "k.stride[0] > 0", "v.stride[0] > 0", "y.stride[0] > 0",
              "q.stride[2] % 8 == 0", "k.stride[2] % 8 == 0", "v.stride[2] % 8 == 0", "y.stride[2] % 8 == 0",
              "q.stride[1] % 8 == 0", "k.stride[1] % 8 == 0", "v.stride[1] % 8 == 0", "y.stride[1] % 8 == 0",
              "q.stride[0] % 8 == 0", "k.stride[0] % 8 == 0", "v.stride[0] % 8 == 0", "y.stride[0] % 8 == 0",
              "q.shape[0] * q.shape[1] * ceil_div(q.shape[2], 64) < 2000000000"]
dims       = { batch = "q.shape[0]", heads = "q.shape[1]", nq = "q.shape[2]", nk = "k.shape[2]" }
tune       = { CONSUMERS = [2, 3], STAGES = [2, 3] }
align      = 16
[[tensor_map]]
name = "q_map"
over = "q"
dims = ["64", "nq", "heads", "batch"]
strides = ["q.stride[2] * q.itemsize", "q.stride[1] * q.itemsize", "q.stride[0] * q.itemsize"]
box = ["64", "64 * CONSUMERS", "1", "1"]
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
grid   = ["min(device.sms, batch * heads * ceil_div(nq, 64 * CONSUMERS))"]
block  = ["128 * (CONSUMERS + 1)"]
smem   = "1024 + 2 * CONSUMERS * 8192 + 2 * STAGES * 16384 + 256"
args   = ["q_map", "k_map", "v_map", "y_map", "q", "k", "v", "y", "batch", "heads", "nq", "nk", "scale"]
---*/
// softmax(q k^T * scale) v, head dimension 64. Persistent: each block walks tiles of 64 * CONSUMERS query rows of one head.
// Warp group 0: one thread feeds Q and a ring of K and V tiles (128 tokens) by TMA. Warp groups 1..: 64 query rows each; the next
// S = Q K^T and the previous O += P V are in the tensor cores while another group does its softmax (ping-pong by named barriers).
// Tails: TMA fills tokens past the end with zeros (per head: 4-D maps), the first tile visited (the last of the sequence) masks
// them to -inf, and the TMA store clips rows past the end.

constexpr int BM = 64 * CONSUMERS;
constexpr int BN = 128;
constexpr int Q_BYTES = BM * 128;
constexpr int KV_BYTES = BN * 128;
constexpr int PRODUCER_REGS = CONSUMERS == 2 ? 24 : 32;
constexpr int CONSUMER_REGS = CONSUMERS == 2 ? 240 : 160;

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

// One tile of online softmax on the scores of a thread: rows g and g + 8 of its warp's 16. s becomes exp2(s * c - max * c).
__device__ __forceinline__ void softmax_step(float (&s)[64], float (&top)[2], float (&sum)[2], float (&alpha)[2], float c) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float a = fmaxf(s[2 * r], s[2 * r + 1]), b = fmaxf(s[4 + 2 * r], s[5 + 2 * r]);
#pragma unroll
        for (int j = 2; j < 16; j += 2) {
            a = fmaxf(a, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
            b = fmaxf(b, fmaxf(s[4 * j + 4 + 2 * r], s[4 * j + 5 + 2 * r]));
        }
        a = fmaxf(a, b);  // a dropped NaN returns in the exponentials
        a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 1));
        a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 2));
        const float now = fmaxf(top[r], a);
        const float shift = now == -INFINITY ? 0.f : now * c;
        alpha[r] = exp2_fast(top[r] == -INFINITY ? -INFINITY : top[r] * c - shift);
        top[r] = now;
        float t0 = 0.f, t1 = 0.f;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const float p0 = exp2_fast(fmaf(s[4 * j + 2 * r], c, -shift));
            const float p1 = exp2_fast(fmaf(s[4 * j + 2 * r + 1], c, -shift));
            s[4 * j + 2 * r] = p0;
            s[4 * j + 2 * r + 1] = p1;
            t0 += p0;
            t1 += p1;
        }
        sum[r] = fmaf(sum[r], alpha[r], t0 + t1);
    }
}

extern "C" __global__ void __launch_bounds__(128 * (CONSUMERS + 1), 1)
attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
          const __grid_constant__ TensorMap y_map, const T_q* q, const T_k* k, const T_v* v, T_y* y, int batch, int heads, int nq, int nk,
          float scale) {
    extern __shared__ uint8_t raw[];
    const uint32_t base = (smem_address(raw) + 1023u) & ~1023u;
    uint8_t* aligned = raw + (base - smem_address(raw));
    const uint32_t q_smem = base, o_smem = base + Q_BYTES, k_smem = base + 2 * Q_BYTES, v_smem = k_smem + STAGES * KV_BYTES;
    uint64_t* bars = reinterpret_cast<uint64_t*>(aligned + 2 * Q_BYTES + 2 * STAGES * KV_BYTES);
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

    const int m_tiles = (nq + BM - 1) / BM;
    const int tiles = batch * heads * m_tiles;
    const int blocks = (nk + BN - 1) / BN;

    if (group == 0) {  // ---------------- producer
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGS));
        if (threadIdx.x == 0) {
            tma_prefetch(q_map);
            tma_prefetch(k_map);
            tma_prefetch(v_map);
            tma_prefetch(y_map);
            int ks = 0, vs = 0;
            uint32_t kp = 1, vp = 1, qp = 1;  // a fresh barrier lets a wait for the phase before the first pass
            for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                const int head_index = tile / m_tiles;
                const int m = (tile - head_index * m_tiles) * BM;
                const int b = head_index / heads, h = head_index - b * heads;
                mbarrier_wait(q_empty, qp);
                qp ^= 1;
                mbarrier_arrive_expect(q_full, Q_BYTES);
                tma_load_4d(q_smem, q_map, q_full, m, h, b);
                for (int j = blocks - 1; j >= -1; --j) {  // K of block j, then V of block j + 1
                    if (j >= 0) {
                        mbarrier_wait(k_empty + ks, kp);
                        mbarrier_arrive_expect(k_full + ks, KV_BYTES);
                        tma_load_4d(k_smem + ks * KV_BYTES, k_map, k_full + ks, j * BN, h, b);
                        if (++ks == STAGES) { ks = 0; kp ^= 1; }
                    }
                    if (j + 1 < blocks) {
                        mbarrier_wait(v_empty + vs, vp);
                        mbarrier_arrive_expect(v_full + vs, KV_BYTES);
                        tma_load_4d(v_smem + vs * KV_BYTES, v_map, v_full + vs, (j + 1) * BN, h, b);
                        if (++vs == STAGES) { vs = 0; vp ^= 1; }
                    }
                }
            }
        }
    } else {  // ---------------- consumers
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGS));
        const int wg = group - 1;
        const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
        const int turn = 1 + wg, next_turn = 1 + (wg + 1 == CONSUMERS ? 0 : wg + 1);  // named barriers 1..CONSUMERS
        const int own = 1 + CONSUMERS + wg;                                           // and one for each group alone
        constexpr bool NEGATIVE = double(P_SCALE) < 0.0;
        const float c = (NEGATIVE ? -scale : scale) * 1.4426950408889634f;
        const uint64_t q_desc = descriptor(q_smem + wg * 8192);
        const uint64_t k_desc = descriptor(k_smem), v_desc = descriptor(v_smem);
        const uint32_t o_row = o_smem + wg * 8192 + (warp * 16 + (lane >> 2)) * 128 + (lane & 3) * 4;
        const bool leader = lane == 0;
        int ks = 0, vs = 0;
        uint32_t kp = 0, vp = 0, qp = 0;
        if (wg == 0) named_arrive(turn, 256);  // the first turn is free

        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            float s[64], o[32], top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f}, alpha[2];
            uint32_t p[32];
#pragma unroll
            for (int i = 0; i < 32; ++i) o[i] = 0.f;

            mbarrier_wait(q_full, qp);
            qp ^= 1;
            mbarrier_wait(k_full + ks, kp);
            pin(s);
            wgmma_fence();
            {
                const uint64_t kd = k_desc + ks * (KV_BYTES >> 4);
                wgmma_qk<0>(s, q_desc, kd);
                wgmma_qk<1>(s, q_desc + 2, kd + 2);
                wgmma_qk<1>(s, q_desc + 4, kd + 4);
                wgmma_qk<1>(s, q_desc + 6, kd + 6);
            }
            wgmma_commit();
            wgmma_wait<0>();
            pin(s);
            if (leader) {
                mbarrier_arrive(k_empty + ks);
                if (blocks == 1) mbarrier_arrive(q_empty);
            }
            if (++ks == STAGES) { ks = 0; kp ^= 1; }
            if constexpr (NEGATIVE) {
#pragma unroll
                for (int i = 0; i < 64; ++i) s[i] = -s[i];
            }
            const int left = nk - (blocks - 1) * BN;  // valid tokens of the last block, which comes first
            if (left < BN) {
                const int col = (lane & 3) * 2;
#pragma unroll
                for (int i = 0; i < 64; ++i)
                    if ((i / 4) * 8 + col + (i & 1) >= left) s[i] = -INFINITY;
            }
            softmax_step(s, top, sum, alpha, c);
#pragma unroll
            for (int i = 0; i < 32; ++i) p[i] = pack2(s[2 * i], s[2 * i + 1]);

#pragma unroll 1
            for (int j = 1; j < blocks; ++j) {
                mbarrier_wait(k_full + ks, kp);
                named_sync(turn, 256);
                pin(o);
                pin(p);
                pin(s);
                wgmma_fence();
                const uint64_t kd = k_desc + ks * (KV_BYTES >> 4), vd = v_desc + vs * (KV_BYTES >> 4);
                wgmma_qk<0>(s, q_desc, kd);
                wgmma_qk<1>(s, q_desc + 2, kd + 2);
                wgmma_qk<1>(s, q_desc + 4, kd + 4);
                wgmma_qk<1>(s, q_desc + 6, kd + 6);
                wgmma_commit();
                mbarrier_wait(v_full + vs, vp);
#pragma unroll
                for (int t = 0; t < 8; ++t) wgmma_pv(o, p + 4 * t, vd + t * (2048 >> 4), 1);
                wgmma_commit();
                named_arrive(next_turn, 256);
                wgmma_wait<1>();
                pin(s);
                if (leader) {
                    mbarrier_arrive(k_empty + ks);
                    if (j == blocks - 1) mbarrier_arrive(q_empty);
                }
                if (++ks == STAGES) { ks = 0; kp ^= 1; }
                if constexpr (NEGATIVE) {
#pragma unroll
                    for (int i = 0; i < 64; ++i) s[i] = -s[i];
                }
                softmax_step(s, top, sum, alpha, c);
                pin(s);
                wgmma_wait<0>();
                pin(o);
                if (leader) mbarrier_arrive(v_empty + vs);
                if (++vs == STAGES) { vs = 0; vp ^= 1; }
#pragma unroll
                for (int i = 0; i < 32; ++i) p[i] = pack2(s[2 * i], s[2 * i + 1]);
#pragma unroll
                for (int i = 0; i < 32; ++i) o[i] *= alpha[(i >> 1) & 1];
            }

            mbarrier_wait(v_full + vs, vp);
            pin(o);
            pin(p);
            wgmma_fence();
            {
                const uint64_t vd = v_desc + vs * (KV_BYTES >> 4);
#pragma unroll
                for (int t = 0; t < 8; ++t) wgmma_pv(o, p + 4 * t, vd + t * (2048 >> 4), 1);
            }
            wgmma_commit();
            float inverse[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float total = sum[r];
                total += __shfl_xor_sync(0xffffffffu, total, 1);
                total += __shfl_xor_sync(0xffffffffu, total, 2);
                inverse[r] = total == 0.f ? 1.f : 1.f / total;  // a row of -inf scores gives zeros, as PyTorch's attention does
            }
            // this group's staging tile: the previous store must have read it
            if (threadIdx.x % 128 == 0) tma_store_wait<0>();
            named_sync(own, 128);
            wgmma_wait<0>();
            pin(o);
            if (leader) mbarrier_arrive(v_empty + vs);
            if (++vs == STAGES) { vs = 0; vp ^= 1; }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const uint32_t chunk = (j ^ ((lane >> 2) & 7)) * 16;  // swizzle 128: row % 8 == lane / 4 for both rows
                asm volatile("st.shared.b32 [%0], %1;" ::"r"(o_row + chunk), "r"(pack2(o[4 * j] * inverse[0], o[4 * j + 1] * inverse[0])) : "memory");
                asm volatile("st.shared.b32 [%0], %1;" ::"r"(o_row + 1024 + chunk), "r"(pack2(o[4 * j + 2] * inverse[1], o[4 * j + 3] * inverse[1])) : "memory");
            }
            fence_async_shared();
            named_sync(own, 128);
            if (threadIdx.x % 128 == 0) {
                const int head_index = tile / m_tiles;
                const int m = (tile - head_index * m_tiles) * BM + wg * 64;
                const int b = head_index / heads, h = head_index - b * heads;
                if (m < nq) tma_store_4d(y_map, o_smem + wg * 8192, m, h, b);
                tma_store_commit();
            }
        }
        if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
}
