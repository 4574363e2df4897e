/*---
implements = ["conv2d.relu", "conv2d", "conv2d.batch_norm", "conv2d.batch_norm.relu", "conv2d.add.relu", "conv2d.batch_norm.add.relu", "conv2d.silu", "conv2d.hardswish", "conv2d.batch_norm.hardswish"]
target     = "cuda"
dtypes     = ["float32"]
optional   = ["bias", "residual", "bn_weight", "bn_bias", "bn_mean", "bn_var"]
where      = ["x.ndim == 4", "x.contiguous == 1", "weight.contiguous == 1", "y.contiguous == 1", "groups == 1", "n >= 1", "oh >= 1", "ow >= 1",
              "c >= 16", "c * taps >= 64", "weight.shape[1] == c", "stride[0] <= 8", "stride[1] <= 8", "n <= 65535", "ceil_div(c, 64) <= 65535",
              "n * hh * ww < 2147483648", "taps * ocp < 2147483648", "c * taps < 1073741824", "ptiles * octiles < 1073741824",
              "x.shape[2] * x.shape[3] < 1073741824", "oh * ow < 1073741824",
              "(OT == 1) == (ceil_div(oc, 64) % 2)", "NT % (8 * tn) == 0", "ceil_div(oh, th) * th * 20 <= best * (21 + 2 * (NT == 64))",
              "(NT != 104) + (oh % 13 == 0) >= 1", "(NT != 96) + ((kh - 1) * dilation[0] > 2) * ((kh - 1) * dilation[0] <= 4) * (stride[0] == 1) >= 1",
              "(NT != 64) + (ptiles * octiles <= device.sms * 3) >= 1"]
tune       = { NT = [112, 128, 104, 96, 64], OT = [2, 1], CLUSTER = [2, 1] }
[dims]
n = "x.shape[0]"
c = "x.shape[1]"
oc = "weight.shape[0]"
kh = "weight.shape[2]"
kw = "weight.shape[3]"
taps = "kh * kw"
cp = "ceil_div(c, 8) * 8"
flat = "(taps == 1) * (stride[0] == 1) * (stride[1] == 1) * (padding[0] == 0) * (padding[1] == 0) * ((x.shape[2] * x.shape[3]) % 8 == 0)"
hh = "flat * (x.shape[2] * x.shape[3] // 8) + (1 - flat) * x.shape[2]"
ww = "flat * 8 + (1 - flat) * x.shape[3]"
oh = "flat * (y.shape[2] * y.shape[3] // 8) + (1 - flat) * y.shape[2]"
ow = "flat * 8 + (1 - flat) * y.shape[3]"
tn = "1 + (oh <= 8) * (n > 1)"
th = "max(NT // (8 * tn), 1)"
ry = "1 + (tn == 1) * (stride[0] == 1) * (th + (kh - 1) * dilation[0] <= 16) * (kh - 1)"
boxh = "th + (ry - 1) * dilation[0]"
best = "(tn == 1) * min(ceil_div(oh, 14) * 14, ceil_div(oh, 16) * 16) + (tn == 2) * min(ceil_div(oh, 7) * 7, ceil_div(oh, 8) * 8)"
tiles_x = "ceil_div(ow, 8)"
tiles_y = "ceil_div(oh, th)"
ptiles = "tiles_x * tiles_y * ceil_div(n, tn)"
octiles = "ceil_div(oc, 64 * OT)"
ocp = "octiles * 64 * OT"
work = "octiles * ceil_div(ptiles, (3 - OT) * CLUSTER)"
[[workspace]]
name = "x_top"
dtype = "int32"
shape = ["n"]
zero = true
[[workspace]]
name = "x_hi"
dtype = "float16"
shape = ["n", "hh", "ww", "cp"]
[[workspace]]
name = "x_lo"
dtype = "float16"
shape = ["n", "hh", "ww", "cp"]
[[workspace]]
name = "w_hi"
dtype = "float16"
shape = ["taps * ocp", "cp"]
[[workspace]]
name = "w_lo"
dtype = "float16"
shape = ["taps * ocp", "cp"]
[[workspace]]
name = "w_exp"
dtype = "int32"
shape = ["ocp"]
[[tensor_map]]
name = "x_hi_map"
over = "x_hi"
dims = ["cp", "ww", "hh", "n"]
strides = ["cp * 2", "ww * cp * 2", "hh * ww * cp * 2"]
box = ["64", "8 * stride[1]", "boxh * stride[0]", "tn"]
elem_strides = ["1", "stride[1]", "stride[0]", "1"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "x_lo_map"
over = "x_lo"
dims = ["cp", "ww", "hh", "n"]
strides = ["cp * 2", "ww * cp * 2", "hh * ww * cp * 2"]
box = ["64", "8 * stride[1]", "boxh * stride[0]", "tn"]
elem_strides = ["1", "stride[1]", "stride[0]", "1"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "w_hi_map"
over = "w_hi"
dims = ["cp", "taps * ocp"]
strides = ["cp * 2"]
box = ["64", "64 * OT // CLUSTER"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[tensor_map]]
name = "w_lo_map"
over = "w_lo"
dims = ["cp", "taps * ocp"]
strides = ["cp * 2"]
box = ["64", "64 * OT // CLUSTER"]
swizzle = "128"
l2 = "256"
oob = "zero"
[[prepare]]
kernel = "pack_weight"
grid = ["ocp"]
block = ["256"]
args = ["weight", "w_hi", "w_lo", "w_exp", "oc", "ocp", "c", "cp", "taps"]
[[launch]]
kernel = "sample_top"
grid = ["ceil_div(c * hh * ww, 131072)", "n"]
block = ["256"]
args = ["x", "x_top", "c * hh * ww"]
[[launch]]
kernel = "split_x"
grid = ["ceil_div(hh * ww, 64)", "ceil_div(c, 64)", "n"]
block = ["256"]
args = ["x", "x_top", "x_hi", "x_lo", "c", "cp", "hh * ww"]
[[launch]]
kernel = "conv"
grid = ["min(work, device.sms // CLUSTER) * CLUSTER"]
block = ["384"]
cluster = ["CLUSTER"]
smem = "229376 + 1024"
args = ["x_hi_map", "x_lo_map", "w_hi_map", "w_lo_map", "x_top", "w_exp", "x", "weight", "bias", "bn_weight", "bn_bias", "bn_mean", "bn_var", "residual", "y",
        "n", "c", "hh", "ww", "oc", "ocp", "kh", "kw", "oh", "ow", "stride[0]", "stride[1]", "padding[0]", "padding[1]", "dilation[0]", "dilation[1]",
        "tn", "th", "ry", "boxh", "tiles_x", "tiles_y", "ptiles", "octiles", "work"]
---*/
// An infinity in x gives what the sum of products gives (eager's Winograd makes NaN of some of them, and of their neighbours).
// Strict float32 convolution, NCHW, by three fp16 products on tensor cores.
// x * 2^e (e per image, from a sample of it) = hi + lo / 2048, channels last in the workspace; the weight likewise, e per output
// channel, as [tap][oc][c]. conv: D[oc][pixel], a warpgroup 64 x NT; pixels are 8 wide, NT / 8 rows high (over tn images). One TMA box
// per (64 channels, kx) brings the rows of all ky (stride 1), a tap being an offset of whole 1024-byte groups; zero fill is the padding.
// hi*lo + lo*hi go to one zeroed accumulator, hi*hi to another, both are added to float registers once per 64 channels, each while the
// other one runs. NaN, Inf and values beyond 2^11 times the sampled maximum become non-finite in hi, hence every output that they touch
// comes out non-finite; such outputs are computed once more from the float inputs, a warp for each.

