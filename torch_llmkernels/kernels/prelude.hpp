// What a CPU kernel may use without writing #include: <cmath>, <cstdint>, <cstring>, <algorithm>, <limits>, vector intrinsics,
// OpenMP pragmas and omp_get_*, and the helpers below. Macros: T, ACC, T_<tensor>, HAS_<NAME>, P_<NAME>, static dims, tunables.
// The code is compiled with -O3 -march=native -fopenmp and without -ffast-math: NaN and Inf behave, reductions vectorise
// under `#pragma omp simd reduction(...)`. A kernel keeps no state: no mutable globals; scratch memory is a [[workspace]].
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// float16: the compiler's own type where it has one (round to nearest even, converts to and from float by assignment)
#if defined(__FLT16_MAX__)
using half = _Float16;
#else
#error "this compiler has no _Float16; use g++ >= 12 or clang++ >= 15"
#endif

// bfloat16: 16 bits of storage, converts to and from float by assignment, rounds to nearest even
struct bfloat16 {
    uint16_t bits;
    bfloat16() = default;
    bfloat16(float value) {
        uint32_t u;
        std::memcpy(&u, &value, 4);
        bits = (u & 0x7fffffffu) > 0x7f800000u ? uint16_t((u >> 16) | 0x40u) : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    }
    operator float() const {
        const uint32_t u = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &u, 4);
        return value;
    }
};

// element type <-> ACC (float, or double for float64)
template <class E> static inline ACC to_acc(E value) { return static_cast<ACC>(value); }
template <> inline ACC to_acc<bfloat16>(bfloat16 value) { return static_cast<ACC>(static_cast<float>(value)); }
template <class E> static inline E from_acc(ACC value) { return static_cast<E>(value); }
template <> inline bfloat16 from_acc<bfloat16>(ACC value) { return bfloat16(static_cast<float>(value)); }
template <class E> static inline float to_float(E value) { return static_cast<float>(value); }
template <class E> static inline E from_float(float value) { return static_cast<E>(value); }

template <class I> static constexpr I ceil_div(I a, I b) { return (a + b - 1) / b; }
