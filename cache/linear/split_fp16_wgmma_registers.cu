/*---
implements = ["linear", "linear.gelu", "linear.relu", "linear.gelu_tanh", "linear.silu", "linear.add"]
target     = "cuda"
dtypes     = ["float32"]
optional   = ["bias", "residual", "linear_out"]
where      = ["x.ndim == 2", "weight.ndim == 2", "y.ndim == 2", "x.stride[1] == 1", "x.stride[0] % 4 == 0", "weight.stride[0] == 1",
              "weight.stride[1] % 4 == 0", "x.stride[0] >= k", "weight.stride[1] >= k", "y.stride[1] == 1", "k % 4 == 0", "k >= 128", "m >= 1", "n >= 1",
              "SWAP <= (m < n)", "SWAP >= (4 * m <= n)", "BN == 128 - 64 * SWAP * (m <= 64)", "tiles < 1000000"]
dims       = { m = "x.shape[0]", k = "x.shape[1]", n = "weight.shape[1]", rows_a = "m * (1 - SWAP) + n * SWAP", rows_b = "n * (1 - SWAP) + m * SWAP", packed_k = "ceil_div(k, 64) * 64", w_rows = "n * (1 - SWAP) + SWAP", x_rows = "m * SWAP + 1 - SWAP", tiles = "ceil_div(rows_a, 128 * CLUSTER) * ceil_div(rows_b, BN)", splits = "max(1, min(min(device.sms // (tiles * CLUSTER), ceil_div(k, 64) // 4), 16))", counts = "tiles * CLUSTER" }
tune       = { CLUSTER = [1, 2], GROUP = [4, 11], SWAP = [0, 1], BN = [64, 128] }
[[workspace]]
name = "w_packed"
dtype = "float16"
shape = ["2 * w_rows", "packed_k"]
[[workspace]]
name = "w_inverse"
dtype = "float32"
shape = ["w_rows"]
[[workspace]]
name = "x_packed"
dtype = "float16"
shape = ["2 * x_rows", "packed_k"]
[[workspace]]
name = "x_inverse"
dtype = "float32"
shape = ["x_rows"]
[[workspace]]
name = "partial"
dtype = "float32"
shape = ["(splits > 1) * counts * splits * 128 * BN + 4"]
[[workspace]]
name = "count"
dtype = "int32"
shape = ["counts"]
[[tensor_map]]
name = "x_map"
over = "x"
dims = ["k", "m"]
strides = ["x.stride[0] * 4"]
box = ["32", "128"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "weight_map"
over = "weight"
dims = ["k", "n"]
strides = ["weight.stride[1] * 4"]
box = ["32", "128"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "w_packed_map"
over = "w_packed"
dims = ["packed_k", "2 * w_rows"]
strides = ["packed_k * 2"]
box = ["64", "BN // CLUSTER"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "x_packed_map"
over = "x_packed"
dims = ["packed_k", "2 * x_rows"]
strides = ["packed_k * 2"]
box = ["64", "BN // CLUSTER"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[prepare]]
kernel = "pack_weight"
grid = ["w_rows"]
block = ["256"]
args = ["weight", "w_packed", "w_inverse", "n", "k", "packed_k", "weight.stride[1]"]
[[launch]]
kernel = "pack_x"
grid = ["max(x_rows, min(ceil_div(counts, 256), 64))"]
block = ["256"]
pdl = true
args = ["x", "x_packed", "x_inverse", "count", "counts", "splits", "m", "k", "packed_k", "x.stride[0]"]
[[launch]]
kernel = "product"
grid = ["min(tiles * splits, device.sms // CLUSTER) * CLUSTER"]
block = ["384"]
cluster = ["CLUSTER"]
smem = "4 * 32768 + 3 * BN * 256 + 1024"
pdl = true
args = ["x_map", "weight_map", "w_packed_map", "x_packed_map", "w_inverse", "x_inverse", "partial", "count", "x", "weight", "bias", "residual",
        "linear_out", "y", "m", "n", "k", "tiles", "splits", "x.stride[0]", "weight.stride[1]", "y.stride[0]"]
---*/
// y = x @ weight (+ bias, epilogue) in strict float32 by three fp16 products: a = 2^-e (hi + lo), |a 2^e| < 2^15, so that lo is exact to
// 2^-39 of the top. One operand ("B": the weight, or x if SWAP) is packed once, one power of two per row; the other ("A") is streamed as float32
// and split in registers, one power of two per row and K block of 64. Both are K-major, so the product kernel is the same.
//
// product: persistent; tile 128 (A rows) x BN (B rows), two consumer warpgroups of 64 x BN, one producer warpgroup with one warp for each ring: A
// (4 stages of two 32-float lines x 128 rows), B (3 stages of hi and lo, BN rows x 64; a cluster of 2 blocks, neighbours along A, shares B: each
// loads half of it and multicasts). The wgmmas of K block i run while block i + 1 of A is split. The products of a K block start from zero, the
// small ones first, and are promoted: master = fma(acc, 2^-e, master).
//
// K is permuted within lines of 32, alike in A and B, so that thread t of a quad owns 8 consecutive floats (two conflict-free 16-byte loads): position
// 8 j + 2 t + e of a packed line holds k = 8 t + 2 j + e. NaN and Inf make every product they touch NaN (Inf: lo = Inf - Inf), and scaled
// sums may overflow; elements that come out NaN or Inf are recomputed plainly from the inputs.

