// What can be counted without a clock.
#pragma once

#include <cstdint>

namespace tetris::cuda::emulator {

struct Statistics {
  // ldmatrix reads eight rows of 16 bytes at a time, from 32 banks of four bytes: in one turn where
  // no two rows lie in the same four banks.
  uint64_t ldmatrix_matrices = 0;
  uint64_t ldmatrix_conflicts = 0;  // further turns
};

// Of all launches since it was last set to {}.
inline Statistics& statistics() {
  static Statistics current;
  return current;
}

}  // namespace tetris::cuda::emulator
