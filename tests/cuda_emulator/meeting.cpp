#include "cuda_emulator/meeting.h"

#include "cuda_emulator/cta.h"

namespace tetris::cuda::emulator {

bool Meeting::arrive(int thread, const char* what, Site site, void* mine) {
  if (ended_ >= 0)
    violate(what, site,
            "all threads of the warp must take part, and thread " + std::to_string(ended_) +
                " is not there");
  if (arrived_ == 0) {
    what_ = what;
    site_ = site;
  } else if (site != site_ || (what != what_ && std::strcmp(what, what_) != 0)) {
    violate(what, site,
            "the warp diverged: other threads of it are at " + std::string(what_) + " (" +
                site_.str() + ")");
  }
  slots_[thread - first_] = mine;
  return ++arrived_ == static_cast<int>(slots_.size());
}

void Meeting::leave(int last) {
  arrived_ = 0;
  for (int i = 0; i < static_cast<int>(slots_.size()); ++i)
    if (first_ + i != last) this_cta().wake(first_ + i);
}

void Meeting::sleep(const char* what, Site site) { this_cta().sleep(what, site); }

void Meeting::thread_ended(int thread) {
  ended_ = thread;
  if (arrived_ > 0)
    violate(what_, site_,
            "all threads of the warp must take part, and thread " + std::to_string(thread) +
                " is not there");
}

}  // namespace tetris::cuda::emulator
