// y^T = W x^T on tensor cores: a block of threads ("CTA") computes a tile of rows x pixels.
//
//    stored blocks of the row      K [K] K  K      cut into chunks, four to a slab,
//    lie behind each other         ----------->    whatever the blocks' width is
//
//    x tile     [pixels][slab]     16-byte copies, a pixel's chunk each, from its tap's pixel
//    values     [slab][rows]       rows contiguous (transposed layouts: [rows][slab])
//    y tile     [pixels][rows]     in registers; then bias, residual, activation, 16-byte stores
//
// What the ridge asks for: a chunk of x is multiplied with tile_rows rows, so short blocks are
// bound by x from L2 and the tile is as many pixels as accumulators allow; values come back for
// every tile of pixels, which are neighbours in the order of work and find them in L2.
#pragma once

#include <cstdint>

#include "cuda/epilogue.cuh"
#include "cuda/mma_run.cuh"
#include "cuda/mma_source.cuh"
#include "cuda/mma_tile.cuh"
#include "cuda/numeric.cuh"
#include "cuda/problem.h"
#include "cuda/ptx.cuh"

namespace tetris::cuda::mma {

struct ProductPlan {
  Extents extents;
  int pixel_tiles, row_tiles;
  int parts;  // tiles of a block row
  int panel;  // tiles of pixels that all row tiles pass over before the next ones
  int stages;
  bool whole_y, whole_residual;  // 16-byte accesses are aligned
};

template <class T, bool kTransposed, class S>
class ProductTile {
 public:
  using Warp = WarpTile<T, Lines::kAlongK, kTransposed ? Lines::kAlongK : Lines::kAcrossK, S>;
  static_assert(Warp::kScratchBytes <= 3 * Warp::kStageBytes, "the epilogue reuses the ring");

  // The list of chunks has two halves, of which one is read while the other is filled.
  static constexpr int kListed = 64;
  static constexpr int kListedSlabs = kListed / kSlabChunks;

  // Shared memory: the list of chunks, the tile's pixels where they are looked up, the ring.
  static constexpr int kListBytes = 2 * kListed * int(sizeof(ColumnChunk));
  static TETRIS_HOST_DEVICE int pixel_bytes(const Extents& extents) {
    return extents.pointwise ? 0 : S::kM * int(sizeof(SourcePixel));
  }
  static size_t shared_bytes(const ProductPlan& plan) {
    return kListBytes + pixel_bytes(plan.extents) + size_t(plan.stages) * Warp::kStageBytes;
  }

  // The tile of rows from part_row on of a block row, and of pixels from `pixel` on.
  TETRIS_DEVICE ProductTile(const Product& p, const ProductPlan& plan, int block_row, int part_row,
                            int pixel, unsigned char* shared)
      : p_(p),
        plan_(plan),
        part_row_(part_row),
        pixel_(pixel),
        columns_(p.w, p.geometry, plan.extents, block_row),
        list_(reinterpret_cast<ColumnChunk*>(shared)),
        pixels_(reinterpret_cast<SourcePixel*>(shared + kListBytes)),
        ring_(shared + kListBytes + pixel_bytes(plan.extents)) {
    const int group = block_row / plan.extents.block_rows_per_group;
    const int in_group =
        (block_row - group * plan.extents.block_rows_per_group) * p.w.height + part_row;
    row_ = int64_t(group) * plan.extents.group_rows + in_group;
    rows_ = min(p.w.height - part_row, plan.extents.group_rows - in_group);
  }

  TETRIS_DEVICE void compute() {
    const int thread = int(threadIdx.x);
    if (thread < kListed) list_[thread] = columns_.describe(thread, columns_.find(thread));
    if (!plan_.extents.pointwise) {
      for (int i = thread; i < S::kM; i += kThreads) {
        pixels_[i] = source_pixel(p_.geometry, plan_.extents, pixel_ + i);
      }
    }
    const T* bias = p_.bias ? static_cast<const T*>(p_.bias) + row_ : nullptr;
    Warp warp([&](int n) { return bias && n < rows_ ? Numeric<T>::load(bias[n]) : 0.f; });
    __syncthreads();

    const int slabs = (columns_.total() + X::kSlab - 1) / X::kSlab;
    multiply_slabs(warp, ring_, plan_.stages, slabs, [this](int slab, unsigned char* stage) {
      const ColumnChunk* chunks = list_ + unsigned(slab) % (2 * kListedSlabs) * kSlabChunks;
      copy_x(chunks, stage);
      copy_values(chunks, stage + X::kBytes);
      look_ahead(slab);
    });
    warp.template drain<kChunk<T>>(
        ring_, [this](int m, int n, float (&run)[kChunk<T>]) { store(m, n, run); });
  }

 private:
  using X = typename Warp::A;
  using Values = typename Warp::B;

