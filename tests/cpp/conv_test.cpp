// The convolutions of csrc/cpu on the instruction set that TETRIS_CPU_ISA names (ctest runs each).
#include "cpu/conv.h"

#include <gtest/gtest.h>

#include <thread>

#include "conv_problem.h"
#include "core/cpu_features.h"
#include "cpu/conv_plan.h"
#include "cpu/dispatch.h"

namespace tetris::test {
namespace {

using cpu::ConvAxis;

void run_on_threads(int count, const std::function<void(int)>& fn) {
  std::vector<std::thread> pool;
  for (int i = 1; i < count; ++i) pool.emplace_back(fn, i);
  fn(0);
  for (auto& t : pool) t.join();
}

cpu::Parallel threads(int n) { return {n, run_on_threads}; }

constexpr Place kPlaces[] = {Place::kBeforeGuard, Place::kAfterGuard, Place::kHeap};

template <class T>
struct Outputs {
  Guarded<T> y, dx, dvalues;
  Outputs(const ConvProblem<T>& p, Place place)
      : y(p.dy.size(), place), dx(p.x.size(), place), dvalues(p.values.size(), place) {
    for (auto* out : {&y, &dx, &dvalues})
      for (auto& v : *out) v = ConvProblem<T>::kNan;
  }
};

// All products of a layer and of the transposed one.
template <class T = float>
void check_in_formats(ConvLayerShape s, unsigned seed, int thread_count = 1) {
  if (s.y.small < 1 || s.x.small < 1) return;  // no such convolution
  const bool in_last = s.in_channels_last;
  for (bool transposed : {false, true}) {
    s.transposed = transposed;
    s.in_channels_last = in_last != transposed;
    SCOPED_TRACE(s.name() + " seed " + std::to_string(seed) + " threads " +
                 std::to_string(thread_count));
    std::mt19937 rng(seed);
    const Index index = random_index(s, rng);
    const Place place = kPlaces[seed % 3];
    ConvProblem<T> p(s, index, rng, place);
    p.poison_padding();
    poison_scratch<T>();
    const auto want = p.products();
    const auto parallel = threads(thread_count);
    Outputs<T> out(p, place);
    ASSERT_EQ("", p.forward(out.y.data(), Activation::kNone, parallel));
    ASSERT_EQ("", p.grad_input(out.dx.data(), parallel));
    ASSERT_EQ("", p.grad_values(out.dvalues.data(), parallel));
    const auto check = [](const char* what, const Guarded<T>& got, const auto& want,
                          int64_t terms) {
      ASSERT_EQ(-1, first_wrong(got.data(), got.size(), 1, got.size(), want, terms)) << what;
    };
    check("y", out.y, want.y, p.out_terms());
    check("dx", out.dx, want.dx, p.in_terms());
    check("dvalues", out.dvalues, want.dvalues, p.values_terms());
  }
}

// In memory formats that change with the seed.
template <class T = float>
void check_products(ConvLayerShape s, unsigned seed, int thread_count = 1) {
  s.in_channels_last = seed % 2 == 1;
  s.out_channels_last = seed / 2 % 2 == 1;
  check_in_formats<T>(s, seed, thread_count);
}

TEST(Convolutions, RunsOfPixelsAroundTheVectorWidths) {
  unsigned seed = 0;
  for (int64_t width : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 49, 63, 65, 100})
    for (int64_t stride : {1, 2, 3})
      check_products({2, 3, 9, 1, conv_axis(3, 2), conv_axis(width, 1, stride), 8, 1}, ++seed);
}

TEST(Convolutions, ChannelsAroundTheVectorWidths) {
  unsigned seed = 0;
  for (int64_t channels = 1; channels <= 34; ++channels)
    for (int i = 0; i < 4; ++i)
      check_products({1, channels, 35 - channels, 1, conv_axis(3, 2, 1, 1), conv_axis(4, 1), 4, 2},
                     ++seed);
}

// One kernel position: maps are read and written where they lie.
TEST(Convolutions, InPlace) {
  unsigned seed = 0;
  for (int64_t pixels : {1, 7, 16, 49, 64, 65, 196, 211, 500})
    for (int64_t images : {1, 3})
      for (int64_t bo : {1, 11, 20})
        for (int bits = 0; bits < 16; ++bits) {
          ConvLayerShape s{
              images,           19, 23, 1, conv_axis(1 + seed % 3, 1), conv_axis(pixels, 1), bo,
              bits & 1 ? 3 : 1, 0.4};
          s.row_perm = s.col_perm = bits & 2;
          s.in_channels_last = bits & 4;
          s.out_channels_last = bits & 8;
          s.bias = seed % 2;
          s.residual = seed / 2 % 2;
          check_in_formats(s, ++seed);
        }
}

// ... which a transposed convolution may have without being one: taps that hit no pixel, pixels
// that are no run of the line.
TEST(Convolutions, NotInPlace) {
  for (unsigned seed = 0; seed < 24; ++seed) {
    ConvLayerShape s{2, 6, 8, 1, conv_axis(1, 3, 3, 1), conv_axis(300, 1), 1, 1};
    s.row_perm = s.col_perm = seed % 8 < 4;
    check_products(s, seed);
    s.y = conv_axis(200, 1);
    s.x = conv_axis(1, 1, 2);
    check_products(s, seed);
  }
}

TEST(Convolutions, Windows) {
  unsigned seed = 0;
  for (int64_t kernel : {1, 2, 3, 5})
    for (int64_t stride : {1, 2, 3, 5})
      for (int64_t pad : {0, 1, 7})
        for (int64_t dilation : {1, 2, 3})
          for (int64_t big : {1, 4, 9})
            check_products({2, 5, 6, 1, conv_axis(big, kernel, stride, pad, dilation),
                            conv_axis(10 - big, 3, 1 + big % 2, 2, stride), 4, 1},
                           ++seed);
}

TEST(Convolutions, OutputPaddingBeyondTheStride) {  // pixels of the big map that none reaches
  ConvLayerShape s{2, 5, 6, 1, conv_axis(14, 3, 2, 1, 4), conv_axis(11, 2, 1, 0, 3), 4, 1};
  --s.y.small;
  s.x.small -= 2;
  for (unsigned seed = 0; seed < 4; ++seed) check_products(s, seed);
}

TEST(Convolutions, BlocksAndGroups) {
  unsigned seed = 0;
  for (int64_t b = 1; b <= 128; b = b < 18 ? b + 1 : b + 37) {
    check_products({1, 5, 131, 1, conv_axis(4, 3, 1, 1), conv_axis(5, 2), b, 1, 0.3}, ++seed);
    check_products({1, 131, 5, 1, conv_axis(4, 3, 2, 1), conv_axis(5, 2), 1, b, 0.3}, ++seed);
    check_products({2, 40, 36, 2, conv_axis(3, 2), conv_axis(4, 2), b, b}, ++seed);
  }
  for (int64_t groups : {2, 3, 7})
    for (int64_t each : {1, 2, 17})
      for (int64_t bo : {1, 4, 16})
        for (int64_t stride : {1, 2})
          check_products({2, groups * each, groups * (each + 1), groups, conv_axis(5, 3, stride, 1),
                          conv_axis(6, 2), bo, bo / 2 + 1},
                         ++seed);
}

TEST(Convolutions, DensitiesAndOptionalOperands) {
  unsigned seed = 0;
  for (double density : {0.0, 0.1, 1.0})
    for (int bits = 0; bits < 16; ++bits) {
      ConvLayerShape s{2, 9, 11, 1, conv_axis(5, 3, 2, 1), conv_axis(7, 2), 4, 2, density};
      s.row_perm = bits & 1;
      s.col_perm = bits & 2;
      s.bias = bits & 4;
      s.residual = bits & 8;
      check_products(s, ++seed);
    }
}

TEST(Convolutions, NoImages) {
  for (unsigned seed = 0; seed < 4; ++seed)
    check_products({0, 5, 6, 1, conv_axis(5, 3), conv_axis(5, 3), 4, 2}, seed);
}

ConvLayerShape random_shape(std::mt19937& rng) {
  const auto draw = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(rng() % static_cast<unsigned>(high - low + 1));
  };
  const auto axis = [&] {
    ConvAxis a;
    do a = conv_axis(draw(1, 13), draw(1, 5), draw(1, 4), draw(0, 5), draw(1, 3));
    while (a.small < 1);
    return a;
  };
  const int64_t groups = std::max<int64_t>(1, draw(-2, 3));
  ConvLayerShape s{draw(1, 3),
                   groups * draw(1, 12),
                   groups * draw(1, 40),
                   groups,
                   axis(),
                   axis(),
                   draw(1, rng() % 2 ? 8 : 40),
                   draw(1, 5),
                   draw(0, 10) / 10.0};
  s.row_perm = rng() % 2;
  s.col_perm = rng() % 2;
  s.bias = rng() % 2;
  s.residual = rng() % 2;
  return s;
}

