// AVX2 and FMA: 8 floats, 16 registers.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/lanes_fma.h"

namespace tetris::cpu::avx2 {

struct Vec {
  using T = float;
  template <int N>
  using Lanes = FmaLanes<Vec, N>;
  using Reg = __m256;
  static constexpr int W = 8;
  static constexpr int kRegisters = 16;

  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg load(const T* p) { return _mm256_loadu_ps(p); }
  static void store(T* p, Reg a) { _mm256_storeu_ps(p, a); }
  static Reg bcast(T a) { return _mm256_set1_ps(a); }
  // Eight loads, not vgatherdps: QEMU 7 computes that instruction wrongly (hardware does not), and
  // the tests must run there.
  static Reg gather(const T* p, const int32_t* i) {
    return _mm256_setr_ps(p[i[0]], p[i[1]], p[i[2]], p[i[3]], p[i[4]], p[i[5]], p[i[6]], p[i[7]]);
  }
  static Reg load_n(const T* p, int64_t n) { return _mm256_maskload_ps(p, mask(n)); }
  static void store_n(T* p, Reg a, int64_t n) { _mm256_maskstore_ps(p, mask(n), a); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg fnma(Reg a, Reg b, Reg c) { return _mm256_fnmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static Reg abs(Reg a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static Reg round(Reg a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT); }
  static Reg pow2(Reg a) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127)), 23));
  }
  static Reg if_negative(Reg a, Reg b, Reg c) {
    return _mm256_blendv_ps(c, b, _mm256_cmp_ps(a, zero(), _CMP_LT_OQ));
  }
  // a where the bits of m are set, 0 where they are not
  static Reg keep(Reg a, Reg m) { return _mm256_and_ps(a, m); }
  // a[0], a[2], ... b[0], b[2], ...
  static Reg every_second(Reg a, Reg b) {
    const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xd8));
  }
  static T sum(Reg a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  __attribute__((always_inline)) static void transpose(Reg (&r)[W]) {
    Reg t[8];
    for (int i = 0; i < 8; i += 4) {
      const Reg a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
      const Reg c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]);
      const Reg d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
      t[i] = _mm256_shuffle_ps(a, c, 0x44);
      t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
      t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
      t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
  }

 private:
  static __m256i mask(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

}  // namespace tetris::cpu::avx2
