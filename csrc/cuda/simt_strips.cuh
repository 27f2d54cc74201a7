// The product on ordinary cores, for short block rows: many of them share one tile of x.
//
//   a strip: TM rows of a block row                  tile of x in shared memory
//                                                       32 * TN pixels
//   warp 0  [ K . K . . K ]  8 rows of strips,      [ column group 0 ]
//           [ . K . . K . ]  walked one by one      [              1 ]   the slab: neighbouring
//   warp 1  [ K . . . K . ]                         [              2 ]   column groups of one tap
//           [ . . K . . K ]                         [            ... ]
//            ^^^^^ slab
//
// A block row of one to four rows uses a number of x once to four times: read from L2 that is far
// too seldom (4 bytes a multiply-add at height 1, where an SM gets 25 to 40 bytes a clock for 128
// multiply-adds). So a CTA takes up to 12 warps of 8 rows, and all walk through the same slab of
// columns before the next comes; at a tenth stored, each number fetched serves 10 rows. Lanes are
// pixels, TN neighbours each: what a lane reads of x is one vector, values and indices are the same
// for the whole warp (broadcast), and no lane idles however short the rows are.
//
// Bound, in wavefronts of shared memory for each stored input of a strip (TN = 4, float): 4 for x,
// 1 or 2 for values, 1 for the index, against TM multiply-adds a clock: a sixth of the peak at TM =
// 1, two thirds at TM = 4, all of it at TM = 8.
//
// Each strip waits for the next column that it stores, and the next slab begins at the first that
// any strip of the CTA waits for: columns that none of them stores are not fetched, and any order
// of col_idx is correct (ascending order is fast).
#pragma once

#include <climits>

#include "cuda/simt_tile.cuh"
#include "cuda/vector.cuh"

namespace tetris::cuda {

// Of a CTA, at most; two CTAs an SM leave 80 registers a thread: one of them fetches while the
// other multiplies.
constexpr int kStripWarps = 12;

struct StripExtent {
  int32_t end;  // of its block row's stored blocks
  int32_t row;  // its first row within the block row
};
struct StripPlace {
  int32_t next;       // the first stored block to come
  int32_t waits_for;  // the column group of that; INT_MAX: none
};

// Strips of a warp: more would spill, fewer would fetch x more often.
constexpr int strips_of_warp(int rows, size_t size) {
  return rows == 1 ? 4 : rows * size < 32 ? 2 : 1;
}

// TN pixels a lane: 4, or 1 where there are few pixels (2 of double: 16 bytes, too).
template <class T, int TM, int TN>
struct Strips {
  using A = typename Numeric<T>::Accumulator;
  static constexpr int kStrips = strips_of_warp(TM, sizeof(A));
  static constexpr int kRows = TM * kStrips;
  static constexpr int kUnroll = TM * sizeof(A) >= 32 ? 2 : 4;  // more would spill
  static constexpr int kPixels = 32 * TN;
  static constexpr int kPitch = kPixels + 4;

