// y^T = W x^T on tensor cores: a block of threads ("CTA") computes a tile of rows x pixels.
//
//    stored blocks of the row      K [K] K  K      cut into chunks, four to a slab,
//    lie behind each other         ----------->    whatever the blocks' width is
//
//    x tile     [pixels][slab]     16-byte copies, a pixel's chunk each, from its tap's pixel
//    values     [slab][rows]       rows contiguous (transposed layouts: [rows][slab])
//    y tile     [pixels][rows]     in registers; then bias, residual, activation, 16-byte stores
//
// Feature-major maps differ in the x tile, [slab][pixels], and in the transposition before storing.
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

// How maps lie: channels last, the source read through the taps; or feature-major, channels first
// and pixels side by side, for one tap. Feature-major permutations are free, for every channel is a
// line of its own.
enum class Maps { kChannelsLast, kFeatureMajor };

template <class T, Maps kMaps, bool kTransposed, class S>
class ProductTile {
 public:
  static constexpr bool kFeatureMajor = kMaps == Maps::kFeatureMajor;
  using Warp = WarpTile<T, kFeatureMajor ? Lines::kAcrossK : Lines::kAlongK,
                        kTransposed ? Lines::kAlongK : Lines::kAcrossK, S>;
  static_assert(Warp::kScratchBytes <= 3 * Warp::kStageBytes, "the epilogue reuses the ring");

  // The list of chunks has two halves, of which one is read while the other is filled.
  static constexpr int kListed = 64;
  static constexpr int kListedSlabs = kListed / kSlabChunks;

