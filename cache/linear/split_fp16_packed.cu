/*---
implements = ["linear", "linear.gelu", "linear.relu", "linear.gelu_tanh", "linear.silu", "linear.add"]
target     = "cuda"
dtypes     = ["float32"]
optional   = ["bias", "residual", "linear_out"]
where      = ["device.arch == 90", "x.ndim == 2", "weight.ndim == 2", "y.ndim == 2", "y.stride[1] == 1", "bias.contiguous", "residual.contiguous",
              "linear_out.contiguous", "m >= 1", "n >= 1", "k >= 1", "m < 100000000", "n < 100000000", "k < 100000000", "tiles < 1000000", "small < 1000000000"]
dims       = { m = "x.shape[0]", k = "x.shape[1]", n = "weight.shape[1]", big = "k >= 128", packed_k = "ceil_div(k, 64) * 64 * big + 64 * (1 - big)", w_rows = "n * big + 1 - big", x_rows = "m * big + 1 - big", tiles = "ceil_div(m, 128 * CLUSTER) * ceil_div(n, 192)", small = "ceil_div(m, 64) * ceil_div(n, 64)" }
tune       = { CLUSTER = [1, 2], LAG = [0, 1] }
[[workspace]]
name = "w_packed"
dtype = "float16"
shape = ["w_rows", "2 * packed_k"]
[[workspace]]
name = "w_factor"
dtype = "float32"
shape = ["w_rows", "2"]
[[workspace]]
name = "x_packed"
dtype = "float16"
shape = ["x_rows", "2 * packed_k"]
[[workspace]]
name = "x_factor"
dtype = "float32"
shape = ["x_rows", "2"]
[[tensor_map]]
name = "x_map"
over = "x_packed"
dims = ["2 * packed_k", "x_rows"]
strides = ["packed_k * 4"]
box = ["64", "128"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "w_map"
over = "w_packed"
dims = ["2 * packed_k", "w_rows"]
strides = ["packed_k * 4"]
box = ["64", "192 // CLUSTER"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[launch]]
kernel = "pack"
grid = ["max(1, big * (ceil_div(m, 32) + ceil_div(n, 32)))"]
block = ["256"]
args = ["x", "weight", "x_packed", "w_packed", "x_factor", "w_factor", "m", "n", "k", "packed_k", "x.stride[0]", "x.stride[1]", "weight.stride[0]", "weight.stride[1]"]
[[launch]]
kernel = "product"
grid = ["min(big * tiles + (1 - big) * small, device.sms // CLUSTER) * CLUSTER"]
block = ["384"]
cluster = ["CLUSTER"]
smem = "5 * 40960 + 1024"
pdl = true
args = ["x_map", "w_map", "x_factor", "w_factor", "x", "weight", "bias", "residual", "linear_out", "y", "m", "n", "k", "packed_k", "tiles",
        "x.stride[0]", "x.stride[1]", "weight.stride[0]", "weight.stride[1]", "y.stride[0]"]
---*/
// y = x @ weight (+ bias, epilogue) in strict float32 by three fp16 products, any strides of x [M, K] and weight [K, N]: a = 2^-e (hi + lo) with one power
// of two per row of x and per column of weight, |a 2^e| < 2^15, so that lo is exact to 2^-39 of the top.
//
// Packing: a block takes 32 rows (of x, or columns of weight) and all of K: first the maxima, then the split. Where K is contiguous a warp takes a row,
// elsewhere a lane takes a row and a warp 32 x 32 elements, transposed through shared memory. A packed row holds, for every 32 of K, a line of 32 hi and
// 32 lo halves (128 bytes), zero from K to packed_k. So TMA touches workspaces only, and the product knows one layout.
//
// product: persistent; tile 128 x 192, two consumer warpgroups of 64 x 192 (96 accumulators, 96 masters), one producer warpgroup; ring of 5 stages of
// 32 K: A 128 lines, B 192 lines of 128 bytes (32 hi, 32 lo), swizzle 128. A cluster of 2 blocks, neighbours along M, shares B: each loads half of it and
// multicasts. Two stages (64 K) make a block of products that starts from zero, the small ones first, and is then added to the masters. With LAG the
// second consumer starts one block behind the first, so that promotion and epilogue of one run under the wgmmas of the other.
//
// NaN and Inf make every product they touch NaN (Inf: lo = Inf - Inf), and scaled sums may overflow; elements that come out NaN or Inf are recomputed
// plainly from the inputs. K < 128, where the dropped lo * lo would show, is done by float32 FMA over 64 x 64 tiles in the same kernel.