constexpr int PT = 3 - OT, NA = OT == 2 ? 4 : 6, NB = OT == 2 ? 3 : 2;  // pixel tiles of a block, slots of the two rings
constexpr int A_PLANE = OT * 8192, A_SLOT = 2 * A_PLANE, B_PLANE = 16384, B_TILE = 2 * B_PLANE, B_SLOT = PT * B_TILE;
constexpr int A_ROWS = OT * 64 / CLUSTER;

__device__ __forceinline__ float pow2(int e) { return __int_as_float((e + 127) << 23); }
__device__ __forceinline__ int x_scale(int top) { return min(131 - (top >> 23), 126); }  // brings the sampled top to [2^4, 2^5)
__device__ __forceinline__ int w_scale(int top) { return min(141 - (top >> 23), 126); }  // to [2^14, 2^15)
__device__ __forceinline__ int finite_magnitude(float v) {
    const int bits = __float_as_int(v) & 0x7fffffff;
    return bits < 0x7f800000 ? bits : 0;
}
__device__ __forceinline__ bool is_finite(float v) { return (__float_as_uint(v) & 0x7fffffffu) < 0x7f800000u; }
__device__ __forceinline__ void split(float v, half& hi, half& lo) {
    hi = __float2half_rn(v);
    const float h = __half2float(hi);
    lo = is_finite(h) ? __float2half_rn((v - h) * 2048.0f) : __ushort_as_half(0);
}

