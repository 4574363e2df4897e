/*---
implements = "layer_norm"
target     = "cuda"
dtypes     = ["float32"]
where      = ["device.arch == 90", "device.smem_per_block >= 232448", "device.sms <= 160",
              "x.ndim == 4", "y.ndim == 4", "weight.ndim == 3", "bias.ndim == 3", "weight.numel == cols", "bias.numel == cols", "cols % 4 == 0",
              "x.stride[3] == 1", "x.stride[2] == x.shape[3]", "x.stride[1] == x.shape[2] * x.shape[3]", "x.stride[0] == cols",
              "y.stride[3] == 1", "y.stride[2] == x.shape[3]", "y.stride[1] == x.shape[2] * x.shape[3]", "y.stride[0] == cols",
              "weight.stride[2] == 1", "weight.stride[1] == x.shape[3]", "weight.stride[0] == x.shape[2] * x.shape[3]",
              "bias.stride[2] == 1", "bias.stride[1] == x.shape[3]", "bias.stride[0] == x.shape[2] * x.shape[3]",
              "rows >= 1", "cols >= 4", "vecs < 2147483647", "rows * device.sms < 2147483647", "chunks <= sms * 32", "XR * 2 <= 24"]
dims       = { rows = "x.shape[0]", cols = "x.shape[1] * x.shape[2] * x.shape[3]", vecs = "cols // 4", chunks = "ceil_div(vecs, 256)", sms = "device.sms", rounds = "vecs // (256 * RUN * sms)" }
static     = ["sms", "rounds"]
tune       = { XR = [9, 11], RUN = [2, 4] }
align      = 16
[[workspace]]
name  = "slots"
dtype = "float64"
shape = ["rows", "device.sms", "2"]
zero  = true
[[launch]]
kernel = "layer_norm"
grid   = ["device.sms"]
block  = ["384"]
smem   = "56 * 256 * 16"
cooperative = true
args   = ["x", "weight", "bias", "y", "slots", "rows", "cols", "vecs", "eps"]
---*/
// Layer norm over very long rows, the whole grid on one row at a time, warp-specialised. A row is cut into pieces of APPLY float4 (4 KB), dealt
// out to the blocks in rounds: first ROUNDS rounds of RUN adjacent pieces a block, then what is left (less than one such round) piece by piece, so
// that blocks differ by one piece at most, and the grid reads one dense front of the row and writes another. A block has at most VPT pieces.
// GROUP pieces make a unit. The "apply" warps hold the current row in registers (VPT float4 a thread). A producer
// thread streams x through a ring of XR units in shared memory by bulk copies. Three "stats" warps sum every
// unit as it lands, publish the block's sums and gather those of the grid, while the ring goes on filling with the row after. The apply warps
// write piece j of a row, then refill its registers with piece j of the next row from the ring. Weight and a part of bias stay on the
// multiprocessor for the whole kernel; the other pieces of bias come from L2, PF of them ahead in registers.
// The ring: unit n of the block (n counts on over all rows) lies in slot n % XR and is its load number n / XR. EVERY thread that reads a slot arrives
// on its `empty` (APPLY + STATS arrivals a phase), once a unit, with an address that depends on the values loaded: no arrival can
// be on its way before the thread's last read of the slot has returned. The producer waits for phase n / XR - 1 before load n / XR.
// Moments: sums of d = x - pivot and d * d in double, the pivot being the row's first element in every block. A pivot out of the row bounds the
// cancellation in sum(d * d) - sum(d)^2 / n: sum(d * d) <= (n + 1) * m2, so m2 is good to about n * 2^-53 (5e-10 for 4 million elements) whatever the data.

enum : int { APPLY = 256, VPT = 32 };       // threads that apply, and pieces of a row, at most
enum : int { GROUP = 2 };
static_assert(RUN % GROUP == 0 && ROUNDS * RUN <= VPT, "");
enum : int { UNIT = GROUP * APPLY };         // float4 in a unit
enum : int { STATS = 96, STATS_WARPS = STATS / 32 };
enum : int { PER_STATS = (UNIT + STATS - 1) / STATS };  // float4 of a unit that a stats thread sums
enum : int { SLOTS = 56 };                   // pieces in shared memory
// where piece j of block b begins in a row: offset_of(j), and b * RUN pieces further in the rounds of runs, else b pieces, in float4
__host__ __device__ __forceinline__ constexpr long long offset_of(int j) {
    return j < ROUNDS * RUN ? ((long long)(j / RUN) * SMS * RUN + j % RUN) * APPLY : ((long long)ROUNDS * RUN + (j - ROUNDS * RUN)) * SMS * APPLY;
}
enum : int { REG_BIAS = 5 };                 // pieces of bias in registers
enum : int { SMEM_BIAS = SLOTS - XR * GROUP - VPT };      // pieces of bias in shared memory
enum : int { STREAMED = VPT - SMEM_BIAS - REG_BIAS };     // pieces of bias from L2, spread evenly over the row
enum : int { PF = 4 };                     // streamed pieces of bias under way
enum : int { POLLS = 5 };           // blocks a lane polls: up to 160
enum : int { SUMS = 2 };
static_assert(SMEM_BIAS >= 0 && STREAMED >= PF && STREAMED <= VPT, "");