TEST(Convolutions, RandomShapes) {
  std::mt19937 rng(8);
  for (unsigned i = 0; i < 150; ++i) check_products(random_shape(rng), i);
}

TEST(Convolutions, SmallCachesCutManyStrips) {
  std::mt19937 rng(9);
  for (long l2 : {512, 4096, 20000, 50000}) {
    assume_cache_bytes(1024, l2);
    check_products({3, 6, 20, 1, conv_axis(17, 3, 1, 1), conv_axis(19, 3, 1, 1), 8, 1}, 1);
    check_products({3, 6, 20, 2, conv_axis(17, 3, 2, 1), conv_axis(29, 3, 2, 1), 8, 1}, 2);
    check_products({3, 6, 20, 1, conv_axis(17, 3, 1, 2, 2), conv_axis(40, 2, 3), 4, 2}, 3);
    for (unsigned i = 0; i < 40; ++i) check_products(random_shape(rng), i);
    // Channels first, one image is read in place in several strips with 20000, three with 50000.
    for (int64_t images : {1, 3})
      for (unsigned i = 0; i < 4; ++i)
        check_products({images, 30, 20, 1, conv_axis(5, 1), conv_axis(83, 1), 8, 1}, i);
  }
  assume_cache_bytes(0, 0);
}

// Behind each other and side by side, as conv_plan_test.cpp shows; the last line may have room for
// images that are not there.
TEST(Convolutions, ImagesThatShareLines) {
  unsigned seed = 0;
  for (long l2 : {0, 20000, 60000}) {
    assume_cache_bytes(l2, l2);
    for (int64_t pixels : {3, 10})
      for (int64_t stride : {1, 2})
        for (int64_t groups : {1, 2})
          for (int n : {1, 2, 3}) {
            const ConvAxis y = conv_axis(pixels, 3, 1, 1), x = conv_axis(pixels + 1, 3, stride, 1);
            for (int format = 0; format < 2; ++format) {
              ConvLayerShape s{7, 16, 32, groups, y, x, 8, 1, 0.5};
              s.in_channels_last = s.out_channels_last = format;
              ++seed;
              check_in_formats(s, seed, n);
            }
          }
  }
  assume_cache_bytes(0, 0);
}

