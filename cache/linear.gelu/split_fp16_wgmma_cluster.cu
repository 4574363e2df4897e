/*---
implements = "linear.gelu"
target     = "cuda"
dtypes     = ["float32"]
where      = ["x.ndim == 2", "weight.ndim == 2", "bias.ndim == 1", "x.stride[1] == 1", "x.stride[0] % 4 == 0", "weight.stride[0] == 1",
              "weight.stride[1] % 4 == 0", "bias.stride[0] == 1", "bias.shape[0] == n", "y.stride[1] == 1", "y.stride[0] % 4 == 0",
              "k % 4 == 0", "n % 4 == 0", "k >= 256", "m >= 1", "n >= 1"]
dims       = { m = "x.shape[0]", k = "x.shape[1]", n = "weight.shape[1]", kp = "ceil_div(k, 32) * 32" }
tune       = { GROUP = [4, 8, 16], PROMOTE = [1, 2] }
[[workspace]]
name = "x_cat"
dtype = "float16"
shape = ["m", "kp * 2"]
[[workspace]]
name = "w_cat"
dtype = "float16"
shape = ["n", "kp * 2"]
[[workspace]]
name = "x_inv"
dtype = "float32"
shape = ["m"]
[[workspace]]
name = "w_inv"
dtype = "float32"
shape = ["n"]
[[tensor_map]]
name = "x_map"
over = "x_cat"
dims = ["kp * 2", "m"]
strides = ["kp * 4"]
box = ["64", "128"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "w_map"
over = "w_cat"
dims = ["kp * 2", "n"]
strides = ["kp * 4"]
box = ["64", "96"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[launch]]
kernel = "split_rows"
grid = ["ceil_div(m + n, 4)"]
block = ["128"]
args = ["x", "weight", "x_cat", "x_inv", "w_cat", "w_inv", "m", "n", "k", "kp", "x.stride[0]", "weight.stride[1]"]
[[launch]]
kernel = "product_gelu"
grid = ["min(device.sms // 2, ceil_div(m, 256) * ceil_div(n, 192)) * 2"]
block = ["384"]
cluster = ["2"]
smem = "5 * 40960 + 1024"
args = ["x_map", "w_map", "x_inv", "w_inv", "x", "weight", "bias", "y", "m", "n", "k",
        "x.stride[0]", "weight.stride[1]", "y.stride[0]"]
---*/
// y = gelu(x @ weight + bias) in float32 by three fp16 products: x = 2^-s (hi + lo), s per row of x and per column of weight, lo exact
// to 2^-40 of the row's largest. hi and lo of 32 of k share a row of 128 bytes. Persistent clusters of two blocks, tiles of 128 x 192 one
// above the other; each block fetches half of the weight tile and multicasts it. Products of PROMOTE * 32 of k start from zero and are
// added to float32 registers while the other warpgroup's products run.
constexpr int TN = 192, STAGES = 5, STAGE = 16384 + TN * 128;  // stage: 128 rows of x, TN columns of weight, 128 bytes each
constexpr int XBOX = 64;

