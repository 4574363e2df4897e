/*---
implements = "layer_norm"
target     = "cpu"
dtypes     = ["float32"]
optional   = ["weight", "bias", "mean", "rstd"]
where      = ["x.ndim == 2", "y.ndim == 2", "cols > 0", "x.stride[1] == 1", "y.stride[1] == 1", "normalized_shape.product == cols", "weight.contiguous", "bias.contiguous", "mean.contiguous", "rstd.contiguous"]
dims       = { rows = "x.shape[0]", cols = "x.shape[1]", xp = "x.stride[0]", yp = "y.stride[0]" }
tune       = { STREAMS = [4, 8, 12], DIST = [2, 3, 4], NT = [1, 0] }
align      = 4
[[launch]]
kernel = "layer_norm_rows"
args   = ["x", "weight", "bias", "y", "mean", "rstd", "rows", "cols", "xp", "yp", "eps"]
---*/
// Streams in lockstep, one loop per step: it writes the rows of this step and forms all statistics of the next step's rows about a
// pivot (the mean of a row's first 64 columns), so no phase is without loads and stores. Sub-ranges are an odd number of rows apart.
#if !defined(__AVX512F__)
// Portable row: double lanes for the mean, float deviations, blocks of squares summed in double.
static inline void portable_row(const float* x, const float* weight, const float* bias, float* y, int64_t cols, double eps,
                                float& mean_out, float& rstd_out) {
    double lanes[16] = {};
    int64_t c = 0;
    for (; c + 16 <= cols; c += 16) {
#pragma omp simd
        for (int i = 0; i < 16; ++i) lanes[i] += double(x[c + i]);
    }
    for (int i = 0; c < cols; ++c, ++i) lanes[i] += double(x[c]);
    for (int h = 8; h > 0; h /= 2) for (int i = 0; i < h; ++i) lanes[i] += lanes[i + h];
    const double mean = lanes[0] / double(cols);
    const float hi = float(mean), lo = float(mean - double(hi));
    double squares = 0;
    for (int64_t b = 0; b < cols; b += 1024) {
        const int64_t end = std::min<int64_t>(cols, b + 1024);
        float s[32] = {};
        int64_t k = b;
        for (; k + 32 <= end; k += 32) {
#pragma omp simd
            for (int i = 0; i < 32; ++i) { const float d = (x[k + i] - hi) - lo; s[i] += d * d; }
        }
        for (int i = 0; k < end; ++k, ++i) { const float d = (x[k] - hi) - lo; s[i] += d * d; }
        for (int h = 16; h > 0; h /= 2) for (int i = 0; i < h; ++i) s[i] += s[i + h];
        squares += double(s[0]);
    }
    const float rstd = float(1.0 / std::sqrt(squares / double(cols) + eps));
    const float shift = -lo * rstd;
    for (int64_t k = 0; k < cols; ++k) {
        float v = (x[k] - hi) * rstd + shift;
#if HAS_WEIGHT
        v *= weight[k];
#endif
#if HAS_BIAS
        v += bias[k];
#endif
        y[k] = v;
    }
    mean_out = hi + lo;
    rstd_out = rstd;
}
#endif

struct Job {
    const float *x, *weight, *bias;
    float *y, *mean, *rstd;
    int64_t cols, xp, yp, begin, end;
    double eps;
    int64_t rows, threads, me;
};

static inline void put(const Job& j, int64_t r, float m, float s) {
#if HAS_MEAN
    j.mean[r] = m;
#endif
#if HAS_RSTD
    j.rstd[r] = s;
#endif
    (void)j; (void)r; (void)m; (void)s;
}

