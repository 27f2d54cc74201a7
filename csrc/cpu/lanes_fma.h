// 1, 2, 4 or 8 floats as the lanes of one FMA: for one token, a block's height is the vector, and a
// short block needs no masked wide load.
//
// Isa is a tag type of the including file's namespace: each instruction set gets its own copies.
#pragma once

#include <immintrin.h>

namespace tetris::cpu {

template <class Isa, int N>
struct FmaLanes;

template <class Isa>
struct FmaLanes<Isa, 8> {
  using Reg = __m256;
  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg fma(float x, const float* w, Reg c) {
    return _mm256_fmadd_ps(_mm256_set1_ps(x), _mm256_loadu_ps(w), c);
  }
  static void store(float* p, Reg a) { _mm256_storeu_ps(p, a); }
};

template <class Isa>
struct FmaLanes<Isa, 4> {
  using Reg = __m128;
  static Reg zero() { return _mm_setzero_ps(); }
  static Reg add(Reg a, Reg b) { return _mm_add_ps(a, b); }
  static Reg fma(float x, const float* w, Reg c) {
    return _mm_fmadd_ps(_mm_set1_ps(x), _mm_loadu_ps(w), c);
  }
  static void store(float* p, Reg a) { _mm_storeu_ps(p, a); }
};

template <class Isa>
struct FmaLanes<Isa, 2> : FmaLanes<Isa, 4> {
  using Reg = __m128;
  static Reg fma(float x, const float* w, Reg c) {
    const Reg pair = _mm_castsi128_ps(_mm_loadu_si64(w));
    return _mm_fmadd_ps(_mm_set1_ps(x), pair, c);
  }
  static void store(float* p, Reg a) { _mm_storel_pi(reinterpret_cast<__m64*>(p), a); }
};

template <class Isa>
struct FmaLanes<Isa, 1> : FmaLanes<Isa, 4> {
  using Reg = __m128;
  static Reg fma(float x, const float* w, Reg c) {
    return _mm_fmadd_ss(_mm_set_ss(x), _mm_load_ss(w), c);
  }
  static void store(float* p, Reg a) { _mm_store_ss(p, a); }
};

}  // namespace tetris::cpu