__device__ __forceinline__ float pow2(int e) { return __int_as_float((e + 127) << 23); }
// exponent of the power of two that brings a largest magnitude (as bits) to [2^14, 2^15); denormals go as far as floats allow.
// A row with NaN or Inf gets -114: an Inf there makes lo = Inf - Inf, so that every product with the row is NaN.
__device__ __forceinline__ int scale_of(uint32_t top) { return min(141 - int(min(top, 0x7f800000u) >> 23), 126); }
__device__ __forceinline__ float gelu(float v) { return v * 0.5f * (1.0f + erff(v * 0.70710678118654752440f)); }
// acc * a * b + c for powers of two a, b: the smaller one first cannot overflow, and what it loses is far below the result's last bit
__device__ __forceinline__ float unscale(float acc, float a, float b, float c) { return fmaf(acc * fminf(a, b), fmaxf(a, b), c); }
// element (r, c) again, plainly: used where NaN or Inf are among the inputs
__device__ __forceinline__ void plain(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias,
                                   float* __restrict__ y, int r, int c, int k, long long x_pitch, long long w_pitch, long long y_pitch) {
    float total = 0.0f;
#pragma unroll 4
    for (int q = 0; q < k; ++q) total = fmaf(x[r * x_pitch + q], weight[c * w_pitch + q], total);
    y[r * y_pitch + c] = gelu(total + bias[c]);
}
// d (64 x 192, fp32) = [d +] a (64 x 16) * b (192 x 16)^T in fp16
__device__ __forceinline__ void wgmma_k16(float (&d)[96], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " 
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " 
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
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
template <int N> __device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// one warp per row of x or column of weight (both contiguous along k): largest magnitude, then hi and lo, 32 and 32 of them
extern "C" __global__ void __launch_bounds__(128)
split_rows(const float* __restrict__ x, const float* __restrict__ weight, half* __restrict__ x_cat, float* __restrict__ x_inv,
           half* __restrict__ w_cat, float* __restrict__ w_inv, int m, int n, int k, int kp, long long x_pitch, long long w_pitch) {
    long long r = blockIdx.x * 4ll + threadIdx.x / 32;
    if (r >= (long long)m + n) return;
    const int lane = threadIdx.x % 32;
    const bool is_x = r < m;
    if (!is_x) r -= m;
    const float* row = is_x ? x + r * x_pitch : weight + r * w_pitch;
    half* to = (is_x ? x_cat : w_cat) + r * 2 * kp;
    uint32_t top = 0;
#pragma unroll 6
    for (int c = lane * 4; c < k; c += 128) {
        const auto v = load_vec<4>(row + c);
#pragma unroll
        for (int i = 0; i < 4; ++i) top = max(top, __float_as_uint(v[i]) & 0x7fffffffu);
    }
    top = warp_max(top);
    const int e = scale_of(top);
    if (lane == 0) (is_x ? x_inv : w_inv)[r] = pow2(-e);
    const float s = pow2(e);
#pragma unroll 6
    for (int c = lane * 4; c < kp; c += 128) {
        Vec<float, 4> v = {{0.0f, 0.0f, 0.0f, 0.0f}};
        if (c < k) v = load_vec<4>(row + c);
        Vec<half, 4> h, l;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float u = v[i] * s;
            h[i] = __float2half_rn(u);
            l[i] = __float2half_rn(u - __half2float(h[i]));
        }
        half* at = to + c / 32 * 64 + c % 32;
        store_vec(at, h);
        store_vec(at + 32, l);
    }
}

// arrive on the same barrier of block `rank` of the cluster
__device__ __forceinline__ void arrive_at(uint64_t* barrier, uint32_t rank) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(smem_address(barrier)), "r"(rank) : "memory");
}
// pair of tiles (256 x TN) number p, in bands of GROUP pairs so that concurrent blocks share rows and columns in L2
__device__ __forceinline__ void pair_at(int p, int m, int n, int& row, int& col) {
    const int pairs_m = ceil_div(m, 256), tiles_n = ceil_div(n, TN);
    const int band = p / (GROUP * tiles_n), in_band = p % (GROUP * tiles_n);
    const int width = min(GROUP, pairs_m - band * GROUP);
    row = (band * GROUP + in_band % width) * 256;
    col = in_band / width * TN;
}

