/*---
implements = "conv2d.relu.max_pool2d"
target     = "cpu"
dtypes     = ["float32"]
optional   = ["bias"]
where      = ["x.ndim == 4", "weight.ndim == 4", "weight.shape[2] == 3", "weight.shape[3] == 3", "weight.shape[1] == x.shape[1]", "groups == 1",
              "stride[0] == 1", "stride[1] == 1", "padding[0] == 1", "padding[1] == 1", "dilation[0] == 1", "dilation[1] == 1",
              "max_pool2d_kernel_size[0] == 2", "max_pool2d_kernel_size[1] == 2", "max_pool2d_stride[0] == 2", "max_pool2d_stride[1] == 2",
              "max_pool2d_padding[0] == 0", "max_pool2d_padding[1] == 0", "max_pool2d_dilation[0] == 1", "max_pool2d_dilation[1] == 1",
              "max_pool2d_ceil_mode == 0",
              "x.stride[3] == 1", "x.stride[2] == w", "x.stride[1] == h * w", "x.stride[0] == c * h * w",
              "weight.stride[3] == 1", "weight.stride[2] == 3", "weight.stride[1] == 9", "weight.stride[0] == 9 * c",
              "y.stride[3] == 1", "y.stride[2] == pw", "y.stride[1] == ph * pw", "y.stride[0] == k * ph * pw"]
dims       = { n = "x.shape[0]", c = "x.shape[1]", h = "x.shape[2]", w = "x.shape[3]", k = "weight.shape[0]", ph = "y.shape[2]", pw = "y.shape[3]", pitch = "ceil_div(pw, 16) * 16 + 16", slots = "device.threads" }
tune       = { OCB = [4, 6], RB = [4, 8, 16] }
align      = 4
[[workspace]]
name = "padded"
dtype = "float32"
shape = ["slots", "c", "2 * RB + 2", "2 * pitch"]
[[launch]]
kernel = "conv_relu_pool"
args   = ["x", "weight", "bias", "y", "padded", "pitch", "slots", "n", "c", "h", "w", "k", "ph", "pw"]
---*/
// A work item is (image, RB pooled rows): its 2*RB+2 input rows are de-interleaved into the thread's own scratch (L1/L2), then
// channel blocks run outermost so that their weights stay in L1; no barrier anywhere.

// sixteen floats: AVX-512 where there is one, GCC vectors of the same size elsewhere
typedef float V __attribute__((vector_size(64)));
typedef int VI __attribute__((vector_size(64)));
static inline V load16(const float* p) { V v; std::memcpy(&v, p, 64); return v; }
static inline V splat(float s) { return V{} + s; }
static inline V fma16(float s, V b, V acc) {
#if defined(__AVX512F__)
    return (V)_mm512_fmadd_ps(_mm512_set1_ps(s), (__m512)b, (__m512)acc);
#else
    return acc + s * b;
#endif
}
// as fma16 in the lanes of `mask`; the others keep acc: padding takes no part (0 * inf would be NaN)
static inline V fma16_masked(float s, V b, V acc, unsigned mask) {
#if defined(__AVX512F__)
    return (V)_mm512_mask3_fmadd_ps(_mm512_set1_ps(s), (__m512)b, (__m512)acc, __mmask16(mask));
#else
    for (int i = 0; i < 16; ++i) if (mask >> i & 1u) acc[i] += s * b[i];
    return acc;
#endif
}
static inline void store_part(float* p, V v, int64_t count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, count >= 16 ? __mmask16(0xffff) : __mmask16((1u << count) - 1u), (__m512)v);
#else
    std::memcpy(p, &v, size_t(count < 16 ? count : 16) * 4);
