// What a CUDA kernel may use without writing #include: half and bfloat16 with their intrinsics, and the helpers below.
// Macros: T, ACC, T_<tensor>, HAS_<NAME>, P_<NAME>, static dims, tunables. Inline PTX (asm) is allowed.
#include <cuda_fp16.h>
#include <cuda_bf16.h>

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
using bfloat16 = __nv_bfloat16;

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif

template <class I> __host__ __device__ constexpr I ceil_div(I a, I b) { return (a + b - 1) / b; }

// element type <-> float, and element type <-> ACC (float, or double for float64)
template <class E> __device__ __forceinline__ float to_float(E value) { return static_cast<float>(value); }
template <class E> __device__ __forceinline__ E from_float(float value) { return static_cast<E>(value); }
template <class E> __device__ __forceinline__ ACC to_acc(E value) { return static_cast<ACC>(value); }
template <class E> __device__ __forceinline__ E from_acc(ACC value) { return static_cast<E>(value); }

// N elements moved at once; the address must be a multiple of sizeof(Vec), which is at most 16 bytes' alignment
template <class E, int N> struct alignas(sizeof(E) * N < 16 ? sizeof(E) * N : 16) Vec {
    E data[N];
    __device__ __forceinline__ E& operator[](int i) { return data[i]; }
    __device__ __forceinline__ const E& operator[](int i) const { return data[i]; }
};
template <int N, class E> __device__ __forceinline__ Vec<E, N> load_vec(const E* from) {
    return *reinterpret_cast<const Vec<E, N>*>(from);
}
template <int N, class E> __device__ __forceinline__ void store_vec(E* to, const Vec<E, N>& value) {
    *reinterpret_cast<Vec<E, N>*>(to) = value;
}

// Reductions; every lane (thread) gets the result. block_*: all threads of a 1-D block of whole warps must call them.
template <class V> __device__ __forceinline__ V warp_sum(V value) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    return value;
}
template <class V> __device__ __forceinline__ V warp_max(V value) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        const V other = __shfl_xor_sync(0xffffffffu, value, lane);
        value = (value != value || value > other) ? value : other;  // NaN stays
    }
    return value;
}
template <class V> __device__ __forceinline__ V block_sum(V value) {
    __shared__ V partial[32];
    value = warp_sum(value);
    __syncthreads();  // the previous use of `partial` is over
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : V(0));
}
template <class V> __device__ __forceinline__ V block_max(V value) {
    __shared__ V partial[32];
    value = warp_max(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    return warp_max(threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : partial[0]);
}

// 32-bit address in shared memory, as PTX wants it
__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Asynchronous 16-byte copy from global to shared memory (sm_80): copies of a thread complete in commit groups
__device__ __forceinline__ void cp_async16(void* smem, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_address(smem)), "l"(global) : "memory");
}
// the same where `valid`, else 16 zero bytes; `global` is not read then, but must still be an address in the tensor
__device__ __forceinline__ void cp_async16_zero_fill(void* smem, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(smem_address(smem)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Tensor cores by warp (sm_80). ldmatrix: four 8x8 tiles of 16-bit elements; lane i passes the 16-byte aligned address of row
// i % 8 of tile i / 8, and r[t] gets elements (i / 4, 2 * (i % 4) + {0, 1}) of tile t, of its transpose with _trans.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_address(row)) : "memory");
}
// d[16][8] += a[16][16] * b[16][8], E half or bfloat16, float sums. With g = lane / 4 and t = 2 * (lane % 4), two elements along k
// in a register: a = (g, t) (g + 8, t) (g, t + 8) (g + 8, t + 8), b = (t, g) (t + 8, g), d = (g, t) (g, t + 1) (g + 8, t)
// (g + 8, t + 1).
template <class E> __device__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) = delete;
template <>
__device__ __forceinline__ void mma_m16n8k16<half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Named barriers for some warps of a block: id 1 to 15 (0 is __syncthreads), `threads` of all that sync or arrive at it
__device__ __forceinline__ void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A TMA descriptor: declare the parameter as `const __grid_constant__ TensorMap map` and describe it in [[tensor_map]]
struct alignas(64) TensorMap {
    uint8_t opaque[128];
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// mbarrier: an 8-byte aligned uint64_t in shared memory. It flips phase when `count` threads arrived and all expected bytes did.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(count) : "memory");
}
// makes initialised barriers visible to the cluster and to TMA; follow with __syncthreads() or cluster_sync()
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes) : "memory");
}
// wait until the phase of parity `phase` (0 for the first) is complete
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t phase) {
    asm volatile(
        "{\n.reg .pred done;\nretry:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra finish;\nbra retry;\nfinish:\n}"
        ::"r"(smem_address(barrier)), "r"(phase) : "memory");
}
// arrive at the same barrier of block `rank` of the cluster, releasing to it; its owner waits with mbarrier_wait_cluster
__device__ __forceinline__ void mbarrier_arrive_remote(uint64_t* barrier, uint32_t rank) {
    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}"
                 ::"r"(smem_address(barrier)), "r"(rank) : "memory");
}
__device__ __forceinline__ void mbarrier_wait_cluster(uint64_t* barrier, uint32_t phase) {
    asm volatile("{\n.reg .pred done;\nretry:\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@done bra finish;\nbra retry;\nfinish:\n}"
                 ::"r"(smem_address(barrier)), "r"(phase) : "memory");
}