// d (64 x NT, fp32) = [d +] a (64 x 16) * b (NT x 16)^T, both fp16 in shared memory
__device__ __forceinline__ void wgmma_tile(float (&d)[NT / 2], uint64_t a, uint64_t b, int accumulate) {
#if NT == 64
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 0, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(accumulate));
#elif NT == 96
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
        "%48, %49, p, 1, 1, 0, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
        : "l"(a), "l"(b), "r"(accumulate));
#elif NT == 104
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %54, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n104k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51}, "
        "%52, %53, p, 1, 1, 0, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
        : "l"(a), "l"(b), "r"(accumulate));
#elif NT == 112
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %58, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n112k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55}, "
        "%56, %57, p, 1, 1, 0, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
        : "l"(a), "l"(b), "r"(accumulate));
#elif NT == 128
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
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
#endif
}

// keeps the compiler from moving uses of the accumulators above the wait in front of this
__device__ __forceinline__ void pin(float (&d)[NT / 2]) {
#pragma unroll
    for (int i = 0; i < NT / 2; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

extern "C" __global__ void __launch_bounds__(256)
pack_weight(const float* __restrict__ weight, half* __restrict__ w_hi, half* __restrict__ w_lo, int* __restrict__ w_exp,
            int oc, int ocp, int c, int cp, int taps) {
    const int o = blockIdx.x, length = c * taps;
    const float* row = weight + (long long)o * length;
    int top = 0;
    if (o < oc)
        for (int i = threadIdx.x; i < length; i += 256) top = max(top, finite_magnitude(row[i]));
    top = block_max(top);
    const int e = w_scale(top);
    if (threadIdx.x == 0) w_exp[o] = e;
    const float s = pow2(e);
    for (int i = threadIdx.x; i < cp * taps; i += 256) {
        const int t = i / cp, k = i % cp;
        half hi, lo;
        split(o < oc && k < c ? row[(long long)k * taps + t] * s : 0.0f, hi, lo);
        const long long at = ((long long)t * ocp + o) * cp + k;
        w_hi[at] = hi;
        w_lo[at] = lo;
    }
}

// largest finite magnitude of a sixteenth of each image, in pieces of 1024
extern "C" __global__ void __launch_bounds__(256)
sample_top(const float* __restrict__ x, int* __restrict__ x_top, long long length) {
    const float* image = x + blockIdx.y * length;
    int top = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const long long piece = blockIdx.x * 8ll + j, begin = (piece * 16 + (piece * 5) % 16) * 1024 + threadIdx.x;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (begin + 256 * i < length) top = max(top, finite_magnitude(image[begin + 256 * i]));
    }
    top = block_max(top);
    if (threadIdx.x == 0 && top) atomicMax(x_top + blockIdx.y, top);
}

extern "C" __global__ void __launch_bounds__(256)
split_x(const float* __restrict__ x, const int* __restrict__ x_top, half* __restrict__ x_hi, half* __restrict__ x_lo, int c, int cp, int hw) {
    __shared__ float tile[64][65];
    const int p0 = blockIdx.x * 64, c0 = blockIdx.y * 64;
    const float* image = x + (long long)blockIdx.z * c * hw;
    if (hw % 4 == 0) {
        const int p = threadIdx.x % 16 * 4, r = threadIdx.x / 16;
        Vec<float, 4> v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[i] = Vec<float, 4>{{0.0f, 0.0f, 0.0f, 0.0f}};
            if (c0 + r + 16 * i < c && p0 + p < hw) v[i] = load_vec<4>(image + (long long)(c0 + r + 16 * i) * hw + p0 + p);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int q = 0; q < 4; ++q) tile[r + 16 * i][p + q] = v[i][q];
    } else {
        const int p = threadIdx.x % 64, r = threadIdx.x / 64;
        float v[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            v[i] = 0.0f;
            if (c0 + r + 4 * i < c && p0 + p < hw) v[i] = image[(long long)(c0 + r + 4 * i) * hw + p0 + p];
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) tile[r + 4 * i][p] = v[i];
    }
    const float s = pow2(x_scale(x_top[blockIdx.z]));
    __syncthreads();
    const int k = threadIdx.x % 8 * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int p = threadIdx.x / 8 + 32 * i;
        if (p0 + p >= hw || c0 + k >= cp) continue;
        Vec<half, 8> hi, lo;
#pragma unroll
        for (int q = 0; q < 8; ++q) split(tile[k + q][p] * s, hi[q], lo[q]);
        const long long at = ((long long)blockIdx.z * hw + p0 + p) * cp + c0 + k;
        store_vec(x_hi + at, hi);
        store_vec(x_lo + at, lo);
    }
}

