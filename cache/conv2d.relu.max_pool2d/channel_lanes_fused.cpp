/*---
implements = "conv2d.relu.max_pool2d"
target     = "cpu"
dtypes     = ["float32"]
optional   = ["bias", "relu_out", "indices"]
where      = ["x.ndim == 4", "weight.ndim == 4", "x.shape[1] == groups * weight.shape[1]", "x.contiguous", "weight.contiguous", "bias.contiguous",
              "y.contiguous", "relu_out.contiguous", "indices.contiguous", "padding[0] >= 0", "padding[1] >= 0"]
dims       = { n = "x.shape[0]", c = "x.shape[1]", h = "x.shape[2]", w = "x.shape[3]", k = "weight.shape[0]", cg = "weight.shape[1]", kh = "weight.shape[2]", kw = "weight.shape[3]", ph = "y.shape[2]", pw = "y.shape[3]", oh = "(h + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1", ow = "(w + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1", plain = "(kh == 3) * (kw == 3) * (groups == 1) * (stride[0] == 1) * (stride[1] == 1) * (padding[0] == 1) * (padding[1] == 1) * (dilation[0] == 1) * (dilation[1] == 1)", pool = "(max_pool2d_kernel_size[0] == 2) * (max_pool2d_kernel_size[1] == 2) * (max_pool2d_stride[0] == 2) * (max_pool2d_stride[1] == 2) * (max_pool2d_padding[0] == 0) * (max_pool2d_padding[1] == 0) * (max_pool2d_dilation[0] == 1) * (max_pool2d_dilation[1] == 1) * (max_pool2d_ceil_mode == 0)", fast = "plain * pool * (1 - HAS_RELU_OUT * max(h % 2, w % 2))", slots = "device.threads", kb = "ceil_div(k, 16)" }
tune       = { PP = [3, 4] }
align      = 4
[[workspace]]
name = "conv"
dtype = "float32"
shape = ["max(1, (1 - fast) * (1 - HAS_RELU_OUT) * n * k * oh * ow)"]
[[workspace]]
name = "packed"
dtype = "float32"
shape = ["kb", "c * 9 + 1", "16"]
[[launch]]
kernel = "conv_relu_pool"
args   = ["x", "weight", "bias", "y", "relu_out", "indices", "conv", "packed", "kb", "slots", "fast", "n", "c", "h", "w", "k", "cg", "kh", "kw", "oh", "ow", "ph", "pw"]
---*/
// Sixteen output channels in the lanes, x read in place: the nine taps of an input channel sit in registers, every scalar is broadcast once.
// Edges are instances that leave padding out; static ranges of (image, pooled row), all channels of a row while its input is in L1.
#define HV 1

// sixteen floats: AVX-512 where there is one, GCC vectors of the same size elsewhere
typedef float V __attribute__((vector_size(64)));
#define INLINE static inline __attribute__((always_inline))
enum : int64_t { CB = 4 };  // input channels in one partial sum: at most 36 products in a chain
INLINE V load16(const float* p) { V v; std::memcpy(&v, p, 64); return v; }
INLINE V splat(float s) {
#if defined(__AVX512F__)
    return (V)_mm512_set1_ps(s);
#else
    V v;
    for (int i = 0; i < 16; ++i) v[i] = s;
    return v;
#endif
}
INLINE V fmav(V s, V b, V acc) {
#if defined(__AVX512F__)
    return (V)_mm512_fmadd_ps((__m512)s, (__m512)b, (__m512)acc);
#else
    return acc + s * b;
#endif
}
// as fmav in the lanes of `mask`; the others keep acc: padding takes no part (0 * inf would be NaN)
INLINE V fmav_masked(V s, V b, V acc, unsigned mask) {
#if defined(__AVX512F__)
    return (V)_mm512_mask3_fmadd_ps((__m512)s, (__m512)b, (__m512)acc, __mmask16(mask));
#else
    for (int i = 0; i < 16; ++i) if (mask >> i & 1u) acc[i] += s[i] * b[i];
    return acc;
#endif
}
INLINE void store_part(float* p, V v, int64_t count) {  // count > 0
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, count >= 16 ? __mmask16(0xffff) : __mmask16((1u << count) - 1u), (__m512)v);
#else
    std::memcpy(p, &v, size_t(count < 16 ? count : 16) * 4);
