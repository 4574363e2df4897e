/*---
implements = "attention"
target     = "cpu"
dtypes     = ["float32"]
where      = ["q.ndim == 4", "k.ndim == 4", "v.ndim == 4", "k.shape[1] == q.shape[1]", "v.shape[1] == q.shape[1]", "k.shape[0] == q.shape[0]", "v.shape[0] == q.shape[0]",
              "v.shape[2] == sk", "is_causal == 0", "d % 16 == 0", "dv % 16 == 0", "sk > 0", "d > 0",
              "q.stride[3] == 1", "k.stride[3] == 1", "v.stride[3] == 1", "y.stride[3] == 1"]
dims       = { b = "q.shape[0]", h = "q.shape[1]", sq = "q.shape[2]", d = "q.shape[3]", sk = "k.shape[2]", dv = "v.shape[3]", kb = "ceil_div(sk, 64)", slots = "device.threads" }
tune       = { QG = [2, 4, 8] }
align      = 4
[[workspace]]
name = "kt"
dtype = "float32"
shape = ["b * h", "kb", "d", "64"]
[[workspace]]
name = "probs"
dtype = "float32"
shape = ["slots", "6 * QG", "kb * 64"]
[[launch]]
kernel = "attention"
args   = ["q", "k", "v", "y", "kt", "probs", "slots", "b", "h", "sq", "d", "sk", "dv", "kb", "q.stride[0]", "q.stride[1]", "q.stride[2]", "k.stride[0]", "k.stride[1]", "k.stride[2]",
          "v.stride[0]", "v.stride[1]", "v.stride[2]", "y.stride[0]", "y.stride[1]", "y.stride[2]", "scale"]
---*/
// Keys transposed once to panels [d][64]; 6 x 64 register tiles for the scores, an exact softmax over the whole row in an L1/L2 scratch
// block of 6*QG rows, 6 x 64 tiles for the values.

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

