// The float32 product on ordinary cores, for tall block rows: a dense tile of y whose columns are
// the stored inputs of one block row, whatever their columns and taps.
//
//   rows of one block row     stored inputs, 8 a slab         pixels
//     [ y tile ]  +=  [ values: as they lie ]  x  [ x: gathered, zero where a tap sees padding ]
//
// 128 threads, 8 x 8 sums each; a warp's lanes are 4 along rows and 8 along pixels, so that a step
// of one input reads 4 vectors of shared memory for 64 multiply-adds, none with bank conflicts.
// Block rows of up to 32 rows get tiles of 32 x 256 (each number of x that comes from L2 serves 32
// rows: 16 bytes a clock of the 25 to 40 that an SM gets), taller ones tiles of 64 x 128.
//
// Slab s + 1 is on its way to registers, and the addresses of slab s + 2 are being worked out,
// while slab s is multiplied. A slab holds inputs of one tap only: then where pixels lie in the
// source is one table, remade when the tap changes.
#pragma once

#include "cuda/simt_tile.cuh"
#include "cuda/vector.cuh"

namespace tetris::cuda {

template <int kWarpsAlongRows>  // of 4 warps, each 32 rows x 64 pixels
struct Tall {
  static constexpr int kThreads = 128, kSlab = 8;
  static constexpr int kRows = 32 * kWarpsAlongRows, kPixels = 64 * (4 / kWarpsAlongRows);
  static constexpr int kPitch = kPixels + 4, kValuesPitch = kRows + 4;
  static constexpr int kStage = kSlab * (kPitch + kValuesPitch);

