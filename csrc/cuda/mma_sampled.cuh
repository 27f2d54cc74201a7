// dvalues = (dy^T x) at stored blocks, on tensor cores: a block of threads ("CTA") computes a tile
// of a block row's columns x rows, summing over pixels.
//
//    stored blocks of the row      K [K] K  K      lie behind each other; a tile takes 64 to 256 of
//                                                  their columns, whatever the blocks' width is
//    x tile     [slab of pixels][columns]    16-byte copies, a chunk each, from its tap's pixel
//    dy tile    [slab of pixels][rows]       shared by all the tile's blocks
//    dvalues    [columns][rows]              in registers; then 16-byte stores, or additions
//
// How many tiles a block row has is known on the device only. CTAs are numbered over all tiles, and
// each counts through row_ptr which one is its own: a grid of block rows x longest row would mostly
// be CTAs without work.
#pragma once

#include <cstdint>

#include "cuda/mma_run.cuh"
#include "cuda/mma_source.cuh"
#include "cuda/mma_tile.cuh"
#include "cuda/problem.h"
#include "cuda/ptx.cuh"

namespace tetris::cuda::mma {

struct SampledPlan {
  Extents extents;
  int block_rows;
  int tiles;   // at most; of the last CTAs some have none
  int parts;   // tiles of a block row along its rows
  int splits;  // of the pixels
  int stages;
};

// Which tile of `columns` columns is number `wanted`, counted from block row to block row.
struct FoundTile {
  int block_row;  // -1: there are not as many
  int tile;       // within the block row
};

// `shared`: kThreads + 2 ints.
TETRIS_DEVICE FoundTile find_tile(const SparseRows& w, int block_rows, int columns, int wanted,
                                  int* shared) {
  const int thread = int(threadIdx.x);
  const auto tiles = [&](int row) {
    return ((w.row_ptr[row + 1] - w.row_ptr[row]) * w.width + columns - 1) / columns;
  };
  const int each = (block_rows + kThreads - 1) / kThreads;
  const int first = min(thread * each, block_rows), last = min(first + each, block_rows);
  int own = 0;
  for (int row = first; row < last; ++row) own += tiles(row);
  shared[thread] = own;
  if (thread == 0) shared[kThreads] = -1;
  __syncthreads();
  int before = 0;
#pragma unroll 16
  for (int i = 0; i < kThreads; ++i) before += i < thread ? shared[i] : 0;
  if (wanted >= before && wanted < before + own) {
    int row = first, left = wanted - before;
    while (left >= tiles(row)) left -= tiles(row++);
    shared[kThreads] = row;
    shared[kThreads + 1] = left;
  }
  __syncthreads();
  const FoundTile found{shared[kThreads], shared[kThreads + 1]};
  __syncthreads();  // `shared` is free
  return found;
}

template <class T, class S>
class SampledTile {
 public:
  using Warp = WarpTile<T, Lines::kAcrossK, Lines::kAcrossK, S>;
  static_assert(Warp::kScratchBytes <= 3 * Warp::kStageBytes, "the epilogue reuses the ring");

  // Shared memory: the tile's chunks, pixels where they are looked up (two halves, of which one is
  // read while the other is filled), the ring.
  static constexpr int kChunks = S::kM / kChunk<T>;
  static constexpr int kChunkListBytes = kChunks * int(sizeof(ColumnChunk));
  static TETRIS_HOST_DEVICE int pixel_bytes(const Extents& extents) {
    return extents.pointwise ? 0 : 2 * kThreads * int(sizeof(SourcePixel));
  }
  static size_t shared_bytes(const SampledPlan& plan) {
    return kChunkListBytes + pixel_bytes(plan.extents) + size_t(plan.stages) * Warp::kStageBytes;
  }