__host__ __device__ constexpr int streamed_before(int j) { return j * STREAMED / VPT; }
__host__ __device__ constexpr bool is_streamed(int j) { return streamed_before(j + 1) > streamed_before(j); }
__host__ __device__ constexpr int streamed_piece(int k) { return ((k + 1) * VPT + STREAMED - 1) / STREAMED - 1; }
// the other pieces: the first REG_BIAS of them in registers, the rest in shared memory
__host__ __device__ constexpr int kept_before(int j) { return j - streamed_before(j); }

// 1 / n for a positive n, and 1 / sqrt(v) rounded once to float, by Newton steps
__device__ __forceinline__ double inverse(double n) {
    float start;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(start) : "f"(float(n)));
    double r = double(start);
    r = fma(r, fma(-n, r, 1.0), r);
    return fma(r, fma(-n, r, 1.0), r);
}
__device__ __forceinline__ float inverse_sqrt(double v) {
    const float start = rsqrtf(float(v));
    if (!(start > 0.f && start < INFINITY)) return start;  // 0 for an infinite variance, NaN for NaN
    const double r = double(start);
    return float(fma(r * 0.5, fma(-v * r, r, 1.0), r));
}
// a double as a word that is not zero: 0.0 becomes the smallest denormal
__device__ __forceinline__ long long published(double v) {
    const long long bits = __double_as_longlong(v);
    return bits ? bits : 1;
}
// mean as an unevaluated sum of two floats, so that a large mean costs no digits of x - mean
__device__ __forceinline__ float apply1(float x, float hi, float lo, float rstd, float w, float b) {
    return fmaf(((x - hi) - lo) * rstd, w, b);
}
__device__ __forceinline__ float4 apply(float4 x, float hi, float lo, float rstd, float4 w, float4 b) {
    return make_float4(apply1(x.x, hi, lo, rstd, w.x, b.x), apply1(x.y, hi, lo, rstd, w.y, b.y), apply1(x.z, hi, lo, rstd, w.z, b.z),
                       apply1(x.w, hi, lo, rstd, w.w, b.w));
}
__device__ __forceinline__ uint64_t policy_evict_first() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ uint64_t policy_evict_last() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void bulk_load_hint(void* smem, const void* global, uint32_t bytes, uint64_t* barrier, uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(smem_address(smem)), "l"(global), "r"(bytes), "r"(smem_address(barrier)), "l"(policy) : "memory");
}
__device__ __forceinline__ void bulk_prefetch_hint(const void* global, uint32_t bytes, uint64_t policy) {
    asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;" ::"l"(global), "r"(bytes), "l"(policy) : "memory");
}
__device__ __forceinline__ float4 load_hint(const float4* from, uint64_t policy) {  // volatile: stays where it is written
    float4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from), "l"(policy));
    return v;
}
// Arrive once the loads that produced `seen` have returned; `none` is 0, which the compiler does not know.
__device__ __forceinline__ void release(uint64_t* barrier, uint32_t seen, uint32_t none) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier) + (seen & none)) : "memory");
}

