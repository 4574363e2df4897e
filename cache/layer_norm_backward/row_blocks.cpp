/*---
implements = "layer_norm_backward"
target     = "cpu"
dtypes     = ["float32"]
optional   = ["bias"]
where      = ["x.ndim == 2", "grad_y.ndim == 2", "weight.ndim == 1", "weight.shape[0] == cols", "x.stride[1] == 1", "grad_y.stride[1] == 1", "grad_x.stride[1] == 1",
              "weight.stride[0] == 1", "mean.numel == rows", "rstd.numel == rows", "mean.stride[0] == 1", "rstd.stride[0] == 1",
              "grad_weight.stride[0] == 1", "grad_bias.stride[0] == 1", "cols > 0", "rows > 0"]
dims       = { rows = "x.shape[0]", cols = "x.shape[1]", gpitch = "grad_y.stride[0]", xpitch = "x.stride[0]", dpitch = "grad_x.stride[0]", slots = "device.threads", width = "ceil_div(cols, 16) * 16" }
tune       = { NT = [1, 0], RB = [8], PF = [0, 1] }
align      = 4
[[workspace]]
name = "parts"
dtype = "float32"
shape = ["slots", "4", "width"]
[[launch]]
kernel = "layer_norm_backward"
args   = ["grad_y", "x", "mean", "rstd", "weight", "bias", "grad_x", "grad_weight", "grad_bias", "parts", "rows", "cols", "gpitch", "xpitch", "dpitch", "slots", "width"]
---*/
// Groups of 8 rows with their column sums in registers per strip, next group prefetched, second level every 128 rows.
typedef float V __attribute__((vector_size(64)));
static inline V load16(const float* p) { V v; std::memcpy(&v, p, 64); return v; }
static inline void put16(float* p, V v) { std::memcpy(p, &v, 64); }
static inline V load_part(const float* p, int64_t left) {
#if defined(__AVX512F__)
    return (V)_mm512_maskz_loadu_ps(left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1u), p);
#else
    if (left >= 16) return load16(p);
    V v = {};
    for (int64_t i = 0; i < left; ++i) v[i] = p[i];
    return v;
