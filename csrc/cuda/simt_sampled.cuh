// The sampled product on ordinary cores: dvalues, the product of dy and x on stored blocks only.
//
//            x: up to `slots` inputs                 A CTA holds all of its sums in registers and
//            runs
//            +----------------------+                over the pixels, 32 at a time; dy and x of
//            these
//   dy: up   | . K . . K . . . K .  |                pixels are in shared memory, pixels inside.
//   to 128   | . . K . . . K . . .  |
//   rows     | K . . . . K . . K .  |                An item is TM rows x TK inputs of one stored
//            +----------------------+                block: the sums of one thread, 32 / (TM TK)
//            each.
//
// Two ways to choose rows and inputs:
//
//   region  128 rows (of several block rows) by 64 neighbouring columns of one tap, and whatever
//           is stored there. For short blocks, since many block rows share each number of x.
//   row     the rows of one block row by as many of its stored inputs as there are sums, whatever
//           their columns and taps. For tall blocks: every number that is fetched is used with
//           every other, 1 / rows + 1 / inputs loads a multiply-add.
//
// Items of a warp are neighbours along a block row, so that dy is a broadcast; the TK inputs of an
// item lie apart by the number of pieces of a block (of a row's slots), so that lanes read
// neighbouring rows of the tile of x, which the pitch puts into different banks.
#pragma once

#include "cuda/simt_tile.cuh"
#include "cuda/vector.cuh"

namespace tetris::cuda {

struct SampledPlan {
  Extents extents;
  bool by_row;
  int rows, slots;    // of the tiles: multiples of height and, for regions, of width
  int block_rows;     // of a CTA; by row: 1
  int row_chunks;     // of a group
  int column_chunks;  // of a tap; by row: CTAs that share a block row's stored inputs
  unsigned splits, pixels_per_split;  // a multiple of 32
  int most_items;                     // of a CTA
};

template <class A, int TM, int TK>
struct Sampled {
  static constexpr int kThreads = 256, kMaxRows = 128, kPixels = 32, kPitch = kPixels + 4;
  static constexpr int kSums = 128 / sizeof(A);  // of a thread: 32, or 16 of double
  static constexpr int kItems = kSums / (TM * TK);
  static constexpr int kCapacity = kThreads * kSums;           // sums of a CTA
  static constexpr int kRegionColumns = kCapacity / kMaxRows;  // 64, or 32 of double
  static constexpr int kMaxSlots = 256;                        // inputs of a block row

