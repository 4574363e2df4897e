/*---
implements = "conv2d"
target     = "cpu"
dtypes     = ["float32"]
optional   = ["bias"]
where      = ["x.ndim == 4", "weight.ndim == 4", "weight.shape[1] == x.shape[1]", "groups == 1",
              "stride[0] == 1", "stride[1] == 1", "dilation[0] == 1", "dilation[1] == 1",
              "oh == h + 2 * ph - kh + 1", "ow == w + 2 * pw - kw + 1",
              "x.stride[3] == 1", "x.stride[2] == w", "x.stride[1] == h * w", "x.stride[0] == c * h * w",
              "weight.stride[3] == 1", "weight.stride[2] == kw", "weight.stride[1] == kh * kw", "weight.stride[0] == c * kh * kw",
              "y.stride[3] == 1", "y.stride[2] == ow", "y.stride[1] == oh * ow", "y.stride[0] == k * oh * ow"]
dims       = { n = "x.shape[0]", c = "x.shape[1]", h = "x.shape[2]", w = "x.shape[3]", k = "weight.shape[0]", kh = "weight.shape[2]", kw = "weight.shape[3]", ph = "padding[0]", pw = "padding[1]", oh = "y.shape[2]", ow = "y.shape[3]", pitch = "ceil_div(ow + kw + 31, 16) * 16 + 16", hp = "h + 2 * ph + 1", kb = "ceil_div(k, 32)" }
tune       = { PX = [8, 11, 14] }
align      = 4
[[workspace]]
name = "padded"
dtype = "float32"
shape = ["n", "c", "hp", "pitch"]
[[workspace]]
name = "packed"
dtype = "float32"
shape = ["kb", "c", "kh * kw", "32"]
[[workspace]]
name = "shift"
dtype = "float32"
shape = ["kb", "32"]
[[launch]]
kernel = "conv"
args   = ["x", "weight", "bias", "y", "padded", "packed", "shift", "n", "c", "h", "w", "k", "kh", "kw", "ph", "pw", "oh", "ow", "pitch", "hp", "kb"]
---*/
// Channels in the lanes: 32 channels x PX pixels of a row as accumulators, input scalars broadcast; 32 columns are collected, transposed
// in registers and stored as rows of the channels.

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
static inline void store_part(float* p, V v, int64_t count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, count >= 16 ? __mmask16(0xffff) : __mmask16((1u << count) - 1u), (__m512)v);
#else
    std::memcpy(p, &v, size_t(count < 16 ? count : 16) * 4);
#endif
}

static inline void transpose16(V* q) {
#if defined(__AVX512F__)
    __m512 r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = (__m512)q[i];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) { t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]); t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]); }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]), c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
        r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)); r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)); r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512 x0 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), x1 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
        const __m512 y0 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88), y1 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
        q[j] = (V)_mm512_shuffle_f32x4(x0, y0, 0x88); q[4 + j] = (V)_mm512_shuffle_f32x4(x1, y1, 0x88);
        q[8 + j] = (V)_mm512_shuffle_f32x4(x0, y0, 0xdd); q[12 + j] = (V)_mm512_shuffle_f32x4(x1, y1, 0xdd);
    }
#else
    for (int i = 0; i < 16; ++i) for (int j = 0; j < i; ++j) { const float s = q[i][j]; q[i][j] = q[j][i]; q[j][i] = s; }
#endif
}

