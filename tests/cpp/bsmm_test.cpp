// The products of csrc/cpu on the instruction set that TETRIS_CPU_ISA names (ctest runs each).
#include "cpu/bsmm.h"

#include <gtest/gtest.h>

#include <thread>

#include "core/cpu_features.h"
#include "cpu/dispatch.h"
#include "problem.h"

namespace tetris::test {
namespace {

void run_on_threads(int count, const std::function<void(int)>& fn) {
  std::vector<std::thread> pool;
  for (int i = 1; i < count; ++i) pool.emplace_back(fn, i);
  fn(0);
  for (auto& t : pool) t.join();
}

cpu::Parallel threads(int n) { return {n, run_on_threads}; }

template <class T>
class Output {
 public:
  Output(int64_t m, int64_t n, int64_t gap, Place place)
      : m_(m), n_(n), ld_(n + gap), data_(Problem<T>::matrix_size(m, n, ld_), place) {
    for (auto& v : data_) v = Problem<T>::kNan;
  }
  cpu::Matrix<T> matrix() { return {data_.data(), ld_}; }
  T* data() { return data_.data(); }
  int64_t ld() const { return ld_; }
  bool gaps_untouched() const {
    for (int64_t i = 0; i < data_.size(); ++i)
      if (i % ld_ >= n_ && !std::isnan(data_[i])) return false;
    return true;
  }

