// Products for a few pixels, every instantiation that ships, on the emulator.
#include "cuda/skinny.h"

#include <gtest/gtest.h>

#include <cstring>

#include "cuda_emulator/problem.h"

namespace tetris::cuda::test {
namespace {

constexpr DType kDTypes[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32};
constexpr size_t kShared = 227 * 1024;

void expect_right(const Case& c, const SkinnyConfig& config, uint64_t seed = 1) {
  SCOPED_TRACE(c.name() + " pixels " + std::to_string(config.pixels) + " split " +
               std::to_string(config.split) + " ctas " + std::to_string(config.ctas));
  ProductProblem problem(c, seed);
  ASSERT_EQ("", skinny_product(problem.product(), config, nullptr));
  EXPECT_EQ("", problem.wrong());
}

TEST(Skinny, Risks) {
  const SkinnyConfig configs[] = {{1, 2, 2}, {4, 8, 1}, {8, 1, 3}, {16, 4, 1}};
  int turn = 0, block = 0;
  for (auto [height, width] : {std::pair{1, 1}, {2, 3}, {4, 1}, {8, 2}, {3, 2}, {1, 8}, {16, 16}})
    // All types are met at each way to read blocks; all pairs would take three times as long.
    for (const Case& c : risky_cases(kDTypes[block++ % 3], height, width))
      if (!c.gradient && c.geometry.pixels() <= 70) expect_right(c, configs[turn++ % 4]);
}

TEST(Skinny, ByChance) {
  Limits limits;
  limits.dtypes = {std::begin(kDTypes), std::end(kDTypes)};
  limits.heights = {1, 2, 3, 4, 5, 8, 12, 16, 20, 24, 48, 64, 100, 128};
  limits.widths = {1, 2, 3, 4, 5, 8, 16};
  limits.most_tokens = 20;
  limits.most_col_groups = 30;
  limits.gradients = false;
  emulator::Random random(5);
  uint64_t seed = 0;
  for (const Case& c : random_cases(150, 31, limits)) {
    const int pixels[] = {1, 4, 8, 16}, splits[] = {1, 2, 4, 8};
    expect_right(c, {pixels[random.below(4)], splits[random.below(4)], 1 + int(random.below(4))},
                 ++seed);
  }
}

// Long block rows, so that the loops with several vectors in flight run, and end anywhere.
TEST(Skinny, EveryVectorAndPixels) {
  for (DType dtype : kDTypes)
    for (int height : {1, 2, 4, 8, 16, 3})
      for (int pixels : {1, 4, 8, 16})
        for (int width : {1, 3}) {
          Case c;
          c.dtype = dtype;
          c.height = height;
          c.width = width;
          c.rows = 5 * height;
          c.cols = 1300;  // ragged for 3
          c.density = 0.7;
          c.geometry = tokens(pixels);
          expect_right(c, {pixels, height == 2 ? 2 : 1, 1}, uint64_t(pixels));
        }
}

TEST(Skinny, UnalignedValuesAndIndices) {
  for (DType dtype : kDTypes)
    for (int height : {1, 2, 8}) {
      Case c;
      c.dtype = dtype;
      c.height = height;
      c.rows = 3 * height;
      c.cols = 200;
      c.geometry = tokens(3);
      c.shift = 1;
      expect_right(c, {4, 2, 1});
      c.shift = 0;
      ProductProblem problem(c);
      Product p = problem.product();
      std::vector<int32_t> col_idx(static_cast<size_t>(p.w.nnzb + 1));
      std::copy_n(p.w.col_idx, p.w.nnzb, col_idx.data() + 1);
      p.w.col_idx = col_idx.data() + 1;
      ASSERT_EQ("", skinny_product(p, {4, 2, 1}, nullptr));
      EXPECT_EQ("", problem.wrong());
    }
}

TEST(Skinny, TheChosenConfigWorksAndFits) {
  Limits limits;
  limits.dtypes = {std::begin(kDTypes), std::end(kDTypes)};
  limits.heights = {1, 2, 4, 7, 16, 128};
  limits.most_tokens = 16;
  limits.gradients = false;
  uint64_t seed = 0;
  for (const Case& c : random_cases(40, 32, limits)) {
    ProductProblem problem(c, ++seed);
    for (size_t shared : {kShared, size_t{24} * 1024}) {
      const SkinnyConfig config = skinny_config(problem.product(), 3, shared);
      expect_right(c, config, seed);
    }
  }
}

TEST(Skinny, ConfigsOfDecoding) {
  Case c;
  c.dtype = DType::kBFloat16;
  c.height = c.width = 16;
  c.rows = c.cols = 4096;
  c.density = 0;
  ProductProblem problem(c);
  Product p = problem.product();
  p.w.nnzb = 256 * 26;  // a tenth
  const auto config = [&](int pixels) {
    p.geometry = tokens(pixels);
    return skinny_config(p, 132, kShared);
  };
  EXPECT_EQ(1, config(1).pixels);
  EXPECT_EQ(16, config(16).pixels);
  EXPECT_EQ(132, config(16).ctas);  // all of x is most of an SM's shared memory
  p.w.cols = 14336;
  EXPECT_EQ(4, config(16).pixels);
  EXPECT_LE(skinny_shared_bytes(p, config(16)), kShared);
}

TEST(Skinny, SameResultEveryTime) {
  Case c;
  c.height = 4;
  c.rows = 32;
  c.cols = 900;
  c.geometry = tokens(9);
  ProductProblem problem(c);
  std::vector<char> first;
  for (uint64_t seed : {1, 2, 3}) {
    emulator::options().seed = seed;
    problem.clear();
    ASSERT_EQ("", skinny_product(problem.product(), {16, 4, 2}, nullptr));
    const char* const y = static_cast<const char*>(problem.y().data());
    if (first.empty()) first.assign(y, y + problem.y().bytes());
    EXPECT_EQ(0, std::memcmp(first.data(), y, first.size()));
  }
}

TEST(Skinny, SaysWhatItDoesNotTake) {
  Case c;
  c.rows = c.cols = 8;
  c.height = c.width = 2;
  c.geometry = tokens(3);
  ProductProblem problem(c);
  Product p = problem.product();
  EXPECT_EQ("skinny: pixels must be 1, 4, 8 or 16 (got 2)", skinny_product(p, {2, 1, 1}, nullptr));
  EXPECT_EQ("skinny: split must be 1, 2, 4 or 8 (got 3)", skinny_product(p, {4, 3, 1}, nullptr));
  EXPECT_EQ("skinny: ctas must be at least 1 (got 0)", skinny_product(p, {4, 1, 0}, nullptr));
  p.dtype = DType::kFloat64;
  EXPECT_EQ("skinny: float64 is not taken", skinny_product(p, {4, 1, 1}, nullptr));
  c.gradient = true;
  ProductProblem gradient(c);
  EXPECT_EQ("skinny: transposed layouts are not taken",
            skinny_product(gradient.product(), {4, 1, 1}, nullptr));
}

}  // namespace
}  // namespace tetris::cuda::test