  // Shared memory: the list of chunks; of columns' channels or of the tile's pixels, where they are
  // looked up; the ring.
  static constexpr int kListBytes = 2 * kListed * int(sizeof(ColumnChunk));
  static TETRIS_HOST_DEVICE int lookup_bytes(const Extents& extents) {
    if (kFeatureMajor) return 2 * kListed * kChunk<T> * int(sizeof(int));
    return extents.pointwise ? 0 : S::kM * int(sizeof(SourcePixel));
  }
  static size_t shared_bytes(const ProductPlan& plan) {
    return kListBytes + lookup_bytes(plan.extents) + size_t(plan.stages) * Warp::kStageBytes;
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
        lookup_(shared + kListBytes),
        ring_(lookup_ + lookup_bytes(plan.extents)) {
    const int group = block_row / plan.extents.block_rows_per_group;
    const int in_group =
        (block_row - group * plan.extents.block_rows_per_group) * p.w.height + part_row;
    row_ = group * plan.extents.group_rows + in_group;
    rows_ = min(p.w.height - part_row, plan.extents.group_rows - in_group);
    if (kFeatureMajor) x_ = offset(p.x_strides, pixel + own_chunk() * kChunk<T>, 0);
  }

  TETRIS_DEVICE void compute() {
    const int thread = int(threadIdx.x);
    if (thread < kListed) list(thread, columns_.find(thread));
    if (!kFeatureMajor && !plan_.extents.pointwise) {
      for (int i = thread; i < S::kM; i += kThreads) {
        pixels()[i] = source_pixel(p_.geometry, plan_.extents, pixel_ + i);
      }
    }
    Warp warp([this](int n) { return bias(n); });
    __syncthreads();

    const int slabs = (columns_.total() + X::kSlab - 1) / X::kSlab;
    multiply_slabs(warp, ring_, plan_.stages, slabs, [this](int slab, unsigned char* stage) {
      const unsigned chunk = unsigned(slab) % (2 * kListedSlabs) * kSlabChunks;
      if constexpr (kFeatureMajor) {
        copy_rows(chunk, stage);
      } else {
        copy_pixels(chunk, stage);
      }
      copy_values(chunk, stage + X::kBytes);
      look_ahead(slab);
    });
    warp.template drain<kChunk<T>, kFeatureMajor>(
        ring_,
        [this](int m, int n, float (&run)[kChunk<T>], float* place) { store(m, n, run, place); });
  }

 private:
  using X = typename Warp::A;
  using Values = typename Warp::B;

  TETRIS_DEVICE SourcePixel* pixels() const { return reinterpret_cast<SourcePixel*>(lookup_); }
  TETRIS_DEVICE int* channels() const { return reinterpret_cast<int*>(lookup_); }

  // Of a line of the x tile, the chunk that this thread copies.
  static TETRIS_DEVICE unsigned own_chunk() { return threadIdx.x % X::kLineChunks; }

  TETRIS_DEVICE int channel_of_row(int n) const {
    return kFeatureMajor && p_.row_perm ? p_.row_perm[row_ + n] : row_ + n;
  }
  TETRIS_DEVICE float bias(int n) const {
    if (!p_.bias || n >= rows_) return 0;
    return Numeric<T>::load(static_cast<const T*>(p_.bias)[channel_of_row(n)]);
  }

  // Fills the place of a chunk in the list.
  TETRIS_DEVICE void list(int chunk, typename Columns<T>::Found found) const {
    const ColumnChunk described = columns_.describe(chunk, found);
    list_[chunk % (2 * kListed)] = described;
    if constexpr (kFeatureMajor) {
      for (int i = 0; i < described.columns; ++i) {
        const int column = int(described.source) + i;
        channels()[chunk % (2 * kListed) * kChunk<T> + i] =
            p_.col_perm ? p_.col_perm[column] : column;
      }
    }
  }

  // Fills the half that comes next while the last slabs of this one are copied.
  TETRIS_DEVICE void look_ahead(unsigned slab) {
    if (threadIdx.x >= kListed) return;
    const int chunk = int((slab / kListedSlabs + 1) * kListed + threadIdx.x);
    if (slab % kListedSlabs == kListedSlabs - 2) found_ = columns_.find(chunk);
    if (slab % kListedSlabs == kListedSlabs - 1) list(chunk, found_);
  }

  // A thread copies the same chunk of columns for many pixels.
  TETRIS_DEVICE void copy_pixels(unsigned first_chunk, unsigned char* tile) const {
    constexpr unsigned kStep = kThreads / X::kLineChunks;
    const unsigned line = threadIdx.x / X::kLineChunks, at = own_chunk();
    const unsigned first = X::at(line, at);
    const ColumnChunk chunk = list_[first_chunk + at];
    const int bytes = chunk.columns * int(sizeof(T));
    const T* x = static_cast<const T*>(p_.x) + chunk.source;
    const int64_t distance = plan_.extents.source_pixel;
    if (plan_.extents.pointwise) {
      const int left = plan_.extents.pixels - pixel_ - int(line);
      x += (pixel_ + int(line)) * distance;
#pragma unroll
      for (unsigned i = 0; i < X::kLineCount; i += kStep) {
        ptx::cp_async_16(tile + X::at(first, line, i, at), x + i * distance,
                         int(i) < left ? bytes : 0);
      }
    } else {
#pragma unroll
      for (unsigned i = 0; i < X::kLineCount; i += kStep) {
        const SourcePixel from = pixels()[line + i];
        ptx::cp_async_16(tile + X::at(first, line, i, at), x + from.index * distance,
                         hits(p_.geometry, from, chunk) ? bytes : 0);
      }
    }
  }

  // Feature-major: a thread copies the same chunk of pixels for many columns. A chunk's pixels are
  // of one image.
  TETRIS_DEVICE void copy_rows(unsigned first_chunk, unsigned char* tile) const {
    constexpr unsigned kStep = kThreads / X::kLineChunks;
    const unsigned line = threadIdx.x / X::kLineChunks, at = own_chunk();
    const unsigned first = X::at(line, at);
    const int left = plan_.extents.pixels - pixel_ - int(at) * kChunk<T>;
    const int bytes = max(0, min(left, kChunk<T>)) * int(sizeof(T));
    const T* x = static_cast<const T*>(p_.x) + x_;
#pragma unroll
    for (unsigned i = 0; i < X::kLineCount; i += kStep) {
      const unsigned column = first_chunk * kChunk<T> + line + i;
      const bool exists = int(column % kChunk<T>) < list_[column / kChunk<T>].columns;
      const int64_t channel = exists ? channels()[column] : 0;
      ptx::cp_async_16(tile + X::at(first, line, i, at), x + channel * p_.x_strides.channel,
                       exists ? bytes : 0);
    }
  }

  TETRIS_DEVICE void copy_values(unsigned first_chunk, unsigned char* tile) const {
    constexpr unsigned kStep = kThreads / Values::kLineChunks;
    const unsigned line = threadIdx.x / Values::kLineChunks;
    const unsigned at = threadIdx.x % Values::kLineChunks;
    const unsigned first = Values::at(line, at);
    if (kStep > Values::kLineCount && line >= Values::kLineCount) return;
    const T* values = static_cast<const T*>(p_.values);
#pragma unroll
    for (unsigned i = 0; i < Values::kLineCount; i += kStep) {
      if constexpr (kTransposed) {
        const ColumnChunk& chunk = list_[first_chunk + at];
        const int row = part_row_ + int(line + i);
        ptx::cp_async_16(tile + Values::at(first, line, i, at),
                         values + chunk.values + int64_t(row) * p_.w.width,
                         row < p_.w.height ? chunk.columns * int(sizeof(T)) : 0);
      } else {
        const ColumnChunk& chunk = list_[first_chunk + (line + i) / kChunk<T>];
        const int column = int((line + i) % kChunk<T>);
        const int row = part_row_ + int(at) * kChunk<T>;
        ptx::cp_async_16(tile + Values::at(first, line, i, at),
                         values + chunk.values + int64_t(column) * p_.w.height + row,
                         row < p_.w.height && column < chunk.columns ? kChunkBytes : 0);
      }
    }
  }

  // Of a pixel of the result in a map of as many pixels.
  TETRIS_DEVICE int64_t offset(const Strides& s, int pixel, int channel) const {
    const int map = p_.geometry.result_h * p_.geometry.result_w;
    const int image = p_.geometry.images == 1 ? 0 : pixel / map;
    return element_of(s, image, pixel - image * map, channel);
  }

  // Long activations are applied in a loop, which registers cannot be indexed in, shared memory
  // can: a copy for each value of a run was a quarter of the kernel's code.
  TETRIS_DEVICE void activate_run(float (&run)[kChunk<T>], float* place) const {
    if (p_.activation == Activation::kNone) return;
    if (p_.activation == Activation::kRelu) {
#pragma unroll
      for (int v = 0; v < kChunk<T>; ++v) run[v] = activate(run[v], Activation::kRelu);
      return;
    }
#pragma unroll
    for (int v = 0; v < kChunk<T>; ++v) place[v] = run[v];
#pragma unroll 1
    for (int v = 0; v < kChunk<T>; ++v) place[v] = activate(place[v], p_.activation);
#pragma unroll
    for (int v = 0; v < kChunk<T>; ++v) run[v] = place[v];
  }

  TETRIS_DEVICE void store(int m, int n, float (&run)[kChunk<T>], float* place) const {
    const int pixel = pixel_ + m;
    if (pixel >= plan_.extents.pixels || n >= rows_) return;
    const int count = kFeatureMajor ? plan_.extents.pixels - pixel : rows_ - n;
    const int channel = channel_of_row(n);
    if (p_.residual) {
      const T* residual = static_cast<const T*>(p_.residual);
      add_run<T>(run, residual + offset(p_.residual_strides, pixel, channel), count,
                 plan_.whole_residual);
    }
    activate_run(run, place);
    store_run<T>(static_cast<T*>(p_.y) + offset(p_.y_strides, pixel, channel), run, count,
                 plan_.whole_y);
  }

  const Product& p_;
  const ProductPlan& plan_;
  const int part_row_, pixel_;
  int row_, rows_;  // of the result: the tile's first, and how many from there on are this block's
  const Columns<T> columns_;
  typename Columns<T>::Found found_ = {0, 0};
  int64_t x_ = 0;  // feature-major: where the pixels that this thread copies lie in a channel
  ColumnChunk* const list_;
  unsigned char* const lookup_;
  unsigned char* const ring_;
};

// Work in order: panels of pixel tiles; in a panel all tiles of rows, longest block rows first; for
// each the panel's tiles of pixels. Values are read from memory once a panel, x, a panel of which
// stays in L2, once.
template <class T, Maps kMaps, bool kTransposed, class S>
__global__ void __launch_bounds__(kThreads, 2)
    product_kernel(const __grid_constant__ Product p, const __grid_constant__ ProductPlan plan) {
  const int panel = int(blockIdx.x) / (plan.panel * plan.row_tiles);
  const int item = int(blockIdx.x) - panel * plan.panel * plan.row_tiles;
  const int tiles = min(plan.panel, plan.pixel_tiles - panel * plan.panel);
  const int row_tile = item / tiles;
  const int pixel_tile = panel * plan.panel + item - row_tile * tiles;
  const int place = row_tile / plan.parts;
  const int block_row = p.w.order ? p.w.order[place] : place;
  ProductTile<T, kMaps, kTransposed, S>(p, plan, block_row, (row_tile - place * plan.parts) * S::kN,
                                        pixel_tile * S::kM, dynamic_shared())
      .compute();
}

}  // namespace tetris::cuda::mma
