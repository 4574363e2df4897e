/*---
implements = "softmax"
target     = "cpu"
dtypes     = ["float32"]
where      = ["x.ndim == 2", "(dim == 1) + (dim == -1) >= 1", "x.stride[1] == 1", "y.stride[1] == 1"]
dims       = { rows = "x.shape[0]", cols = "x.shape[1]", xpitch = "x.stride[0]", ypitch = "y.stride[0]" }
tune       = { FAST = [0, 1], PF = [1, 2] }
align      = 4
[[launch]]
kernel = "softmax_rows"
args   = ["x", "y", "rows", "cols", "xpitch", "ypitch"]
---*/
// Softmax over the last dimension. Large tasks: one fused loop computes row r (exp, sum) with an optimistic shift and streams row r-1.

#if defined(__AVX512F__) && defined(__AVX512DQ__)
// k * 2^y for a fixed k near 1 (exactly 1 at y = 0); 0 at -inf, NaN at NaN
static inline __m512 exp2_scaled(__m512 y) {
    const __m512 f = _mm512_reduce_ps(y, 0x09);  // y - floor(y); 0 for -inf
    __m512 p = _mm512_set1_ps(0x1.ec320cp-10f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.26900ep-7f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c95448p-5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebd5acp-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e4f8p-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, y);  // p * 2^floor(y)
}

// exponent of an element in base 2, up to a shift common to the row; BIG: the row maximum is large, subtract it exactly first
template <bool BIG> static inline __m512 exponent(__m512 x, __m512 shift) {
    const __m512 log2e = _mm512_set1_ps(1.44269504088896341f);
    return BIG ? _mm512_mul_ps(_mm512_sub_ps(x, shift), log2e) : _mm512_fmadd_ps(x, log2e, shift);
}

static inline __mmask16 first(int64_t left) { return left >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1u); }

static inline double sum_lanes(__m512 s) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(s));
    const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(s), 1)));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}

// maximum of a row (NaN is skipped here: it comes back through exp and the sum)
static inline float row_max(const float* in, int64_t cols) {
    const __m512 ninf = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 m[4] = {ninf, ninf, ninf, ninf};
    int64_t c = 0;
    for (; c + 64 <= cols; c += 64) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) m[u] = _mm512_max_ps(_mm512_loadu_ps(in + c + 16 * u), m[u]);
    }
    for (; c < cols; c += 16) m[0] = _mm512_max_ps(_mm512_mask_loadu_ps(ninf, first(cols - c), in + c), m[0]);
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(m[0], m[1]), _mm512_max_ps(m[2], m[3])));
}

static constexpr int64_t ROOM = 4096;  // columns of a stack buffer

// exp of a row into hold; returns the sum (partial sums go to double every 4096 columns)
template <bool BIG> static inline double exp_row(const float* in, float* hold, int64_t cols, __m512 shift) {
    double total = 0.0;
    int64_t c = 0;
    while (c < cols) {
        const int64_t end = std::min<int64_t>(cols, c + 4096);
        __m512 s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (; c + 64 <= end; c += 64) {
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) {
                const __m512 e = exp2_scaled(exponent<BIG>(_mm512_loadu_ps(in + c + 16 * u), shift));
                _mm512_storeu_ps(hold + c + 16 * u, e);
                s[u] = _mm512_add_ps(s[u], e);
            }
        }
        for (; c < end; c += 16) {
            const __mmask16 k = first(end - c);
            const __m512 e = exp2_scaled(exponent<BIG>(_mm512_maskz_loadu_ps(k, in + c), shift));
            _mm512_mask_storeu_ps(hold + c, k, e);
            s[0] = _mm512_mask_add_ps(s[0], k, s[0], e);
        }
        c = end;
        for (int u = 0; u < 4; ++u) total += sum_lanes(s[u]);
    }
    return total;
}

// beyond 2^16 the rounding of top * log2e might be a large shift
static inline bool is_small(float top) { return std::fabs(top) <= 65536.0f; }
static inline __m512 shift_of(float top) { return _mm512_set1_ps(is_small(top) ? -top * 1.44269504088896341f : top); }

static inline void scale_row(const float* hold, float* out, int64_t cols, __m512 inverse) {
    int64_t c = 0;
    for (; c + 64 <= cols; c += 64) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) _mm512_storeu_ps(out + c + 16 * u, _mm512_mul_ps(_mm512_loadu_ps(hold + c + 16 * u), inverse));
    }
    for (; c < cols; c += 16) {
        const __mmask16 k = first(cols - c);
        _mm512_mask_storeu_ps(out + c, k, _mm512_mul_ps(_mm512_maskz_loadu_ps(k, hold + c), inverse));
    }
}

static inline __m512 inverse_of(double total) { return _mm512_set1_ps((float)(1.0 / total)); }

