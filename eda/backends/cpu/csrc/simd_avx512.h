// AVX-512 (F, BW, VL, DQ): one register of 16 floats.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define EDA_AVX512 1
#if defined(__AVX512BF16__)
#define EDA_BF16_PRODUCTS 1
#endif

namespace {

struct Machine {
  static constexpr int LANES = 16, REGISTERS = 32;
  static constexpr const char* NAME = "avx512";
  using Floats = __m512;
  using Mask = __mmask16;
  using Ints = __m512i;

  static Floats splat(float x) { return _mm512_set1_ps(x); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
  static Floats round(Floats v) { return _mm512_roundscale_ps(v, 0); }
  static Floats scale(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }

  static Mask greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static Floats kept(Mask mask, Floats v) { return _mm512_maskz_mov_ps(mask, v); }
  static Floats cleared(Mask mask, Floats v) { return _mm512_maskz_mov_ps(_knot_mask16(mask), v); }
  static uint32_t bits(Mask mask) { return mask; }

  static Floats from_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
  static void to_bf16(uint16_t* p, Floats v) {
#if EDA_BF16_PRODUCTS
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
#else
    __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
#endif
  }
  static Floats from_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static Floats from_ints(Ints v) { return _mm512_cvtepi32_ps(v); }
  static void to_int8(int8_t* p, Floats v) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
  }

  // Pairs of bfloat16 values that stand side by side, as floats: the first of each pair, and the second.
  static Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
  static Floats firsts(Ints pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static Floats seconds(Ints pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
  }

  // What products of bytes are made of (integers.h).
  static Ints splat_int(int32_t x) { return _mm512_set1_epi32(x); }
  static Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Ints low_nibbles(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static Ints high_nibbles(Ints v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
#if defined(__AVX512VNNI__)
#define EDA_BYTE_PRODUCTS 1
  static Ints dot_bytes(Ints sum, Ints unsigned_bytes, Ints bytes) {
    return _mm512_dpbusd_epi32(sum, unsigned_bytes, bytes);
  }
#else
  static Ints even_bytes(Ints v) { return _mm512_and_si512(v, _mm512_set1_epi16(255)); }
  static Ints odd_bytes(Ints v) { return _mm512_srli_epi16(v, 8); }
  static Ints dot_shorts(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }
  static Ints pair_bytes(Ints unsigned_bytes, Ints bytes) { return _mm512_maddubs_epi16(unsigned_bytes, bytes); }
  static Ints add_shorts(Ints a, Ints b) { return _mm512_add_epi16(a, b); }
#endif

  static float sum(Floats v) { return _mm512_reduce_add_ps(v); }
  static float largest(Floats v) { return _mm512_reduce_max_ps(v); }
  template <class Vector>
  static void sum_lanes(const Vector (&v)[16], Vector& sums) {
    __m512 a[8], b[4];
    for (int i = 0; i < 8; ++i) {
      const __m512 x = v[2 * i].part[0], y = v[2 * i + 1].part[0];
      a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    }
    for (int i = 0; i < 4; ++i) {
      const __m512d low = _mm512_castps_pd(a[2 * i]), high = _mm512_castps_pd(a[2 * i + 1]);
      b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                           _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
    const __m512 c = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
    const __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
    sums.part[0] = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
  }
};

}  // namespace