constexpr int HALF = BN / 2, STAGES_A = 4, STAGES_B = 3, STAGE_A = 32768, STAGE_B = BN * 256;

__device__ __forceinline__ float pow2(int e) { return __int_as_float((e + 127) << 23); }
// exponent of the power of two that brings a largest magnitude to [2^14, 2^15), in [-114, 126]
__device__ __forceinline__ int scale_of(float top) { return min(141 - int(__float_as_uint(top) >> 23), 126); }
__device__ __forceinline__ uint32_t bits_of(half2 v) { return *reinterpret_cast<uint32_t*>(&v); }
__device__ __forceinline__ void split(float a, float b, uint32_t& hi, uint32_t& lo) {
    const half2 h = __floats2half2_rn(a, b);
    const float2 f = __half22float2(h);
    hi = bits_of(h);
    lo = bits_of(__floats2half2_rn(a - f.x, b - f.y));
}

#if BN == 128
// d (64 x 128) = [d +] a (64 x 16, registers) * b (128 x 16)^T (shared memory)
__device__ __forceinline__ void wgmma_rs(float (&d)[64], const uint32_t* a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
#else
// d (64 x 64) = [d +] a (64 x 16, registers) * b (64 x 16)^T (shared memory)
__device__ __forceinline__ void wgmma_rs(float (&d)[32], const uint32_t* a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
#endif

// arrival at the barrier of block `rank` of the cluster after reads by wgmma, which are complete: no wider release (a fence to memory) is needed
__device__ __forceinline__ void arrive_at(uint64_t* barrier, uint32_t rank) {
    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [remote];\n}"
                 ::"r"(smem_address(barrier)), "r"(rank) : "memory");
}
// keeps the compiler from moving uses of the accumulators above the wait in front of this
__device__ __forceinline__ void pin(float (&d)[HALF]) {
#pragma unroll
    for (int i = 0; i < HALF; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// one row -> hi and lo, permuted, zero from k to packed_k; by a block of 256 threads
__device__ __forceinline__ void pack_row(const float* row, half* hi, half* lo, float* inverse, int k, int packed_k) {
    float top = 0.0f;
    for (int c = threadIdx.x * 4; c < k; c += 1024) {
        const auto v = load_vec<4>(row + c);
        top = fmaxf(top, fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3]))));
    }
    top = block_max(top);
    const int e = scale_of(top);
    const float s = pow2(e);
    if (threadIdx.x == 0) *inverse = pow2(-e);
    for (int p = threadIdx.x * 8; p < packed_k; p += 2048) {
        const int first = p / 32 * 32 + p % 32 / 4;
        Vec<uint32_t, 4> h, l;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            Vec<float, 2> v = {{0.0f, 0.0f}};
            if (first + 8 * t < k) v = load_vec<2>(row + first + 8 * t);  // both even
            split(v[0] * s, v[1] * s, h[t], l[t]);
        }
        *reinterpret_cast<Vec<uint32_t, 4>*>(hi + p) = h;
        *reinterpret_cast<Vec<uint32_t, 4>*>(lo + p) = l;
    }
}

extern "C" __global__ void __launch_bounds__(256)
pack_weight(const float* __restrict__ weight, half* __restrict__ packed, float* __restrict__ inverse, int n, int k, int packed_k, long long pitch) {
    pdl_launch_dependents();
#if !SWAP
    const long long r = blockIdx.x;
    pack_row(weight + r * pitch, packed + r * packed_k, packed + (r + n) * packed_k, inverse + r, k, packed_k);
#endif
}