  // `slab`: columns of x in the tile. The tile holds the results afterwards.
  static TETRIS_HOST_DEVICE int tile_rows(int warps, int slab) {
    return slab > warps * kRows ? slab : warps * kRows;
  }
  static TETRIS_HOST_DEVICE size_t shared_bytes(int warps, int slab) {
    return sizeof(A) * tile_rows(warps, slab) * kPitch + sizeof(Pixel) * kPixels +
           (sizeof(StripExtent) + sizeof(StripPlace)) * warps * kStrips +
           sizeof(int32_t) * warps * (kRows + 1);
  }
};

// What a tile of x holds: neighbouring packed columns, seen through one tap.
struct SlabSource {
  const Product& p;
  const Pixel* table;
  int ky, kx, column;
  TETRIS_DEVICE int64_t at(int pixel) const {
    return source_element(p.geometry, p.x_strides, table[pixel], ky, kx);
  }
  TETRIS_DEVICE int64_t element(int64_t* at, int slot) const {
    const int channel = p.col_perm ? __ldg(p.col_perm + column + slot) : column + slot;
    return *at < 0 ? -1 : *at + channel * p.x_strides.channel;
  }
};

template <class A, int TM, int TN>
TETRIS_DEVICE void outer_product(const A (&v)[TM], const A (&x)[TN], A (&acc)[TM][TN]) {
#pragma unroll
  for (int r = 0; r < TM; ++r)
#pragma unroll
    for (int n = 0; n < TN; ++n) acc[r][n] = multiply_add(v[r], x[n], acc[r][n]);
}

// Blocks one input wide: several at a time, so that their loads overlap.
template <class T, int TM, int TN, class A>
TETRIS_DEVICE void walk_columns(const Product& p, const T* values, int* next, int end, int first,
                                int columns, int* waits_for, const A* x, A (&acc)[TM][TN]) {
  constexpr int kUnroll = Strips<T, TM, TN>::kUnroll;
  for (int b = *next; b < end; b += kUnroll) {
    int col[kUnroll];
    A v[kUnroll][TM];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      col[u] = b + u < end ? __ldg(p.w.col_idx + b + u) : INT_MAX;
      const int at = min(b + u, end - 1);
      load_global(values + int64_t(p.w.block ? __ldg(p.w.block + at) : at) * p.w.height, v[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const unsigned slot = unsigned(col[u]) - unsigned(first);
      if (slot >= unsigned(columns)) {
        *next = b + u;
        *waits_for = col[u];
        return;
      }
      A xv[TN];
      load_shared(x + slot * Strips<T, TM, TN>::kPitch, xv);
      outer_product(v[u], xv, acc);
    }
  }
  *next = end;
}

// The slab's part of a strip: acc += values x, up to the first block outside the slab.
template <class T, int TM, int TN, class A>
TETRIS_DEVICE void walk_strip(const Product& p, const StripExtent& strip, StripPlace* place,
                              int first, int groups, int columns, const A* x, A (&acc)[TM][TN]) {
  constexpr int kPitch = Strips<T, TM, TN>::kPitch;
  const int width = p.w.width, end = strip.end;
  // From one row of a block to the next, and from one column to the next.
  const int row_step = p.w.transposed ? width : 1, step = p.w.transposed ? 1 : p.w.height;
  const T* const values = static_cast<const T*>(p.values) + strip.row * row_step;
  int next = place->next, waits_for = INT_MAX;
  if (width == 1) {
    walk_columns<T>(p, values, &next, end, first, columns, &waits_for, x, acc);
  } else {
    for (; next < end; ++next) {
      const int col = __ldg(p.w.col_idx + next);
      const unsigned group = unsigned(col) - unsigned(first);
      if (group >= unsigned(groups)) {
        waits_for = col;
        break;
      }
      const int block = p.w.block ? __ldg(p.w.block + next) : next;
      const T* v = values + int64_t(block) * (p.w.height * width);
      const A* xs = x + group * width * kPitch;
      const int inputs = min(width, columns - int(group) * width);
      if (TM == 1 || !p.w.transposed) {
#pragma unroll(Strips<T, TM, TN>::kUnroll)
        for (int k = 0; k < inputs; ++k) {
          A xv[TN], vv[TM];
          load_global(v + k * step, vv);
          load_shared(xs + k * kPitch, xv);
          outer_product(vv, xv, acc);
        }
      } else {
#pragma unroll 1
        for (int k = 0; k < inputs; ++k) {
          A xv[TN], vv[TM];
#pragma unroll
          for (int r = 0; r < TM; ++r) {
            A one[1];
            load_global(v + r * width + k, one);
            vv[r] = one[0];
          }
          load_shared(xs + k * kPitch, xv);
          outer_product(vv, xv, acc);
        }
      }
    }
  }
  *place = {next, waits_for};
}

struct StripsPlan {
  Extents extents;
  int slab;          // columns of x in the tile
  int per_row;       // strips of a block row
  unsigned chunks;   // of warps * kWarpRows rows, all groups
  int group_chunks;  // of one group
};

// One CTA: a chunk of rows and 32 * TN pixels. Chunks are the inner part of the grid: CTAs that run
// together share pixels, and all values fit in L2 sooner than all of x.
template <class T, int TM, int TN>
__global__ void __launch_bounds__(32 * kStripWarps, 2)
    simt_product_strips(const Product p, const StripsPlan plan) {
  using S = Strips<T, TM, TN>;
  using A = typename S::A;
  const Extents& e = plan.extents;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;

  A* const tile = reinterpret_cast<A*>(dynamic_shared());
  StripExtent* const strips =
      reinterpret_cast<StripExtent*>(tile + S::tile_rows(warps, plan.slab) * S::kPitch);
  StripPlace* const places = reinterpret_cast<StripPlace*>(strips + warps * S::kStrips);
  Pixel* const table = reinterpret_cast<Pixel*>(places + warps * S::kStrips);
  int32_t* const channels = reinterpret_cast<int32_t*>(table + S::kPixels);
  int32_t* const waiting = channels + warps * S::kRows;  // [warps] the first column waited for

  const int chunk = int(blockIdx.x % plan.chunks), group = chunk / plan.group_chunks;
  const int first_strip = chunk % plan.group_chunks * (warps * S::kStrips);
  for (int i = threadIdx.x; i < S::kPixels; i += blockDim.x)
    table[i] = pixel_at(p.geometry, blockIdx.x / plan.chunks * S::kPixels + i, e.pixels);
  for (int i = threadIdx.x; i < warps * S::kStrips; i += blockDim.x) {
    const int row = (first_strip + i) / plan.per_row;
    StripExtent s = {0, (first_strip + i) % plan.per_row * TM};
    StripPlace place = {0, INT_MAX};
    if (row < e.block_rows) {
      place.next = p.w.row_ptr[group * e.block_rows + row];
      s.end = p.w.row_ptr[group * e.block_rows + row + 1];
      if (place.next < s.end) place.waits_for = p.w.col_idx[place.next];
    }
    strips[i] = s;
    places[i] = place;
    for (int r = 0; r < TM; ++r)
      channels[i * TM + r] =
          row < e.block_rows ? channel_of_row(p, e, group, row * p.w.height + s.row + r) : -1;
  }

  A acc[S::kStrips][TM][TN] = {};
  __syncthreads();
  for (;;) {
    if (lane == 0) {
      int first = INT_MAX;
      for (int i = 0; i < S::kStrips; ++i)
        first = min(first, int(places[warp * S::kStrips + i].waits_for));
      waiting[warp] = first;
    }
    __syncthreads();
    int first = waiting[0];
    for (int i = 1; i < warps; ++i) first = min(first, int(waiting[i]));
    if (first == INT_MAX) break;

    const int tap = first / e.col_groups, col_group = first - tap * e.col_groups;
    const int groups = min(plan.slab / p.w.width, e.col_groups - col_group);
    const int columns = min(groups * p.w.width, e.group_cols - col_group * p.w.width);
    const SlabSource source{p, table, tap / p.geometry.kernel_w, tap % p.geometry.kernel_w,
                            group * e.group_cols + col_group * p.w.width};
    const T* const x = static_cast<const T*>(p.x);
    if (!p.col_perm && columns % (16 / sizeof(T)) == 0 &&
        aligned_runs<T>(p.x, p.x_strides, source.column))
      gather_tile_runs(tile, S::kPitch, columns, S::kPixels, x, source);
    else
      gather_tile(tile, S::kPitch, columns, S::kPixels, NumbersOf<T>{x},
                  channels_inside(p.x_strides), source);
    __syncthreads();

    // Places are the same for all lanes, which keep copies while they walk.
    StripPlace mine[S::kStrips];
#pragma unroll
    for (int i = 0; i < S::kStrips; ++i) mine[i] = places[warp * S::kStrips + i];
#pragma unroll
    for (int i = 0; i < S::kStrips; ++i)
      if (mine[i].waits_for - first < groups)
        walk_strip<T, TM, TN>(p, strips[warp * S::kStrips + i], &mine[i], first, groups, columns,
                              tile + lane * TN, acc[i]);
    __syncwarp();  // all lanes have read them
    if (lane == 0)
#pragma unroll
      for (int i = 0; i < S::kStrips; ++i) places[warp * S::kStrips + i] = mine[i];
  }

#pragma unroll
  for (int i = 0; i < S::kStrips; ++i)
#pragma unroll
    for (int r = 0; r < TM; ++r)
#pragma unroll
      for (int n = 0; n < TN; ++n)
        tile[((warp * S::kStrips + i) * TM + r) * S::kPitch + lane * TN + n] = acc[i][r][n];
  __syncthreads();
  store_tile<T>(tile, S::kPitch, warps * S::kRows, S::kPixels, channels, table, p);
}

}  // namespace tetris::cuda
