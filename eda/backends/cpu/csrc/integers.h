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
constexpr int FETCHED_AHEAD = 8192;  // bytes of weights

inline int64_t num_groups(int64_t width) { return (width + GROUP - 1) / GROUP; }

// 32 inputs rounded to steps of `scale`, from -127 to 127.
struct Group {
  int8_t steps[GROUP];
#if !EDA_BYTE_PRODUCTS && !EDA_SIGNED_BYTE_PRODUCTS
  int16_t even_odd[GROUP];  // of each four: the even ones, then the odd ones
#endif
  float scale, scaled_sum;             // `scaled_sum`: of the steps, times the scale
  int32_t bytes_middle, nibbles_middle;  // what weights' middles add to sums too much, negative
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
  group.scaled_sum = group.scale * float(total);
  group.bytes_middle = -128 * total;
  group.nibbles_middle = -8 * total;
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

// How weights of a step become what is multiplied, in `PIECES` that each have inputs of their own; `add` adds a piece's
// products to the sums of a register of outputs.
struct NibbleSteps {
  static constexpr int STEPS = 4, PIECES = 2;
  static Machine::Ints weights(const uint8_t* p, int piece) {
    const Machine::Ints both = Machine::load_ints(p);
    return piece ? Machine::high_nibbles(both) : Machine::low_nibbles(both);
  }
  static const int8_t* inputs(const Group& group, int step, int piece) { return group.steps + 16 * piece + 4 * step; }
};

#if EDA_BYTE_PRODUCTS || EDA_SIGNED_BYTE_PRODUCTS

struct Bytes {
  static constexpr int STEPS = 8, PIECES = 1;
  static constexpr bool HAS_MINIMUMS = false;
  static Machine::Ints weights(const uint8_t* p, int) {
#if EDA_SIGNED_BYTE_PRODUCTS
    return veorq_s32(Machine::load_ints(p), Machine::splat_int(int(0x80808080)));
#else
    return Machine::load_ints(p);
#endif
  }
  static const int8_t* inputs(const Group& group, int step, int) { return group.steps + 4 * step; }
#if EDA_SIGNED_BYTE_PRODUCTS
  static Machine::Ints start(const Group&) { return Machine::splat_int(0); }
#else
  static Machine::Ints start(const Group& group) { return Machine::splat_int(group.bytes_middle); }
#endif
  static Machine::Ints add(Machine::Ints sum, Machine::Ints weights, Machine::Ints inputs) {
    return Machine::dot_bytes(sum, weights, inputs);
  }
  static Machine::Ints done(Machine::Ints sum, const Group&) { return sum; }
};

template <bool MINIMUMS>
struct Nibbles : NibbleSteps {
  static constexpr bool HAS_MINIMUMS = MINIMUMS;
  static Machine::Ints start(const Group& group) { return Machine::splat_int(MINIMUMS ? 0 : group.nibbles_middle); }
  static Machine::Ints add(Machine::Ints sum, Machine::Ints weights, Machine::Ints inputs) {
    return Machine::dot_bytes(sum, weights, inputs);
  }
  static Machine::Ints done(Machine::Ints sum, const Group&) { return sum; }
};

#else

// Compilers would reorder the steps' sums to have all products at once, in more registers than there are.
inline Machine::Ints in_order(Machine::Ints sum) {
  asm("" : "+v"(sum));
  return sum;
}

// Without products of bytes 8 bits are widened to 16: those of two unsigned and signed bytes together would not fit 16.
struct Bytes {
  static constexpr int STEPS = 8, PIECES = 2;
  static constexpr bool HAS_MINIMUMS = false;
  static Machine::Ints weights(const uint8_t* p, int piece) {
    const Machine::Ints four = Machine::load_ints(p);
    return piece ? Machine::odd_bytes(four) : Machine::even_bytes(four);
  }
  static const int16_t* inputs(const Group& group, int step, int piece) { return group.even_odd + 4 * step + 2 * piece; }
  static Machine::Ints start(const Group& group) { return Machine::splat_int(group.bytes_middle); }
  static Machine::Ints add(Machine::Ints sum, Machine::Ints weights, Machine::Ints inputs) {
    return in_order(Machine::add_ints(sum, Machine::dot_shorts(weights, inputs)));
  }
  static Machine::Ints done(Machine::Ints sum, const Group&) { return sum; }
};

// With 4 bits a whole group's pairs fit 16: 8 * 2 * 15 * 127 = 30480.
template <bool MINIMUMS>
struct Nibbles : NibbleSteps {
  static constexpr bool HAS_MINIMUMS = MINIMUMS;
  static Machine::Ints start(const Group&) { return Machine::splat_int(0); }
  static Machine::Ints add(Machine::Ints sum, Machine::Ints weights, Machine::Ints inputs) {
    return in_order(Machine::add_shorts(sum, Machine::pair_bytes(weights, inputs)));
  }
  static Machine::Ints done(Machine::Ints sum, const Group& group) {
    const Machine::Ints whole = Machine::dot_shorts(sum, Machine::splat_int(0x00010001));
    return MINIMUMS ? whole : Machine::add_ints(whole, Machine::splat_int(group.nibbles_middle));
  }
};

#endif

// Adds to `sums [ROWS, BLOCK]` the products of one group of `ROWS` rows (groups `stride` apart) and of a block of outputs.
template <class Kind, int ROWS>
inline void multiply_group(const Group* rows, int64_t stride, const uint8_t* data, const uint16_t* scales,
                           const uint16_t* minimums, float* sums) {
  constexpr int LANES = Machine::LANES, BYTES = BLOCK * 4;  // of a step
  // As many registers of outputs at once as leave room for their weights, one input and one product. With more than 12
  // vectors of sums the floats of one part would wait longer for its last products than the next part's can fill.
  constexpr int FIT = std::min((Machine::REGISTERS - 2) / (ROWS + 1), 12 * PARTS / ROWS), MOST = BLOCK / LANES;
  constexpr int AT_ONCE = FIT >= 4 ? 4 : FIT >= 2 ? 2 : 1;
  for (int part = 0; part < MOST; part += AT_ONCE) {
    keep_in_place();
    Machine::Ints own[ROWS][AT_ONCE];
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < AT_ONCE; ++i) own[r][i] = Kind::start(rows[r * stride]);
#pragma GCC unroll 8
    for (int step = 0; step < Kind::STEPS; ++step)
#pragma GCC unroll 2
      for (int piece = 0; piece < Kind::PIECES; ++piece) {
        Machine::Ints weights[AT_ONCE];
        for (int i = 0; i < AT_ONCE; ++i) weights[i] = Kind::weights(data + step * BYTES + (part + i) * LANES * 4, piece);
        for (int r = 0; r < ROWS; ++r) {
          const Machine::Ints inputs = splat_four(Kind::inputs(rows[r * stride], step, piece));
          for (int i = 0; i < AT_ONCE; ++i) own[r][i] = Kind::add(own[r][i], weights[i], inputs);
        }
      }
    for (int i = 0; i < AT_ONCE; ++i) {
      const int place = (part + i) * LANES;
      const Machine::Floats scale = Machine::from_half(scales + place);
      const Machine::Floats minimum = Kind::HAS_MINIMUMS ? Machine::from_half(minimums + place) : scale;
      for (int r = 0; r < ROWS; ++r) {
        const Group& given = rows[r * stride];
        const Machine::Floats products = Machine::from_ints(Kind::done(own[r][i], given));
        float* at = sums + r * BLOCK + place;
        Machine::Floats sum = Machine::fma(products, Machine::mul(scale, Machine::splat(given.scale)), Machine::load(at));
        if (Kind::HAS_MINIMUMS) sum = Machine::fma(minimum, Machine::splat(given.scaled_sum), sum);
        Machine::store(at, sum);
      }
    }
  }
}