extern "C" __global__ void __launch_bounds__(256)
pack_x(const float* x, half* packed, float* inverse, int* count, int counts, int splits,
       int m, int k, int packed_k, long long pitch) {
    pdl_launch_dependents();
    pdl_wait();  // also so that `product`, which waits for this kernel, has waited for pack_weight
    if (splits > 1)
        for (long long i = blockIdx.x * 256ll + threadIdx.x; i < counts; i += gridDim.x * 256ll) count[i] = 0;
#if SWAP
    const long long r = blockIdx.x;
    if (r < m) pack_row(x + r * pitch, packed + r * packed_k, packed + (r + m) * packed_k, inverse + r, k, packed_k);
#endif
}

__device__ __forceinline__ float activate(float v) {
#if OP_GELU
    v = v * 0.5f * (1.0f + erff(v * 0.70710678118654752440f));
#elif OP_GELU_TANH
    const float cube = v * v * v;
    v = 0.5f * v * (1.0f + tanhf(0.79788456080286535588f * (v + 0.044715f * cube)));
#elif OP_SILU
    v = v / (1.0f + expf(-v));
#elif OP_RELU
    v = v < 0.0f ? 0.0f : v;
#endif
    return v;
}

// 32 floats of this thread from a stage of A: rows g and g + 8 of its warp, floats 8 t to 8 t + 7 of both lines; the scale is returned as its inverse
__device__ __forceinline__ void split_stage(const uint8_t* at0, const uint8_t* at1, uint64_t* empty, int lane, uint32_t (&hi)[16], uint32_t (&lo)[16],
                                            float (&inverse)[2]) {
    Vec<float, 4> v[2][4];  // [row][line, half]
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int q = 0; q < 4; ++q)
            v[h][q] = *reinterpret_cast<const Vec<float, 4>*>((q % 2 ? at1 : at0) + q / 2 * 16384 + h * 1024);
    float s[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float top = 0.0f;
#pragma unroll
        for (int q = 0; q < 4; ++q)
            top = fmaxf(top, fmaxf(fmaxf(fabsf(v[h][q][0]), fabsf(v[h][q][1])), fmaxf(fabsf(v[h][q][2]), fabsf(v[h][q][3]))));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const int e = scale_of(top);
        s[h] = pow2(e);
        inverse[h] = pow2(-e);
    }
    __syncwarp();  // every lane has read the stage
    if (lane == 0) mbarrier_arrive(empty);
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            split(v[h][q][0] * s[h], v[h][q][1] * s[h], hi[4 * q + h], lo[4 * q + h]);
            split(v[h][q][2] * s[h], v[h][q][3] * s[h], hi[4 * q + 2 + h], lo[4 * q + 2 + h]);
        }
}

struct Tile {
    int row, col, begin, end, index;  // first row of A and of B, K blocks, number among the tiles
};
__device__ __forceinline__ Tile tile_of(int work, int rank, int rows_a, int rows_b, int k, int tiles, int splits) {
    const int strips = ceil_div(rows_a, 128 * CLUSTER), tiles_b = ceil_div(rows_b, BN), blocks = ceil_div(k, 64);
    const int part = work / tiles, index = work % tiles;
    const int band = index / (GROUP * tiles_b), in_band = index % (GROUP * tiles_b);
    const int high = min(GROUP, strips - band * GROUP);
    Tile tile;
    tile.row = ((band * GROUP + in_band % high) * CLUSTER + rank) * 128;
    tile.col = in_band / high * BN;
    tile.begin = blocks * part / splits;  // splits <= 16
    tile.end = blocks * (part + 1) / splits;
    tile.index = index * CLUSTER + rank;
    return tile;
}