  // A thread copies the same chunk of many pixels.
  TETRIS_DEVICE void copy_x(const ColumnChunk* chunks, unsigned char* tile) const {
    constexpr unsigned kStep = kThreads / X::kLineChunks;
    const unsigned line = threadIdx.x / X::kLineChunks, at = threadIdx.x % X::kLineChunks;
    const ColumnChunk chunk = chunks[at];
    const int bytes = chunk.columns * int(sizeof(T));
    const T* x = static_cast<const T*>(p_.x) + chunk.source;
    if (plan_.extents.pointwise) {
      const int64_t distance = plan_.extents.source_pixel;
      const int left = plan_.extents.pixels - pixel_ - int(line);
      x += (pixel_ + int(line)) * distance;
#pragma unroll
      for (unsigned i = 0; i < S::kM; i += kStep) {
        ptx::cp_async_16(tile + X::at(line + i, at), x + i * distance, int(i) < left ? bytes : 0);
      }
    } else {
#pragma unroll
      for (unsigned i = 0; i < S::kM; i += kStep) {
        const SourcePixel from = pixels_[line + i];
        ptx::cp_async_16(tile + X::at(line + i, at), x + from.index * plan_.extents.source_pixel,
                         hits(p_.geometry, from, chunk) ? bytes : 0);
      }
    }
  }

  TETRIS_DEVICE void copy_values(const ColumnChunk* chunks, unsigned char* tile) const {
    constexpr unsigned kStep = kThreads / Values::kLineChunks;
    const unsigned line = threadIdx.x / Values::kLineChunks;
    const unsigned at = threadIdx.x % Values::kLineChunks;
    if (kStep > Values::kLineCount && line >= Values::kLineCount) return;
    const T* values = static_cast<const T*>(p_.values);
#pragma unroll
    for (unsigned i = 0; i < Values::kLineCount; i += kStep) {
      if constexpr (kTransposed) {
        const ColumnChunk& chunk = chunks[at];
        const int row = part_row_ + int(line + i);
        ptx::cp_async_16(tile + Values::at(line + i, at),
                         values + chunk.values + int64_t(row) * p_.w.width,
                         row < p_.w.height ? chunk.columns * int(sizeof(T)) : 0);
      } else {
        const ColumnChunk& chunk = chunks[(line + i) / kChunk<T>];
        const int column = int((line + i) % kChunk<T>);
        const int row = part_row_ + int(at) * kChunk<T>;
        ptx::cp_async_16(tile + Values::at(line + i, at),
                         values + chunk.values + int64_t(column) * p_.w.height + row,
                         row < p_.w.height && column < chunk.columns ? kChunkBytes : 0);
      }
    }
  }

  // Fills the half that comes next while the last slabs of this one are copied.
  TETRIS_DEVICE void look_ahead(unsigned slab) {
    if (threadIdx.x >= kListed) return;
    const int chunk = int((slab / kListedSlabs + 1) * kListed + threadIdx.x);
    if (slab % kListedSlabs == kListedSlabs - 2) found_ = columns_.find(chunk);
    if (slab % kListedSlabs == kListedSlabs - 1) {
      list_[chunk % (2 * kListed)] = columns_.describe(chunk, found_);
    }
  }

  TETRIS_DEVICE void store(int m, int n, float (&run)[kChunk<T>]) const {
    const int pixel = pixel_ + m;
    if (pixel >= plan_.extents.pixels || n >= rows_) return;
    const int image =
        p_.geometry.images == 1 ? 0 : pixel / (p_.geometry.result_h * p_.geometry.result_w);
    const int in_image = pixel - image * p_.geometry.result_h * p_.geometry.result_w;
    const auto at = [&](const Strides& s) {
      return image * s.image + in_image * s.pixel + row_ + n;
    };
    if (p_.residual) {
      add_run<T>(run, static_cast<const T*>(p_.residual) + at(p_.residual_strides), rows_ - n,
                 plan_.whole_residual);
    }
#pragma unroll
    for (int v = 0; v < kChunk<T>; ++v) run[v] = activate(run[v], p_.activation);
    store_run<T>(static_cast<T*>(p_.y) + at(p_.y_strides), run, rows_ - n, plan_.whole_y);
  }

  const Product& p_;
  const ProductPlan& plan_;
  const int part_row_, pixel_;
  int64_t row_;  // of the result
  int rows_;     // of the result from there on, that are this block's
  const Columns<T> columns_;
  typename Columns<T>::Found found_ = {0, 0};
  ColumnChunk* const list_;
  SourcePixel* const pixels_;
  unsigned char* const ring_;
};

// Work in order: panels of pixel tiles; in a panel all tiles of rows, longest block rows first; for
// each the panel's tiles of pixels. Values are read from memory once a panel, x, a panel of which
// stays in L2, once.
template <class T, bool kTransposed, class S>
__global__ void __launch_bounds__(kThreads, 2)
    product_kernel(const __grid_constant__ Product p, const __grid_constant__ ProductPlan plan) {
  const int panel = int(blockIdx.x) / (plan.panel * plan.row_tiles);
  const int item = int(blockIdx.x) - panel * plan.panel * plan.row_tiles;
  const int tiles = min(plan.panel, plan.pixel_tiles - panel * plan.panel);
  const int row_tile = item / tiles;
  const int pixel_tile = panel * plan.panel + item - row_tile * tiles;
  const int place = row_tile / plan.parts;
  const int block_row = p.w.order ? p.w.order[place] : place;
  ProductTile<T, kTransposed, S>(p, plan, block_row, (row_tile - place * plan.parts) * S::kN,
                                 pixel_tile * S::kM, dynamic_shared())
      .compute();
}

}  // namespace tetris::cuda::mma
