// Attention of one token over the key/value cache: softmax of scaled dot products, in float32 over bfloat16 keys.
#pragma once

#include "bfloat16.h"
#include "simd.h"

namespace {

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

// `HEADS` query heads that share the keys and values at `keys`, `values` (`[slots, 32 * HALVES]`, one key head).
// `queries` and `out` are `[HEADS, 32 * HALVES]`; `scores` has room for HEADS * (count rounded up to 16) floats.
template <int HEADS, int HALVES>
void attend(const bf16* queries, const bf16* keys, const bf16* values, const Visible& seen, float scale,
            float* scores, Input* out) {
  constexpr int SIZE = 32 * HALVES;
  const int count = seen.count(), padded = (count + 15) & ~15;
  float best[HEADS];
  for (int h = 0; h < HEADS; ++h) best[h] = -INFINITY;
  for (int first = 0; first < count; first += 16) {
    const bf16* rows[16];
    // Behind the last key the block repeats it; its lanes are masked.
    for (int i = 0; i < 16; ++i) rows[i] = keys + seen.slot(std::min(first + i, count - 1)) * SIZE;
    for (int h = 0; h < HEADS; ++h) {
      Pairs query[HALVES];
      for (int half = 0; half < HALVES; ++half) query[half] = load_pairs(queries + h * SIZE + 32 * half);
      Floats dots[16];
      for (int i = 0; i < 16; ++i) {
        dots[i] = zeros();
        for (int half = 0; half < HALVES; ++half) dots[i] = add_products(dots[i], query[half], rows[i] + 32 * half);
      }
      float* line = scores + h * padded + first;
      store(line, sum_lanes(dots) * splat(scale));
      for (int i = count - first; i < 16; ++i) line[i] = -INFINITY;
      best[h] = std::max(best[h], largest(load(line)));
    }
  }
  float inverse[HEADS];
  for (int h = 0; h < HEADS; ++h) {
    Floats total = zeros();
    for (int i = 0; i < padded; i += 16) {
      const Floats weight = exp(load(scores + h * padded + i) - splat(best[h]));
      store(scores + h * padded + i, weight);
      total = total + weight;
    }
    inverse[h] = 1.0f / sum(total);
  }
  Floats sums[HEADS][2 * HALVES];
  for (auto& line : sums) for (auto& part : line) part = zeros();
  for (int i = 0; i < count; ++i) {
    const bf16* value = values + seen.slot(i) * SIZE;
    for (int part = 0; part < 2 * HALVES; ++part) {
      const Floats v = load_bf16(value + 16 * part);
      for (int h = 0; h < HEADS; ++h) sums[h][part] = fma(splat(scores[h * padded + i]), v, sums[h][part]);
    }
  }
  for (int h = 0; h < HEADS; ++h)
    for (int part = 0; part < 2 * HALVES; ++part)
      store_input(out + h * SIZE + 16 * part, sums[h][part] * splat(inverse[h]));
}

// All `group` query heads of one key head; up to three at a time.
template <int HALVES>
void attend_group(int group, const bf16* queries, const bf16* keys, const bf16* values, const Visible& seen,
                  float scale, float* scores, Input* out) {
  int h = 0;
  if constexpr (PARTS == 1 && HALVES <= 2)  // three heads' sums fit the registers
    for (; h + 3 <= group && group - h != 4; h += 3)
      attend<3, HALVES>(queries + h * 32 * HALVES, keys, values, seen, scale, scores, out + h * 32 * HALVES);
  for (; h + 2 <= group; h += 2)
    attend<2, HALVES>(queries + h * 32 * HALVES, keys, values, seen, scale, scores, out + h * 32 * HALVES);
  if (h < group)
    attend<1, HALVES>(queries + h * 32 * HALVES, keys, values, seen, scale, scores, out + h * 32 * HALVES);
}

}  // namespace
