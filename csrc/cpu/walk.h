// How a product walks block rows and tokens: what matrix products and convolutions share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/view.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace tetris::cpu {

// What one chunk of block rows reads, re-read by each tile of a block's height and, where threads
// split the rows, by each panel: fits L1 and some of L2.
constexpr int64_t kChunkBytes = 64 << 10;
// How far ahead of its use the stream of values is fetched: time enough for memory to answer,
// little enough for L1 to hold.
constexpr int64_t kAheadInputs = 128, kAheadValues = 512, kAheadBytes = 16 << 10;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Block rows [result[i], result[i + 1]) hold about the same number of stored blocks for every i.
inline std::vector<int64_t> split_rows(const int32_t* row_ptr, int64_t rows, int parts) {
  // Each block row also costs a little by itself (its accumulators are set and stored).
  const auto cost = [&](int64_t r) { return row_ptr[r] + r; };
  std::vector<int64_t> bounds(parts + 1, rows);
  bounds[0] = 0;
  for (int p = 1; p < parts; ++p) {
    const int64_t target = cost(0) + (cost(rows) - cost(0)) * p / parts;
    int64_t lo = bounds[p - 1], hi = rows;
    while (lo < hi) {
      const int64_t mid = (lo + hi) / 2;
      if (cost(mid) < target)
        lo = mid + 1;
      else
        hi = mid;
    }
    bounds[p] = lo;
  }
  return bounds;
}

// Block rows [begin, result) whose values number about `chunk_values`: at least one row.
inline int64_t chunk_end(const BlockSparseView& w, int64_t begin, int64_t end,
                         int64_t chunk_values) {
  const int64_t blocks = std::max<int64_t>(1, chunk_values / (w.bo * w.bi));
  int64_t r = begin + 1;
  while (r < end && w.row_ptr[r + 1] - w.row_ptr[begin] <= blocks) ++r;
  return r;
}

// Rows of the next tile, `rows` more rows of a block to go, for panels of nv vectors: as few tiles
// as the table allows, of nearly equal height (10 rows, at most 8 at a time: 5 5).
template <class T>
int tile_rows(const KernelTable<T>& k, int64_t rows, int nv) {
  int tallest = static_cast<int>(std::min<int64_t>(k.max_rows, rows));
  while (!k.tiles[tallest][nv].forward) --tallest;
  int r = static_cast<int>(ceil_div(rows, ceil_div(rows, tallest)));
  while (!k.tiles[r][nv].forward) --r;
  return r;
}

// A block's height cut into tiles.
template <class T>
struct TileCut {
  TileFn<T> run;
  int64_t row_offset;
};

template <class T>
std::vector<TileCut<T>> cut_tiles(const KernelTable<T>& k, TileFn<T> Tile<T>::* direction,
                                  int64_t rows, int nv) {
  std::vector<TileCut<T>> cuts;
  for (int64_t at = 0; at < rows;) {
    const int height = tile_rows(k, rows - at, nv);
    cuts.push_back({k.tiles[height][nv].*direction, at});
    at += height;
  }
  return cuts;
}

// The tiles of a layer's blocks: of full height, and of the last block row where it is ragged.
template <class T>
class LayerTiles {
 public:
  LayerTiles(const KernelTable<T>& k, TileFn<T> Tile<T>::* direction, int64_t bo, int64_t out,
             int nv)
      : full_(cut_tiles(k, direction, bo, nv)),
        ragged_(cut_tiles(k, direction, out % bo, nv)),
        bo_(bo),
        full_rows_(out / bo),
        ragged_height_(out % bo) {}

  int64_t passes() const { return static_cast<int64_t>(full_.size()); }  // over a block row
  // Block rows [begin, result) are of one height.
  int64_t same_height(int64_t begin, int64_t end) const {
    return begin < full_rows_ ? std::min(end, full_rows_) : end;
  }
  // Runs block rows [begin, end), all of one height. Arguments are changed in place: a copy for
  // each tile costs as much as twenty inputs.
  void run(TileArgs<T>& a, int64_t begin, int64_t end) const {
    run(a, begin, end, begin < full_rows_);
  }
  void run(TileArgs<T>& a, int64_t begin, int64_t end, bool full) const {
    const char* const later = a.later;
    a.first_row = begin;
    a.last_row = end;
    a.block_rows_valid = full ? bo_ : ragged_height_;
    for (const auto& cut : full ? full_ : ragged_) {
      a.row_offset = cut.row_offset;
      cut.run(a);
      a.later += a.later_of_tile;
    }
    a.later = later;
  }
  void run_all(TileArgs<T>& a, int64_t begin, int64_t end) const {
    while (begin < end) {
      const int64_t next = same_height(begin, end);
      run(a, begin, next);
      begin = next;
    }
  }