  // The tile of columns from `column` on of a block row, and of rows from part_row on of the block.
  TETRIS_DEVICE SampledTile(const SampledProduct& p, const SampledPlan& plan, int block_row,
                            int column, int part_row, int split, unsigned char* shared)
      : p_(p),
        plan_(plan),
        column_(column),
        part_row_(part_row),
        columns_(p.w, p.geometry, plan.extents, block_row),
        list_(reinterpret_cast<ColumnChunk*>(shared)),
        pixels_(reinterpret_cast<SourcePixel*>(shared + kChunkListBytes)),
        ring_(shared + kChunkListBytes + pixel_bytes(plan.extents)) {
    const int group = block_row / plan.extents.block_rows_per_group;
    const int in_group =
        (block_row - group * plan.extents.block_rows_per_group) * p.w.height + part_row;
    row_ = int64_t(group) * plan.extents.group_rows + in_group;
    rows_ = min(p.w.height - part_row, plan.extents.group_rows - in_group);

    const int slabs = (plan.extents.pixels + X::kSlab - 1) / X::kSlab;
    const int each = (slabs + plan.splits - 1) / plan.splits;
    const int first = min(split * each, slabs);
    slabs_ = min(each, slabs - first);
    pixel_ = first * X::kSlab;
  }

  TETRIS_DEVICE void compute() {
    for (int i = int(threadIdx.x); i < kChunks; i += kThreads) {
      const int chunk = column_ / kChunk<T> + i;
      list_[i] = columns_.describe(chunk, columns_.find(chunk));
    }
    look_ahead(0);
    Warp warp([](int) { return 0.f; });
    __syncthreads();

    multiply_slabs(warp, ring_, plan_.stages, slabs_, [this](int slab, unsigned char* stage) {
      copy_x(slab, stage);
      copy_dy(slab, stage + X::kBytes);
      if ((slab + 1) % kHalf == 0) look_ahead(slab + 1);
    });
    if (p_.partial) {
      warp.template drain<2>(ring_,
                             [this](int m, int n, float (&run)[2], float*) { add(m, n, run); });
    } else {
      warp.template drain<kChunk<T>>(
          ring_, [this](int m, int n, float (&run)[kChunk<T>], float*) { store(m, n, run); });
    }
  }

 private:
  using X = typename Warp::A;
  using Dy = typename Warp::B;
  static constexpr int kHalf = kThreads / X::kSlab;  // slabs
  // The first looking ahead of what is issued before the first barrier would come too early.
  static_assert(kHalf >= 4, "halves outlast the copies that are issued at once");

  // Looks up the pixels of half a table from `slab` on.
  TETRIS_DEVICE void look_ahead(int slab) {
    if (plan_.extents.pointwise) return;
    const int pixel = slab * X::kSlab + int(threadIdx.x);
    pixels_[pixel % (2 * kThreads)] = source_pixel(p_.geometry, plan_.extents, pixel_ + pixel);
  }

  TETRIS_DEVICE void copy_x(int slab, unsigned char* tile) const {
    constexpr unsigned kStep = kThreads / X::kLineChunks;
    const unsigned line = threadIdx.x / X::kLineChunks, at = threadIdx.x % X::kLineChunks;
    const unsigned first = X::at(line, at);
    const ColumnChunk chunk = list_[at];
    const int bytes = chunk.columns * int(sizeof(T));
    const T* x = static_cast<const T*>(p_.x) + chunk.source;
    const int64_t distance = plan_.extents.source_pixel;
    if (plan_.extents.pointwise) {
      const int pixel = pixel_ + slab * X::kSlab + int(line);
      const int left = plan_.extents.pixels - pixel;
      x += pixel * distance;
#pragma unroll
      for (unsigned i = 0; i < X::kLineCount; i += kStep) {
        ptx::cp_async_16(tile + X::at(first, line, i, at), x + i * distance,
                         int(i) < left ? bytes : 0);
      }
    } else {
      const SourcePixel* pixels = pixels_ + unsigned(slab) * X::kSlab % (2 * kThreads) + line;
#pragma unroll
      for (unsigned i = 0; i < X::kLineCount; i += kStep) {
        const SourcePixel from = pixels[i];
        ptx::cp_async_16(tile + X::at(first, line, i, at), x + from.index * distance,
                         hits(p_.geometry, from, chunk) ? bytes : 0);
      }
    }
  }

