#include "cpu/bsmm.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "core/check.h"
#include "core/cpu_features.h"
#include "cpu/dispatch.h"
#include "cpu/walk.h"

namespace tetris::cpu {
namespace {

// For one token a chunk is only checked and then used: its indices are in L1 by then.
constexpr int64_t kStreamChunkBytes = 8 << 10;

// Checks block rows right before they are used, on whichever thread uses them first. What it reads,
// the kernel reads next, so the check costs no memory traffic.
class RowCheck {
 public:
  RowCheck(const BlockSparseView& w, AscendingFn ascending) : w_(w), ascending_(ascending) {}

  bool ok(int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (!ascending_(w_.col_idx + w_.row_ptr[r], w_.row_ptr[r + 1] - w_.row_ptr[r],
                      w_.col_groups())) {
        bad_.store(r, std::memory_order_relaxed);
        return false;
      }
    }
    return !failed();
  }
  bool failed() const { return bad_.load(std::memory_order_relaxed) >= 0; }
  std::string message() const {
    const int64_t r = bad_.load();
    return r < 0 ? std::string() : check_col_idx(w_, r, r + 1);
  }

 private:
  const BlockSparseView& w_;
  const AscendingFn ascending_;
  std::atomic<int64_t> bad_{-1};
};

// Runs block rows [begin, end) on a panel `width` tokens wide.
//
// The tiles of a block's height read the same inputs of x and the same lines of values. Rows go
// together while what they read fits kChunkBytes. From three tiles on, a row that reads too much is
// cut into parts by what L1 holds of x; each costs a tile some fifty cycles, to load and store its
// accumulators. Low tiles, which read much for each FMA, gain where L1 would not hold a row, high
// ones where L2 would not. On Zen 4, GFLOP/s: 2048x4096x4096 half kept 64x64 96 instead of 75, 32x1
// 87 instead of 79; with AVX2 128x4096x4096 half kept 16x1 78 instead of 59, 10 % kept 32x1 82
// instead of 75. Where L2 does hold a row of 64x64 (25 % kept), parts were 7 % slower.
//
// High tiles take longer over an input than L2 takes to deliver it, so their parts may fill L1: 2
// to 4 % faster than half. Tiles of four rows and blocks one or two inputs wide, which read x here
// and there, gain by what leaves L1 to the values, a quarter instead of half: with AVX2
// 2048x4096x4096 half kept 16x1 83 instead of 74, 25 % kept 24x1 87 instead of 77; wider blocks
// lose up to 10 %.
//
// Only some of a row's high tiles are the first to touch its lines of values, and while they wait
// for memory the others do not. So every tile fetches its share of the rows that come next: 25 %
// kept, 128x4096x4096 32x1 90 instead of 81, 2048x4096x4096 64x64 94 instead of 90, more or less by
// how loud other users of L3 are. Two tiles gain nothing, low ones lose 5 to 10 %, and so do blocks
// of one tile (half kept).
template <class T>
void run_rows(const LayerTiles<T>& tiles, const BlockSparseView& w, const TileArgs<T>& args,
              int64_t begin, int64_t end, int64_t width) {
  TileArgs<T> a = args;
  if (tiles.passes() == 1) return tiles.run_all(a, begin, end);
  constexpr int64_t kLowTile = 4, kHighTile = 8, kSize = sizeof(T);
  const bool high = w.bo >= kHighTile * tiles.passes();
  const bool scattered = w.bo <= kLowTile * tiles.passes() && w.bi <= 2;
  const int64_t x_bytes = width * kSize, block_bytes = (w.bo * kSize + x_bytes) * w.bi;
  const int64_t together = kChunkBytes / block_bytes;
  const int64_t in_l1 = l1_cache_bytes() / (x_bytes * w.bi);  // blocks whose x fits
  const int64_t part_blocks = std::max<int64_t>(1, high ? in_l1 : in_l1 / (scattered ? 4 : 2));
  int64_t longest = part_blocks * 3 / 2;
  if (tiles.passes() == 2) longest = w.col_groups();
  if (high) longest = std::max(longest, l2_cache_bytes() * 7 / 16 / block_bytes);
  // Not with slabs, where what comes next is not what follows.
  const bool by_shares =
      high && tiles.passes() > 2 && args.later_step == 0 && args.row_begin == w.row_ptr;
  // Stored blocks [from, until) are about to be multiplied, those behind them come next.
  const auto fetch_next = [&](TileArgs<T>& t, int64_t from, int64_t until) {
    if (!by_shares) return;
    const int64_t inputs = (until - from) * w.bi;
    const int64_t next = std::min(until - from, w.nnzb - until) * w.bi;
    t.later = reinterpret_cast<const char*>(t.values + until * w.bo * w.bi);
    t.later_first = from * w.bi;
    t.later_step = inputs > 0 ? next * w.bo * kSize / (inputs * tiles.passes()) : 0;
    t.later_of_tile = inputs * t.later_step;
  };
  const int64_t rows = w.block_rows();
  for (int64_t r = begin; r < end;) {
    const int64_t first = args.row_begin[r], blocks = args.row_end[r] - first;
    if (blocks <= longest) {
      const int64_t stop = tiles.same_height(r, end);
      int64_t next = r + 1, sum = blocks;
      while (next < stop && (sum += args.row_end[next] - args.row_begin[next]) <= together) ++next;
      fetch_next(a, first, args.row_end[next - 1]);
      tiles.run(a, r, next);
      r = next;
      continue;
    }
    int32_t* const part_begin = scratch<int32_t>(ScratchSlot::kVector, 2 * rows);
    int32_t* const part_end = part_begin + rows;
    TileArgs<T> part = args;
    part.row_begin = part_begin;
    part.row_end = part_end;
    part.fetch_end = 0;  // of other rows these do not tell
    const int64_t parts = ceil_div(blocks, part_blocks);
    for (int64_t i = 0; i < parts; ++i) {
      part_begin[r] = static_cast<int32_t>(first + blocks * i / parts);
      part_end[r] = static_cast<int32_t>(first + blocks * (i + 1) / parts);
      fetch_next(part, part_begin[r], part_end[r]);
      tiles.run(part, r, r + 1);
      part.accumulate = true;
    }
    ++r;
  }
}

// Block rows [begin, end), and memory to fetch while they are multiplied.
struct Stretch {
  int64_t begin, end;
  const char* data;
  int64_t bytes;
};

// What follows a panel's tiles waits for memory: its y, which is stored, and the next panel's x,
// which is packed. Both are fetched while the tiles compute, x by the first block rows, y by the
// others: 512x1024x4096 on Zen 4, 10 % kept, 94 instead of 87 GFLOP/s for 16x16, 80 instead of 72
// for 32x1 at 5 %. Not where tiles take so long that there is little to gain, nor where L2 could
// not hold it (4096 inputs and outputs: 5 % slower), nor where lines are not contiguous. Tried in
// bursts between tiles of eight rows: what storing gains the tiles lose.
template <class T>
std::vector<Stretch> fetches(const BlockSparseView& w, Matrix<const T> x, Matrix<T> y,
                             const Panel& panel, const Panel* next, int64_t width, int64_t passes) {
  constexpr int64_t kLeastBytes = 8;  // for each stored input
  constexpr int64_t kSize = sizeof(T);
  const int64_t rows = w.block_rows(), inputs = w.nnzb * w.bi * passes;
  const int64_t x_bytes = next && x.ld == w.in ? next->tokens * w.in * kSize : 0;
  const int64_t y_bytes = y.ld == w.out ? panel.tokens * w.out * kSize : 0;
  const int64_t bytes = x_bytes + y_bytes, panels = width * (w.in + w.out) * kSize;
  if (bytes < kLeastBytes * inputs || 2 * (bytes + panels) > 3 * l2_cache_bytes())
    return {{0, rows, nullptr, 0}};
  const int64_t x_blocks = bytes > 0 ? w.nnzb * x_bytes / bytes : 0;
  const int64_t split = std::lower_bound(w.row_ptr, w.row_ptr + rows, x_blocks) - w.row_ptr;
  const auto at = [](const T* p) { return reinterpret_cast<const char*>(p); };
  std::vector<Stretch> stretches;
  if (split > 0) stretches.push_back({0, split, at(x.data + next->token * x.ld), x_bytes});
  stretches.push_back({split, rows, at(y.data + panel.token * y.ld), y_bytes});
  return stretches;
}

template <class T>
void set_fetch(TileArgs<T>& args, const BlockSparseView& w, const Stretch& stretch,
               int64_t passes) {
  constexpr int64_t kMost = 64;  // a line for each stored input
  const int64_t first = w.row_ptr[stretch.begin], blocks = w.row_ptr[stretch.end] - first;
  if (stretch.bytes == 0 || blocks == 0) return;
  args.later = stretch.data;
  args.later_first = first * w.bi;
  args.later_step = std::min(kMost, stretch.bytes / (blocks * w.bi * passes));
  args.later_of_tile = blocks * w.bi * args.later_step;
}

template <class T>
const char* tile_name(const KernelTable<T>& k, const BlockSparseView& w, int nv) {
  return k.tiles[tile_rows(k, std::min(w.bo, w.out), nv)][nv].name;
}

template <class T>
std::string forward_one_token(const KernelTable<T>& k, const BlockSparseView& w, const T* values,
                              const T* x, const T* bias, Activation act, T* y,
                              const Parallel& parallel) {
  const T* source = x;
  if (w.col_perm) {
    T* packed = scratch<T>(ScratchSlot::kVector, w.in);
    for (int64_t i = 0; i < w.in; ++i) packed[i] = x[w.col_perm[i]];
    source = packed;
  }
  RowCheck check(w, k.ascending);
  const int threads = useful_threads(parallel, w.nnzb * w.bo * w.bi);
  const auto bounds = split_rows(w.row_ptr, w.block_rows(), threads);
  run(parallel, threads, [&](int t) {
    TileArgs<T> args = tile_args(w, values);
    args.src = source;
    args.dst = y;
    for (int64_t r = bounds[t]; r < bounds[t + 1];) {
      const int64_t next = chunk_end(w, r, bounds[t + 1], kStreamChunkBytes / sizeof(T));
      if (!check.ok(r, next)) return;
      for_full_and_ragged(w, args, r, next, [&](const TileArgs<T>& a) { k.matvec(a); });
      r = next;
    }
  });
  if (bias || act != Activation::kNone) k.epilogue(y, w.out, bias, act);
  set_last_kernel(k.matvec_name);
  return check.message();
}

// How the forward walks the layer for many tokens.
//
//   for each panel of tokens                 its x and y stay in L2
//     for each stretch of block rows         (one or two) fetches x or y of what follows
//       for each walk of block rows          its values stay in L2 for each slab
//         for each slab of inputs            (often one) its part of the x panel stays in L1 or L2
//           for each chunk of the walk       a few rows, or part of one: what it reads stays in L1
//                                            for each tile of a block's height
//
// Where even the narrowest panel takes more than half of L2, slabs take at most that and a walk is
// the whole layer. Otherwise slabs are for low tiles, which read x faster than L2 delivers. Each
// slab costs a load and a store of the tile, so it is made long enough to hold a number of stored
// inputs of a row; only a dense layer gets slabs that fit L1. GFLOP/s without and with slabs, 1024
// inputs on Zen 5: 1x1 half kept 86 and 122, 10 % kept 96 and 100; 2x1 half kept 127 and 205, 10 %
// kept 150 and 170; 4x1 half kept 227 and 244. Tried and no faster: several panels that take turns
// on each chunk of values.
struct Blocking {
  int nv = 1;  // vectors of a full panel
  int64_t slabs = 1;
  int64_t slab_groups = 0;  // column groups of a slab
  int64_t walk_bytes = std::numeric_limits<int64_t>::max();
  int64_t rows_ahead = 1;
};

// By the height of a low tile: slabs are worth it where one that fits L1 would hold so many stored
// inputs of a row ...
constexpr int64_t kStoredInL1[] = {0, 24, 24, 64, 64};
// ... and then each should hold so many.
constexpr int64_t kSlabInputs[] = {0, 48, 56, 128, 128};
// A panel that L2 cannot hold is halved rather than cut into slabs, unless a slab of it would hold
// so many stored inputs of a row and the tile is high enough to gain from the width.
constexpr int64_t kWideSlabInputs = 384;
constexpr int64_t kWideTile = 3;
// Where slabs begin is kept for every block row and thread: 16 MiB at most.
constexpr int64_t kMostCuts = 4 << 20;

template <class T>
Blocking choose_blocking(const KernelTable<T>& k, const BlockSparseView& w, int64_t units) {
  constexpr int64_t kNarrowTokens = 32;  // of a panel
  const int64_t l1 = l1_cache_bytes(), l2 = l2_cache_bytes();
  const int64_t unit_bytes = k.width * static_cast<int64_t>(sizeof(T));  // of one input or output
  const int64_t height = std::min(w.bo, w.out);
  const int64_t stored = std::max<int64_t>(1, w.nnzb * w.bi);  // inputs, all block rows together
  // A tile takes unit_bytes / height of x for each FMA, and a core that does two FMAs gets about 32
  // bytes a cycle from L2.
  const bool low = height * 16 <= unit_bytes;
  const auto row_stores = [&](int64_t inputs) { return inputs * stored / (w.block_rows() * w.in); };
  Blocking b;
  b.nv = preferred_vecs(k, w);
  const auto fit = [&](int64_t bytes) { return bytes / (b.nv * unit_bytes); };
  const bool wide_fits = w.in <= fit(l2 / 2);
  if (!wide_fits && (height < kWideTile || row_stores(fit(l2 / 2)) < kWideSlabInputs))
    b.nv = std::min(b.nv, static_cast<int>(kNarrowTokens / k.width));
  int64_t slab_inputs = fit(l2 / 2);
  const bool panel_fits = w.in <= slab_inputs;
  const int64_t l1_inputs = fit(l1 * 2 / 3), row = std::min<int64_t>(height, 4);
  // Fewer tokens than a panel use a value too seldom to fetch it in parts.
  if (wide_fits && low && units >= b.nv && row_stores(l1_inputs) >= kStoredInL1[row])
    slab_inputs = std::max(l1_inputs, kSlabInputs[row] * w.block_rows() * w.in / stored);
  b.slabs = std::min(ceil_div(w.in, std::max(slab_inputs, w.bi)),
                     std::max<int64_t>(1, kMostCuts / w.block_rows()));
  b.slab_groups = ceil_div(w.col_groups(), b.slabs);
  b.slabs = ceil_div(w.col_groups(), b.slab_groups);
  if (b.slabs > 1 && panel_fits) b.walk_bytes = std::max(kChunkBytes, l2 / 4);
  const int64_t row_bytes = stored * w.bo * sizeof(T) / (w.block_rows() * b.slabs) + 1;
  b.rows_ahead = std::clamp<int64_t>(kAheadBytes / row_bytes, 1, 8);
  return b;
}

// Where each slab begins in block rows [begin, end): cuts[s * rows + r] for slab s of row r, one
// more slab than there are.
void cut_slabs(const BlockSparseView& w, const Blocking& blocking, int64_t begin, int64_t end,
               int32_t* cuts) {
  const int64_t rows = w.block_rows();
  for (int64_t r = begin; r < end; ++r) {
    int64_t at = w.row_ptr[r];
    const int64_t row_end = w.row_ptr[r + 1];
    cuts[r] = w.row_ptr[r];
    for (int64_t s = 1; s < blocking.slabs; ++s) {
      const int64_t limit = s * blocking.slab_groups;
      constexpr int64_t kStride = 16;
      while (at + kStride <= row_end && w.col_idx[at + kStride - 1] < limit) at += kStride;
      while (at < row_end && w.col_idx[at] < limit) ++at;
      cuts[s * rows + r] = static_cast<int32_t>(at);
    }
    cuts[blocking.slabs * rows + r] = w.row_ptr[r + 1];
  }
}

// Many tokens: each thread takes a run of tokens and does everything for them.
template <class T>
void forward_by_tokens(const KernelTable<T>& k, const BlockSparseView& w, const T* values,
                       Matrix<const T> x, int64_t tokens, const int32_t* inverse_col, const T* bias,
                       Activation act, Matrix<T> y, int64_t unit_begin, int64_t unit_end,
                       const Blocking& blocking, RowCheck& check) {
  const int64_t rows = w.block_rows();
  int32_t* const cuts = blocking.slabs > 1
                            ? scratch<int32_t>(ScratchSlot::kLists, (blocking.slabs + 1) * rows)
                            : nullptr;
  bool checked = false;
  const auto panels = cut_panels(k, unit_begin, unit_end, blocking.nv, tokens);
  for (const auto& p : panels) {
    const int64_t width = p.nv * k.width;
    T* const xp = scratch<T>(ScratchSlot::kX, width * w.in);
    T* const yp = scratch<T>(ScratchSlot::kY, width * w.out);
    k.pack(x.data + p.token * x.ld, x.ld, p.tokens, 0, w.in, inverse_col, xp, p.nv);
    const LayerTiles<T> tiles(k, &Tile<T>::forward, w.bo, w.out, p.nv);
    const Panel* const following = &p == &panels.back() ? nullptr : &p + 1;
    for (const auto& stretch : fetches(w, x, y, p, following, width, tiles.passes())) {
      TileArgs<T> args = tile_args(w, values);
      args.src = xp;
      args.dst = yp;
      args.rows_ahead = blocking.rows_ahead;
      set_fetch(args, w, stretch, tiles.passes());
      for (int64_t r = stretch.begin; r < stretch.end;) {
        // Where values come from memory, indices are checked right before they are used.
        const int64_t walk = checked || cuts ? blocking.walk_bytes : kChunkBytes;
        const int64_t next = chunk_end(w, r, stretch.end, walk / sizeof(T));
        if (!checked) {
          if (!check.ok(r, next)) return;
          if (cuts) cut_slabs(w, blocking, r, next, cuts);
        }
        for (int64_t s = 0; s < blocking.slabs; ++s) {
          if (cuts) {
            args.row_begin = cuts + s * rows;
            args.row_end = args.row_begin + rows;
            args.fetch_end = next;
          }
          args.accumulate = s > 0;
          run_rows(tiles, w, args, r, next, width);
        }
        r = next;
      }
    }
    checked = true;
    k.unpack(yp, p.nv, p.tokens, 0, w.out, nullptr, bias, act, y.data + p.token * y.ld, y.ld);
  }
}

// Fewer token units than threads: split the block rows.
//
// Panels of x that fit L2 are packed by every thread for itself: that takes microseconds, and lines
// that another core has just written take longer to fetch. Larger ones are packed together and
// shared.
template <class T>
void forward_by_rows(const KernelTable<T>& k, const BlockSparseView& w, const T* values,
                     Matrix<const T> x, int64_t tokens, const int32_t* inverse_col, const T* bias,
                     Activation act, Matrix<T> y, int64_t unit_begin, int64_t unit_end,
                     int preferred, int threads, const Parallel& parallel, RowCheck& check) {
  const auto panels = cut_panels(k, unit_begin, unit_end, preferred, tokens);
  int64_t width = 0;
  std::vector<LayerTiles<T>> tiles;  // of each panel
  for (const auto& p : panels) {
    width += p.nv * k.width;
    tiles.emplace_back(k, &Tile<T>::forward, w.bo, w.out, p.nv);
  }
  const auto range = [&](int64_t n, int t) { return share_begin(n, k.width, t, threads); };
  const auto pack = [&](int64_t begin, int64_t end, T* xp) {
    for (const auto& p : panels) {
      k.pack(x.data + p.token * x.ld, x.ld, p.tokens, begin, end, inverse_col, xp, p.nv);
      xp += p.nv * k.width * w.in;
    }
  };
  const bool share = width * w.in * static_cast<int64_t>(sizeof(T)) > l2_cache_bytes() / 2;
  T* const shared = share ? scratch<T>(ScratchSlot::kX, width * w.in) : nullptr;
  if (share)
    run(parallel, threads, [&](int t) { pack(range(w.in, t), range(w.in, t + 1), shared); });
  T* const ys = scratch<T>(ScratchSlot::kY, width * w.out);
  const auto bounds = split_rows(w.row_ptr, w.block_rows(), threads);
  run(parallel, threads, [&](int t) {
    T* xs = shared;
    if (!share) {
      xs = scratch<T>(ScratchSlot::kX, width * w.in);
      pack(0, w.in, xs);
    }
    for (int64_t r = bounds[t]; r < bounds[t + 1];) {
      const int64_t next = chunk_end(w, r, bounds[t + 1], kChunkBytes / sizeof(T));
      if (!check.ok(r, next)) return;
      TileArgs<T> args = tile_args(w, values);
      args.src = xs;
      args.dst = ys;
      for (size_t i = 0; i < panels.size(); ++i) {
        const Panel& p = panels[i];
        tiles[i].run_all(args, r, next);
        args.src += p.nv * k.width * w.in;
        args.dst += p.nv * k.width * w.out;
      }
      r = next;
    }
  });
  if (check.failed()) return;
  run(parallel, threads, [&](int t) {
    const T* yp = ys;
    for (const auto& p : panels) {
      k.unpack(yp, p.nv, p.tokens, range(w.out, t), range(w.out, t + 1), nullptr, bias, act,
               y.data + p.token * y.ld, y.ld);
      yp += p.nv * k.width * w.out;
    }
  });
}

}  // namespace