// TMA: one thread moves a box; coordinates in elements, innermost first; the load arrives on `barrier`
__device__ __forceinline__ void tma_prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ __forceinline__ void tma_load_2d(void* smem, const TensorMap& map, uint64_t* barrier, int c0, int c1) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(smem_address(smem)), "l"(&map), "r"(smem_address(barrier)), "r"(c0), "r"(c1) : "memory");
}
__device__ __forceinline__ void tma_load_3d(void* smem, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(smem_address(smem)), "l"(&map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
__device__ __forceinline__ void tma_load_4d(void* smem, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
                 ::"r"(smem_address(smem)), "l"(&map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
// `bytes` (a multiple of 16) from global to shared memory, both 16-byte aligned, no descriptor; arrives on `barrier` like TMA
__device__ __forceinline__ void bulk_load(void* smem, const void* global, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(smem_address(smem)), "l"(global), "r"(bytes), "r"(smem_address(barrier)) : "memory");
}
// the same box into the same place of every block of the cluster whose bit is set in `mask`, arriving on each one's barrier
__device__ __forceinline__ void tma_load_2d_multicast(void* smem, const TensorMap& map, uint64_t* barrier, int c0, int c1, uint16_t mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%3, %4}], [%2], %5;"
                 ::"r"(smem_address(smem)), "l"(&map), "r"(smem_address(barrier)), "r"(c0), "r"(c1), "h"(mask) : "memory");
}
__device__ __forceinline__ void tma_store_2d(const TensorMap& map, const void* smem, int c0, int c1) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
                 ::"l"(&map), "r"(smem_address(smem)), "r"(c0), "r"(c1) : "memory");
}
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int Pending> __device__ __forceinline__ void tma_store_wait() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
// orders ordinary writes to shared memory before asynchronous reads of it (TMA stores, wgmma)
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// clusters
__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// programmatic dependent launch (pdl = true): wait for the previous kernel's writes; let the next one start
__device__ __forceinline__ void pdl_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void pdl_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
// Registers moved between warpgroups, by all 128 threads of one: 24 to 256, a multiple of 8. The kernel needs __launch_bounds__.
template <int Registers> __device__ __forceinline__ void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers> __device__ __forceinline__ void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// wgmma: fence before the first and whenever registers were touched, commit a group, wait for all but `Pending` groups
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Shared-memory descriptor of a K-major operand that TMA wrote with swizzle = "128": rows of 128 bytes, groups of 8 rows
// 1024 bytes apart, the tile 1024-byte aligned. A step of 32 bytes along K is `pointer + 32 bytes`.
__device__ __forceinline__ uint64_t wgmma_descriptor_128(const void* pointer) {
    return (uint64_t(smem_address(pointer) & 0x3ffff) >> 4) | (uint64_t(1) << 16) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 62);
}
#endif