#endif
}
// ReLU that keeps NaN
INLINE V relu16(V a) {
#if defined(__AVX512F__)
    return (V)_mm512_max_ps(_mm512_setzero_ps(), (__m512)a);
#else
    for (int i = 0; i < 16; ++i) a[i] = a[i] < 0.0f ? 0.0f : a[i];
    return a;
#endif
}
// relu(max of four), NaN wherever one of the four is
INLINE V pool_relu(V a, V b, V c, V d) {
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
// the same from values that went through relu16, and which of the four it was (0, 1, w, w + 1 as integer bits in `off`): the first
// of equal ones, the last NaN, as PyTorch
INLINE V pool_pick(V a, V b, V c, V d, int w, V& off) {
    const int at[4] = {0, 1, w, w + 1};
    const V q[4] = {a, b, c, d};
#if defined(__AVX512F__)
    __m512 m = (__m512)a;
    __m512i o = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 1; i < 4; ++i) {
        const __m512 v = (__m512)q[i];
        const __mmask16 take = _mm512_cmp_ps_mask(v, m, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        m = _mm512_mask_mov_ps(m, take, v);
        o = _mm512_mask_mov_epi32(o, take, _mm512_set1_epi32(at[i]));
    }
    off = (V)_mm512_castsi512_ps(o);
    return (V)m;
#else
    V m = a;
    int o[16] = {};
    for (int i = 1; i < 4; ++i) for (int l = 0; l < 16; ++l) if (q[i][l] > m[l] || q[i][l] != q[i][l]) { m[l] = q[i][l]; o[l] = at[i]; }
    std::memcpy(&off, o, 64);
    return m;
#endif
}
// indices of up to 16 pooled columns: base + 2 * lane + off
INLINE void store_index(int64_t* p, V off, int64_t base, int64_t count) {
#if defined(__AVX512F__)
    const __m512i o = _mm512_add_epi32(_mm512_castps_si512((__m512)off), _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)), b = _mm512_set1_epi64(base);
    const unsigned all = count >= 16 ? 0xffffu : (1u << count) - 1u;
    _mm512_mask_storeu_epi64(p, __mmask8(all & 0xff), _mm512_add_epi64(b, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(o))));
    if (all >> 8) _mm512_mask_storeu_epi64(p + 8, __mmask8(all >> 8), _mm512_add_epi64(b, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(o, 1))));
#else
    int o[16];
    std::memcpy(o, &off, 64);
    for (int l = 0; l < 16 && l < count; ++l) p[l] = base + 2 * l + o[l];
#endif
}

