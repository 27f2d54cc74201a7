// From a tile of sums in shared memory to y: bias, residual, activation, and both permutations of
// memory (pixels or channels side by side), in whole sectors.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/gather.cuh"

namespace tetris::cuda {

// Extents that kernels would otherwise divide for: 64-bit divisions are calls of a subroutine.
struct Extents {
  uint32_t pixels;
  int group_rows, group_cols, block_rows, col_groups;  // of one group
};

inline Extents extents_of(const SparseRows& w, const Geometry& g) {
  return {static_cast<uint32_t>(g.pixels()), int(w.group_rows()), int(w.group_cols()),
          int(w.block_rows_per_group()), int(w.col_groups())};
}

// The channel of y that a row of a tile holds; -1 where the block row ends earlier.
TETRIS_DEVICE int channel_of_row(const Product& p, const Extents& e, int group, int row_in_group) {
  if (row_in_group >= e.group_rows) return -1;
  const int slot = group * e.group_rows + row_in_group;
  return p.row_perm ? __ldg(p.row_perm + slot) : slot;
}

// y of all rows (channels[row] >= 0) and pixels (table[pixel].image >= 0) of tile[row * pitch +
// pixel]; pixels is a multiple of 32. Lanes as in gather_tile.
template <class T, class A>
TETRIS_DEVICE void store_tile(const A* tile, int pitch, int rows, int pixels,
                              const int32_t* channels, const Pixel* table, const Product& p) {
  // Four at once, so that loads of the residual overlap; more would only inline more activations.
  constexpr int kBatch = 2;
  T* const y = static_cast<T*>(p.y);
  const int along = channels_inside(p.y_strides) ? 8 : 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int patch = 32 / along, patches = pixels / patch;
  const int batches = (rows + kBatch * along - 1) / (kBatch * along);
  for (int unit = warp; unit < patches * batches; unit += warps) {
    const int pixel = unit % patches * patch + lane / along;
    const int first = unit / patches * (kBatch * along) + lane % along;
    const Pixel at = table[pixel];
    if (at.image < 0) continue;
    const int64_t y_at = result_element(p.geometry, p.y_strides, at);
    const int64_t residual_at = result_element(p.geometry, p.residual_strides, at);
    int channel[kBatch];
    A sum[kBatch], bias[kBatch], residual[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = first + i * along;
      channel[i] = row < rows ? channels[row] : -1;
      if (channel[i] < 0) continue;
      sum[i] = tile[row * pitch + pixel];
      bias[i] = load_or_zero<T>(p.bias, channel[i]);
      residual[i] =
          load_or_zero<T>(p.residual, residual_at + channel[i] * p.residual_strides.channel);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (channel[i] >= 0)
        y[y_at + channel[i] * p.y_strides.channel] =
            finish<T>(sum[i], bias[i], residual[i], p.activation);
  }
}

}  // namespace tetris::cuda