// What a kernel reaches over decides otherwise: all of these are small.
class TapByTap : public testing::Test {
 protected:
  void SetUp() override { cpu::force_taps(cpu::Taps::kApart); }
  void TearDown() override {
    cpu::force_taps(cpu::Taps::kByCost);
    assume_cache_bytes(0, 0);
  }
};

TEST_F(TapByTap, RandomShapes) {
  std::mt19937 rng(17);
  for (unsigned i = 0; i < 100; ++i) {
    assume_cache_bytes(1024, i % 3 == 0 ? 4096 : 0);  // the pass of a tap is cut into strips, too
    check_products(random_shape(rng), i, 1 + i % 3);
  }
  for (unsigned i = 0; i < 20; ++i) check_products<double>(random_shape(rng), i);
}

TEST_F(TapByTap, TapsThatReadNoPixel) {
  unsigned seed = 0;
  for (int64_t dilation : {1, 4, 5, 9})
    for (int64_t pad : {0, 4, 9, 20})
      for (int64_t stride : {1, 2, 3})
        check_products({2, 5, 6, 1, conv_axis(5, 3, stride, pad, dilation),
                        conv_axis(6, 2, 1, pad, dilation), 4, 1},
                       ++seed);
}

// Enough work for threads: many pixels, which are cut into strips, and few, where rows are.
const ConvLayerShape kThreaded[] = {
    {2, 20, 40, 1, conv_axis(21, 3, 1, 1), conv_axis(22, 3, 1, 1), 8, 1, 0.5},
    {1, 64, 72, 1, conv_axis(7, 3, 1, 1), conv_axis(7, 3, 1, 1), 4, 1, 0.6},
    {2, 64, 64, 2, conv_axis(9, 3, 2, 1), conv_axis(11, 3, 2, 1), 16, 16, 1.0},
    {3, 24, 24, 24, conv_axis(21, 5, 1, 2), conv_axis(22, 5, 1, 2), 1, 1, 1.0},
    {3, 110, 93, 1, conv_axis(2, 1), conv_axis(301, 1), 9, 1, 0.2},
    {1, 128, 96, 1, conv_axis(7, 1), conv_axis(10, 1), 8, 1, 0.6},
    {1, 96, 64, 1, conv_axis(13, 3, 1, 6, 6), conv_axis(13, 3, 1, 6, 6), 8, 1, 0.6},
    {1, 64, 96, 2, conv_axis(7, 1), conv_axis(7, 1), 8, 2, 0.6},
};