// `sums [count, BLOCK]` of `count` rows of groups (`stride` apart) times one block of a weight of `Kind`. All rows take
// their products with a group before the next one, so that memory is read at one pace.
template <class Kind>
inline void multiply_integers(const Group* rows, int64_t stride, int count, const uint8_t* data, int groups,
                              const uint16_t* scales, const uint16_t* minimums, float* sums) {
  constexpr int BYTES = Kind::STEPS * BLOCK * 4;  // of a group
  std::memset(sums, 0, sizeof(float) * BLOCK * count);
  for (int g = 0; g < groups; ++g, ++rows, data += BYTES, scales += BLOCK) {
    // Bunches in order are what processors fetch fastest.
    for (int line = 0; line < BYTES; line += 64) prefetch(data + FETCHED_AHEAD + line);
    for (int line = 0; line < BLOCK; line += 32) prefetch(scales + FETCHED_AHEAD / BYTES * BLOCK + line);
    if (Kind::HAS_MINIMUMS)
      for (int line = 0; line < BLOCK; line += 32) prefetch(minimums + FETCHED_AHEAD / BYTES * BLOCK + line);
    for_tiles(count, [&](auto tile, int row) {
      multiply_group<Kind, decltype(tile)::value>(rows + row * stride, stride, data, scales, minimums, sums + row * BLOCK);
    });
    if (Kind::HAS_MINIMUMS) minimums += BLOCK;
  }
}

}  // namespace