enum { BN = 192, STAGES = 5, STAGE_A = 16384, STAGE_B = 24576, STAGE = STAGE_A + STAGE_B, MASTERS = 96 };

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
// four consecutive elements of a packed row from position c, a multiple of 4
__device__ __forceinline__ void emit(half* row, int c, const Vec<float, 4>& v, float s) {
    Vec<uint32_t, 2> hi, lo;
    split(v[0] * s, v[1] * s, hi[0], lo[0]);
    split(v[2] * s, v[3] * s, hi[1], lo[1]);
    half* to = row + (long long)(c / 32) * 64 + c % 32;
    *reinterpret_cast<Vec<uint32_t, 2>*>(to) = hi;
    *reinterpret_cast<Vec<uint32_t, 2>*>(to + 32) = lo;
}
// 2^-e as a product of two numbers, so that the product of two such pairs neither over- nor underflows on the way
__device__ __forceinline__ void store_factor(float* factor, long long r, int e) {
    const int half_way = -e >> 1;
    store_vec(factor + 2 * r, Vec<float, 2>{{pow2(half_way), pow2(-e - half_way)}});
}
__device__ __forceinline__ float top_of(float top, const Vec<float, 4>& v) {
    return fmaxf(top, fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3]))));
}
// elements c to c + 3 of a row along a contiguous K, zero from k
__device__ __forceinline__ Vec<float, 4> load4(const float* row, int c, int k, bool aligned) {
    Vec<float, 4> v = {{0.0f, 0.0f, 0.0f, 0.0f}};
    if (aligned && c + 4 <= k) {
        v = load_vec<4>(row + c);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (c + i < k) v[i] = row[c + i];
    }
    return v;
}

// rows first to first + 31 of an operand with element (r, c) at r * row_pitch + c * k_pitch; a block of 256 threads
__device__ __forceinline__ void pack_rows(const float* __restrict__ from, long long row_pitch, long long k_pitch, int rows, int k, int packed_k,
                                          half* __restrict__ packed, float* __restrict__ factor, int first) {
    __shared__ float tile[8][32][33];
    __shared__ float tops[8][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (k_pitch == 1) {
        const bool aligned = row_pitch % 4 == 0;
#pragma unroll 1
        for (int i = warp; i < 32; i += 8) {
            const long long r = first + i;
            if (r >= rows) break;
            const float* row = from + r * row_pitch;
            half* to = packed + r * (2ll * packed_k);
            Vec<float, 4> v[8];
            float top = 0.0f;
#pragma unroll 1
            for (int base = 0; base < packed_k; base += 1024) {
#pragma unroll
                for (int j = 0; j < 8; ++j) v[j] = load4(row, base + 128 * j + 4 * lane, k, aligned);
#pragma unroll
                for (int j = 0; j < 8; ++j) top = top_of(top, v[j]);
            }
#pragma unroll
            for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
            const int e = scale_of(top);
            const float s = pow2(e);
            if (lane == 0) store_factor(factor, r, e);
#pragma unroll 1
            for (int base = 0; base < packed_k; base += 1024) {
                if (packed_k > 1024) {
#pragma unroll
                    for (int j = 0; j < 8; ++j) v[j] = load4(row, base + 128 * j + 4 * lane, k, aligned);
                }
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const int c = base + 128 * j + 4 * lane;
                    if (c < packed_k) emit(to, c, v[j], s);
                }
            }
        }
    } else {
        const bool valid = first + lane < rows;
        const float* row = from + (long long)min(first + lane, rows - 1) * row_pitch;
        float top = 0.0f;
#pragma unroll 1
        for (int base = warp * 32; base < k; base += 256) {
            float v[32];
#pragma unroll
            for (int i = 0; i < 32; ++i) v[i] = row[min(base + i, k - 1) * k_pitch];
#pragma unroll
            for (int i = 0; i < 32; ++i) top = fmaxf(top, fabsf(v[i]));
        }
        tops[warp][lane] = top;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < 8; ++w) top = fmaxf(top, tops[w][lane]);
        const int e = scale_of(top);
        const float s = pow2(e);
        if (warp == 0 && valid) store_factor(factor, first + lane, e);
#pragma unroll 1
        for (int base = warp * 32; base < packed_k; base += 256) {
            float v[32];
#pragma unroll
            for (int i = 0; i < 32; ++i) v[i] = base + i < k ? row[(base + i) * k_pitch] : 0.0f;
            __syncwarp();  // the previous chunk has been read
#pragma unroll
            for (int i = 0; i < 32; ++i) tile[warp][lane][i] = v[i] * s;
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int r = 4 * i + lane / 8, c = lane % 8 * 4;
                Vec<float, 4> u;
#pragma unroll
                for (int q = 0; q < 4; ++q) u[q] = tile[warp][r][c + q];
                if (first + r < rows) emit(packed + (first + r) * (2ll * packed_k), base + c, u, 1.0f);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256)
pack(const float* __restrict__ x, const float* __restrict__ weight, half* __restrict__ x_packed, half* __restrict__ w_packed, float* __restrict__ x_factor,
     float* __restrict__ w_factor, int m, int n, int k, int packed_k, long long x_row, long long x_k, long long w_k, long long w_col) {
    pdl_launch_dependents();
    if (k < 128) return;
    const int blocks = ceil_div(n, 32), b = blockIdx.x;
    if (b < blocks)
        pack_rows(weight, w_col, w_k, n, k, packed_k, w_packed, w_factor, b * 32);
    else
        pack_rows(x, x_row, x_k, m, k, packed_k, x_packed, x_factor, (b - blocks) * 32);
}

// d (64 x 192) = [d +] a (64 x 16) * b (192 x 16)^T, both in shared memory
__device__ __forceinline__ void wgmma(float (&d)[96], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
        "%96, %97, p, 1, 1, 0, 0;\n}"
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
          "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
        : "l"(a), "l"(b), "r"(accumulate));
}