 private:
  int64_t m_, n_, ld_;
  Guarded<T> data_;
};

template <class T>
void check_products(const Shape& s, unsigned seed, Place place, int64_t gap, int thread_count) {
  SCOPED_TRACE(s.name() + " seed " + std::to_string(seed) + " gap " + std::to_string(gap) +
               " threads " + std::to_string(thread_count));
  std::mt19937 rng(seed);
  const Index index = random_index(s, rng);
  Problem<T> p(s, index, rng, place, gap);
  p.poison_padding();
  const auto parallel = threads(thread_count);

  Output<T> y(s.m, s.n, gap, place);
  ASSERT_EQ("", cpu::bsmm_forward<T>(p.view, p.values.data(), {p.x.data(), p.ldx}, s.m,
                                     s.bias ? p.bias.data() : nullptr, Activation::kNone,
                                     y.matrix(), parallel));
  EXPECT_EQ(-1, first_wrong(y.data(), y.ld(), s.m, s.n, p.forward(), s.k)) << "y";
  EXPECT_TRUE(y.gaps_untouched());

  Output<T> dx(s.m, s.k, gap, place);
  ASSERT_EQ("", cpu::bsmm_grad_input<T>(p.view, p.values.data(), {p.dy.data(), p.ldg}, s.m,
                                        dx.matrix(), parallel));
  EXPECT_EQ(-1, first_wrong(dx.data(), dx.ld(), s.m, s.k, p.grad_input(), s.n)) << "dx";
  EXPECT_TRUE(dx.gaps_untouched());

  Output<T> dv(1, p.values.size(), 0, place);
  ASSERT_EQ("", cpu::bsmm_grad_values<T>(p.view, {p.x.data(), p.ldx}, {p.dy.data(), p.ldg}, s.m,
                                         dv.data(), parallel));
  EXPECT_EQ(-1, first_wrong(dv.data(), dv.ld(), 1, p.values.size(), p.grad_values(), s.m)) << "dv";
}

constexpr Place kPlaces[] = {Place::kBeforeGuard, Place::kAfterGuard, Place::kHeap};

TEST(Products, EveryTokenCountAroundTheVectorWidths) {
  for (int64_t m : {2, 5, 34}) check_products<float>({m, 1, 1, 4, 1, 1}, 1, Place::kHeap, 0, 1);
  for (int64_t m = 0; m <= 67; ++m)
    check_products<float>({m, 37, 53, 4, 1, 0.3}, 1, kPlaces[m % 3], m % 4, 1);
  for (int64_t m : {95, 96, 97, 127, 128, 129, 200, 257})
    check_products<float>({m, 21, 35, 3, 2, 0.4}, 2, Place::kBeforeGuard, 0, 1);
}

TEST(Products, EveryBlockHeightAndWidth) {
  for (int64_t b = 1; b <= 128; b = b < 34 ? b + 1 : b + 23) {
    for (int64_t m : {1, 3, 17}) {
      check_products<float>({m, 131, 40, b, 1, 0.3}, 3, kPlaces[b % 3], 0, 1);
      check_products<float>({m, 40, 131, 1, b, 0.3}, 4, kPlaces[b % 3], 1, 1);
    }
    check_products<float>({18, 129, 130, b, b, 0.5}, 5, kPlaces[b % 3], 0, 1);
  }
}

TEST(Products, TallBlocks) {
  for (int64_t bo : {8, 16, 24, 32, 48, 64})
    for (int64_t m : {1, 15, 16, 17, 63, 65, 128, 129, 300})
      check_products<float>({m, 2 * bo + m % 7, 61, bo, 1 + m % 4, 0.5}, 17, kPlaces[m % 3], m % 2,
                            1 + m % 3);
  for (int64_t k = 1; k <= 25; ++k)  // every number of inputs in a tile
    check_products<float>({20, 72, k, 72, 1, 1}, 18, kPlaces[k % 3], 0, 1);
}

TEST(Products, RaggedSizes) {
  for (int64_t n = 1; n <= 35; ++n)
    for (int64_t m : {1, 5, 16})
      check_products<float>({m, n, 36 - n, 8, 4, 0.6}, 6, kPlaces[n % 3], 0, 1);
}

TEST(Products, DensitiesAndOptionalOperands) {
  for (double d : {0.0, 0.02, 0.5, 1.0})
    for (int bits = 0; bits < 8; ++bits)
      for (int64_t m : {0, 1, 2, 40})
        check_products<float>(
            {m, 45, 50, 4, 2, d, (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0}, 7,
            kPlaces[bits % 3], 0, 1);
}

TEST(Products, RandomShapes) {
  std::mt19937 rng(8);
  const auto draw = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(rng() % static_cast<unsigned>(high - low + 1));
  };
  for (unsigned i = 0; i < 150; ++i)
    check_products<float>({draw(0, 70), draw(1, 140), draw(1, 140), draw(1, i % 3 ? 16 : 128),
                           draw(1, i % 2 ? 4 : 128), draw(0, 10) / 10.0, rng() % 2 == 0,
                           rng() % 2 == 0, rng() % 2 == 0},
                          100 + i, kPlaces[i % 3], draw(0, 3), 1);
}

TEST(Products, SlabsAndPartsOfInputsOfEverySize) {
  for (long l1 : {256, 2048})
    for (long l2 : {2048, 20000, 1 << 20}) {
      assume_cache_bytes(l1, l2);
      for (int64_t bo : {1, 2, 3, 4, 5, 16, 40})
        for (int64_t bi : {1, 3})
          for (double d : {0.05, 0.6})
            for (int64_t gap : {0, 1})
              check_products<float>({70, 97, 203, bo, bi, d}, 12, kPlaces[bo % 3], gap, 1);
    }
  assume_cache_bytes(0, 0);
}

TEST(Products, Threads) {
  for (int n : {2, 8})
    for (int64_t m : {1, 2, 15, 40, 130})
      check_products<float>({m, 259, m == 1 ? 4100 : 520, 4, 1, 0.5}, 9, kPlaces[n % 3], 1, n);
}

TEST(Products, Double) {
  for (int64_t m : {0, 1, 2, 3, 4, 5, 30})
    for (int64_t b : {1, 2, 5, 16, 128})
      check_products<double>({m, 37, 41, b, 3, 0.4}, 10, kPlaces[m % 3], m % 2, 1);
}

TEST(Products, ForwardKeepsItsBitsOnAnyNumberOfThreads) {
  for (const Shape& s : {Shape{1, 1030, 1030, 4, 1, 0.5}, Shape{33, 300, 300, 8, 1, 0.5},
                         Shape{500, 130, 300, 16, 16, 0.5}}) {
    std::mt19937 rng(11);
    const Index index = random_index(s, rng);
    Problem<float> p(s, index, rng, Place::kHeap, 0);
    std::vector<float> want(s.m * s.n), got(s.m * s.n);
    for (int n : {1, 2, 3, 5, 16}) {
      ASSERT_EQ("", cpu::bsmm_forward<float>(p.view, p.values.data(), {p.x.data(), p.ldx}, s.m,
                                             p.bias.data(), Activation::kGelu, {got.data(), s.n},
                                             threads(n)));
      if (n == 1)
        want = got;
      else
        EXPECT_EQ(0, std::memcmp(got.data(), want.data(), got.size() * sizeof(float))) << s.name();
    }
  }
}

TEST(Products, AnySplitOfTokensOverThreads) {
  assume_cache_bytes(2048, 1 << 20);  // slabs, too
  for (int64_t bo : {1, 4}) {
    const Shape s{16 * 20, 120, 260, bo, 1, 0.8};
    std::mt19937 rng(13);
    const Index index = random_index(s, rng);
    Problem<float> p(s, index, rng, Place::kHeap, 0);
    std::vector<float> want(s.m * s.n), got(s.m * s.n);
    // Scalar kernels take ten times as long, and how work is split does not depend on kernels.
    const int64_t step = cpu::isa_in_use() == "scalar" ? 3 : 1;
    for (int64_t units = 1; units <= 20; units += step)
      for (int n : {1, 2, 3, 5, 7, 8, 9, 10, 13, 16, 17, 18}) {
        const int64_t m = 16 * units;
        std::fill(got.begin(), got.end(), Problem<float>::kNan);
        ASSERT_EQ("", cpu::bsmm_forward<float>(p.view, p.values.data(), {p.x.data(), p.ldx}, m,
                                               p.bias.data(), Activation::kNone, {got.data(), s.n},
                                               threads(n)));
        if (n == 1)
          want = got;
        else
          ASSERT_EQ(0, std::memcmp(got.data(), want.data(), m * s.n * sizeof(float)))
              << units << " units, " << n << " threads";
      }
  }
  assume_cache_bytes(0, 0);
}

TEST(Products, ManyCallersAtOnce) {
  run_on_threads(4, [](int i) {
    for (unsigned seed = 0; seed < 6; ++seed)
      check_products<float>({10 * i + 1, 60 + i, 70, 4, 1 + i, 0.4}, seed + 12, Place::kHeap, 0, 2);
  });
}

TEST(Activations, MatchTheirFormulas) {
  constexpr double kSqrt2OverPi = 0.79788456080286536;
  const auto formula = [](Activation a, double z) {
    switch (a) {
      case Activation::kNone:
        return z;
      case Activation::kRelu:
        return z > 0 ? z : 0.0;
      case Activation::kGelu:
        return z * std::erfc(-z / std::sqrt(2.0)) / 2;
      case Activation::kGeluTanh:
        return z / (1 + std::exp(-2 * kSqrt2OverPi * (z + 0.044715 * z * z * z)));
      case Activation::kSilu:
        return z / (1 + std::exp(-z));
    }
    return 0.0;
  };
  for (auto a : {Activation::kNone, Activation::kRelu, Activation::kGelu, Activation::kGeluTanh,
                 Activation::kSilu})
    for (int64_t m : {1, 2, 35}) {
      const Shape s{m, 61, 40, 4, 1, 0.5};
      std::mt19937 rng(13);
      const Index index = random_index(s, rng);
      Problem<float> p(s, index, rng, Place::kBeforeGuard, 0);
      Output<float> y(m, s.n, 0, Place::kBeforeGuard);
      ASSERT_EQ("", cpu::bsmm_forward<float>(p.view, p.values.data(), {p.x.data(), p.ldx}, m,
                                             p.bias.data(), a, y.matrix(), threads(1)));
      const auto z = p.forward();
      for (int64_t i = 0; i < m * s.n; ++i)
        ASSERT_NEAR(y.data()[i], formula(a, z.sum[i]), 3e-6 * (1 + z.scale[i]));
    }
}

// Each broken index is refused by all three products, at every token count that takes another path,
// on several threads, and with arrays whose neighbourhood faults.
void check_refused(const Shape& base, const Index& index, const std::string& rule) {
  for (int64_t m : {0, 1, 2, 17, 600})
    for (int n : {1, 4}) {
      SCOPED_TRACE(rule + " m" + std::to_string(m) + " threads " + std::to_string(n));
      Shape s = base;
      s.m = m;
      std::mt19937 rng(14);
      Problem<float> p(s, index, rng, Place::kBeforeGuard, 0);
      Output<float> y(m, s.n, 0, Place::kBeforeGuard), dx(m, s.k, 0, Place::kBeforeGuard),
          dv(1, p.values.size(), 0, Place::kBeforeGuard);
      const std::string errors[] = {
          cpu::bsmm_forward<float>(p.view, p.values.data(), {p.x.data(), p.ldx}, m, p.bias.data(),
                                   Activation::kRelu, y.matrix(), threads(n)),
          cpu::bsmm_grad_input<float>(p.view, p.values.data(), {p.dy.data(), p.ldg}, m, dx.matrix(),
                                      threads(n)),
          cpu::bsmm_grad_values<float>(p.view, {p.x.data(), p.ldx}, {p.dy.data(), p.ldg}, m,
                                       dv.data(), threads(n))};
      for (const auto& error : errors) EXPECT_NE(error.find(rule), std::string::npos) << error;
    }
}

TEST(Refusals, BrokenIndex) {
  const Shape s{0, 400, 300, 4, 3, 0.5};
  std::mt19937 rng(15);
  const Index good = random_index(s, rng);
  const auto last = good.col_idx.size() - 1;
  constexpr int32_t kMax = std::numeric_limits<int32_t>::max(),
                    kMin = std::numeric_limits<int32_t>::min();
  for (int32_t v : {-1, 100, kMax, kMin})
    for (size_t at : {size_t{0}, last / 2, last}) {
      Index bad = good;
      bad.col_idx[at] = v;
      check_refused(s, bad, "col_idx[" + std::to_string(at) + "]");
    }
  Index bad = good;
  std::swap(bad.col_idx[0], bad.col_idx[1]);
  check_refused(s, bad, "col_idx must ascend strictly");
  bad = good;
  bad.col_idx[last] = bad.col_idx[last - 1];
  check_refused(s, bad, "col_idx must ascend strictly");
  for (int32_t v : {-1, 1, kMax, kMin}) {
    bad = good;
    bad.row_ptr[0] = v;
    check_refused(s, bad, "row_ptr[0] must be 0");
    bad = good;
    bad.row_ptr.back() = v;
    check_refused(s, bad, "row_ptr must");
    bad = good;
    bad.row_ptr[50] = v;
    check_refused(s, bad, "row_ptr must not decrease");
    if (v == 1) continue;
    for (auto perm : {&Index::row_perm, &Index::col_perm}) {
      bad = good;
      (bad.*perm)[7] = v;
      check_refused(s, bad, "_perm[7] must be in [0, ");
    }
  }
  for (auto perm : {&Index::row_perm, &Index::col_perm}) {
    bad = good;
    (bad.*perm)[7] = (bad.*perm)[290];
    check_refused(s, bad, "_perm must hold each index once");
  }
}

TEST(Path, TheForcedInstructionSetRan) {
  check_products<float>({40, 64, 64, 4, 1, 0.5}, 16, Place::kHeap, 0, 1);
  const std::string name = cpu::last_kernel(), suffix = "__" + cpu::isa_in_use();
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