extern "C" __global__ void __launch_bounds__(384, 1)
product(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap weight_map,
        const __grid_constant__ TensorMap w_packed_map, const __grid_constant__ TensorMap x_packed_map,
        const float* __restrict__ w_inverse, const float* __restrict__ x_inverse, float* partial, int* count,
        const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, const float* __restrict__ residual,
        float* __restrict__ linear_out, float* __restrict__ y, int m, int n, int k, int tiles, int splits,
        long long x_pitch, long long w_pitch, long long y_pitch) {
    extern __shared__ uint8_t raw[];
    __shared__ __align__(8) uint64_t full_a[STAGES_A], empty_a[STAGES_A], full_b[STAGES_B], empty_b[STAGES_B];
    __shared__ int ticket;
    uint8_t* ring_a = raw + ((1024u - (smem_address(raw) & 1023u)) & 1023u);
    uint8_t* ring_b = ring_a + STAGES_A * STAGE_A;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#if SWAP
    const TensorMap &a_map = weight_map, &b_map = x_packed_map;
    const int rows_a = n, rows_b = m;
    const float* __restrict__ b_inverse = x_inverse;
#else
    const TensorMap &a_map = x_map, &b_map = w_packed_map;
    const int rows_a = m, rows_b = n;
    const float* __restrict__ b_inverse = w_inverse;
#endif
    const int rank = blockIdx.x % CLUSTER, step = gridDim.x / CLUSTER, total = tiles * splits;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES_A; ++s) {
            mbarrier_init(&full_a[s], 1);
            mbarrier_init(&empty_a[s], 8);
        }
        for (int s = 0; s < STAGES_B; ++s) {
            mbarrier_init(&full_b[s], 1);
            mbarrier_init(&empty_b[s], 8 * CLUSTER);
        }
        mbarrier_init_fence();
        tma_prefetch(a_map);
        tma_prefetch(b_map);
    }
    __syncthreads();
#if CLUSTER > 1
    cluster_sync();