struct Channel {
    float bias, mean, inverse, gain, shift;
};
__device__ __forceinline__ Channel load_channel(int o, bool valid, const float* bias, const float* bn_weight, const float* bn_bias,
                                                const float* bn_mean, const float* bn_var) {
    Channel ch = {0.0f, 0.0f, 1.0f, 1.0f, 0.0f};
    if (valid) {
#if HAS_BIAS
        ch.bias = bias[o];
#endif
#if OP_BATCH_NORM
#if HAS_BN_MEAN
        ch.mean = bn_mean[o];
#endif
#if HAS_BN_VAR
        ch.inverse = 1.0f / sqrtf(bn_var[o] + float(P_BATCH_NORM_EPS));
#endif
#if HAS_BN_WEIGHT
        ch.gain = bn_weight[o];
#endif
#if HAS_BN_BIAS
        ch.shift = bn_bias[o];
#endif
#endif
    }
    return ch;
}
// what follows the sum; `at` is the element's place in y (and in residual)
__device__ __forceinline__ float finish(float v, const Channel& ch, const float* residual, long long at) {
#if HAS_BIAS
    v += ch.bias;
#endif
#if OP_BATCH_NORM
    v = (v - ch.mean) * ch.inverse * ch.gain + ch.shift;
#endif
#if OP_ADD
    v += residual[at];
#endif
#if OP_RELU
    v = v < 0.0f ? 0.0f : v;  // NaN stays
#endif
#if OP_SILU
    v = v / (1.0f + expf(-v));
#endif
#if OP_HARDSWISH
    v = v * fminf(fmaxf(v + 3.0f, 0.0f), 6.0f) / 6.0f;
#endif
    return v;
}