template <class T>
std::string bsmm_forward(const BlockSparseView& w, const T* values, Matrix<const T> x,
                         int64_t tokens, const T* bias, Activation act, Matrix<T> y,
                         const Parallel& parallel) {
  const auto& k = kernels<T>();
  Inverses inverse;
  std::string error = check_and_invert(w, &inverse);
  if (!error.empty()) return error;
  if (tokens == 0) return check_col_idx(w, 0, w.block_rows());
  if (tokens == 1) return forward_one_token(k, w, values, x.data, bias, act, y.data, parallel);

  const int64_t units = ceil_div(tokens, k.width);
  const int threads =
      useful_threads(parallel, (w.nnzb * w.bo * w.bi + 4 * (w.in + w.out)) * units * k.width);
  const Blocking blocking = choose_blocking(k, w, units);
  RowCheck check(w, k.ascending);
  // By tokens as far as every thread gets the same; what is over (fewer units than threads) by
  // rows, unless the longest share would exceed the mean by no more than 1/8.
  const bool even = ceil_div(units, threads) * threads * 8 <= units * 9;
  const int64_t by_tokens = even ? units : units / threads * threads;
  const int shares = static_cast<int>(std::min<int64_t>(threads, by_tokens));
  const auto share = [&](int t) { return by_tokens * t / shares; };
  if (by_tokens > 0)
    run(parallel, shares, [&](int t) {
      forward_by_tokens(k, w, values, x, tokens, inverse.col, bias, act, y, share(t), share(t + 1),
                        blocking, check);
    });
  if (by_tokens < units && !check.failed())
    forward_by_rows(k, w, values, x, tokens, inverse.col, bias, act, y, by_tokens, units,
                    blocking.nv, threads, parallel, check);
  const int64_t first = by_tokens > 0 ? share(1) : units;
  set_last_kernel(tile_name(k, w, cut_panels(k, 0, first, blocking.nv, tokens)[0].nv));
  return check.message();
}