template <bool EDGE> static inline void pixels(const float* src, int64_t cstep, int64_t pitch, const float* wt, int64_t c, int64_t kh, int64_t kw, const float* shift, V* lo, V* hi, int64_t row, int64_t col, int64_t h, int64_t w) {
    // row, col: image position of src[0]; padding takes no part (0 * inf would be NaN). Sums of some 128 products each are added up in
    // memory: one running sum over hundreds of channels would round too often.
    const V b0 = load16(shift), b1 = load16(shift + 16);
    for (int q = 0; q < PX; ++q) { lo[q] = b0; hi[q] = b1; }
    const int64_t step = kh * kw < 128 ? 128 / (kh * kw) : 1;
    for (int64_t ch = 0; ch < c;) {
        V a[PX][2];
#pragma GCC unroll 16
        for (int q = 0; q < PX; ++q) { a[q][0] = V{}; a[q][1] = V{}; }
        for (const int64_t end = ch + step < c ? ch + step : c; ch < end; ++ch) {
            for (int64_t ky = 0; ky < kh; ++ky) {
                const float* s = src + ch * cstep + ky * pitch;
                if (EDGE && (row + ky < 0 || row + ky >= h)) { wt += 32 * kw; continue; }
                for (int64_t kx = 0; kx < kw; ++kx, wt += 32) {
                    const V w0 = load16(wt), w1 = load16(wt + 16);
#pragma GCC unroll 16
                    for (int q = 0; q < PX; ++q) {
                        if (EDGE && (col + kx + q < 0 || col + kx + q >= w)) continue;
                        a[q][0] = fma16(s[kx + q], w0, a[q][0]); a[q][1] = fma16(s[kx + q], w1, a[q][1]); }
                }
            }
        }
#pragma GCC unroll 16
        for (int q = 0; q < PX; ++q) { lo[q] += a[q][0]; hi[q] += a[q][1]; }
    }
}

extern "C" void conv(const float* x, const float* weight, const float* bias, float* y, float* padded, float* packed, float* shift, int64_t n, int64_t c, int64_t h, int64_t w,
                     int64_t k, int64_t kh, int64_t kw, int64_t ph, int64_t pw, int64_t oh, int64_t ow, int64_t pitch, int64_t hp, int64_t kb) {
    const int64_t cstep = hp * pitch, taps = kh * kw;
#pragma omp parallel if (n * k * oh * ow * c > 8192)
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < n * c; ++i) {
            for (int64_t r = 0; r < hp; ++r) {
                float* d = padded + i * cstep + r * pitch;
                const int64_t row = r - ph;
                if (row < 0 || row >= h) { std::memset(d, 0, size_t(pitch) * 4); continue; }
                for (int64_t p = 0; p < pw; ++p) d[p] = 0.0f;
                std::memcpy(d + pw, x + (i * h + row) * w, size_t(w) * 4);
                std::memset(d + pw + w, 0, size_t(pitch - pw - w) * 4);
            }
        }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < kb; ++b) {
            for (int64_t l = 0; l < 32; ++l) {
                const int64_t oc = b * 32 + l;
                for (int64_t t = 0; t < c * taps; ++t) packed[(b * c * taps + t) * 32 + l] = oc < k ? weight[oc * c * taps + t] : 0.0f;
#if HAS_BIAS
                shift[oc] = oc < k ? bias[oc] : 0.0f;
#else
                shift[oc] = 0.0f;
#endif
            }
        }
#pragma omp for schedule(static) collapse(2)
        for (int64_t b = 0; b < n; ++b) {
            for (int64_t r = 0; r < oh; ++r) {
                const float* src = padded + b * c * cstep + r * pitch;
                for (int64_t g = 0; g < kb; ++g) {
                    const float* wt = packed + g * c * taps * 32;
                    const int64_t chans = k - g * 32 < 32 ? k - g * 32 : 32;
                    float* out = y + ((b * k + g * 32) * oh + r) * ow;
                    for (int64_t p = 0; p < ow; p += 32) {
                        const int64_t count = ow - p < 32 ? ow - p : 32;
                        V lo[32 + PX], hi[32 + PX];
                        for (int64_t i = count; i < 32; ++i) { lo[i] = V{}; hi[i] = V{}; }
                        for (int64_t q = 0; q < count; q += PX) {
                            const int64_t row = r - ph, col = p + q - pw;
                            if (row < 0 || row + kh > h || col < 0 || col + kw - 1 + PX > w) pixels<true>(src + p + q, cstep, pitch, wt, c, kh, kw, shift + g * 32, lo + q, hi + q, row, col, h, w);
                            else pixels<false>(src + p + q, cstep, pitch, wt, c, kh, kw, shift + g * 32, lo + q, hi + q, row, col, h, w);
                        }
                        for (int64_t q = 0; q < count; q += 16) {
                            transpose16(lo + q);
                            transpose16(hi + q);
                            for (int64_t l = 0; l < chans; ++l) store_part(out + l * oh * ow + p + q, l < 16 ? lo[q + l] : hi[q + l - 16], count - q);
                        }
                    }
                }
            }
        }
    }
}
