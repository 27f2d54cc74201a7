// What the emulator's own tests share.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda_emulator/asan.h"
#include "cuda_emulator/options.h"

namespace tetris::cuda::test {

// Options for a scope.
class With {
 public:
  explicit With(emulator::Options now) : before_(emulator::options()) { emulator::options() = now; }
  ~With() { emulator::options() = before_; }

 private:
  emulator::Options before_;
};

inline With with_seed(uint64_t seed) { return With({seed, emulator::Landing::kRandom}); }
inline With with_landing(emulator::Landing landing) { return With({1, landing}); }

#define EXPECT_MENTIONS(text, part) \
  EXPECT_NE(std::string(text).find(part), std::string::npos) << "the text: " << (text)

}  // namespace tetris::cuda::test
