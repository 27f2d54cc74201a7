// Stored blocks in the order in which a convolution's tiles walk them.
#pragma once

#include <vector>

#include "core/view.h"
#include "cpu/conv_geometry.h"

namespace tetris::cpu {

// Block rows of all groups, each cut into the taps of one phase after the other. Rows and columns
// may have changed roles; then everything here is of the transposed layout.
template <class T>
struct ConvBlocks {
  int64_t bo, bi;
  int64_t out, in;    // channels of one group
  int64_t rows;       // block rows of one group
  int64_t in_groups;  // column groups at one tap
  int64_t phases;
  const T* values;
  const int32_t* col_idx;
  const int32_t* const* begin;  // [phases] -> [all block rows] first block, and ...
  const int32_t* const* end;    // ... one past the last

  std::vector<const int32_t*> cuts;  // what begin and end point into

  // Values of all phases.
  int64_t stored(int64_t groups) const {
    int64_t count = 0;
    for (int64_t p = 0; p < phases; ++p)
      for (int64_t r = 0; r < groups * rows; ++r) count += end[p][r] - begin[p][r];
    return count * bo * bi;
  }
  // How many blocks one phase has before each block row of a group.
  std::vector<int32_t> row_ptr(int64_t phase, int64_t group) const {
    std::vector<int32_t> counts{0};
    for (int64_t r = group * rows; r < (group + 1) * rows; ++r)
      counts.push_back(counts.back() + end[phase][r] - begin[phase][r]);
    return counts;
  }
};

// Which taps' blocks each phase has.
struct TapPhases {
  std::vector<int64_t> of_tap;  // those outside of [0, count) are in none
  int64_t count;
};
TapPhases phases_of(const LineGeometry& lines);
TapPhases phase_for_each_tap(int64_t taps);

// As they are where the layout's order serves; otherwise reordered into the calling thread's
// scratch memory, on one thread: 0.6 ns a value for 8x8 blocks, 1.4 ns for 8x1. A product uses each
// value for every pixel: reordering is 1 % of its time at 8 images of 28x28, half of it at one
// image of 7x7. Keeping the copy with the layout would mean knowing when values change.
template <class T>
ConvBlocks<T> conv_blocks(const BlockSparseView& w, const T* values, const TapPhases& phases,
                          bool transposed);

// Of blocks with a phase for each tap, one tap's, in the phase that lines have it in.
template <class T>
ConvBlocks<T> blocks_of_tap(const ConvBlocks<T>& blocks, int64_t tap, const LineGeometry& lines);

}  // namespace tetris::cpu