#if defined(__AVX512F__)
static inline __m512d low_half(__m512 v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
static inline __m512d high_half(__m512 v) {
    return _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
}
template <bool STREAM> static inline void store16(float* p, __m512 v) {
    if (STREAM) _mm512_stream_ps(p, v);
    else _mm512_storeu_ps(p, v);
}
// (x - hi) * rstd - lo * rstd, then weight and bias
static inline __m512 normalise(__m512 x, __m512 hi, __m512 rstd, __m512 shift, const float* weight, const float* bias, int64_t c) {
    __m512 v = _mm512_fmadd_ps(_mm512_sub_ps(x, hi), rstd, shift);
#if HAS_WEIGHT && HAS_BIAS
    v = _mm512_fmadd_ps(v, _mm512_loadu_ps(weight + c), _mm512_loadu_ps(bias + c));
#elif HAS_WEIGHT
    v = _mm512_mul_ps(v, _mm512_loadu_ps(weight + c));
#elif HAS_BIAS
    v = _mm512_add_ps(v, _mm512_loadu_ps(bias + c));
#endif
    return v;
}
static inline __m512 normalise_tail(__mmask16 m, __m512 x, __m512 hi, __m512 rstd, __m512 shift, const float* weight,
                                    const float* bias, int64_t c) {
    __m512 v = _mm512_fmadd_ps(_mm512_sub_ps(x, hi), rstd, shift);
#if HAS_WEIGHT
    v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(m, weight + c));
#endif
#if HAS_BIAS
    v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(m, bias + c));
#endif
    return v;
}
// float sums of at most 1024 columns go into double
static inline __m512d fold(__m512d total, __m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 s = _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d));
    return _mm512_add_pd(total, _mm512_add_pd(low_half(s), high_half(s)));
}

static inline double row_mean(const float* x, int64_t cols) {
    __m512d a0 = _mm512_setzero_pd(), a1 = a0, a2 = a0, a3 = a0;
    int64_t c = 0;
    for (; c + 32 <= cols; c += 32) {
        a0 = _mm512_add_pd(a0, _mm512_cvtps_pd(_mm256_loadu_ps(x + c)));
        a1 = _mm512_add_pd(a1, _mm512_cvtps_pd(_mm256_loadu_ps(x + c + 8)));
        a2 = _mm512_add_pd(a2, _mm512_cvtps_pd(_mm256_loadu_ps(x + c + 16)));
        a3 = _mm512_add_pd(a3, _mm512_cvtps_pd(_mm256_loadu_ps(x + c + 24)));
    }
    for (; c < cols; c += 16) {
        const __mmask16 m = cols - c >= 16 ? __mmask16(0xffff) : __mmask16((1u << (cols - c)) - 1u);
        const __m512 v = _mm512_maskz_loadu_ps(m, x + c);
        a0 = _mm512_add_pd(a0, low_half(v));
        a1 = _mm512_add_pd(a1, high_half(v));
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(a0, a1), _mm512_add_pd(a2, a3))) / double(cols);
}

static inline double row_squares(const float* x, int64_t cols, __m512 hi, __m512 lo) {
    __m512d total = _mm512_setzero_pd();
    for (int64_t b = 0; b < cols; b += 1024) {
        const int64_t end = std::min<int64_t>(cols, b + 1024);
        __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
        int64_t c = b;
        for (; c + 64 <= end; c += 64) {
            const __m512 d0 = _mm512_sub_ps(_mm512_sub_ps(_mm512_loadu_ps(x + c), hi), lo);
            const __m512 d1 = _mm512_sub_ps(_mm512_sub_ps(_mm512_loadu_ps(x + c + 16), hi), lo);
            const __m512 d2 = _mm512_sub_ps(_mm512_sub_ps(_mm512_loadu_ps(x + c + 32), hi), lo);
            const __m512 d3 = _mm512_sub_ps(_mm512_sub_ps(_mm512_loadu_ps(x + c + 48), hi), lo);
            s0 = _mm512_fmadd_ps(d0, d0, s0);
            s1 = _mm512_fmadd_ps(d1, d1, s1);
            s2 = _mm512_fmadd_ps(d2, d2, s2);
            s3 = _mm512_fmadd_ps(d3, d3, s3);
        }
        for (; c < end; c += 16) {
            const __mmask16 m = end - c >= 16 ? __mmask16(0xffff) : __mmask16((1u << (end - c)) - 1u);
            const __m512 d = _mm512_maskz_sub_ps(m, _mm512_sub_ps(_mm512_maskz_loadu_ps(m, x + c), hi), lo);
            s0 = _mm512_fmadd_ps(d, d, s0);
        }
        total = fold(total, s0, s1, s2, s3);
    }
    return _mm512_reduce_add_pd(total);
}

