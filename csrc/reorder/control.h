// Time, progress and cancellation of one search, shared by its threads.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <thread>

namespace tetris::reorder {

struct Cancelled : std::runtime_error {
  Cancelled() : std::runtime_error("tetris reorder: search cancelled") {}
};

class Control {
 public:
  // Called with the share of the work that is done, at most ten times a second, on the thread that
  // made the Control. False cancels the search.
  using Progress = std::function<bool(double done)>;

  explicit Control(Progress progress = nullptr)
      : progress_(std::move(progress)), owner_(std::this_thread::get_id()), start_(Clock::now()) {}

  double seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

  // Reports progress when it is due and throws Cancelled when the search should end.
  void poll(double done) {
    if (progress_ && std::this_thread::get_id() == owner_) {
      const double now = seconds();
      if (now >= next_report_) {
        next_report_ = now + 0.1;
        if (!progress_(done)) cancelled_ = true;
      }
    }
    if (cancelled_) throw Cancelled();
  }

 private:
  using Clock = std::chrono::steady_clock;

  Progress progress_;
  std::thread::id owner_;
  Clock::time_point start_;
  double next_report_ = 0.1;
  std::atomic<bool> cancelled_{false};
};

}  // namespace tetris::reorder
