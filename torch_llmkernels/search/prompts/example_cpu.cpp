/*---
implements = "row_l2_normalize"
target     = "cpu"
dtypes     = ["float32"]
optional   = ["scale"]
where      = ["x.ndim == 2", "x.stride[1] == 1", "y.stride[1] == 1", "y.stride[0] == cols"]
dims       = { rows = "x.shape[0]", cols = "x.shape[1]", pitch = "x.stride[0]" }
tune       = { LANES = [16, 32, 64] }
align      = 4
[[launch]]
kernel = "row_l2_normalize"
args   = ["x", "scale", "y", "rows", "cols", "pitch", "eps"]
---*/
// y[r, c] = x[r, c] / sqrt(sum_c x[r, c]^2 + eps) * scale[c]: rows in parallel; LANES partial sums vectorise and keep rounding low.

static inline ACC sum_of_squares(const T_x* row, int64_t cols) {
    ACC lanes[LANES] = {};
    int64_t c = 0;
    for (; c + LANES <= cols; c += LANES) {
#pragma omp simd
        for (int i = 0; i < LANES; ++i) lanes[i] += to_acc(row[c + i]) * to_acc(row[c + i]);
    }
    for (int i = 0; c < cols; ++c, ++i) lanes[i] += to_acc(row[c]) * to_acc(row[c]);
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

extern "C" void row_l2_normalize(const T_x* x, const T* scale, T_y* y, int64_t rows, int64_t cols, int64_t pitch, float eps) {
#pragma omp parallel for schedule(static) if (rows * cols > 32768)
    for (int64_t r = 0; r < rows; ++r) {
        const T_x* row = x + r * pitch;
        T_y* out = y + r * cols;
        const ACC norm = ACC(1) / std::sqrt(sum_of_squares(row, cols) + eps);
        for (int64_t c = 0; c < cols; ++c) {
            ACC v = to_acc(row[c]) * norm;
#if HAS_SCALE
            v *= to_acc(scale[c]);
#endif
            out[c] = from_acc<T_y>(v);
        }
    }
}
