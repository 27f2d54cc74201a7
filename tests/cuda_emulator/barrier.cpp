#include "cuda_emulator/barrier.h"

#include "cuda_emulator/cta.h"

namespace tetris::cuda::emulator {

void Barrier::count_in(int expected, bool aligned_site, const char* what, Site site) {
  if (!aligned_site && (expected <= 0 || expected % 32 != 0))
    violate(what, site, "threads must be a multiple of 32 (got " + std::to_string(expected) + ")");
  if (arrived_ == 0) {
    expected_ = expected;
    all_ = aligned_site;
    what_ = what;
    site_ = site;
  } else if (expected != expected_ || (aligned_site && site != site_)) {
    violate(what, site,
            "other threads have come to this barrier from " + std::string(what_) + " (" +
                site_.str() + "), for " + std::to_string(expected_) + " threads instead of " +
                std::to_string(expected));
  }
  ++arrived_;
}

bool Barrier::complete() {
  if (arrived_ < expected_) return false;
  arrived_ = 0;
  const std::vector<int> sleeping = std::move(sleeping_);
  sleeping_.clear();
  for (int thread : sleeping) this_cta().wake(thread);
  return true;
}

void Barrier::sync(int expected, bool aligned_site, const char* what, Site site) {
  count_in(expected, aligned_site, what, site);
  if (complete()) return;
  sleeping_.push_back(this_thread().number);
  this_cta().sleep(what, site);
}

void Barrier::arrive(int expected, const char* what, Site site) {
  count_in(expected, false, what, site);
  complete();
}

void Barrier::thread_ended(int alive) {
  if (arrived_ == 0 || !all_) return;
  expected_ = alive;
  complete();
}

}  // namespace tetris::cuda::emulator
