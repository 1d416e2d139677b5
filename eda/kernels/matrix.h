// Products with bfloat16 weights (AVX512-BF16), and the element-wise functions around them.
//
// Every output element is summed over the inner axis in one fixed order, whatever else is in the batch. So a token's
// result does not depend on how many others share the pass: a verified draft gives bit for bit what plain decoding gives.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint16_t bf16;

inline bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline __m512 load_bf16(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

inline void store_bf16(bf16* p, __m512 value) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(value));
}

// exp for inputs up to about 88; below -87 the result is 0 (also for -inf).
inline __m512 exp_ps(__m512 x) {
  const __mmask16 live = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
  x = _mm512_maskz_mov_ps(live, x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_maskz_scalef_ps(live, y, n);
}

// The largest of `count` values; NaN where one of them is NaN.
inline float largest(const float* values, int count) {
  const __m512 lowest = _mm512_set1_ps(-INFINITY);
  __m512 best = lowest;
  __mmask16 odd = 0;
  for (int first = 0; first < count; first += 16) {
    const __mmask16 live = __mmask16((1u << std::min(16, count - first)) - 1);
    const __m512 part = _mm512_mask_loadu_ps(lowest, live, values + first);
    best = _mm512_max_ps(best, part);
    odd = __mmask16(odd | _mm512_cmp_ps_mask(part, part, _CMP_UNORD_Q));
  }
  return odd ? NAN : _mm512_reduce_max_ps(best);
}

inline __m512 silu_ps(__m512 x) {
  const __m512 floor = _mm512_max_ps(x, _mm512_set1_ps(-80.0f));  // keeps exp(-x) finite
  const __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), floor));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

// A weight [n, k] laid out for `multiply`: blocks of `16 * tiles` outputs, in each block pairs of inputs, in each pair
// the outputs' two values side by side. `n` and `k` are padded with zeros to whole blocks and pairs.
//
// Without `scales` values are bfloat16. With them they are bytes, each of 7 bits: a value is (byte - 64) * scales[output].
struct Packed {
  const void* data;
  int32_t n, k, tiles, unused;
  const float* scales;
};

template <int ROWS, int TILES>
inline void multiply_tile(const bf16* a, int64_t a_stride, const bf16* b, int pairs, __m512 (&sum)[ROWS][TILES]) {
  for (int pair = 0; pair < pairs; ++pair) {
    for (int t = 0; t < TILES; ++t) _mm_prefetch((const char*)(b + ((pair + 64) * TILES + t) * 32), _MM_HINT_T0);
    __m512bh weights[TILES];
    for (int t = 0; t < TILES; ++t) weights[t] = (__m512bh)_mm512_loadu_si512(b + (pair * TILES + t) * 32);
    for (int r = 0; r < ROWS; ++r) {
      int32_t two;
      std::memcpy(&two, a + r * a_stride + 2 * pair, 4);
      const __m512bh given = (__m512bh)_mm512_set1_epi32(two);
      for (int t = 0; t < TILES; ++t) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], weights[t], given);
    }
  }
}

// The same for a weight of bytes, which takes half the memory traffic. A byte below 128 in the low bits of bfloat16's 128
// makes 128 + byte, so a vector of weights is an extension and an or; what all weights have too much of comes off the
// sum once, as a multiple of the inputs' sum.
template <int ROWS, int TILES>
inline void multiply_tile(const bf16* a, int64_t a_stride, const uint8_t* b, int pairs, const float* scales,
                          __m512 (&sum)[ROWS][TILES]) {
  const __m512i base = _mm512_set1_epi16(0x4300);
  for (int pair = 0; pair < pairs; ++pair) {
    for (int t = 0; t < TILES; t += 2) _mm_prefetch((const char*)(b + ((pair + 64) * TILES + t) * 32), _MM_HINT_T0);
    __m512bh weights[TILES];
    for (int t = 0; t < TILES; ++t) {
      const __m256i bytes = _mm256_loadu_si256((const __m256i*)(b + (pair * TILES + t) * 32));
      weights[t] = (__m512bh)_mm512_or_si512(_mm512_cvtepu8_epi16(bytes), base);
    }
    for (int r = 0; r < ROWS; ++r) {
      int32_t two;
      std::memcpy(&two, a + r * a_stride + 2 * pair, 4);
      const __m512bh given = (__m512bh)_mm512_set1_epi32(two);
      for (int t = 0; t < TILES; ++t) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], weights[t], given);
    }
  }
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int r = 0; r < ROWS; ++r) {
    __m512 inputs = _mm512_setzero_ps();
    for (int pair = 0; pair < pairs; pair += 16) {
      const __mmask16 live = __mmask16((1u << std::min(16, pairs - pair)) - 1);
      inputs = _mm512_dpbf16_ps(inputs, ones, (__m512bh)_mm512_maskz_loadu_epi32(live, a + r * a_stride + 2 * pair));
    }
    const __m512 excess = _mm512_set1_ps((128.0f + 64.0f) * _mm512_reduce_add_ps(inputs));
    for (int t = 0; t < TILES; ++t)
      sum[r][t] = _mm512_mul_ps(_mm512_sub_ps(sum[r][t], excess), _mm512_loadu_ps(scales + 16 * t));
  }
}

