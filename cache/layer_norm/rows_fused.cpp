/*---
implements = "layer_norm"
target     = "cpu"
dtypes     = ["float32"]
optional   = ["bias"]
where      = ["x.ndim == 2", "weight.ndim == 1", "weight.shape[0] == x.shape[1]", "x.stride[1] == 1", "y.stride[1] == 1", "weight.stride[0] == 1", "x.shape[1] > 0"]
dims       = { rows = "x.shape[0]", cols = "x.shape[1]", xpitch = "x.stride[0]", ypitch = "y.stride[0]" }
tune       = { DIST = [0, 2, 4] }
align      = 4
[[launch]]
kernel = "layer_norm_rows"
args   = ["x", "weight", "bias", "y", "rows", "cols", "xpitch", "ypitch", "eps"]
---*/
// Two neighbouring rows per step, shared weight and bias loads; the rows DIST further on are prefetched into L2 from the sum sweep.

// sixteen floats: AVX-512 where there is one, GCC vectors of the same size elsewhere
typedef float V __attribute__((vector_size(64)));
static inline V load16(const float* p) { V v; std::memcpy(&v, p, 64); return v; }
static inline V load_part(const float* p, int64_t left) {
#if defined(__AVX512F__)
    return (V)_mm512_maskz_loadu_ps(left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1u), p);
#else
    V v = {};
    for (int64_t i = 0; i < left && i < 16; ++i) v[i] = p[i];
    return v;