template <class T>
std::string bsmm_grad_input(const BlockSparseView& w, const T* values, Matrix<const T> dy,
                            int64_t tokens, Matrix<T> dx, const Parallel& parallel) {
  const auto& k = kernels<T>();
  Inverses inverse;
  std::string error = check_and_invert(w, &inverse);
  if (error.empty()) error = check_col_idx(w, 0, w.block_rows());
  if (!error.empty() || tokens == 0) return error;

  const int64_t units = ceil_div(tokens, k.width);
  const int preferred = std::min(preferred_vecs(k, w), 4);
  const int threads = static_cast<int>(std::min<int64_t>(
      units, useful_threads(parallel, (w.nnzb * w.bo * w.bi + 4 * (w.in + w.out)) * tokens)));
  run(parallel, threads, [&](int t) {
    for (const auto& p :
         cut_panels(k, units * t / threads, units * (t + 1) / threads, preferred, tokens)) {
      const int64_t width = p.nv * k.width;
      T* const dyp = scratch<T>(ScratchSlot::kY, width * w.out);
      T* const dxp = scratch<T>(ScratchSlot::kX, width * w.in);
      // dy stays in original order: a block row's gather through row_perm reads each row once.
      k.pack(dy.data + p.token * dy.ld, dy.ld, p.tokens, 0, w.out, nullptr, dyp, p.nv);
      std::fill_n(dxp, width * w.in, T(0));
      TileArgs<T> args = tile_args(w, values);
      args.src = dyp;
      args.dst = dxp;
      const LayerTiles<T> tiles(k, &Tile<T>::grad_input, w.bo, w.out, p.nv);
      // Row by row: dx then sums over packed slots in order, however a block is cut into tiles, and
      // is bit-identical for any number of threads.
      for (int64_t row = 0; row < w.block_rows(); ++row) tiles.run(args, row, row + 1);
      k.unpack(dxp, p.nv, p.tokens, 0, w.in, inverse.col, nullptr, Activation::kNone,
               dx.data + p.token * dx.ld, dx.ld);
    }
  });
  set_last_kernel(
      tile_name(k, w, cut_panels(k, 0, ceil_div(units, threads), preferred, tokens)[0].nv));
  return {};
}