// Any kernel, stride, padding, dilation, group count and pool window: conv and ReLU as rows, then the pool.
static void general(const float* x, const float* weight, const float* bias, float* conv, float* y, int64_t* indices, int64_t n, int64_t c, int64_t h, int64_t w, int64_t k, int64_t cg,
                    int64_t kh, int64_t kw, int64_t oh, int64_t ow, int64_t ph, int64_t pw) {
    const int64_t sy = P_STRIDE_0, sx = P_STRIDE_1, py = P_PADDING_0, px = P_PADDING_1, dy = P_DILATION_0, dx = P_DILATION_1;
    const int64_t kg = k / P_GROUPS, chans = 36 / (kh * kw) > 1 ? 36 / (kh * kw) : 1;
#pragma omp parallel if (n * k * oh * ow * cg > 4096)
    {
#pragma omp for schedule(static)
        for (int64_t item = 0; item < n * k * oh; ++item) {
            const int64_t oy = item % oh, oc = item / oh % k, b = item / oh / k;
            const float* img = x + (b * c + oc / kg * cg) * h * w;
            const float* wt = weight + oc * cg * kh * kw;
            for (int64_t x0 = 0; x0 < ow; x0 += 64) {
                const int64_t m = ow - x0 < 64 ? ow - x0 : 64;
                float sum[64], part[64];
                float start = 0.0f;
#if HAS_BIAS
                start = bias[oc];
#endif
                for (int i = 0; i < 64; ++i) sum[i] = start;
                for (int64_t c0 = 0; c0 < cg; c0 += chans) {
                    for (int i = 0; i < 64; ++i) part[i] = 0.0f;
                    for (int64_t ch = c0; ch < cg && ch < c0 + chans; ++ch) {
                        for (int64_t ky = 0; ky < kh; ++ky) {
                            const int64_t iy = oy * sy - py + ky * dy;
                            if (iy < 0 || iy >= h) continue;
                            const float* row = img + (ch * h + iy) * w;
                            for (int64_t kx = 0; kx < kw; ++kx) {
                                const int64_t shift = kx * dx - px;  // input column = ox * sx + shift
                                if (w - 1 - shift < 0) continue;
                                int64_t lo = shift < 0 ? (-shift + sx - 1) / sx : 0, hi = (w - 1 - shift) / sx + 1;
                                if (lo < x0) lo = x0;
                                if (hi > x0 + m) hi = x0 + m;
                                const float s = wt[(ch * kh + ky) * kw + kx];
                                if (sx == 1) {
#pragma omp simd
                                    for (int64_t ox = lo; ox < hi; ++ox) part[ox - x0] += s * row[ox + shift];
                                } else {
                                    for (int64_t ox = lo; ox < hi; ++ox) part[ox - x0] += s * row[ox * sx + shift];
                                }
                            }
                        }
                    }
                    for (int i = 0; i < 64; ++i) sum[i] += part[i];
                }
                float* out = conv + item * ow + x0;
                for (int64_t i = 0; i < m; ++i) out[i] = sum[i] < 0.0f ? 0.0f : sum[i];
            }
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < n * k * ph; ++item) {
            const int64_t r = item % ph, plane = item / ph;
            const float* img = conv + plane * oh * ow;
            int64_t y0 = r * P_MAX_POOL2D_STRIDE_0 - P_MAX_POOL2D_PADDING_0, y1 = y0 + (P_MAX_POOL2D_KERNEL_SIZE_0 - 1) * P_MAX_POOL2D_DILATION_0 + 1;
            if (y1 > oh) y1 = oh;
            while (y0 < 0) y0 += P_MAX_POOL2D_DILATION_0;
            for (int64_t p = 0; p < pw; ++p) {
                int64_t x0 = p * P_MAX_POOL2D_STRIDE_1 - P_MAX_POOL2D_PADDING_1, x1 = x0 + (P_MAX_POOL2D_KERNEL_SIZE_1 - 1) * P_MAX_POOL2D_DILATION_1 + 1;
                if (x1 > ow) x1 = ow;
                while (x0 < 0) x0 += P_MAX_POOL2D_DILATION_1;
                float best = -std::numeric_limits<float>::infinity();
                int64_t at = y0 * ow + x0;
                for (int64_t iy = y0; iy < y1; iy += P_MAX_POOL2D_DILATION_0) {
                    for (int64_t ix = x0; ix < x1; ix += P_MAX_POOL2D_DILATION_1) {
                        const float v = img[iy * ow + ix];
                        if (v > best || v != v) { best = v; at = iy * ow + ix; }
                    }
                }
                y[item * pw + p] = best;
#if HAS_INDICES
                indices[item * pw + p] = at;
#endif
            }
        }
    }
}

