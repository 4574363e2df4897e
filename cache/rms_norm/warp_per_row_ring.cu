/*---
implements = "rms_norm"
target     = "cuda"
dtypes     = ["float16", "bfloat16"]
dims       = { cols = "weight.numel", rows = "x.numel // cols", nvec = "cols // 8" }
where      = ["x.ndim >= 2", "x.ndim <= 3", "x.shape[-1] == cols", "weight.ndim == 1", "weight.stride[0] == 1", "weight.itemsize == x.itemsize",
              "y.itemsize == x.itemsize",
              "x.stride[-1] == 1", "x.stride[-2] == cols", "x.stride[0] * x.shape[0] == x.numel",
              "y.stride[-1] == 1", "y.stride[-2] == cols", "y.stride[0] == x.stride[0]", "rows <= 1073741824",
              "cols % 8 == 0", "32 * NV >= nvec", "16 * NV < nvec",
              "PER_SM * (WARPS * STAGES * NV * 512 + 1024) <= device.smem_per_block"]
tune       = { WARPS = [4, 8], NV = [1, 2, 4, 8, 16], STAGES = [2, 3, 4], PER_SM = [1, 2, 3] }
align      = 16
[[launch]]
kernel = "rms_ring"
grid   = ["min(ceil_div(rows, WARPS), device.sms * PER_SM)"]
block  = ["WARPS * 32"]
smem   = "WARPS * STAGES * NV * 512"
args   = ["x", "weight", "y", "rows", "cols", "eps"]
---*/
// One warp per row, persistent. Every warp has a ring of STAGES rows in shared memory; a lane copies (cp.async, 16 bytes) the very
// vectors that it reads itself, so there is no barrier at all. A row goes from its slot to registers (packed), the slot is
// refilled at once, and the weights stay packed in registers.
// hides that a packed vector is unchanged: otherwise the compiler keeps all its conversions to float alive in registers
__device__ __forceinline__ void stay_packed(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }
template <class E> __device__ __forceinline__ Vec<E, 8> unpack(const uint4& v) { return *reinterpret_cast<const Vec<E, 8>*>(&v); }

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
rms_ring(const T* __restrict__ x, const T_weight* __restrict__ weight, T_y* __restrict__ y, int rows, int cols, float eps) {
    extern __shared__ __align__(16) unsigned char ring[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, nvec = cols / 8;
    uint4* mine = reinterpret_cast<uint4*>(ring) + warp * (STAGES * NV * 32) + lane;
    const int64_t step = int64_t(gridDim.x) * WARPS;
    int64_t row = int64_t(warp) * gridDim.x + blockIdx.x;

    auto fetch = [&](int64_t r, int slot) {
        if (r < rows) {
            const uint4* src = reinterpret_cast<const uint4*>(x + r * cols) + lane;
            uint4* dst = mine + slot * (NV * 32);
#pragma unroll
            for (int k = 0; k < NV; ++k)
                if (lane + k * 32 < nvec) cp_async16(dst + k * 32, src + k * 32);
        }
        cp_async_commit();  // an empty group keeps the count
    };
#pragma unroll
    for (int s = 0; s < STAGES; ++s) fetch(row + s * step, s);

    uint4 w[NV];
#pragma unroll
    for (int k = 0; k < NV; ++k)
        if (lane + k * 32 < nvec) w[k] = __ldg(reinterpret_cast<const uint4*>(weight) + lane + k * 32);
    const float n = float(cols);

    int slot = 0;
    for (; row < rows; row += step) {
        cp_async_wait<STAGES - 1>();
        const uint4* src = mine + slot * (NV * 32);
        uint4 v[NV];
        float q = 0.f;
#pragma unroll
        for (int k = 0; k < NV; ++k)
            if (lane + k * 32 < nvec) {
                v[k] = src[k * 32];
                const Vec<T, 8> xv = unpack<T>(v[k]);
                float a = 0.f, b = 0.f;
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    const float f = to_float(xv[j]), g = to_float(xv[j + 1]);
                    a = fmaf(f, f, a);
                    b = fmaf(g, g, b);
                }
                q += a + b;
            }
        q = warp_sum(q);
        fetch(row + STAGES * step, slot);  // the slot is in registers
        const float r = 1.f / sqrtf(q / n + eps);
        uint4* dst = reinterpret_cast<uint4*>(y + row * cols) + lane;
#pragma unroll
        for (int k = 0; k < NV; ++k)
            if (lane + k * 32 < nvec) {
                stay_packed(v[k]);
                stay_packed(w[k]);
                const Vec<T, 8> xv = unpack<T>(v[k]);
                const Vec<T_weight, 8> wv = unpack<T_weight>(w[k]);
                Vec<T_y, 8> out;
#pragma unroll
                for (int j = 0; j < 8; ++j) out[j] = from_float<T_y>(to_float(xv[j]) * r * to_float(wv[j]));
                __stcs(dst + k * 32, *reinterpret_cast<const uint4*>(&out));
            }
        if (++slot == STAGES) slot = 0;
    }
}
