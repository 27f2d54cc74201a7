// Every tile of the tensor-core kernels that ships, against float64: ragged edges, empty and full
// rows, convolutions and gradients, operands that lie apart, and rings that wrap.
#include "cuda/mma.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "cuda/mma_tile.cuh"
#include "cuda_emulator/problem.h"
#include "cuda_emulator/statistics.h"

namespace tetris::cuda::test {
namespace {

struct Tile {
  int rows, others;  // pixels, or columns of the sampled product
};
constexpr Tile kTiles[] = {{128, 128}, {128, 64}, {64, 256}, {64, 128},
                           {32, 256},  {32, 128}, {16, 256}, {16, 128}};
constexpr DType kDTypes[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32};

int chunk_of(DType dtype) { return 16 / size_of(dtype); }

std::string tile_name(const Tile& tile) {
  return std::to_string(tile.rows) + "x" + std::to_string(tile.others);
}

// Without permutations, and TF32 where it matters.
Case base_case(DType dtype, int height, int width) {
  Case c;
  c.dtype = dtype;
  c.allow_tf32 = dtype == DType::kFloat32;
  c.height = height;
  c.width = width;
  c.row_perm = c.col_perm = false;
  return c;
}

void expect_product(const Case& c, const MmaConfig& config, uint64_t seed) {
  SCOPED_TRACE(c.name() + ", tile " + tile_name({config.tile_rows, config.tile_pixels}) + ", " +
               std::to_string(config.stages) + " stages, seed " + std::to_string(seed));
  emulator::options().seed = seed;
  ProductProblem problem(c, seed);
  ASSERT_EQ("", mma_supports(problem.product()));
  ASSERT_EQ("", mma_product(problem.product(), config, nullptr));
  EXPECT_EQ("", problem.wrong());
}

void expect_sampled(const Case& c, const MmaSampledConfig& config, uint64_t seed) {
  SCOPED_TRACE("sampled " + c.name() + ", tile " +
               tile_name({config.tile_rows, config.tile_columns}) + ", " +
               std::to_string(config.splits) + " splits, " + std::to_string(config.stages) +
               " stages, seed " + std::to_string(seed));
  emulator::options().seed = seed;
  SampledProblem problem(c, seed);
  ASSERT_EQ("", mma_supports(problem.product()));
  ASSERT_EQ("", mma_product(problem.product(), config, nullptr));
  EXPECT_EQ("", c.split ? problem.wrong_partial() : problem.wrong());
}

// What a warp reads at once lies in different banks: eight chunks for ldmatrix, 32 elements of TF32
// where lines lie across k.
template <class T, mma::Lines kLines, int kExtent>
void expect_no_bank_conflicts() {
  using Tile = mma::OperandTile<T, kLines, kExtent>;
  SCOPED_TRACE(std::to_string(sizeof(T)) + " bytes, lines of " + std::to_string(Tile::kLineChunks) +
               " chunks");
  std::set<unsigned> places;
  for (unsigned line = 0; line < Tile::kLineCount; ++line) {
    for (unsigned chunk = 0; chunk < Tile::kLineChunks; ++chunk) {
      places.insert(Tile::at(line, chunk));
      std::set<unsigned> banks;
      if (Tile::kAlongK || sizeof(T) == 2) {
        for (unsigned i = 0; i < 8; ++i) banks.insert(Tile::at(line / 8 * 8 + i, chunk) / 16 % 8);
        ASSERT_EQ(banks.size(), 8) << "line " << line << ", chunk " << chunk;
      } else {
        for (unsigned lane = 0; lane < 32; ++lane) {
          const unsigned element = chunk / 2 * 8 + lane / 4;
          const unsigned at = Tile::at(line / 4 * 4 + lane % 4, element / 4) + element % 4 * 4;
          banks.insert(at / 4 % 32);
        }
        ASSERT_EQ(banks.size(), 32) << "line " << line << ", chunk " << chunk;
      }
    }
  }
  EXPECT_EQ(places.size(), Tile::kBytes / 16) << "places are used twice";
  EXPECT_LT(*places.rbegin(), unsigned(Tile::kBytes));
}

TEST(MmaTile, NoBankConflicts) {
  constexpr mma::Lines kAlong = mma::Lines::kAlongK, kAcross = mma::Lines::kAcrossK;
  expect_no_bank_conflicts<Half, kAlong, 16>();
  expect_no_bank_conflicts<Half, kAlong, 256>();
  expect_no_bank_conflicts<float, kAlong, 128>();
  expect_no_bank_conflicts<Half, kAcross, 16>();
  expect_no_bank_conflicts<Half, kAcross, 32>();
  expect_no_bank_conflicts<Half, kAcross, 64>();
  expect_no_bank_conflicts<Half, kAcross, 128>();
  expect_no_bank_conflicts<Half, kAcross, 256>();
  expect_no_bank_conflicts<float, kAcross, 16>();
  expect_no_bank_conflicts<float, kAcross, 32>();
  expect_no_bank_conflicts<float, kAcross, 64>();
  expect_no_bank_conflicts<float, kAcross, 256>();
}

void expect_fragments_without_conflicts() {
  EXPECT_GT(emulator::statistics().ldmatrix_matrices, 0);
  EXPECT_EQ(emulator::statistics().ldmatrix_conflicts, 0);
}

// What each tile goes through: more than one tile of rows and of pixels, both ragged, blocks as
// high as the tile, an empty row; then a convolution of groups with the same.
std::vector<Case> cases_of(const Tile& tile, DType dtype, bool gradient) {
  const int chunk = chunk_of(dtype);
  Case c = base_case(dtype, tile.rows, 2 * chunk);
  c.rows = 3 * tile.rows - chunk, c.cols = 7 * c.width - chunk;
  if (gradient) std::swap(c.rows, c.cols), std::swap(c.height, c.width);
  c.gradient = gradient;
  c.geometry = tokens(tile.others + 37);
  c.density = 0.6;
  c.gap = chunk;
  c.residual = true;
  c.activation = Activation::kRelu;
  std::vector<Case> cases{c};

  c.rows *= 2, c.cols *= 2, c.groups = 2;
  const Window window{3, 2, 1, 1};
  c.geometry = convolution(2, 9, 15, window, window);
  c.density = 0.15;
  c.gap = 0, c.residual = false, c.activation = Activation::kSilu;
  cases.push_back(c);
  return cases;
}

TEST(MmaProduct, EveryTile) {
  emulator::statistics() = {};
  uint64_t seed = 0;
  for (DType dtype : kDTypes) {
    for (const Tile& tile : kTiles) {
      for (bool gradient : {false, true}) {
        for (const Case& c : cases_of(tile, dtype, gradient)) {
          ++seed;
          expect_product(c, {tile.rows, tile.others, seed % 2 ? 3 : 4}, seed);
        }
      }
    }
  }
  expect_fragments_without_conflicts();
}

// A tile of the sampled product sees more columns than it takes, a row of one block, an empty row,
// and pixels that are no multiple of a slab; then taps of a convolution, in splits.
TEST(MmaSampled, EveryTile) {
  emulator::statistics() = {};
  uint64_t seed = 100;
  for (DType dtype : kDTypes) {
    const int chunk = chunk_of(dtype);
    for (const Tile& tile : kTiles) {
      Case c = base_case(dtype, tile.rows, 2 * chunk);
      c.rows = 3 * tile.rows - chunk, c.cols = tile.others + 3 * chunk;
      c.geometry = tokens(75);
      c.density = 0.9;
      c.gap = chunk;
      ++seed;
      expect_sampled(c, {tile.rows, tile.others, 1, seed % 2 ? 3 : 4}, seed);

      c = base_case(dtype, tile.rows, chunk);
      c.rows = 2 * (tile.rows + chunk), c.cols = 2 * (tile.others / 4 / chunk * chunk);
      c.groups = 2;
      const Window window{3, 2, 1, 1};
      c.geometry = convolution(2, 9, 15, window, window, tile.rows == 32);
      c.density = 0.5;
      c.split = true;
      ++seed;
      expect_sampled(c, {tile.rows, tile.others, 3, seed % 2 ? 3 : 4}, seed);
    }
  }
  expect_fragments_without_conflicts();
}

// Behind ragged edges, of rows, columns and pixels, operands are copied as zeros. Zero times an
// infinite gradient is NaN, which must not reach an entry of the matrix, and the entries outside it
// are zero all the same.
TEST(MmaSampled, InfiniteGradients) {
  uint64_t seed = 200;
  for (DType dtype : kDTypes) {
    for (bool split : {false, true}) {
      const int chunk = chunk_of(dtype);
      Case c = base_case(dtype, 4 * chunk, 2 * chunk);
      c.rows = 7 * chunk, c.cols = 5 * chunk;
      c.geometry = tokens(70);
      c.density = 1;
      c.split = split;
      SCOPED_TRACE(c.name());
      emulator::options().seed = ++seed;
      SampledProblem problem(c, seed);
      const SampledProduct& p = problem.product();
      for (int64_t row = 0; row < c.rows; row += 2) {  // one each, at the last pixels, too
        const double infinite = row % 4 == 0 ? INFINITY : -INFINITY;
        problem.dy().set((69 - row % 40) * p.dy_strides.pixel + row, infinite);
      }
      problem.x().set(3 * p.x_strides.pixel + c.cols - 1, INFINITY);
      ASSERT_EQ("", mma_product(p, {c.height, 128, split ? 2 : 1, 3}, nullptr));
      EXPECT_EQ("", split ? problem.wrong_partial() : problem.wrong());
      int64_t infinite = 0;
      if (!split)
        for (double v : problem.dvalues().all()) infinite += std::isinf(v);
      EXPECT_TRUE(split || infinite > c.rows / 2 * (c.cols - 1)) << infinite;
    }
  }
}

// Channels first, and all permutations: pixels that are no multiple of a chunk where there is one
// image, several images otherwise; groups whose channels are no multiple of anything.
TEST(MmaProduct, FeatureMajor) {
  emulator::statistics() = {};
  uint64_t seed = 200;
  for (DType dtype : kDTypes) {
    const int chunk = chunk_of(dtype);
    for (const Tile& tile : {kTiles[0], kTiles[2], kTiles[4], kTiles[6]}) {
      for (bool gradient : {false, true}) {
        Case c = base_case(dtype, tile.rows, 2 * chunk);
        c.x_channels_last = c.y_channels_last = false;
        c.rows = 2 * tile.rows + 3, c.cols = 75 * chunk - 3;
        if (gradient) std::swap(c.rows, c.cols), std::swap(c.height, c.width);
        c.gradient = gradient;
        c.geometry = tokens(tile.others + 31);
        c.gap = chunk - (tile.others + 31) % chunk;
        c.density = 0.3;
        c.row_perm = c.col_perm = c.residual = true;
        ++seed;
        expect_product(c, {tile.rows, tile.others, seed % 2 ? 3 : 4}, seed);

        c.rows = 2 * (tile.rows + 5), c.cols = 2 * (3 * chunk + 1), c.groups = 2;
        if (gradient) std::swap(c.rows, c.cols);
        c.geometry = convolution(3, 4, 14, {}, {});
        c.gap = 0, c.row_perm = seed % 2, c.residual = false;
        c.activation = Activation::kGeluTanh;
        ++seed;
        expect_product(c, {tile.rows, tile.others, seed % 2 ? 3 : 4}, seed);
      }
    }
  }
  expect_fragments_without_conflicts();
}

// Rows so long that the list of chunks is filled again and again, and the pipeline runs long.
TEST(MmaProduct, LongRows) {
  for (DType dtype : kDTypes) {
    for (bool gradient : {false, true}) {
      for (int width : {1, 3, 8}) {
        const int chunk = chunk_of(dtype);
        Case c = base_case(dtype, 16, width * chunk);
        c.rows = 16, c.cols = 230 * chunk;
        if (gradient) std::swap(c.rows, c.cols), std::swap(c.height, c.width);
        c.gradient = gradient;
        c.geometry = tokens(70);
        c.density = 0.9;
        expect_product(c, {16, 128, width == 3 ? 4 : 3}, uint64_t(width));
      }
    }
  }
}

// Many pixels, so that their table is filled again and again; more splits than slabs.
TEST(MmaSampled, ManyPixels) {
  for (DType dtype : kDTypes) {
    Case c = base_case(dtype, 16, 16);
    c.rows = 16, c.cols = 16;
    const Window window{3, 1, 1, 1};
    c.geometry = convolution(3, 17, 19, window, window);
    expect_sampled(c, {16, 128, 1, 4}, 1);
    c.split = true;
    expect_sampled(c, {16, 128, 2, 3}, 2);
    c.geometry = tokens(40);
    expect_sampled(c, {16, 128, 9, 3}, 3);
  }
}

// Any block in any tile: more than one tile a block, tiles that are padded, narrow and wide blocks.
TEST(MmaProduct, RandomCases) {
  emulator::Random random(11);
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    Limits limits;
    limits.dtypes = {kDTypes[seed % 3]};
    limits.multiple_of = chunk_of(limits.dtypes[0]);
    limits.heights = limits.widths = {8, 16, 24, 32, 48, 136};
    if (limits.multiple_of == 4) limits.heights = limits.widths = {4, 8, 12, 20, 64};
    limits.most_block_rows = 3;
    limits.most_tokens = 300;
    limits.row_perm = limits.col_perm = limits.channels_first = false;
    Case c = random_case(random, limits);
    c.allow_tf32 = true;
    c.specials = seed % 5 == 0;
    const Tile tile = kTiles[random.below(8)];
    expect_product(c, {tile.rows, tile.others, seed % 2 ? 3 : 4}, seed);
    if (c.gradient) continue;
    c.split = seed % 4 == 0;
    expect_sampled(c, {tile.rows, tile.others, c.split ? 1 + int(seed % 3) : 1, seed % 2 ? 3 : 4},
                   seed);
  }
}

// Results need not be aligned, rows and pixels of a result need not come in multiples of anything.
TEST(MmaProduct, UnalignedResults) {
  for (DType dtype : kDTypes) {
    Case c = base_case(dtype, 16, 16);
    c.rows = 21, c.cols = 32;
    c.residual = true;
    c.geometry = convolution(2, 3, 7, {}, {});
    expect_product(c, {16, 128, 3}, 1);
    c.groups = 3, c.rows = 3 * 21, c.cols *= 3;
    expect_product(c, {16, 128, 3}, 2);
    c.gap = chunk_of(dtype);
    expect_product(c, {16, 128, 3}, 3);
  }
}

// Every second image of a batch: images lie apart, of the source and of the result.
TEST(MmaProduct, ImagesApart) {
  for (const Window& window : {Window{}, Window{3, 1, 1, 1}}) {
    Case c = base_case(DType::kFloat16, 16, 16);
    c.rows = c.cols = 40;
    c.bias = false;
    c.geometry = convolution(4, 7, 11, window, window);
    ProductProblem problem(c);
    Product p = problem.product();
    p.geometry.images = 2;
    p.x_strides.image *= 2;
    p.y_strides.image *= 2;
    ASSERT_EQ("", mma_product(p, {16, 128, 3}, nullptr));
    const Sums want = reference(p, problem.values(), problem.x(), nullptr, nullptr);
    for (int64_t i = 0; i < int64_t(want.sum.size()); ++i) {
      const int64_t pixel = i / p.w.rows, map = int64_t(p.geometry.result_h) * p.geometry.result_w;
      const double got =
          problem.y().get(offset(p.y_strides, pixel / map, pixel % map, i % p.w.rows));
      ASSERT_NEAR(
          got, want.sum[i],
          tolerance(p.dtype, false, p.activation, want.terms[i], want.scale[i], want.sum[i]));
    }
    for (int64_t i = 0; i < p.y_strides.image / 2; ++i) {
      ASSERT_TRUE(std::isnan(problem.y().get(p.y_strides.image / 2 + i))) << "image 1 was written";
    }
  }
}

// The same bits whatever the order of threads.
TEST(MmaProduct, Deterministic) {
  Case c = base_case(DType::kBFloat16, 32, 16);
  c.rows = 96, c.cols = 200;
  c.geometry = tokens(150);
  ProductProblem problem(c);
  std::vector<double> first;
  for (uint64_t seed : {1, 2}) {
    emulator::options().seed = seed;
    problem.clear();
    ASSERT_EQ("", mma_product(problem.product(), {32, 128, 4}, nullptr));
    if (first.empty()) first = problem.y().all();
  }
  EXPECT_EQ(first, problem.y().all());
}

TEST(Mma, SaysWhatItCannotDo) {
  const auto product = [](const Case& c) { return mma_supports(ProductProblem(c).product()); };
  const auto sampled = [](const Case& c) { return mma_supports(SampledProblem(c).product()); };
  Case good = base_case(DType::kFloat16, 16, 8);
  good.rows = 32, good.cols = 48, good.geometry = tokens(5);
  ASSERT_EQ("", product(good));
  ASSERT_EQ("", sampled(good));
  const auto with = [&](auto change) {
    Case c = good;
    change(c);
    return c;
  };

  const Case height = with([](Case& c) { c.height = 12; });
  EXPECT_EQ("mma: block height must be a multiple of 8 (got 12)", product(height));
  EXPECT_EQ("mma: block height must be a multiple of 8 (got 12)", sampled(height));
  EXPECT_EQ("mma: block width must be a multiple of 8 (got 4)",
            product(with([](Case& c) { c.width = 4; })));
  EXPECT_EQ("mma: float32 needs allow_tf32",
            product(with([](Case& c) { c.dtype = DType::kFloat32; })));
  EXPECT_EQ("mma: float64 is not supported",
            product(with([](Case& c) { c.dtype = DType::kFloat64; })));
  EXPECT_EQ("mma: permutations must be folded or applied before",
            product(with([](Case& c) { c.row_perm = true; })));
  EXPECT_EQ("mma: permutations must be folded or applied before",
            sampled(with([](Case& c) { c.col_perm = true; })));
  EXPECT_EQ("mma: x's pixel stride must be a positive multiple of 8 (got 44)",
            product(with([](Case& c) { c.cols = 44; })));
  EXPECT_EQ("mma: dy's pixel stride must be a positive multiple of 8 (got 30)",
            sampled(with([](Case& c) { c.rows = 30; })));
  EXPECT_EQ("mma: y's channel stride must be 1, like x's (got 5)",
            product(with([](Case& c) { c.y_channels_last = false; })));
  EXPECT_EQ("mma: x's channel stride must be 1 (got 5)",
            sampled(with([](Case& c) { c.x_channels_last = false; })));
  const auto feature_major = [&](auto change) {
    return product(with([&](Case& c) {
      c.x_channels_last = c.y_channels_last = false;
      c.row_perm = c.col_perm = true;
      change(c);
    }));
  };
  EXPECT_EQ("", feature_major([](Case& c) { c.gap = 3; }));
  EXPECT_EQ("mma: x's channel stride must be a multiple of 8 in feature-major maps (got 5)",
            feature_major([](Case&) {}));
  EXPECT_EQ("mma: pixels of an image must be a multiple of 8 in feature-major maps (got 12)",
            feature_major([](Case& c) { c.geometry = convolution(2, 3, 4, {}, {}), c.gap = 4; }));
  EXPECT_EQ("mma: feature-major maps are for 1x1 kernels without stride or padding",
            feature_major(
                [](Case& c) { c.geometry = convolution(1, 4, 4, {3, 1, 1, 1}, {3, 1, 1, 1}); }));
  EXPECT_EQ("mma: y's pixel stride must be 1, like x's (got 32)", feature_major([](Case& c) {
              c.gap = 3, c.y_channels_last = true, c.cols = 35, c.rows = 29;
            }));
  EXPECT_EQ("mma: x must start at a multiple of 16 bytes",
            product(with([](Case& c) { c.shift = 4; })));
  EXPECT_EQ("mma: columns of a group must be a multiple of 8 (got 12)",
            product(with([](Case& c) { c.groups = 4; })));
  EXPECT_EQ("mma: rows of a group must be a multiple of 8 (got 12)",
            sampled(with([](Case& c) { c.groups = 2, c.rows = 24; })));

  ProductProblem problem(good);
  EXPECT_EQ("mma: no tile of 512 pixels x 16 rows",
            mma_product(problem.product(), {16, 512, 4}, nullptr));
  EXPECT_EQ("mma: stages must be 3 or 4 (got 5)",
            mma_product(problem.product(), {16, 128, 5}, nullptr));
  SampledProblem sampled_problem(good);
  EXPECT_EQ("mma: splits must be 1, or more with partial sums (got 2)",
            mma_product(sampled_problem.product(), {16, 128, 2, 4}, nullptr));
}

// What is chosen can be launched, and is what the comments say.
TEST(Mma, Configs) {
  Product p;
  p.dtype = DType::kFloat16;
  p.w.rows = p.w.cols = 4096, p.w.width = 64;
  p.geometry = tokens(8192);
  const auto tile = [&](int height) {
    p.w.height = height;
    const MmaConfig config = mma_config(p, 132);
    return tile_name({config.tile_rows, config.tile_pixels});
  };
  EXPECT_EQ("16x256", tile(8));
  EXPECT_EQ("16x256", tile(16));
  EXPECT_EQ("32x256", tile(24));
  EXPECT_EQ("64x256", tile(48));
  EXPECT_EQ("128x128", tile(96));
  EXPECT_EQ("128x128", tile(256));
  EXPECT_EQ("64x256", tile(192));
  p.geometry = tokens(256);
  EXPECT_EQ("128x64", tile(128));
  EXPECT_EQ("32x128", tile(32));

  SampledProduct s;
  float partial = 0;
  s.w = p.w, s.w.height = 128, s.w.nnzb = 200, s.dtype = p.dtype;
  s.geometry = tokens(65536);
  EXPECT_EQ(1, mma_config(s, 132).splits);
  s.partial = &partial;
  EXPECT_GT(mma_config(s, 132).splits, 1);
  s.geometry = tokens(1024);
  EXPECT_EQ(1, mma_config(s, 132).splits);
}

}  // namespace
}  // namespace tetris::cuda::test
