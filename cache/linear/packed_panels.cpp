/*---
implements = ["linear", "linear.relu"]
target     = "cpu"
dtypes     = ["float32"]
optional   = ["bias"]
where      = ["weight.ndim == 2", "weight.shape[0] == k", "(weight.stride[0] == 1) + (weight.stride[1] == 1) > 0", "x.contiguous", "y.contiguous", "k > 0"]
dims       = { k = "x.shape[-1]", m = "x.numel // k", n = "weight.shape[1]", wrows = "weight.stride[0] != 1", wpitch = "weight.stride[0] * wrows + weight.stride[1] * (1 - wrows)", mb = "ceil_div(m, MR)", nb = "ceil_div(n, 32)" }
tune       = { MR = [8, 14], CHUNK = [8] }
align      = 4
[[workspace]]
name = "xp"
dtype = "float32"
shape = ["mb", "k", "MR"]
[[workspace]]
name = "wp"
dtype = "float32"
shape = ["nb", "k", "32"]
[[launch]]
kernel = "linear"
args   = ["x", "weight", "bias", "y", "xp", "wp", "mb", "nb", "m", "k", "n", "wpitch", "wrows"]
---*/
// Both operands are packed once (x as [block][k][MR], the weight, of either layout, as [panel][k][32]) in one loop without a barrier in
// between; MR x 32 register tiles over k in blocks of 256 (longer sums round too often), through an L1 tile to one rolled loop for bias
// and activation.

// sixteen floats: AVX-512 where there is one, GCC vectors of the same size elsewhere
typedef float V __attribute__((vector_size(64)));
static inline V load16(const float* p) { V v; std::memcpy(&v, p, 64); return v; }
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

#if OP_RELU
static inline V activated(V x) {
#if defined(__AVX512F__)
    return (V)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x);  // the second operand where one is NaN
#else
    V r = {};
    for (int i = 0; i < 16; ++i) r[i] = x[i] < 0.0f ? 0.0f : x[i];
    return r;
#endif
}
#else
static inline V activated(V x) { return x; }
#endif

static inline void put16(float* p, V v) { std::memcpy(p, &v, 64); }
static inline V load_part(const float* p, int64_t left) {
#if defined(__AVX512F__)
    return (V)_mm512_maskz_loadu_ps(left >= 16 ? __mmask16(0xffff) : left > 0 ? __mmask16((1u << left) - 1u) : __mmask16(0), p);
#else
    V v = {};
    for (int64_t i = 0; i < left && i < 16; ++i) v[i] = p[i];
    return v;
#endif
}
// rows x count sums of a tile (pitch WIDTH): bias, activation, the only store
template <int WIDTH>
static __attribute__((noinline)) void finish(const float* tile, int64_t rows, int64_t count, const float* bias, float* y, int64_t ypitch) {
    for (int64_t i = 0; i < rows; ++i) {
        int64_t j = 0;
        for (; j + 32 <= count; j += 32) {
            V a = load16(tile + i * WIDTH + j), b = load16(tile + i * WIDTH + j + 16);
#if HAS_BIAS
            a = a + load16(bias + j);
            b = b + load16(bias + j + 16);
#endif
            put16(y + i * ypitch + j, activated(a));
            put16(y + i * ypitch + j + 16, activated(b));
        }
        for (; j < count; j += 16) {
            V a = load16(tile + i * WIDTH + j);
#if HAS_BIAS
            a = a + load_part(bias + j, count - j);
#endif
            store_part(y + i * ypitch + j, activated(a), count - j);
        }
    }
}
// `cols` columns of the weight (contiguous in k), transposed to dst[k][WIDTH]; missing columns are zeros
template <int WIDTH>
static inline void pack_columns(const float* w, int64_t pitch, int64_t cols, int64_t k, float* dst) {
    for (int64_t t = 0; t < k; t += 16) {
        const int64_t steps = k - t < 16 ? k - t : 16;
        for (int g = 0; g < WIDTH; g += 16) {
            V q[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) q[i] = g + i < cols ? load_part(w + (g + i) * pitch + t, steps) : V{};
            transpose16(q);
            for (int64_t i = 0; i < steps; ++i) put16(dst + (t + i) * WIDTH + g, q[i]);
        }
    }
}
// the same of a weight whose rows are contiguous
template <int WIDTH>
static inline void pack_panel(const float* w, int64_t pitch, int64_t cols, int64_t k, float* dst) {
    for (int64_t t = 0; t < k; ++t)
        for (int g = 0; g < WIDTH; g += 16) put16(dst + t * WIDTH + g, g < cols ? load_part(w + t * pitch + g, cols - g) : V{});
}
static inline void pack_rows(const float* x, int64_t rows, int64_t k, float* dst) {
    for (int64_t t = 0; t < k; t += 16) {
        const int64_t steps = k - t < 16 ? k - t : 16;
        V q[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) q[i] = i < MR && i < rows ? load_part(x + i * k + t, steps) : V{};
        transpose16(q);
        for (int64_t i = 0; i < steps; ++i) store_part(dst + (t + i) * MR, q[i], MR);
    }
}
static inline void step(V (&acc)[MR][2], const float* a, const float* b) {
    const V b0 = load16(b), b1 = load16(b + 16);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) { acc[i][0] = fma16(a[i], b0, acc[i][0]); acc[i][1] = fma16(a[i], b1, acc[i][1]); }
}
static inline void micro(const float* a, const float* b, int64_t k, float* tile, bool first) {
    V acc[MR][2];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) { acc[i][0] = V{}; acc[i][1] = V{}; }
    int64_t t = 0;
    for (; t + 2 <= k; t += 2, a += 2 * MR, b += 64) { step(acc, a, b); step(acc, a + MR, b + 32); }
    if (t < k) step(acc, a, b);
    if (!first) {
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) { acc[i][0] = acc[i][0] + load16(tile + i * 32); acc[i][1] = acc[i][1] + load16(tile + i * 32 + 16); }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) { put16(tile + i * 32, acc[i][0]); put16(tile + i * 32 + 16, acc[i][1]); }
}
extern "C" void linear(const float* x, const float* weight, const float* bias, float* y, float* xp, float* wp, int64_t mb, int64_t nb, int64_t m, int64_t k, int64_t n, int64_t wpitch, int64_t wrows) {
    const int64_t chunks = (mb + CHUNK - 1) / CHUNK;
#pragma omp parallel if (m * n * k > 16384)
    {
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < mb + nb; ++i) {
            if (i < mb) pack_rows(x + i * MR * k, m - i * MR, k, xp + i * k * MR);
            else if (wrows) pack_panel<32>(weight + (i - mb) * 32, wpitch, n - (i - mb) * 32, k, wp + (i - mb) * k * 32);
            else pack_columns<32>(weight + (i - mb) * 32 * wpitch, wpitch, n - (i - mb) * 32, k, wp + (i - mb) * k * 32);
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < nb * chunks; ++item) {
            const int64_t p = item / chunks, b0 = item % chunks * CHUNK, b1 = b0 + CHUNK < mb ? b0 + CHUNK : mb;
            const int64_t count = n - p * 32 < 32 ? n - p * 32 : 32;
            float tile[MR * 32];
            for (int64_t b = b0; b < b1; ++b) {
                for (int64_t t = 0; t < k; t += 256) micro(xp + (b * k + t) * MR, wp + (p * k + t) * 32, k - t < 256 ? k - t : 256, tile, t == 0);
                const int64_t rows = m - b * MR < MR ? m - b * MR : MR;
                finish<32>(tile, rows, count, bias + p * 32, y + b * MR * n + p * 32, n);
            }
        }
    }
}
