// A place where all threads of a warp (or a group of warps) come together for one instruction.
//
// The last thread to come performs the instruction for all; nobody leaves before. Threads that meet
// must have come for the same instruction at the same place in the source: PTX demands it of
// everything that is .aligned, and a warp that diverged breaks it.
#pragma once

#include <vector>

#include "cuda_emulator/violation.h"

namespace tetris::cuda::emulator {

class Meeting {
 public:
  Meeting(int first_thread, int size) : first_(first_thread), slots_(size) {}

  // Threads are numbered within the CTA. `act` is called by the last, with what each has brought:
  // act(T* const* all).
  template <class T, class Act>
  void meet(int thread, const char* what, Site site, T& mine, Act act) {
    if (arrive(thread, what, site, &mine)) {
      act(reinterpret_cast<T* const*>(slots_.data()));
      leave(thread);
    } else {
      sleep(what, site);
    }
  }
  void meet(int thread, const char* what, Site site) {
    int nothing = 0;
    meet(thread, what, site, nothing, [](int* const*) {});
  }

  // A thread of the group ended: whoever waits here, waits for ever.
  void thread_ended(int thread);

 private:
  bool arrive(int thread, const char* what, Site site, void* mine);  // whether it is the last
  void leave(int last);                                              // wakes the others
  void sleep(const char* what, Site site);

  int first_;
  std::vector<void*> slots_;
  int arrived_ = 0, ended_ = -1;
  const char* what_ = "";
  Site site_;
};

}  // namespace tetris::cuda::emulator
