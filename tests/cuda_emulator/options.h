// What a run of the emulator leaves to chance, and the chance itself.
#pragma once

#include <cstdint>

namespace tetris::cuda::emulator {

// When an asynchronous copy reads its source and writes its destination.
enum class Landing { kRandom, kAtOnce, kLatest };  // kRandom: each copy one of the other two

struct Options {
  uint64_t seed = 1;  // of the order of CTAs and threads and of what else varies
  Landing landing = Landing::kRandom;
};

// In force for launches from now on.
inline Options& options() {
  static Options current;
  return current;
}

// SplitMix64 (Steele, Lea, Flood 2014): small, and seeded by any number.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
  bool one_in(uint32_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

}  // namespace tetris::cuda::emulator
