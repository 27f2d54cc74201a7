// The barriers of a CTA: bar.sync and bar.arrive, of which __syncthreads() is number 0 for all.
//
// PTX counts whole warps in; here each thread counts itself, so that a warp of which only some come
// never completes a barrier and is reported.
#pragma once

#include <vector>

#include "cuda_emulator/violation.h"

namespace tetris::cuda::emulator {

class Barrier {
 public:
  static constexpr int kCount = 16;  // of a CTA

  // Waits until `expected` threads have come (a multiple of 32). `aligned_site`: all must come from
  // one place in the source, as they must to __syncthreads().
  void sync(int expected, bool aligned_site, const char* what, Site site);
  // Counts the thread in without waiting.
  void arrive(int expected, const char* what, Site site);
  // A thread of the CTA ended, `alive` are left: __syncthreads() is for those that have not ended.
  void thread_ended(int alive);

 private:
  void count_in(int expected, bool aligned_site, const char* what, Site site);
  bool complete();  // lets all go if they are there

  int arrived_ = 0, expected_ = 0;
  bool all_ = false;
  const char* what_ = "";
  Site site_;
  std::vector<int> sleeping_;
};

}  // namespace tetris::cuda::emulator