TEST(Convolutions, Threads) {
  unsigned seed = 0;
  for (long l2 : {0, 20000}) {
    assume_cache_bytes(l2, l2);
    for (const auto& s : kThreaded)
      for (int n : {2, 3, 4}) check_products(s, ++seed, n);
  }
  assume_cache_bytes(0, 0);
}

TEST_F(TapByTap, Threads) {
  unsigned seed = 0;
  for (const auto& s : kThreaded) {
    ++seed;
    check_products(s, seed, seed % 2 ? 4 : 2);
  }
}

TEST(Convolutions, EveryProductKeepsItsBitsOnAnyNumberOfThreads) {
  std::vector<int> counts{1, 2, 3, 4, 7, 16};
  if (cpu::isa_in_use() == "scalar") counts = {1, 3, 16};  // kernels that take ten times as long
  for (ConvLayerShape s : kThreaded)
    for (int bits = 0; bits < 4; ++bits) {
      s.transposed = bits & 1;
      s.in_channels_last = s.out_channels_last = bits & 2;
      std::mt19937 rng(11);
      const Index index = random_index(s, rng);
      ConvProblem<float> p(s, index, rng, Place::kHeap);
      Outputs<float> want(p, Place::kHeap), got(p, Place::kHeap);
      for (int n : counts) {
        Outputs<float>& out = n == 1 ? want : got;
        ASSERT_EQ("", p.forward(out.y.data(), Activation::kGelu, threads(n)));
        ASSERT_EQ("", p.grad_input(out.dx.data(), threads(n)));
        ASSERT_EQ("", p.grad_values(out.dvalues.data(), threads(n)));
        for (auto a : {&Outputs<float>::y, &Outputs<float>::dx})
          ASSERT_EQ(
              0, std::memcmp((out.*a).data(), (want.*a).data(), (want.*a).size() * sizeof(float)))
              << s.name() << " on " << n << " threads";
        p.for_each_entry([&](int64_t at, int64_t, int64_t, int64_t) {
          ASSERT_EQ(want.dvalues[at], out.dvalues[at]) << s.name() << " on " << n << " threads";
        });
      }
    }
}

