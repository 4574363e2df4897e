/*---
implements = "matmul"
target     = "cuda"
dtypes     = ["float16", "float32"]
[[tensor_map]]
name    = "map"
over    = "a"
dims    = ["a.shape[1]", "a.shape[0]"]
strides = ["a.stride[0] * a.itemsize"]
box     = ["8", "8"]
[[launch]]
kernel = "every_helper"
grid   = ["1"]
block  = ["128"]
args   = ["map", "b", "y"]
---*/
// Calls every helper of the prelude, so that its PTX is assembled; never launched.
extern "C" __global__ void every_helper(const __grid_constant__ TensorMap map, const T* b, T* y) {
    __shared__ alignas(128) T tile[64];
    __shared__ alignas(8) uint64_t barrier[2];
    const Vec<T, 4> four = load_vec<4>(b);
    store_vec<4>(y, four);
    y[4] = from_acc<T>(to_acc(four[1]) + warp_max(to_acc(b[0])) + block_sum(to_acc(b[1])) + block_max(to_acc(b[2])));
    y[5] = from_float<T>(to_float(bfloat16(1.0f)) + (to_float(b[3]) > 0 ? INFINITY : NAN) + ceil_div(7, 2));
    cp_async16(tile, b);
    cp_async_commit();
    cp_async_wait<0>();
#if __CUDA_ARCH__ >= 900
    pdl_wait();
    tma_prefetch(map);
    mbarrier_init(&barrier[0], 1);
    mbarrier_init(&barrier[1], 1);
    mbarrier_init_fence();
    cluster_sync();
    mbarrier_arrive_expect(&barrier[0], 128);
    tma_load_2d(tile, map, &barrier[0], 0, int(cluster_rank()));
    tma_load_2d_multicast(tile, map, &barrier[0], 0, 0, 1);
    mbarrier_wait(&barrier[0], 0);
    mbarrier_arrive(&barrier[1]);
    mbarrier_wait(&barrier[1], 0);
    fence_async_shared();
    tma_store_2d(map, tile, 0, 0);
    tma_store_commit();
    tma_store_wait<0>();
    pdl_launch_dependents();
#endif
}
