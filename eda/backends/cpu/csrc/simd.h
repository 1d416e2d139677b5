// Vectors of 16 floats on whatever registers the processor has, so that all machines lay weights out the same way.
//
// Each `simd_*.h` gives `Machine`: its own register and what can be done with it. `-DEDA_SCALAR` takes the plain one anywhere.
// Sums over lanes run in one order on every machine, and multiplications and additions join only where `fma` says so
// (`-ffp-contract=off`): machines without products of bfloat16 give the same bits.
#pragma once

#if defined(EDA_SCALAR)
#include "simd_scalar.h"
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#elif defined(__aarch64__)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

typedef uint16_t bf16;

constexpr int WIDTH = 16;                         // floats in a vector
constexpr int PARTS = WIDTH / Machine::LANES;     // registers in it

struct Floats {
  Machine::Floats part[PARTS];
};
struct Mask {
  Machine::Mask part[PARTS];
};

#define EDA_EACH_PART for (int i = 0; i < PARTS; ++i)

inline Floats splat(float x) {
  Floats v;
  EDA_EACH_PART v.part[i] = Machine::splat(x);
  return v;
}
inline Floats zeros() { return splat(0.0f); }
inline Floats load(const float* p) {
  Floats v;
  EDA_EACH_PART v.part[i] = Machine::load(p + i * Machine::LANES);
  return v;
}
inline void store(float* p, const Floats& v) { EDA_EACH_PART Machine::store(p + i * Machine::LANES, v.part[i]); }

#define EDA_BINARY(name, function)                                             \
  inline Floats name(const Floats& a, const Floats& b) {                       \
    Floats v;                                                                  \
    EDA_EACH_PART v.part[i] = Machine::function(a.part[i], b.part[i]);         \
    return v;                                                                  \
  }
EDA_BINARY(operator+, add)
EDA_BINARY(operator-, sub)
EDA_BINARY(operator*, mul)
EDA_BINARY(operator/, div)
EDA_BINARY(larger, max)
EDA_BINARY(scale_by_power, scale)  // a * 2^b for whole numbers b
#undef EDA_BINARY

// a * b + c, and c - a * b, each rounded once.
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  Floats v;
  EDA_EACH_PART v.part[i] = Machine::fma(a.part[i], b.part[i], c.part[i]);
  return v;
}
inline Floats fnma(const Floats& a, const Floats& b, const Floats& c) {
  Floats v;
  EDA_EACH_PART v.part[i] = Machine::fnma(a.part[i], b.part[i], c.part[i]);
  return v;
}
inline Floats rounded(const Floats& a) {
  Floats v;
  EDA_EACH_PART v.part[i] = Machine::round(a.part[i]);
  return v;
}

#define EDA_COMPARISON(name, function)                                         \
  inline Mask name(const Floats& a, const Floats& b) {                         \
    Mask mask;                                                                 \
    EDA_EACH_PART mask.part[i] = Machine::function(a.part[i], b.part[i]);      \
    return mask;                                                               \
  }
EDA_COMPARISON(operator>, greater)
EDA_COMPARISON(operator>=, at_least)
EDA_COMPARISON(operator==, equal)
#undef EDA_COMPARISON

// Zero where the mask is not set, and where it is.
inline Floats kept(const Mask& mask, const Floats& a) {
  Floats v;
  EDA_EACH_PART v.part[i] = Machine::kept(mask.part[i], a.part[i]);
  return v;
}
inline Floats cleared(const Mask& mask, const Floats& a) {
  Floats v;
  EDA_EACH_PART v.part[i] = Machine::cleared(mask.part[i], a.part[i]);
  return v;
}
inline uint32_t bits(const Mask& mask) {
  uint32_t found = 0;
  EDA_EACH_PART found |= Machine::bits(mask.part[i]) << (i * Machine::LANES);
  return found;
}

inline Floats load_bf16(const bf16* p) {
  Floats v;
  EDA_EACH_PART v.part[i] = Machine::from_bf16(p + i * Machine::LANES);
  return v;
}
inline void store_bf16(bf16* p, const Floats& v) { EDA_EACH_PART Machine::to_bf16(p + i * Machine::LANES, v.part[i]); }

// The first `count` floats at `p`, `fill` in the lanes behind them; and the other way round.
inline Floats load_first(const float* p, int count, float fill = 0.0f) {
  if (count >= WIDTH) return load(p);
#if EDA_AVX512
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), __mmask16((1u << count) - 1), p)};
#else
  float line[WIDTH];
  for (int i = 0; i < WIDTH; ++i) line[i] = i < count ? p[i] : fill;
  return load(line);