template <bool STREAM>
static inline void row_output(const float* x, const float* weight, const float* bias, float* y, int64_t cols, __m512 hi, __m512 rstd,
                              __m512 shift) {
    int64_t c = 0;
    for (; c + 16 <= cols; c += 16) store16<STREAM>(y + c, normalise(_mm512_loadu_ps(x + c), hi, rstd, shift, weight, bias, c));
    if (c < cols) {
        const __mmask16 m = __mmask16((1u << (cols - c)) - 1u);
        _mm512_mask_storeu_ps(y + c, m, normalise_tail(m, _mm512_maskz_loadu_ps(m, x + c), hi, rstd, shift, weight, bias, c));
    }
}

template <bool STREAM>
static inline void vector_row(const float* x, const float* weight, const float* bias, float* y, int64_t cols, double eps,
                              float& mean_out, float& rstd_out) {
    const double mean = row_mean(x, cols);
    const float hi = float(mean), lo = float(mean - double(hi));   // lo is NaN where the mean is not finite: so is the row
    const __m512 vhi = _mm512_set1_ps(hi);
    const double squares = row_squares(x, cols, vhi, _mm512_set1_ps(lo));
    const float rstd = float(1.0 / std::sqrt(squares / double(cols) + eps));
    row_output<STREAM>(x, weight, bias, y, cols, vhi, _mm512_set1_ps(rstd), _mm512_set1_ps(-lo * rstd));
    mean_out = hi + lo;
    rstd_out = rstd;
}

static inline __mmask16 tail_mask(int64_t left) { return left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1u); }
static inline __m512 sum4(__m512 a, __m512 b, __m512 c, __m512 d) { return _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)); }
static inline void widen_add(__m512 v, __m512d& a, __m512d& b) {
    a = _mm512_add_pd(a, low_half(v));
    b = _mm512_add_pd(b, high_half(v));
}
static inline void touch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
// the mean of a row whose sum is given; a float tree inside the sum may overflow where the mean does not: then all in double
static inline double safe_mean(double sum, const float* x, int64_t cols) {
    return std::isfinite(sum) ? sum / double(cols) : row_mean(x, cols);
}
struct Affine { __m512 w, b; };
static inline Affine affine16(const float* weight, const float* bias, int64_t c, __mmask16 m) {
    Affine f;
#if HAS_WEIGHT
    f.w = _mm512_maskz_loadu_ps(m, weight + c);
#else
    f.w = _mm512_setzero_ps();
#endif
#if HAS_BIAS
    f.b = _mm512_maskz_loadu_ps(m, bias + c);
#else
    f.b = _mm512_setzero_ps();
#endif
    (void)weight; (void)bias; (void)c; (void)m;
    return f;
}
static inline Affine affine_full(const float* weight, const float* bias, int64_t c) {
    Affine f;
#if HAS_WEIGHT
    f.w = _mm512_loadu_ps(weight + c);
#else
    f.w = _mm512_setzero_ps();
#endif
#if HAS_BIAS
    f.b = _mm512_loadu_ps(bias + c);
#else
    f.b = _mm512_setzero_ps();
#endif
    (void)weight; (void)bias; (void)c;
    return f;
}
static inline __m512 scale_shift(__m512 v, const Affine& f) {
#if HAS_WEIGHT && HAS_BIAS
    return _mm512_fmadd_ps(v, f.w, f.b);
#elif HAS_WEIGHT
    return _mm512_mul_ps(v, f.w);
#elif HAS_BIAS
    return _mm512_add_ps(v, f.b);
#else
    (void)f;
    return v;
#endif
}
static inline __m512 apply(__m512 x, __m512 hi, __m512 rstd, __m512 shift, const Affine& f) {
    return scale_shift(_mm512_fmadd_ps(_mm512_sub_ps(x, hi), rstd, shift), f);
}

// Statistics of a row about its pivot p: y = ((x - p) - centre) * rstd
template <int N> struct Step {
    float pivot[N], rstd[N], shift[N];
};
template <int N> struct Sums {
    double s1[N], s2[N];
};