#endif
}
static inline void store_part(float* p, V v, int64_t left) {
    if (left >= 16) {
#if defined(__AVX512F__) && NT
        if ((reinterpret_cast<uintptr_t>(p) & 63) == 0) { _mm512_stream_ps(p, (__m512)v); return; }
#endif
        put16(p, v);
        return;
    }
    for (int64_t i = 0; i < left; ++i) p[i] = v[i];
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
struct Row { float mean, rstd, a, b; };   // grad_x = rstd * (g * w - a - xhat * b)
static inline void touch(const float* p) { __builtin_prefetch(p, 0, 3); }
// the sums of R rows in one loop: every weight vector is loaded once for all of them; the R reductions overlap
template <int R> static inline void row_sums(const float* g, int64_t gp, const float* x, int64_t xp, const float* w, const float* mean, const float* rstd, int64_t n, Row* k) {
    V a[R], b[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) { a[i] = V{}; b[i] = V{}; }
    int64_t c = 0;
    for (; c + 16 <= n; c += 16) {
        const V wv = load16(w + c);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            const V t = load16(g + i * gp + c) * wv;
            a[i] += t;
            b[i] = mad(t, (load16(x + i * xp + c) - mean[i]) * rstd[i], b[i]);
        }
    }
    if (c < n) {
        const int64_t left = n - c;
        const V wv = load_part(w + c, left);
        for (int i = 0; i < R; ++i) {
            const V t = load_part(g + i * gp + c, left) * wv;
            V h = (load_part(x + i * xp + c, left) - mean[i]) * rstd[i];
            for (int64_t l = left; l < 16; ++l) h[l] = 0.0f;
            a[i] += t;
            b[i] = mad(t, h, b[i]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) k[i] = Row{mean[i], rstd[i], hsum(a[i]) / float(n), hsum(b[i]) / float(n)};
}
// one strip of 16 columns (or `left` of them) of `count` rows
static inline void strip(const float* g, int64_t gp, const float* x, int64_t xp, const float* w, float* d, int64_t dp, const Row* k, int64_t count, int64_t left, float* dwp, float* dbp) {
    const V wv = load_part(w, left);
    V dw = {}, db = {};
    for (int64_t i = 0; i < count; ++i) {
        const V gi = load_part(g + i * gp, left);
        const V hi = (load_part(x + i * xp, left) - k[i].mean) * k[i].rstd;
        dw = mad(gi, hi, dw); db += gi;
        store_part(d + i * dp, (gi * wv - k[i].a - hi * k[i].b) * k[i].rstd, left);
    }
    put16(dwp, load16(dwp) + dw);
    put16(dbp, load16(dbp) + db);
}
// a whole strip of R rows; touches the lines of the block `ahead`
template <int R> static inline void whole_strip(const float* g, int64_t gp, const float* x, int64_t xp, const float* w, float* d, int64_t dp, const Row* k, float* dwp, float* dbp, const float* gn, const float* xn) {
    const V wv = load16(w);
    V dw[2] = {}, db[2] = {};
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
        if (gn) { touch(gn + i * gp); touch(xn + i * xp); }
        const V gi = load16(g + i * gp);
        const V hi = (load16(x + i * xp) - k[i].mean) * k[i].rstd;
        dw[i & 1] = mad(gi, hi, dw[i & 1]); db[i & 1] += gi;
        store_part(d + i * dp, (gi * wv - k[i].a - hi * k[i].b) * k[i].rstd, 16);
    }
    put16(dwp, load16(dwp) + (dw[0] + dw[1]));
    put16(dbp, load16(dbp) + (db[0] + db[1]));
}

extern "C" void layer_norm_backward(const float* grad_y, const float* x, const float* mean, const float* rstd, const float* weight, const float* bias, float* grad_x, float* grad_weight,
                                    float* grad_bias, float* parts, int64_t rows, int64_t cols, int64_t gpitch, int64_t xpitch, int64_t dpitch, int64_t slots, int64_t width) {
#pragma omp parallel if (rows * cols > 16384)
    {
        const int64_t id = omp_get_thread_num(), nt = omp_get_num_threads() < slots ? omp_get_num_threads() : slots;
        const int64_t first = id < nt ? rows * id / nt : 0, last = id < nt ? rows * (id + 1) / nt : 0;
        if (id < nt) std::memset(parts + id * 4 * width, 0, size_t(4 * width) * 4);
        float* dw_part = parts + (id < nt ? id : 0) * 4 * width;
        float* db_part = dw_part + width;
        float* dw_near = dw_part + 2 * width;
        float* db_near = dw_part + 3 * width;
        int64_t pending = 0;
        for (int64_t r = first; r < last; r += RB) {
            const int64_t count = last - r < RB ? last - r : RB;
            const float* g = grad_y + r * gpitch;
            const float* xs = x + r * xpitch;
            float* d = grad_x + r * dpitch;
            Row k[RB];
            int64_t c = 0;
            if (count == RB) {
                row_sums<RB>(g, gpitch, xs, xpitch, weight, mean + r, rstd + r, cols, k);
                const bool more = PF && r + 2 * RB <= last;
                const float* gn = more ? g + RB * gpitch : nullptr;
                const float* xn = more ? xs + RB * xpitch : nullptr;
                for (; c + 16 <= cols; c += 16) whole_strip<RB>(g + c, gpitch, xs + c, xpitch, weight + c, d + c, dpitch, k, dw_near + c, db_near + c, more ? gn + c : nullptr, xn + (more ? c : 0));
            } else {
                for (int64_t i = 0; i < count; ++i) row_sums<1>(g + i * gpitch, gpitch, xs + i * xpitch, xpitch, weight, mean + r + i, rstd + r + i, cols, k + i);
            }
            for (; c < cols; c += 16) strip(g + c, gpitch, xs + c, xpitch, weight + c, d + c, dpitch, k, count, cols - c, dw_near + c, db_near + c);
            pending += count;
            if (pending >= 128 || r + RB >= last) {
                for (int64_t t = 0; t < width; t += 16) {
                    put16(dw_part + t, load16(dw_part + t) + load16(dw_near + t));
                    put16(db_part + t, load16(db_part + t) + load16(db_near + t));
                    put16(dw_near + t, V{});
                    put16(db_near + t, V{});
                }
                pending = 0;
            }
        }

#if defined(__AVX512F__) && NT
        _mm_sfence();
#endif
#pragma omp barrier
        for (int64_t c = (id < nt ? cols * id / nt : 0); c < (id < nt ? cols * (id + 1) / nt : 0); ++c) {
            float dw = 0.0f, db = 0.0f;
            for (int64_t t = 0; t < nt; ++t) { dw += parts[(t * 4) * width + c]; db += parts[(t * 4 + 1) * width + c]; }
            grad_weight[c] = dw;
            grad_bias[c] = db;
        }
    }
}
