/*---
implements = "conv2d.relu"
target     = "cpu"
dtypes     = ["float32"]
optional   = ["bias"]
where      = ["x.ndim == 4", "groups == 1"]
dims       = { n = "x.shape[0]", c = "x.shape[1]", h = "x.shape[2]", w = "x.shape[3]", k = "weight.shape[0]", r = "weight.shape[2]", s = "weight.shape[3]", oh = "y.shape[2]", ow = "y.shape[3]", xn = "x.stride[0]", xc = "x.stride[1]", xh = "x.stride[2]", xw = "x.stride[3]", yn = "y.stride[0]", yk = "y.stride[1]", yh = "y.stride[2]", yw = "y.stride[3]", wk = "weight.stride[0]", wc = "weight.stride[1]", wr = "weight.stride[2]", ws = "weight.stride[3]" }
align      = 1
[[launch]]
kernel = "conv"
args = ["x", "weight", "bias", "y", "n", "c", "h", "w", "k", "r", "s", "oh", "ow", "xn", "xc", "xh", "xw", "yn", "yk", "yh", "yw", "wk", "wc", "wr", "ws"]
---*/
// The definition, for any strides.
extern "C" void conv(const T_x* x, const T_weight* weight, const T_bias* bias, T_y* y, int64_t n, int64_t c, int64_t h, int64_t w,
                     int64_t k, int64_t r, int64_t s, int64_t oh, int64_t ow, int64_t xn, int64_t xc, int64_t xh, int64_t xw,
                     int64_t yn, int64_t yk, int64_t yh, int64_t yw, int64_t wk, int64_t wc, int64_t wr, int64_t ws) {
    for (int64_t b = 0; b < n; b++)
    for (int64_t o = 0; o < k; o++)
    for (int64_t i = 0; i < oh; i++)
    for (int64_t j = 0; j < ow; j++) {
        double sum = HAS_BIAS ? double(bias[o]) : 0.0;
        for (int64_t q = 0; q < c; q++)
        for (int64_t u = 0; u < r; u++)
        for (int64_t v = 0; v < s; v++) {
            const int64_t row = i * P_STRIDE_0 - P_PADDING_0 + u * P_DILATION_0, col = j * P_STRIDE_1 - P_PADDING_1 + v * P_DILATION_1;
            if (row < 0 || row >= h || col < 0 || col >= w) continue;
            sum += double(x[b * xn + q * xc + row * xh + col * xw]) * double(weight[o * wk + q * wc + u * wr + v * ws]);
        }
        y[b * yn + o * yk + i * yh + j * yw] = sum < 0 ? 0.0f : float(sum);
    }
}
