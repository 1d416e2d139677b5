// Products of 8-bit inputs with weights of 8 or 4 bits, in groups of 32 inputs.
//
// In a group everything is summed in integers, hence exactly; the groups' sums follow one another in float32:
//   scale of weights * scale of inputs * sum of products  (+ minimum of weights * scale of inputs * sum of inputs).
// In a block of 64 outputs groups follow one another. In a group of 8 bits there are 8 steps of 4 inputs, in a step each
// output's 4 weights side by side, as value + 128. In a group of 4 bits there are 4 steps; a byte's low bits belong to
// inputs 4 * step on, its high bits to inputs 16 + 4 * step on.
#pragma once

#include "bfloat16.h"
#include "simd.h"

namespace {

constexpr int GROUP = 32;
constexpr int PREFETCHED = 16384;  // bytes of weights that are fetched ahead: what six rows take longer for than memory does

inline int64_t num_groups(int64_t width) { return (width + GROUP - 1) / GROUP; }

// 32 inputs rounded to steps of `scale`, from -127 to 127.
struct Group {
  int8_t steps[GROUP];
#if !EDA_BYTE_PRODUCTS && !EDA_SIGNED_BYTE_PRODUCTS
  int16_t even_odd[GROUP];  // of each four: the even ones, then the odd ones
#endif
  float scale;
  int32_t sum;  // of the steps
};

// `count` inputs (up to 32; zeros follow) to a group.
inline void quantise(const Input* x, int count, Group& group) {
  alignas(64) Input line[GROUP];
  if (count < GROUP) {
    std::memset(line, 0, sizeof(line));
    std::memcpy(line, x, count * sizeof(Input));
    x = line;
  }
  const Floats low = load_input(x), high = load_input(x + WIDTH);
  const Floats size = larger(larger(low, zeros() - low), larger(high, zeros() - high));
  const float most = largest(size);
  const Floats inverse = splat(most > 0.0f ? 127.0f / most : 0.0f);
  group.scale = most / 127.0f;
  const Floats parts[2] = {low * inverse, high * inverse};
  for (int half = 0; half < 2; ++half)
    EDA_EACH_PART Machine::to_int8(group.steps + half * WIDTH + i * Machine::LANES, parts[half].part[i]);
  int32_t total = 0;
  for (int i = 0; i < GROUP; ++i) total += group.steps[i];
  group.sum = total;
#if !EDA_BYTE_PRODUCTS && !EDA_SIGNED_BYTE_PRODUCTS
  for (int i = 0; i < GROUP; i += 4)
    for (int j = 0; j < 4; ++j) group.even_odd[i + (j & 1) * 2 + j / 2] = group.steps[i + j];
#endif
}

inline void quantise_row(const Input* x, int width, Group* groups) {
  for (int i = 0; i < width; i += GROUP) quantise(x + i, std::min(GROUP, width - i), groups[i / GROUP]);
}

template <class T>
inline Machine::Ints splat_four(const T* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return Machine::splat_int(four);
}

// One register of weights, each lane an output; `Sum` is what their products with a group's inputs add up in.
#if EDA_BYTE_PRODUCTS || EDA_SIGNED_BYTE_PRODUCTS

struct Bytes {
  static constexpr int STEPS = 8, MIDDLE = 128, REGISTERS = 1;
  using Weight = Machine::Ints;
  using Sum = Machine::Ints;
  static Weight load(const uint8_t* p) {
#if EDA_SIGNED_BYTE_PRODUCTS
    return veorq_s32(Machine::load_ints(p), Machine::splat_int(int(0x80808080)));
#else
    return Machine::load_ints(p);
#endif
  }
#if EDA_SIGNED_BYTE_PRODUCTS
  static Sum start(int32_t) { return Machine::splat_int(0); }
#else
  static Sum start(int32_t sum) { return Machine::splat_int(-MIDDLE * sum); }
#endif
  static Sum step(Sum sum, const Weight& weight, const Group& group, int step) {
    return Machine::dot_bytes(sum, weight, splat_four(group.steps + 4 * step));
  }
  static Machine::Ints done(Sum sum, int32_t) { return sum; }
};

struct Nibbles {
  static constexpr int STEPS = 4, MIDDLE = 8, REGISTERS = 2;
  struct Weight {
    Machine::Ints low, high;
  };
  using Sum = Machine::Ints;
  static Weight load(const uint8_t* p) {
    const Machine::Ints both = Machine::load_ints(p);
    return {Machine::low_nibbles(both), Machine::high_nibbles(both)};
  }
  static Sum start(int32_t sum) { return Machine::splat_int(-MIDDLE * sum); }
  static Sum step(Sum sum, const Weight& weight, const Group& group, int step) {
    sum = Machine::dot_bytes(sum, weight.low, splat_four(group.steps + 4 * step));
    return Machine::dot_bytes(sum, weight.high, splat_four(group.steps + 16 + 4 * step));
  }
  static Machine::Ints done(Sum sum, int32_t) { return sum; }
};

#else

// Compilers would reorder the steps' sums to have all products at once, in more registers than there are.
inline Machine::Ints in_order(Machine::Ints sum) {
  asm("" : "+v"(sum));
  return sum;
}

// Without products of bytes 8 bits are widened to 16: those of two unsigned and signed bytes together would not fit 16.
struct Bytes {
  static constexpr int STEPS = 8, MIDDLE = 128, REGISTERS = 2;
  struct Weight {
    Machine::Ints even, odd;
  };
  using Sum = Machine::Ints;
  static Weight load(const uint8_t* p) {
    const Machine::Ints four = Machine::load_ints(p);
    return {Machine::even_bytes(four), Machine::odd_bytes(four)};
  }
  static Sum start(int32_t sum) { return Machine::splat_int(-MIDDLE * sum); }
  static Sum step(Sum sum, const Weight& weight, const Group& group, int step) {
    const Machine::Ints even = Machine::dot_shorts(weight.even, splat_four(group.even_odd + 4 * step));
    const Machine::Ints odd = Machine::dot_shorts(weight.odd, splat_four(group.even_odd + 4 * step + 2));
    return in_order(Machine::add_ints(sum, Machine::add_ints(even, odd)));
  }
  static Machine::Ints done(Sum sum, int32_t) { return sum; }
};

// With 4 bits a whole group's pairs fit 16: 8 * 2 * 15 * 127 = 30480.
struct Nibbles {
  static constexpr int STEPS = 4, MIDDLE = 8, REGISTERS = 2;
  struct Weight {
    Machine::Ints low, high;
  };
  using Sum = Machine::Ints;
  static Weight load(const uint8_t* p) {
    const Machine::Ints both = Machine::load_ints(p);
    return {Machine::low_nibbles(both), Machine::high_nibbles(both)};
  }
  static Sum start(int32_t) { return Machine::splat_int(0); }
  static Sum step(Sum sum, const Weight& weight, const Group& group, int step) {
    sum = Machine::add_shorts(sum, Machine::pair_bytes(weight.low, splat_four(group.steps + 4 * step)));
    return in_order(Machine::add_shorts(sum, Machine::pair_bytes(weight.high, splat_four(group.steps + 16 + 4 * step))));
  }
  static Machine::Ints done(Sum sum, int32_t middle) {
    return Machine::add_ints(Machine::dot_shorts(sum, Machine::splat_int(0x00010001)), Machine::splat_int(middle));
  }
};

#endif

// `sum` of `ROWS` rows of groups (`stride` apart) times one block of a weight of `Kind`.
template <class Kind, int ROWS>
inline void multiply_integers(const Group* rows, int64_t stride, const uint8_t* data, int groups, const uint16_t* scales,
                              const uint16_t* minimums, Floats (&sum)[ROWS][BLOCK_TILES]) {
  constexpr int LANES = Machine::LANES, BYTES = BLOCK * 4;  // of a step
  // As many registers of outputs at once as leave room for their weights and one input.
  constexpr int FIT = (Machine::REGISTERS - 2) / (ROWS + Kind::REGISTERS), MOST = BLOCK / LANES;
  constexpr int AT_ONCE = FIT >= 8 && MOST >= 8 ? 8 : FIT >= 4 ? 4 : FIT >= 2 ? 2 : 1;
  const bool has_minimums = Kind::MIDDLE == Nibbles::MIDDLE && minimums;  // known of bytes when this is compiled
  alignas(64) float all[ROWS][BLOCK] = {};
  for (int g = 0; g < groups; ++g, data += Kind::STEPS * BYTES, scales += BLOCK) {
    prefetch(scales + 2 * BLOCK);
    prefetch(scales + 2 * BLOCK + 32);
    for (int part = 0; part < MOST; part += AT_ONCE) {
      keep_in_place();
      typename Kind::Sum sums[ROWS][AT_ONCE];
      for (int r = 0; r < ROWS; ++r) {
        const auto start = Kind::start(has_minimums ? 0 : rows[r * stride + g].sum);
        for (int i = 0; i < AT_ONCE; ++i) sums[r][i] = start;
      }
#pragma GCC unroll 8
      for (int step = 0; step < Kind::STEPS; ++step) {
        const uint8_t* weights = data + step * BYTES + part * LANES * 4;
        typename Kind::Weight own[AT_ONCE];
        for (int i = 0; i < AT_ONCE; ++i) own[i] = Kind::load(weights + i * LANES * 4);
        for (int line = 0; line < AT_ONCE * LANES * 4; line += 64) prefetch(weights + PREFETCHED + line);
        for (int r = 0; r < ROWS; ++r)
          for (int i = 0; i < AT_ONCE; ++i) sums[r][i] = Kind::step(sums[r][i], own[i], rows[r * stride + g], step);
      }
      for (int i = 0; i < AT_ONCE; ++i) {
        const int place = (part + i) * LANES;
        const Machine::Floats scale = Machine::from_half(scales + place);
        for (int r = 0; r < ROWS; ++r) {
          const Group& given = rows[r * stride + g];
          const Machine::Floats products =
              Machine::from_ints(Kind::done(sums[r][i], has_minimums ? 0 : -Kind::MIDDLE * given.sum));
          float* at = all[r] + place;
          Machine::store(at, Machine::fma(products, Machine::mul(scale, Machine::splat(given.scale)), Machine::load(at)));
        }
      }
    }
    if (!has_minimums) continue;
    for (int place = 0; place < BLOCK; place += LANES) {
      const Machine::Floats minimum = Machine::from_half(minimums + place);
      for (int r = 0; r < ROWS; ++r) {
        const Group& given = rows[r * stride + g];
        float* at = all[r] + place;
        Machine::store(at, Machine::fma(minimum, Machine::splat(given.scale * float(given.sum)), Machine::load(at)));
      }
    }
    minimums += BLOCK;
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < BLOCK_TILES; ++t) sum[r][t] = load(all[r] + WIDTH * t);
}

}  // namespace
