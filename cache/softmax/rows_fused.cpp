/*---
implements = "softmax"
target     = "cpu"
dtypes     = ["float32"]
where      = ["x.contiguous", "y.contiguous", "x.ndim > 0", "(dim + x.ndim) % x.ndim == x.ndim - 1", "x.numel > 0"]
dims       = { cols = "x.shape[-1]", rows = "x.numel // max(cols, 1)", slots = "device.threads", padded = "ceil_div(cols, 1024) * 1024" }
tune       = { NT = [1, 0], PF = [1, 0], RB = [4, 8] }
align      = 4
[[workspace]]
name = "scratch"
dtype = "float32"
shape = ["slots", "padded"]
[[launch]]
kernel = "softmax_rows"
args   = ["x", "y", "scratch", "rows", "cols", "slots", "padded"]
---*/
// A thread takes RB rows at a time: one burst of reads for their maxima (the rows stay in L2), then per row the exponentials into an
// L1 scratch row, during which the row RB further on is prefetched into L2, and the quotient streamed out.
static inline void row_portable(const float* x, float* y, int64_t n) {
    float m = x[0];
    for (int64_t c = 1; c < n; ++c) m = x[c] > m ? x[c] : m;   // a NaN lost here comes back through the sum
    float lanes[16] = {};
    for (int64_t c = 0; c < n; ++c) {
        const float e = std::exp(x[c] - m);
        y[c] = e;
        lanes[c & 15] += e;
    }
    for (int h = 8; h > 0; h /= 2) for (int i = 0; i < h; ++i) lanes[i] += lanes[i + h];
    const float sum = lanes[0];
    for (int64_t c = 0; c < n; ++c) y[c] = y[c] / sum;
}
#if defined(__AVX512F__)
static inline __mmask16 lanes_left(int64_t left) { return left >= 16 ? __mmask16(0xffff) : left > 0 ? __mmask16((1u << left) - 1u) : __mmask16(0); }
static inline __m512 lowest() { return _mm512_set1_ps(-std::numeric_limits<float>::infinity()); }
static inline __m512 load_or_lowest(const float* x, int64_t left) {
    if (left >= 16) return _mm512_loadu_ps(x);
    return left > 0 ? _mm512_mask_loadu_ps(lowest(), lanes_left(left), x) : lowest();
}
// e^x for x <= 0 or NaN, under 1 ulp; gradual underflow through scalef
static inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-110.0f), x);   // the second operand comes out where either is NaN
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_fmadd_ps(n, _mm512_set1_ps(-6.93145752e-1f), x);
    f = _mm512_fmadd_ps(n, _mm512_set1_ps(-1.42860677e-6f), f);
    __m512 p = _mm512_set1_ps(1.37805939e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.37312452e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.16695364e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.66664720e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.99999851e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}
// e / sum, rounded as a division, at the price of a multiplication and two FMAs
static inline __m512 quotient(__m512 e, __m512 sum, __m512 inv) {
    const __m512 q = _mm512_mul_ps(e, inv);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(q, sum, e), inv, q);
}
template <bool STREAM> static inline void put(float* y, __m512 v) {
    if (STREAM) _mm512_stream_ps(y, v); else _mm512_storeu_ps(y, v);
}
template <bool STREAM> static inline void put_left(float* y, __m512 v, int64_t left) {
    if (left >= 16) put<STREAM>(y, v); else _mm512_mask_storeu_ps(y, lanes_left(left), v);
}
static inline float row_max(const float* x, int64_t n) {
    __m512 m0 = lowest(), m1 = m0, m2 = m0, m3 = m0;
    int64_t c = 0;
    for (; c + 64 <= n; c += 64) {
        m0 = _mm512_max_ps(m0, _mm512_loadu_ps(x + c));
        m1 = _mm512_max_ps(m1, _mm512_loadu_ps(x + c + 16));
        m2 = _mm512_max_ps(m2, _mm512_loadu_ps(x + c + 32));
        m3 = _mm512_max_ps(m3, _mm512_loadu_ps(x + c + 48));
    }
    for (; c < n; c += 16) m0 = _mm512_max_ps(m0, load_or_lowest(x + c, n - c));
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(m0, m1), _mm512_max_ps(m2, m3)));
}

