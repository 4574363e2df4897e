/*---
implements = "linear"
target     = "cuda"
dtypes     = ["float32"]
where      = ["x.ndim == 2", "weight.ndim == 2", "x.stride[1] == 1", "x.stride[0] % 4 == 0", "weight.stride[1] == 1",
              "weight.stride[0] % 4 == 0", "y.stride[1] == 1", "y.stride[0] % 4 == 0", "k % 8 == 0", "n % 4 == 0", "k >= 256", "m >= 1", "n >= 1"]
dims       = { m = "x.shape[0]", k = "x.shape[1]", n = "weight.shape[1]" }
tune       = { GROUP = [8, 12, 16] }
[[workspace]]
name = "x_hi"
dtype = "float16"
shape = ["m", "k"]
[[workspace]]
name = "x_lo"
dtype = "float16"
shape = ["m", "k"]
[[workspace]]
name = "w_hi"
dtype = "float16"
shape = ["n", "k"]
[[workspace]]
name = "w_lo"
dtype = "float16"
shape = ["n", "k"]
[[workspace]]
name = "x_scale"
dtype = "int32"
shape = ["m"]
[[workspace]]
name = "w_inverse"
dtype = "float32"
shape = ["ceil_div(k, 64)", "n"]
[[workspace]]
name = "w_bad"
dtype = "int32"
shape = ["n"]
zero = true
[[tensor_map]]
name = "x_hi_map"
over = "x_hi"
dims = ["k", "m"]
strides = ["k * 2"]
box = ["64", "128"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "x_lo_map"
over = "x_lo"
dims = ["k", "m"]
strides = ["k * 2"]
box = ["64", "128"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "w_hi_map"
over = "w_hi"
dims = ["k", "n"]
strides = ["k * 2"]
box = ["64", "128"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "w_lo_map"
over = "w_lo"
dims = ["k", "n"]
strides = ["k * 2"]
box = ["64", "128"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "w_inverse_map"
over = "w_inverse"
dims = ["n", "ceil_div(k, 64)"]
strides = ["n * 4"]
box = ["128", "1"]
swizzle = "none"
l2 = "128"
oob = "zero"
[[launch]]
kernel = "prepare"
grid = ["m + ceil_div(n, 64) * ceil_div(k, 64)"]
block = ["256"]
args = ["x", "weight", "x_hi", "x_lo", "x_scale", "w_hi", "w_lo", "w_inverse", "w_bad", "m", "n", "k", "x.stride[0]", "weight.stride[0]"]
[[launch]]
kernel = "product"
grid = ["ceil_div(m, 128) * ceil_div(n, 128)"]
block = ["384"]
smem = "3 * 65536 + 3 * 512 + 1024"
pdl = true
args = ["x_hi_map", "x_lo_map", "w_hi_map", "w_lo_map", "w_inverse_map", "x_scale", "w_bad", "x", "weight", "y", "m", "n", "k",
        "x.stride[0]", "weight.stride[0]", "y.stride[0]"]
---*/
// y = x @ weight in float32 by three fp16 products. x = 2^-s (hi + lo), s per row; weight = 2^-t (hi + lo), t per column and K block of
// 64, so each operand is read once (prepare). Tops are at 2^14, which makes lo exact to 2^-40 of the top.
// product: 128 x 128 tiles, two consumer warpgroups (64 x 128 each), one producer, ring of 3 stages of 64 KiB (K block of 64). The three
// products of a K block start from zero, the small ones first, and are promoted: master = fma(acc, 2^-t of the column, master).

constexpr int FLAG = 1 << 20;  // in place of a scale: the row holds NaN or Inf

__device__ __forceinline__ float pow2(int e) { return __int_as_float((e + 127) << 23); }
// exponent of the power of two that brings a largest magnitude (as bits) to [2^14, 2^15); denormals go as far as floats allow
__device__ __forceinline__ int scale_of(uint32_t top) { return min(141 - int(top >> 23), 126); }
// v * 2^-e with one rounding; |e| <= 252
__device__ __forceinline__ float unscale(float v, int e) {
    const int last = max(-126, min(127, -e));
    return v * pow2(-e - last) * pow2(last);
}
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