static inline void softmax_row(const float* in, float* out, int64_t cols) {
    const float top = row_max(in, cols);
    const __m512 shift = shift_of(top);
    const double total = is_small(top) ? exp_row<false>(in, out, cols, shift) : exp_row<true>(in, out, cols, shift);
    scale_row(out, out, cols, inverse_of(total));
}

// a shift that is a member of the row: the sum is at least about 1, and overflow shows in it
static inline float guess_of(const float* in, int64_t cols) {
    return _mm512_reduce_max_ps(_mm512_mask_loadu_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), first(cols), in));
}

// exp of a row with its true maximum
static inline double exp_safe(const float* in, float* hold, int64_t cols) {
    const float top = row_max(in, cols);
    return is_small(top) ? exp_row<false>(in, hold, cols, shift_of(top)) : exp_row<true>(in, hold, cols, shift_of(top));
}

// two stages at once: hold has exp of the row before; that is streamed to out (64-byte aligned), and exp of in takes its place. The load
// comes before the store: a young store at the same offset modulo 4 KiB would delay it.
static inline float fused_row(const float* in, float* hold, int64_t cols, __m512 shift, const float* after, float* out, __m512 inverse) {
    __m512 s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t c = 0;
    for (; c + 64 <= cols; c += 64) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) {
            const int64_t i = c + 16 * u;
            __builtin_prefetch(after + i, 0, 2);
            const __m512 last = _mm512_load_ps(hold + i);
            const __m512 e = exp2_scaled(exponent<false>(_mm512_loadu_ps(in + i), shift));
            _mm512_stream_ps(out + i, _mm512_mul_ps(last, inverse));
            _mm512_store_ps(hold + i, e);
            s[u] = _mm512_add_ps(s[u], e);
        }
    }
    for (; c < cols; c += 16) {
        const __mmask16 k = first(cols - c);
        const __m512 last = _mm512_maskz_loadu_ps(k, hold + c);
        const __m512 e = exp2_scaled(exponent<false>(_mm512_maskz_loadu_ps(k, in + c), shift));
        _mm512_mask_storeu_ps(out + c, k, _mm512_mul_ps(last, inverse));
        _mm512_mask_storeu_ps(hold + c, k, e);
        s[0] = _mm512_mask_add_ps(s[0], k, s[0], e);
    }
    return (float)sum_lanes(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
}

#if FAST
static inline __m512 quotient(double, float total) { return _mm512_set1_ps(1.0f / total); }
#else
static inline __m512 quotient(double total, float) { return inverse_of(total); }
#endif

// rows [from, to), from < to, cols <= ROOM, rows of y 64-byte aligned
static inline void pipeline(const float* x, float* y, int64_t from, int64_t to, int64_t cols, int64_t xpitch, int64_t ypitch) {
    alignas(4096) float hold[ROOM];
    const float* in = x + from * xpitch;
    float* out = y + from * ypitch;
    float total = (float)exp_safe(in, hold, cols);
    float guess = from + 1 < to ? guess_of(in + xpitch, cols) : 0.0f;
    for (int64_t r = from + 1; r < to; ++r) {
        in += xpitch;
        const float* next = r + 1 < to ? in + xpitch : in;
        const float* after = r + PF < to ? in + PF * xpitch : in;
        const float mine = guess;
        guess = guess_of(next, cols);  // early: ready when the next row starts
        total = fused_row(in, hold, cols, _mm512_set1_ps(-mine * 1.44269504088896341f), after, out, quotient(total, total));
        if (!(is_small(mine) && total < 0x1p100f)) total = (float)exp_safe(in, hold, cols);
        out += ypitch;
    }
    scale_row(hold, out, cols, quotient(total, total));
    _mm_sfence();
}
#else
static inline void softmax_row(const float* in, float* out, int64_t cols) {
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t c = 0; c < cols; ++c) top = in[c] > top ? in[c] : top;  // NaN comes back through exp and the sum
    double total = 0.0;
    for (int64_t c = 0; c < cols; ++c) {
        out[c] = std::exp(in[c] - top);
        total += out[c];
    }
    for (int64_t c = 0; c < cols; ++c) out[c] = (float)(out[c] / total);
}
#endif

extern "C" void softmax_rows(const T_x* x, T_y* y, int64_t rows, int64_t cols, int64_t xpitch, int64_t ypitch) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    if (rows * cols > 524288 && cols <= ROOM && ((uintptr_t)y & 63) == 0 && ypitch % 16 == 0) {
#pragma omp parallel
        {
            const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
            const int64_t from = rows * me / threads, to = rows * (me + 1) / threads;
            if (from < to) pipeline(x, y, from, to, cols, xpitch, ypitch);
        }
        return;
    }
#endif
#pragma omp parallel for schedule(static) if (rows * cols > 32768)
    for (int64_t r = 0; r < rows; ++r) softmax_row(x + r * xpitch, y + r * ypitch, cols);
}
