/*---
implements = "attention"
target     = "cuda"
dtypes     = ["float16", "bfloat16"]
where      = ["is_causal == 0", "device.arch == 90", "q.ndim == 4", "k.ndim == 4", "v.ndim == 4", "y.ndim == 4", "q.itemsize == 2",
              "q.shape[3] >= 512", "q.shape[3] <= 1024", "q.shape[3] % 64 == 0",
              "k.shape[3] == q.shape[3]", "v.shape[3] == q.shape[3]", "y.shape[3] == q.shape[3]",
              "k.shape[0] == q.shape[0]", "v.shape[0] == q.shape[0]", "k.shape[1] == q.shape[1]", "v.shape[1] == q.shape[1]",
              "v.shape[2] == k.shape[2]", "q.shape[2] >= 1", "k.shape[2] >= 1", "k.shape[2] <= 512",
              "q.stride[3] == 1", "k.stride[3] == 1", "v.stride[3] == 1", "y.stride[3] == 1",
              "q.stride[2] > 0", "k.stride[2] > 0", "v.stride[2] > 0", "y.stride[2] > 0",
              "q.stride[1] > 0", "k.stride[1] > 0", "v.stride[1] > 0", "y.stride[1] > 0",
              "q.stride[0] > 0", "k.stride[0] > 0", "v.stride[0] > 0", "y.stride[0] > 0",
              "q.stride[2] % 8 == 0", "k.stride[2] % 8 == 0", "v.stride[2] % 8 == 0", "y.stride[2] % 8 == 0",
              "q.stride[1] % 8 == 0", "k.stride[1] % 8 == 0", "v.stride[1] % 8 == 0", "y.stride[1] % 8 == 0",
              "q.stride[0] % 8 == 0", "k.stride[0] % 8 == 0", "v.stride[0] % 8 == 0", "y.stride[0] % 8 == 0",
              "q.shape[0] * q.shape[1] * ceil_div(q.shape[2], 128) < 1000000000"]
dims       = { batch = "q.shape[0]", heads = "q.shape[1]", nq = "q.shape[2]", nk = "k.shape[2]", d = "q.shape[3]", ksteps = "ceil_div(k.shape[2], 128)" }
static     = ["ksteps"]
tune       = { CLUSTER = [1, 2], SKEW = [0, 2] }
align      = 16
[[tensor_map]]
name = "q_map"
over = "q"
dims = ["d", "nq", "heads", "batch"]
strides = ["q.stride[2] * q.itemsize", "q.stride[1] * q.itemsize", "q.stride[0] * q.itemsize"]
box = ["64", "128", "1", "1"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "k_map"
over = "k"
dims = ["d", "nk", "heads", "batch"]
strides = ["k.stride[2] * k.itemsize", "k.stride[1] * k.itemsize", "k.stride[0] * k.itemsize"]
box = ["64", "128", "1", "1"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "v_map"
over = "v"
dims = ["d", "nk", "heads", "batch"]
strides = ["v.stride[2] * v.itemsize", "v.stride[1] * v.itemsize", "v.stride[0] * v.itemsize"]
box = ["64", "128", "1", "1"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[launch]]
kernel  = "attention_wide"
grid    = ["CLUSTER * min(device.sms // CLUSTER, batch * heads * ceil_div(nq, 128 * CLUSTER))"]
block   = ["384"]
cluster = ["CLUSTER"]
smem    = "1024 + 4 * 49152 + 256"
args    = ["q_map", "k_map", "v_map", "q", "k", "v", "y", "batch", "heads", "nq", "nk", "d", "y.stride[0]", "y.stride[1]", "y.stride[2]", "scale"]
---*/
// softmax(q k^T * scale) v for wide heads (512 to 1024) and at most 512 keys. A block owns 128 query rows of one head at a time:
// first all of S (a GEMM over d, 256 keys at a time), P kept in registers as 16-bit A fragments, then O in chunks of 128 columns,
// each a GEMM over all keys. Shared memory is a ring of four 48 KiB stages (Q 16 KiB + K 32 KiB; V 32 KiB) fed by TMA from one
// thread of warpgroup 0; warpgroups 1 and 2 own 64 rows each. The CLUSTER blocks of a cluster work on neighbouring rows of one
// head: each loads one half of every K and V tile and multicasts it. Key block 0 keeps its own row maximum: O is multiplied by
// alpha before key block 1. Tails: TMA fills with zeros, keys past the end are masked to -inf, stores are guarded.