// e^x for x <= 0 or NaN
static inline V exp_neg(V x) {
#if defined(__AVX512F__)
    __m512 t = _mm512_max_ps(_mm512_set1_ps(-110.0f), (__m512)x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(t, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_fmadd_ps(n, _mm512_set1_ps(-6.93145752e-1f), t);
    f = _mm512_fmadd_ps(n, _mm512_set1_ps(-1.42860677e-6f), f);
    __m512 p = _mm512_set1_ps(1.37805939e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.37312452e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.16695364e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.66664720e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.99999851e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return (V)_mm512_scalef_ps(p, n);
#else
    V r = {};
    for (int i = 0; i < 16; ++i) r[i] = std::exp(x[i]);
    return r;
#endif
}

static inline V vmax(V a, V b) {
#if defined(__AVX512F__)
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
#else
    for (int i = 0; i < 16; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
#endif
}
static inline float hmax(V v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float m = v[0];
    for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
    return m;
#endif
}
static inline float hsum(V v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    for (int h = 8; h > 0; h /= 2) for (int i = 0; i < h; ++i) v[i] += v[i + h];
    return v[0];
#endif
}
static inline void put16(float* p, V v) { std::memcpy(p, &v, 64); }
// 64 keys from `first` on (those past sk as zeros), transposed: dst[d][64]
static inline void transpose_keys(const float* k, int64_t pitch, int64_t first, int64_t sk, int64_t d, float* dst) {
    for (int64_t g = 0; g < 64; g += 16) {
        for (int64_t t = 0; t < d; t += 16) {
            V r[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) r[i] = first + g + i < sk ? load16(k + (first + g + i) * pitch + t) : V{};
            transpose16(r);
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) put16(dst + (t + i) * 64 + g, r[i]);
        }
    }
}
// MR query rows x 64 keys, times scale
template <int MR>
static inline void scores(const float* const* rows, const float* kt, int64_t d, float scale, float* out, int64_t pitch) {
    V a[MR][4];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) { a[i][0] = V{}; a[i][1] = V{}; a[i][2] = V{}; a[i][3] = V{}; }
    for (int64_t t = 0; t < d; ++t, kt += 64) {
        const V k0 = load16(kt), k1 = load16(kt + 16), k2 = load16(kt + 32), k3 = load16(kt + 48);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
            const float s = rows[i][t];
            a[i][0] = fma16(s, k0, a[i][0]); a[i][1] = fma16(s, k1, a[i][1]); a[i][2] = fma16(s, k2, a[i][2]); a[i][3] = fma16(s, k3, a[i][3]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
        put16(out + i * pitch, a[i][0] * scale); put16(out + i * pitch + 16, a[i][1] * scale);
        put16(out + i * pitch + 32, a[i][2] * scale); put16(out + i * pitch + 48, a[i][3] * scale);
    }
}

// 6 rows of probabilities times the values. Sums of 256 products each are added up in memory: one running sum over thousands of keys
// would round too often.
template <int NV>
static inline void values(const float* p, int64_t pitch, const float* v, int64_t vpitch, int64_t sk, const float* inv, float* y, int64_t ypitch, int64_t rows) {
    V total[6][NV] = {};
    for (int64_t t = 0; t < sk;) {
        V a[6][NV];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) a[i][j] = V{};
        }
        for (const int64_t end = t + 256 < sk ? t + 256 : sk; t < end; ++t, v += vpitch) {
            V w[NV];
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) w[j] = load16(v + 16 * j);
#pragma GCC unroll 6
            for (int i = 0; i < 6; ++i) {
                const float s = p[i * pitch + t];
#pragma GCC unroll 4
                for (int j = 0; j < NV; ++j) a[i][j] = fma16(s, w[j], a[i][j]);
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) total[i][j] += a[i][j];
        }
    }
    for (int i = 0; i < 6; ++i) {
        if (i < rows) {
            for (int j = 0; j < NV; ++j) put16(y + i * ypitch + 16 * j, total[i][j] / inv[i]);
        }
    }
}
// exp(row - max) in place, zeros past sk; returns the sum. NaN survives through exp.
static inline float softmax_row(float* s, int64_t sk, int64_t padded) {
    for (int64_t t = sk; t < padded; ++t) s[t] = -std::numeric_limits<float>::infinity();
    V m0 = load16(s), m1 = load16(s + 16), m2 = load16(s + 32), m3 = load16(s + 48);
    for (int64_t t = 64; t < padded; t += 64) {
        m0 = vmax(m0, load16(s + t)); m1 = vmax(m1, load16(s + t + 16)); m2 = vmax(m2, load16(s + t + 32)); m3 = vmax(m3, load16(s + t + 48));
    }
    const float m = hmax(vmax(vmax(m0, m1), vmax(m2, m3)));
    V s0 = {}, s1 = {}, s2 = {}, s3 = {};
    for (int64_t t = 0; t < padded; t += 64) {
        const V e0 = exp_neg(load16(s + t) - m), e1 = exp_neg(load16(s + t + 16) - m), e2 = exp_neg(load16(s + t + 32) - m), e3 = exp_neg(load16(s + t + 48) - m);
        put16(s + t, e0); put16(s + t + 16, e1); put16(s + t + 32, e2); put16(s + t + 48, e3);
        s0 += e0; s1 += e1; s2 += e2; s3 += e3;
    }
    return hsum((s0 + s1) + (s2 + s3));
}
extern "C" void attention(const float* q, const float* k, const float* v, float* y, float* kt, float* probs, int64_t slots, int64_t b, int64_t h, int64_t sq, int64_t d, int64_t sk, int64_t dv, int64_t kb,
                          int64_t q0, int64_t q1, int64_t q2, int64_t k0, int64_t k1, int64_t k2, int64_t v0, int64_t v1, int64_t v2, int64_t y0, int64_t y1, int64_t y2, float scale) {
    constexpr int QB = 6 * QG;
    const int64_t pitch = kb * 64, blocks = (sq + QB - 1) / QB, items = b * h * blocks;
#pragma omp parallel if (b * h * sq * sk * d > 32768)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < b * h * kb; ++i) {
            const int64_t head = i / kb;
            transpose_keys(k + head / h * k0 + head % h * k1, k2, i % kb * 64, sk, d, kt + i * d * 64);
        }
        const int64_t id = omp_get_thread_num(), nt = omp_get_num_threads() < slots ? omp_get_num_threads() : slots;
        const int64_t first = id < nt ? items * id / nt : 0, last = id < nt ? items * (id + 1) / nt : 0;
        float* s = probs + (id < nt ? id : 0) * QB * pitch;
        for (int64_t item = first; item < last; ++item) {
            const int64_t head = item / blocks, r0 = item % blocks * QB, rows = sq - r0 < QB ? sq - r0 : QB;
            const float* qh = q + head / h * q0 + head % h * q1;
            const float* vh = v + head / h * v0 + head % h * v1;
            float* yh = y + head / h * y0 + head % h * y1;
            for (int64_t p = 0; p < kb; ++p) {
                for (int64_t g = 0; g < rows; g += 6) {
                    const float* ptr[6];
                    for (int i = 0; i < 6; ++i) ptr[i] = qh + (r0 + g + i < sq ? r0 + g + i : sq - 1) * q2;
                    scores<6>(ptr, kt + (head * kb + p) * d * 64, d, scale, s + g * pitch + p * 64, pitch);
                }
            }
            for (int64_t g = 0; g < rows; g += 6) {
                float sum[6];
                const int64_t left = rows - g < 6 ? rows - g : 6;
                for (int i = 0; i < 6; ++i) sum[i] = i < left ? softmax_row(s + (g + i) * pitch, sk, pitch) : 1.0f;
                float* out = yh + (r0 + g) * y2;
                int64_t e = 0;
                for (; e + 64 <= dv; e += 64) values<4>(s + g * pitch, pitch, vh + e, v2, sk, sum, out + e, y2, left);
                for (; e < dv; e += 16) values<1>(s + g * pitch, pitch, vh + e, v2, sk, sum, out + e, y2, left);
            }
        }
    }
}
