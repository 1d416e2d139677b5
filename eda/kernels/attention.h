// Attention of one token over the key/value cache: softmax of scaled dot products, in float32 over bfloat16 keys.
#pragma once

#include "matrix.h"

// The keys that a token sees: the first `num_leading` slots of its sequence and those in `extra` (its ancestors in a
// draft tree), in this order. Offsets count from the sequence's first slot.
struct Visible {
  int64_t first_slot;
  int32_t num_leading, num_extra;
  const int32_t* extra;
  int32_t count() const { return num_leading + num_extra; }
  int64_t slot(int32_t index) const {
    return first_slot + (index < num_leading ? index : extra[index - num_leading]);
  }
};

// The sums of the lanes of 16 vectors, as the lanes of one.
inline __m512 sum_lanes(const __m512 (&v)[16]) {
  __m512 a[8], b[4];
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d low = _mm512_castps_pd(a[2 * i]), high = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
  const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
  const __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
}

// `HEADS` query heads that share the keys and values at `keys`, `values` (`[slots, 32 * HALVES]`, one key head).
// `queries` and `out` are `[HEADS, 32 * HALVES]`; `scores` has room for HEADS * (count rounded up to 16) floats.
template <int HEADS, int HALVES>
void attend(const bf16* queries, const bf16* keys, const bf16* values, const Visible& seen, float scale,
            float* scores, bf16* out) {
  constexpr int SIZE = 32 * HALVES;
  const int count = seen.count(), padded = (count + 15) & ~15;
  float best[HEADS];
  for (int h = 0; h < HEADS; ++h) best[h] = -INFINITY;
  for (int first = 0; first < count; first += 16) {
    const bf16* rows[16];
    // Behind the last key the block repeats it; its lanes are masked.
    for (int i = 0; i < 16; ++i) rows[i] = keys + seen.slot(std::min(first + i, count - 1)) * SIZE;
    const __mmask16 live = __mmask16((1u << std::min(16, count - first)) - 1);
    for (int h = 0; h < HEADS; ++h) {
      __m512bh query[HALVES];
      for (int half = 0; half < HALVES; ++half)
        query[half] = (__m512bh)_mm512_loadu_si512(queries + h * SIZE + 32 * half);
      __m512 dots[16];
      for (int i = 0; i < 16; ++i) {
        dots[i] = _mm512_setzero_ps();
        for (int half = 0; half < HALVES; ++half)
          dots[i] = _mm512_dpbf16_ps(dots[i], query[half], (__m512bh)_mm512_loadu_si512(rows[i] + 32 * half));
      }
      const __m512 scaled = _mm512_mul_ps(sum_lanes(dots), _mm512_set1_ps(scale));
      const __m512 masked = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), live, scaled);
      best[h] = std::max(best[h], _mm512_reduce_max_ps(masked));
      _mm512_storeu_ps(scores + h * padded + first, masked);
    }
  }
  float inverse[HEADS];
  for (int h = 0; h < HEADS; ++h) {
    __m512 total = _mm512_setzero_ps();
    for (int i = 0; i < padded; i += 16) {
      const __m512 weight =
          exp_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + h * padded + i), _mm512_set1_ps(best[h])));
      _mm512_storeu_ps(scores + h * padded + i, weight);
      total = _mm512_add_ps(total, weight);
    }
    inverse[h] = 1.0f / _mm512_reduce_add_ps(total);
  }
  __m512 sums[HEADS][2 * HALVES];
  for (auto& line : sums) for (auto& part : line) part = _mm512_setzero_ps();
  for (int i = 0; i < count; ++i) {
    const bf16* value = values + seen.slot(i) * SIZE;
    for (int part = 0; part < 2 * HALVES; ++part) {
      const __m512 v = load_bf16(value + 16 * part);
      for (int h = 0; h < HEADS; ++h)
        sums[h][part] = _mm512_fmadd_ps(_mm512_set1_ps(scores[h * padded + i]), v, sums[h][part]);
    }
  }
  for (int h = 0; h < HEADS; ++h)
    for (int part = 0; part < 2 * HALVES; ++part)
      store_bf16(out + h * SIZE + 16 * part, _mm512_mul_ps(sums[h][part], _mm512_set1_ps(inverse[h])));
}

// All `group` query heads of one key head; one or two at a time.
template <int HALVES>
void attend_group(int group, const bf16* queries, const bf16* keys, const bf16* values, const Visible& seen,
                  float scale, float* scores, bf16* out) {
  int h = 0;
  for (; h + 2 <= group; h += 2)
    attend<2, HALVES>(queries + h * 32 * HALVES, keys, values, seen, scale, scores, out + h * 32 * HALVES);
  if (h < group)
    attend<1, HALVES>(queries + h * 32 * HALVES, keys, values, seen, scale, scores, out + h * 32 * HALVES);
}
