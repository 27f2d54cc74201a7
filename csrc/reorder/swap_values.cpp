#include "reorder/swap_values.h"

#include <algorithm>
#include <cmath>
#include <limits>

#if defined(__GNUC__)
#define TETRIS_INLINE __attribute__((always_inline)) inline
#define TETRIS_INLINE_LAMBDA __attribute__((always_inline))
#else
#define TETRIS_INLINE inline
#define TETRIS_INLINE_LAMBDA
#endif

// One binary for every x86-64: the loader picks the clone. Sanitizers start after the loader, so
// they get the plain version.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define TETRIS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TETRIS_CLONES
#endif

namespace tetris::reorder {
namespace {

#if defined(__GNUC__)
// Vector extensions, not intrinsics: each clone lowers them to its own width.
// NOTE: with plain arrays of floats GCC 12 spills the sums of swap_values_along.
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(kLanes * sizeof(int32_t)), may_alias));

// NOTE: results go by reference; GCC warns of vectors returned by value, though all is inlined.
TETRIS_INLINE const Lanes& load(const float* x) { return *reinterpret_cast<const Lanes*>(x); }
TETRIS_INLINE void store(float* to, const Lanes& x) { *reinterpret_cast<Lanes*>(to) = x; }
TETRIS_INLINE void raise(Lanes& best, const Lanes& x) { best = x > best ? x : best; }
TETRIS_INLINE void take_magnitude(Lanes& to, const Lanes& x) { to = (Lanes)((Bits)x & 0x7fffffff); }

// sum += max(floor, |x|) on kLanes lanes
TETRIS_INLINE void accumulate(Lanes& sum, const float* floor, const Lanes& x) {
  const Lanes& at_least = load(floor);
  Lanes size;
  take_magnitude(size, x);
  sum += size > at_least ? size : at_least;
}

// sum += max(floor, |x + |y||)
TETRIS_INLINE void accumulate_sum(Lanes& sum, const float* floor, const float* x, const float* y) {
  Lanes size;
  take_magnitude(size, load(y));
  accumulate(sum, floor, load(x) + size);
}

TETRIS_INLINE void accumulate(Lanes& sum, const float* floor, const float* x) {
  accumulate(sum, floor, load(x));
}

typedef float Half __attribute__((vector_size(kLanes * 2), aligned(4), may_alias));

TETRIS_INLINE float largest_of(const Lanes& lanes) {
  const Half* half = reinterpret_cast<const Half*>(&lanes);
  const Half eight = half[0] > half[1] ? half[0] : half[1];
  const float* lane = reinterpret_cast<const float*>(&eight);
  const float a = std::max(lane[0], lane[4]), b = std::max(lane[1], lane[5]);
  const float c = std::max(lane[2], lane[6]), d = std::max(lane[3], lane[7]);
  return std::max(std::max(a, b), std::max(c, d));
}

TETRIS_INLINE float total(const Lanes& sum) {
  const Half* half = reinterpret_cast<const Half*>(&sum);
  const Half eight = half[0] + half[1];
  const float* lane = reinterpret_cast<const float*>(&eight);
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}
#else
struct Lanes {
  float lane[kLanes];
};

template <typename Op>
Lanes combine(const Lanes& x, const Lanes& y, Op op) {
  Lanes result;
  for (int64_t u = 0; u < kLanes; ++u) result.lane[u] = op(x.lane[u], y.lane[u]);
  return result;
}

inline Lanes operator+(const Lanes& x, const Lanes& y) {
  return combine(x, y, [](float a, float b) { return a + b; });
}
inline Lanes operator-(const Lanes& x, const Lanes& y) {
  return combine(x, y, [](float a, float b) { return a - b; });
}
inline void raise(Lanes& best, const Lanes& x) {
  best = combine(x, best, [](float a, float b) { return a > b ? a : b; });
}
inline Lanes load(const float* x) {
  Lanes result;
  std::copy_n(x, kLanes, result.lane);
  return result;
}
inline void store(float* to, const Lanes& x) { std::copy_n(x.lane, kLanes, to); }
inline void take_magnitude(Lanes& to, const Lanes& x) {
  to = combine(x, x, [](float a, float) { return std::fabs(a); });
}
inline Lanes operator+(float x, const Lanes& y) {
  return combine(y, y, [x](float a, float) { return x + a; });
}
inline Lanes operator-(float x, const Lanes& y) {
  return combine(y, y, [x](float a, float) { return x - a; });
}
inline Lanes operator*(float x, const Lanes& y) {
  return combine(y, y, [x](float a, float) { return x * a; });
}
inline float largest_of(const Lanes& lanes) {
  return *std::max_element(lanes.lane, lanes.lane + kLanes);
}

inline void accumulate(Lanes& sum, const float* floor, const float* x) {
  for (int64_t u = 0; u < kLanes; ++u) sum.lane[u] += std::fmax(floor[u], std::fabs(x[u]));
}

inline void accumulate_sum(Lanes& sum, const float* floor, const float* x, const float* y) {
  for (int64_t u = 0; u < kLanes; ++u)
    sum.lane[u] += std::fmax(floor[u], std::fabs(x[u] + std::fabs(y[u])));
}

inline float total(const Lanes& sum) {
  float result = 0;
  for (float x : sum.lane) result += x;
  return result;
}
#endif

// Candidates run along the lanes: sum[u] += max(floor[l], |base[l] + tile[l][u]|).
template <int64_t kWidth>
TETRIS_INLINE void accumulate_across(const float* base, const float* floor, const float* tile,
                                     int64_t width, int64_t length, float* values) {
  float sum[kWidth] = {};
  for (int64_t l = 0; l < length; ++l) {
    for (int64_t u = 0; u < kWidth; ++u) {
      const float x = std::fabs(base[l] + tile[l * width + u]);
      sum[u] += x > floor[l] ? x : floor[l];
    }
  }
  for (int64_t u = 0; u < kWidth; ++u) values[u] = sum[u];
}

