// Products with bfloat16 weights: by AVX512-BF16 where there is one, else widened to float32.
//
// In a block, pairs of inputs follow one another; in each pair the outputs' two values stand side by side.
#pragma once

#include <type_traits>

#include "simd.h"

namespace {

constexpr int BLOCK_TILES = 4, BLOCK = WIDTH * BLOCK_TILES;  // vectors and outputs in a block of an ordinary weight

// Compilers would move the inputs that all parts of a block read out of the loop over these, to more registers than there are.
inline void keep_in_place() { asm volatile("" ::: "memory"); }

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// Calls `take(tile, row)` for tiles of a few rows that make up `count`: `tile` is their number as a constant.
template <class Take>
inline void for_tiles(int count, const Take& take) {
  // Seven rows still fit the registers, but only pay where they save a second tile.
  const int tiles = count == 7 ? 1 : (count + 5) / 6;
  for (int tile = 0, row = 0; tile < tiles; ++tile) {
    const int rows = (count - row + (tiles - tile) - 1) / (tiles - tile);
    switch (rows) {
      case 1: take(std::integral_constant<int, 1>(), row); break;
      case 2: take(std::integral_constant<int, 2>(), row); break;
      case 3: take(std::integral_constant<int, 3>(), row); break;
      case 4: take(std::integral_constant<int, 4>(), row); break;
      case 5: take(std::integral_constant<int, 5>(), row); break;
      case 6: take(std::integral_constant<int, 6>(), row); break;
      default: take(std::integral_constant<int, 7>(), row); break;
    }
    row += rows;
  }
}

#if EDA_BF16_PRODUCTS

// What enters products. Sums of products of bfloat16 values lose less than rounding these does.
typedef bf16 Input;
inline void store_input(Input* p, const Floats& v) { store_bf16(p, v); }
inline Floats load_input(const Input* p) { return load_bf16(p); }

template <int ROWS, int TILES>
inline void multiply_bfloat16(const Input* a, int64_t a_stride, const bf16* b, int pairs, Floats (&sum)[ROWS][TILES]) {
  for (int pair = 0; pair < pairs; ++pair) {
    for (int t = 0; t < TILES; ++t) prefetch(b + ((pair + 64) * TILES + t) * 32);
    __m512bh weights[TILES];
    for (int t = 0; t < TILES; ++t) weights[t] = (__m512bh)_mm512_loadu_si512(b + (pair * TILES + t) * 32);
    for (int r = 0; r < ROWS; ++r) {
      int32_t two;
      std::memcpy(&two, a + r * a_stride + 2 * pair, 4);
      const __m512bh given = (__m512bh)_mm512_set1_epi32(two);
      for (int t = 0; t < TILES; ++t) sum[r][t].part[0] = _mm512_dpbf16_ps(sum[r][t].part[0], weights[t], given);
    }
  }
}

#else

typedef float Input;
inline void store_input(Input* p, const Floats& v) { store(p, v); }
inline Floats load_input(const Input* p) { return load(p); }

template <int ROWS, int TILES>
inline void multiply_bfloat16(const Input* a, int64_t a_stride, const bf16* b, int pairs, Floats (&sum)[ROWS][TILES]) {
  constexpr int LANES = Machine::LANES, REGISTERS = TILES * PARTS;
  // As many registers of outputs at once as leave room for weights and inputs; the block is taken in runs of pairs that
  // stay in the cache while the others have their turn.
  constexpr int FIT = (Machine::REGISTERS - 2) / (ROWS + 1);
  constexpr int AT_ONCE = FIT >= 8 && REGISTERS >= 8 ? 8 : FIT >= 4 && REGISTERS >= 4 ? 4 : FIT >= 2 && REGISTERS >= 2 ? 2 : 1;
  constexpr int RUN = 32;
  Machine::Floats all[ROWS][REGISTERS];
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < REGISTERS; ++i) all[r][i] = sum[r][i / PARTS].part[i % PARTS];
  for (int first = 0; first < pairs; first += RUN) {
    const int last = std::min(first + RUN, pairs);
    for (int part = 0; part < REGISTERS; part += AT_ONCE) {
      keep_in_place();
      Machine::Floats own[ROWS][AT_ONCE];
      for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < AT_ONCE; ++i) own[r][i] = all[r][part + i];
      for (int pair = first; pair < last; ++pair) {
        const bf16* weights = b + int64_t(pair) * TILES * 32 + part * LANES * 2;
        for (int line = 0; line < AT_ONCE * LANES * 2; line += 32) prefetch(weights + RUN * TILES * 32 + line);
        for (int second = 0; second < 2; ++second) {
          keep_in_place();
          Machine::Floats wide[AT_ONCE];
          for (int i = 0; i < AT_ONCE; ++i) {
            const Machine::Ints both = Machine::load_ints(weights + i * LANES * 2);
            wide[i] = second ? Machine::seconds(both) : Machine::firsts(both);
          }
          for (int r = 0; r < ROWS; ++r) {
            const Machine::Floats given = Machine::splat(a[r * a_stride + 2 * pair + second]);
            for (int i = 0; i < AT_ONCE; ++i) own[r][i] = Machine::fma(wide[i], given, own[r][i]);
          }
        }
      }
      for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < AT_ONCE; ++i) all[r][part + i] = own[r][i];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < REGISTERS; ++i) sum[r][i / PARTS].part[i % PARTS] = all[r][i];
}

#endif

}  // namespace
