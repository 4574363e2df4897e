/*---
implements = "layer_norm"
target     = "cuda"
dtypes     = ["float32", "float16", "bfloat16"]
optional   = ["weight", "bias", "mean", "rstd"]
dims       = { cols = "normalized_shape.product", rows = "x.numel // cols", w = "16 // x.itemsize", nvec = "cols // w", share = "ceil_div(nvec, G)", clusters = "min(rows, device.sms // G - SPARE)" }
where      = ["device.arch == 90", "x.contiguous", "y.contiguous", "weight.contiguous", "bias.contiguous", "mean.contiguous", "rstd.contiguous",
              "cols % w == 0", "rows >= 1", "rows <= 268435456", "device.sms >= G * (SPARE + 1)", "(G >= 8) + (SPARE == 0) >= 1", "share * (G - 1) < nvec", "share >= 768",
              "512 * NV >= share", "512 * (NV - 2) < share", "232276 <= device.smem_per_block"]
tune       = { G = [1, 2, 4, 8, 16], NV = [2, 4, 6, 8], D = [2], SPARE = [0, 1, 2] }
align      = 16
[[launch]]
kernel  = "ln_cluster"
grid    = ["clusters * G"]
block   = ["640"]
cluster = ["G"]
smem    = "229376"
args    = ["x", "weight", "bias", "y", "mean", "rstd", "rows", "cols", "clusters"]
---*/
// SPARE: clusters fewer than the SMs would hold, for devices whose GPCs do not all hold SMs in multiples of G.
// A cluster of G blocks takes the rows cluster, cluster + clusters, ...; block b of it owns the same strip of columns of each of them.
// A strip is S steps of 2 * 512 vectors of 16 bytes; steps arrive by bulk copies in a ring of SLOTS. The 512 workers hold their columns'
// weight and bias in registers for the whole kernel. Iteration u: normalise and store step u, free its slot, statistics of step u + LAG.
// Warp 16 merges the statistics of a row over the block's warps, sends them to all blocks of the cluster, merges those, and hands
// (hi, rstd, -lo * rstd) to the workers while these are D steps further on.
// Row slots (row % R): a worker that finishes the statistics of row r has begun to normalise row r - 3 or a later one, so warp 16 is
// done with row r - 4 in this block, and, since row r - 3 was sent by every block, in every other.
enum {
    W = 16 / int(sizeof(T_x)),
    NT = 512,
    NW = NT / 32,
    S = NV / 2,
    LAG = S + D,
    SLOTS = 14,
    STEPVECS = 2 * NT,
    R = 4
};
static_assert(D <= 2 && LAG < SLOTS, "see the note on row slots");

#if defined(P_EPS)
#define EPSILON P_EPS
#elif defined(P_LAYER_NORM_EPS)
#define EPSILON P_LAYER_NORM_EPS
#else
#error "the parameter eps has another name"
#endif

template <int N> struct Tree {
    static __device__ __forceinline__ float sum(const float* a) { return Tree<N / 2>::sum(a) + Tree<N / 2>::sum(a + N / 2); }
};
template <> struct Tree<1> {
    static __device__ __forceinline__ float sum(const float* a) { return a[0]; }
};
__device__ __forceinline__ float affine(float n, float w, float b) {
    if (HAS_WEIGHT && HAS_BIAS) return fmaf(n, w, b);
    if (HAS_WEIGHT) return n * w;
    if (HAS_BIAS) return n + b;
    return n;
}
__device__ __forceinline__ void put2(float* to, float a, float b) { to[0] = a; to[1] = b; }
__device__ __forceinline__ void put2(half* to, float a, float b) { *reinterpret_cast<__half2*>(to) = __floats2half2_rn(a, b); }
__device__ __forceinline__ void put2(bfloat16* to, float a, float b) { *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(a, b); }

