/*---
implements = ["linear.gelu", "linear", "linear.relu", "linear.silu", "linear.gelu_tanh", "linear.add"]
target     = "cuda"
dtypes     = ["float16", "bfloat16"]
optional   = ["bias", "residual", "linear_out"]
where      = ["device.arch == 90", "x.ndim == 2", "weight.ndim == 2", "y.ndim == 2", "x.itemsize == 2", "weight.itemsize == 2", "y.itemsize == 2",
              "m >= 1", "n >= 32", "k >= 1", "n % 32 == 0", "x.stride[1] == 1", "x.stride[0] % 8 == 0", "x.stride[0] >= k", "weight.stride[0] == 1",
              "weight.stride[1] % 8 == 0", "weight.stride[1] >= k", "y.stride[1] == 1", "y.stride[0] % 8 == 0", "bias.contiguous", "residual.contiguous",
              "linear_out.contiguous", "tiles < 1000000000"]
dims       = { m = "x.shape[0]", k = "x.shape[1]", n = "weight.shape[1]", tiles = "ceil_div(m, 128 * CLUSTER) * ceil_div(n, 256)", groups_n = "max(n // 32, 1)" }
tune       = { CLUSTER = [1, 2, 4], LAG = [0, 3] }
[[tensor_map]]
name = "x_map"
over = "x"
dims = ["k", "m"]
strides = ["x.stride[0] * 2"]
box = ["64", "128"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "w_map"
over = "weight"
dims = ["k", "2", "4", "4", "groups_n"]
strides = ["weight.stride[1] * 2", "weight.stride[1] * 16", "weight.stride[1] * 4", "weight.stride[1] * 64"]
box = ["64", "2", "4", "4", "8 // CLUSTER"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[launch]]
kernel = "linear_deferred"
grid = ["min(tiles, device.sms // CLUSTER - CLUSTER // 4) * CLUSTER"]
block = ["384"]
cluster = ["CLUSTER"]
smem = "4 * 49152 + 1024"
args = ["x_map", "w_map", "bias", "residual", "linear_out", "y", "m", "n", "k", "tiles", "y.stride[0]"]
---*/
// y = act(x @ weight + bias) [+ residual], x [m, k] row-major, weight K-major. Persistent; tile 128 x 256, two consumer warpgroups of 64 x 256
// (m64n256k16), one producer warpgroup, ring of 4 stages of A (128 x 64) and B (256 x 64); the CLUSTER blocks of a cluster are neighbours along m and
// share B: each loads 1 / CLUSTER of its rows and multicasts them.
// Epilogue: at a tile's end only bias is added and the sums are rounded to T, as eager does (64 registers). Activation and stores of columns 32 c to 32 c + 31
// happen behind the wgmmas of K block c of the next tile. B's rows are permuted by the 5-D tensor map: row 8 j + 2 t + e of each 32 in shared memory is
// column 8 t + 2 j + e, so a thread's accumulators of four groups j are 8 consecutive columns, and it stores 16 bytes.

template <class E> struct Pack;
template <> struct Pack<half> {
    enum { HALF = 1 };
    static __device__ __forceinline__ uint32_t pack(float a, float b) {
        const half2 v = __floats2half2_rn(a, b);
        return *reinterpret_cast<const uint32_t*>(&v);
    }
    static __device__ __forceinline__ void unpack(uint32_t v, float& a, float& b) {
        const float2 f = __half22float2(*reinterpret_cast<const half2*>(&v));
        a = f.x, b = f.y;
    }
};
template <> struct Pack<bfloat16> {
    enum { HALF = 0 };
    static __device__ __forceinline__ uint32_t pack(float a, float b) {
        const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
        return *reinterpret_cast<const uint32_t*>(&v);
    }
    static __device__ __forceinline__ void unpack(uint32_t v, float& a, float& b) {
        a = __uint_as_float(v << 16), b = __uint_as_float(v & 0xffff0000u);
    }
};

// d (64 x 256) = [d +] a (64 x 16) * b (256 x 16)^T, both K-major in shared memory
__device__ __forceinline__ void wgmma(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
    if constexpr (Pack<T>::HALF) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
            "%128, %129, p, 1, 1, 0, 0;\n}"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),
          "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
          "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),
          "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),
          "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),
          "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),
          "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),
          "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
            : "l"(a), "l"(b), "r"(accumulate));
    } else {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
            "%128, %129, p, 1, 1, 0, 0;\n}"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),
          "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
          "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),
          "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),
          "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),
          "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),
          "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),
          "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
            : "l"(a), "l"(b), "r"(accumulate));
    }
}
__device__ __forceinline__ void k_block(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
    wgmma_fence();
    wgmma(d, a, b, accumulate);
#pragma unroll
    for (int q = 1; q < 4; ++q) wgmma(d, a + 2 * q, b + 2 * q, 1);
    wgmma_commit();
}
// keeps the compiler from moving uses of the accumulators above the wait in front of this
__device__ __forceinline__ void pin(float (&d)[128]) {
#pragma unroll
    for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// arrival at the barrier of block `rank` of the cluster after reads by wgmma, which are complete: no wider release is needed
__device__ __forceinline__ void arrive_at(uint64_t* barrier, uint32_t rank) {
    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [remote];\n}"
                 ::"r"(smem_address(barrier)), "r"(rank) : "memory");
}
// one lane for each block of the cluster; every warp of both consumer warpgroups calls it
__device__ __forceinline__ void release(uint64_t* barrier, int lane) {
#if CLUSTER > 1
    if (lane < CLUSTER) arrive_at(barrier, lane);
#else
    if (lane == 0) mbarrier_arrive(barrier);
#endif
    __syncwarp();
}

