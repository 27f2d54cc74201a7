// AVX-512: 16 floats, 32 registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/lanes_fma.h"

namespace tetris::cpu::avx512 {

template <int N>
struct Lanes;  // N outputs of one token, see lanes_fma.h

struct Vec {
  using T = float;
  template <int N>
  using Lanes = avx512::Lanes<N>;
  using Reg = __m512;
  static constexpr int W = 16;
  static constexpr int kRegisters = 32;

  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg load(const T* p) { return _mm512_loadu_ps(p); }
  static void store(T* p, Reg a) { _mm512_storeu_ps(p, a); }
  static Reg bcast(T a) { return _mm512_set1_ps(a); }
  // p[index[0]], ... p[index[W - 1]]. Sixteen loads, not vgatherdps, which takes 1.6 cycles an
  // element on Zen 5 (loads: 0.9) and is microcode on older Intel parts.
  static Reg gather(const T* p, const int32_t* index) {
    const auto four = [&](int k) {
      return _mm_setr_ps(p[index[k]], p[index[k + 1]], p[index[k + 2]], p[index[k + 3]]);
    };
    const __m256 low = _mm256_set_m128(four(4), four(0)), high = _mm256_set_m128(four(12), four(8));
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
  }
  static Reg load_n(const T* p, int64_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static void store_n(T* p, Reg a, int64_t n) { _mm512_mask_storeu_ps(p, mask(n), a); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg fnma(Reg a, Reg b, Reg c) { return _mm512_fnmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  // Like the instruction: the second operand where one is NaN.
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static Reg abs(Reg a) { return _mm512_abs_ps(a); }
  static Reg round(Reg a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
  // 2^a for integral a in the normal range.
  static Reg pow2(Reg a) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127)), 23));
  }
  // a < 0 ? b : c
  static Reg if_negative(Reg a, Reg b, Reg c) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, zero(), _CMP_LT_OQ), c, b);
  }
  // a where the bits of m are set, 0 where they are not
  static Reg keep(Reg a, Reg m) { return _mm512_and_ps(a, m); }
  // a[0], a[2], ... b[0], b[2], ...
  static Reg every_second(Reg a, Reg b) {
    const __m512i even =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutex2var_ps(a, even, b);
  }
  static T sum(Reg a) { return _mm512_reduce_add_ps(a); }

  // r[i][j] -> r[j][i]
  __attribute__((always_inline)) static void transpose(Reg (&r)[W]) {
    Reg t[16];
    for (int i = 0; i < 16; i += 4) {  // 4x4 inside each 128-bit lane
      const Reg a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
      const Reg c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]);
      const Reg d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
      t[i] = _mm512_shuffle_ps(a, c, 0x44);
      t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
      t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
      t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; ++i) {  // 4x4 of the lanes
      const Reg a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88);
      const Reg b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
      const Reg c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
      const Reg d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
      r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
      r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
      r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
      r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }

 private:
  static __mmask16 mask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
};

template <int N>
struct Lanes : FmaLanes<Vec, N> {};

template <>
struct Lanes<16> {
  using Reg = __m512;
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg fma(float x, const float* w, Reg c) {
    return _mm512_fmadd_ps(_mm512_set1_ps(x), _mm512_loadu_ps(w), c);
  }
  static void store(float* p, Reg a) { _mm512_storeu_ps(p, a); }
};

}  // namespace tetris::cpu::avx512