#endif
}
inline void store_first(float* p, const Floats& v, int count) {
  if (count >= WIDTH) return store(p, v);
  float line[WIDTH];
  store(line, v);
  std::memcpy(p, line, count * sizeof(float));
}

// The sum of all lanes: those 8 apart first, then 4, 2 and 1 apart. And the largest lane.
inline float sum(Floats v) {
  for (int apart = PARTS / 2; apart; apart /= 2)
    for (int i = 0; i < apart; ++i) v.part[i] = Machine::add(v.part[i], v.part[i + apart]);
  return Machine::sum(v.part[0]);
}
inline float largest(Floats v) {
  for (int i = 1; i < PARTS; ++i) v.part[0] = Machine::max(v.part[0], v.part[i]);
  return Machine::largest(v.part[0]);
}

// The largest of `count` floats at `p`; NaN where one of them is NaN.
inline float largest(const float* p, int count) {
  Floats best = splat(-INFINITY);
  uint32_t sound = 0xffff;
  for (int first = 0; first < count; first += WIDTH) {
    const Floats part = load_first(p + first, count - first, -INFINITY);
    best = larger(best, part);
    sound &= bits(part == part);
  }
  return sound == 0xffff ? largest(best) : NAN;
}

// The sums of the lanes of 16 vectors, as the lanes of one. In each four lanes (0 + 2) + (1 + 3), then the fours likewise
// in order: (first + second) + (third + fourth).
inline Floats sum_lanes(const Floats (&v)[16]) {
  Floats sums;
  Machine::sum_lanes(v, sums);
  return sums;
}

// Sums in float64: a vocabulary's worth of small terms would otherwise lose what they are to be compared by.
class Total {
 public:
#if EDA_AVX512
  void add(const Floats& v) {
    low_ = _mm512_add_pd(low_, _mm512_cvtps_pd(_mm512_castps512_ps256(v.part[0])));
    high_ = _mm512_add_pd(high_, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v.part[0], 1)));
  }
  double value() const { return _mm512_reduce_add_pd(_mm512_add_pd(low_, high_)); }

 private:
  __m512d low_ = _mm512_setzero_pd(), high_ = _mm512_setzero_pd();
#else
  void add(const Floats& v) {
    float line[WIDTH];
    store(line, v);
    for (int i = 0; i < WIDTH; ++i) lanes_[i] += double(line[i]);
  }
  double value() const {
    double line[WIDTH];
    std::memcpy(line, lanes_, sizeof(line));
    for (int apart = WIDTH / 2; apart; apart /= 2)
      for (int i = 0; i < apart; ++i) line[i] += line[i + apart];
    return line[0];
  }

 private:
  double lanes_[WIDTH] = {};
#endif
};

// 32 values of bfloat16 and their products with 32 others, added to the lanes of `sums`.
#if EDA_BF16_PRODUCTS
struct Pairs {
  __m512bh values;
};
inline Pairs load_pairs(const bf16* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
inline Floats add_products(const Floats& sums, const Pairs& a, const bf16* b) {
  return {_mm512_dpbf16_ps(sums.part[0], a.values, (__m512bh)_mm512_loadu_si512(b))};
}
#else
struct Pairs {
  Floats low, high;
};
inline Pairs load_pairs(const bf16* p) { return {load_bf16(p), load_bf16(p + WIDTH)}; }
inline Floats add_products(const Floats& sums, const Pairs& a, const bf16* b) {
  return fma(a.high, load_bf16(b + WIDTH), fma(a.low, load_bf16(b), sums));
}
#endif

// exp for inputs up to about 88; below -87 the result is 0 (also for -inf).
inline Floats exp(Floats x) {
  const Mask live = x > splat(-87.0f);
  x = kept(live, x);
  const Floats n = rounded(x * splat(1.44269504f));
  Floats r = fnma(n, splat(0.693359375f), x);
  r = fnma(n, splat(-2.12194440e-4f), r);
  Floats y = splat(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fma(y, r, splat(c));
  return kept(live, scale_by_power(y, n));
}

inline Floats silu(const Floats& x) {
  const Floats e = exp(zeros() - larger(x, splat(-80.0f)));  // the limit keeps exp(-x) finite
  return x / (splat(1.0f) + e);
}

}  // namespace