 private:
  std::vector<TileCut<T>> full_, ragged_;
  int64_t bo_, full_rows_, ragged_height_;
};

// 0, 1, ... n - 1, owned by the calling thread and valid until it asks for more.
const int32_t* identity(int64_t n);

template <class T>
TileArgs<T> tile_args(const BlockSparseView& w, const T* values) {
  TileArgs<T> a{};
  a.values = values;
  a.row_begin = w.row_ptr;
  a.row_end = w.row_ptr + 1;
  a.col_idx = w.col_idx;
  a.bo = w.bo;
  a.bi = w.bi;
  a.last_group = w.col_groups() - 1;
  a.last_width = w.in - a.last_group * w.bi;
  a.slot_row = w.row_perm ? w.row_perm : identity(w.out);
  a.rows_ahead = 1;
  a.fetch_end = w.block_rows();
  a.later = reinterpret_cast<const char*>(values);  // steps of nothing from a valid address
  a.prefetch = std::max(kAheadInputs * w.bo, kAheadValues);
  return a;
}

// Calls fn(args) for the full block rows of [begin, end) and for the ragged last one, if it is
// there.
template <class T, class Fn>
void for_full_and_ragged(const BlockSparseView& w, TileArgs<T> a, int64_t begin, int64_t end,
                         Fn fn) {
  const int64_t full = std::min(end, w.out / w.bo);
  if (begin < full) {
    a.first_row = begin;
    a.last_row = full;
    a.block_rows_valid = w.bo;
    fn(a);
  }
  if (end > full) {
    a.first_row = std::max(begin, full);
    a.last_row = end;
    a.block_rows_valid = w.out - a.first_row * w.bo;
    fn(a);
  }
}

// For the gradient of values, by how many vectors high a block is: no masks.
template <class T>
const Sampler<T>& sampler(const KernelTable<T>& k, int64_t rows) {
  return k.samplers[std::min<int64_t>(rows / k.width, 2)];
}

// A panel: up to nv * W tokens from `token` on.
struct Panel {
  int nv;
  int64_t token, tokens;
};
// Cuts token units (W tokens each) [begin, end) into panels of at most `preferred` vectors and
// nearly equal size: 16 units at 3 become 3 3 3 3 2 2, not 3 3 3 3 3 1 (narrow panels are less
// efficient).
template <class T>
std::vector<Panel> cut_panels(const KernelTable<T>& k, int64_t begin, int64_t end, int preferred,
                              int64_t tokens) {
  std::vector<Panel> panels;
  for (int64_t u = begin; u < end;) {
    const int64_t left = end - u;
    int nv = static_cast<int>(ceil_div(left, ceil_div(left, preferred)));
    while (!k.tiles[1][nv].forward) ++nv;
    const int64_t token = u * k.width;
    panels.push_back(
        {nv, token, std::min<int64_t>(tokens - token, std::min<int64_t>(nv, left) * k.width)});
    u += nv;
  }
  return panels;
}

template <class T>
int preferred_vecs(const KernelTable<T>& k, const BlockSparseView& w) {
  return k.preferred_vecs[std::min<int64_t>(std::min(w.bo, w.out), k.max_rows)];
}

// Inverse permutations; nullptr where there is none. Of several groups, each counts from its first
// channel: row[c] is the slot, within its group, of output c.
struct Inverses {
  const int32_t* row = nullptr;
  const int32_t* col = nullptr;
};

// Checks all of the layout but col_idx. The inverses live in the calling thread's scratch memory.
std::string check_and_invert(const BlockSparseView& w, Inverses* inverse);

// Where thread t's share of n columns starts: whole vectors, so that no thread transposes a partial
// one in the middle.
inline int64_t share_begin(int64_t n, int64_t width, int t, int threads) {
  return std::min(n, ceil_div(ceil_div(n, width) * t, threads) * width);
}

}  // namespace tetris::cpu
