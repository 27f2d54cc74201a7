// Products on ordinary cores, every instantiation that ships, on the emulator.
#include "cuda/simt.h"

#include <gtest/gtest.h>

#include <cstring>

#include "cuda_emulator/problem.h"

namespace tetris::cuda::test {
namespace {

constexpr DType kDTypes[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64};

std::string name(const SimtConfig& c) {
  return std::string(c.kind == SimtConfig::kTall ? "tall" : "strips") + " warps " +
         std::to_string(c.warps) + " pixels " + std::to_string(c.pixels) + " slab " +
         std::to_string(c.slab);
}

void expect_right(const Case& c, const SimtConfig& config, uint64_t seed = 1) {
  SCOPED_TRACE(c.name() + " " + name(config));
  ProductProblem problem(c, seed);
  ASSERT_EQ("", simt_product(problem.product(), config, nullptr));
  EXPECT_EQ("", problem.wrong());
}

void expect_right(const Case& c, const SimtSampledConfig& config, uint64_t seed = 1) {
  SCOPED_TRACE(c.name() + (config.by_row ? " by row" : " regions") + " splits " +
               std::to_string(config.splits));
  SampledProblem problem(c, seed);
  ASSERT_EQ("", simt_sampled_product(problem.product(), config, nullptr));
  EXPECT_EQ("", problem.wrong());
  if (c.split) {
    EXPECT_EQ("", problem.wrong_partial());
  }
}

SimtConfig strips(DType dtype, int warps, int pixels, int slab) {
  SimtConfig config;
  config.warps = warps;
  config.pixels = dtype == DType::kFloat64 ? 64 : pixels;
  config.slab = slab;
  return config;
}

SimtConfig tall() {
  SimtConfig config;
  config.kind = SimtConfig::kTall;
  return config;
}

bool sampled(const Case& c) { return !c.gradient; }

// -- the product ----------------------------------------------------------------------------------

TEST(SimtStrips, Risks) {
  const std::pair<int, int> blocks[] = {{1, 1}, {4, 1}, {8, 1}, {3, 2}, {2, 4}, {16, 16}};
  for (int d = 0; d < 4; ++d)
    for (int b = d % 2; b < 6; b += 2) {  // every other block, in turns: time
      const auto [height, width] = blocks[b];
      // Few warps and small slabs: several chunks of rows, several slabs.
      for (const Case& c : risky_cases(kDTypes[d], height, width))
        expect_right(c, strips(kDTypes[d], 1 + b % 2, height == 8 || d == 1 ? 32 : 128, 16));
    }
}

TEST(SimtStrips, ByChance) {
  Limits limits;
  limits.heights = {1, 2, 3, 4, 6, 8, 12, 16, 24, 40, 128};
  limits.widths = {1, 2, 3, 4, 8, 16, 20, 128};
  emulator::Random random(5);
  uint64_t seed = 0;
  for (const Case& c : random_cases(100, 11, limits)) {
    const int width = c.gradient ? c.height : c.width;
    const int slab = std::max(width, int(1 + random.below(128)));
    expect_right(c, strips(c.dtype, 1 + random.below(12), random.below(2) ? 128 : 32, slab),
                 ++seed);
  }
}

TEST(SimtStrips, EveryStripAndTile) {
  for (DType dtype : kDTypes)
    for (int height : {1, 2, 4, 8})
      for (int width : {1, 3})
        for (int pixels : {32, 128})
          for (bool gradient : {false, true}) {
            Case c;
            c.dtype = dtype;
            c.height = gradient ? width : height;
            c.width = gradient ? height : width;
            c.rows = 7 * c.height;
            c.cols = 30 * c.width;
            c.gradient = gradient;
            c.geometry = tokens(150);
            expect_right(c, strips(dtype, 4, pixels, 12));
          }
}

TEST(SimtStrips, ColumnsInAnyOrder) {
  for (int width : {1, 4}) {
    Case c;
    c.height = 4;
    c.width = width;
    c.rows = 20;
    c.cols = 30 * width;
    c.geometry = tokens(40);
    ProductProblem problem(c, 3);
    Product p = problem.product();
    // Backwards, with the numbers of blocks: the same matrix.
    std::vector<int32_t> col_idx, block;
    for (int64_t r = 0; r < p.w.block_rows(); ++r)
      for (int32_t b = p.w.row_ptr[r + 1] - 1; b >= p.w.row_ptr[r]; --b) {
        col_idx.push_back(p.w.col_idx[b]);
        block.push_back(b);
      }
    p.w.col_idx = col_idx.data();
    p.w.block = block.data();
    ASSERT_EQ("", simt_product(p, strips(c.dtype, 2, 128, 8), nullptr));
    EXPECT_EQ("", problem.wrong());
  }
}

TEST(SimtTall, Risks) {
  for (auto [height, width] : {std::pair{32, 8}, {40, 1}, {33, 3}, {72, 4}})
    for (const Case& c : risky_cases(DType::kFloat32, height, width)) expect_right(c, tall());
}

TEST(SimtTall, ByChance) {
  Limits limits;
  limits.dtypes = {DType::kFloat32};
  limits.heights = {5, 16, 24, 32, 48, 64, 96, 100, 128};
  limits.widths = {1, 2, 3, 7, 8, 16, 32};
  limits.most_block_rows = 3;
  limits.most_tokens = 300;
  uint64_t seed = 0;
  for (const Case& c : random_cases(40, 12, limits)) expect_right(c, tall(), ++seed);
}

TEST(Simt, TheChosenTilesWork) {
  Limits limits;
  limits.heights = {1, 4, 7, 32, 64, 128};
  uint64_t seed = 0;
  for (const Case& c : random_cases(20, 13, limits)) {
    ProductProblem problem(c, ++seed);
    for (int multiprocessors : {1, 132})
      expect_right(c, simt_config(problem.product(), multiprocessors), seed);
  }
}

TEST(Simt, TallTilesForTallRowsAndManyPixels) {
  Case c;
  c.height = c.width = 64;
  c.rows = c.cols = 512;
  c.density = 0.1;
  c.geometry = tokens(256);
  ProductProblem problem(c);
  EXPECT_EQ(SimtConfig::kTall, simt_config(problem.product(), 8).kind);
  EXPECT_EQ(SimtConfig::kStrips, simt_config(problem.product(), 132).kind);
  Product p = problem.product();
  p.dtype = DType::kFloat16;
  EXPECT_EQ(SimtConfig::kStrips, simt_config(p, 8).kind);
}

TEST(Simt, SameResultEveryTime) {
  for (const SimtConfig& config : {strips(DType::kFloat32, 3, 128, 20), tall()}) {
    Case c;
    c.height = 32;
    c.width = 5;
    c.rows = 96;
    c.cols = 95;
    c.geometry = convolution(2, 6, 7, {3, 1, 1, 1}, {3, 2, 1, 1});
    ProductProblem problem(c);
    std::vector<char> first;
    for (uint64_t seed : {1, 2, 3}) {
      emulator::options().seed = seed;
      problem.clear();
      ASSERT_EQ("", simt_product(problem.product(), config, nullptr));
      const char* const y = static_cast<const char*>(problem.y().data());
      if (first.empty()) first.assign(y, y + problem.y().bytes());
      EXPECT_EQ(0, std::memcmp(first.data(), y, first.size()));
    }
  }
}

TEST(Simt, SaysWhatItDoesNotTake) {
  Case c;
  c.rows = c.cols = 40;
  c.height = c.width = 20;
  c.geometry = tokens(3);
  ProductProblem problem(c);
  const auto error = [&](const SimtConfig& config) {
    return simt_product(problem.product(), config, nullptr);
  };
  EXPECT_EQ("simt: warps must be in [1, 12] (got 13)", error(strips(c.dtype, 13, 128, 32)));
  EXPECT_EQ("simt: pixels must be 32 or 128 (got 64)", error(strips(c.dtype, 1, 64, 32)));
  EXPECT_EQ("simt: slab must be at least the width of a block (got 16 and 20)",
            error(strips(c.dtype, 1, 32, 16)));
  Product p = problem.product();
  p.dtype = DType::kFloat64;
  EXPECT_EQ("simt: the tall kernel is for float32 only", simt_product(p, tall(), nullptr));
  EXPECT_EQ("simt: pixels must be 64 for float64 (got 128)",
            simt_product(p, strips(DType::kFloat32, 1, 128, 32), nullptr));
}

// -- the sampled product
// ---------------------------------------------------------------------------

TEST(SimtSampled, Risks) {
  const std::pair<int, int> blocks[] = {{1, 1}, {4, 1}, {8, 2}, {4, 4}, {3, 5}, {32, 16}};
  for (int d = 0; d < 4; ++d)
    for (int b = d % 2; b < 6; b += 2) {
      const auto [height, width] = blocks[b];
      for (const Case& c : risky_cases(kDTypes[d], height, width))
        if (sampled(c))
          for (bool by_row : {false, true}) expect_right(c, {by_row, 1});
    }
}

TEST(SimtSampled, ByChance) {
  Limits limits;
  limits.gradients = false;
  limits.heights = {1, 2, 3, 4, 8, 16, 20, 100, 128};
  limits.widths = {1, 2, 4, 7, 8, 32};
  limits.most_col_groups = 9;
  uint64_t seed = 0;
  for (const Case& c : random_cases(80, 21, limits))
    for (bool by_row : {false, true}) expect_right(c, {by_row, 1}, ++seed);
}

// More stored inputs than a tile has slots, more rows and columns than a region.
TEST(SimtSampled, ManyTiles) {
  for (DType dtype : {DType::kFloat32, DType::kFloat64})
    for (auto [height, width] : {std::pair{1, 1}, {8, 1}, {16, 16}, {128, 128}})
      for (bool by_row : {false, true}) {
        if (!by_row && width > 32) continue;
        Case c;
        c.dtype = dtype;
        c.height = height;
        c.width = width;
        c.rows = std::max(150, 2 * height);
        c.cols = std::max(300, 2 * width);
        c.density = 0.6;
        c.geometry = tokens(35);
        c.x_channels_last = height != 8;
        expect_right(c, {by_row, 1});
      }
}

TEST(SimtSampled, Split) {
  for (DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32})
    for (auto [height, width] : {std::pair{1, 1}, {8, 1}, {4, 4}, {16, 8}})
      for (bool by_row : {false, true})
        for (int splits : {1, 3, 100}) {
          Case c;
          c.dtype = dtype;
          c.height = height;
          c.width = width;
          c.rows = 3 * height - height / 2;
          c.cols = 5 * width;
          c.geometry = convolution(3, 6, 9, {3, 1, 1, 1}, {3, 1, 1, 1});
          c.split = true;
          expect_right(c, {by_row, splits});
        }
}

// Odd numbers of sums in a tile, behind which lie what 8 bytes align: UBSan sees what a GPU
// refuses.
TEST(SimtSampled, OddTiles) {
  for (auto [height, width] : {std::pair{5, 3}, {11, 9}, {33, 3}, {65, 7}, {125, 1}})
    for (bool by_row : {false, true}) {
      Case c;
      c.height = height;
      c.width = width;
      c.rows = 2 * height;
      c.cols = 70 * width;
      c.density = 0.8;
      c.geometry = tokens(33);
      expect_right(c, {by_row, 1});
    }
}

TEST(SimtSampled, Float64IsNotSplit) {
  Case c;
  c.dtype = DType::kFloat64;
  c.rows = c.cols = 16;
  c.geometry = tokens(1024);
  SampledProblem problem(c);
  SampledProduct p = problem.product();
  float place;
  p.partial = &place;
  EXPECT_EQ(1, simt_sampled_config(p, 132).splits);
  p.dtype = DType::kFloat32;
  EXPECT_EQ(4, simt_sampled_config(p, 132).splits);
}

TEST(SimtSampled, PartialSumsMayBeTheResult) {
  Case c;
  c.height = 4;
  c.rows = 16;
  c.cols = 20;
  c.geometry = tokens(200);
  SampledProblem problem(c);
  SampledProduct p = problem.product();
  p.partial = static_cast<float*>(p.dvalues);
  ASSERT_EQ("", simt_sampled_product(p, {false, 4}, nullptr));
  EXPECT_EQ("", problem.wrong());
}

TEST(SimtSampled, TheChosenTilesWork) {
  Limits limits;
  limits.gradients = false;
  limits.heights = {1, 8, 16, 128};
  limits.widths = {1, 8, 128};
  limits.dtypes = {DType::kFloat16, DType::kBFloat16, DType::kFloat32};
  uint64_t seed = 0;
  for (Case c : random_cases(30, 22, limits)) {
    c.split = seed % 2 == 1;
    SampledProblem problem(c, ++seed);
    expect_right(c, simt_sampled_config(problem.product(), 132), seed);
  }
}

TEST(SimtSampled, SaysWhatItDoesNotTake) {
  Case c;
  c.rows = c.cols = 80;
  c.height = c.width = 80;
  c.density = 1;
  c.geometry = tokens(3);
  SampledProblem problem(c);
  SampledProduct p = problem.product();
  EXPECT_EQ("simt: blocks wider than 64 need by_row (got 80)",
            simt_sampled_product(p, {false, 1}, nullptr));
  EXPECT_EQ("simt: splits must be 1 where there is no memory for partial sums (got 2)",
            simt_sampled_product(p, {true, 2}, nullptr));
  p.w.transposed = true;
  EXPECT_EQ("simt: the layout of a sampled product must not be transposed",
            simt_sampled_product(p, {true, 1}, nullptr));
}

}  // namespace
}  // namespace tetris::cuda::test