constexpr int STAGES = 4, STAGE = 49152, Q_BYTES = 16384, HALF = 16384;
constexpr int BLOCKS = (KSTEPS + 1) / 2;  // of 256 keys; KSTEPS: of 128

#define WGMMA_QK(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, " \
        "%8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, " \
        "%24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, " \
        "%40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, " \
        "%56, %57, %58, %59, %60, %61, %62, %63, " \
        "%64, %65, %66, %67, %68, %69, %70, %71, " \
        "%72, %73, %74, %75, %76, %77, %78, %79, " \
        "%80, %81, %82, %83, %84, %85, %86, %87, " \
        "%88, %89, %90, %91, %92, %93, %94, %95, " \
        "%96, %97, %98, %99, %100, %101, %102, %103, " \
        "%104, %105, %106, %107, %108, %109, %110, %111, " \
        "%112, %113, %114, %115, %116, %117, %118, %119, " \
        "%120, %121, %122, %123, %124, %125, %126, %127" \
        "}, %128, %129, p, 1, 1, 0, 0;\n}" \
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
#define WGMMA_PV(TYPE) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, " \
        "%8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, " \
        "%24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, " \
        "%40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, " \
        "%56, %57, %58, %59, %60, %61, %62, %63" \
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate))

template <class E> struct is_half { enum { value = 0 }; };
template <> struct is_half<__half> { enum { value = 1 }; };

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

#define NEGATIVE (double(P_SCALE) < 0.0)
#define NONE (double(P_SCALE) == 0.0)

// One block of 256 keys. A thread has rows g and g + 8 of its warp's 16, keys 8 j + 2 (lane % 4) + {0, 1} at s[4 j + 2 r + {0, 1}].
// p[At + 2 j + r] becomes exp2(s * c - shift), two rounded values, with shift = c * (largest score so far); alpha is what earlier sums must be multiplied by.
template <int At, int N>
__device__ __forceinline__ void softmax_block(float (&s)[128], uint32_t (&p)[N], float (&top)[2], float (&shift)[2], float (&sum)[2], float (&alpha)[2],
                                              float c, int left, int lane) {
    if constexpr (NEGATIVE) {
#pragma unroll
        for (int i = 0; i < 128; ++i) s[i] = -s[i];
    }
    if constexpr (NONE) {
#pragma unroll
        for (int i = 0; i < 128; ++i) s[i] *= 0.f;
    }
    if (left < 256) {
        const int first = left - (lane & 3) * 2;
#pragma unroll
        for (int i = 0; i < 128; ++i)
            if ((i / 4) * 8 + (i & 1) >= first) s[i] = -INFINITY;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float a = fmaxf(s[2 * r], s[2 * r + 1]), b = fmaxf(s[4 + 2 * r], s[5 + 2 * r]);
#pragma unroll
        for (int j = 2; j < 32; j += 2) {
            a = fmaxf(a, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
            b = fmaxf(b, fmaxf(s[4 * j + 4 + 2 * r], s[4 * j + 5 + 2 * r]));
        }
        a = fmaxf(a, b);  // a dropped NaN returns in the exponentials
        a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 1));
        a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 2));
        const float now = fmaxf(top[r], a);
        const float to = now == -INFINITY ? 0.f : __fmul_rn(now, c);
        alpha[r] = top[r] == -INFINITY ? 0.f : exp2_fast(shift[r] - to);
        top[r] = now;
        shift[r] = to;
        float t0 = 0.f, t1 = 0.f;
