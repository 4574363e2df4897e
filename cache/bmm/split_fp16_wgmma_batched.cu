/*---
implements = "bmm"
target     = "cuda"
dtypes     = ["float32"]
where      = ["device.arch == 90", "a.ndim == 3", "b.ndim == 3", "y.ndim == 3", "a.itemsize == 4", "b.itemsize == 4", "y.itemsize == 4",
              "batch >= 1", "m >= 1", "n >= 1", "k >= 1", "b.shape[0] == batch", "b.shape[1] == k", "y.stride[2] == 1",
              "(a.stride[2] == 1) + (a.stride[1] == 1) >= 1", "(b.stride[2] == 1) + (b.stride[1] == 1) >= 1",
              "na * m < 2000000000", "nb * n < 2000000000", "na * kb < 2000000000", "nb * kb < 2000000000", "k < 2000000000",
              "na * ceil_div(m, 64) * kb + nb * ceil_div(n, 64) * kb < 2000000000",
              "batch * ceil_div(m, 128) * ceil_div(n, 128) < 2000000000"]
dims       = { batch = "a.shape[0]", m = "a.shape[1]", k = "a.shape[2]", n = "b.shape[2]", kb = "ceil_div(a.shape[2], 64)", kp = "kb * 64", mi = "ceil_div(m, 4) * 4", ni = "ceil_div(n, 4) * 4", na = "1 + (batch - 1) * (a.stride[0] != 0)", nb = "1 + (batch - 1) * (b.stride[0] != 0)" }
tune       = { GROUP = [2, 8] }
[[workspace]]
name = "a_hi"
dtype = "float16"
shape = ["na * m", "kp"]
[[workspace]]
name = "a_lo"
dtype = "float16"
shape = ["na * m", "kp"]
[[workspace]]
name = "a_inverse"
dtype = "float32"
shape = ["na * kb", "mi"]
[[workspace]]
name = "a_bad"
dtype = "int32"
shape = ["na * m"]
zero = true
[[workspace]]
name = "b_hi"
dtype = "float16"
shape = ["nb * n", "kp"]
[[workspace]]
name = "b_lo"
dtype = "float16"
shape = ["nb * n", "kp"]
[[workspace]]
name = "b_inverse"
dtype = "float32"
shape = ["nb * kb", "ni"]
[[workspace]]
name = "b_bad"
dtype = "int32"
shape = ["nb * n"]
zero = true
[[tensor_map]]
name = "a_hi_map"
over = "a_hi"
dims = ["kp", "na * m"]
strides = ["kp * 2"]
box = ["64", "128"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "a_lo_map"
over = "a_lo"
dims = ["kp", "na * m"]
strides = ["kp * 2"]
box = ["64", "128"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "a_inverse_map"
over = "a_inverse"
dims = ["mi", "na * kb"]
strides = ["mi * 4"]
box = ["128", "1"]
swizzle = "none"
l2 = "128"
oob = "zero"
[[tensor_map]]
name = "b_hi_map"
over = "b_hi"
dims = ["kp", "nb * n"]
strides = ["kp * 2"]
box = ["64", "128"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "b_lo_map"
over = "b_lo"
dims = ["kp", "nb * n"]
strides = ["kp * 2"]
box = ["64", "128"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "b_inverse_map"
over = "b_inverse"
dims = ["ni", "nb * kb"]
strides = ["ni * 4"]
box = ["128", "1"]
swizzle = "none"
l2 = "128"
oob = "zero"
[[launch]]
kernel = "pack"
grid = ["na * ceil_div(m, 64) * kb + nb * ceil_div(n, 64) * kb"]
block = ["256"]
args = ["a", "b", "a_hi", "a_lo", "a_inverse", "a_bad", "b_hi", "b_lo", "b_inverse", "b_bad", "m", "n", "k", "na", "a.stride[0]", "a.stride[1]", "a.stride[2]", "b.stride[0]", "b.stride[1]", "b.stride[2]"]
[[launch]]
kernel = "product"
grid = ["batch * ceil_div(m, 128) * ceil_div(n, 128)"]
block = ["384"]
smem = "3 * 65536 + 3 * 1024 + 1024"
pdl = true
args = ["a_hi_map", "a_lo_map", "b_hi_map", "b_lo_map", "a_inverse_map", "b_inverse_map", "a_bad", "b_bad", "a", "b", "y", "m", "n", "k", "na", "nb",
        "a.stride[0]", "a.stride[1]", "a.stride[2]", "b.stride[0]", "b.stride[1]", "b.stride[2]", "y.stride[0]", "y.stride[1]"]
---*/
// y = a @ b for batches, float32 by three fp16 products. pack: 2^e v = hi + lo, e per row of a (column of b) and K block of 64, K-major,
// padded with zeros along K. product: 128 x 128 tiles, two consumer warpgroups (64 x 128), one producer, ring of 3 stages.
// The products of a K block start from zero, the small ones first; master = fma(acc * a_inverse, b_inverse, master).
// Rows of all batches are one dimension of the maps: rows past a matrix belong to the next one and are never stored.

