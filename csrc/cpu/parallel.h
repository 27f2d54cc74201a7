// Threads are the caller's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace tetris::cpu {

// How to run fn(0) .. fn(count - 1) at the same time; count <= threads.
struct Parallel {
  int threads = 1;
  void (*run)(int count, const std::function<void(int)>& fn) = nullptr;
};

// Multiply-adds below which another thread costs more than it brings (a parallel region takes a few
// microseconds, i.e. about 1e5 of them).
constexpr int64_t kWorkPerThread = 1 << 18;

inline int useful_threads(const Parallel& parallel, int64_t work) {
  return static_cast<int>(std::clamp<int64_t>(work / kWorkPerThread, 1, parallel.threads));
}

inline void run(const Parallel& parallel, int count, const std::function<void(int)>& fn) {
  if (count > 1 && parallel.run)
    parallel.run(count, fn);
  else
    for (int i = 0; i < count; ++i) fn(i);
}

}  // namespace tetris::cpu
