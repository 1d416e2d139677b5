// Products of a few rows with a weight, in bfloat16, 8 or 4 bits.
//
// Every output element is summed over the inner axis in one fixed order, whatever else is in the batch. So a token's
// result does not depend on how many others share the pass: a verified draft gives bit for bit what plain decoding gives.
#pragma once

#include "bfloat16.h"
#include "integers.h"
#include "simd.h"

namespace {

constexpr int ROUNDED_ROWS = 24;  // that share a reading of a block of integers

enum Format : int32_t { BFLOAT16, INT8, INT4 };

// A weight [n, k] in blocks of 64 outputs (one with `tiles` 1: of 16). `n` and `k` are padded with zeros to whole blocks,
// and to whole pairs of inputs in bfloat16 or groups of 32 else; bfloat16.h and integers.h say what is in a block.
struct Packed {
  const void* data;
  int32_t n, k, tiles;
  Format format;
  const uint16_t* scales;    // float16 [n / 64, k / 32, 64]; null in bfloat16
  const uint16_t* minimums;  // the same, or null: -8 * scale (4 bits)
};

// Rows of what enters products: the values, and for integer products these rounded in groups (see `Group`).
struct Rows {
  const Input* values;
  int64_t stride;  // of `values`; that of the groups follows from it
  const Group* groups;

  Rows from(int row) const { return {values + row * stride, stride, groups ? groups + row * num_groups(stride) : nullptr}; }
};

// One term of a sum of products. Only the first may be of integers, only a lone one of 16 outputs a block.
struct Term {
  Rows rows;
  const Packed* weight;
};

// `begun [ROWS, BLOCK]`: what the sums begin with, where it is not null.
template <int ROWS, int TILES, class Finish>
inline void multiply_rows(const Term* terms, int num_terms, int row, int block, const float* begun, const Finish& finish) {
  Floats sum[ROWS][TILES];
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TILES; ++t) sum[r][t] = begun ? load(begun + r * BLOCK + t * WIDTH) : zeros();
  for (int i = 0; i < num_terms; ++i) {
    const Packed& weight = *terms[i].weight;
    const Rows rows = terms[i].rows.from(row);
    const int64_t first = int64_t(block) * (weight.k / 2) * (TILES * 32);
    multiply_bfloat16(rows.values, rows.stride, static_cast<const bf16*>(weight.data) + first, weight.k / 2, sum);
  }
  for (int r = 0; r < ROWS; ++r) finish(row + r, block, sum[r]);
}

// `sums [count, BLOCK]` of a term of integers.
inline void multiply_rounded(const Term& term, int row, int count, int block, float* sums) {
  const Packed& weight = *term.weight;
  const int groups = weight.k / GROUP;
  const int64_t first = int64_t(block) * groups * BLOCK, stride = num_groups(term.rows.stride);
  const uint16_t *scales = weight.scales + first, *minimums = weight.minimums ? weight.minimums + first : nullptr;
  const uint8_t* data = static_cast<const uint8_t*>(weight.data);
  const Group* rows = term.rows.from(row).groups;
  if (weight.format == INT8)
    multiply_integers<Bytes>(rows, stride, count, data + first * GROUP, groups, scales, nullptr, sums);
  else if (minimums)
    multiply_integers<Nibbles<true>>(rows, stride, count, data + first * GROUP / 2, groups, scales, minimums, sums);
  else
    multiply_integers<Nibbles<false>>(rows, stride, count, data + first * GROUP / 2, groups, scales, nullptr, sums);
}

// Rows `start` to `end` of the terms' sum, for one block of outputs; `finish(row, block, sums[TILES])` takes each row.
template <int TILES, class Finish>
inline void multiply(const Term* terms, int num_terms, int start, int end, int block, const Finish& finish) {
  if constexpr (TILES == BLOCK_TILES)
    if (terms[0].weight->format != BFLOAT16) {
      alignas(64) float begun[ROUNDED_ROWS][BLOCK];
      for (int first = start; first < end; first += ROUNDED_ROWS) {
        const int count = std::min(ROUNDED_ROWS, end - first);
        multiply_rounded(terms[0], first, count, block, begun[0]);
        for_tiles(count, [&](auto tile, int row) {
          multiply_rows<decltype(tile)::value, TILES>(terms + 1, num_terms - 1, first + row, block, begun[row], finish);
        });
      }
      return;
    }
  for_tiles(end - start, [&](auto tile, int row) {
    multiply_rows<decltype(tile)::value, TILES>(terms, num_terms, start + row, block, nullptr, finish);
  });
}

// Root-mean-square norm of `size` values (a multiple of 16) at `x`, times `weight`, as a product's input and/or float32.
inline void rms_norm(const float* x, const float* weight, int size, float eps, Input* out, float* out_float = nullptr) {
  Floats squares = zeros();
  for (int i = 0; i < size; i += WIDTH) {
    const Floats part = load(x + i);
    squares = fma(part, part, squares);
  }
  const Floats scale = splat(1.0f / std::sqrt(sum(squares) / size + eps));
  for (int i = 0; i < size; i += WIDTH) {
    const Floats y = load(x + i) * scale * load(weight + i);
    if (out) store_input(out + i, y);
    if (out_float) store(out_float + i, y);
  }
}

}  // namespace