static inline float pivot_of(const float* x, int64_t cols) {
    if (cols >= 64)
        return _mm512_reduce_add_ps(sum4(_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16), _mm512_loadu_ps(x + 32), _mm512_loadu_ps(x + 48))) *
               (1.0f / 64.0f);
    __m512 s = _mm512_setzero_ps();
    for (int64_t c = 0; c < cols; c += 16) s = _mm512_add_ps(s, _mm512_maskz_loadu_ps(tail_mask(cols - c), x + c));
    return _mm512_reduce_add_ps(s) / float(cols);
}

// Writes N rows (OUT) and sums the deviations of the N rows at `next` from their pivots, and their squares.
template <int N, bool STREAM, bool OUT>
static inline void one_loop(const Job& j, const float* x, float* y, int64_t gs, int64_t ys, const float* next, const float* ahead,
                            const Step<N>& now, Step<N>& then, Sums<N>& sums) {
    const int64_t cols = j.cols;
    for (int r = 0; r < N; ++r) {
        then.pivot[r] = pivot_of(next + r * gs, cols);
        sums.s1[r] = sums.s2[r] = 0;
    }
    for (int64_t b = 0; b < cols; b += 1024) {
        const int64_t end = std::min<int64_t>(cols, b + 1024);
        __m512 s1[N], s2[N];
        for (int r = 0; r < N; ++r) s1[r] = s2[r] = _mm512_setzero_ps();
        int64_t c = b;
        for (; c + 64 <= end; c += 64) {
#pragma GCC unroll 16
            for (int r = 0; r < N; ++r) {
                const float *n = next + r * gs + c, *a = ahead + r * gs + c;
                const __m512 p = _mm512_set1_ps(then.pivot[r]);
                const __m512 d0 = _mm512_sub_ps(_mm512_loadu_ps(n), p), d1 = _mm512_sub_ps(_mm512_loadu_ps(n + 16), p);
                const __m512 d2 = _mm512_sub_ps(_mm512_loadu_ps(n + 32), p), d3 = _mm512_sub_ps(_mm512_loadu_ps(n + 48), p);
                touch(a);
                touch(a + 16);
                touch(a + 32);
                touch(a + 48);
                s1[r] = _mm512_add_ps(s1[r], sum4(d0, d1, d2, d3));
                s2[r] = _mm512_add_ps(s2[r], _mm512_add_ps(_mm512_fmadd_ps(d0, d0, _mm512_mul_ps(d1, d1)),
                                                           _mm512_fmadd_ps(d2, d2, _mm512_mul_ps(d3, d3))));
                if (OUT) {
                    const float* o = x + r * gs + c;
                    float* q = y + r * ys + c;
                    const __m512 h = _mm512_set1_ps(now.pivot[r]), k = _mm512_set1_ps(now.rstd[r]), t = _mm512_set1_ps(now.shift[r]);
#pragma GCC unroll 4
                    for (int i = 0; i < 64; i += 16)
                        store16<STREAM>(q + i, apply(_mm512_loadu_ps(o + i), h, k, t, affine_full(j.weight, j.bias, c + i)));
                }
            }
        }
        for (; c < end; c += 16) {
            const __mmask16 m = tail_mask(end - c);
            const Affine f = affine16(j.weight, j.bias, c, m);
            for (int r = 0; r < N; ++r) {
                const __m512 d = _mm512_maskz_sub_ps(m, _mm512_maskz_loadu_ps(m, next + r * gs + c), _mm512_set1_ps(then.pivot[r]));
                s1[r] = _mm512_add_ps(s1[r], d);
                s2[r] = _mm512_fmadd_ps(d, d, s2[r]);
                if (OUT) {
                    const __m512 h = _mm512_set1_ps(now.pivot[r]), k = _mm512_set1_ps(now.rstd[r]), t = _mm512_set1_ps(now.shift[r]);
                    _mm512_mask_storeu_ps(y + r * ys + c, m, apply(_mm512_maskz_loadu_ps(m, x + r * gs + c), h, k, t, f));
                }
            }
        }
        for (int r = 0; r < N; ++r) {
            sums.s1[r] += _mm512_reduce_add_pd(_mm512_add_pd(low_half(s1[r]), high_half(s1[r])));
            sums.s2[r] += _mm512_reduce_add_pd(_mm512_add_pd(low_half(s2[r]), high_half(s2[r])));
        }
    }
}