INLINE void transpose16(V* q) {
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
// results of 16 pooled pixels (PP more as slack), one vector per pixel and half
struct Tile {
    V pooled[HV][16 + PP];
#if HAS_INDICES
    V off[HV][16 + PP];
#endif
#if HAS_RELU_OUT
    V full[HV][2][32 + 2 * PP];
#endif
};
// E: 1 column 0 of the patch is left of the image, 2 the last one right of it, 4 the first or last of its four rows is outside (top,
// bottom), 8 any column may be outside. Padding takes no part (0 * inf would be NaN). s0: row `row`, column `col` of channel 0.
template <int E>
static void pixels(const float* img, int64_t row, int64_t col, int64_t h, int64_t w, const float* wt, int64_t c, Tile& to, int64_t p) {
    V a[HV][2][2 * PP], sum[HV][2][2 * PP];
    const bool top = row < 0, bottom = row + 3 >= h;
#pragma GCC unroll 2
    for (int v = 0; v < HV; ++v) {
        const V start = load16(wt + c * 9 * HV * 16 + v * 16);
#pragma GCC unroll 10
        for (int j = 0; j < 2 * PP; ++j) { a[v][0][j] = start; a[v][1][j] = start; }
    }
    for (int64_t c0 = 0;;) {
        const int64_t c1 = c - c0 < CB ? c : c0 + CB;
        for (int64_t ch = c0; ch < c1; ++ch) {
            const int64_t s = (ch * h + row) * w + col;
            const float* taps = wt + ch * 9 * HV * 16;
#if HV == 1
            V keep[9];
#pragma GCC unroll 9
            for (int t = 0; t < 9; ++t) keep[t] = load16(taps + t * 16);
#endif
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                if ((E & 12) && ((i == 0 && top) || (i == 3 && bottom))) continue;
                const float* line = img + (s + i * w);
                V tap[HV][2][3];
#pragma GCC unroll 2
                for (int v = 0; v < HV; ++v) {
#pragma GCC unroll 2
                    for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 3
                        for (int kx = 0; kx < 3; ++kx) {
#if HV == 1
                            if (i - r >= 0 && i - r < 3) tap[v][r][kx] = keep[(i - r) * 3 + kx];
#else
                            if (i - r >= 0 && i - r < 3) tap[v][r][kx] = load16(taps + (((i - r) * 3 + kx) * HV + v) * 16);
#endif
                        }
                    }
                }
#pragma GCC unroll 12
                for (int j = 0; j < 2 * PP + 2; ++j) {
                    if (((E & 1) && j == 0) || ((E & 2) && j == 2 * PP + 1)) continue;
                    if ((E & 8) && (col + j < 0 || col + j >= w)) continue;
                    const V x = splat(line[j]);
#pragma GCC unroll 3
                    for (int kx = 0; kx < 3; ++kx) {
#pragma GCC unroll 2
                        for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 2
                            for (int v = 0; v < HV; ++v) {
                                if (i - r >= 0 && i - r < 3 && j - kx >= 0 && j - kx < 2 * PP) a[v][r][j - kx] = fmav(x, tap[v][r][kx], a[v][r][j - kx]);
                            }
                        }
                    }
                }
            }
        }
        if (c1 >= c && c0 == 0) break;
#pragma GCC unroll 2
        for (int v = 0; v < HV; ++v) {
#pragma GCC unroll 2
            for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 10
                for (int j = 0; j < 2 * PP; ++j) {
                    sum[v][r][j] = c0 ? sum[v][r][j] + a[v][r][j] : a[v][r][j];
                    a[v][r][j] = c1 >= c ? sum[v][r][j] : V{};
                }
            }
        }
        if (c1 >= c) break;
        c0 = c1;
    }
#pragma GCC unroll 2
    for (int v = 0; v < HV; ++v) {
#if HAS_RELU_OUT
#pragma GCC unroll 10
        for (int j = 0; j < 2 * PP; ++j) { to.full[v][0][2 * p + j] = relu16(a[v][0][j]); to.full[v][1][2 * p + j] = relu16(a[v][1][j]); }
#endif
#pragma GCC unroll 5
        for (int q = 0; q < PP; ++q) {
#if HAS_INDICES
            to.pooled[v][p + q] = pool_pick(relu16(a[v][0][2 * q]), relu16(a[v][0][2 * q + 1]), relu16(a[v][1][2 * q]), relu16(a[v][1][2 * q + 1]), int(w), to.off[v][p + q]);
#else
            to.pooled[v][p + q] = pool_relu(a[v][0][2 * q], a[v][0][2 * q + 1], a[v][1][2 * q], a[v][1][2 * q + 1]);
#endif
        }
    }
}
typedef void (*Pixels)(const float*, int64_t, int64_t, int64_t, int64_t, const float*, int64_t, Tile&, int64_t);

