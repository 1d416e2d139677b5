// Plain C++: the reference that the others are tested against, and what runs on any other processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Machine {
  static constexpr int LANES = 16, REGISTERS = 32;
  static constexpr const char* NAME = "scalar";
  struct Floats {
    float at[16];
  };
  struct Mask {
    bool at[16];
  };
  struct Ints {
    int32_t at[16];
  };

  template <class Result, class Function>
  static Result each(const Function& function) {
    Result result;
    for (int i = 0; i < 16; ++i) result.at[i] = function(i);
    return result;
  }
  static uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
  }
  static float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  static float float_of_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x400) return float_of(sign | ((rest << 13) + (112u << 23)));
    return float_of(sign | bits_of(float(rest) * 0x1p-24f));
  }

  static Floats splat(float x) { return each<Floats>([&](int) { return x; }); }
  static Floats load(const float* p) { return each<Floats>([&](int i) { return p[i]; }); }
  static void store(float* p, Floats v) { std::memcpy(p, v.at, sizeof(v)); }
  static Floats add(Floats a, Floats b) { return each<Floats>([&](int i) { return a.at[i] + b.at[i]; }); }
  static Floats sub(Floats a, Floats b) { return each<Floats>([&](int i) { return a.at[i] - b.at[i]; }); }
  static Floats mul(Floats a, Floats b) { return each<Floats>([&](int i) { return a.at[i] * b.at[i]; }); }
  static Floats div(Floats a, Floats b) { return each<Floats>([&](int i) { return a.at[i] / b.at[i]; }); }
  static Floats max(Floats a, Floats b) { return each<Floats>([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; }); }
  static Floats fma(Floats a, Floats b, Floats c) {
    return each<Floats>([&](int i) { return std::fma(a.at[i], b.at[i], c.at[i]); });
  }
  static Floats fnma(Floats a, Floats b, Floats c) {
    return each<Floats>([&](int i) { return std::fma(-a.at[i], b.at[i], c.at[i]); });
  }
  static Floats round(Floats v) { return each<Floats>([&](int i) { return std::nearbyint(v.at[i]); }); }
  static Floats scale(Floats v, Floats n) {
    return each<Floats>([&](int i) { return v.at[i] * float_of(uint32_t(int32_t(n.at[i]) + 127) << 23); });
  }

  static Mask greater(Floats a, Floats b) { return each<Mask>([&](int i) { return a.at[i] > b.at[i]; }); }
  static Mask at_least(Floats a, Floats b) { return each<Mask>([&](int i) { return a.at[i] >= b.at[i]; }); }
  static Mask equal(Floats a, Floats b) { return each<Mask>([&](int i) { return a.at[i] == b.at[i]; }); }
  static Floats kept(Mask mask, Floats v) { return each<Floats>([&](int i) { return mask.at[i] ? v.at[i] : 0.0f; }); }
  static Floats cleared(Mask mask, Floats v) { return each<Floats>([&](int i) { return mask.at[i] ? 0.0f : v.at[i]; }); }
  static uint32_t bits(Mask mask) {
    uint32_t found = 0;
    for (int i = 0; i < 16; ++i) found |= uint32_t(mask.at[i]) << i;
    return found;
  }

  static Floats from_bf16(const uint16_t* p) { return each<Floats>([&](int i) { return float_of(uint32_t(p[i]) << 16); }); }
  static void to_bf16(uint16_t* p, Floats v) {
    for (int i = 0; i < 16; ++i) {
      const uint32_t bits = bits_of(v.at[i]);
      p[i] = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
  }
  static Floats from_half(const uint16_t* p) { return each<Floats>([&](int i) { return float_of_half(p[i]); }); }
  static Floats from_ints(Ints v) { return each<Floats>([&](int i) { return float(v.at[i]); }); }
  static void to_int8(int8_t* p, Floats v) {
    for (int i = 0; i < 16; ++i) p[i] = int8_t(std::nearbyint(v.at[i]));
  }

  static Ints load_ints(const void* p) {
    Ints v;
    std::memcpy(v.at, p, sizeof(v));
    return v;
  }
  static Floats firsts(Ints pairs) { return each<Floats>([&](int i) { return float_of(uint32_t(pairs.at[i]) << 16); }); }
  static Floats seconds(Ints pairs) {
    return each<Floats>([&](int i) { return float_of(uint32_t(pairs.at[i]) & 0xffff0000); });
  }

  static Ints splat_int(int32_t x) { return each<Ints>([&](int) { return x; }); }
  static Ints add_ints(Ints a, Ints b) { return each<Ints>([&](int i) { return a.at[i] + b.at[i]; }); }
  static Ints low_nibbles(Ints v) { return each<Ints>([&](int i) { return v.at[i] & 0x0f0f0f0f; }); }
  static Ints high_nibbles(Ints v) { return each<Ints>([&](int i) { return v.at[i] >> 4 & 0x0f0f0f0f; }); }
#define EDA_BYTE_PRODUCTS 1
  static Ints dot_bytes(Ints sum, Ints unsigned_bytes, Ints bytes) {
    return each<Ints>([&](int i) {
      int32_t total = sum.at[i];
      for (int shift = 0; shift < 32; shift += 8)
        total += int32_t(uint8_t(unsigned_bytes.at[i] >> shift)) * int8_t(bytes.at[i] >> shift);
      return total;
    });
  }

  static float sum(Floats v) {
    for (int apart = 8; apart; apart /= 2)
      for (int i = 0; i < apart; ++i) v.at[i] += v.at[i + apart];
    return v.at[0];
  }
  static float largest(Floats v) {
    float found = v.at[0];
    for (float x : v.at) found = found > x ? found : x;
    return found;
  }
  template <class Vector>
  static void sum_lanes(const Vector (&v)[16], Vector& sums) {
    for (int i = 0; i < 16; ++i) {
      float fours[4];
      for (int four = 0; four < 4; ++four) {
        const float* x = v[i].part[0].at + 4 * four;
        fours[four] = (x[0] + x[2]) + (x[1] + x[3]);
      }
      sums.part[0].at[i] = (fours[0] + fours[1]) + (fours[2] + fours[3]);
    }
  }
};

}  // namespace
