// Vectors of 16 floats in the compiler's vector extension, for loops that it does not vectorise by itself: reductions
// and exponentials. Everything here must be inlined into a function marked SSD_FAST_CLONES. Such a function is compiled
// for AVX-512, AVX2 and the baseline, and the dynamic loader picks one. All three give the same bits unless the file
// allows contraction.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(SSD_FAST_ONE_TARGET)
#define SSD_FAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SSD_FAST_CLONES
#endif
#define SSD_FAST_INLINE inline __attribute__((always_inline))

namespace ssd_fast {

constexpr int64_t kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));

SSD_FAST_INLINE Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

SSD_FAST_INLINE void store(float* to, Floats values) {
  std::memcpy(to, &values, sizeof values);
}

// Like MAXPS and MINPS, these return the second argument if either one is NaN.
SSD_FAST_INLINE Floats larger(Floats a, Floats b) {
  return a > b ? a : b;
}

SSD_FAST_INLINE Floats smaller(Floats a, Floats b) {
  return a < b ? a : b;
}

// Reduces all lanes with combine(a, b), always in the same order. combine takes vectors of 8 or 4 floats, or floats.
template <typename Combine>
SSD_FAST_INLINE float reduce(Floats values, Combine combine) {
  using Half = float __attribute__((vector_size(2 * kLanes)));
  using Quarter = float __attribute__((vector_size(kLanes)));
  Half halves[2];
  std::memcpy(halves, &values, sizeof values);
  const Half half = combine(halves[0], halves[1]);
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof half);
  const Quarter four = combine(quarters[0], quarters[1]);
  return combine(combine(four[0], four[1]), combine(four[2], four[3]));
}

SSD_FAST_INLINE float largest(Floats values) {
  return reduce(values, [](auto a, auto b) { return a > b ? a : b; });
}

SSD_FAST_INLINE float sum(Floats values) {
  return reduce(values, [](auto a, auto b) { return a + b; });
}

// exp(x) for x <= 0, to about 1 ulp. It is 0 below -87.7, where float32 leaves its normal range, and NaN for NaN.
// exp(x) = 2^n exp(r) with n = round(x / ln 2) and exp(r) = 1 + r + r^2 q(r), where q is the minimax polynomial for
// |r| <= ln(2) / 2.
SSD_FAST_INLINE Floats exp_nonpositive(Floats x) {
  const Floats zero = {};
  const float rounder = 12582912.0f + 127.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  x = larger(zero - 88.0f, x);
  const Floats shifted = x * 1.44269504f + rounder;  // low bits: n + 127, the exponent of 2^n; 0 for n = -127
  const Floats n = shifted - rounder;
  const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats q = r * 1.381461276e-3f + 8.368710056e-3f;
  q = q * r + 4.166838899e-2f;
  q = q * r + 1.666652113e-1f;
  q = q * r + 4.999999404e-1f;
  const Floats exp_r = q * (r * r) + r + 1.0f;
  return exp_r * reinterpret_cast<Floats>(reinterpret_cast<Ints>(shifted) << 23);
}

// log(x) for x >= 1, finite or NaN, to about 2 ulp. x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and
// log(1 + f) = f - f^2 / 2 + f^3 p(f), where p is a minimax polynomial.
SSD_FAST_INLINE Floats log_from_one(Floats x) {
  const Floats one = Floats{} + 1.0f;
  const Ints bits = reinterpret_cast<Ints>(x);
  const Ints exponent = (bits - 0x3f3504f3) >> 23;  // counted from sqrt(1/2)
  const Floats f = reinterpret_cast<Floats>(bits - (exponent << 23)) - one;
  const Floats n = __builtin_convertvector(exponent, Floats);
  Floats p = f * 8.700437844e-2f - 1.426748782e-1f;
  p = p * f + 1.491476744e-1f;
  p = p * f - 1.657758504e-1f;
  p = p * f + 1.996306330e-1f;
  p = p * f - 2.500133812e-1f;
  p = p * f + 3.333390951e-1f;
  const Floats f2 = f * f;
  const Floats result = n * 0.693359375f + (p * (f2 * f) - f2 * 0.5f + f - n * 2.12194440e-4f);
  return x == x ? result : x;
}

// The last, incomplete vector of a row of at least kLanes values. Lanes that earlier vectors covered hold `filler`.
SSD_FAST_INLINE Floats load_rest(const float* row, int64_t size, float filler) {
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Floats zero = {};
  const int32_t covered = static_cast<int32_t>(kLanes - size % kLanes);
  return lane >= covered ? load(row + size - kLanes) : zero + filler;
}

}  // namespace ssd_fast