// exponentials of a row whose maximum is known, into the scratch row; the sum comes back. A NaN makes the sum, and so the row, NaN.
static inline float row_exp(const float* x, float* e, int64_t n, float m, const float* ahead) {
    const __m512 vm = _mm512_set1_ps(m);
    __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    int64_t c = 0;
    for (; c + 64 <= n; c += 64) {
#if PF
        if (ahead) {
#pragma GCC unroll 4
            for (int i = 0; i < 64; i += 16) _mm_prefetch(reinterpret_cast<const char*>(ahead + c + i), _MM_HINT_T1);
        }
#endif
        const __m512 e0 = exp16(_mm512_sub_ps(_mm512_loadu_ps(x + c), vm)), e1 = exp16(_mm512_sub_ps(_mm512_loadu_ps(x + c + 16), vm));
        const __m512 e2 = exp16(_mm512_sub_ps(_mm512_loadu_ps(x + c + 32), vm)), e3 = exp16(_mm512_sub_ps(_mm512_loadu_ps(x + c + 48), vm));
        _mm512_storeu_ps(e + c, e0); _mm512_storeu_ps(e + c + 16, e1); _mm512_storeu_ps(e + c + 32, e2); _mm512_storeu_ps(e + c + 48, e3);
        s0 = _mm512_add_ps(s0, e0); s1 = _mm512_add_ps(s1, e1); s2 = _mm512_add_ps(s2, e2); s3 = _mm512_add_ps(s3, e3);
    }
    for (; c < n; c += 16) {
        const __mmask16 k = lanes_left(n - c);
        const __m512 v = _mm512_maskz_mov_ps(k, exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(k, x + c), vm)));
        _mm512_storeu_ps(e + c, v);
        s0 = _mm512_add_ps(s0, v);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3)));
}
template <bool STREAM> static inline void row_scale(const float* e, float* y, int64_t n, float sum) {
    const __m512 vs = _mm512_set1_ps(sum), vi = _mm512_set1_ps(1.0f / sum);
    int64_t c = 0;
    for (; c + 64 <= n; c += 64) {
        const __m512 a = quotient(_mm512_loadu_ps(e + c), vs, vi), b = quotient(_mm512_loadu_ps(e + c + 16), vs, vi);
        const __m512 d = quotient(_mm512_loadu_ps(e + c + 32), vs, vi), f = quotient(_mm512_loadu_ps(e + c + 48), vs, vi);
        put<STREAM>(y + c, a); put<STREAM>(y + c + 16, b); put<STREAM>(y + c + 32, d); put<STREAM>(y + c + 48, f);
    }
    for (; c < n; c += 16) put_left<STREAM>(y + c, quotient(_mm512_loadu_ps(e + c), vs, vi), n - c);
}
template <bool STREAM> static inline void some_rows(const float* x, float* y, float* e, int64_t n, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r += RB) {
        const int64_t batch = last - r < RB ? last - r : RB;
        float m[RB];
        for (int64_t j = 0; j < batch; ++j) m[j] = row_max(x + (r + j) * n, n);
        for (int64_t j = 0; j < batch; ++j) {
            const int64_t to = r + j + RB;
            const float sum = row_exp(x + (r + j) * n, e, n, m[j], to < last ? x + to * n : nullptr);
            row_scale<STREAM>(e, y + (r + j) * n, n, sum);
        }
    }
}
#endif

extern "C" void softmax_rows(const float* x, float* y, float* scratch, int64_t rows, int64_t cols, int64_t slots, int64_t padded) {
#pragma omp parallel if (rows * cols > 16384)
    {
        const int64_t id = omp_get_thread_num(), nt = omp_get_num_threads() < slots ? omp_get_num_threads() : slots;
        const int64_t first = id < nt ? rows * id / nt : 0, last = id < nt ? rows * (id + 1) / nt : 0;
#if defined(__AVX512F__)
        if (first < last) {
            // every row of y starts on a line where the base does and a row is whole lines
            const bool stream = NT && (reinterpret_cast<uintptr_t>(y) & 63) == 0 && cols % 16 == 0;
            if (stream) { some_rows<true>(x, y, scratch + id * padded, cols, first, last); _mm_sfence(); }
            else some_rows<false>(x, y, scratch + id * padded, cols, first, last);
        }
#else
        for (int64_t r = first; r < last; ++r) row_portable(x + r * cols, y + r * cols, cols);
#endif
    }
}