#pragma unroll
        for (int j = 0; j < 32; j += 2) {
            const float p0 = exp2_fast(fmaf(s[4 * j + 2 * r], c, -to));
            const float p1 = exp2_fast(fmaf(s[4 * j + 2 * r + 1], c, -to));
            const float p2 = exp2_fast(fmaf(s[4 * j + 4 + 2 * r], c, -to));
            const float p3 = exp2_fast(fmaf(s[4 * j + 5 + 2 * r], c, -to));
            s[4 * j + 2 * r] = p0;
            s[4 * j + 2 * r + 1] = p1;
            s[4 * j + 4 + 2 * r] = p2;
            s[4 * j + 5 + 2 * r] = p3;
            t0 += p0 + p1;
            t1 += p2 + p3;
        }
        sum[r] = fmaf(sum[r], alpha[r], t0 + t1);
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) {
        p[At + i] = pack2(s[2 * i], s[2 * i + 1]);
        asm volatile("" : "+r"(p[At + i])::"memory");
    }
}

// Rows g (low) and g + 8 (high) of 16 columns from two neighbouring 8-column groups: lane pairs exchange a register, then each
// lane has 8 bytes and a quad writes a 32-byte sector. at: column of the first group within the row.
__device__ __forceinline__ void store_pair(T_y* row, bool valid, uint32_t first, uint32_t second, int lane) {
    const bool odd = lane & 1;
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
    uint2 out;
    out.x = odd ? got : first;
    out.y = odd ? second : got;
    if (valid) *reinterpret_cast<uint2*>(row + (odd ? 8 : 0) + (lane & 2) * 2) = out;
}

