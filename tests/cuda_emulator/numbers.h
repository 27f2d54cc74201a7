// 16-bit floating point and TF32 in software, from the formats' definitions (IEEE 754 binary16;
// bfloat16 and TF32: PTX ISA, "Alternate Floating-Point Data Formats").
#pragma once

#include <cstdint>
#include <cstring>

namespace tetris::cuda::emulator {

inline float as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline uint32_t as_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31,
                 fraction = bits & 0x3ff;
  if (exponent == 31) return as_float(sign | 0x7f800000 | fraction << 13);
  if (exponent > 0) return as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float v = static_cast<float>(fraction) * 0x1p-24f;  // subnormal, exact
  return sign ? -v : v;
}

// To nearest even, infinity beyond the range; any NaN becomes 0x7fff, as cvt.rn.f16.f32 has it.
inline uint16_t float_to_half(float v) {
  const uint32_t bits = as_bits(v), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520: halfway from the largest to 2^16
  if (magnitude <
      0x38800000) {  // below 2^-14: adding 2^-1 leaves multiples of 2^-24 in the fraction
    const float shifted = as_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (as_bits(shifted) - as_bits(0.5f)));
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xfff + odd) >> 13));
}

inline float bfloat16_to_float(uint16_t bits) { return as_float(uint32_t{bits} << 16); }

// To nearest even; any NaN becomes 0x7fff, as cvt.rn.bf16.f32 has it.
inline uint16_t float_to_bfloat16(float v) {
  const uint32_t bits = as_bits(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// To nearest, ties away from zero (cvt.rna); the low 13 bits are zero.
inline uint32_t float_to_tf32(float v) {
  const uint32_t bits = as_bits(v);
  if ((bits & 0x7f800000) == 0x7f800000) return bits & 0x7fffff ? 0x7fffffff : bits;
  return (bits + 0x1000) & ~uint32_t{0x1fff};
}

// What a matrix instruction makes of a register: it ignores the low 13 bits.
inline float tf32_to_float(uint32_t bits) { return as_float(bits & ~uint32_t{0x1fff}); }

}  // namespace tetris::cuda::emulator
