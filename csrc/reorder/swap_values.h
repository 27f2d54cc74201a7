// The inner loop of the threshold search: what a pair of groups is worth after each of its swaps.
//
// Let g and h be two groups and S their sums less the threshold, so that the pair is worth
// sum_l max(S_g[l], 0) + max(S_h[l], 0). A swap changes S_g by +delta and S_h by -delta, so the
// mean a = (S_g + S_h) / 2 stays and only the half difference d = (S_g - S_h) / 2 moves:
//
//     max(a + d, 0) + max(a - d, 0)  =  a + max(|a|, |d|)
//
// Half the arithmetic of the direct form, and sum_l a[l] never changes. Below, floor = |a|.
//
// Of `lines`, `in` and `out`, magnitudes count (measured: no slower than numbers known to be
// non-negative): where blocks are one column wide they are rows of the weight, of any sign.
#pragma once

#include <cstdint>

namespace tetris::reorder {

// Floats per vector step; strides are multiples of it, padding is zero.
constexpr int64_t kLanes = 16;

inline int64_t pad_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// sum_l max(floor[l], |diff[l]|), l in [0, stride).
float pair_value(const float* diff, const float* floor, int64_t stride);

// values[j] = sum_l max(floor[l], |diff[l] - |out[l]| + |lines[ids[j] * stride + l]||): line `out`
// leaves g for h, line ids[j] comes back. `base` is scratch of `stride` floats.
// Vectors run along l: best for low blocks and long lines.
void swap_values_along(const float* diff, const float* floor, const float* out, const float* lines,
                       const int32_t* ids, int64_t count, int64_t stride, float* base,
                       float* values);

// The same from a transposed copy of the magnitudes of h's lines, tile[l * width + j], width a
// multiple of kLanes.
// Vectors run across candidates: no horizontal sums, best for tall blocks. values: `width` floats.
void swap_values_across(const float* diff, const float* floor, const float* out, const float* tile,
                        int64_t width, int64_t length, float* base, float* values);

// The largest of mean[l] + d[l] and of mean[l] - d[l], l in [0, length), for d = diff, or
// d = diff - |out| + |in| unless these are null: the best blocks of both groups after a swap.
struct BestPair {
  float g, h;
};
BestPair best_pair(const float* mean, const float* diff, const float* out, const float* in,
                   int64_t length);

// The same for all candidates of swap_values_across, from the `base` it leaves: `width` floats
// each.
void best_pairs_across(const float* mean, const float* base, const float* tile, int64_t width,
                       int64_t length, float* best_g, float* best_h);

// noisy[j] = values[j] + scale * noise[j]; returns the first largest of `count`. `noisy` is
// scratch of `count` floats.
struct Largest {
  float value;
  int64_t index;  // -1 unless value > to_beat
};
Largest largest_noisy(const float* values, const float* noise, float scale, int64_t count,
                      float to_beat, float* noisy);

}  // namespace tetris::reorder