// lower half of a descriptor; `leading`: bytes between groups of 64 columns of a transposed operand
#define DESCRIPTOR_HIGH ((uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 62))
__device__ __forceinline__ uint32_t descriptor(uint32_t address, uint32_t leading) { return ((address & 0x3ffff) >> 4) | ((leading >> 4) << 16); }
// d (64 x 256) = or += a (64 x 16, shared, K-major) * b (256 x 16, shared, K-major)^T
__device__ __forceinline__ void wgmma_qk(float (&d)[128], uint32_t a_low, uint32_t b_low, int accumulate) {
    const uint64_t a = DESCRIPTOR_HIGH | a_low, b = DESCRIPTOR_HIGH | b_low;
    if constexpr (is_half<T>::value) { WGMMA_QK("f16"); } else { WGMMA_QK("bf16"); }
}
// d (64 x 128) = or += a (64 x 16, registers) * b (16 x 128, shared, boxes of 64 contiguous columns: transposed operand)
__device__ __forceinline__ void wgmma_pv(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b_low, int accumulate) {
    const uint64_t b = DESCRIPTOR_HIGH | b_low;
    if constexpr (is_half<T>::value) { WGMMA_PV("f16"); } else { WGMMA_PV("bf16"); }
}
__device__ __forceinline__ void tma_load_4d_multicast(void* smem, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2, int c3,
                                                      uint16_t mask) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
                 ::"r"(smem_address(smem)), "l"(&map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(mask) : "memory");
}
// one lane a warp: the stage may be overwritten. Only wgmma read it, and it has finished: no fence is needed.
__device__ __forceinline__ void release(uint64_t* barrier, int lane) {
    if constexpr (CLUSTER == 1) {
        if (lane == 0) mbarrier_arrive(barrier);
    } else {  // lane i tells block i of the cluster
        if (lane < CLUSTER)
            asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                         "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(smem_address(barrier)), "r"(lane) : "memory");
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
attention_wide(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
               const T_q* q, const T_k* k, const T_v* v, T_y* y, int batch, int heads, int nq, int nk, int d,
               long long y_batch, long long y_head, long long y_row, float scale) {
    extern __shared__ uint8_t raw[];
    const uint32_t base = (smem_address(raw) + 1023u) & ~1023u;
    uint8_t* ring = raw + (base - smem_address(raw));
    uint64_t* full = reinterpret_cast<uint64_t*>(ring + STAGES * STAGE);
    uint64_t* empty = full + STAGES;

    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    const int rank = CLUSTER == 1 ? 0 : int(cluster_rank());
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(full + i, 1);
            mbarrier_init(empty + i, 8 * CLUSTER);
        }
        mbarrier_init_fence();
        fence_async_shared();
    }
    __syncthreads();
    if constexpr (CLUSTER > 1) cluster_sync();  // nobody loads into a block, or arrives there, before its barriers are ready

    const int m_tiles = (nq + 128 * CLUSTER - 1) / (128 * CLUSTER);  // of a cluster
    const int tiles = batch * heads * m_tiles;
    const int d_steps = d / 64;
    const int chunks = (d + 127) / 128;
    const int first_tile = blockIdx.x / CLUSTER, tile_step = gridDim.x / CLUSTER;

    if (group == 0) {  // ---------------- producer
        setmaxnreg_dec<24>();
        if (threadIdx.x == 0) {
            tma_prefetch(q_map);
            tma_prefetch(k_map);
            tma_prefetch(v_map);
            int stage = 0;
            uint32_t phase = 1;  // a fresh barrier lets a wait for the phase before the first pass
#pragma unroll 1
            for (int tile = first_tile; tile < tiles; tile += tile_step) {
                const int head_index = tile / m_tiles;
                const int m = ((tile - head_index * m_tiles) * CLUSTER + rank) * 128;
                const int b = head_index / heads, h = head_index - b * heads;
#pragma unroll 1
                for (int kb = 0; kb < BLOCKS; ++kb)
#pragma unroll 1
                    for (int ds = 0; ds < d_steps; ++ds) {
                        uint8_t* to = ring + stage * STAGE;
                        mbarrier_wait(empty + stage, phase);
                        mbarrier_arrive_expect(full + stage, STAGE);
                        if constexpr (CLUSTER == 1) {
                            tma_load_4d(to, q_map, full + stage, ds * 64, m, h, b);
                            tma_load_4d(to + Q_BYTES, k_map, full + stage, ds * 64, kb * 256, h, b);
                            tma_load_4d(to + Q_BYTES + HALF, k_map, full + stage, ds * 64, kb * 256 + 128, h, b);
                        } else {
                            tma_load_4d_multicast(to + Q_BYTES + rank * HALF, k_map, full + stage, ds * 64, kb * 256 + rank * 128, h, b, uint16_t(3));
                            tma_load_4d(to, q_map, full + stage, ds * 64, m, h, b);
                        }
                        if (++stage == STAGES) { stage = 0; phase ^= 1; }
                    }
#pragma unroll 1
                for (int chunk = 0; chunk < chunks; ++chunk)
#pragma unroll 1
                    for (int ks = 0; ks < KSTEPS; ++ks) {
                        uint8_t* to = ring + stage * STAGE + Q_BYTES;
                        mbarrier_wait(empty + stage, phase);
                        mbarrier_arrive_expect(full + stage, 2 * HALF);
                        if constexpr (CLUSTER == 1) {
                            tma_load_4d(to, v_map, full + stage, chunk * 128, ks * 128, h, b);
                            tma_load_4d(to + HALF, v_map, full + stage, chunk * 128 + 64, ks * 128, h, b);  // zeros where past d
                        } else {
                            tma_load_4d_multicast(to + rank * HALF, v_map, full + stage, chunk * 128 + rank * 64, ks * 128, h, b, uint16_t(3));
                        }
                        if (++stage == STAGES) { stage = 0; phase ^= 1; }
                    }
            }
        }
        __syncwarp();
    } else {  // ---------------- consumers
        setmaxnreg_inc<240>();
        const int wg = group - 1;
        const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
        const float c = NONE ? 1.f : (NEGATIVE ? -scale : scale) * 1.4426950408889634f;
        const uint32_t q_desc = descriptor(base + wg * 8192, 16), k_desc = descriptor(base + Q_BYTES, 16);
        const uint32_t v_desc = descriptor(base + Q_BYTES, HALF);
        int stage = 0;
        uint32_t phase = 0;
        const auto before = [&] { return stage == 0 ? STAGES - 1 : stage - 1; };
        // group 1 starts some steps later, so that the groups' softmax and epilogues meet the other's products
        bool begin = SKEW > 0;
        if (SKEW > 0 && wg == 1 && first_tile < tiles) barrier_sync(1, 256);

#pragma unroll 1
        for (int tile = first_tile; tile < tiles; tile += tile_step) {
            float top[2] = {-INFINITY, -INFINITY}, shift[2] = {0.f, 0.f}, sum[2] = {0.f, 0.f}, alpha[2];
            uint32_t p[64 * BLOCKS];
            {
                float s[128];
#pragma unroll
                for (int kb = 0; kb < BLOCKS; ++kb) {
#pragma unroll
                    for (int i = 0; i < 128; ++i) s[i] = 0.f;
                    pin(s);
#pragma unroll 1
                    for (int ds = 0; ds < d_steps; ++ds) {
                        mbarrier_wait(full + stage, phase);
                        wgmma_fence();
                        const uint32_t qd = q_desc + stage * (STAGE >> 4), kd = k_desc + stage * (STAGE >> 4);
                        wgmma_qk(s, qd, kd, 1);
                        wgmma_qk(s, qd + 2, kd + 2, 1);
                        wgmma_qk(s, qd + 4, kd + 4, 1);
                        wgmma_qk(s, qd + 6, kd + 6, 1);
                        wgmma_commit();
                        if (ds > 0) {
                            wgmma_wait<1>();
                            release(empty + before(), lane);
                        }
                        if (SKEW > 0 && begin && ds == SKEW - 1) {
                            if (wg == 0) barrier_arrive(1, 256);
                            begin = false;
                        }
                        if (++stage == STAGES) { stage = 0; phase ^= 1; }
                    }
                    wgmma_wait<0>();
                    pin(s);
                    release(empty + before(), lane);
                    if (kb == 0) softmax_block<0>(s, p, top, shift, sum, alpha, c, nk, lane);
                    else softmax_block<64 * (BLOCKS - 1)>(s, p, top, shift, sum, alpha, c, nk - 256, lane);
                }
                pin(p);
            }

            float inverse[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float total = sum[r];
                total += __shfl_xor_sync(0xffffffffu, total, 1);
                total += __shfl_xor_sync(0xffffffffu, total, 2);
                inverse[r] = total == 0.f ? 1.f : 1.f / total;  // a row of -inf scores gives zeros, as PyTorch's attention does
            }
            const int head_index = tile / m_tiles;
            const int m = ((tile - head_index * m_tiles) * CLUSTER + rank) * 128 + wg * 64 + warp * 16 + (lane >> 2);
            const int b = head_index / heads, h = head_index - b * heads;
            T_y* out = y + b * y_batch + h * y_head + m * y_row;
            const bool low = m < nq, high = m + 8 < nq;

#pragma unroll 1
            for (int chunk = 0; chunk < chunks; ++chunk) {
                float o[64];
#pragma unroll
                for (int i = 0; i < 64; ++i) o[i] = 0.f;
                pin(o);
#pragma unroll
                for (int ks = 0; ks < KSTEPS; ++ks) {
                    if (ks == 2) {
                        wgmma_wait<0>();
                        pin(o);
                        release(empty + before(), lane);
#pragma unroll
                        for (int i = 0; i < 64; ++i) o[i] *= alpha[(i >> 1) & 1];
                        pin(o);
                    }
                    mbarrier_wait(full + stage, phase);
                    wgmma_fence();
                    const uint32_t vd = v_desc + stage * (STAGE >> 4);
#pragma unroll
                    for (int t = 0; t < 8; ++t) {
                        const int at = (ks * 8 + t) * 4;
                        wgmma_pv(o, p[at], p[at + 1], p[at + 2], p[at + 3], vd + t * (2048 >> 4), 1);
                    }
                    wgmma_commit();
                    if (ks == 1 || ks == 3) {
                        wgmma_wait<1>();
                        release(empty + before(), lane);
                    }
                    if (++stage == STAGES) { stage = 0; phase ^= 1; }
                }
                wgmma_wait<0>();
                pin(o);
                release(empty + before(), lane);
#pragma unroll
                for (int j = 0; j < 16; j += 2) {
                    const int column = chunk * 128 + j * 8;
                    const bool inside = column < d;
                    store_pair(out + column, low && inside, pack2(o[4 * j] * inverse[0], o[4 * j + 1] * inverse[0]),
                               pack2(o[4 * j + 4] * inverse[0], o[4 * j + 5] * inverse[0]), lane);
                    store_pair(out + 8 * y_row + column, high && inside, pack2(o[4 * j + 2] * inverse[1], o[4 * j + 3] * inverse[1]),
                               pack2(o[4 * j + 6] * inverse[1], o[4 * j + 7] * inverse[1]), lane);
                }
            }
        }
    }
    if constexpr (CLUSTER > 1) cluster_sync();  // nobody leaves while another still loads into it or arrives there
}
