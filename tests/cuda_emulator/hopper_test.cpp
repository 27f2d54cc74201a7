// Every kernel of hopper.cu against double precision, and that mistakes in it would be seen.
#include "cuda/hopper.h"

#include <gtest/gtest.h>

#include <string>

#include "cuda/ptx_sm90.cuh"
#include "cuda_emulator/problem.h"

namespace tetris::cuda::test {
namespace {

using emulator::Sabotage;

// Operands are multiples of 8 elements apart, as TMA wants them.
Case layer(DType dtype, int height, int width) {
  Case c;
  c.dtype = dtype;
  c.height = height;
  c.width = width;
  c.row_perm = c.col_perm = false;
  return c;
}

std::string describe(const Case& c, const HopperConfig& config) {
  return c.name() + ", tiles of " + std::to_string(config.tile_pixels) + " pixels, " +
         std::to_string(config.stages) + " stages, strips of " +
         std::to_string(config.strip_pixels) + ", " + std::to_string(config.ctas) + " CTAs, seed " +
         std::to_string(emulator::options().seed);
}

// A ring, strips and a grid by chance.
HopperConfig random_config(const Product& product, int tile_pixels, Random& random) {
  HopperConfig config;
  config.tile_pixels = tile_pixels;
  config.stages = 2 + int(random.below(uint32_t(hopper_max_stages(product, tile_pixels) - 1)));
  config.strip_pixels = random.one_in(2) ? 0 : tile_pixels;
  config.ctas = 1 + int(random.below(4));
  return config;
}

void expect_right(const Case& c, int tile_pixels, uint64_t seed) {
  emulator::options().seed = seed;
  Random random(seed);
  ProductProblem problem(c, seed);
  ASSERT_EQ("", hopper_supports(problem.product())) << c.name();
  const HopperConfig config = random_config(problem.product(), tile_pixels, random);
  SCOPED_TRACE(describe(c, config));
  ASSERT_EQ("", hopper_product(problem.product(), config, nullptr));
  EXPECT_EQ("", problem.wrong());
}

// One layer for each kernel and width of boxes: with edges that are ragged in rows, columns and
// pixels, more tiles than CTAs, slabs that hold several blocks and last slabs that are not full.
class Kernels : public testing::TestWithParam<std::tuple<DType, bool, int, int>> {};

TEST_P(Kernels, AreRight) {
  const auto [dtype, gradient, rows, tile_pixels] = GetParam();
  uint64_t seed = 1;
  for (int width : {16, 32, 48, 64, 128}) {
    Case c = gradient ? layer(dtype, width, rows) : layer(dtype, rows, width);
    c.gradient = gradient;
    c.rows = 2 * c.height + c.height / 2 + 8;
    c.cols = 2 * c.width + c.width / 2 + 8;
    if (width < 64) (gradient ? c.rows : c.cols) += 4 * width;
    c.density = 0.7;
    c.ordered = width == 32;
    c.residual = width == 48;
    c.activation = width == 64 ? Activation::kRelu : Activation::kNone;
    c.geometry = tokens(tile_pixels + 70 - width / 4);
    expect_right(c, tile_pixels, seed++);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Kernels,
                         testing::Combine(testing::Values(DType::kFloat16, DType::kBFloat16),
                                          testing::Bool(), testing::Values(64, 128),
                                          testing::Values(128, 256)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param) == DType::kFloat16 ? "f16"
                                                                                         : "bf16") +
                                  (std::get<1>(info.param) ? "Gradient" : "") + "Rows" +
                                  std::to_string(std::get<2>(info.param)) + "Pixels" +
                                  std::to_string(std::get<3>(info.param));
                         });

TEST(Hopper, NamedRisks) {
  Case base = layer(DType::kBFloat16, 64, 32);
  base.rows = 192;
  base.cols = 128;
  base.geometry = tokens(40);
  std::vector<Case> cases;
  const auto add = [&](const std::function<void(Case&)>& change) {
    Case c = base;
    change(c);
    cases.push_back(c);
  };
  add([](Case& c) { c.density = 0; });
  add([](Case& c) { c.density = 0, c.bias = false, c.residual = true; });
  add([](Case& c) { c.density = 1; });
  add([](Case& c) { c.specials = true, c.density = 0.3; });
  add([](Case& c) { c.rows = 132, c.cols = 100, c.gap = 4, c.specials = true; });  // any element
  add([](Case& c) { c.rows = 8, c.cols = 8, c.density = 1; });
  add([](Case& c) { c.rows = 1, c.cols = 1, c.density = 1, c.gap = 7; });
  add([](Case& c) { c.height = 256, c.width = 16, c.rows = 300, c.cols = 44, c.gap = 4; });
  add([](Case& c) { c.height = 192, c.rows = 392, c.shift = 8; });
  add([](Case& c) { c.width = 128, c.cols = 136, c.density = 1; });  // a box beyond the edge
  for (int n : {0, 1, 31, 32, 33, 64, 127, 128, 129, 300})
    add([n](Case& c) { c.geometry = tokens(n); });
  for (Activation a :
       {Activation::kRelu, Activation::kGelu, Activation::kGeluTanh, Activation::kSilu})
    add([a](Case& c) { c.activation = a; });
  add([](Case& c) { c.geometry = convolution(3, 4, 5, {}, {}), c.residual = true; });
  add([](Case& c) { c.geometry = convolution(0, 4, 5, {}, {}); });
  // The same values in block numbers of their own, as an index that was sorted anew has them.
  add([](Case& c) { c.gradient = true, c.height = 16, c.width = 64, c.ordered = true; });
  uint64_t seed = 100;
  for (const Case& c : cases) expect_right(c, 128, seed++);
}

TEST(Hopper, Convolutions) {
  const Window same{3, 1, 1, 1}, strided{3, 2, 1, 1}, dilated{2, 1, 1, 2}, wide{2, 3, 2, 1};
  Case base = layer(DType::kFloat16, 64, 16);
  base.rows = 72;
  base.cols = 40;
  std::vector<Case> cases;
  const auto add = [&](const std::function<void(Case&)>& change) {
    Case c = base;
    change(c);
    cases.push_back(c);
  };
  for (bool gradient : {false, true}) {
    const auto blocks = [gradient](Case& c) {
      c.gradient = gradient;
      if (gradient) std::swap(c.height, c.width), std::swap(c.rows, c.cols);
    };
    add([&](Case& c) { blocks(c), c.geometry = convolution(2, 9, 20, same, same); });
    add([&](Case& c) { blocks(c), c.geometry = convolution(5, 7, 7, dilated, same); });
    add([&](Case& c) { blocks(c), c.geometry = convolution(1, 3, 150, same, {}), c.gap = 8; });
    add([&](Case& c) {
      blocks(c), c.geometry = convolution(3, 6, 5, same, dilated, true), c.residual = true;
    });
  }
  add([&](Case& c) { c.geometry = convolution(2, 14, 13, strided, strided); });
  add([&](Case& c) { c.geometry = convolution(3, 10, 12, wide, strided), c.residual = true; });
  add([&](Case& c) { c.geometry = convolution(2, 9, 9, {1, 2, 0, 1}, {1, 2, 0, 1}); });
  add([&](Case& c) { c.geometry = convolution(2, 8, 8, same, same), c.specials = true; });
  add([&](Case& c) { c.geometry = convolution(300, 1, 1, same, same), c.density = 0.3; });
  add([&](Case& c) {
    c.height = c.rows = 128, c.width = 64, c.cols = 72;
    c.geometry = convolution(1, 17, 18, same, same), c.activation = Activation::kSilu;
  });
  uint64_t seed = 400;
  for (const Case& c : cases) {
    expect_right(c, 128, seed);
    expect_right(c, 256, seed + 1);
    seed += 2;
  }
}

// 1x1, but images that do not lie behind each other: no line of pixels.
TEST(Hopper, ImagesApart) {
  Case c = layer(DType::kBFloat16, 64, 32);
  c.rows = 64;
  c.cols = 64;
  c.geometry = convolution(3, 5, 6, {}, {});
  c.geometry.images = 6;
  ProductProblem problem(c);
  Product p = problem.product();
  p.geometry.images = 3;  // every second one
  p.x_strides.image *= 2;
  p.y_strides.image *= 2;
  HopperConfig config;
  config.tile_pixels = 128;
  ASSERT_EQ("", hopper_product(p, config, nullptr));
  Numbers& y = problem.y();
  std::vector<double> got = y.all();
  problem.clear();
  ASSERT_EQ("", hopper_product(problem.product(), config, nullptr));
  ASSERT_EQ("", problem.wrong());
  for (int64_t i = 0; i < y.size(); ++i) {
    if (i / p.y_strides.image * 2 % 2 == 0 && i % p.y_strides.image < p.y_strides.image / 2)
      EXPECT_EQ(got[i], y.get(i));
    else
      EXPECT_TRUE(std::isnan(got[i]));
  }
}

TEST(Hopper, ByChance) {
  Limits limits;
  limits.dtypes = {DType::kFloat16, DType::kBFloat16};
  limits.heights = limits.widths = {16, 64, 128};
  limits.groups = limits.channels_first = false;
  limits.col_perm = limits.row_perm = false;
  limits.multiple_of = 8;
  limits.most_block_rows = limits.most_col_groups = 2;
  limits.most_tokens = 300;
  int products = 0, convolutions = 0;
  for (const Case& c : random_cases(120, 5, limits)) {
    const int runs = products + convolutions;
    ProductProblem problem(c);
    if (!hopper_supports(problem.product()).empty()) continue;
    expect_right(c, runs % 2 ? 128 : 256, uint64_t(200 + runs));
    ++(c.geometry.pointwise() ? products : convolutions);
  }
  EXPECT_GT(products, 20);
  EXPECT_GT(convolutions, 10);
}

TEST(Hopper, WheneverCopiesAndProductsAreDone) {
  for (emulator::Landing landing : {emulator::Landing::kAtOnce, emulator::Landing::kLatest}) {
    emulator::options().landing = landing;
    for (int height : {64, 128}) {
      Case c = layer(DType::kFloat16, height, 32);
      c.rows = 2 * height;
      c.cols = 512;
      c.geometry = tokens(140);
      for (uint64_t seed = 300; seed < 302; ++seed) expect_right(c, 128, seed);
    }
  }
  emulator::options().landing = emulator::Landing::kRandom;
}

TEST(Hopper, TheDefaultsFit) {
  for (int height : {64, 128})
    for (int count : {1, 200, 5000, 100000}) {
      Case c = layer(DType::kFloat16, height, 64);
      c.rows = c.cols = 256;
      ProductProblem problem(c);
      Product p = problem.product();
      p.geometry = tokens(count);
      for (int64_t cols : {256, 8192}) {
        p.w.cols = cols;
        const HopperConfig config = hopper_default(p);
        EXPECT_GE(config.stages, 4);
        EXPECT_EQ(config.stages, hopper_max_stages(p, config.tile_pixels));
        EXPECT_LE(config.strip_pixels * cols * 2, 16 << 20);
      }
    }
  Case c = layer(DType::kFloat16, 128, 64);
  c.rows = c.cols = 256;
  c.geometry = tokens(300);
  ProductProblem problem(c);
  ASSERT_EQ("", hopper_product(problem.product(), hopper_default(problem.product(), 3), nullptr));
  EXPECT_EQ("", problem.wrong());
}

TEST(Hopper, RefusesWhatItCannotDo) {
  Case base = layer(DType::kFloat16, 64, 16);
  base.rows = base.cols = 128;
  base.geometry = tokens(8);
  const auto reason = [&](const std::function<void(Case&)>& change) {
    Case c = base;
    change(c);
    ProductProblem problem(c);
    const std::string why = hopper_supports(problem.product());
    EXPECT_EQ(why.empty() ? "" : "hopper: " + why,
              hopper_product(problem.product(), hopper_default(problem.product()), nullptr));
    return why;
  };
  EXPECT_EQ("", reason([](Case&) {}));
  EXPECT_NE("", reason([](Case& c) { c.dtype = DType::kFloat32; }));
  EXPECT_NE("", reason([](Case& c) { c.height = 32; }));
  EXPECT_NE("", reason([](Case& c) { c.width = 8; }));
  EXPECT_NE("", reason([](Case& c) { c.groups = 2; }));
  EXPECT_NE("", reason([](Case& c) { c.row_perm = true; }));
  EXPECT_NE("", reason([](Case& c) { c.col_perm = true; }));
  EXPECT_NE("", reason([](Case& c) { c.x_channels_last = false; }));
  EXPECT_NE("", reason([](Case& c) { c.y_channels_last = false; }));
  EXPECT_NE("", reason([](Case& c) { c.gap = 4; }));
  EXPECT_NE("", reason([](Case& c) { c.shift = 4; }));
  EXPECT_NE("", reason([](Case& c) { c.rows = 100; }));
  EXPECT_NE("", reason([](Case& c) { c.geometry = convolution(1, 4, 4, {2, 2, 0, 1}, {}, true); }));
  EXPECT_NE("", reason([](Case& c) { c.geometry = convolution(1, 30, 4, {2, 9, 0, 1}, {}); }));

  ProductProblem problem(base);
  const auto run = [&](int tile_pixels, int stages) {
    HopperConfig config;
    config.tile_pixels = tile_pixels;
    config.stages = stages;
    return hopper_product(problem.product(), config, nullptr);
  };
  EXPECT_EQ("", run(128, 2));
  EXPECT_NE("", run(64, 2));
  EXPECT_NE("", run(128, 1));
  EXPECT_NE("", run(128, hopper_max_stages(problem.product(), 128) + 1));
}

// With an instruction that does not do its work, the kernel must break a rule or get the result
// wrong: at each seed where the rule is broken whatever the order, at some seed where it is a race.
TEST(Hopper, MistakesAreSeen) {
  struct Mistake {
    Sabotage what;
    bool always;
    const char* name;
    int seen = 0;
  };
  std::vector<Mistake> mistakes{
      {Sabotage::kNoInitFence, true, "fence_mbarrier_init left out"},
      {Sabotage::kNoWait, false, "mbarrier_try_wait left out"},
      {Sabotage::kWrongPhase, true, "mbarrier_try_wait for the other parity"},
      {Sabotage::kFewerBytes, true, "fewer bytes expected"},
      {Sabotage::kTwoArrivals, false, "mbarrier_arrive twice"},
      {Sabotage::kNoWgmmaFence, true, "wgmma_fence left out"},
      {Sabotage::kNoWgmmaWait, false, "wgmma_wait left out"},
      {Sabotage::kWrongSwizzle, true, "another swizzle in descriptors"},
      {Sabotage::kWrongStride, true, "another stride in descriptors"},
      {Sabotage::kWrongMajor, true, "a transposed, or not"},
      {Sabotage::kNoProxyFence, true, "fence_proxy_async left out"},
      {Sabotage::kNoBarrier, false, "named_barrier left out"},
      {Sabotage::kNoReadWait, false, "bulk_wait_read left out"}};
  constexpr int kSeeds = 4;
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    emulator::options().seed = seed;
    Case c = layer(DType::kBFloat16, seed % 2 ? 128 : 64, seed % 3 ? 32 : 64);
    c.rows = 2 * c.height;
    c.cols = 8 * c.width;
    c.density = 0.8;
    c.geometry = tokens(150);
    ProductProblem problem(c, seed);
    HopperConfig config;
    config.tile_pixels = 128;
    config.stages = 3;
    config.ctas = 1;
    SCOPED_TRACE(describe(c, config));
    ASSERT_EQ("", hopper_product(problem.product(), config, nullptr));
    ASSERT_EQ("", problem.wrong());
    for (Mistake& mistake : mistakes) {
      problem.clear();
      emulator::sabotage() = mistake.what;
      const std::string error = hopper_product(problem.product(), config, nullptr);
      emulator::sabotage() = Sabotage::kNone;
      mistake.seen += !error.empty() || !problem.wrong().empty();
    }
  }
  for (const Mistake& m : mistakes) EXPECT_GE(m.seen, m.always ? kSeeds : 1) << m.name;
}

}  // namespace
}  // namespace tetris::cuda::test
