// Runs of elements as numbers to compute with, by the widest loads that their type has.
//
// A run of N elements must be aligned to its size, or to 16 bytes where it is longer.
#pragma once

#include "cuda/numeric.cuh"
#include "cuda/platform.h"

namespace tetris::cuda {

TETRIS_DEVICE float multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
TETRIS_DEVICE double multiply_add(double a, double b, double c) { return ::fma(a, b, c); }

namespace detail {

// How 16 bytes and fractions of them are read: global memory through the read-only path, shared
// memory plainly.
struct ReadGlobal {
  template <class V>
  static TETRIS_DEVICE V read(const V* p) {
    return __ldg(p);
  }
};
struct ReadShared {
  template <class V>
  static TETRIS_DEVICE V read(const V* p) {
    return *p;
  }
};

}  // namespace detail

// N elements as they lie in memory: half the registers of their numbers where types have 16 bits.
// Loops that have many loads in flight keep them so.
template <class T, int N>
struct Run;

template <int N>
struct Run<float, N> {
  float v[N];
  template <class Read>
  TETRIS_DEVICE void load(const float* p) {
    if constexpr (N % 4 == 0) {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const float4 w = Read::read(reinterpret_cast<const float4*>(p + i));
        v[i] = w.x, v[i + 1] = w.y, v[i + 2] = w.z, v[i + 3] = w.w;
      }
    } else if constexpr (N == 2) {
      const float2 w = Read::read(reinterpret_cast<const float2*>(p));
      v[0] = w.x, v[1] = w.y;
    } else {
      static_assert(N == 1);
      v[0] = Read::read(p);
    }
  }
  // The first `count` elements, one by one.
  template <class Read>
  TETRIS_DEVICE void load_some(const float* p, int count) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) v[i] = Read::read(p + i);
  }
  TETRIS_DEVICE void numbers(float (&to)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = v[i];
  }
};

template <int N>
struct Run<double, N> {
  double v[N];
  template <class Read>
  TETRIS_DEVICE void load(const double* p) {
    if constexpr (N % 2 == 0) {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const double2 w = Read::read(reinterpret_cast<const double2*>(p + i));
        v[i] = w.x, v[i + 1] = w.y;
      }
    } else {
      static_assert(N == 1);
      v[0] = Read::read(p);
    }
  }
  TETRIS_DEVICE void numbers(double (&to)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = v[i];
  }
};

namespace detail {

template <class T, int N>
struct Run16Bit {
  uint32_t words[(N + 1) / 2];
  template <class Read>
  TETRIS_DEVICE void load(const T* p) {
    if constexpr (N % 8 == 0) {
#pragma unroll
      for (int i = 0; i < N; i += 8) {
        const uint4 w = Read::read(reinterpret_cast<const uint4*>(p + i));
        words[i / 2] = w.x, words[i / 2 + 1] = w.y;
        words[i / 2 + 2] = w.z, words[i / 2 + 3] = w.w;
      }
    } else if constexpr (N == 4) {
      const uint2 w = Read::read(reinterpret_cast<const uint2*>(p));
      words[0] = w.x, words[1] = w.y;
    } else if constexpr (N == 2) {
      words[0] = Read::read(reinterpret_cast<const uint32_t*>(p));
    } else {
      static_assert(N == 1);
      words[0] = Read::read(reinterpret_cast<const uint16_t*>(p));
    }
  }
  template <class Read>
  TETRIS_DEVICE void load_some(const T* p, int count) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count)
        words[i / 2] |= uint32_t(Read::read(reinterpret_cast<const uint16_t*>(p) + i))
                        << (16 * (i % 2));
  }
  TETRIS_DEVICE void numbers(float (&to)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i)
      to[i] =
          Numeric<T>::load(T{uint16_t(i % 2 == 0 ? words[i / 2] & 0xffff : words[i / 2] >> 16)});
  }
};

}  // namespace detail

template <int N>
struct Run<Half, N> : detail::Run16Bit<Half, N> {};
template <int N>
struct Run<BFloat16, N> : detail::Run16Bit<BFloat16, N> {};

template <class T, int N>
TETRIS_DEVICE Run<T, N> read_global(const T* p) {
  Run<T, N> run;
  run.template load<detail::ReadGlobal>(p);
  return run;
}
template <class T, int N>
TETRIS_DEVICE void load_global(const T* p, typename Numeric<T>::Accumulator (&v)[N]) {
  read_global<T, N>(p).numbers(v);
}
template <class T, int N>
TETRIS_DEVICE void load_shared(const T* p, typename Numeric<T>::Accumulator (&v)[N]) {
  Run<T, N> run;
  run.template load<detail::ReadShared>(p);
  run.numbers(v);
}

}  // namespace tetris::cuda
