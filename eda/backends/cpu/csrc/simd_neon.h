// NEON of 64-bit ARM: four registers of 4 floats.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace {

struct Machine {
  static constexpr int LANES = 4, REGISTERS = 32;
  static constexpr const char* NAME = "neon";
  using Floats = float32x4_t;
  using Mask = uint32x4_t;
  using Ints = int32x4_t;

  static Floats splat(float x) { return vdupq_n_f32(x); }
  static Floats load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Floats v) { vst1q_f32(p, v); }
  static Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
  static Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
  static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats div(Floats a, Floats b) { return vdivq_f32(a, b); }
  static Floats max(Floats a, Floats b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // as x86 treats NaN
  static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static Floats fnma(Floats a, Floats b, Floats c) { return vfmsq_f32(c, a, b); }
  static Floats round(Floats v) { return vrndnq_f32(v); }
  static Floats scale(Floats v, Floats n) {
    const int32x4_t exponent = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(v, vreinterpretq_f32_s32(exponent));
  }

  static Mask greater(Floats a, Floats b) { return vcgtq_f32(a, b); }
  static Mask at_least(Floats a, Floats b) { return vcgeq_f32(a, b); }
  static Mask equal(Floats a, Floats b) { return vceqq_f32(a, b); }
  static Floats kept(Mask mask, Floats v) { return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(v))); }
  static Floats cleared(Mask mask, Floats v) { return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), mask)); }
  static uint32_t bits(Mask mask) {
    const uint32x4_t weights = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(mask, weights));
  }

  static Floats from_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static void to_bf16(uint16_t* p, Floats v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    vst1_u16(p, vshrn_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16));
  }
  static Floats from_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static Floats from_ints(Ints v) { return vcvtq_f32_s32(v); }
  static void to_int8(int8_t* p, Floats v) {
    const int16x4_t shorts = vqmovn_s32(vcvtnq_s32_f32(v));
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(shorts, shorts));
    vst1_lane_s32((int32_t*)p, vreinterpret_s32_s8(bytes), 0);
  }

  static Ints load_ints(const void* p) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)p)); }
  static Floats firsts(Ints pairs) { return vreinterpretq_f32_s32(vshlq_n_s32(pairs, 16)); }
  static Floats seconds(Ints pairs) { return vreinterpretq_f32_s32(vandq_s32(pairs, vdupq_n_s32(int(0xffff0000)))); }

  static Ints splat_int(int32_t x) { return vdupq_n_s32(x); }
  static Ints add_ints(Ints a, Ints b) { return vaddq_s32(a, b); }
  static Ints low_nibbles(Ints v) { return vandq_s32(v, vreinterpretq_s32_u8(vdupq_n_u8(15))); }
  static Ints high_nibbles(Ints v) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(v), 4)); }
  // Signed weights: integers.h takes their middle off the bytes, not off the sums.
#define EDA_SIGNED_BYTE_PRODUCTS 1
  static Ints dot_bytes(Ints sum, Ints weights, Ints inputs) {
    const int8x16_t a = vreinterpretq_s8_s32(weights), b = vreinterpretq_s8_s32(inputs);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, a, b);
#else
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(a, b));
    return vaddq_s32(sum, vpaddq_s32(low, high));
#endif
  }

  static float sum(Floats v) {
    const float32x2_t s = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(s, 0) + vget_lane_f32(s, 1);
  }
  static float largest(Floats v) { return vmaxvq_f32(v); }
  template <class Vector>
  static void sum_lanes(const Vector (&v)[16], Vector& sums) {
    for (int i = 0; i < 4; ++i) {
      Floats fours[4];
      for (int part = 0; part < 4; ++part) {
        const Floats x[4] = {v[4 * i].part[part], v[4 * i + 1].part[part], v[4 * i + 2].part[part], v[4 * i + 3].part[part]};
        const float64x2_t low = vreinterpretq_f64_f32(vaddq_f32(vzip1q_f32(x[0], x[1]), vzip2q_f32(x[0], x[1])));
        const float64x2_t high = vreinterpretq_f64_f32(vaddq_f32(vzip1q_f32(x[2], x[3]), vzip2q_f32(x[2], x[3])));
        fours[part] = vaddq_f32(vreinterpretq_f32_f64(vzip1q_f64(low, high)), vreinterpretq_f32_f64(vzip2q_f64(low, high)));
      }
      sums.part[i] = vaddq_f32(vaddq_f32(fours[0], fours[1]), vaddq_f32(fours[2], fours[3]));
    }
  }
};

}  // namespace