// keeps 16-bit weights packed: the compiler may not widen them outside the loop over the rows
template <class V> __device__ __forceinline__ void stay_packed(V& v) {
    if constexpr (sizeof(v[0]) == 2) {
        uint32_t (&u)[sizeof(V) / 4] = reinterpret_cast<uint32_t (&)[sizeof(V) / 4]>(v);
#pragma unroll
        for (int i = 0; i < int(sizeof(V) / 4); ++i) asm volatile("" : "+r"(u[i]));
    }
}

// 16 bytes to the same place of block `rank` of the cluster, counted on its barrier
__device__ __forceinline__ void send(double2* to, double a, double b, uint64_t* barrier, uint32_t rank) {
    asm volatile("{\n.reg .b32 there, counter;\nmapa.shared::cluster.u32 there, %0, %4;\nmapa.shared::cluster.u32 counter, %1, %4;\n"
                 "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b64 [there], {%2, %3}, [counter];\n}"
                 ::"r"(smem_address(to)), "r"(smem_address(barrier)), "l"(__double_as_longlong(a)), "l"(__double_as_longlong(b)), "r"(rank)
                 : "memory");
}

struct Sums {
    double K, s, q;
};

extern "C" __global__ void __launch_bounds__(NT + 128, 1) ln_cluster(
    const T_x* __restrict__ x, const T_weight* __restrict__ weight, const T_bias* __restrict__ bias, T_y* __restrict__ y,
    T_mean* __restrict__ mean, T_rstd* __restrict__ rstd, int rows, int cols, int clusters) {
    extern __shared__ __align__(128) Vec<T_x, W> ring[];
    __shared__ __align__(16) float4 stat[R];
    __shared__ __align__(16) double2 from_block[R][G];
    __shared__ Sums from_warp[R][NW];
    __shared__ __align__(8) uint64_t full[SLOTS], merged[R], crossed[R], ready[R];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int block = int(blockIdx.x) % G, group = int(blockIdx.x) / G;
    const int nvec = cols / W;
    const int share = (nvec + G - 1) / G;
    const int first = block * share;
    const int count = min(share, nvec - first);  // vectors of the strip, at least 1 (where)
    const int mine = (rows - group + clusters - 1) / clusters;  // rows of this cluster, at least 1
    const int total = mine * S;                                 // steps, below 2^31

    // the next copy (thread 0 only): step `fill_step` of row `fill_row`, and how many are still to come
    int fill_left = total;
    const T_x* fill_row = x + int64_t(group) * cols + int64_t(first) * W;
    int fill_step = 0;
    auto fill = [&](int slot) {
        if (fill_left > 0) {
            const int n = min(max(count - fill_step * int(STEPVECS), 0), int(STEPVECS));
            if (n > 0) {
                mbarrier_arrive_expect(&full[slot], uint32_t(n) * 16);
                bulk_load(ring + slot * STEPVECS, fill_row + fill_step * (int(STEPVECS) * W), uint32_t(n) * 16, &full[slot]);
            } else {
                mbarrier_arrive(&full[slot]);
            }
            --fill_left;
            if (++fill_step == S) {
                fill_step = 0;
                fill_row += int64_t(clusters) * cols;
            }
        }
    };

    if (tid == 0) {
        for (int s = 0; s < SLOTS; ++s) mbarrier_init(&full[s], 1);
        for (int s = 0; s < R; ++s) {
            mbarrier_init(&merged[s], NW);
            mbarrier_init(&crossed[s], 1);
            mbarrier_init(&ready[s], 32);
        }
        mbarrier_init_fence();
        fence_async_shared();
#pragma unroll 1
        for (int s = 0; s < SLOTS; ++s) fill(s);
    }
    __syncwarp();
    if (G > 1) cluster_sync();
    else __syncthreads();

    if (warp < NW) {
        setmaxnreg_inc<104>();
        Vec<T_weight, W> wv[NV];
        Vec<T_bias, W> bv[NV];
#pragma unroll
        for (int k = 0; k < NV; ++k)
            if (tid + k * NT < count) {
                if (HAS_WEIGHT) wv[k] = load_vec<W>(weight + (int64_t(first) + tid + k * NT) * W);
                if (HAS_BIAS) bv[k] = load_vec<W>(bias + (int64_t(first) + tid + k * NT) * W);
            }
        // statistics of the row that is arriving: sums of x - K and its square
        float K = 0.f, s = 0.f, q = 0.f;
        int in = 0;  // slot of the next step of statistics
        uint32_t in_phase = 0;
        int row_in = 0;  // rows whose statistics are complete
        auto statistics = [&](int p) {  // step p of the row
            mbarrier_wait(&full[in], in_phase);
            const Vec<T_x, W>* from = ring + in * STEPVECS + tid;
            if (p == 0) K = s = q = 0.f;
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (tid + (2 * p + i) * NT < count) {
                    const Vec<T_x, W> v = from[i * NT];
                    float a[W];
#pragma unroll
                    for (int j = 0; j < W; ++j) a[j] = to_float(v[j]);
                    if (p == 0 && i == 0) K = Tree<W>::sum(a) * (1.f / W);
                    float e0 = 0.f, e1 = 0.f;
#pragma unroll
                    for (int j = 0; j < W; j += 2) {
                        a[j] -= K;
                        a[j + 1] -= K;
                        e0 = fmaf(a[j], a[j], e0);
                        e1 = fmaf(a[j + 1], a[j + 1], e1);
                    }
                    s += Tree<W>::sum(a);
                    q += e0 + e1;
                }
            if (p == S - 1) {
                double Kd = double(K), sd = double(s), qd = double(q);
                int n = 0;
                if (tid < count) n = (count - tid + NT - 1) / NT * W;
                if (!(q < INFINITY)) {  // float overflowed, or there is a NaN or Inf: once more, in double
                    int slot = in - (S - 1);
                    if (slot < 0) slot += SLOTS;
                    Kd = double(to_float(ring[slot * STEPVECS + tid][0]));
                    sd = qd = 0.0;
#pragma unroll 1
                    for (int k = 0; tid + k * NT < count; ++k) {
                        const T_x* v = &ring[slot * STEPVECS + (k & 1) * NT + tid][0];
#pragma unroll 1
                        for (int j = 0; j < W; ++j) {
                            const double d = double(to_float(v[j])) - Kd;
                            sd += d;
                            qd = fma(d, d, qd);
                        }
                        if ((k & 1) && ++slot == SLOTS) slot = 0;
                    }
                }
                __syncwarp();
                const double K0 = __shfl_sync(0xffffffffu, Kd, 0);
                if (n > 0) {
                    const double d = Kd - K0, nd = double(n) * d;
                    qd = fma(d, nd + 2.0 * sd, qd);
                    sd += nd;
                }
                sd = warp_sum(sd);
                qd = warp_sum(qd);
                if (lane == 0) {
                    Sums& to = from_warp[row_in % R][warp];
                    to.K = K0;
                    to.s = sd;
                    to.q = qd;
                    mbarrier_arrive(&merged[row_in % R]);
                }
                ++row_in;
            }
            if (++in == SLOTS) {
                in = 0;
                in_phase ^= 1;
            }
        };

#pragma unroll 1
        for (int t = 0; t < LAG; ++t)
            if (t < total) statistics(t % S);

        int out = 0;  // slot of the step to normalise
        int left = total - LAG;  // steps whose statistics are to come
        T_y* dst = y + int64_t(group) * cols + int64_t(first) * W;
#pragma unroll 1
        for (int r = 0; r < mine; ++r) {
            float4 st = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int k = 0; k < S; ++k) {
                Vec<T_x, W> v[2];
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    if (tid + (2 * k + i) * NT < count) v[i] = ring[out * STEPVECS + i * NT + tid];
                barrier_sync(1, NT);  // the slot is read by all
                if (tid == 0) fill(out);
                if (++out == SLOTS) out = 0;
                if (k == 0) {
                    mbarrier_wait(&ready[r % R], uint32_t(r / R) & 1);
                    st = stat[r % R];
                }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int m = 2 * k + i;
                    if (tid + m * NT < count) {
                        Vec<T_y, W> o;
                        stay_packed(v[i]);
                        if (HAS_WEIGHT) stay_packed(wv[m]);
                        if (HAS_BIAS) stay_packed(bv[m]);
#pragma unroll
                        for (int j = 0; j < W; j += 2) {
                            float z[2];
#pragma unroll
                            for (int h = 0; h < 2; ++h)
                                z[h] = affine(fmaf(to_float(v[i][j + h]) - st.x, st.y, st.z), HAS_WEIGHT ? to_float(wv[m][j + h]) : 1.f,
                                              HAS_BIAS ? to_float(bv[m][j + h]) : 0.f);
                            put2(&o[j], z[0], z[1]);
                        }
                        T_y* to = dst + (tid + m * NT) * W;
                        if constexpr (sizeof(o) == 16) __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&o));
                        else store_vec<W>(to, o);
                    }
                }
                if (left > 0) statistics((k + D) % S);
                --left;
            }
            dst += int64_t(clusters) * cols;
        }
    } else {
        setmaxnreg_dec<64>();
        if (warp == NW) {
            // elements of warp `lane` of this block, and of block `lane` of the cluster
            const int v_warp = count / NT * 32 + min(max(count % NT - 32 * lane, 0), 32);
            const double n_warp = lane < NW ? double(v_warp) * W : 0.0, n_here = double(count) * W;
            const double n_block = lane < G ? double(min(share, nvec - lane * share)) * W : 0.0;
            const double inv_warp = n_warp > 0.0 ? 1.0 / n_warp : 0.0, inv_block = n_block > 0.0 ? 1.0 / n_block : 0.0;
            const double inv_here = 1.0 / n_here, inv_all = 1.0 / double(cols);
#pragma unroll 1
            for (int r = 0; r < mine; ++r) {
                const int slot = r % R;
                const uint32_t phase = uint32_t(r / R) & 1;
                if (G > 1 && lane == 0) mbarrier_arrive_expect(&crossed[slot], G * 16);
                mbarrier_wait(&merged[slot], phase);
                double sum = 0.0, m2 = 0.0;
                if (n_warp > 0.0) {
                    const Sums a = from_warp[slot][lane];
                    sum = fma(n_warp, a.K, a.s);
                    m2 = a.q - a.s * (a.s * inv_warp);
                    if (m2 < 0.0) m2 = 0.0;  // NaN stays
                }
                double sum_here = warp_sum(sum);
                {
                    const double d = n_warp > 0.0 ? sum * inv_warp - sum_here * inv_here : 0.0;
                    m2 = warp_sum(fma(n_warp * d, d, m2));
                }
                if (G > 1) {
                    if (lane < G) send(&from_block[slot][block], sum_here, m2, &crossed[slot], lane);
                    mbarrier_wait_cluster(&crossed[slot], phase);
                    double sum_block = 0.0, dev = 0.0;
                    if (lane < G) {
                        const double2 a = from_block[slot][lane];
                        sum_block = a.x;
                        dev = a.y;
                    }
                    sum_here = warp_sum(sum_block);
                    const double d = lane < G ? sum_block * inv_block - sum_here * inv_all : 0.0;
                    m2 = warp_sum(fma(n_block * d, d, dev));
                }
                const double md = sum_here * inv_all;
                const double rd = 1.0 / sqrt(m2 * inv_all + double(EPSILON));
                const float hi = fabs(md) < double(INFINITY) ? float(md) : NAN;
                const float f = float(rd);
                if (lane == 0) {
                    stat[slot] = make_float4(hi, f, float(-(md - double(hi)) * rd), 0.f);
                    if (block == 0) {
                        const int64_t row = group + int64_t(r) * clusters;
                        if (HAS_MEAN) mean[row] = from_float<T_mean>(hi);
                        if (HAS_RSTD) rstd[row] = from_float<T_rstd>(f);
                    }
                }
                mbarrier_arrive(&ready[slot]);  // every lane: it has read from_warp and from_block
            }
        }
    }
    __syncwarp();
    if (G > 1) {  // nobody leaves while another may still send to it
        asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
    }
}
