// Random streams that are cheap to start: each pair of groups visited by the search draws from its
// own, so results do not depend on which thread visits it.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace tetris::reorder {

// splitmix64 (Steele, Lea, Flood 2014): a counter and a mixing function.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  Random(uint64_t seed, uint64_t stream) : state_(mix(seed ^ mix(stream))) {}

  uint64_t next() { return mix(state_ += 0x9e3779b97f4a7c15ull); }
  // Uniform in [0, n); the bias of 2^-32 * n is of no consequence here.
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(((next() >> 32) * n) >> 32); }
  // Uniform in (0, 1].
  double uniform() { return (static_cast<double>(next() >> 11) + 1.0) * 0x1p-53; }

  static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }

 private:
  uint64_t state_;
};

// std::shuffle may differ between standard libraries; this does not.
template <typename T>
void shuffle(std::vector<T>& items, Random& random) {
  for (size_t i = items.size(); i > 1; --i) {
    std::swap(items[i - 1], items[random.below(static_cast<uint32_t>(i))]);
  }
}

}  // namespace tetris::reorder