TEST(Convolutions, ManyCallersAtOnce) {
  run_on_threads(4, [](int i) {
    for (unsigned seed = 0; seed < 6; ++seed)
      check_products(
          {1 + i, 6 + i, 20, 1, conv_axis(5, 3, 1 + i % 2, 1), conv_axis(6, 2), 4, 1 + i},
          seed + 12, 2);
  });
}

TEST(Convolutions, Double) {
  std::mt19937 rng(10);
  for (unsigned i = 0; i < 60; ++i) check_products<double>(random_shape(rng), i);
}

void check_activations() {
  const ConvLayerShape shapes[] = {
      {2, 5, 19, 1, conv_axis(5, 3, 2, 1), conv_axis(7, 2, 2), 4, 1},
      {2, 5, 19, 1, conv_axis(7, 1), conv_axis(29, 1), 4, 1},  // in place
  };
  for (const auto& shape : shapes)
    for (int bits = 0; bits < 4; ++bits) {
      ConvLayerShape s = shape;
      s.residual = true;
      s.transposed = bits & 1;
      s.in_channels_last = s.out_channels_last = bits & 2;
      std::mt19937 rng(13);
      const Index index = random_index(s, rng);
      ConvProblem<float> p(s, index, rng, Place::kBeforeGuard);
      p.poison_padding();
      const auto z = p.products().y;
      const std::pair<Activation, double (*)(double)> formulas[] = {
          {Activation::kRelu, [](double v) { return v > 0 ? v : 0.0; }},
          {Activation::kGelu, [](double v) { return v * std::erfc(-v / std::sqrt(2.0)) / 2; }},
          {Activation::kGeluTanh,
           [](double v) {
             return v / (1 + std::exp(-2 * 0.79788456080286536 * (v + 0.044715 * v * v * v)));
           }},
          {Activation::kSilu, [](double v) { return v / (1 + std::exp(-v)); }}};
      for (const auto& [act, formula] : formulas) {
        Outputs<float> out(p, Place::kBeforeGuard);
        ASSERT_EQ("", p.forward(out.y.data(), act, threads(1)));
        for (int64_t i = 0; i < out.y.size(); ++i)
          ASSERT_NEAR(out.y[i], formula(z.sum[i]), 3e-6 * (1 + z.scale[i])) << s.name();
      }
    }
}

TEST(Convolutions, ActivationsComeLast) { check_activations(); }
TEST_F(TapByTap, ActivationsComeLast) { check_activations(); }

// Each broken index is refused by all three products, whatever the number of images and threads,
// with arrays whose neighbourhood faults.
void check_refused(ConvLayerShape s, const Index& index, const std::string& rule) {
  for (bool transposed : {false, true})
    for (int64_t images : {0, 1, 8})
      for (int n : {1, 4}) {
        s.images = images;
        s.transposed = transposed;
        SCOPED_TRACE(rule + " " + s.name() + " threads " + std::to_string(n));
        std::mt19937 rng(14);
        ConvProblem<float> p(s, index, rng, Place::kBeforeGuard);
        Outputs<float> out(p, Place::kBeforeGuard);
        for (const std::string& error : {p.forward(out.y.data(), Activation::kRelu, threads(n)),
                                         p.grad_input(out.dx.data(), threads(n)),
                                         p.grad_values(out.dvalues.data(), threads(n))})
          EXPECT_NE(error.find(rule), std::string::npos) << error;
      }
}