extern "C" __global__ void __launch_bounds__(384, 1)
conv(const __grid_constant__ TensorMap x_hi_map, const __grid_constant__ TensorMap x_lo_map,
     const __grid_constant__ TensorMap w_hi_map, const __grid_constant__ TensorMap w_lo_map,
     const int* __restrict__ x_top, const int* __restrict__ w_exp, const float* __restrict__ x, const float* __restrict__ weight,
     const float* __restrict__ bias, const float* __restrict__ bn_weight, const float* __restrict__ bn_bias, const float* __restrict__ bn_mean,
     const float* __restrict__ bn_var, const float* __restrict__ residual, float* __restrict__ y,
     int n, int c, int h, int w, int oc, int ocp, int kh, int kw, int oh, int ow, int sh, int sw, int ph, int pw, int dh, int dw,
     int tn, int th, int ry, int boxh, int tiles_x, int tiles_y, int ptiles, int octiles, int work) {
    extern __shared__ uint8_t raw[];
    __shared__ __align__(8) uint64_t full_a[NA], empty_a[NA], full_b[NB], empty_b[NB];
    uint8_t* ring_a = raw + ((1024u - (smem_address(raw) & 1023u)) & 1023u);
    uint8_t* ring_b = ring_a + NA * A_SLOT;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#if CLUSTER > 1
    const int rank = cluster_rank();
#else
    const int rank = 0;
#endif
    if (threadIdx.x == 0) {
        for (int s = 0; s < NA; ++s) {
            mbarrier_init(&full_a[s], 1);
            mbarrier_init(&empty_a[s], 8 * CLUSTER);
        }
        for (int s = 0; s < NB; ++s) {
            mbarrier_init(&full_b[s], 1);
            mbarrier_init(&empty_b[s], 8);
        }
        mbarrier_init_fence();
        tma_prefetch(x_hi_map);
        tma_prefetch(x_lo_map);
        tma_prefetch(w_hi_map);
        tma_prefetch(w_lo_map);
    }
    __syncthreads();
#if CLUSTER > 1
    cluster_sync();
#endif
    const int cblocks = ceil_div(c, 64), clusters = gridDim.x / CLUSTER;
    const int units = cblocks * kw * (kh / ry);  // a unit: one box of pixels, ry taps

    if (warp >= 8) {
        setmaxnreg_dec<56>();
        if (warp == 8 && lane == 0) {
            int sa = 0, pa = 1, sb = 0, pb = 1;
            const uint32_t bytes_b = PT * 2 * 1024 * boxh * tn;
            for (int item = blockIdx.x / CLUSTER; item < work; item += clusters) {
                const int oc0 = item % octiles * (64 * OT), tile0 = (item / octiles * CLUSTER + rank) * PT;
                int x0[PT], y0[PT], n0[PT];
#pragma unroll
                for (int p = 0; p < PT; ++p) {
                    const int tile = tile0 + p;
                    x0[p] = tile % tiles_x * 8 * sw - pw;
                    y0[p] = tile / tiles_x % tiles_y * th * sh - ph;
                    n0[p] = tile / tiles_x / tiles_y * tn;  // beyond the last image: zeros
                }
                for (int cb = 0; cb < cblocks; ++cb)
                    for (int ky = 0; ky < kh; ky += ry)
                        for (int kx = 0; kx < kw; ++kx) {
                            mbarrier_wait(&empty_b[sb], pb);
                            mbarrier_arrive_expect(&full_b[sb], bytes_b);
#pragma unroll
                            for (int p = 0; p < PT; ++p) {
                                uint8_t* slot = ring_b + sb * B_SLOT + p * B_TILE;
                                tma_load_4d(slot, x_hi_map, &full_b[sb], cb * 64, x0[p] + kx * dw, y0[p] + ky * dh, n0[p]);
                                tma_load_4d(slot + B_PLANE, x_lo_map, &full_b[sb], cb * 64, x0[p] + kx * dw, y0[p] + ky * dh, n0[p]);
                            }
                            if (++sb == NB) sb = 0, pb ^= 1;
                            for (int r = 0; r < ry; ++r) {
                                const int row = ((ky + r) * kw + kx) * ocp + oc0 + rank * A_ROWS;
                                uint8_t* slot = ring_a + sa * A_SLOT + rank * A_ROWS * 128;
#if CLUSTER > 1
                                mbarrier_wait_cluster(&empty_a[sa], pa);
                                mbarrier_arrive_expect(&full_a[sa], A_SLOT);
                                tma_load_2d_multicast(slot, w_hi_map, &full_a[sa], cb * 64, row, (1 << CLUSTER) - 1);
                                tma_load_2d_multicast(slot + A_PLANE, w_lo_map, &full_a[sa], cb * 64, row, (1 << CLUSTER) - 1);
#else
                                mbarrier_wait(&empty_a[sa], pa);
                                mbarrier_arrive_expect(&full_a[sa], A_SLOT);
                                tma_load_2d(slot, w_hi_map, &full_a[sa], cb * 64, row);
                                tma_load_2d(slot + A_PLANE, w_lo_map, &full_a[sa], cb * 64, row);
#endif
                                if (++sa == NA) sa = 0, pa ^= 1;
                            }
                        }
            }
        }
    } else {
        setmaxnreg_inc<224>();
        const int group = warp / 4;
        const uint64_t a_base = wgmma_descriptor_128(ring_a + (OT == 2 ? group * 8192 : 0));
        const uint64_t b_base = wgmma_descriptor_128(ring_b + (OT == 2 ? 0 : group * B_TILE));
        float master[NT / 2], cross[NT / 2], high[NT / 2];
        int sa = 0, pa = 0, sb = 0, pb = 0, r = 0;
        uint64_t ah = a_base, bh = b_base;
        int open_a = 0, open_b = 0;  // slots of the current tap (b: only if this is its last tap, else -1)
        const auto open = [&]() {
            if (r == 0) mbarrier_wait(&full_b[sb], pb);
            mbarrier_wait(&full_a[sa], pa);
            ah = a_base + sa * (A_SLOT / 16);
            bh = b_base + (sb * (B_SLOT / 16) + r * dh * 64);
            open_a = sa;
            open_b = -1;
            if (++sa == NA) sa = 0, pa ^= 1;
            if (++r == ry) {
                r = 0;
                open_b = sb;
                if (++sb == NB) sb = 0, pb ^= 1;
            }
        };
        const auto release = [&](int a, int b) {
#if CLUSTER > 1
            if (lane < CLUSTER) mbarrier_arrive_remote(&empty_a[a], lane);
#else
            if (lane == 0) mbarrier_arrive(&empty_a[a]);
#endif
            if (b >= 0 && lane == 0) mbarrier_arrive(&empty_b[b]);
        };
        const int steps = units * ry;
        for (int item = blockIdx.x / CLUSTER; item < work; item += clusters) {
#pragma unroll
            for (int i = 0; i < NT / 2; ++i) master[i] = cross[i] = high[i] = 0.0f;
#pragma unroll 1
            for (int t = 0; t < steps; ++t) {
                open();
                wgmma_fence();
#pragma unroll
                for (int q = 0; q < 4; ++q) {
                    wgmma_tile(cross, ah + 2 * q, bh + B_PLANE / 16 + 2 * q, q != 0);
                    wgmma_tile(cross, ah + A_PLANE / 16 + 2 * q, bh + 2 * q, 1);
                }
                wgmma_commit();
#pragma unroll
                for (int q = 0; q < 4; ++q) wgmma_tile(high, ah + 2 * q, bh + 2 * q, q != 0);
                wgmma_commit();
                wgmma_wait<1>();
#pragma unroll
                for (int i = 0; i < NT / 2; ++i) asm volatile("fma.rn.f32 %0, %1, %2, %0;" : "+f"(master[i]) : "f"(cross[i]), "f"(1.0f / 2048.0f));
                wgmma_wait<0>();
                release(open_a, open_b);
#pragma unroll
                for (int i = 0; i < NT / 2; ++i) asm volatile("add.f32 %0, %0, %1;" : "+f"(master[i]) : "f"(high[i]));
            }

            // epilogue: element 4 j + 2 r + b is channel o0 + 8 r, pixel (j, 2 * (lane % 4) + b) of the tile
            const int tile = (item / octiles * CLUSTER + rank) * PT + (OT == 2 ? 0 : group);
            if (tile < ptiles) {
                const int o_warp = item % octiles * (64 * OT) + (OT == 2 ? group * 64 : 0) + warp % 4 * 16;
                const int x_tile = tile % tiles_x * 8, y_tile = tile / tiles_x % tiles_y * th, n_tile = tile / tiles_x / tiles_y * tn;
                const int ox = x_tile + lane % 4 * 2;
                const long long plane = (long long)oh * ow;
                const bool even = ow % 2 == 0;
                uint64_t bad = 0;
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int o = o_warp + lane / 4 + 8 * r;
                    const Channel ch = load_channel(o, o < oc, bias, bn_weight, bn_bias, bn_mean, bn_var);
                    const int we = w_exp[o];
#pragma unroll
                    for (int j = 0; j < NT / 8; ++j) {
                        const bool second = tn == 2 && j >= NT / 16;
                        const int image = n_tile + second, oy = y_tile + j - (second ? NT / 16 : 0);
                        if (o < oc && image < n && oy < oh && ox < ow) {
                            const int e = -(we + x_scale(x_top[image])), last = max(-126, min(127, e));
                            const float f0 = pow2(e - last), f1 = pow2(last);
                            const long long at = ((long long)image * oc + o) * plane + (long long)oy * ow + ox;
                            const float s0 = master[4 * j + 2 * r], s1 = master[4 * j + 2 * r + 1];
                            if (!is_finite(s0)) bad |= 1ull << (4 * j + 2 * r);
                            if (!is_finite(s1) && ox + 1 < ow) bad |= 1ull << (4 * j + 2 * r + 1);
                            if (even) {
                                const Vec<float, 2> out = {{finish(s0 * f0 * f1, ch, residual, at), finish(s1 * f0 * f1, ch, residual, at + 1)}};
                                store_vec(y + at, out);
                            } else {
                                y[at] = finish(s0 * f0 * f1, ch, residual, at);
                                if (ox + 1 < ow) y[at + 1] = finish(s1 * f0 * f1, ch, residual, at + 1);
                            }
                        }
                    }
                }
                // non-finite sums: again from the float inputs, the warp together
                uint32_t any;
#pragma unroll 1
                while ((any = __ballot_sync(0xffffffffu, bad != 0)) != 0) {
                    const int from = __ffs(any) - 1;
                    const int i = __ffsll((long long)__shfl_sync(0xffffffffu, bad, from)) - 1;
                    const int j = i / 4, o = o_warp + from / 4 + 8 * (i / 2 % 2);
                    const bool second = tn == 2 && j >= NT / 16;
                    const int image = n_tile + second, oy = y_tile + j - (second ? NT / 16 : 0), px = x_tile + from % 4 * 2 + i % 2;
                    const int taps = kh * kw;
                    const float* input = x + (long long)image * c * h * w;
                    const float* filter = weight + (long long)o * c * taps;
                    float sum = 0.0f;
#pragma unroll 1
                    for (int k = lane; k < c * taps; k += 32) {
                        const int ci = k / taps, t = k % taps;
                        const int iy = oy * sh - ph + t / kw * dh, ix = px * sw - pw + t % kw * dw;
                        if (iy >= 0 && iy < h && ix >= 0 && ix < w) sum = fmaf(input[((long long)ci * h + iy) * w + ix], filter[k], sum);
                    }
                    sum = warp_sum(sum);
                    if (lane == from) {
                        const long long at = ((long long)image * oc + o) * plane + (long long)oy * ow + px;
                        const Channel ch = load_channel(o, true, bias, bn_weight, bn_bias, bn_mean, bn_var);
                        y[at] = finish(sum, ch, residual, at);
                        bad &= bad - 1;
                    }
                    __syncwarp();
                }
            }
        }
    }
#if CLUSTER > 1
    __syncwarp();
    cluster_sync();  // the other block may still arrive at this one's barriers
#endif
}