#endif
    pdl_wait();

    if (warp >= 8) {
        setmaxnreg_dec<40>();
        if (warp == 8 && lane == 0) {
            int s = 0, phase = 0;
            for (int work = blockIdx.x / CLUSTER; work < total; work += step) {
                const Tile tile = tile_of(work, rank, rows_a, rows_b, k, tiles, splits);
                for (int b = tile.begin; b < tile.end; ++b) {
                    mbarrier_wait(&empty_a[s], phase ^ 1);
                    mbarrier_arrive_expect(&full_a[s], STAGE_A);
                    tma_load_2d(ring_a + s * STAGE_A, a_map, &full_a[s], b * 64, tile.row);
                    tma_load_2d(ring_a + s * STAGE_A + 16384, a_map, &full_a[s], b * 64 + 32, tile.row);
                    if (++s == STAGES_A) s = 0, phase ^= 1;
                }
            }
        } else if (warp == 9 && lane == 0) {
            int s = 0, phase = 0;
            for (int work = blockIdx.x / CLUSTER; work < total; work += step) {
                const Tile tile = tile_of(work, rank, rows_a, rows_b, k, tiles, splits);
                for (int b = tile.begin; b < tile.end; ++b) {
#if CLUSTER > 1
                    mbarrier_wait(&empty_b[s], phase ^ 1);
                    mbarrier_arrive_expect(&full_b[s], STAGE_B);
                    uint8_t* stage = ring_b + s * STAGE_B + rank * (STAGE_B / 2 / CLUSTER);
                    const int row = tile.col + rank * (BN / CLUSTER);
                    tma_load_2d_multicast(stage, b_map, &full_b[s], b * 64, row, uint16_t((1 << CLUSTER) - 1));
                    tma_load_2d_multicast(stage + STAGE_B / 2, b_map, &full_b[s], b * 64, rows_b + row, uint16_t((1 << CLUSTER) - 1));
#else
                    mbarrier_wait(&empty_b[s], phase ^ 1);
                    mbarrier_arrive_expect(&full_b[s], STAGE_B);
                    tma_load_2d(ring_b + s * STAGE_B, b_map, &full_b[s], b * 64, tile.col);
                    tma_load_2d(ring_b + s * STAGE_B + STAGE_B / 2, b_map, &full_b[s], b * 64, rows_b + tile.col);
#endif
                    if (++s == STAGES_B) s = 0, phase ^= 1;
                }
            }
        }
        __syncwarp();
    } else {
        setmaxnreg_inc<232>();
        const int g = lane / 4, t = lane % 4;
        const int row_in_tile = warp * 16 + g;
        const uint8_t* at0 = ring_a + row_in_tile * 128 + (((2 * t) ^ g) << 4);
        const uint8_t* at1 = ring_a + row_in_tile * 128 + (((2 * t + 1) ^ g) << 4);
        const uint64_t b0 = wgmma_descriptor_128(ring_b);

        float master[HALF], acc[HALF];
#pragma unroll
        for (int i = 0; i < HALF; ++i) acc[i] = 0.0f;
        int sa = 0, phase_a = 0, sb = 0, phase_b = 0;

        for (int work = blockIdx.x / CLUSTER; work < total; work += step) {
            const Tile tile = tile_of(work, rank, rows_a, rows_b, k, tiles, splits);
#pragma unroll
            for (int i = 0; i < HALF; ++i) master[i] = 0.0f;
            uint32_t hi[16], lo[16];
            float inverse[2];
            mbarrier_wait(&full_a[sa], phase_a);
            split_stage(at0 + sa * STAGE_A, at1 + sa * STAGE_A, &empty_a[sa], lane, hi, lo, inverse);
            if (++sa == STAGES_A) sa = 0, phase_a ^= 1;
#pragma unroll 1
            for (int b = tile.begin; b < tile.end; ++b) {
                mbarrier_wait(&full_b[sb], phase_b);
                const uint64_t bh = b0 + sb * (STAGE_B / 16), bl = bh + STAGE_B / 32;
                wgmma_fence();
#pragma unroll
                for (int q = 0; q < 4; ++q) {
                    wgmma_rs(acc, hi + 4 * q, bl + 2 * q, q != 0);
                    wgmma_rs(acc, lo + 4 * q, bh + 2 * q, 1);
                }
#pragma unroll
                for (int q = 0; q < 4; ++q) wgmma_rs(acc, hi + 4 * q, bh + 2 * q, 1);
                wgmma_commit();
                uint32_t next_hi[16], next_lo[16];
                float next_inverse[2];
                if (b + 1 < tile.end) {  // meanwhile, the next block
                    mbarrier_wait(&full_a[sa], phase_a);
                    split_stage(at0 + sa * STAGE_A, at1 + sa * STAGE_A, &empty_a[sa], lane, next_hi, next_lo, next_inverse);
                    if (++sa == STAGES_A) sa = 0, phase_a ^= 1;
                }
                wgmma_wait<0>();
                pin(acc);
                __syncwarp();
#if CLUSTER > 1
                if (lane < CLUSTER) arrive_at(&empty_b[sb], lane);
#else
                if (lane == 0) mbarrier_arrive(&empty_b[sb]);
#endif
                if (++sb == STAGES_B) sb = 0, phase_b ^= 1;
#pragma unroll
                for (int i = 0; i < HALF; ++i) master[i] = fmaf(acc[i], inverse[i / 2 % 2], master[i]);
                if (b + 1 < tile.end) {
#pragma unroll
                    for (int i = 0; i < 16; ++i) hi[i] = next_hi[i], lo[i] = next_lo[i];
                    inverse[0] = next_inverse[0], inverse[1] = next_inverse[1];
                }
            }

            if (splits > 1) {
                // every part leaves its sums in the workspace; the last one of the tile adds all of them in their order
                const int part = work / tiles;
                Vec<float, 4>* all = reinterpret_cast<Vec<float, 4>*>(partial) + (long long)tile.index * splits * (128 * BN / 4) + threadIdx.x;
#pragma unroll
                for (int i = 0; i < HALF / 4; ++i)
                    all[part * (128 * BN / 4) + i * 256] = Vec<float, 4>{{master[4 * i], master[4 * i + 1], master[4 * i + 2], master[4 * i + 3]}};
                __threadfence();
                barrier_sync(1, 256);
                if (threadIdx.x == 0) ticket = atomicAdd(count + tile.index, 1);
                barrier_sync(1, 256);
                const bool last = ticket == splits - 1;
                barrier_sync(1, 256);  // before the next tile's ticket
                if (!last) continue;
                __threadfence();
#pragma unroll
                for (int i = 0; i < HALF; ++i) master[i] = 0.0f;
#pragma unroll 1
                for (int p = 0; p < splits; ++p) {
#pragma unroll
                    for (int i = 0; i < HALF / 4; ++i) {
                        const float4 v = __ldcg(reinterpret_cast<const float4*>(all + p * (128 * BN / 4) + i * 256));
                        master[4 * i] += v.x, master[4 * i + 1] += v.y, master[4 * i + 2] += v.z, master[4 * i + 3] += v.w;
                    }
                }
            }

            const int row = tile.row + row_in_tile, col = tile.col + 2 * t;
            // loads go to clamped places, so that they need no branches and overlap
            uint64_t bad = 0;  // elements that are NaN or Inf
#pragma unroll
            for (int j = 0; j < BN / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int c = col + 8 * j + e;
                    const float f = b_inverse[min(c, rows_b - 1)];
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int i = 4 * j + 2 * h + e;
                        master[i] *= f;
                        if (!(fabsf(master[i]) < INFINITY) && c < rows_b && row + 8 * h < rows_a) bad |= uint64_t(1) << i;
                    }
                }
#if HAS_BIAS
#if SWAP
            const float shift[2] = {bias[min(row, rows_a - 1)], bias[min(row + 8, rows_a - 1)]};
#pragma unroll
            for (int i = 0; i < HALF; ++i) master[i] += shift[i / 2 % 2];
#else
#pragma unroll
            for (int j = 0; j < BN / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float shift = bias[min(col + 8 * j + e, rows_b - 1)];
                    master[4 * j + e] += shift, master[4 * j + 2 + e] += shift;
                }
#endif
#endif
#if HAS_LINEAR_OUT
#pragma unroll
            for (int i = 0; i < HALF; ++i) {
                const int ra = row + 8 * (i / 2 % 2), rb = col + 8 * (i / 4) + i % 2;
                if (ra < rows_a && rb < rows_b) linear_out[(long long)(SWAP ? rb : ra) * n + (SWAP ? ra : rb)] = master[i];
            }
#endif
#pragma unroll
            for (int i = 0; i < HALF; ++i) {
                master[i] = activate(master[i]);
#if OP_ADD
                const int ra = min(row + 8 * (i / 2 % 2), rows_a - 1), rb = min(col + 8 * (i / 4) + i % 2, rows_b - 1);
                master[i] += residual[(long long)(SWAP ? rb : ra) * n + (SWAP ? ra : rb)];
#endif
            }
#if SWAP
#pragma unroll
            for (int i = 0; i < HALF; ++i) {
                const int ra = row + 8 * (i / 2 % 2), rb = col + 8 * (i / 4) + i % 2;
                if (ra < rows_a && rb < rows_b) y[rb * y_pitch + ra] = master[i];
            }
#else
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (row + 8 * h >= rows_a) continue;
                float* to = y + (row + 8 * h) * y_pitch + col;
                if (rows_b % 2 == 0 && y_pitch % 2 == 0) {  // then a pair is in or out as a whole
#pragma unroll
                    for (int j = 0; j < BN / 8; ++j)
                        if (col + 8 * j < rows_b) store_vec(to + 8 * j, Vec<float, 2>{{master[4 * j + 2 * h], master[4 * j + 2 * h + 1]}});
                } else {
#pragma unroll
                    for (int j = 0; j < BN / 8; ++j) {
                        if (col + 8 * j < rows_b) to[8 * j] = master[4 * j + 2 * h];
                        if (col + 8 * j + 1 < rows_b) to[8 * j + 1] = master[4 * j + 2 * h + 1];
                    }
                }
            }