__device__ __forceinline__ float exp2_fast(float v) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
    return v;
}
__device__ __forceinline__ float activate(float v) {
#if OP_GELU
    // q = erfc(|v| / sqrt 2) / 2 = 2^P(|v|), within 2^-17 for |v| < 5, 2^-10 for |v| < 8; P falls to -Inf: q = 0, so -Inf * 0 = NaN as in PyTorch
    const float t = fabsf(v);
    float p = fmaf(t, -1.6897860177778057e-06f, 5.881659308215603e-05f);
    p = fmaf(p, t, -0.0009098189184442163f);
    p = fmaf(p, t, 0.008431879803538322f);
    p = fmaf(p, t, -0.053815808147192f);
    p = fmaf(p, t, -0.4585989713668823f);
    p = fmaf(p, t, -1.151199460029602f);
    p = fmaf(p, t, -1.0f);
    const float q = exp2_fast(p);
    v *= v < 0.0f ? q : 1.0f - q;
#elif OP_GELU_TANH
    const float u = 0.79788456080286535588f * (v + 0.044715f * v * v * v);
    v = v / (1.0f + __expf(-2.0f * u));
#elif OP_SILU
    v = v / (1.0f + __expf(-v));
#elif OP_RELU
    v = v < 0.0f ? 0.0f : v;
#endif
    return v;
}

struct Tile {
    int row, col;
};
// bands of 8 * 128 rows, so that what runs at one time reads little of x and of the weight
__device__ __forceinline__ Tile tile_of(int work, int rank, int m, int n) {
    const int group = 8 / CLUSTER, strips = ceil_div(m, 128 * CLUSTER), tiles_n = ceil_div(n, 256);
    const int band = work / (group * tiles_n), in_band = work % (group * tiles_n);
    const int high = min(group, strips - band * group);
    Tile tile;
    tile.row = ((band * group + in_band % high) * CLUSTER + rank) * 128;
    tile.col = in_band / high * 256;
    return tile;
}

// TMA box of 32-column groups of the weight, to every block of the cluster
__device__ __forceinline__ void load_weight(void* smem, const TensorMap& map, uint64_t* barrier, int c0, int c4) {
#if CLUSTER > 1
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%3, %5, %5, %5, %4}], [%2], %6;"
                 ::"r"(smem_address(smem)), "l"(&map), "r"(smem_address(barrier)), "r"(c0), "r"(c4), "r"(0), "h"(uint16_t((1 << CLUSTER) - 1)) : "memory");
#else
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %5, %5, %5, %4}], [%2];"
                 ::"r"(smem_address(smem)), "l"(&map), "r"(smem_address(barrier)), "r"(c0), "r"(c4), "r"(0) : "memory");
#endif
}

// where the packed tile goes: this thread's first row and columns
struct Place {
    T* y;
#if OP_ADD || HAS_LINEAR_OUT
    long long at;  // in residual and linear_out, which are contiguous
#endif
    int rows, cols;  // how many there are from here; no rows: store nothing
};
// activation and stores of 8 columns of rows g and g + 8
__device__ __forceinline__ void finish(const uint32_t* packed, int chunk, const Place& place, long long pitch, int n,
                                       const T* __restrict__ residual, T* __restrict__ linear_out) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const bool valid = 8 * h < place.rows && 32 * chunk < place.cols;
        Vec<uint32_t, 4> out;
#if HAS_LINEAR_OUT
#pragma unroll
        for (int j = 0; j < 4; ++j) out[j] = packed[4 * h + j];
        if (valid) store_vec(reinterpret_cast<uint32_t*>(linear_out + place.at + 8 * h * (long long)n + 32 * chunk), out);
#endif
#if OP_ADD
        Vec<uint32_t, 4> more = {{0, 0, 0, 0}};
        if (valid) more = load_vec<4>(reinterpret_cast<const uint32_t*>(residual + place.at + 8 * h * (long long)n + 32 * chunk));
#endif
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float a, b;
            Pack<T>::unpack(packed[4 * h + j], a, b);
            a = activate(a), b = activate(b);
#if OP_ADD
            float ra, rb;
            Pack<T>::unpack(more[j], ra, rb);
            a += ra, b += rb;
#endif
            out[j] = Pack<T>::pack(a, b);
        }
        if (valid) store_vec(reinterpret_cast<uint32_t*>(place.y + 8 * h * pitch + 32 * chunk), out);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