// arrival at the barrier of block `rank` of the cluster after reads by wgmma, which are complete: no wider release (a fence to memory) is needed
__device__ __forceinline__ void arrive_at(uint64_t* barrier, uint32_t rank) {
    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [remote];\n}"
                 ::"r"(smem_address(barrier)), "r"(rank) : "memory");
}
// this warp's wgmmas have read what the barrier stands for
__device__ __forceinline__ void release(uint64_t* barrier, int lane) {
    __syncwarp();
#if CLUSTER > 1
    if (lane < CLUSTER) arrive_at(barrier, lane);
#else
    if (lane == 0) mbarrier_arrive(barrier);
#endif
}
// keeps the compiler from moving uses of the accumulators above the wait in front of this
__device__ __forceinline__ void pin(float (&d)[96]) {
#pragma unroll
    for (int i = 0; i < 96; ++i) asm volatile("" : "+f"(d[i])::"memory");
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
// what follows the product for one element inside the output
__device__ __forceinline__ float finish(float v, long long r, int c, int n, const float* __restrict__ bias, const float* __restrict__ residual,
                                        float* __restrict__ linear_out) {
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
    return v;
}

struct Tile {
    int row, col;
};
__device__ __forceinline__ Tile tile_of(int work, int rank, int m, int n) {
    const int strips = ceil_div(m, 128 * CLUSTER), columns = ceil_div(n, int(BN)), group = 16 / CLUSTER;
    const int band = work / (group * columns), in_band = work % (group * columns);
    const int high = min(group, strips - band * group);
    Tile tile;
    tile.row = ((band * group + in_band % high) * CLUSTER + rank) * 128;
    tile.col = in_band / high * BN;
    return tile;
}

// K < 128: float32 FMA, tiles of 64 x 64, by all threads of the block; sums of 16 products each are added up
__device__ __forceinline__ void product_small(float* shared, const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                                           const float* __restrict__ residual, float* __restrict__ linear_out, float* __restrict__ y, int m, int n, int k,
                                           long long x_row, long long x_k, long long w_k, long long w_col, long long y_pitch) {
    float *a = shared, *b = shared + 128 * 68;
    const int strips = ceil_div(m, 64), total = strips * ceil_div(n, 64);
    const int ty = threadIdx.x / 16 * 4, tx = threadIdx.x % 16 * 4;
    for (int work = blockIdx.x; work < total; work += gridDim.x) {
        const int row = work % strips * 64, col = work / strips * 64;
        __syncthreads();
        for (int i = threadIdx.x; i < 64 * k; i += 384) {
            const int ra = x_k == 1 ? i / k : i % 64, ka = x_k == 1 ? i % k : i / 64;
            a[ka * 68 + ra] = row + ra < m ? x[(row + ra) * x_row + ka * x_k] : 0.0f;
            const int rb = w_k == 1 ? i / k : i % 64, kb = w_k == 1 ? i % k : i / 64;
            b[kb * 68 + rb] = col + rb < n ? weight[(col + rb) * w_col + kb * w_k] : 0.0f;
        }
        __syncthreads();
        if (threadIdx.x < 256) {
            float sum[4][4] = {};
#pragma unroll 1
            for (int base = 0; base < k; base += 16) {
                float part[4][4] = {};
                const int end = min(base + 16, k);
                for (int q = base; q < end; ++q) {
                    const Vec<float, 4> u = load_vec<4>(a + q * 68 + ty), v = load_vec<4>(b + q * 68 + tx);
#pragma unroll
                    for (int i = 0; i < 4; ++i)
#pragma unroll
                        for (int j = 0; j < 4; ++j) part[i][j] = fmaf(u[i], v[j], part[i][j]);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) sum[i][j] += part[i][j];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int r = row + ty + i, c = col + tx + j;
                    if (r < m && c < n) y[r * y_pitch + c] = finish(sum[i][j], r, c, n, bias, residual, linear_out);
                }
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
product(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const float* __restrict__ x_factor,
        const float* __restrict__ w_factor, const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
        const float* __restrict__ residual, float* __restrict__ linear_out, float* __restrict__ y, int m, int n, int k, int packed_k, int tiles,
        long long x_row, long long x_k, long long w_k, long long w_col, long long y_pitch) {
    extern __shared__ uint8_t raw[];
    __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
    uint8_t* ring = raw + ((1024u - (smem_address(raw) & 1023u)) & 1023u);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rank = blockIdx.x % CLUSTER, step = gridDim.x / CLUSTER;

    if (k < 128) {
        pdl_wait();
        product_small(reinterpret_cast<float*>(ring), x, weight, bias, residual, linear_out, y, m, n, k, x_row, x_k, w_k, w_col, y_pitch);
        return;
    }
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
    pdl_wait();

    if (warp >= 8) {
        setmaxnreg_dec<40>();
        if (warp == 8 && lane == 0) {
            int s = 0, phase = 0;
            for (int work = blockIdx.x / CLUSTER; work < tiles; work += step) {
                const Tile tile = tile_of(work, rank, m, n);
#pragma unroll 1
                for (int b = 0; b < packed_k / 32; ++b) {
                    mbarrier_wait(&empty[s], phase ^ 1);
                    mbarrier_arrive_expect(&full[s], STAGE);
                    uint8_t* stage = ring + s * STAGE;
                    tma_load_2d(stage, x_map, &full[s], b * 64, tile.row);
#if CLUSTER > 1
                    tma_load_2d_multicast(stage + STAGE_A + rank * (STAGE_B / CLUSTER), w_map, &full[s], b * 64, tile.col + rank * (BN / CLUSTER),
                                          uint16_t((1 << CLUSTER) - 1));
#else
                    tma_load_2d(stage + STAGE_A, w_map, &full[s], b * 64, tile.col);
#endif
                    if (++s == STAGES) s = 0, phase ^= 1;
                }
            }
        }
        __syncwarp();
    } else {
        setmaxnreg_inc<232>();
        const int g = lane / 4, t = lane % 4, group = warp / 4;
        const uint64_t a_desc = wgmma_descriptor_128(ring + group * 8192), b_desc = wgmma_descriptor_128(ring + STAGE_A);
        float acc[96], master[MASTERS];
#pragma unroll
        for (int i = 0; i < 96; ++i) acc[i] = 0.0f;
        int s = 0, phase = 0;
#if LAG
        bool first = group == 0;
        if (group == 1) barrier_sync(1, 256);  // the first consumer arrives after its first block of 64 K
#endif
        for (int work = blockIdx.x / CLUSTER; work < tiles; work += step) {
            const Tile tile = tile_of(work, rank, m, n);
#pragma unroll
            for (int i = 0; i < MASTERS; ++i) master[i] = 0.0f;
#pragma unroll 1
            for (int b = 0; b < packed_k / 64; ++b) {
                const int s0 = s;
                mbarrier_wait(&full[s], phase);
                if (++s == STAGES) s = 0, phase ^= 1;
                const int s1 = s;
                mbarrier_wait(&full[s], phase);
                if (++s == STAGES) s = 0, phase ^= 1;
                const uint64_t a0 = a_desc + s0 * (STAGE / 16), a1 = a_desc + s1 * (STAGE / 16);
                const uint64_t b0 = b_desc + s0 * (STAGE / 16), b1 = b_desc + s1 * (STAGE / 16);
                wgmma_fence();  // + 2: the next 16 of K; + 4: lo instead of hi
                wgmma(acc, a0, b0 + 4, 0);
                wgmma(acc, a0 + 4, b0, 1);
                wgmma(acc, a0 + 2, b0 + 6, 1);
                wgmma(acc, a0 + 6, b0 + 2, 1);
                wgmma(acc, a1, b1 + 4, 1);
                wgmma(acc, a1 + 4, b1, 1);
                wgmma(acc, a1 + 2, b1 + 6, 1);
                wgmma(acc, a1 + 6, b1 + 2, 1);
                wgmma(acc, a0, b0, 1);
                wgmma(acc, a0 + 2, b0 + 2, 1);
                wgmma(acc, a1, b1, 1);
                wgmma(acc, a1 + 2, b1 + 2, 1);
                wgmma_commit();
                wgmma_wait<0>();
                pin(acc);
                release(&empty[s0], lane);
                release(&empty[s1], lane);
#if LAG
                if (first) barrier_arrive(1, 256);
                first = false;
#endif
#pragma unroll
                for (int i = 0; i < 96; ++i) master[i] += acc[i];
            }

            const int row = tile.row + warp * 16 + g, col = tile.col + 2 * t;
            const bool wide = n % 4 == 0 && y_pitch % 4 == 0;
            Vec<float, 2> fa[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) fa[h] = load_vec<2>(x_factor + 2ll * min(row + 8 * h, m - 1));
            uint32_t bad[MASTERS / 32] = {};  // elements that are NaN or Inf
#pragma unroll
            for (int p = 0; p < BN / 16; ++p) {  // 16 columns at a time; loads go to clamped places, so that they need no branches and overlap
                float v[2][2][2];  // [group of 8 columns][row][column of the pair]
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int c = col + 16 * p + 8 * j + e, in = min(c, n - 1);
                        const Vec<float, 2> fb = load_vec<2>(w_factor + 2ll * in);
#if HAS_BIAS
                        const float shift = bias[in];
#endif
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            const int i = 8 * p + 4 * j + 2 * h + e;
                            float u = master[i] * (fa[h][0] * fb[0]) * (fa[h][1] * fb[1]);
                            if (!(fabsf(u) < INFINITY) && c < n && row + 8 * h < m) bad[i / 32] |= 1u << i % 32;
#if HAS_BIAS
                            u += shift;
#endif
#if HAS_LINEAR_OUT
                            if (c < n && row + 8 * h < m) linear_out[(row + 8 * h) * (long long)n + c] = u;
#endif
                            u = activate(u);
#if OP_ADD
                            u += residual[(long long)min(row + 8 * h, m - 1) * n + in];
#endif
                            v[j][h][e] = u;
                        }
                    }
                if (wide) {  // pairs of lanes exchange, so that each has four columns: the even lane of the left group, the odd lane of the right one
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const bool odd = t & 1;
                        const float s0 = __shfl_xor_sync(0xffffffffu, odd ? v[0][h][0] : v[1][h][0], 1);
                        const float s1 = __shfl_xor_sync(0xffffffffu, odd ? v[0][h][1] : v[1][h][1], 1);
                        const float4 o = odd ? make_float4(s0, s1, v[1][h][0], v[1][h][1]) : make_float4(v[0][h][0], v[0][h][1], s0, s1);
                        const int r = row + 8 * h, c = tile.col + 16 * p + 8 * (t & 1) + 2 * (t & 2);
                        if (r < m && c < n) __stcs(reinterpret_cast<float4*>(y + r * y_pitch + c), o);
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const int r = row + 8 * (i / 2 % 2), c = col + 16 * p + 8 * (i / 4) + i % 2;
                        if (r < m && c < n) y[r * y_pitch + c] = v[i / 4][i / 2 % 2][i % 2];
                    }
                }
            }
            __syncwarp();  // what a lane recomputes its neighbour may have written
#pragma unroll 1
            for (int w = 0; w < MASTERS / 32; ++w) {
                uint32_t mask = bad[0];
#pragma unroll
                for (int i = 1; i < MASTERS / 32; ++i) mask = w == i ? bad[i] : mask;
#pragma unroll 1
                while (mask != 0) {
                    const int i = w * 32 + __ffs(int(mask)) - 1;
                    mask &= mask - 1;
                    const long long r = row + 8 * (i / 2 % 2);
                    const int c = col + 8 * (i / 4) + i % 2;
                    const float *xs = x + r * x_row, *ws = weight + c * w_col;
                    double sum = 0.0;
#pragma unroll 4
                    for (int q = 0; q < k; ++q) sum = fma(double(xs[q * x_k]), double(ws[q * w_k]), sum);
                    y[r * y_pitch + c] = finish(float(sum), r, c, n, bias, residual, linear_out);
                }
            }
        }
    }
#if CLUSTER > 1
    __syncwarp();
    cluster_sync();  // no block leaves while another may still arrive or write here
#endif
}
