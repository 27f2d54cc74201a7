// A small pool of threads. The caller is worker 0; results must not depend on who ran what.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tetris::reorder {

class Pool {
 public:
  using Task = std::function<void(int64_t index, int worker)>;

  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs task(i, worker) for every i in [0, count), each once, and returns when all are done.
  // The first exception thrown by a task is rethrown here.
  void run(int64_t count, const Task& task);

  // Hardware threads, at least 1.
  static int hardware_threads();

 private:
  void work(int worker);
  void drain(int worker);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const Task* task_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> busy_{0};
  std::atomic<bool> quit_{false};
  std::exception_ptr error_;
};

}  // namespace tetris::reorder