  TETRIS_DEVICE void copy_dy(int slab, unsigned char* tile) const {
    constexpr unsigned kStep = kThreads / Dy::kLineChunks;
    const unsigned line = threadIdx.x / Dy::kLineChunks, at = threadIdx.x % Dy::kLineChunks;
    const unsigned first = Dy::at(line, at);
    if (kStep > Dy::kLineCount && line >= Dy::kLineCount) return;
    const int row = int(at) * kChunk<T>;
    const int bytes = max(0, min(rows_ - row, kChunk<T>)) * int(sizeof(T));
    const int pixel = pixel_ + slab * X::kSlab + int(line);
    const int left = plan_.extents.pixels - pixel;
    const int64_t distance = p_.dy_strides.pixel;
    const T* dy = static_cast<const T*>(p_.dy) + row_ + row + pixel * distance;
#pragma unroll
    for (unsigned i = 0; i < Dy::kLineCount; i += kStep) {
      ptx::cp_async_16(tile + Dy::at(first, line, i, at), dy + i * distance,
                       int(i) < left ? bytes : 0);
    }
  }

  // Where column m of the tile lies in dvalues, and whether the matrix has it.
  TETRIS_DEVICE int64_t values(int m) const {
    return list_[m / kChunk<T>].values + int64_t(m % kChunk<T>) * p_.w.height + part_row_;
  }
  TETRIS_DEVICE bool exists(int m) const { return m % kChunk<T> < list_[m / kChunk<T>].columns; }

  // Entries outside the matrix are zeros by decree: what was summed there is 0 dy, NaN if dy is not
  // finite.
  TETRIS_DEVICE void store(int m, int n, float (&run)[kChunk<T>]) const {
    if (column_ + m >= columns_.total() || part_row_ + n >= p_.w.height) return;
    const bool inside = exists(m);
#pragma unroll
    for (int v = 0; v < kChunk<T>; ++v) run[v] = inside && n + v < rows_ ? run[v] : 0.f;
    store_run<T>(static_cast<T*>(p_.dvalues) + values(m) + n, run, kChunk<T>, true);
  }

  TETRIS_DEVICE void add(int m, int n, const float (&run)[2]) const {
    if (column_ + m >= columns_.total() || !exists(m)) return;
    float* to = p_.partial + values(m) + n;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (n + v < rows_) atomicAdd(to + v, run[v]);
    }
  }

  const SampledProduct& p_;
  const SampledPlan& plan_;
  const int column_, part_row_;
  int64_t row_;        // of the result
  int rows_;           // of the result from there on, that are this block's
  int pixel_, slabs_;  // of this split
  const Columns<T> columns_;
  ColumnChunk* const list_;
  SourcePixel* const pixels_;
  unsigned char* const ring_;
};

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 2)
    sampled_kernel(const __grid_constant__ SampledProduct p,
                   const __grid_constant__ SampledPlan plan) {
  const int split = int(blockIdx.x) / (plan.tiles * plan.parts);
  const int item = int(blockIdx.x) - split * plan.tiles * plan.parts;
  const int tile = item / plan.parts;
  const FoundTile found =
      find_tile(p.w, plan.block_rows, S::kM, tile, reinterpret_cast<int*>(dynamic_shared()));
  if (found.block_row < 0) return;
  SampledTile<T, S>(p, plan, found.block_row, found.tile * S::kM,
                    (item - tile * plan.parts) * S::kN, split, dynamic_shared())
      .compute();
}

}  // namespace tetris::cuda::mma