// From the sums to pivot, rstd and shift. The pivot is the mean of the row's first 64 columns, so for cols <= 256 its distance from
// the mean is at most two standard deviations; where it is more (long rows), or a sum is not finite, the row is done in two passes.
template <int N> static inline void finish(const Job& j, const float* x, int64_t gs, int64_t row, int64_t apart, Step<N>& s, const Sums<N>& sums) {
    const double inverse = 1.0 / double(j.cols);
    for (int r = 0; r < N; ++r) {
        double centre = sums.s1[r] * inverse;
        double variance = (sums.s2[r] - sums.s1[r] * centre) * inverse;
        if (!std::isfinite(variance) || (j.cols > 256 && centre * centre > 4 * variance)) {
            const double mean = row_mean(x + r * gs, j.cols);
            s.pivot[r] = float(mean);
            centre = double(float(mean - double(s.pivot[r])));   // NaN where the mean is not finite: so is the row
            variance = row_squares(x + r * gs, j.cols, _mm512_set1_ps(s.pivot[r]), _mm512_set1_ps(float(centre))) * inverse;
        }
        variance = variance < 0 ? 0 : variance;
        s.rstd[r] = float(1.0 / std::sqrt(variance + j.eps));
        s.shift[r] = float(-centre * double(s.rstd[r]));
        put(j, row + r * apart, float(double(s.pivot[r]) + centre), s.rstd[r]);
    }
}

template <int N, bool STREAM> static inline void walk(const Job& j, int64_t g, int64_t count, int64_t apart) {
    if (count <= 0) return;
    const int64_t gs = apart * j.xp, ys = apart * j.yp;
    Step<N> now = {}, then;
    Sums<N> sums;
    const float* first = j.x + g * j.xp;
    one_loop<N, STREAM, false>(j, first, j.y, gs, ys, first, first, now, then, sums);
    for (int64_t i = 0; i < count; ++i, ++g) {
        const float* x = j.x + g * j.xp;
        const float* next = i + 1 < count ? x + j.xp : x;
        const float* ahead = i + DIST < count ? x + DIST * j.xp : x;
        finish<N>(j, x, gs, g, apart, then, sums);
        now = then;
        one_loop<N, STREAM, true>(j, x, j.y + g * j.yp, gs, ys, next, ahead, now, then, sums);
    }
}

template <bool STREAM> static void all_rows(const Job& j) {
    int64_t chunk = (j.end - j.begin) / STREAMS;
    if (chunk > 1 && chunk % 2 == 0) --chunk;
    const int64_t rest = j.begin + chunk * STREAMS;
    walk<STREAMS, STREAM>(j, j.begin, chunk, chunk);
    walk<1, STREAM>(j, rest, j.end - rest, 1);
}
#else
template <bool STREAM> static void all_rows(const Job& j) {
    for (int64_t r = j.begin; r < j.end; ++r) {
        float m, s;
        portable_row(j.x + r * j.xp, j.weight, j.bias, j.y + r * j.yp, j.cols, j.eps, m, s);
        put(j, r, m, s);
    }
}
#endif

extern "C" void layer_norm_rows(const T_x* x, const T* weight, const T* bias, T_y* y, T_mean* mean, T_rstd* rstd, int64_t rows,
                                int64_t cols, int64_t xp, int64_t yp, double eps) {
    const bool stream = NT && reinterpret_cast<uintptr_t>(y) % 64 == 0 && yp % 16 == 0;
#pragma omp parallel if (rows * cols > 32768)
    {
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t begin = rows / threads * me + std::min<int64_t>(me, rows % threads);
        const int64_t end = begin + rows / threads + (me < rows % threads ? 1 : 0);
        const Job job = {x, weight, bias, y, mean, rstd, cols, xp, yp, begin, end, eps, rows, threads, me};
        if (stream) all_rows<true>(job);
        else all_rows<false>(job);
#if defined(__AVX512F__)
        if (stream) _mm_sfence();
#endif
    }
}
