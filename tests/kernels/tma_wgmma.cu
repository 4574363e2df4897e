/*---
implements = "matmul"
target     = "cuda"
dtypes     = ["float16"]
dims       = { m = "a.shape[0]", k = "a.shape[1]", n = "b.shape[1]" }
where      = ["m % 256 == 0", "n % 128 == 0", "k % 64 == 0", "a.stride[1] == 1", "a.stride[0] == k", "b.stride[0] == 1",
              "b.stride[1] == k", "y.stride[0] == n"]
align      = 16
[[tensor_map]]
name    = "map_a"
over    = "a"
dims    = ["k", "m"]
strides = ["2 * k"]
box     = ["64", "128"]
swizzle = "128"
l2      = "128"
[[tensor_map]]
name    = "map_b"                     # b is the transpose of a row-major [n, k] matrix
over    = "b"
dims    = ["k", "n"]
strides = ["2 * k"]
box     = ["64", "64"]                # half a tile: each block of the cluster loads one half for both
swizzle = "128"
[[launch]]
kernel  = "matmul"
grid    = ["m // 128", "n // 128"]
block   = ["256"]
cluster = ["2"]
smem    = "2 * (16384 + 16384) + 1024"
args    = ["map_a", "map_b", "y", "n", "k"]
---*/
// y = a @ b in tiles of 128 x 128 x 64. Two blocks of a cluster share one tile of b by multicast; two warpgroups per block each
// compute 64 rows with wgmma; two stages, so that the next tile arrives while this one is multiplied.
constexpr int STAGES = 2, TILE_BYTES = 16384, STAGE_BYTES = 2 * TILE_BYTES;

__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
        "%26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
        "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
          "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),
          "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]),
          "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]),
          "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]),
          "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b));
}

extern "C" __global__ void __launch_bounds__(256) matmul(const __grid_constant__ TensorMap map_a,
                                                         const __grid_constant__ TensorMap map_b, T_y* y, int n, int k) {
    extern __shared__ uint8_t raw[];
    __shared__ alignas(8) uint64_t full[STAGES];
    uint8_t* smem = raw + ((1024 - (smem_address(raw) & 1023)) & 1023);  // the same offset in both blocks of the cluster
    const int row = blockIdx.x * 128, column = blockIdx.y * 128, tiles = k / 64, group = threadIdx.x / 128;
    const uint32_t rank = cluster_rank();

    // this block's tile of a, and its half of b's tile for both blocks
    auto load = [&](int tile) {
        uint8_t* stage = smem + (tile % STAGES) * STAGE_BYTES;
        uint64_t* barrier = &full[tile % STAGES];
        mbarrier_arrive_expect(barrier, STAGE_BYTES);
        tma_load_2d(stage, map_a, barrier, tile * 64, row);
        tma_load_2d_multicast(stage + TILE_BYTES + rank * (TILE_BYTES / 2), map_b, barrier, tile * 64, column + int(rank) * 64, 3);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) mbarrier_init(&full[i], 1);
        mbarrier_init_fence();
    }
    cluster_sync();  // the other block's barriers exist before our multicast arrives on them
    if (threadIdx.x == 0)
        for (int tile = 0; tile < STAGES && tile < tiles; tile++) load(tile);

    float d[64] = {};
    for (int tile = 0; tile < tiles; tile++) {
        const half* a = reinterpret_cast<const half*>(smem + (tile % STAGES) * STAGE_BYTES) + group * 64 * 64;
        const half* b = reinterpret_cast<const half*>(smem + (tile % STAGES) * STAGE_BYTES + TILE_BYTES);
        mbarrier_wait(&full[tile % STAGES], (tile / STAGES) & 1);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; step++)
            wgmma_m64n128k16(d, wgmma_descriptor_128(a + step * 16), wgmma_descriptor_128(b + step * 16));
        wgmma_commit();
        wgmma_wait<0>();
        cluster_sync();  // both blocks have read this stage: it may be overwritten in both
        if (threadIdx.x == 0 && tile + STAGES < tiles) load(tile + STAGES);
    }

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;  // warp 0..7: 16 rows each
    T_y* out = y + int64_t(row + warp * 16 + lane / 4) * n + column + (lane % 4) * 2;
#pragma unroll
    for (int j = 0; j < 16; j++) {
        *reinterpret_cast<__half2*>(out + j * 8) = __floats2half2_rn(d[4 * j], d[4 * j + 1]);
        *reinterpret_cast<__half2*>(out + int64_t(8) * n + j * 8) = __floats2half2_rn(d[4 * j + 2], d[4 * j + 3]);
    }
}