  struct Slot {  // a row of a tile
    static constexpr int kResult = -1, kNone = -2;
    int64_t channel;  // offset in x (dy); -1: outside the matrix
    int32_t ky_kx;    // of its tap, 16 bits each; kResult: it is one of dy
    int32_t block;    // by row: the stored block
  };
  // Both tiles, later the sums of all items. Slots follow, which want 8 bytes of alignment.
  static TETRIS_HOST_DEVICE int tile_numbers(const SampledPlan& plan) {
    const int tiles = (plan.rows + plan.slots) * kPitch, sums = plan.most_items * TM * TK;
    const int numbers = tiles > sums ? tiles : sums;
    return (numbers + 1) / 2 * 2;
  }
  struct Row {              // what a block row stores in the region
    int32_t begin, before;  // its first stored block; blocks of the region's earlier rows
  };
};

template <class A, int TM, int TK>
TETRIS_HOST_DEVICE size_t sampled_shared_bytes(const SampledPlan& plan) {
  using S = Sampled<A, TM, TK>;
  return sizeof(A) * S::tile_numbers(plan) + sizeof(typename S::Slot) * (plan.rows + plan.slots) +
         sizeof(typename S::Row) * (plan.block_rows + 1) + sizeof(Pixel) * S::kPixels +
         sizeof(uint16_t) * plan.most_items;
}

// The first of [begin, end) whose column is not before `column`.
TETRIS_DEVICE int lower_bound(const int32_t* col_idx, int begin, int end, int column) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (__ldg(col_idx + middle) < column)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// double, or a type that is known when the kernel runs: one kernel for three, since only loads and
// stores differ.
template <class A>
struct SampledNumbers : AnyNumbers {};
template <>
struct SampledNumbers<double> {
  const void* x;
  DType dtype;
  TETRIS_DEVICE double load(int64_t element) const {
    return static_cast<const double*>(x)[element];
  }
};

// What a tile holds, for gather_tile: channels of dy, or of x each through its own tap.
template <class Slot>
struct SampledSource {
  struct At {
    Pixel pixel;
    int ky_kx;  // that `element` is of
    int64_t element;
  };
  const Geometry& geometry;
  int64_t image_stride, pixel_stride;
  const Pixel* pixels;
  const Slot* slots;
  TETRIS_DEVICE At at(int pixel) const { return {pixels[pixel], Slot::kNone, -1}; }
  TETRIS_DEVICE int64_t element(At* at, int slot) const {
    const Slot& s = slots[slot];
    if (s.ky_kx != at->ky_kx) {
      const Strides strides = {image_stride, pixel_stride, 1};
      at->ky_kx = s.ky_kx;
      if (at->pixel.image < 0)
        at->element = -1;
      else if (s.ky_kx == Slot::kResult)
        at->element = result_element(geometry, strides, at->pixel);
      else
        at->element = source_element(geometry, strides, at->pixel, s.ky_kx >> 16, s.ky_kx & 0xffff);
    }
    return (at->element | s.channel) < 0 ? -1 : at->element + s.channel;
  }
};

// One number of dvalues, or its part of the sum.
template <class A>
TETRIS_DEVICE void store_sum(const SampledProduct& p, int64_t at, A sum) {
  if constexpr (sizeof(A) == 8) {
    static_cast<double*>(p.dvalues)[at] = sum;
  } else {
    if (p.partial)
      atomicAdd(p.partial + at, sum);
    else if (p.dtype == DType::kFloat32)
      static_cast<float*>(p.dvalues)[at] = sum;
    else if (p.dtype == DType::kFloat16)
      static_cast<Half*>(p.dvalues)[at] = Numeric<Half>::store(sum);
    else
      static_cast<BFloat16*>(p.dvalues)[at] = Numeric<BFloat16>::store(sum);
  }
}

template <class A, int TM, int TK>
__global__ void __launch_bounds__(256, 2)
    simt_sampled_items(const SampledProduct p, const SampledPlan plan) {
  using S = Sampled<A, TM, TK>;
  using Slot = typename S::Slot;
  using Row = typename S::Row;
  constexpr int kPitch = S::kPitch, kVector = 16 / sizeof(A);
  const Extents& e = plan.extents;
  const int thread = threadIdx.x, height = p.w.height, width = p.w.width;

  A* const dy_tile = reinterpret_cast<A*>(dynamic_shared());
  A* const x_tile = dy_tile + plan.rows * kPitch;
  Slot* const dy_slots = reinterpret_cast<Slot*>(dy_tile + S::tile_numbers(plan));
  Slot* const slots = dy_slots + plan.rows;
  Row* const rows = reinterpret_cast<Row*>(slots + plan.slots);
  Pixel* const pixels = reinterpret_cast<Pixel*>(rows + plan.block_rows + 1);
  uint16_t* const items = reinterpret_cast<uint16_t*>(pixels + S::kPixels);

  // Which pixels, block rows, and columns or stored inputs.
  unsigned unit = blockIdx.x;
  const unsigned first_pixel = unit % plan.splits * plan.pixels_per_split;
  const unsigned end_pixel = min(first_pixel + plan.pixels_per_split, e.pixels);
  unit /= plan.splits;
  const int column_chunk = unit % plan.column_chunks;
  unit /= plan.column_chunks;
  const int taps = plan.by_row ? 1 : p.w.taps, tap = unit % taps;
  unit /= taps;
  const int in_order =
      int(unit / plan.row_chunks) * e.block_rows + int(unit % plan.row_chunks) * plan.block_rows;
  const int first_row = plan.by_row && p.w.order ? __ldg(p.w.order + in_order) : in_order;
  const int group = first_row / e.block_rows, row_in_group = first_row - group * e.block_rows;
  const int block_rows = min(plan.block_rows, e.block_rows - row_in_group);
  const int strips = height / TM;

  const auto channel_of_column = [&](int column) -> int64_t {
    if (column >= e.group_cols) return -1;
    const int packed = group * e.group_cols + column;
    return (p.col_perm ? __ldg(p.col_perm + packed) : packed) * p.x_strides.channel;
  };
  const auto find_pixels = [&](unsigned first) {
    if (thread < S::kPixels) pixels[thread] = pixel_at(p.geometry, first + thread, end_pixel);
  };

#pragma unroll 1
  for (int i = thread; i < plan.rows; i += S::kThreads) {
    const int row = row_in_group * height + i, packed = group * e.group_rows + row;
    const int64_t channel =
        row < e.group_rows
            ? (p.row_perm ? __ldg(p.row_perm + packed) : packed) * p.dy_strides.channel
            : -1;
    dy_slots[i] = {channel, Slot::kResult, 0};
  }

  // Of a block row: chunk after chunk of its stored inputs. A region is one chunk.
  for (int chunk = column_chunk;; chunk += plan.column_chunks) {
    const int row_begin = __ldg(p.w.row_ptr + first_row);  // by row
    const int first_input = chunk * plan.slots;
    const int first_col = column_chunk * (plan.slots / width);  // region: a column group
    int inputs = plan.slots, stored = 0, count;
    if (plan.by_row) {
      inputs = min(inputs, (__ldg(p.w.row_ptr + first_row + 1) - row_begin) * width - first_input);
      if (inputs <= 0) return;
#pragma unroll 1
      for (int i = thread; i < plan.slots; i += S::kThreads) {
        Slot slot = {-1, 0, row_begin};
        if (i < inputs) {
          slot.block += (first_input + i) / width;
          const int col = __ldg(p.w.col_idx + slot.block), of = col / e.col_groups;
          slot.ky_kx = of / p.geometry.kernel_w << 16 | of % p.geometry.kernel_w;
          slot.channel =
              channel_of_column((col - of * e.col_groups) * width + (first_input + i) % width);
        }
        slots[i] = slot;
      }
      stored = inputs;
      inputs = (inputs + TK - 1) / TK * TK;
      count = strips * (inputs / TK);
    } else {
      const int ky_kx = tap / p.geometry.kernel_w << 16 | tap % p.geometry.kernel_w;
#pragma unroll 1
      for (int i = thread; i < plan.slots; i += S::kThreads) {
        Slot slot = {channel_of_column(first_col * width + i), 0, 0};
        slot.ky_kx = ky_kx;
        slots[i] = slot;
      }
      const int begin = tap * e.col_groups + first_col;
      const int end = tap * e.col_groups + min(first_col + plan.slots / width, e.col_groups);
      for (int i = thread; i < block_rows; i += S::kThreads) {
        const int row_end = __ldg(p.w.row_ptr + first_row + i + 1);
        const int b = lower_bound(p.w.col_idx, __ldg(p.w.row_ptr + first_row + i), row_end, begin);
        rows[i].begin = b;
        rows[i + 1].before = lower_bound(p.w.col_idx, b, row_end, end) - b;
      }
      if (thread == 0) rows[0].before = 0;
      __syncthreads();
      if (thread == 0)
        for (int i = 0; i < block_rows; ++i) rows[i + 1].before += rows[i].before;
      __syncthreads();
      count = rows[block_rows].before * strips * (width / TK);
      if (count == 0) return;
    }
    // An item's inputs are `step` slots apart.
    const int step = (plan.by_row ? inputs : width) / TK;

    struct Item {
      int row, slot;     // of the tiles
      int strip, block;  // row within the block row; region: the stored block
    };
    // Items run along slots first, then over strips, then over block rows.
    const auto item_at = [&](int i) -> Item {
      if (plan.by_row) {
        const int strip = i / step;
        return {strip * TM, i - strip * step, strip * TM, 0};
      }
      const int per_block = strips * step;
      int low = 0, high = block_rows - 1;  // the last row whose items begin at or before i
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (rows[middle].before * per_block <= i)
          low = middle;
        else
          high = middle - 1;
      }
      const int along = (rows[low + 1].before - rows[low].before) * step;
      const int rest = i - rows[low].before * per_block, strip = rest / along;
      const int at = rest - strip * along, block = rows[low].begin + at / step;
      const int col = __ldg(p.w.col_idx + block) - tap * e.col_groups - first_col;
      return {low * height + strip * TM, col * width + at % step, strip * TM, block};
    };
#pragma unroll 1
    for (int i = thread; i < count; i += S::kThreads) {
      const Item item = item_at(i);
      items[i] = static_cast<uint16_t>(item.row << 8 | item.slot);
    }

    A acc[S::kItems][TM][TK] = {};
    find_pixels(first_pixel);
#pragma unroll 1
    for (unsigned pixel = first_pixel; pixel < end_pixel; pixel += S::kPixels) {
      __syncthreads();  // the tables are filled, the tiles no longer read
#pragma unroll 1
      for (int tile = 0; tile < 2; ++tile) {
        const bool is_x = tile == 1;
        const SampledSource<Slot> source{p.geometry, is_x ? p.x_strides.image : p.dy_strides.image,
                                         is_x ? p.x_strides.pixel : p.dy_strides.pixel, pixels,
                                         is_x ? slots : dy_slots};
        gather_tile<4>(is_x ? x_tile : dy_tile, kPitch, is_x ? inputs : plan.rows, S::kPixels,
                       SampledNumbers<A>{is_x ? p.x : p.dy, p.dtype},
                       channels_inside(is_x ? p.x_strides : p.dy_strides), source);
      }
      __syncthreads();
      find_pixels(pixel + S::kPixels);

#pragma unroll
      for (int i = 0; i < S::kItems; ++i) {
        if (i * S::kThreads >= count) break;
        const int item = items[min(i * S::kThreads + thread, count - 1)];
        const A* const dy = dy_tile + (item >> 8) * kPitch;
        const A* const x = x_tile + (item & 255) * kPitch;
#pragma unroll 1
        for (int q = 0; q < S::kPixels; q += kVector) {
          A xv[TK][kVector];
#pragma unroll
          for (int k = 0; k < TK; ++k) load_shared(x + k * step * kPitch + q, xv[k]);
#pragma unroll
          for (int r = 0; r < TM; ++r) {
            A dyv[kVector];
            load_shared(dy + r * kPitch + q, dyv);
#pragma unroll
            for (int k = 0; k < TK; ++k)
#pragma unroll
              for (int v = 0; v < kVector; ++v)
                acc[i][r][k] = multiply_add(dyv[v], xv[k][v], acc[i][r][k]);
          }
        }
      }
    }
    __syncthreads();  // also where there are no pixels: the tables are filled

    // Through shared memory, so that finding items again is one loop and not one for each item.
    A* const sums = dy_tile;
#pragma unroll
    for (int i = 0; i < S::kItems; ++i)
#pragma unroll
      for (int j = 0; j < TM * TK; ++j)
        if (i * S::kThreads + thread < count)
          sums[j * count + i * S::kThreads + thread] = acc[i][j % TM][j / TM];
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < count * TK; i += S::kThreads) {
      const int k = i / count, number = i - k * count;
      const Item item = item_at(number);
      const int slot = item.slot + k * step;
      if (plan.by_row && slot >= stored) continue;  // rounded up to TK
      const int b = plan.by_row ? slots[slot].block : item.block;
      const int input = (plan.by_row ? first_input + slot : slot) % width;
      const int64_t at = int64_t(p.w.block ? __ldg(p.w.block + b) : b) * (height * width) +
                         input * height + item.strip;
#pragma unroll 1
      for (int r = 0; r < TM; ++r) {
        // Entries outside the matrix are zero, whatever infinite numbers would make of them.
        const bool inside = slots[slot].channel >= 0 && dy_slots[item.row + r].channel >= 0;
        store_sum(p, at + r, inside ? sums[(k * TM + r) * count + number] : A(0));
      }
    }
    if (!plan.by_row) return;
    __syncthreads();
  }
}

}  // namespace tetris::cuda