TEST(ConvRefusals, BrokenIndex) {
  const ConvLayerShape s{0, 30, 80, 2, conv_axis(9, 3, 1, 1), conv_axis(8, 3, 1, 1), 4, 3};
  std::mt19937 rng(15);
  const Index good = random_index(s, rng);
  const auto last = good.col_idx.size() - 1;
  constexpr int32_t kMax = std::numeric_limits<int32_t>::max(),
                    kMin = std::numeric_limits<int32_t>::min();
  for (int32_t v : {-1, 45, kMax, kMin})  // a group has 9 * 5 column groups
    for (size_t at : {size_t{0}, last / 2, last}) {
      Index bad = good;
      bad.col_idx[at] = v;
      check_refused(s, bad, "col_idx[" + std::to_string(at) + "]");
    }
  Index bad = good;
  std::swap(bad.col_idx[0], bad.col_idx[1]);
  check_refused(s, bad, "col_idx must ascend strictly");
  for (int32_t v : {-1, 1, kMax, kMin}) {
    bad = good;
    bad.row_ptr[0] = v;
    check_refused(s, bad, "row_ptr[0] must be 0");
    bad = good;
    bad.row_ptr.back() = v;
    check_refused(s, bad, "row_ptr must");
    if (v == 1) continue;
    for (auto perm : {&Index::row_perm, &Index::col_perm}) {
      bad = good;
      (bad.*perm)[7] = v;
      check_refused(s, bad, "_perm[7] must be in [0, ");
    }
  }
  for (auto perm : {&Index::row_perm, &Index::col_perm}) {
    bad = good;
    (bad.*perm)[7] = (bad.*perm)[20];
    check_refused(s, bad, "_perm must hold each index once");
    bad = good;
    std::swap((bad.*perm).front(), (bad.*perm).back());
    check_refused(s, bad, "_perm must keep each channel in its group");
  }
}

// Not tap by tap where it does not.
TEST(ConvPath, TapByTapWhereTheKernelReachesFar) {
  for (int64_t dilation : {1, 15}) {
    const ConvAxis a = conv_axis(20, 3, 1, dilation, dilation);
    const ConvLayerShape s{1, 48, 32, 1, a, a, 8, 1, 0.5};
    check_products(s, 18);
    std::mt19937 rng(18);
    const Index index = random_index(s, rng);
    ConvProblem<float> p(s, index, rng, Place::kHeap);
    Outputs<float> out(p, Place::kHeap);
    const int passes = dilation == 1 ? 1 : 9;
    ASSERT_EQ("", p.forward(out.y.data(), Activation::kNone, threads(1)));
    EXPECT_EQ(passes, cpu::conv_passes());
    ASSERT_EQ("", p.grad_input(out.dx.data(), threads(1)));
    EXPECT_EQ(passes, cpu::conv_passes());
    ASSERT_EQ("", p.grad_values(out.dvalues.data(), threads(1)));
    EXPECT_EQ(passes, cpu::conv_passes());
  }
}

TEST(ConvPath, TheForcedInstructionSetRan) {
  check_products({1, 8, 16, 1, conv_axis(12, 3), conv_axis(12, 3), 4, 1}, 16);
  std::mt19937 rng(16);
  const ConvLayerShape s{1, 8, 16, 1, conv_axis(12, 3), conv_axis(12, 3), 4, 1};
  const Index index = random_index(s, rng);
  ConvProblem<float> p(s, index, rng, Place::kHeap);
  Outputs<float> out(p, Place::kHeap);
  ASSERT_EQ("", p.forward(out.y.data(), Activation::kNone, threads(1)));
  const std::string name = cpu::last_kernel(), suffix = "__" + cpu::isa_in_use();
  EXPECT_EQ(0u, name.find("bsconv_f32_")) << name;
  ASSERT_GT(name.size(), suffix.size());
  EXPECT_EQ(suffix, name.substr(name.size() - suffix.size()));
  if (const char* forced = std::getenv("TETRIS_CPU_ISA"); forced && *forced) {
    EXPECT_EQ(forced, cpu::isa_in_use());
  }
}

}  // namespace
}  // namespace tetris::test

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  try {
    std::printf("instruction set: %s\n", tetris::cpu::isa_in_use().c_str());
  } catch (const std::exception& e) {  // ctest skips an instruction set that this CPU lacks
    std::printf("%s\n", e.what());
    return 1;
  }
  return RUN_ALL_TESTS();
}