extern "C" __global__ void __launch_bounds__(384, 1)
layer_norm(const float* __restrict__ x, const float* __restrict__ weight, const float* __restrict__ bias, float* __restrict__ y,
           double* slots, int rows, long long cols, int vecs, double eps) {
    extern __shared__ __align__(128) float4 smem[];  // XR units of x, VPT pieces of weight, SMEM_BIAS of bias
    __shared__ __align__(8) uint64_t full[XR], empty[XR], kept_full, result_full[2], result_empty[2];
    __shared__ float result[2][4];
    __shared__ double part[2][STATS_WARPS][2];
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int me = int(blockIdx.x);
    const int rest = vecs - ROUNDS * RUN * SMS * APPLY;                  // float4 behind the rounds of runs
    const int all = rest / APPLY + (rest % APPLY != 0);                  // and pieces there, dealt out one by one
    const int extra = all > me ? (all - me - 1) / SMS + 1 : 0;           // this block's: me, me + SMS, ...
    int pieces = ROUNDS * RUN + extra;                                   // pieces of a row in this block
    asm volatile("" : "+r"(pieces));  // its lower bound would make the compiler drop branches and hoist too much
    // float4 of a row in this block, may be 0: only the last piece of the row may be short, and then it is its block's last
    int mine = ROUNDS * RUN * APPLY
             + (extra ? (extra - 1) * APPLY + int(min((long long)APPLY, rest - ((long long)(extra - 1) * SMS + me) * APPLY)) : 0);
    asm volatile("" : "+r"(mine));
    const int filled = (mine + UNIT - 1) / UNIT;                         // units of a row in this block
    // piece j of the block begins at (float4)
    const long long in_runs = (long long)me * (RUN * APPLY), single = (long long)me * APPLY;
    auto begin_of = [&](int j) { return (j < ROUNDS * RUN ? in_runs : single) + offset_of(j); };
    const long long pitch = cols / 4;
    const uint32_t none = uint32_t(rows) >> 31;
    float4* const kept = smem + XR * UNIT;

    if (tid == 0) {
        for (int i = 0; i < XR; ++i) {
            mbarrier_init(&full[i], 1);
            mbarrier_init(&empty[i], APPLY + STATS);
        }
        mbarrier_init(&kept_full, 1);
        for (int i = 0; i < 2; ++i) {
            mbarrier_init(&result_full[i], 1);
            mbarrier_init(&result_empty[i], APPLY);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (warp >= APPLY / 32) {
        setmaxnreg_dec<72>();
        if (warp == APPLY / 32) {
            // ---- producer: one thread
            if (lane == 0) {
                const uint64_t once = policy_evict_first(), stay = policy_evict_last();
                int slot = 0;
                uint32_t phase = 1;  // nothing to wait for in the first round
                const float4* from = reinterpret_cast<const float4*>(x);
#pragma unroll 1
                for (int row = 0; row < rows; ++row) {
#pragma unroll 1
                    for (int u = 0; u < filled; ++u) {
                        const uint32_t bytes = 16u * uint32_t(min(UNIT, mine - u * UNIT));
                        mbarrier_wait(&empty[slot], phase);
                        mbarrier_arrive_expect(&full[slot], bytes);
                        if (u * GROUP < ROUNDS * RUN) {  // a unit within a run: contiguous
                            bulk_load_hint(smem + slot * UNIT, from + begin_of(u * GROUP), bytes, &full[slot], once);
                        } else {
#pragma unroll
                            for (int i = 0; i < GROUP; ++i) {  // pieces u * GROUP + i
                                const int left = mine - u * UNIT - i * APPLY;
                                if (left > 0)
                                    bulk_load_hint(smem + slot * UNIT + i * APPLY, from + begin_of(u * GROUP + i), 16u * uint32_t(min(int(APPLY), left)),
                                                   &full[slot], once);
                            }
                        }
                        if (++slot == XR) {
                            slot = 0;
                            phase ^= 1;
                        }
                    }
                    from += pitch;
                    if (row == 0) {  // behind the first row, before the second
                        uint32_t total = 16u * uint32_t(mine);
#pragma unroll 1
                        for (int j = 0; j < pieces; ++j)
                            if (!is_streamed(j) && kept_before(j) >= REG_BIAS) total += 16u * uint32_t(min(APPLY, mine - j * APPLY));
                        mbarrier_arrive_expect(&kept_full, total);
#pragma unroll 1
                        for (int j = 0; j < pieces; ++j) {
                            const uint32_t bytes = 16u * uint32_t(min(APPLY, mine - j * APPLY));
                            bulk_load_hint(kept + j * APPLY, reinterpret_cast<const float4*>(weight) + begin_of(j), bytes, &kept_full, once);
                            if (is_streamed(j)) bulk_prefetch_hint(reinterpret_cast<const float4*>(bias) + begin_of(j), bytes, stay);
                            else if (kept_before(j) >= REG_BIAS)
                                bulk_load_hint(kept + (VPT + kept_before(j) - REG_BIAS) * APPLY, reinterpret_cast<const float4*>(bias) + begin_of(j), bytes, &kept_full, once);
                        }
                    }
                }
            }
        } else {
            // ---- stats: three warps
            const int group = warp - APPLY / 32 - 1, at = group * 32 + lane;
            const double share = inverse(double(cols));
            int slot = 0;
            uint32_t phase = 0;
            float next_pivot = __ldg(x);
#pragma unroll 1
            for (int row = 0; row < rows; ++row) {
                const float pivot = next_pivot;
                const double p = double(pivot);
                if (row + 1 < rows) next_pivot = __ldg(x + (row + 1) * cols);
                double s[SUMS] = {}, q[SUMS] = {};
#pragma unroll 1
                for (int u = 0; u < filled; ++u) {
                    const int valid = min(UNIT, mine - u * UNIT);
                    float4 v[PER_STATS];
                    uint32_t seen = 0;
                    mbarrier_wait(&full[slot], phase);
#pragma unroll
                    for (int i = 0; i < PER_STATS; ++i) {
                        v[i] = make_float4(pivot, pivot, pivot, pivot);
                        if (at + i * STATS < valid) v[i] = smem[slot * UNIT + at + i * STATS];
                    }
#pragma unroll
                    for (int i = 0; i < PER_STATS; ++i) seen |= __float_as_uint(v[i].w);
                    release(&empty[slot], seen, none);
                    if (++slot == XR) {
                        slot = 0;
                        phase ^= 1;
                    }
#pragma unroll
                    for (int i = 0; i < PER_STATS; ++i) {
                        const double d0 = double(v[i].x) - p, d1 = double(v[i].y) - p, d2 = double(v[i].z) - p, d3 = double(v[i].w) - p;
                        s[0] += d0, s[1 % SUMS] += d1, s[2 % SUMS] += d2, s[3 % SUMS] += d3;
                        q[0] = fma(d0, d0, q[0]), q[1 % SUMS] = fma(d1, d1, q[1 % SUMS]);
                        q[2 % SUMS] = fma(d2, d2, q[2 % SUMS]), q[3 % SUMS] = fma(d3, d3, q[3 % SUMS]);
                    }
                }
                double sum = s[0], squares = q[0];
#pragma unroll
                for (int i = 1; i < SUMS; ++i) sum += s[i], squares += q[i];
                sum = warp_sum(sum);
                squares = warp_sum(squares);
                double (&parts)[STATS_WARPS][2] = part[row & 1];
                if (lane == 0) {
                    parts[group][0] = sum;
                    parts[group][1] = squares;
                }
                barrier_sync(1, STATS);
                if (group == 0) {
                    unsigned long long* words = reinterpret_cast<unsigned long long*>(slots) + 2ll * row * gridDim.x;
                    if (lane == 0)
                        asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(words + 2 * blockIdx.x),
                                     "l"(published((parts[0][0] + parts[1][0]) + parts[2][0])),
                                     "l"(published((parts[0][1] + parts[1][1]) + parts[2][1])) : "memory");
                    long long a[POLLS], b[POLLS];
                    bool missing;
                    do {
                        missing = false;
#pragma unroll
                        for (int j = 0; j < POLLS; ++j) {
                            a[j] = b[j] = 1;
                            if (lane + 32 * j < int(gridDim.x))
                                asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
                                             : "=l"(a[j]), "=l"(b[j]) : "l"(words + 2 * (lane + 32 * j)) : "memory");
                        }
#pragma unroll
                        for (int j = 0; j < POLLS; ++j) missing = missing || a[j] == 0 || b[j] == 0;
                    } while (__any_sync(0xffffffffu, missing));
                    sum = squares = 0.0;
#pragma unroll
                    for (int j = 0; j < POLLS; ++j) {
                        sum += __longlong_as_double(a[j]);
                        squares += __longlong_as_double(b[j]);
                    }
                    sum = warp_sum(sum);
                    squares = warp_sum(squares);
                    const double offset = sum * share, mean = p + offset;
                    double m2 = fma(-sum, offset, squares);
                    if (m2 < 0.0) m2 = 0.0;  // NaN stays
                    const float hi = float(mean), lo = float(mean - double(hi));
                    const float rstd = inverse_sqrt(fma(m2, share, eps));
                    if (lane == 0) {
                        mbarrier_wait(&result_empty[row & 1], ((row >> 1) & 1) ^ 1);
                        result[row & 1][0] = hi;
                        result[row & 1][1] = lo;
                        result[row & 1][2] = rstd;
                        mbarrier_arrive(&result_full[row & 1]);
                    }
                    __syncwarp();
                }
            }
        }
    } else {
        // ---- apply
        setmaxnreg_inc<216>();
        const uint64_t stay = policy_evict_last();
        const int count = mine > tid ? (mine - tid + APPLY - 1) / APPLY : 0;  // this thread's vectors: tid + j * APPLY
        const float4* b_runs = reinterpret_cast<const float4*>(bias) + in_runs + tid;
        const float4* b_singles = reinterpret_cast<const float4*>(bias) + single + tid;
        float4* y_to = reinterpret_cast<float4*>(y) + in_runs + tid;
        long long back = single - in_runs;
        const float4* const ring = smem + tid;
        const float4* const here = kept + tid;
        int slot = 0, before = 0;
        uint32_t phase = 0;
        float4 v[VPT];
        // piece j of the next row (j < pieces): the slot of a unit is given back behind the first load from the next unit, the last one at once
        auto take = [&](int j) {
            if (j % GROUP == 0) mbarrier_wait(&full[slot], phase);
            if (j < count) v[j] = ring[slot * UNIT + j % GROUP * APPLY];
            if (j % GROUP == 0 && j > 0) {
                uint32_t seen = 0;
#pragma unroll
                for (int i = 0; i < GROUP; ++i) seen |= __float_as_uint(v[j > 0 ? j - GROUP + i : 0].w);
                release(&empty[before], seen, none);
            }
            const bool last = j + 1 == pieces;
            if (j % GROUP == GROUP - 1 || last) {
                if (last) {
                    uint32_t seen = 0;
#pragma unroll
                    for (int i = 0; i < GROUP; ++i)
                        if (i <= j % GROUP) seen |= __float_as_uint(v[i <= j % GROUP ? j - i : 0].w);
                    release(&empty[slot], seen, none);
                }
                before = slot;
                if (++slot == XR) {
                    slot = 0;
                    phase ^= 1;
                }
            }
        };
#pragma unroll
        for (int j = 0; j < VPT; ++j) {
            v[j] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (j < pieces) take(j);
        }
        float4 own[REG_BIAS];
#pragma unroll
        for (int j = 0; j < VPT; ++j)
            if (!is_streamed(j) && kept_before(j) < REG_BIAS) {
                own[kept_before(j) < REG_BIAS ? kept_before(j) : 0] = make_float4(0.f, 0.f, 0.f, 0.f);
                if (j < count) own[kept_before(j) < REG_BIAS ? kept_before(j) : 0] = load_hint((j < ROUNDS * RUN ? b_runs : b_singles) + offset_of(j), stay);
            }
        mbarrier_wait(&kept_full, 0);
#pragma unroll 1
        for (int row = 0; row < rows; ++row) {
            asm volatile("" : "+l"(b_runs), "+l"(b_singles), "+l"(back));  // nothing computed from them is kept over rows
            const bool more = row + 1 < rows;
            float4 ahead[PF];
#pragma unroll
            for (int k = 0; k < PF; ++k) {
                ahead[k] = make_float4(0.f, 0.f, 0.f, 0.f);
                if (streamed_piece(k) < count) ahead[k] = load_hint((streamed_piece(k) < ROUNDS * RUN ? b_runs : b_singles) + offset_of(streamed_piece(k)), stay);
            }
            mbarrier_wait(&result_full[row & 1], (row >> 1) & 1);
            const float hi = result[row & 1][0], lo = result[row & 1][1], rstd = result[row & 1][2];
            release(&result_empty[row & 1], __float_as_uint(hi) | __float_as_uint(lo) | __float_as_uint(rstd), none);
#pragma unroll
            for (int j = 0; j < VPT; ++j)
                if (j < pieces) {
                    const int k = streamed_before(j);
                    if (j < count) {
                        float4 b;
                        if (is_streamed(j)) b = ahead[k % PF];
                        else if (kept_before(j) < REG_BIAS) b = own[kept_before(j) < REG_BIAS ? kept_before(j) : 0];
                        else b = here[(VPT + kept_before(j) - REG_BIAS) * APPLY];
                        __stcs(y_to + (j < ROUNDS * RUN ? 0 : back) + offset_of(j), apply(v[j], hi, lo, rstd, here[j * APPLY], b));
                    }
                    if (is_streamed(j) && k + PF < STREAMED)
                        if (streamed_piece(k + PF) < count) ahead[k % PF] = load_hint((streamed_piece(k + PF) < ROUNDS * RUN ? b_runs : b_singles) + offset_of(streamed_piece(k + PF)), stay);
                    if (more) take(j);
                }
            y_to += pitch;
        }
    }
}
