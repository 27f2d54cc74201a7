#include "reorder/parallel.h"

#include <algorithm>
#include <system_error>

namespace tetris::reorder {
namespace {

// Rounds of the search last from tens of microseconds; sleeping between them would cost as much.
// About 20 us of spinning, then sleep, so that an idle pool leaves the core to others.
constexpr int kSpins = 400;

template <typename Condition>
bool spin_until(Condition condition) {
  for (int i = 0; i < kSpins; ++i) {
    if (condition()) return true;
    for (int j = 0; j < 32; ++j) std::atomic_signal_fence(std::memory_order_seq_cst);
  }
  return condition();
}

}  // namespace

int Pool::hardware_threads() {
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

Pool::Pool(int threads) {
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error&) {
    // The system gives no more threads: carry on with those we have.
  }
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    quit_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run(int64_t count, const Task& task) {
  if (workers_.empty() || count <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i, 0);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    task_ = &task;
    count_ = count;
    error_ = nullptr;
    next_ = 0;
    busy_ = static_cast<int>(workers_.size());
    ++generation_;
  }
  wake_.notify_all();
  drain(0);
  if (!spin_until([this] { return busy_.load() == 0; })) {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_.load() == 0; });
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (error_) std::rethrow_exception(error_);
}

void Pool::drain(int worker) {
  try {
    for (int64_t i; (i = next_.fetch_add(1)) < count_;) (*task_)(i, worker);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    next_ = count_;
  }
}

void Pool::work(int worker) {
  uint64_t seen = 0;
  while (true) {
    const auto ready = [&] { return quit_.load() || generation_.load() != seen; };
    if (!spin_until(ready)) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, ready);
    }
    if (quit_) return;
    seen = generation_;
    drain(worker);
    std::lock_guard<std::mutex> lock(mutex_);
    if (--busy_ == 0) done_.notify_one();
  }
}

}  // namespace tetris::reorder