template <class T>
std::string bsmm_grad_values(const BlockSparseView& w, Matrix<const T> x, Matrix<const T> dy,
                             int64_t tokens, T* dvalues, const Parallel& parallel) {
  const auto& k = kernels<T>();
  Inverses inverse;
  std::string error = check_and_invert(w, &inverse);
  if (error.empty()) error = check_col_idx(w, 0, w.block_rows());
  if (!error.empty()) return error;
  if (tokens == 0 || w.out % w.bo != 0 || w.in % w.bi != 0)
    std::fill_n(dvalues, w.nnzb * w.bi * w.bo, T(0));  // entries outside the matrix stay zero
  if (tokens == 0) return {};

  // Long panels amortize what each one costs an output; both must stay in L2 / L3.
  const int64_t units = ceil_div(tokens, k.width);
  const int64_t nv = ceil_div(units, ceil_div(units, kSampleTokens / k.width));
  const int64_t width = nv * k.width;
  const int threads = useful_threads(parallel, w.nnzb * w.bo * w.bi * tokens);
  const Sampler<T>& kernel = sampler(k, std::min(w.bo, w.out));
  const auto bounds = split_rows(w.row_ptr, w.block_rows(), threads);
  const int64_t slots = w.block_rows() * w.bo;
  T* const xp = scratch<T>(ScratchSlot::kX, width * w.in);
  T* const dyp = scratch<T>(ScratchSlot::kY, width * slots);
  const auto range = [&](int64_t n, int t) { return share_begin(n, k.width, t, threads); };
  for (int64_t token = 0; token < tokens; token += width) {
    const int64_t count = std::min(width, tokens - token);
    run(parallel, threads, [&](int t) {
      k.pack(x.data + token * x.ld, x.ld, count, range(w.in, t), range(w.in, t + 1), inverse.col,
             xp, nv);
      k.pack(dy.data + token * dy.ld, dy.ld, count, range(w.out, t), range(w.out, t + 1),
             inverse.row, dyp, nv);
    });
    run(parallel, threads, [&](int t) {
      for (int64_t row = bounds[t]; row < bounds[t + 1]; ++row) {
        const int64_t begin = w.row_ptr[row], blocks = w.row_ptr[row + 1] - begin;
        // Stored inputs of the row, one by one: blocks of any width become one list.
        int64_t* const offsets = scratch<int64_t>(ScratchSlot::kLists, 2 * blocks * w.bi);
        int64_t* const inputs = offsets + blocks * w.bi;
        int64_t n = 0;
        for (int64_t b = begin; b < begin + blocks; ++b) {
          const int64_t first = w.col_idx[b] * w.bi, valid = std::min(w.bi, w.in - first);
          for (int64_t j = 0; j < valid; ++j) {
            inputs[n + j] = (first + j) * width;
            offsets[n + j] = (b * w.bi + j) * w.bo;
          }
          n += valid;
        }
        SampleArgs<T> a{};
        a.x = xp;
        a.dy = dyp + row * w.bo * width;
        a.dy_stride = width;
        a.nv = nv;
        a.inputs = inputs;
        a.offsets = offsets;
        a.count = n;
        a.rows = std::min(w.bo, w.out - row * w.bo);
        a.dvalues = dvalues;
        a.accumulate = token > 0;
        kernel.run(a);
      }
    });
  }
  set_last_kernel(kernel.name);
  return {};
}

#define TETRIS_INSTANTIATE(T)                                                                      \
  template std::string bsmm_forward<T>(const BlockSparseView&, const T*, Matrix<const T>, int64_t, \
                                       const T*, Activation, Matrix<T>, const Parallel&);          \
  template std::string bsmm_grad_input<T>(const BlockSparseView&, const T*, Matrix<const T>,       \
                                          int64_t, Matrix<T>, const Parallel&);                    \
  template std::string bsmm_grad_values<T>(const BlockSparseView&, Matrix<const T>,                \
                                           Matrix<const T>, int64_t, T*, const Parallel&);
TETRIS_INSTANTIATE(float)
TETRIS_INSTANTIATE(double)
#undef TETRIS_INSTANTIATE

}  // namespace tetris::cpu
