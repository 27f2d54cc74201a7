#include "cpu/peak.h"

#include <chrono>

#include "cpu/dispatch.h"

namespace tetris::cpu {

double fma_peak(double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto& k = kernels<float>();
  constexpr int64_t kIterations = 20000;
  // The best of many short runs: what the core can do, not what other programs left of it.
  double best = 0;
  const auto start = Clock::now();
  do {
    const auto begin = Clock::now();
    const double flops = k.fma_chain(kIterations);
    const double elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
    if (flops / elapsed > best) best = flops / elapsed;
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return best;
}

}  // namespace tetris::cpu