linear_deferred(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const T* __restrict__ bias, const T* __restrict__ residual,
                T* __restrict__ linear_out, T* __restrict__ y, int m, int n, int k, int tiles, long long y_pitch) {
    enum { STAGES = 4, STAGE = 49152 };
    extern __shared__ uint8_t raw[];
    __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
    uint8_t* ring = raw + ((1024u - (smem_address(raw) & 1023u)) & 1023u);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rank = blockIdx.x % CLUSTER, step = gridDim.x / CLUSTER;
    const int blocks = max(8, (k + 63) / 64);  // K blocks; those beyond k are zeros

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(&full[s], 1);
            mbarrier_init(&empty[s], 8 * CLUSTER);
        }
        mbarrier_init_fence();
        tma_prefetch(x_map);
        tma_prefetch(w_map);
    }
    __syncthreads();
#if CLUSTER > 1
    cluster_sync();
#endif

    if (warp >= 8) {
        setmaxnreg_dec<40>();
        if (warp == 8 && lane == 0) {
            int s = 0, phase = 0;
            for (int work = blockIdx.x / CLUSTER; work < tiles; work += step) {
                const Tile tile = tile_of(work, rank, m, n);
                for (int b = 0; b < blocks; ++b) {
                    uint8_t* stage = ring + s * STAGE;
                    mbarrier_wait(&empty[s], phase ^ 1);
                    mbarrier_arrive_expect(&full[s], STAGE);
                    tma_load_2d(stage, x_map, &full[s], b * 64, tile.row);
                    load_weight(stage + 16384 + rank * (32768 / CLUSTER), w_map, &full[s], b * 64, tile.col / 32 + rank * (8 / CLUSTER));
                    if (++s == STAGES) s = 0, phase ^= 1;
                }
            }
        }
        __syncwarp();
    } else {
        setmaxnreg_inc<232>();
        const int wg = warp / 4, row_in_tile = warp * 16 + lane / 4, t = lane % 4;
        const uint64_t a0 = wgmma_descriptor_128(ring + wg * 8192), b0 = wgmma_descriptor_128(ring + 16384);
        float acc[128];
        uint32_t packed[64];
#pragma unroll
        for (int i = 0; i < 128; ++i) acc[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < 64; ++i) packed[i] = 0;
        Place place;
        place.y = y;
#if OP_ADD || HAS_LINEAR_OUT
        place.at = 0;
#endif
        place.rows = place.cols = 0;
        int s = 0, phase = 0;

#pragma unroll 1
        for (int work = blockIdx.x / CLUSTER; work < tiles; work += step) {
            const Tile tile = tile_of(work, rank, m, n);
#if LAG > 0
            if (wg == 1) barrier_sync(1, 256);
#endif
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                mbarrier_wait(&full[s], phase);
                k_block(acc, a0 + s * (STAGE / 16), b0 + s * (STAGE / 16), c != 0);
#if LAG > 0
                if (c == LAG - 1 && wg == 0) barrier_arrive(1, 256);
#endif
                if (c > 0) {
                    wgmma_wait<1>();
                    release(&empty[(s + STAGES - 1) % STAGES], lane);
                }
                finish(packed + 8 * c, c, place, y_pitch, n, residual, linear_out);
                if (++s == STAGES) s = 0, phase ^= 1;
            }
#pragma unroll 1
            for (int b = 8; b < blocks; ++b) {
                mbarrier_wait(&full[s], phase);
                k_block(acc, a0 + s * (STAGE / 16), b0 + s * (STAGE / 16), 1);
                wgmma_wait<1>();
                release(&empty[(s + STAGES - 1) % STAGES], lane);
                if (++s == STAGES) s = 0, phase ^= 1;
            }
            const int row = tile.row + row_in_tile, col = tile.col + 8 * t;
            place.y = y + row * y_pitch + col;
#if OP_ADD || HAS_LINEAR_OUT
            place.at = (long long)row * n + col;
#endif
            place.rows = m - row, place.cols = n - tile.col;
#if HAS_BIAS
            Vec<uint32_t, 4> shift[8];
#pragma unroll
            for (int c = 0; c < 8; ++c) shift[c] = load_vec<4>(reinterpret_cast<const uint32_t*>(bias + min(col + 32 * c, n - 8)));
#endif
            wgmma_wait<0>();
            pin(acc);
            release(&empty[(s + STAGES - 1) % STAGES], lane);
#pragma unroll
            for (int c = 0; c < 8; ++c)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float a = 0.0f, b = 0.0f;
#if HAS_BIAS
                    Pack<T>::unpack(shift[c][j], a, b);
#endif
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int i = 16 * c + 4 * j + 2 * h;
                        packed[8 * c + 4 * h + j] = Pack<T>::pack(acc[i] + a, acc[i + 1] + b);
                    }
                }
        }
#pragma unroll
        for (int c = 0; c < 8; ++c) finish(packed + 8 * c, c, place, y_pitch, n, residual, linear_out);
    }
#if CLUSTER > 1
    __syncwarp();
    cluster_sync();  // no block leaves while another may still arrive or write here
#endif
}