// One term of a sum of products: rows `a` (bfloat16, `stride` apart) times `weight`. Only the first may be of bytes.
struct Term {
  const bf16* a;
  int64_t stride;
  const Packed* weight;
};

template <int ROWS, int TILES, class Finish>
inline void multiply_rows(const Term* terms, int num_terms, int row, int block, const Finish& finish) {
  __m512 sum[ROWS][TILES];
  for (auto& line : sum) for (auto& part : line) part = _mm512_setzero_ps();
  for (int i = 0; i < num_terms; ++i) {
    const Packed& weight = *terms[i].weight;
    const bf16* a = terms[i].a + row * terms[i].stride;
    const int64_t first = int64_t(block) * (weight.k / 2) * (TILES * 32);
    if (weight.scales)
      multiply_tile<ROWS, TILES>(a, terms[i].stride, static_cast<const uint8_t*>(weight.data) + first, weight.k / 2,
                                 weight.scales + block * 16 * TILES, sum);
    else
      multiply_tile<ROWS, TILES>(a, terms[i].stride, static_cast<const bf16*>(weight.data) + first, weight.k / 2, sum);
  }
  for (int r = 0; r < ROWS; ++r) finish(row + r, block, sum[r]);
}

// Rows `start` to `end` of the terms' sum, for one block of outputs; `finish(row, block, sums[TILES])` takes each row.
template <int TILES, class Finish>
inline void multiply(const Term* terms, int num_terms, int start, int end, int block, const Finish& finish) {
  // Seven rows still fit the registers, but only pay where they save a second tile.
  const int count = end - start, tiles = count == 7 ? 1 : (count + 5) / 6;
  for (int tile = 0, row = start; tile < tiles; ++tile) {
    const int rows = (count - (row - start) + (tiles - tile) - 1) / (tiles - tile);
    switch (rows) {
      case 1: multiply_rows<1, TILES>(terms, num_terms, row, block, finish); break;
      case 2: multiply_rows<2, TILES>(terms, num_terms, row, block, finish); break;
      case 3: multiply_rows<3, TILES>(terms, num_terms, row, block, finish); break;
      case 4: multiply_rows<4, TILES>(terms, num_terms, row, block, finish); break;
      case 5: multiply_rows<5, TILES>(terms, num_terms, row, block, finish); break;
      case 6: multiply_rows<6, TILES>(terms, num_terms, row, block, finish); break;
      default: multiply_rows<7, TILES>(terms, num_terms, row, block, finish); break;
    }
    row += rows;
  }
}

// Root-mean-square norm of `size` values (a multiple of 16) at `x`, times `weight`, in bfloat16 and/or float32.
inline void rms_norm(const float* x, const float* weight, int size, float eps, bf16* out, float* out_float = nullptr) {
  __m512 squares = _mm512_setzero_ps();
  for (int i = 0; i < size; i += 16) {
    const __m512 part = _mm512_loadu_ps(x + i);
    squares = _mm512_fmadd_ps(part, part, squares);
  }
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / size + eps));
  for (int i = 0; i < size; i += 16) {
    const __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), scale), _mm512_loadu_ps(weight + i));
    if (out) store_bf16(out + i, y);
    if (out_float) _mm512_storeu_ps(out_float + i, y);
  }
}