__device__ __forceinline__ float pow2(int e) { return __int_as_float((e + 127) << 23); }
// exponent of the power of two that brings a largest magnitude (as bits) to [2^14, 2^15); denormals go as far as floats allow
__device__ __forceinline__ int scale_of(uint32_t top) { return min(141 - int(top >> 23), 126); }
__device__ __forceinline__ void split(float v, half& hi, half& lo) {
    hi = __float2half_rn(v);
    lo = __float2half_rn(v - __half2float(hi));
}
__device__ __forceinline__ uint32_t magnitude(float v) { return __float_as_uint(v) & 0x7fffffffu; }

// d (64 x 128, fp32) = [d +] a (64 x 16) * b (128 x 16)^T, both fp16 in shared memory
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(accumulate));
}
// keeps the compiler from moving uses of the accumulators above the wait in front of this
__device__ __forceinline__ void pin(float (&d)[64]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// a tile of 64 rows and 64 k of one matrix; element (r, q) at base[r * sr + q * sk], one of the strides is 1
__device__ __forceinline__ void pack_tile(const float* __restrict__ base, half* __restrict__ hi, half* __restrict__ lo, float* __restrict__ inverse,
                                          int* __restrict__ bad, int rows, int k, int r0, int k0, long long sr, long long sk, bool vec) {
    __shared__ float tile[64][65];  // [k][row]
    __shared__ uint32_t partial[4][64];
    const bool k_inner = sk == 1;
    const int outer_size = k_inner ? rows - r0 : k - k0, inner_size = k_inner ? k - k0 : rows - r0;
    const long long pitch = k_inner ? sr : sk;
    const float* from = base + r0 * sr + k0 * sk;
    Vec<float, 4> v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int o = threadIdx.x / 16 + 16 * j, c = threadIdx.x % 16 * 4;
        v[j] = Vec<float, 4>{{0.0f, 0.0f, 0.0f, 0.0f}};
        if (o < outer_size) {
            if (vec && c + 4 <= inner_size) v[j] = load_vec<4>(from + o * pitch + c);
            else {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (c + i < inner_size) v[j][i] = from[o * pitch + c + i];
            }
        }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int o = threadIdx.x / 16 + 16 * j, c = threadIdx.x % 16 * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (k_inner) tile[c + i][o] = v[j][i];
            else tile[o][c + i] = v[j][i];
        }
    }
    __syncthreads();
    {
        const int part = threadIdx.x / 64, c = threadIdx.x % 64;
        uint32_t top = 0;
#pragma unroll
        for (int i = 0; i < 16; ++i) top = max(top, magnitude(tile[part * 16 + i][c]));
        partial[part][c] = top;
    }
    __syncthreads();
    const long long kp = (k + 63LL) / 64 * 64;
    const int padded = (rows + 3) / 4 * 4;
    const int q = threadIdx.x % 8 * 8;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int c = threadIdx.x / 8 + 32 * j;
        if (r0 + c >= padded) continue;
        const uint32_t top = max(max(partial[0][c], partial[1][c]), max(partial[2][c], partial[3][c]));
        const int e = scale_of(top);
        if (q == 0) inverse[(long long)(k0 / 64) * padded + r0 + c] = pow2(-e);
        if (r0 + c >= rows) continue;
        if (q == 0 && top >= 0x71800000u) atomicOr(bad + r0 + c, 1);  // NaN, Inf, or from 2^100 on, where scaled sums could overflow
        const float s = pow2(e);
        Vec<half, 8> h, l;
#pragma unroll
        for (int i = 0; i < 8; ++i) split(tile[q + i][c] * s, h[i], l[i]);
        const long long at = (r0 + c) * kp + k0 + q;
        store_vec(hi + at, h);
        store_vec(lo + at, l);
    }
}