extern "C" void conv_relu_pool(const float* x, const float* weight, const float* bias, float* y, float* relu_out, int64_t* indices, float* conv, float* packed, int64_t kb,
                               int64_t slots, int64_t fast, int64_t n, int64_t c, int64_t h, int64_t w, int64_t k, int64_t cg, int64_t kh, int64_t kw, int64_t oh, int64_t ow, int64_t ph, int64_t pw) {
    if (!fast) {
#if HAS_RELU_OUT
        conv = relu_out;
#endif
        general(x, weight, bias, conv, y, indices, n, c, h, w, k, cg, kh, kw, oh, ow, ph, pw);
        return;
    }

    const int64_t items = n * ph, group = (c * 9 + 1) * HV * 16;
    const Pixels table[9] = {pixels<0>, pixels<1>, pixels<2>, pixels<3>, pixels<4>, pixels<5>, pixels<6>, pixels<7>, pixels<8>};
    (void)slots;
#pragma omp parallel if (n * k * ph * pw * c > 4096)
    {
#pragma omp for schedule(static)
        for (int64_t gl = 0; gl < kb * HV * 16; ++gl) {
            const int64_t g = gl / (HV * 16), l = gl % (HV * 16);
            float* d = packed + g * group + l;
            for (int64_t t = 0; t < c * 9; ++t) d[t * HV * 16] = gl < k ? weight[gl * c * 9 + t] : 0.0f;
            float start = 0.0f;
#if HAS_BIAS
            if (gl < k) start = bias[gl];
#endif
            d[c * 9 * HV * 16] = start;
        }
        Tile tile;
        std::memset(&tile, 0, sizeof(tile));
#pragma omp for schedule(static)
        for (int64_t item = 0; item < items; ++item) {
                const int64_t b = item / ph, r = item % ph, row = 2 * r - 1;
                const int rows = row < 0 || row + 3 >= h ? 4 : 0;
                const float* img = x + b * c * h * w;
                for (int64_t g = 0; g < kb; ++g) {
                    const float* wt = packed + g * group;
                    {
                        for (int64_t p0 = 0; p0 < pw; p0 += 16) {
                            const int64_t count = pw - p0 < 16 ? pw - p0 : 16;
                            for (int64_t p = 0; p < count; p += PP) {
                                const int64_t col = 2 * (p0 + p) - 1, end = col + 2 * PP + 2;
                                const int e = end > w + 1 ? 8 : rows + (col < 0) + 2 * (end == w + 1);
                                table[e](img, row, col, h, w, wt, c, tile, p);
                            }
                            for (int64_t v = 0; v < HV; ++v) {
                                const int64_t o0 = (g * HV + v) * 16, chans = k - o0 < 16 ? k - o0 : 16, at = ((b * k + o0) * ph + r) * pw + p0, step = ph * pw;
                                if (chans <= 0) break;
                                V out[16];
                                for (int i = 0; i < 16; ++i) out[i] = tile.pooled[v][i];
                                transpose16(out);
                                for (int64_t l = 0; l < chans; ++l) store_part(y + at + l * step, out[l], count);
#if HAS_INDICES
                                for (int i = 0; i < 16; ++i) out[i] = tile.off[v][i];
                                transpose16(out);
                                for (int64_t l = 0; l < chans; ++l) store_index(indices + at + l * step, out[l], 2 * r * w + 2 * p0, count);
#endif
#if HAS_RELU_OUT
                                for (int64_t part = 0; part < 4; ++part) {
                                    const int64_t half = part % 2 * 16, left = 2 * count - half;
                                    if (left <= 0) continue;
                                    for (int i = 0; i < 16; ++i) out[i] = tile.full[v][part / 2][half + i];
                                    transpose16(out);
                                    float* d = relu_out + ((b * k + o0) * h + 2 * r + part / 2) * w + 2 * p0 + half;
                                    for (int64_t l = 0; l < chans; ++l) store_part(d + l * h * w, out[l], left);
                                }
#endif
                            }
                        }
                    }
                }
        }
    }
}
