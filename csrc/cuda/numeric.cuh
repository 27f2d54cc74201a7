// The element types of kernels, independent of CUDA's headers, and what it takes to compute in
// float (double for double).
#pragma once

#include <cstdint>

#include "cuda/platform.h"
#include "cuda/problem.h"
#include "cuda/ptx.cuh"

namespace tetris::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct Numeric {
  using Accumulator = T;
  static TETRIS_DEVICE T load(T v) { return v; }
  static TETRIS_DEVICE T store(T v) { return v; }
};

template <>
struct Numeric<Half> {
  using Accumulator = float;
  static TETRIS_DEVICE float load(Half v) { return ptx::half_to_float(v.bits); }
  static TETRIS_DEVICE Half store(float v) { return {ptx::float_to_half(v)}; }
};

template <>
struct Numeric<BFloat16> {
  using Accumulator = float;
  static TETRIS_DEVICE float load(BFloat16 v) { return ptx::bits_to_float(uint32_t(v.bits) << 16); }
  // Round to nearest even; NaN stays a (quiet) NaN. In integers: also for GPUs without bfloat16.
  static TETRIS_DEVICE BFloat16 store(float v) {
    const uint32_t bits = ptx::float_to_bits(v);
    if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  }
};

template <class T>
constexpr DType kDType = DType::kFloat32;
template <>
inline constexpr DType kDType<Half> = DType::kFloat16;
template <>
inline constexpr DType kDType<BFloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDType<double> = DType::kFloat64;

}  // namespace tetris::cuda