extern "C" __global__ void __launch_bounds__(256)
pack(const float* __restrict__ a, const float* __restrict__ b, half* __restrict__ a_hi, half* __restrict__ a_lo, float* __restrict__ a_inverse,
     int* __restrict__ a_bad, half* __restrict__ b_hi, half* __restrict__ b_lo, float* __restrict__ b_inverse, int* __restrict__ b_bad,
     int m, int n, int k, int na, long long a_batch, long long a_row, long long a_col, long long b_batch, long long b_row, long long b_col) {
    pdl_launch_dependents();
    const int kb = (k - 1) / 64 + 1, a_strips = ceil_div(m, 64), b_strips = ceil_div(n, 64);
    const int a_pieces = na * a_strips * kb;
    int piece = blockIdx.x;
    const bool is_a = piece < a_pieces;
    if (!is_a) piece -= a_pieces;
    const int strips = is_a ? a_strips : b_strips, rows = is_a ? m : n;
    const long long sb = is_a ? a_batch : b_batch, sr = is_a ? a_row : b_col, sk = is_a ? a_col : b_row;
    const int strip = piece % strips, rest = piece / strips, block = rest % kb;
    const long long matrix = rest / kb;
    const long long kp = kb * 64LL, padded = (rows + 3) / 4 * 4;
    const bool vec = ((sb | (sk == 1 ? sr : sk)) & 3) == 0;
    pack_tile((is_a ? a : b) + matrix * sb, (is_a ? a_hi : b_hi) + matrix * rows * kp, (is_a ? a_lo : b_lo) + matrix * rows * kp,
              (is_a ? a_inverse : b_inverse) + matrix * kb * padded, (is_a ? a_bad : b_bad) + matrix * rows, rows, k, strip * 64, block * 64,
              sr, sk, vec);
}

// an element whose row or column is flagged
__device__ __noinline__ void plain(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ y, int k, long long a_col,
                                   long long b_row) {
    float sum = 0.0f;
#pragma unroll 4
    for (int q = 0; q < k; ++q) sum = fmaf(a[q * a_col], b[q * b_row], sum);
    *y = sum;
}

constexpr int STAGES = 3, STAGE = 65536, TILE = 16384;  // stage: a hi, a lo, b hi, b lo, each 128 rows of 128 bytes

