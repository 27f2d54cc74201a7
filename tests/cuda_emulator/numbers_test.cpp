// 16-bit formats against their definitions.
#include "cuda_emulator/numbers.h"

#include <cmath>

#include "cuda/numeric.cuh"
#include "self_test.h"

namespace tetris::cuda::test {
namespace {

using namespace emulator;

double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

TEST(Half, EveryNumber) {
  for (int i = 0; i < 65536; ++i) {
    const auto bits = uint16_t(i);
    const double want = half_value(bits);
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(half_to_float(bits)));
      EXPECT_EQ(float_to_half(half_to_float(bits)), 0x7fff);
    } else {
      EXPECT_EQ(half_to_float(bits), want);
      EXPECT_EQ(float_to_half(half_to_float(bits)), bits);
    }
  }
}

TEST(Half, RoundsToNearestEven) {
  for (int i = 0; i < 0x7c00; ++i) {
    const auto bits = uint16_t(i);
    const double low = half_value(bits), high = i == 0x7bff ? 65536 : half_value(bits + 1);
    const auto middle = float((low + high) / 2);  // exact: one bit more
    EXPECT_EQ(float_to_half(middle), i % 2 ? bits + 1 : bits);
    EXPECT_EQ(float_to_half(std::nextafter(middle, 0.0f)), bits);
    EXPECT_EQ(float_to_half(std::nextafter(middle, INFINITY)), bits + 1);
    EXPECT_EQ(float_to_half(-middle), 0x8000 | (i % 2 ? bits + 1 : bits));
  }
  EXPECT_EQ(float_to_half(1e30f), 0x7c00);
  EXPECT_EQ(float_to_half(-INFINITY), 0xfc00);
  EXPECT_EQ(float_to_half(1e-30f), 0);
}

TEST(BFloat16, RoundsToNearestEven) {
  for (int i = 0; i < 0x7f80; ++i) {
    const auto bits = uint16_t(i);
    const uint32_t middle = uint32_t{bits} << 16 | 0x8000;
    EXPECT_EQ(float_to_bfloat16(bfloat16_to_float(bits)), bits);
    EXPECT_EQ(float_to_bfloat16(as_float(middle)), i % 2 ? bits + 1 : bits);
    EXPECT_EQ(float_to_bfloat16(as_float(middle - 1)), bits);
    EXPECT_EQ(float_to_bfloat16(as_float(middle + 1)), bits + 1);
  }
  EXPECT_EQ(float_to_bfloat16(NAN), 0x7fff);
}

TEST(BFloat16, KernelsRoundInIntegers) {
  for (uint32_t i = 0; i < 1 << 16; ++i) {
    const float v = as_float(i * 65537u + (i << 9));
    const uint16_t got = Numeric<BFloat16>::store(v).bits;
    if (std::isnan(v))
      EXPECT_TRUE(std::isnan(bfloat16_to_float(got)));
    else
      EXPECT_EQ(got, float_to_bfloat16(v));
  }
}

TEST(Tf32, RoundsTiesAway) {
  EXPECT_EQ(as_float(float_to_tf32(1 + 0x1p-11f)), 1 + 0x1p-10f);
  EXPECT_EQ(as_float(float_to_tf32(-1 - 0x1p-11f)), -1 - 0x1p-10f);
  EXPECT_EQ(as_float(float_to_tf32(1 + 0x1.fp-12f)), 1);
  EXPECT_EQ(as_float(float_to_tf32(INFINITY)), INFINITY);
  EXPECT_TRUE(std::isnan(tf32_to_float(float_to_tf32(NAN))));
  EXPECT_EQ(tf32_to_float(as_bits(1 + 0x1.8p-11f)), 1);  // cut off
}

}  // namespace
}  // namespace tetris::cuda::test