// one row of x by the whole block: the first 4096 columns stay in registers between the maximum and the split
__device__ __forceinline__ void split_row(const float* __restrict__ row, half* __restrict__ hi, half* __restrict__ lo, int* scale, int k) {
    Vec<float, 4> kept[4];
    uint32_t top = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int c = (threadIdx.x + 256 * j) * 4;
        kept[j] = Vec<float, 4>{{0.0f, 0.0f, 0.0f, 0.0f}};
        if (c < k) kept[j] = load_vec<4>(row + c);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) top = max(top, magnitude(kept[j][i]));
    for (int c = 4096 + threadIdx.x * 4; c < k; c += 1024) {
        const auto v = load_vec<4>(row + c);
#pragma unroll
        for (int i = 0; i < 4; ++i) top = max(top, magnitude(v[i]));
    }
    top = block_max(top);
    const int e = scale_of(top);
    if (threadIdx.x == 0) *scale = top >= 0x7f800000u ? FLAG : e;
    const float s = pow2(e);
    const auto write = [&](const Vec<float, 4>& v, int c) {
        Vec<half, 4> h, l;
#pragma unroll
        for (int i = 0; i < 4; ++i) split(v[i] * s, h[i], l[i]);
        store_vec(hi + c, h);
        store_vec(lo + c, l);
    };
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int c = (threadIdx.x + 256 * j) * 4;
        if (c < k) write(kept[j], c);
    }
    for (int c = 4096 + threadIdx.x * 4; c < k; c += 1024) write(load_vec<4>(row + c), c);
}

// weight [k, n] -> hi, lo [n, k]: a tile of 64 x 64 through shared memory, one scale for each of its columns
__device__ __forceinline__ void split_tile(const float* __restrict__ weight, half* __restrict__ hi, half* __restrict__ lo,
                                           float* __restrict__ inverse, int* __restrict__ bad, int n, int k, long long pitch, int n0, int k0) {
    __shared__ float tile[64][65];
    __shared__ uint32_t partial[4][64];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int r = threadIdx.x / 16 + 16 * j, c = threadIdx.x % 16 * 4;
        Vec<float, 4> v = {{0.0f, 0.0f, 0.0f, 0.0f}};
        if (k0 + r < k && n0 + c < n) v = load_vec<4>(weight + (k0 + r) * pitch + n0 + c);
#pragma unroll
        for (int i = 0; i < 4; ++i) tile[r][c + i] = v[i];
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
    const int r = threadIdx.x % 8 * 8;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int c = threadIdx.x / 8 + 32 * j;
        if (n0 + c >= n || k0 + r >= k) continue;  // k is a multiple of 8
        const uint32_t top = max(max(partial[0][c], partial[1][c]), max(partial[2][c], partial[3][c]));
        const int e = scale_of(top);
        if (r == 0) {
            inverse[(long long)(k0 / 64) * n + n0 + c] = pow2(-e);
            if (top >= 0x71800000u) atomicOr(bad + n0 + c, 1);  // NaN, Inf, or beyond 2^100, where the scaled sum could overflow
        }
        const float s = pow2(e);
        Vec<half, 8> h, l;
#pragma unroll
        for (int i = 0; i < 8; ++i) split(tile[r + i][c] * s, h[i], l[i]);
        const long long at = (n0 + c) * (long long)k + k0 + r;
        store_vec(hi + at, h);
        store_vec(lo + at, l);
    }
}

extern "C" __global__ void __launch_bounds__(256)
prepare(const float* __restrict__ x, const float* __restrict__ weight, half* __restrict__ x_hi, half* __restrict__ x_lo,
        int* __restrict__ x_scale, half* __restrict__ w_hi, half* __restrict__ w_lo, float* __restrict__ w_inverse, int* __restrict__ w_bad,
        int m, int n, int k, long long x_pitch, long long w_pitch) {
    pdl_launch_dependents();
    if (blockIdx.x < m) {
        const long long r = blockIdx.x;
        split_row(x + r * x_pitch, x_hi + r * k, x_lo + r * k, x_scale + r, k);
    } else {
        const int piece = blockIdx.x - m, strips = ceil_div(n, 64);
        split_tile(weight, w_hi, w_lo, w_inverse, w_bad, n, k, w_pitch, piece % strips * 64, piece / strips * 64);
    }
}

// an element whose row or column is flagged
__device__ __noinline__ void plain(const float* __restrict__ x, const float* __restrict__ weight, float* __restrict__ y, int k, long long w_pitch) {
    float sum = 0.0f;
#pragma unroll 4
    for (int q = 0; q < k; ++q) sum = fmaf(x[q], weight[q * w_pitch], sum);
    *y = sum;
}

constexpr int STAGES = 3, STAGE = 65536, TILE = 16384;  // stage: x hi, x lo, weight hi, weight lo, each 128 rows of 128 bytes

