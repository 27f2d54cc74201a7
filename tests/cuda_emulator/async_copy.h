// cp.async: copies from global to shared memory that a thread issues, groups and waits for.
//
// A copy reads its source and writes its destination at once or when its thread waits for its
// group, as the seed (or Options::landing) says. Until then the destination is poison. Copies that
// nobody waits for land when the CTA has ended.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "cuda_emulator/violation.h"

namespace tetris::cuda::emulator {

class AsyncCopies {
 public:
  // Copies `bytes` of `size` bytes, and zeros behind them.
  void issue(void* shared, const void* global, int size, int bytes, const char* what, Site site);
  void commit();
  // Until no more than `pending` committed groups are left.
  void wait(int pending);
  // Everything that was issued, committed or not; what an mbarrier tracks.
  void land_all();

 private:
  struct Copy {
    unsigned char* to;
    const unsigned char* from;
    int size, bytes;
    void land() const;
  };
  using Group = std::vector<Copy>;
  Group open_;
  std::deque<Group> committed_;
};

}  // namespace tetris::cuda::emulator
