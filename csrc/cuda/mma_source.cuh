// What the tensor-core kernels copy: the columns of a block row, the pixels of the source.
//
// All stored blocks of a block row lie behind each other along one axis of columns, cut into
// 16-byte chunks. A block's width is a multiple of a chunk, so a chunk lies in one block, and a
// slab is full whatever the width is: it takes four chunks of one wide block, or of four narrow
// ones that may lie anywhere, at taps of their own. Both are looked up ahead, in tables in shared
// memory, for a division costs more than the copy.
#pragma once

#include <cstdint>

#include "cuda/mma_tile.cuh"
#include "cuda/platform.h"
#include "cuda/problem.h"

namespace tetris::cuda::mma {

struct alignas(16) ColumnChunk {
  int64_t source;  // elements from where a pixel's channels start: the tap's shift, the channel
  int64_t values;  // elements into the values: the chunk's first column, the block's first row
  int dy, dx;      // the tap's shift
  uint32_t phase;  // pixels that the tap hits have this phase
  int columns;     // of the chunk, that the matrix has; the others are copied as zeros
};

// A pixel of the result as the source's taps see it: at (y, x), plus the tap's shift, if that is
// inside the source and the phases agree. Phases are what is left where strides divide: of the
// pixel plus padding, of the tap's distance. A direct convolution has none.
struct alignas(16) SourcePixel {
  int index;  // in pixels from the source's first; may lie before it
  int y, x;
  uint32_t phase;
};

// What a launcher works out once, for divisions of 64 bits are long.
struct Extents {
  int group_rows, group_cols, block_rows_per_group, col_groups;
  int pixels;            // of the result
  int64_t source_pixel;  // elements from one pixel of the source to the next
  int source_image;      // pixels from one image of the source to the next
  bool pointwise;        // pixel p of the result sees number p of the source

  static Extents of(const SparseRows& w, const Geometry& g, const Strides& x) {
    Extents e;
    e.group_rows = int(w.group_rows());
    e.group_cols = int(w.group_cols());
    e.block_rows_per_group = int(w.block_rows_per_group());
    e.col_groups = int(w.col_groups());
    e.pixels = int(g.pixels());
    e.source_pixel = x.pixel;
    e.source_image = g.images == 1 ? 0 : int(x.image / x.pixel);
    e.pointwise = g.pointwise() && (g.images == 1 || e.source_image == g.source_h * g.source_w);
    return e;
  }
};

TETRIS_DEVICE SourcePixel source_pixel(const Geometry& g, const Extents& extents, int pixel) {
  if (pixel >= extents.pixels) return {0, -(1 << 30), -(1 << 30), 0};  // no tap hits
  const int n = pixel / (g.result_h * g.result_w);
  const int rest = pixel - n * (g.result_h * g.result_w);
  int y = rest / g.result_w;
  int x = rest - y * g.result_w;
  uint32_t phase = 0;
  if (g.transposed) {
    const int from_y = y + g.pad_h, from_x = x + g.pad_w;
    y = from_y / g.stride_h;
    x = from_x / g.stride_w;
    phase = uint32_t(from_y - y * g.stride_h) << 16 | uint32_t(from_x - x * g.stride_w);
  } else {
    y = y * g.stride_h - g.pad_h;
    x = x * g.stride_w - g.pad_w;
  }
  return {n * extents.source_image + y * g.source_w + x, y, x, phase};
}

TETRIS_DEVICE bool hits(const Geometry& g, const SourcePixel& pixel, const ColumnChunk& chunk) {
  // Without branches: & and not &&.
  return (unsigned(pixel.y + chunk.dy) < unsigned(g.source_h)) &
         (unsigned(pixel.x + chunk.dx) < unsigned(g.source_w)) & (pixel.phase == chunk.phase);
}

// The columns that the stored blocks of a block row have, all together.
template <class T>
class Columns {
 public:
  TETRIS_DEVICE Columns(const SparseRows& w, const Geometry& g, const Extents& extents,
                        int block_row)
      : w_(w), g_(g), extents_(extents), first_(w.row_ptr[block_row]) {
    total_ = (w.row_ptr[block_row + 1] - first_) * w.width;
    group_ = int64_t(block_row / extents.block_rows_per_group) * extents.group_cols;
  }

  TETRIS_DEVICE int total() const { return total_; }

  // A chunk is looked up in two parts, so that the first, a load from memory, has time to arrive.
  struct Found {
    int column, block;
  };
  TETRIS_DEVICE Found find(int chunk) const {
    if (chunk * kChunk<T> >= total_) return {0, 0};
    const int stored = first_ + chunk * kChunk<T> / w_.width;
    return {w_.col_idx[stored], w_.block ? w_.block[stored] : stored};
  }
  TETRIS_DEVICE ColumnChunk describe(int chunk, Found found) const {
    if (chunk * kChunk<T> >= total_) return {0, 0, 0, 0, 0, 0};
    const int offset = chunk * kChunk<T> % w_.width;
    const int tap = found.column / extents_.col_groups;
    const int column = (found.column - tap * extents_.col_groups) * w_.width + offset;
    const int left = extents_.group_cols - column;

    ColumnChunk result;
    const int ky = tap / g_.kernel_w;
    int dy = ky * g_.dilation_h, dx = (tap - ky * g_.kernel_w) * g_.dilation_w;
    result.phase = 0;
    if (g_.transposed) {
      const int at_y = dy / g_.stride_h, at_x = dx / g_.stride_w;
      result.phase = uint32_t(dy - at_y * g_.stride_h) << 16 | uint32_t(dx - at_x * g_.stride_w);
      dy = -at_y, dx = -at_x;
    }
    result.dy = dy, result.dx = dx;
    result.source = (int64_t(dy) * g_.source_w + dx) * extents_.source_pixel + group_ + column;
    result.values = int64_t(found.block) * w_.width * w_.height +
                    (w_.transposed ? offset : int64_t(offset) * w_.height);
    result.columns = left < 0 ? 0 : left < kChunk<T> ? left : kChunk<T>;
    return result;
  }

 private:
  const SparseRows& w_;
  const Geometry& g_;
  const Extents& extents_;
  int first_, total_;
  int64_t group_;
};

}  // namespace tetris::cuda::mma