extern "C" __global__ void __launch_bounds__(384, 1)
product(const __grid_constant__ TensorMap x_hi_map, const __grid_constant__ TensorMap x_lo_map,
        const __grid_constant__ TensorMap w_hi_map, const __grid_constant__ TensorMap w_lo_map, const __grid_constant__ TensorMap w_inverse_map,
        const int* __restrict__ x_scale, const int* __restrict__ w_bad, const float* __restrict__ x, const float* __restrict__ weight,
        float* __restrict__ y, int m, int n, int k, long long x_pitch, long long w_pitch, long long y_pitch) {
    extern __shared__ uint8_t raw[];
    __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
    uint8_t* ring = raw + ((1024u - (smem_address(raw) & 1023u)) & 1023u);
    float* inverses = reinterpret_cast<float*>(ring + STAGES * STAGE);  // 128 per stage
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    const int tiles_m = ceil_div(m, 128), tiles_n = ceil_div(n, 128);
    const int band = blockIdx.x / (GROUP * tiles_n), in_band = blockIdx.x % (GROUP * tiles_n);
    const int high_band = min(GROUP, tiles_m - band * GROUP);
    const int row0 = (band * GROUP + in_band % high_band) * 128, col0 = in_band / high_band * 128;
    const int blocks = ceil_div(k, 64);

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(&full[s], 1);
            mbarrier_init(&empty[s], 8);
        }
        mbarrier_init_fence();
        tma_prefetch(x_hi_map);
        tma_prefetch(x_lo_map);
        tma_prefetch(w_hi_map);
        tma_prefetch(w_lo_map);
        tma_prefetch(w_inverse_map);
    }
    __syncthreads();
    pdl_wait();

    if (warp >= 8) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == 8 && lane == 0) {
            int s = 0, phase = 0;
            for (int b = 0; b < blocks; ++b) {
                mbarrier_wait(&empty[s], phase ^ 1);
                mbarrier_arrive_expect(&full[s], STAGE + 512);
                uint8_t* stage = ring + s * STAGE;
                tma_load_2d(stage, x_hi_map, &full[s], b * 64, row0);
                tma_load_2d(stage + 3 * TILE, w_lo_map, &full[s], b * 64, col0);
                tma_load_2d(stage + TILE, x_lo_map, &full[s], b * 64, row0);
                tma_load_2d(stage + 2 * TILE, w_hi_map, &full[s], b * 64, col0);
                tma_load_2d(inverses + s * 128, w_inverse_map, &full[s], col0, b);
                if (++s == STAGES) s = 0, phase ^= 1;
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int group = warp / 4;
        float master[64], acc[64];
#pragma unroll
        for (int i = 0; i < 64; ++i) master[i] = acc[i] = 0.0f;
        int s = 0, phase = 0;
        for (int b = 0; b < blocks; ++b) {
            mbarrier_wait(&full[s], phase);
            const uint8_t* stage = ring + s * STAGE;
            const uint64_t xh = wgmma_descriptor_128(stage + group * 8192), xl = wgmma_descriptor_128(stage + TILE + group * 8192);
            const uint64_t wh = wgmma_descriptor_128(stage + 2 * TILE), wl = wgmma_descriptor_128(stage + 3 * TILE);
            wgmma_fence();
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                wgmma_m64n128k16(acc, xh + 2 * q, wl + 2 * q, q != 0);
                wgmma_m64n128k16(acc, xl + 2 * q, wh + 2 * q, 1);
            }
#pragma unroll
            for (int q = 0; q < 4; ++q) wgmma_m64n128k16(acc, xh + 2 * q, wh + 2 * q, 1);
            wgmma_commit();
            Vec<float, 2> inverse[16];
#pragma unroll
            for (int j = 0; j < 16; ++j) inverse[j] = load_vec<2>(inverses + s * 128 + 8 * j + lane % 4 * 2);
            wgmma_wait<0>();
            pin(acc);
            __syncwarp();  // every lane has read its scales
            if (lane == 0) mbarrier_arrive(&empty[s]);
#pragma unroll
            for (int i = 0; i < 64; ++i) master[i] = fmaf(acc[i], inverse[i / 4][i % 2], master[i]);
            if (++s == STAGES) s = 0, phase ^= 1;
        }

        const int row = row0 + group * 64 + warp % 4 * 16 + lane / 4, col = col0 + lane % 4 * 2;
        const int e0 = row < m ? x_scale[row] : 0, e1 = row + 8 < m ? x_scale[row + 8] : 0;
        bool bad = max(e0, e1) == FLAG;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const int c = col + 8 * j;
            if (c < n) {  // n is even, so is c
                const auto f = load_vec<2>(w_bad + c);
                bad |= (f[0] | f[1]) != 0;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int e = h ? e1 : e0;
                    const Vec<float, 2> out = {{unscale(master[4 * j + 2 * h], e), unscale(master[4 * j + 2 * h + 1], e)}};
                    if (row + 8 * h < m) store_vec(y + (row + 8 * h) * y_pitch + c, out);
                }
            }
        }
        if (bad) {
#pragma unroll 1
            for (int i = 0; i < 64; ++i) {
                const int r = row + 8 * (i / 2 % 2), c = col + 8 * (i / 4) + i % 2;
                if (r >= m || c >= n || (x_scale[r] != FLAG && w_bad[c] == 0)) continue;
                plain(x + r * x_pitch, weight + c, y + r * y_pitch + c, k, w_pitch);
            }
        }
    }
}
