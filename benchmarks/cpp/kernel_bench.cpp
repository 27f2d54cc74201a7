// The products of csrc/cpu alone, without torch: what to run before and after a change of a kernel.
//
//   kernel_bench 512x1024x4096 4x1 90 [16x16 90 ...]
//   TETRIS_CPU_ISA=avx2 kernel_bench --benchmark_repetitions=5 512x1024x4096 16x16 75
//
// Layers are random, both permutations too. As many copies of a layer take turns as together fill
// the last-level cache when there are few tokens, as in benchmarks/gemm.py.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cpu/bsmm.h"
#include "cpu/dispatch.h"

namespace tetris {
namespace {

struct Case {
  int64_t tokens, in, out, bo, bi;
  double density;
};

struct Layer {
  BlockSparseView view;
  std::vector<int32_t> row_ptr{0}, col_idx, row_perm, col_perm;
  std::vector<float> values;

  explicit Layer(const Case& c) {
    std::mt19937 rng(0);
    view.out = c.out;
    view.in = c.in;
    view.bo = c.bo;
    view.bi = c.bi;
    std::bernoulli_distribution kept(c.density);
    for (int64_t r = 0; r < view.block_rows(); ++r) {
      for (int64_t g = 0; g < view.col_groups(); ++g)
        if (kept(rng)) col_idx.push_back(static_cast<int32_t>(g));
      row_ptr.push_back(static_cast<int32_t>(col_idx.size()));
    }
    view.nnzb = static_cast<int64_t>(col_idx.size());
    values.resize(view.nnzb * c.bo * c.bi);
    std::normal_distribution<float> normal(0, 0.03f);
    for (float& v : values) v = normal(rng);
    const auto shuffled = [&](int64_t n) {
      std::vector<int32_t> p(n);
      std::iota(p.begin(), p.end(), 0);
      std::shuffle(p.begin(), p.end(), rng);
      return p;
    };
    row_perm = shuffled(c.out);
    col_perm = shuffled(c.in);
    set_pointers();
  }
  Layer(const Layer& other)  // whose view points into its own vectors
      : view(other.view),
        row_ptr(other.row_ptr),
        col_idx(other.col_idx),
        row_perm(other.row_perm),
        col_perm(other.col_perm),
        values(other.values) {
    set_pointers();
  }
  Layer& operator=(const Layer&) = delete;

  void set_pointers() {
    view.row_ptr = row_ptr.data();
    view.col_idx = col_idx.data();
    view.row_perm = row_perm.data();
    view.col_perm = col_perm.data();
  }
};

void forward(benchmark::State& state, const Case& c) {
  constexpr int64_t kFewTokens = 16, kFill = 100 << 20;
  std::vector<std::unique_ptr<Layer>> layers;
  int64_t bytes = 0;
  do {
    layers.push_back(layers.empty() ? std::make_unique<Layer>(c)
                                    : std::make_unique<Layer>(*layers.front()));
    bytes += 4 * static_cast<int64_t>(layers.back()->values.size() + layers.back()->col_idx.size());
  } while (c.tokens <= kFewTokens && bytes < kFill);
  std::vector<float> x(c.tokens * c.in, 0.5f), y(c.tokens * c.out);
  size_t turn = 0;
  double flops = 0;
  for (auto _ : state) {
    const Layer& layer = *layers[turn++ % layers.size()];
    const std::string error =
        cpu::bsmm_forward<float>(layer.view, layer.values.data(), {x.data(), c.in}, c.tokens,
                                 nullptr, Activation::kNone, {y.data(), c.out}, cpu::Parallel{});
    if (!error.empty()) {
      state.SkipWithError(error.c_str());
      break;
    }
    flops += 2.0 * static_cast<double>(layer.values.size()) * static_cast<double>(c.tokens);
  }
  state.counters["FLOP/s"] = benchmark::Counter(flops, benchmark::Counter::kIsRate);
  state.SetLabel(cpu::last_kernel());
}

}  // namespace
}  // namespace tetris

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  tetris::Case c{};
  bool good = argc >= 4 && argc % 2 == 0 &&
              std::sscanf(argv[1], "%ldx%ldx%ld", &c.tokens, &c.in, &c.out) == 3;
  for (int i = 2; good && i + 1 < argc; i += 2) {
    double percent = -1;
    good = std::sscanf(argv[i], "%ldx%ld", &c.bo, &c.bi) == 2 &&
           std::sscanf(argv[i + 1], "%lf", &percent) == 1 && percent >= 0 && percent < 100 &&
           std::min({c.tokens, c.in, c.out, c.bo, c.bi}) >= 1 && std::max(c.bo, c.bi) <= 128;
    c.density = 1 - percent / 100;
    const std::string name = std::string(argv[1]) + "/" + argv[i] + "/" + argv[i + 1] + "%";
    if (good) benchmark::RegisterBenchmark(name.c_str(), tetris::forward, c)->UseRealTime();
  }
  if (!good) {
    std::fprintf(stderr,
                 "usage: %s [--benchmark_...] TOKENSxINxOUT (HEIGHTxWIDTH SPARSITY%%)...\n"
                 "for example: %s 512x1024x4096 4x1 90 16x16 90\n",
                 argv[0], argv[0]);
    return 2;
  }
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