extern "C" __global__ void __launch_bounds__(384, 1)
product(const __grid_constant__ TensorMap a_hi_map, const __grid_constant__ TensorMap a_lo_map, const __grid_constant__ TensorMap b_hi_map,
        const __grid_constant__ TensorMap b_lo_map, const __grid_constant__ TensorMap a_inverse_map,
        const __grid_constant__ TensorMap b_inverse_map, const int* __restrict__ a_bad, const int* __restrict__ b_bad,
        const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ y, int m, int n, int k, int na, int nb,
        long long a_batch, long long a_row, long long a_col, long long b_batch, long long b_row, long long b_col, long long y_batch,
        long long y_row) {
    extern __shared__ uint8_t raw[];
    __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
    uint8_t* ring = raw + ((1024u - (smem_address(raw) & 1023u)) & 1023u);
    float* inverses = reinterpret_cast<float*>(ring + STAGES * STAGE);  // per stage 128 of a, 128 of b
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    const int tiles_m = ceil_div(m, 128), tiles_n = ceil_div(n, 128), per = tiles_m * tiles_n;
    const int matrix = blockIdx.x / per, tile = blockIdx.x % per;
    const int band = tile / (GROUP * tiles_n), in_band = tile % (GROUP * tiles_n);
    const int high_band = min(GROUP, tiles_m - band * GROUP);
    const int row0 = (band * GROUP + in_band % high_band) * 128, col0 = in_band / high_band * 128;
    const int blocks = (k - 1) / 64 + 1;
    const int a_matrix = na > 1 ? matrix : 0, b_matrix = nb > 1 ? matrix : 0;

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(&full[s], 1);
            mbarrier_init(&empty[s], 256);
        }
        mbarrier_init_fence();
        tma_prefetch(a_hi_map);
        tma_prefetch(a_lo_map);
        tma_prefetch(b_hi_map);
        tma_prefetch(b_lo_map);
        tma_prefetch(a_inverse_map);
        tma_prefetch(b_inverse_map);
    }
    __syncthreads();
    pdl_wait();

    if (warp >= 8) {
        setmaxnreg_dec<40>();
        if (warp == 8 && lane == 0) {
            const int a_at = a_matrix * m + row0, b_at = b_matrix * n + col0;
            int s = 0, phase = 0;
            for (int i = 0; i < blocks; ++i) {
                mbarrier_wait(&empty[s], phase ^ 1);
                mbarrier_arrive_expect(&full[s], STAGE + 1024);
                uint8_t* stage = ring + s * STAGE;
                tma_load_2d(stage, a_hi_map, &full[s], i * 64, a_at);
                tma_load_2d(stage + 3 * TILE, b_lo_map, &full[s], i * 64, b_at);
                tma_load_2d(stage + TILE, a_lo_map, &full[s], i * 64, a_at);
                tma_load_2d(stage + 2 * TILE, b_hi_map, &full[s], i * 64, b_at);
                tma_load_2d(inverses + s * 256, a_inverse_map, &full[s], row0, a_matrix * blocks + i);
                tma_load_2d(inverses + s * 256 + 128, b_inverse_map, &full[s], col0, b_matrix * blocks + i);
                if (++s == STAGES) s = 0, phase ^= 1;
            }
        }
    } else {
        setmaxnreg_inc<232>();
        const int group = warp / 4;
        const int own = group * 64 + warp % 4 * 16 + lane / 4;
        float master[64], acc[64];
#pragma unroll
        for (int i = 0; i < 64; ++i) master[i] = acc[i] = 0.0f;
        int s = 0, phase = 0;
        for (int step = 0; step < blocks; ++step) {
            mbarrier_wait(&full[s], phase);
            const uint8_t* stage = ring + s * STAGE;
            const uint64_t ah = wgmma_descriptor_128(stage + group * 8192), al = wgmma_descriptor_128(stage + TILE + group * 8192);
            const uint64_t bh = wgmma_descriptor_128(stage + 2 * TILE), bl = wgmma_descriptor_128(stage + 3 * TILE);
            wgmma_fence();
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                wgmma_m64n128k16(acc, ah + 2 * q, bl + 2 * q, q != 0);
                wgmma_m64n128k16(acc, al + 2 * q, bh + 2 * q, 1);
            }
#pragma unroll
            for (int q = 0; q < 4; ++q) wgmma_m64n128k16(acc, ah + 2 * q, bh + 2 * q, 1);
            wgmma_commit();
            const float* scales = inverses + s * 256;
            const float a0 = scales[own], a1 = scales[own + 8];
            Vec<float, 2> inverse[16];
#pragma unroll
            for (int j = 0; j < 16; ++j) inverse[j] = load_vec<2>(scales + 128 + 8 * j + lane % 4 * 2);
            wgmma_wait<0>();
            pin(acc);
            mbarrier_arrive(&empty[s]);  // every lane: it has read its scales
#pragma unroll
            for (int i = 0; i < 64; ++i) master[i] = fmaf(acc[i] * (i & 2 ? a1 : a0), inverse[i / 4][i % 2], master[i]);
            if (++s == STAGES) s = 0, phase ^= 1;
        }

        const int row = row0 + own, col = col0 + lane % 4 * 2;
        const int* row_bad = a_bad + (long long)a_matrix * m;
        const int* col_bad = b_bad + (long long)b_matrix * n;
        float* out = y + matrix * y_batch;
        const bool vec = ((y_batch | y_row) & 1) == 0;
        bool bad = (row < m && row_bad[row] != 0) || (row + 8 < m && row_bad[row + 8] != 0);
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const int c = col + 8 * j;
            if (c < n) {
                const bool two = c + 1 < n;
                bad |= col_bad[c] != 0 || (two && col_bad[c + 1] != 0);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (row + 8 * h < m) {
                        float* to = out + (row + 8 * h) * y_row + c;
                        if (vec && two) store_vec(to, Vec<float, 2>{{master[4 * j + 2 * h], master[4 * j + 2 * h + 1]}});
                        else {
                            to[0] = master[4 * j + 2 * h];
                            if (two) to[1] = master[4 * j + 2 * h + 1];
                        }
                    }
                }
            }
        }
        if (bad) {
            const float* am = a + matrix * a_batch;
            const float* bm = b + matrix * b_batch;
#pragma unroll 1
            for (int i = 0; i < 64; ++i) {
                const int r = row + 8 * (i / 2 % 2), c = col + 8 * (i / 4) + i % 2;
                if (r >= m || c >= n || (row_bad[r] == 0 && col_bad[c] == 0)) continue;
                plain(am + r * a_row, bm + c * b_col, out + r * y_row + c, k, a_col, b_row);
            }
        }
    }
}