#if defined(__GNUC__)
// NOTE: GCC 12 vectorizes the loop above at 2 * kLanes but not at kLanes (6 times slower).
template <>
TETRIS_INLINE void accumulate_across<kLanes>(const float* base, const float* floor,
                                             const float* tile, int64_t width, int64_t length,
                                             float* values) {
  Lanes even = {}, odd = {};  // two sums: one would wait for its own last addition
  const auto add = [&](Lanes& sum, int64_t l) TETRIS_INLINE_LAMBDA {
    const Lanes x = base[l] + load(tile + l * width);
    Lanes size;
    take_magnitude(size, x);
    const Lanes at_least = floor[l] - Lanes{};
    sum += size > at_least ? size : at_least;
  };
  int64_t l = 0;
  for (; l + 2 <= length; l += 2) {
    add(even, l);
    add(odd, l + 1);
  }
  if (l < length) add(even, l);
  *reinterpret_cast<Lanes*>(values) = even + odd;
}
#endif

constexpr float kLowest = std::numeric_limits<float>::lowest();

}  // namespace

TETRIS_CLONES
float pair_value(const float* diff, const float* floor, int64_t stride) {
  Lanes sum = {};
  for (int64_t l = 0; l < stride; l += kLanes) accumulate(sum, floor + l, diff + l);
  return total(sum);
}

TETRIS_CLONES
void swap_values_along(const float* diff, const float* floor, const float* out, const float* lines,
                       const int32_t* ids, int64_t count, int64_t stride, float* base,
                       float* values) {
  for (int64_t l = 0; l < stride; ++l) base[l] = diff[l] - std::fabs(out[l]);
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {  // four candidates share the loads of base and floor
    const float* a = lines + ids[j] * stride;
    const float* b = lines + ids[j + 1] * stride;
    const float* c = lines + ids[j + 2] * stride;
    const float* d = lines + ids[j + 3] * stride;
    Lanes sum_a = {}, sum_b = {}, sum_c = {}, sum_d = {};
    for (int64_t l = 0; l < stride; l += kLanes) {
      accumulate_sum(sum_a, floor + l, base + l, a + l);
      accumulate_sum(sum_b, floor + l, base + l, b + l);
      accumulate_sum(sum_c, floor + l, base + l, c + l);
      accumulate_sum(sum_d, floor + l, base + l, d + l);
    }
    values[j] = total(sum_a);
    values[j + 1] = total(sum_b);
    values[j + 2] = total(sum_c);
    values[j + 3] = total(sum_d);
  }
  for (; j < count; ++j) {
    const float* a = lines + ids[j] * stride;
    Lanes sum = {};
    for (int64_t l = 0; l < stride; l += kLanes) accumulate_sum(sum, floor + l, base + l, a + l);
    values[j] = total(sum);
  }
}

TETRIS_CLONES
void swap_values_across(const float* diff, const float* floor, const float* out, const float* tile,
                        int64_t width, int64_t length, float* base, float* values) {
  for (int64_t l = 0; l < length; ++l) base[l] = diff[l] - std::fabs(out[l]);
  int64_t first = 0;
  for (; first + 2 * kLanes <= width; first += 2 * kLanes) {
    accumulate_across<2 * kLanes>(base, floor, tile + first, width, length, values + first);
  }
  if (first < width) {
    accumulate_across<kLanes>(base, floor, tile + first, width, length, values + first);
  }
}

TETRIS_CLONES
BestPair best_pair(const float* mean, const float* diff, const float* out, const float* in,
                   int64_t length) {
  Lanes g = kLowest - Lanes{}, h = g;
  int64_t l = 0;
  for (; l + kLanes <= length; l += kLanes) {
    Lanes d = load(diff + l);
    if (out) {
      Lanes more, less;
      take_magnitude(more, load(in + l));
      take_magnitude(less, load(out + l));
      d = d + (more - less);
    }
    raise(g, load(mean + l) + d);
    raise(h, load(mean + l) - d);
  }
  BestPair best = {largest_of(g), largest_of(h)};
  for (; l < length; ++l) {
    const float d = out ? diff[l] + (std::fabs(in[l]) - std::fabs(out[l])) : diff[l];
    best.g = std::max(best.g, mean[l] + d);
    best.h = std::max(best.h, mean[l] - d);
  }
  return best;
}

TETRIS_CLONES
void best_pairs_across(const float* mean, const float* base, const float* tile, int64_t width,
                       int64_t length, float* best_g, float* best_h) {
  for (int64_t first = 0; first < width; first += kLanes) {
    Lanes g = kLowest - Lanes{}, h = g;
    for (int64_t l = 0; l < length; ++l) {
      const Lanes d = base[l] + load(tile + l * width + first);
      raise(g, mean[l] + d);
      raise(h, mean[l] - d);
    }
    store(best_g + first, g);
    store(best_h + first, h);
  }
}

TETRIS_CLONES
Largest largest_noisy(const float* values, const float* noise, float scale, int64_t count,
                      float to_beat, float* noisy) {
  Lanes best = kLowest - Lanes{};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Lanes x = load(values + j) + scale * load(noise + j);
    store(noisy + j, x);
    raise(best, x);
  }
  float largest = j > 0 ? largest_of(best) : kLowest;
  for (; j < count; ++j) {
    noisy[j] = values[j] + scale * noise[j];
    largest = noisy[j] > largest ? noisy[j] : largest;
  }
  if (!(largest > to_beat)) return {largest, -1};
  return {largest, std::find(noisy, noisy + count, largest) - noisy};
}

}  // namespace tetris::reorder
