// What every kernel does to a sum before it stores it: y = act(sum + bias + residual).
//
// Activations are those of the CPU kernels and of torch: NaN in, NaN out; at -inf GELU and SiLU are
// the NaN of the textbook formulas. All are written so that tails keep their relative accuracy:
// 1 + erf(x) and 1 + tanh(x) cancel left of -3, erfc(-x) and the logistic function do not.
//
// A switch per element is cheap, inlining it once per accumulator is not (64 copies of erfc are
// 50 KiB of code): kernels with many accumulators stage them through shared memory and apply this
// in a loop.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/activation.h"
#include "cuda/numeric.cuh"
#include "cuda/problem.h"

namespace tetris::cuda {

// The math functions by type; CUDA's own names, so that none is looked up in namespace std.
template <class A>
struct Math;
template <>
struct Math<float> {
  static TETRIS_DEVICE float exp(float v) { return ::expf(v); }
  static TETRIS_DEVICE float erfc(float v) { return ::erfcf(v); }
};
template <>
struct Math<double> {
  static TETRIS_DEVICE double exp(double v) { return ::exp(v); }
  static TETRIS_DEVICE double erfc(double v) { return ::erfc(v); }
};

namespace detail {

template <class A>
TETRIS_DEVICE A activate(A v, Activation act) {
  switch (act) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      return v <= A(0) ? A(0) : v;  // NaN <= 0 is false: it stays
    case Activation::kGelu:
      return A(0.5) * v * Math<A>::erfc(v * A(-0.70710678118654752440));
    case Activation::kGeluTanh: {
      // (1 + tanh(s)) / 2 = 1 / (1 + exp(-2 s)), s = sqrt(2 / pi) (v + 0.044715 v^3)
      const A s = A(-1.59576912160573071176) * (v + A(0.044715) * v * v * v);
      return v / (A(1) + Math<A>::exp(s));
    }
    case Activation::kSilu:
      return v / (A(1) + Math<A>::exp(-v));
  }
  return v;
}

}  // namespace detail

TETRIS_DEVICE float activate(float v, Activation act) { return detail::activate(v, act); }
TETRIS_DEVICE double activate(double v, Activation act) { return detail::activate(v, act); }

// Element `at` of a bias or a residual, as a number to compute with; 0 where there is none.
template <class T>
TETRIS_DEVICE typename Numeric<T>::Accumulator load_or_zero(const void* pointer, int64_t at) {
  return pointer ? Numeric<T>::load(static_cast<const T*>(pointer)[at])
                 : typename Numeric<T>::Accumulator(0);
}

// The same order of additions in every kernel family, so that they agree to the last rounding.
template <class T, class A>
TETRIS_DEVICE T finish(A sum, A bias, A residual, Activation act) {
  return Numeric<T>::store(activate(sum + bias + residual, act));
}

// The element of a map that holds pixel `pixel` (row * width + column) of an image.
TETRIS_HOST_DEVICE int64_t element_of(const Strides& strides, int64_t image, int64_t pixel,
                                      int64_t channel) {
  return image * strides.image + pixel * strides.pixel + channel * strides.channel;
}

}  // namespace tetris::cuda