  struct Slot {
    int64_t channel;  // offset of the input's channel in x; -1: nothing here
    int64_t values;   // offset of its column of values, at the tile's first row
  };
  struct Slab {
    Slot slots[kSlab];
    int tap, used;
  };
  static constexpr size_t kSums =
      sizeof(float) * (2 * kStage > kRows * kPitch ? 2 * kStage : kRows * kPitch);
  static constexpr size_t kSharedBytes = kSums + 2 * sizeof(Slab) +
                                         (sizeof(Pixel) + sizeof(int64_t)) * kPixels +
                                         sizeof(int32_t) * kRows;
};

struct TallPlan {
  Extents extents;
  int parts;       // tiles along a block row's height
  unsigned tiles;  // along pixels
  bool vector;     // values can be read 16 bytes at a time
};

// Where the stored inputs from `item` on lie, up to 8 of one tap. By one whole warp.
template <class Tile>
TETRIS_DEVICE void find_slab(const Product& p, const Extents& e, int group, int first_row,
                             int begin, int items, int item, typename Tile::Slab* slab) {
  const int lane = threadIdx.x % 32, width = p.w.width;
  const bool there = lane < Tile::kSlab && item + lane < items;
  const int b = begin + (there ? (item + lane) / width : 0), k = (item + lane) % width;
  const int col = item < items ? __ldg(p.w.col_idx + b) : 0;
  const int tap = col / e.col_groups, column = (col - tap * e.col_groups) * width + k;
  const int first_tap = __shfl_sync(0xffffffff, tap, 0);
  int used = there && tap == first_tap ? Tile::kSlab : lane;  // the first lane that does not fit
  for (int step = 16; step > 0; step /= 2)
    used = min(used, __shfl_xor_sync(0xffffffff, used, step));
  if (lane < Tile::kSlab) {
    typename Tile::Slot slot = {-1, -1};
    if (lane < used && column < e.group_cols) {
      const int packed = group * e.group_cols + column;
      slot.channel = (p.col_perm ? __ldg(p.col_perm + packed) : packed) * p.x_strides.channel;
      const int block = p.w.block ? __ldg(p.w.block + b) : b;
      slot.values = int64_t(block) * (p.w.height * width) +
                    (p.w.transposed ? first_row * width + k : k * p.w.height + first_row);
    }
    slab->slots[lane] = slot;
  }
  if (lane == 0) {
    slab->tap = first_tap;
    slab->used = used;
  }
}

// Three CTAs an SM: two where rows take two warps, whose registers ptxas would spill for sm_90.
template <int kWarpsAlongRows>
__global__ void __launch_bounds__(128, kWarpsAlongRows == 2 ? 2 : 3)
    simt_product_tall(const Product p, const TallPlan plan) {
  using Tile = Tall<kWarpsAlongRows>;
  constexpr int kSlab = Tile::kSlab, kPitch = Tile::kPitch, kValuesPitch = Tile::kValuesPitch;
  constexpr int kLoads = kSlab * Tile::kPixels / Tile::kThreads;  // of x, each thread
  constexpr int kValueLoads = kSlab * Tile::kRows / Tile::kThreads;
  const Extents& e = plan.extents;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

  float* const stages = reinterpret_cast<float*>(dynamic_shared());
  typename Tile::Slab* const slabs =
      reinterpret_cast<typename Tile::Slab*>(dynamic_shared() + Tile::kSums);
  int64_t* const source = reinterpret_cast<int64_t*>(slabs + 2);  // of a pixel, through the tap
  Pixel* const table = reinterpret_cast<Pixel*>(source + Tile::kPixels);
  int32_t* const channels = reinterpret_cast<int32_t*>(table + Tile::kPixels);

  // Longest block rows first, all pixels of each before the next.
  const unsigned unit = blockIdx.x / plan.tiles;
  const int order = unit / plan.parts, first_row = unit % plan.parts * Tile::kRows;
  const int row = p.w.order ? __ldg(p.w.order + order) : order;
  const int group = row / e.block_rows;
  const int begin = __ldg(p.w.row_ptr + row);
  const int items = (__ldg(p.w.row_ptr + row + 1) - begin) * p.w.width;  // stored inputs

#pragma unroll 1
  for (int i = thread; i < Tile::kPixels; i += Tile::kThreads)
    table[i] = pixel_at(p.geometry, blockIdx.x % plan.tiles * Tile::kPixels + i, e.pixels);
#pragma unroll 1
  for (int i = thread; i < Tile::kRows; i += Tile::kThreads)
    channels[i] =
        first_row + i < p.w.height
            ? channel_of_row(p, e, group, (row - group * e.block_rows) * p.w.height + first_row + i)
            : -1;

  // Who loads what. x: 8 slots x 4 pixels a warp, or 32 pixels; see gather.cuh.
  const bool inside = channels_inside(p.x_strides);
  const int x_slot = inside ? thread % 8 : 0, x_pixel = inside ? thread / 8 : thread;
  const float* const x = static_cast<const float*>(p.x);
  const float* const values = static_cast<const float*>(p.values);
  const int row_step = p.w.transposed ? p.w.width : 1;
  // Values: a vector of rows, or single ones of slot thread % 8, 16 rows apart.
  const int v_slot = plan.vector ? thread / (Tile::kRows / kValueLoads) : thread % 8;
  const int v_row = plan.vector ? thread % (Tile::kRows / kValueLoads) * kValueLoads : thread / 8;

  float acc[8][8] = {}, next_x[kLoads], next_v[kValueLoads];
  int tap = -1;  // that source is of

  // Loads a slab into registers.
  auto load = [&](const typename Tile::Slab& slab) {
    if (slab.tap != tap) {
      tap = slab.tap;
#pragma unroll 1
      for (int i = thread; i < Tile::kPixels; i += Tile::kThreads)
        source[i] = source_element(p.geometry, p.x_strides, table[i], tap / p.geometry.kernel_w,
                                   tap % p.geometry.kernel_w);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t channel = slab.slots[inside ? x_slot : i % kSlab].channel;
      const int64_t at = source[inside ? x_pixel + 16 * i : x_pixel + Tile::kThreads * (i / kSlab)];
      next_x[i] = 0;
      if ((channel | at) >= 0) next_x[i] = __ldg(x + (at + channel));
    }
    const int64_t at = slab.slots[v_slot].values;
    if (plan.vector) {
#pragma unroll
      for (int i = 0; i < kValueLoads; ++i) next_v[i] = 0;
      if (at >= 0 && first_row + v_row < p.w.height) load_global(values + at + v_row, next_v);
    } else {
#pragma unroll
      for (int i = 0; i < kValueLoads; ++i) {
        const int r = v_row + 16 * i;
        next_v[i] = at >= 0 && first_row + r < p.w.height ? values[at + r * row_step] : 0.0f;
      }
    }
  };
  auto stage = [&](float* x_tile) {
    float* const v_tile = x_tile + kSlab * kPitch;
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      x_tile[(inside ? x_slot : i % kSlab) * kPitch +
             (inside ? x_pixel + 16 * i : x_pixel + Tile::kThreads * (i / kSlab))] = next_x[i];
#pragma unroll
    for (int i = 0; i < kValueLoads; ++i)
      v_tile[v_slot * kValuesPitch + v_row + (plan.vector ? i : 16 * i)] = next_v[i];
  };

  const int a_row = warp % kWarpsAlongRows * 32 + lane / 8 * 4;
  const int b_pixel = warp / kWarpsAlongRows * 64 + lane % 8 * 4;
  const auto multiply = [&](const float* x_tile) {
    const float* const v_tile = x_tile + kSlab * kPitch;
#pragma unroll
    for (int k = 0; k < kSlab; ++k) {
      float a[8], b[8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float run[4];
        load_shared(v_tile + k * kValuesPitch + a_row + 16 * half, run);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[4 * half + i] = run[i];
        load_shared(x_tile + k * kPitch + b_pixel + 32 * half, run);
#pragma unroll
        for (int i = 0; i < 4; ++i) b[4 * half + i] = run[i];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[i][j] = multiply_add(a[i], b[j], acc[i][j]);
    }
  };

  if (warp == 0) find_slab<Tile>(p, e, group, first_row, begin, items, 0, &slabs[0]);
  __syncthreads();
  // Round s multiplies slab s - 1, loads slab s and finds slab s + 1.
  int staged = 0, next = slabs[0].used, found = next;
  for (int s = 0;; ++s) {
    if (next > 0) load(slabs[s % 2]);
    if (warp == 0)
      find_slab<Tile>(p, e, group, first_row, begin, items, found, &slabs[(s + 1) % 2]);
    if (staged > 0) multiply(stages + (s + 1) % 2 * Tile::kStage);
    if (next == 0) break;
    stage(stages + s % 2 * Tile::kStage);
    __syncthreads();
    staged = next;
    next = slabs[(s + 1) % 2].used;
    found += next;
  }
  __syncthreads();

#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j)
      stages[(a_row + i / 4 * 16 + i % 4) * kPitch + b_pixel + j / 4 * 32 + j % 4] = acc[i][j];
  __syncthreads();
  store_tile<float>(stages, kPitch, Tile::kRows, Tile::kPixels, channels, table, p);
}

}  // namespace tetris::cuda
