/*---
implements = "add.relu"
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
dims       = { n = "y.numel" }
where      = ["n % VEC == 0"]
tune       = { THREADS = [128, 256], VEC = [1, 4] }
[[workspace]]
name  = "calls"
dtype = "int32"
shape = ["1"]
zero  = true
[[launch]]
kernel = "add_relu"
grid   = ["ceil_div(n, THREADS * VEC)"]
block  = ["THREADS"]
args   = ["a", "b", "y", "calls", "n"]
---*/
// y = relu(a + b); NaN stays. `calls` shows that workspaces arrive zeroed: the first block counts itself.
extern "C" __global__ void __launch_bounds__(THREADS) add_relu(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ y,
                                                               int* calls, int64_t n) {
    const int64_t i = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * VEC;
    if (i == 0) atomicAdd(calls, 1);
    if (i >= n) return;
    const Vec<T, VEC> left = load_vec<VEC>(a + i), right = load_vec<VEC>(b + i);
    Vec<T, VEC> out;
#pragma unroll
    for (int j = 0; j < VEC; j++) {
        const float sum = to_float(left[j]) + to_float(right[j]);
        out[j] = from_float<T>(sum < 0.0f ? 0.0f : sum);
    }
    store_vec<VEC>(y + i, out);
}