// this thread's elements of a tile: rows row and row + 8, columns col + 8 j and col + 8 j + 1
__device__ __forceinline__ void finish(const float (&master)[TN / 2], int row, int col, const float* __restrict__ x_inv,
                                       const float* __restrict__ w_inv, const float* __restrict__ x, const float* __restrict__ weight,
                                       const float* __restrict__ bias, float* __restrict__ y, int m, int n, int k,
                                       long long x_pitch, long long w_pitch, long long y_pitch) {
    const float e0 = row < m ? x_inv[row] : 1.0f, e1 = row + 8 < m ? x_inv[row + 8] : 1.0f;
    bool bad = false;
    float* y0 = y + row * y_pitch;
    float* y1 = y0 + 8 * y_pitch;
#pragma unroll
    for (int j = 0; j < TN / 8; ++j) {
        const int c = col + 8 * j;
        if (c < n) {  // n is even, so is c
            const auto f = load_vec<2>(w_inv + c);
            const auto a = load_vec<2>(bias + c);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float e = h ? e1 : e0, u = master[4 * j + 2 * h], v = master[4 * j + 2 * h + 1];
                bad |= u != u || v != v;
                const Vec<float, 2> out = {{gelu(unscale(u, e, f[0], a[0])), gelu(unscale(v, e, f[1], a[1]))}};
                if (row + 8 * h < m) store_vec((h ? y1 : y0) + c, out);
            }
        }
    }
    if (bad) {  // NaN or Inf in a row or a column: this thread's elements again, plainly
#pragma unroll 1
        for (int i = 0; i < TN / 2; ++i) {
            const int r = row + 8 * (i / 2 % 2), c = col + 8 * (i / 4) + i % 2;
            if (r < m && c < n) plain(x, weight, bias, y, r, c, k, x_pitch, w_pitch, y_pitch);
        }
    }
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(384, 1)
product_gelu(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const float* __restrict__ x_inv,
             const float* __restrict__ w_inv, const float* __restrict__ x, const float* __restrict__ weight,
             const float* __restrict__ bias, float* __restrict__ y, int m, int n, int k,
             long long x_pitch, long long w_pitch, long long y_pitch) {
    extern __shared__ uint8_t raw[];
    __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
    uint8_t* ring = raw + ((1024u - (smem_address(raw) & 1023u)) & 1023u);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rank = cluster_rank(), first = blockIdx.x / 2, step = gridDim.x / 2;
    const int pairs = ceil_div(m, 256) * ceil_div(n, TN), blocks = ceil_div(k, 32);

    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            mbarrier_init(&full[s], 1);
            mbarrier_init(&empty[s], 16);  // 8 consumer warps in each of the two blocks: half of each weight tile lands in both
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    cluster_sync();

    if (warp >= 8) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (warp == 8 && lane == 0) {
            tma_prefetch(x_map);
            tma_prefetch(w_map);
            int s = 0, phase = 0;
            for (int p = first; p < pairs; p += step) {
                int row0, col0;
                pair_at(p, m, n, row0, col0);
                row0 += rank * 128;
                for (int b = 0; b < blocks; ++b) {
                    mbarrier_wait(&empty[s], phase ^ 1);
                    mbarrier_arrive_expect(&full[s], STAGE);
                    uint8_t* stage = ring + s * STAGE;
                    tma_load_2d(stage, x_map, &full[s], b * XBOX, row0);
                    tma_load_2d_multicast(stage + 16384 + rank * (TN * 64), w_map, &full[s], b * 64, col0 + rank * (TN / 2), 3);
                    if (++s == STAGES) s = 0, phase ^= 1;
                }
            }
        }
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const int group = warp / 4;
        const int my_row = rank * 128 + group * 64 + warp % 4 * 16 + lane / 4, my_col = lane % 4 * 2;
        float master[TN / 2], acc[TN / 2];
#pragma unroll
        for (int i = 0; i < TN / 2; ++i) master[i] = acc[i] = 0.0f;
        int s = 0, phase = 0, row = 0, col = 0;
        for (int p = first; p < pairs; p += step) {
            for (int b = 0; b < blocks; b += PROMOTE) {
                const int from = s, count = min(PROMOTE, blocks - b);
                for (int u = 0; u < count; ++u) {
                    mbarrier_wait(&full[s], phase);
                    const uint8_t* stage = ring + s * STAGE;
                    const uint64_t a = wgmma_descriptor_128(stage + group * 8192), w = wgmma_descriptor_128(stage + 16384);
                    wgmma_fence();  // hi of 16 of k at + 0 and + 2, lo at + 4 and + 6 (units of 16 bytes); smallest products first
                    wgmma_k16(acc, a + 4, w, u != 0);
                    wgmma_k16(acc, a + 6, w + 2, 1);
                    wgmma_k16(acc, a, w + 4, 1);
                    wgmma_k16(acc, a + 2, w + 6, 1);
                    wgmma_k16(acc, a, w, 1);
                    wgmma_k16(acc, a + 2, w + 2, 1);
                    wgmma_commit();
                    if (++s == STAGES) s = 0, phase ^= 1;
                }
                if (b == 0) {  // the tile before is finished while the tensor cores work on this one
                    if (p != first)
                        finish(master, row + my_row, col + my_col, x_inv, w_inv, x, weight, bias, y, m, n, k, x_pitch, w_pitch, y_pitch);
#pragma unroll
                    for (int i = 0; i < TN / 2; ++i) master[i] = 0.0f;
                    pair_at(p, m, n, row, col);
                }
                wgmma_wait<0>();
                pin(acc);
                if (lane < 2) {
                    arrive_at(&empty[from], lane);
                    if (count > 1) arrive_at(&empty[from + 1 == STAGES ? 0 : from + 1], lane);
                }
#pragma unroll
                for (int i = 0; i < TN / 2; ++i) master[i] += acc[i];
            }
            
        }
        finish(master, row + my_row, col + my_col, x_inv, w_inv, x, weight, bias, y, m, n, k, x_pitch, w_pitch, y_pitch);
    }
    __syncwarp();
    cluster_sync();  // no block leaves while the other may still arrive on its barriers
}