#endif
}
// relu(max of four), NaN wherever one of the four is
static inline V pool_relu(V a, V b, V c, V d) {
#if defined(__AVX512F__)
    const __mmask16 bad = _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) | _mm512_cmp_ps_mask((__m512)c, (__m512)d, _CMP_UNORD_Q);
    const __m512 m = _mm512_max_ps(_mm512_max_ps(_mm512_max_ps((__m512)a, (__m512)b), _mm512_max_ps((__m512)c, (__m512)d)), _mm512_setzero_ps());
    return (V)_mm512_mask_mov_ps(m, bad, _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
#else
    V m = {};
    for (int i = 0; i < 16; ++i) {
        float t = a[i] > b[i] ? a[i] : b[i], u = c[i] > d[i] ? c[i] : d[i];
        t = t > u ? t : u;
        t = t > 0.0f ? t : 0.0f;
        m[i] = a[i] != a[i] || b[i] != b[i] || c[i] != c[i] || d[i] != d[i] ? std::numeric_limits<float>::quiet_NaN() : t;
    }
    return m;
#endif
}

// One padded conv row of one channel lies in `pitch2` floats: evens E[p] = x[2p], then from `pitch` on odds, shifted: O[p] = x[2p-1].
// OB output channels x 16 pooled columns: 4 accumulators each (2 conv rows x even/odd column).
template <int OB>
static inline void tile(const float* rows, int64_t cstep, int64_t pitch, const float* wt, int64_t wstep, int64_t c, const float* bias, float* y, int64_t ystep, int64_t count,
                        bool top, bool bottom, unsigned left, unsigned right) {
    // top, bottom: the first or the last of the four input rows is padding; left, right: lanes whose column -1 or 2p+2 is in the image
    V a[OB][4];
#pragma GCC unroll 8
    for (int i = 0; i < OB; ++i) {
#if HAS_BIAS
        const V b = splat(bias[i]);
#else
        const V b = V{};
#endif
        a[i][0] = b; a[i][1] = b; a[i][2] = b; a[i][3] = b;
    }
    for (int64_t ch = 0; ch < c; ++ch) {
        const float* src = rows + ch * cstep;
        const float* wc = wt + ch * 9;
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
            if ((r == 0 && top) || (r == 3 && bottom)) continue;
            const float* e = src + r * 2 * pitch;
            const float* o = e + pitch;
            const V v0 = load16(o), v1 = load16(e), v2 = load16(o + 1), v3 = load16(e + 1);
#pragma GCC unroll 8
            for (int i = 0; i < OB; ++i) {
                const float* wi = wc + i * wstep;
                if (r < 3) {
                    const float w0 = wi[r * 3], w1 = wi[r * 3 + 1], w2 = wi[r * 3 + 2];
                    a[i][0] = fma16_masked(w0, v0, a[i][0], left); a[i][1] = fma16(w0, v1, a[i][1]);
                    a[i][0] = fma16(w1, v1, a[i][0]); a[i][1] = fma16(w1, v2, a[i][1]);
                    a[i][0] = fma16(w2, v2, a[i][0]); a[i][1] = fma16_masked(w2, v3, a[i][1], right);
                }
                if (r > 0) {
                    const float w0 = wi[r * 3 - 3], w1 = wi[r * 3 - 2], w2 = wi[r * 3 - 1];
                    a[i][2] = fma16_masked(w0, v0, a[i][2], left); a[i][3] = fma16(w0, v1, a[i][3]);
                    a[i][2] = fma16(w1, v1, a[i][2]); a[i][3] = fma16(w1, v2, a[i][3]);
                    a[i][2] = fma16(w2, v2, a[i][2]); a[i][3] = fma16_masked(w2, v3, a[i][3], right);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < OB; ++i) store_part(y + i * ystep, pool_relu(a[i][0], a[i][1], a[i][2], a[i][3]), count);
}
// lanes p.. whose column 2(p+lane)+2 lies in the image
static inline unsigned right_lanes(int64_t p, int64_t w) {
    const int64_t inside = (w - 1) / 2 - p;
    return inside >= 16 ? 0xffffu : inside > 0 ? (1u << inside) - 1u : 0u;
}
// conv row `row` (may lie outside of the image: zeros) of one channel, de-interleaved and zero-padded to the whole pitch
static inline void spread_row(const float* img, int64_t row, int64_t h, int64_t w, float* e, int64_t pitch) {
    float* o = e + pitch;
    if (row < 0 || row >= h) { std::memset(e, 0, size_t(2 * pitch) * 4); return; }
    const float* s = img + row * w;
    int64_t p = 0;
    o[0] = 0.0f;
#if defined(__AVX512F__)
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    for (; 2 * p + 32 <= w; p += 16) {
        const __m512 a = _mm512_loadu_ps(s + 2 * p), b = _mm512_loadu_ps(s + 2 * p + 16);
        _mm512_storeu_ps(e + p, _mm512_permutex2var_ps(a, even, b));
        _mm512_storeu_ps(o + p + 1, _mm512_permutex2var_ps(a, odd, b));
    }
#endif
    for (; 2 * p + 1 < w; ++p) { e[p] = s[2 * p]; o[p + 1] = s[2 * p + 1]; }
    if (2 * p < w) { e[p] = s[2 * p]; o[p + 1] = 0.0f; ++p; }
    for (int64_t i = p; i < pitch; ++i) e[i] = 0.0f;
    for (int64_t i = p + 1; i < pitch; ++i) o[i] = 0.0f;
}

template <int OB>
static inline void block(const float* scratch, int64_t cstep, int64_t pitch, const float* weight, int64_t c, const float* bias, float* out, int64_t ph, int64_t pw, int64_t rows, int64_t r0, int64_t h, int64_t w) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t p = 0; p < pw; p += 16) tile<OB>(scratch + r * 4 * pitch + p, cstep, pitch, weight, c * 9, c, bias, out + r * pw + p, ph * pw, pw - p,
                                                       r0 + r == 0, 2 * (r0 + r) + 2 >= h, p ? 0xffffu : 0xfffeu, right_lanes(p, w));
    }
}
extern "C" void conv_relu_pool(const float* x, const float* weight, const float* bias, float* y, float* padded, int64_t pitch, int64_t slots,
                               int64_t n, int64_t c, int64_t h, int64_t w, int64_t k, int64_t ph, int64_t pw) {
    const int64_t rowlen = 2 * pitch, cstep = (2 * RB + 2) * rowlen, bands = (ph + RB - 1) / RB, items = n * bands;
#pragma omp parallel if (n * k * ph * pw * c > 4096)
    {
        const int64_t id = omp_get_thread_num(), nt = omp_get_num_threads() < slots ? omp_get_num_threads() : slots;
        const int64_t first = id < nt ? items * id / nt : 0, last = id < nt ? items * (id + 1) / nt : 0;
        float* scratch = padded + (id < nt ? id : 0) * c * cstep;
        for (int64_t item = first; item < last; ++item) {
            const int64_t b = item / bands, r0 = item % bands * RB, rows = ph - r0 < RB ? ph - r0 : RB;
            for (int64_t ch = 0; ch < c; ++ch) {
                for (int64_t r = 0; r < 2 * rows + 2; ++r) spread_row(x + (b * c + ch) * h * w, 2 * r0 - 1 + r, h, w, scratch + ch * cstep + r * rowlen, pitch);
            }
            float* out = y + (b * k * ph + r0) * pw;
            int64_t oc = 0;
            for (; oc + OCB <= k; oc += OCB) block<OCB>(scratch, cstep, pitch, weight + oc * c * 9, c, bias + oc, out + oc * ph * pw, ph, pw, rows, r0, h, w);
            for (; oc + 2 <= k; oc += 2) block<2>(scratch, cstep, pitch, weight + oc * c * 9, c, bias + oc, out + oc * ph * pw, ph, pw, rows, r0, h, w);
            for (; oc < k; ++oc) block<1>(scratch, cstep, pitch, weight + oc * c * 9, c, bias + oc, out + oc * ph * pw, ph, pw, rows, r0, h, w);
        }
    }
}
