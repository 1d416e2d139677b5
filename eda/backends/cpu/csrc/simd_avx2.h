// AVX2 with FMA and F16C: two registers of 8 floats.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Machine {
  static constexpr int LANES = 8, REGISTERS = 16;
  static constexpr const char* NAME = "avx2";
  using Floats = __m256;
  using Mask = __m256;
  using Ints = __m256i;

  static Floats splat(float x) { return _mm256_set1_ps(x); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
  static Floats round(Floats v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Floats scale(Floats v, Floats n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(v, _mm256_castsi256_ps(exponent));
  }

  static Mask greater(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static Mask at_least(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static Mask equal(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static Floats kept(Mask mask, Floats v) { return _mm256_and_ps(mask, v); }
  static Floats cleared(Mask mask, Floats v) { return _mm256_andnot_ps(mask, v); }
  static uint32_t bits(Mask mask) { return uint32_t(_mm256_movemask_ps(mask)); }

  static Floats from_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static void to_bf16(uint16_t* p, Floats v) {
    __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
  }
  static Floats from_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static Floats from_ints(Ints v) { return _mm256_cvtepi32_ps(v); }
  static void to_int8(int8_t* p, Floats v) {
    const __m256i steps = _mm256_cvtps_epi32(v);
    const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(steps), _mm256_extracti128_si256(steps, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(shorts, shorts));
  }

  static Ints load_ints(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static Floats firsts(Ints pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  static Floats seconds(Ints pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
  }

  static Ints splat_int(int32_t x) { return _mm256_set1_epi32(x); }
  static Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static Ints low_nibbles(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  static Ints high_nibbles(Ints v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
#if defined(__AVXVNNI__)
#define EDA_BYTE_PRODUCTS 1
  static Ints dot_bytes(Ints sum, Ints unsigned_bytes, Ints bytes) {
    return _mm256_dpbusd_avx_epi32(sum, unsigned_bytes, bytes);
  }
#else
  static Ints even_bytes(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi16(255)); }
  static Ints odd_bytes(Ints v) { return _mm256_srli_epi16(v, 8); }
  static Ints dot_shorts(Ints a, Ints b) { return _mm256_madd_epi16(a, b); }
  static Ints pair_bytes(Ints unsigned_bytes, Ints bytes) { return _mm256_maddubs_epi16(unsigned_bytes, bytes); }
  static Ints add_shorts(Ints a, Ints b) { return _mm256_add_epi16(a, b); }
#endif

  static float sum(Floats v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static float largest(Floats v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
  template <class Vector>
  static void sum_lanes(const Vector (&v)[16], Vector& sums) {
    for (int half = 0; half < 2; ++half) {
      __m256 a[8], b[4];
      for (int i = 0; i < 8; ++i) {
        const __m256 x = v[2 * i].part[half], y = v[2 * i + 1].part[half];
        a[i] = _mm256_add_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
      }
      for (int i = 0; i < 4; ++i) {
        const __m256d low = _mm256_castps_pd(a[2 * i]), high = _mm256_castps_pd(a[2 * i + 1]);
        b[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(low, high)),
                             _mm256_castpd_ps(_mm256_unpackhi_pd(low, high)));
      }
      for (int i = 0; i < 2; ++i) {
        const __m256 c = _mm256_add_ps(_mm256_permute2f128_ps(b[2 * i], b[2 * i + 1], 0x20),
                                       _mm256_permute2f128_ps(b[2 * i], b[2 * i + 1], 0x31));
        sums.part[i] = half ? _mm256_add_ps(sums.part[i], c) : c;
      }
    }
  }
};

}  // namespace
