// The one file that is compiled for OpenMP: at::parallel_for is an inline function, which without
// it quietly runs everything on the calling thread.
#include "ops/parallel.h"

#include <ATen/Parallel.h>

#include <mutex>
#include <set>
#include <thread>

namespace tetris::ops {

cpu::Parallel parallel() {
  return {at::in_parallel_region() ? 1 : at::get_num_threads(),
          [](int count, const std::function<void(int)>& fn) {
            at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) fn(static_cast<int>(i));
            });
          }};
}

int threads_at_work() {
  std::mutex mutex;
  std::set<std::thread::id> seen;
  const cpu::Parallel p = parallel();
  p.run(p.threads, [&](int) {
    const std::lock_guard<std::mutex> lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  return static_cast<int>(seen.size());
}

}  // namespace tetris::ops