#endif
#pragma unroll 1
            while (bad != 0) {
                const int i = __ffsll((long long)bad) - 1;
                bad &= bad - 1;
                const int ra = row + 8 * (i / 2 % 2), rb = col + 8 * (i / 4) + i % 2;
                const long long r = SWAP ? rb : ra, c = SWAP ? ra : rb;
                const float *xs = x + r * x_pitch, *ws = weight + c * w_pitch;
                double sum = 0.0;
#pragma unroll 1
                for (int q = 0; q < k; q += 4) {
                    const auto a = load_vec<4>(xs + q), b = load_vec<4>(ws + q);
                    sum = fma(double(a[0]), double(b[0]), sum);
                    sum = fma(double(a[1]), double(b[1]), sum);
                    sum = fma(double(a[2]), double(b[2]), sum);
                    sum = fma(double(a[3]), double(b[3]), sum);
                }
                float v = float(sum);
#if HAS_BIAS
                v += bias[c];
#endif
#if HAS_LINEAR_OUT
                linear_out[r * n + c] = v;
#endif
                v = activate(v);
#if OP_ADD
                v += residual[r * n + c];
#endif
                y[r * y_pitch + c] = v;
            }
        }
    }
#if CLUSTER > 1
    __syncwarp();
    cluster_sync();  // no block leaves while another may still arrive or write here
#endif
}