#endif
}
static inline V mad(V a, V b, V c) {
#if defined(__AVX512F__)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
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
template <bool STREAM> static inline void put(float* p, V v) {
#if defined(__AVX512F__)
    if (STREAM) { _mm512_stream_ps(p, (__m512)v); return; }
#endif
    std::memcpy(p, &v, 64);
}
static inline void put_part(float* p, V v, int64_t left) { for (int64_t i = 0; i < left; ++i) p[i] = v[i]; }
static inline bool lined(const float* p) { return (reinterpret_cast<uintptr_t>(p) & 63) == 0; }
static inline V affine(V t, const float* w, const float* b, int64_t c) {
#if HAS_BIAS
    return mad(t, load16(w + c), load16(b + c));
#else
    return t * load16(w + c);
#endif
}
static inline V affine_part(V t, const float* w, const float* b, int64_t c, int64_t left) {
#if HAS_BIAS
    return mad(t, load_part(w + c, left), load_part(b + c, left));
#else
    return t * load_part(w + c, left);
#endif
}
struct Row { float mean, delta, rstd; };
static inline float row_sum(const float* x, int64_t n) {
    V s0 = {}, s1 = {}, s2 = {}, s3 = {};
    int64_t c = 0;
    for (; c + 64 <= n; c += 64) { s0 += load16(x + c); s1 += load16(x + c + 16); s2 += load16(x + c + 32); s3 += load16(x + c + 48); }
    for (; c < n; c += 16) s0 += load_part(x + c, n - c);
    return hsum((s0 + s1) + (s2 + s3));
}
static inline void touch(const float* p) { __builtin_prefetch(p, 0, 3); }
// deviations from the rounded mean: their own mean (delta) corrects it. Prefetches `next` on the way: `count` elements.
static inline Row deviations(const float* x, int64_t n, float sum, float eps, const float* next, int64_t count) {
    const float mean = sum / float(n);
    V q0 = {}, q1 = {}, q2 = {}, q3 = {}, r0 = {}, r1 = {}, r2 = {}, r3 = {};
    int64_t c = 0;
    for (; c + 64 <= n; c += 64) {
        if (c < count) { touch(next + c); touch(next + c + 16); touch(next + c + 32); touch(next + c + 48); }
        const V d0 = load16(x + c) - mean, d1 = load16(x + c + 16) - mean, d2 = load16(x + c + 32) - mean, d3 = load16(x + c + 48) - mean;
        q0 = mad(d0, d0, q0); q1 = mad(d1, d1, q1); q2 = mad(d2, d2, q2); q3 = mad(d3, d3, q3);
        r0 += d0; r1 += d1; r2 += d2; r3 += d3;
    }
    for (; c < n; c += 16) {
        V d = load_part(x + c, n - c) - mean;
        for (int64_t i = n - c; i < 16; ++i) d[i] = 0.0f;
        q0 = mad(d, d, q0);
        r0 += d;
    }
    const float delta = hsum((r0 + r1) + (r2 + r3)) / float(n);
    float var = hsum((q0 + q1) + (q2 + q3)) / float(n) - delta * delta;
    var = var < 0.0f ? 0.0f : var;
    return Row{mean, delta, 1.0f / std::sqrt(var + eps)};
}
template <bool STREAM> static inline void emit(const float* x, const float* w, const float* b, float* y, int64_t n, Row k, const float* next, int64_t from, int64_t count) {
    int64_t c = 0;
    for (; c + 16 <= n; c += 16) {
        if (c < count) touch(next + from + c);
        put<STREAM>(y + c, affine((load16(x + c) - k.mean - k.delta) * k.rstd, w, b, c));
    }
    if (c < n) put_part(y + c, affine_part((load_part(x + c, n - c) - k.mean - k.delta) * k.rstd, w, b, c, n - c), n - c);
}

template <bool STREAM> static inline void pair(const float* x0, const float* x1, const float* w, const float* b, float* y0, float* y1, int64_t n, float eps, const float* p0, const float* p1, int64_t hint) {
    V a0 = {}, a1 = {}, a2 = {}, a3 = {}, c0 = {}, c1 = {}, c2 = {}, c3 = {};
    int64_t c = 0;
    for (; c + 64 <= n; c += 64) {
#if DIST
        if (c < hint) {
#pragma GCC unroll 4
            for (int i = 0; i < 64; i += 16) { __builtin_prefetch(p0 + c + i, 0, 2); __builtin_prefetch(p1 + c + i, 0, 2); }
        }
#endif
        a0 += load16(x0 + c); a1 += load16(x0 + c + 16); a2 += load16(x0 + c + 32); a3 += load16(x0 + c + 48);
        c0 += load16(x1 + c); c1 += load16(x1 + c + 16); c2 += load16(x1 + c + 32); c3 += load16(x1 + c + 48);
    }
    for (; c < n; c += 16) { a0 += load_part(x0 + c, n - c); c0 += load_part(x1 + c, n - c); }
    const Row k0 = deviations(x0, n, hsum((a0 + a1) + (a2 + a3)), eps, x0, 0);
    const Row k1 = deviations(x1, n, hsum((c0 + c1) + (c2 + c3)), eps, x1, 0);
    for (c = 0; c + 16 <= n; c += 16) {
        put<STREAM>(y0 + c, affine((load16(x0 + c) - k0.mean - k0.delta) * k0.rstd, w, b, c));
        put<STREAM>(y1 + c, affine((load16(x1 + c) - k1.mean - k1.delta) * k1.rstd, w, b, c));
    }
    if (c < n) {
        put_part(y0 + c, affine_part((load_part(x0 + c, n - c) - k0.mean - k0.delta) * k0.rstd, w, b, c, n - c), n - c);
        put_part(y1 + c, affine_part((load_part(x1 + c, n - c) - k1.mean - k1.delta) * k1.rstd, w, b, c, n - c), n - c);
    }
}

extern "C" void layer_norm_rows(const float* x, const float* weight, const float* bias, float* y, int64_t rows, int64_t cols, int64_t xpitch, int64_t ypitch, float eps) {
#pragma omp parallel if (rows * cols > 32768)
    {
        const int64_t nt = omp_get_num_threads(), id = omp_get_thread_num();
        const int64_t first = rows * id / nt, last = rows * (id + 1) / nt;
        int64_t r = first;
        for (; r + 2 <= last; r += 2) {
            const float* row = x + r * xpitch;
            float* out = y + r * ypitch;
            const bool more = r + 1 + DIST < last;
            const float* pre = more ? row + DIST * xpitch : row;
            if (lined(out) && lined(out + ypitch)) pair<true>(row, row + xpitch, weight, bias, out, out + ypitch, cols, eps, pre, pre + xpitch, more ? cols : 0);
            else pair<false>(row, row + xpitch, weight, bias, out, out + ypitch, cols, eps, pre, pre + xpitch, more ? cols : 0);
        }
        for (; r < last; ++r) {
                const float* row = x + r * xpitch;
                float* out = y + r * ypitch;
                const Row k = deviations(row, cols, row_sum(row, cols), eps, row, 0);
                if (lined(out)) emit<true>(row, weight, bias, out, cols, k, row, 0, 0);
                else emit<false>(row, weight, bias, out, cols, k, row, 0, 0);
        }
#if defined(__AVX512F__)
        _mm_sfence();
#endif
    }
}
