// The kernels, written once over a vector type V and compiled once per instruction set.
//
//   forward       y[row] += values[k][row] * x[input k]      broadcast weight times a row of tokens
//
//        x panel (rows = inputs)           accumulators (registers)       y panel (rows = outputs)
//        [ t0 t1 t2 ... ]  input 7   --->   R rows x NV vectors    --->   row slot_row[s]
//        [ t0 t1 t2 ... ]  input 9          rank-1 update per              written once
//                                           stored input
//
//   grad_input    dx[input k] += values[k][row] * dy[row]    dy rows stay in registers
//   sample        dvalues[k][row] = sum_t x[input k][t] dy[row][t]
//
// Tokens are the lanes (in sample of tall blocks outputs are), so neither the block's width nor its
// alignment matters, and both permutations cost nothing: they choose which panel row is read or
// written.
//
// Sums run over stored inputs in stored order, one accumulator per output, whatever the tile: from
// two tokens on, forward and grad_input are bit-identical for any split over tokens or threads. One
// token takes other kernels, with several accumulators.
#pragma once

#include "cpu/activations.h"
#include "cpu/kernels.h"

namespace tetris::cpu {

// One stored input into the accumulators of a tile: x is its panel row, v its R weights.
template <class V, int R, int NV>
inline void forward_input(const typename V::T* x, const typename V::T* v,
                          typename V::Reg (&acc)[R][NV]) {
  typename V::Reg xs[NV];
  for (int n = 0; n < NV; ++n) xs[n] = V::load(x + n * V::W);
  for (int r = 0; r < R; ++r) {
    const typename V::Reg w = V::bcast(v[r]);
    for (int n = 0; n < NV; ++n) acc[r][n] = V::fma(w, xs[n], acc[r][n]);
  }
}

// Where a tile's operands lie. A matrix product reads panels of NV * W tokens ...
template <class V, int NV>
struct PanelRows {
  using T = typename V::T;
  static constexpr int64_t kStride = NV * V::W;
  const T* src;
  int64_t bi, last_group, last_width;
  explicit PanelRows(const TileArgs<T>& a)
      : src(a.src), bi(a.bi), last_group(a.last_group), last_width(a.last_width) {}
  const T* input(int64_t col) const { return src + col * kStride; }  // blocks one input wide
  const T* block(int64_t col) const { return src + col * bi * kStride; }
  static constexpr int64_t stride() { return kStride; }  // from input to input of a block
  int64_t width(int64_t col) const { return col == last_group ? last_width : bi; }
  static T* row(const TileArgs<T>& a, int64_t slot) { return a.dst + a.slot_row[slot] * kStride; }
};

// ... a convolution reads planes of pixels, shifted by where the block lies in the kernel.
template <class V>
struct ShiftedPlanes {
  using T = typename V::T;
  const T* src;
  const int32_t* offset;
  int64_t src_stride, bi, groups, last_width;
  explicit ShiftedPlanes(const TileArgs<T>& a)
      : src(a.src),
        offset(a.offset),
        src_stride(a.src_stride),
        bi(a.bi),
        groups(a.last_group + 1),
        last_width(a.last_width) {}
  const T* input(int64_t col) const { return src + offset[col]; }
  const T* block(int64_t col) const { return src + offset[col]; }
  int64_t stride() const { return src_stride; }
  // Only asked where the width varies: the last group of every kernel position is ragged then.
  int64_t width(int64_t col) const {
    return last_width != bi && (col + 1) % groups == 0 ? last_width : bi;
  }
  static T* row(const TileArgs<T>& a, int64_t slot) {
    return a.dst + a.slot_row[slot] * a.dst_stride;
  }
};

// Where a tile's rows lie on the output side is looked up when it starts and again when it ends:
// R pointers would fill the general registers, and GCC then parks the inner loop's addresses in
// vector registers, where reading them waits behind the FMAs (4x64, half kept: 175 GFLOP/s instead
// of 230).
template <class V, int R, int NV, class Map>
struct ForwardTile {
  typename V::Reg acc[R][NV];

  void load(const TileArgs<typename V::T>& a, int64_t row) {
    const int64_t slot = row * a.bo + a.row_offset;
    if (a.accumulate) {
      for (int r = 0; r < R; ++r) {
        const typename V::T* y = Map::row(a, slot + r);
        for (int n = 0; n < NV; ++n) acc[r][n] = V::load(y + n * V::W);
      }
    } else {
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < NV; ++n) acc[r][n] = V::zero();
    }
  }
  void store(const TileArgs<typename V::T>& a, int64_t row) const {
    const int64_t slot = row * a.bo + a.row_offset;
    for (int r = 0; r < R; ++r) {
      typename V::T* y = Map::row(a, slot + r);
      for (int n = 0; n < NV; ++n) V::store(y + n * V::W, acc[r][n]);
    }
  }
};

template <class T>
constexpr int64_t kLine = 64 / sizeof(T);  // values in a cache line

// A prefetch for each input would cost tiles of so few rows 15 %: where they go alone, whole block
// rows are fetched ahead. Taller ones fetch by each input as it streams past.
constexpr int kShortRow = 2;
// Up to here what is fetched goes into L2 only, not to push x out of L1.
constexpr int kMediumRow = 4;

// Fetches a row's stored blocks and their column indices into L2.
template <class V>
inline void prefetch_row(const TileArgs<typename V::T>& a, int64_t row) {
  constexpr int64_t kLineBytes = 64;
  const int64_t b = a.row_begin[row], end = a.row_end[row], block = a.bo * a.bi;
  const char* v = reinterpret_cast<const char*>(a.values + b * block);
  const char* const v_end = reinterpret_cast<const char*>(a.values + end * block);
  for (; v < v_end; v += kLineBytes) __builtin_prefetch(v, 0, 2);
  const char* c = reinterpret_cast<const char*>(a.col_idx + b);
  const char* const c_end = reinterpret_cast<const char*>(a.col_idx + end);
  for (; c < c_end; c += kLineBytes) __builtin_prefetch(c, 0, 2);
}

// Fetches what a row's stored blocks [b, end) have to of what comes later.
template <class T>
inline void fetch_later(const TileArgs<T>& a, int64_t b, int64_t end) {
  const char* at = a.later + (b * a.bi - a.later_first) * a.later_step;
  const char* const stop = at + (end - b) * a.bi * a.later_step;
  for (; at < stop; at += 64) __builtin_prefetch(at, 0, 2);
}

// Stored blocks [b, end) of a row.
//
// Everything the loops use is copied out of `a` first: the compiler cannot know that a store to the
// panel leaves it alone. One input wide is a loop of its own: the twenty instructions that a loop
// over the width adds to each stored input cost 4x32 a third of its speed. The last of a tile's
// weights is what is prefetched: where values are not aligned (memory-mapped files), the first tile
// of a block fetches a line that the one before it had, and the second line of the pair came late
// (32x32 blocks 16 bytes off: 160 instead of 234 GFLOP/s).
template <class V, int R, int NV, class Map>
inline void forward_row(const TileArgs<typename V::T>& a, int64_t b, int64_t end,
                        typename V::Reg (&acc)[R][NV]) {
  using T = typename V::T;
  const int32_t* col = a.col_idx + b;
  const int32_t* const last = a.col_idx + end;
  const Map map(a);
  const int64_t bo = a.bo, bi = a.bi, ahead = a.prefetch;
  const T* v = a.values + b * bi * bo + a.row_offset;
  const int64_t later_step = a.later_step;
  const char* later = a.later + (b * bi - a.later_first) * later_step;
  if (bi == 1) {
    for (; col != last; ++col, v += bo, later += later_step) {
      if (R > kMediumRow) __builtin_prefetch(later, 0, 2);
      if (R > kShortRow) __builtin_prefetch(v + ahead + R - 1, 0, R > kMediumRow ? 3 : 2);
      forward_input<V, R, NV>(map.input(*col), v, acc);
    }
    return;
  }
  if (bi == 4 && a.last_width == 4) {  // a width known here is unrolled
    for (; col != last; ++col, v += 4 * bo) {
      const T* x = map.block(*col);
      for (int64_t k = 0; k < 4; ++k, later += later_step) {
        if (R > kMediumRow) __builtin_prefetch(later, 0, 2);
        if (R > kShortRow)
          __builtin_prefetch(v + k * bo + ahead + R - 1, 0, R > kMediumRow ? 3 : 2);
        forward_input<V, R, NV>(x + k * map.stride(), v + k * bo, acc);
      }
    }
    return;
  }
  for (; col != last; ++col, v += bi * bo) {
    const int64_t width = map.width(*col);
    const T* x = map.block(*col);
    const T* vk = v;
    for (int64_t k = 0; k < width; ++k, x += map.stride(), vk += bo, later += later_step) {
      if (R > kMediumRow) __builtin_prefetch(later, 0, 2);
      if (R > kShortRow) __builtin_prefetch(vk + ahead + R - 1, 0, R > kMediumRow ? 3 : 2);
      forward_input<V, R, NV>(x, vk, acc);
    }
  }
}

template <int... M>
struct RowSet {};

// A tile of few accumulators would wait for the latency of its FMAs (4 cycles, 1 or 2 a cycle), so
// several block rows go side by side, as far as the shortest. No block of them may be ragged in
// width.
template <class V, int R, int NV, class Map, int... M>
void forward_side_by_side(const TileArgs<typename V::T>& a, int64_t row, RowSet<M...>) {
  using T = typename V::T;
  constexpr int64_t kRows = sizeof...(M);
  const Map map(a);
  const int64_t bo = a.bo, bi = a.bi, block = bo * bi;
  ForwardTile<V, R, NV, Map> tile[kRows];
  (tile[M].load(a, row + M), ...);
  fetch_later(a, a.row_begin[row], a.row_begin[row] + kRows * (a.row_end[row] - a.row_begin[row]));
  const int32_t* const col[] = {a.col_idx + a.row_begin[row + M]...};
  const T* const v[] = {a.values + a.row_begin[row + M] * block + a.row_offset...};
  const int64_t count[] = {(a.row_end[row + M] - a.row_begin[row + M])...};
  int64_t shortest = count[0];
  ((shortest = count[M] < shortest ? count[M] : shortest), ...);
  // The rows that come next are fetched while these are used, position by position.
  const int64_t ahead[] = {
      (row + kRows + M < a.fetch_end ? a.row_begin[row + kRows + M] - a.row_begin[row + M] : 0)...};
  int64_t i = 0;
  if (bi == 1) {
    const auto input = [&](int64_t b) {
      (forward_input<V, R, NV>(map.input(col[M][b]), v[M] + b * bo, tile[M].acc), ...);
    };
    constexpr int64_t kRun = kLine<T> / R;  // inputs to a line, where the tile is the block
    static_assert(kRun > 0, "taller tiles have accumulators enough and go alone");
    for (; i + kRun <= shortest; i += kRun) {
      for (int64_t line = 0; line < kRun * bo; line += kLine<T>)
        (__builtin_prefetch(v[M] + (i + ahead[M]) * bo + line, 0, 2), ...);
      (__builtin_prefetch(col[M] + i + ahead[M], 0, 2), ...);
      for (int64_t j = 0; j < kRun; ++j) input(i + j);
    }
    for (; i < shortest; ++i) input(i);
  } else {
    for (; i < shortest; ++i) {
      if (a.row_offset == 0)  // the first tile of a block's height fetches for all
        for (int64_t line = 0; line < block; line += kLine<T>)
          (__builtin_prefetch(v[M] + (i + ahead[M]) * block + line, 0, 2), ...);
      const T* const x[] = {map.block(col[M][i])...};
      for (int64_t k = 0; k < bi; ++k)
        (forward_input<V, R, NV>(x[M] + k * map.stride(), v[M] + i * block + k * bo, tile[M].acc),
         ...);
    }
  }
  (forward_row<V, R, NV, Map>(a, a.row_begin[row + M] + i, a.row_end[row + M], tile[M].acc), ...);
  (tile[M].store(a, row + M), ...);
}

// How many rows a tile takes side by side: enough accumulators, none in memory.
template <class V, int R, int NV>
constexpr int side_by_side() {
  if (R * NV <= 2) return 4;
  return R * NV <= 8 && 2 * R * NV + NV + 1 <= V::kRegisters ? 2 : 1;
}

template <class V, int R, int NV, class Map>
void forward_tile(const TileArgs<typename V::T>& a) {
  constexpr int kRows = side_by_side<V, R, NV>();
  int64_t row = a.first_row;
  if constexpr (kRows > 1) {
    if (a.last_width == a.bi)
      for (; row + kRows <= a.last_row; row += kRows) {
        if constexpr (kRows == 4)
          forward_side_by_side<V, R, NV, Map>(a, row, RowSet<0, 1, 2, 3>());
        else
          forward_side_by_side<V, R, NV, Map>(a, row, RowSet<0, 1>());
      }
  }
  for (; row < a.last_row; ++row) {
    if (R <= kShortRow && row + a.rows_ahead < a.fetch_end) prefetch_row<V>(a, row + a.rows_ahead);
    ForwardTile<V, R, NV, Map> tile;
    tile.load(a, row);
    if (R <= kMediumRow) fetch_later(a, a.row_begin[row], a.row_end[row]);
    forward_row<V, R, NV, Map>(a, a.row_begin[row], a.row_end[row], tile.acc);
    tile.store(a, row);
  }
}

template <class V, int R, int NV>
void grad_input_tile(const TileArgs<typename V::T>& a) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  constexpr int64_t kPanel = NV * V::W;
  for (int64_t row = a.first_row; row < a.last_row; ++row) {
    Reg dy[R][NV];
    const int64_t slot = row * a.bo + a.row_offset;
    for (int r = 0; r < R; ++r) {
      const T* src = a.src + a.slot_row[slot + r] * kPanel;
      for (int n = 0; n < NV; ++n) dy[r][n] = V::load(src + n * V::W);
    }
    const int64_t begin = a.row_begin[row], end = a.row_end[row];
    const T* v = a.values + begin * a.bi * a.bo + a.row_offset;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t group = a.col_idx[b];
      const int64_t width = group == a.last_group ? a.last_width : a.bi;
      T* dx = a.dst + group * a.bi * kPanel;
      const T* vk = v;
      // The R FMAs on one dx row depend on each other; rows of different inputs do not, and an
      // out-of-order core overlaps several of them.
      for (int64_t k = 0; k < width; ++k, dx += kPanel, vk += a.bo) {
        Reg acc[NV];
        for (int n = 0; n < NV; ++n) acc[n] = V::load(dx + n * V::W);
        for (int r = 0; r < R; ++r) {
          const Reg w = V::bcast(vk[r]);
          for (int n = 0; n < NV; ++n) acc[n] = V::fma(w, dy[r][n], acc[n]);
        }
        for (int n = 0; n < NV; ++n) V::store(dx + n * V::W, acc[n]);
      }
      v += a.bi * a.bo;
    }
  }
}

// R rows x U inputs, R * U = W: the W accumulators transpose into one vector of sums.
enum class SampleMask { kNone, kX, kDy };

template <class V, int R, SampleMask kMask>
void sample_rows(const SampleArgs<typename V::T>& a, int64_t r0) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  constexpr int U = V::W / R;
  const int64_t length = a.nv * V::W, stride = a.dy_stride;
  const T* dy = a.dy + r0 * stride;
  for (int64_t q = 0; q < a.count; q += U) {
    const int64_t inputs = q + U <= a.count ? U : a.count - q;
    const T* x[U];
    for (int u = 0; u < U; ++u)  // the tail repeats the last input and drops the result
      x[u] = a.x + a.inputs[u < inputs ? q + u : a.count - 1];
    Reg acc[U * R];
    for (int i = 0; i < U * R; ++i) acc[i] = V::zero();
    for (int64_t n = 0; n < length; n += V::W) {
      Reg d[R];
      for (int r = 0; r < R; ++r) {
        d[r] = V::load(dy + r * stride + n);
        if (kMask == SampleMask::kDy) d[r] = V::keep(d[r], V::load(a.mask + n));
      }
      for (int u = 0; u < U; ++u) {
        Reg xs = V::load(x[u] + n);
        if (kMask == SampleMask::kX) xs = V::keep(xs, V::load(a.mask + n));
        for (int r = 0; r < R; ++r) acc[u * R + r] = V::fma(xs, d[r], acc[u * R + r]);
      }
    }
    V::transpose(acc);
    for (int step = V::W / 2; step > 0; step /= 2)
      for (int i = 0; i < step; ++i) acc[i] = V::add(acc[i], acc[i + step]);
    T sums[V::W];
    V::store(sums, acc[0]);
    for (int64_t u = 0; u < inputs; ++u) {
      T* out = a.dvalues + a.offsets[q + u] + r0;
      for (int r = 0; r < R; ++r)
        out[r] = a.accumulate ? out[r] + sums[u * R + r] : sums[u * R + r];
    }
  }
}

// Rows from r on.
template <class V, SampleMask kMask>
void sample_as(const SampleArgs<typename V::T>& a, int64_t r) {
  for (; r + 4 <= a.rows; r += 4) sample_rows<V, 4, kMask>(a, r);
  if (a.rows - r >= 2) sample_rows<V, 2, kMask>(a, r), r += 2;
  if (r < a.rows) sample_rows<V, 1, kMask>(a, r);
}

template <class V>
void sample(const SampleArgs<typename V::T>& a) {
  if (!a.mask)
    sample_as<V, SampleMask::kNone>(a, 0);
  else if (a.mask_dy)
    sample_as<V, SampleMask::kDy>(a, 0);
  else
    sample_as<V, SampleMask::kX>(a, 0);
}

// The same with outputs as the lanes, for blocks at least a vector high: no sums across lanes, and
// x is broadcast from memory, one load for each FMA of a vector's height.
//
//        dy, transposed (rows = tokens)    accumulators (registers)       dvalues
//        [ r0 r1 r2 ... ]  token 0   --->   U inputs x NV vectors   --->   bo values of each input
//        [ r0 r1 r2 ... ]  token 1          rank-1 update per token
//
// The panel is one run of at most kSampleTokens: its dy stays in L1 while the stored inputs of the
// block row take turns.
template <class T>
struct SampleRun {
  const T* dy;  // [tokens][NV * W]
  int64_t tokens;
  bool accumulate;
};

// U inputs: ends[u] is where x ends for this run, as the loop counts up to zero, and out[u] takes
// the sums. Not inlined, and pointers come ready-made: what GCC spills around the loop it parks in
// vector registers, where it waits behind the FMAs of the tile before.
template <class V, int U, int NV>
__attribute__((noinline)) void sample_tile(const SampleRun<typename V::T>& run,
                                           const typename V::T* const* ends,
                                           typename V::T* const* out) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  const T* x[U];
  Reg acc[U][NV];
#pragma GCC unroll 16
  for (int u = 0; u < U; ++u) {
    x[u] = ends[u];
#pragma GCC unroll 16
    for (int n = 0; n < NV; ++n) acc[u][n] = V::zero();
  }
  const T* dy = run.dy;
  for (int64_t t = -run.tokens; t < 0; ++t, dy += NV * V::W) {
    Reg d[NV];
    for (int n = 0; n < NV; ++n) d[n] = V::load(dy + n * V::W);
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) {
      const Reg xs = V::bcast(x[u][t]);
#pragma GCC unroll 16
      for (int n = 0; n < NV; ++n) acc[u][n] = V::fma(xs, d[n], acc[u][n]);
    }
  }
  if (run.accumulate) {
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u)
      for (int n = 0; n < NV; ++n) acc[u][n] = V::add(V::load(out[u] + n * V::W), acc[u][n]);
  }
#pragma GCC unroll 16
  for (int u = 0; u < U; ++u)
    for (int n = 0; n < NV; ++n) V::store(out[u] + n * V::W, acc[u][n]);
}

// Registers: U * NV accumulators, NV of dy, a broadcast (part of the FMA on AVX-512). And U
// pointers to x among the general ones: with twelve, some wait in vector registers.
template <class V, int NV>
constexpr int kSampleInputs = NV == 1 ? 10 : (V::kRegisters >= 32 ? 8 : 6);

template <class V, int NV, int U = kSampleInputs<V, NV>>
void sample_inputs(int64_t count, const SampleRun<typename V::T>& run,
                   const typename V::T* const* ends, typename V::T* const* out) {
  if (count == U)
    sample_tile<V, U, NV>(run, ends, out);
  else if constexpr (U > 1)
    sample_inputs<V, NV, U - 1>(count, run, ends, out);
}

// W tokens of W rows, transposed to dy[token][stride].
template <class V>
void sample_transpose(const typename V::T* rows, int64_t row_stride, typename V::T* dy,
                      int64_t stride) {
  typename V::Reg r[V::W];
  for (int i = 0; i < V::W; ++i) r[i] = V::load(rows + i * row_stride);
  V::transpose(r);
  for (int i = 0; i < V::W; ++i) V::store(dy + i * stride, r[i]);
}

// NV * W rows from r0 on. Stored inputs are cut into tiles of nearly equal size.
template <class V, int NV>
void sample_vectors(const SampleArgs<typename V::T>& a, int64_t r0) {
  using T = typename V::T;
  constexpr int U = kSampleInputs<V, NV>;
  constexpr int64_t kRows = NV * V::W;
  alignas(64) T dy[kSampleTokens * kRows];
  const SampleRun<T> run{dy, a.nv * V::W, a.accumulate};
  for (int64_t t = 0; t < run.tokens; t += V::W)
    for (int n = 0; n < NV; ++n)
      sample_transpose<V>(a.dy + (r0 + n * V::W) * a.dy_stride + t, a.dy_stride,
                          dy + t * kRows + n * V::W, kRows);
  const int64_t tiles = (a.count + U - 1) / U;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t q = a.count * tile / tiles, count = a.count * (tile + 1) / tiles - q;
    const T* ends[U];
    T* out[U];
    for (int64_t u = 0; u < count; ++u) {
      ends[u] = a.x + a.inputs[q + u] + run.tokens;
      out[u] = a.dvalues + a.offsets[q + u] + r0;
      for (int n = 0; n < NV; ++n) __builtin_prefetch(out[u] + n * V::W, 1);
    }
    sample_inputs<V, NV>(count, run, ends, out);
  }
}

// Rows beyond the last whole vector keep tokens as the lanes.
template <class V>
void sample_tall(const SampleArgs<typename V::T>& a) {
  int64_t r = 0;
  for (; r + 2 * V::W <= a.rows; r += 2 * V::W) sample_vectors<V, 2>(a, r);
  for (; r + V::W <= a.rows; r += V::W) sample_vectors<V, 1>(a, r);
  sample_as<V, SampleMask::kNone>(a, r);
}

// W tokens x W inputs, transposed in registers. `rows` tokens and `cols` inputs exist; a full block
// is its own instantiation, without a branch or a mask.
template <class V, bool kFull>
void pack_block(const typename V::T* x, int64_t ldx, int64_t rows, int64_t cols,
                const int32_t* dst_row, int64_t first, typename V::T* panel, int64_t stride) {
  typename V::Reg r[V::W];
  for (int t = 0; t < V::W; ++t) {
    if (kFull)
      r[t] = V::load(x + t * ldx);
    else
      r[t] = t < rows ? V::load_n(x + t * ldx, cols) : V::zero();
  }
  V::transpose(r);
  if (dst_row) {
    for (int c = 0; c < V::W; ++c)
      if (kFull || c < cols) V::store(panel + dst_row[first + c] * stride, r[c]);
  } else {
    for (int c = 0; c < V::W; ++c)
      if (kFull || c < cols) V::store(panel + (first + c) * stride, r[c]);
  }
}

template <class V>
void pack(const typename V::T* x, int64_t ldx, int64_t tokens, int64_t begin, int64_t end,
          const int32_t* dst_row, typename V::T* panel, int64_t nv) {
  const int64_t stride = nv * V::W;
  for (int64_t n = 0; n < nv; ++n) {
    const int64_t left = tokens - n * V::W;
    const int64_t rows = left >= V::W ? V::W : (left > 0 ? left : 0);
    const typename V::T* base = x + n * V::W * ldx;
    typename V::T* out = panel + n * V::W;
    int64_t i = begin;
    if (rows == V::W)
      for (; i + V::W <= end; i += V::W)
        pack_block<V, true>(base + i, ldx, V::W, V::W, dst_row, i, out, stride);
    for (; i < end; i += V::W)
      pack_block<V, false>(base + i, ldx, rows, end - i < V::W ? end - i : V::W, dst_row, i, out,
                           stride);
  }
}

// The way back, with bias and activation.
template <class V, Activation kAct, bool kFull>
void unpack_block(const typename V::T* panel, int64_t stride, int64_t rows, int64_t cols,
                  const int32_t* src_row, int64_t first, const typename V::T* bias,
                  typename V::T* y, int64_t ldy) {
  typename V::Reg r[V::W];
  if (src_row) {
    for (int c = 0; c < V::W; ++c)
      r[c] = kFull || c < cols ? V::load(panel + src_row[first + c] * stride) : V::zero();
  } else {
    for (int c = 0; c < V::W; ++c)
      r[c] = kFull || c < cols ? V::load(panel + (first + c) * stride) : V::zero();
  }
  V::transpose(r);
  // Outputs are the lanes now: one bias vector serves all tokens.
  const typename V::Reg b = !bias   ? V::zero()
                            : kFull ? V::load(bias + first)
                                    : V::load_n(bias + first, cols);
  for (int t = 0; t < V::W; ++t) {
    if (!kFull && t >= rows) break;
    typename V::Reg v = r[t];
    if (bias) v = V::add(v, b);
    v = activate<V>(v, kAct);
    if (kFull)
      V::store(y + t * ldy, v);
    else
      V::store_n(y + t * ldy, v, cols);
  }
}

// Full blocks go through a buffer, kRun of them side by side, so that y is written a run of lines
// at a time. Block by block, the W lines that a store touches fall into one set of L1 wherever the
// rows of y lie a multiple of 4 KiB apart, and evict each other (4096 outputs on Zen 5: 0.32 cycles
// an element with the buffer, 0.62 without; 1536 outputs: 0.29 and 0.28).
template <class V, Activation kAct>
void unpack_as(const typename V::T* panel, int64_t nv, int64_t tokens, int64_t begin, int64_t end,
               const int32_t* src_row, const typename V::T* bias, typename V::T* y, int64_t ldy) {
  using T = typename V::T;
  constexpr int64_t kRun = 8, kRunOutputs = kRun * V::W;
  alignas(64) T buffer[V::W * kRunOutputs];
  const int64_t stride = nv * V::W;
  for (int64_t n = 0; n * V::W < tokens; ++n) {
    const int64_t left = tokens - n * V::W;
    const int64_t rows = left >= V::W ? V::W : left;
    T* base = y + n * V::W * ldy;
    const T* in = panel + n * V::W;
    int64_t i = begin;
    if (rows == V::W) {
      for (; i + kRunOutputs <= end; i += kRunOutputs) {
        for (int64_t q = 0; q < kRunOutputs; q += V::W)
          unpack_block<V, kAct, true>(in, stride, V::W, V::W, src_row, i + q, bias, buffer + q,
                                      kRunOutputs);
        for (int t = 0; t < V::W; ++t)
          for (int64_t q = 0; q < kRunOutputs; q += V::W)
            V::store(base + t * ldy + i + q, V::load(buffer + t * kRunOutputs + q));
      }
      for (; i + V::W <= end; i += V::W)
        unpack_block<V, kAct, true>(in, stride, V::W, V::W, src_row, i, bias, base + i, ldy);
    }
    for (; i < end; i += V::W)
      unpack_block<V, kAct, false>(in, stride, rows, end - i < V::W ? end - i : V::W, src_row, i,
                                   bias, base + i, ldy);
  }
}

template <class V>
void unpack(const typename V::T* panel, int64_t nv, int64_t tokens, int64_t begin, int64_t end,
            const int32_t* src_row, const typename V::T* bias, Activation act, typename V::T* y,
            int64_t ldy) {
  using Fn = void (*)(const typename V::T*, int64_t, int64_t, int64_t, int64_t, const int32_t*,
                      const typename V::T*, typename V::T*, int64_t);
  static constexpr Fn kByActivation[] = {
      unpack_as<V, Activation::kNone>, unpack_as<V, Activation::kRelu>,
      unpack_as<V, Activation::kGelu>, unpack_as<V, Activation::kGeluTanh>,
      unpack_as<V, Activation::kSilu>};
  kByActivation[static_cast<int>(act)](panel, nv, tokens, begin, end, src_row, bias, y, ldy);
}

template <class V>
void epilogue(typename V::T* y, int64_t n, const typename V::T* bias, Activation act) {
  for (int64_t i = 0; i < n; i += V::W) {
    const int64_t lanes = n - i >= V::W ? V::W : n - i;
    typename V::Reg r = V::load_n(y + i, lanes);
    if (bias) r = V::add(r, V::load_n(bias + i, lanes));
    V::store_n(y + i, activate<V>(r, act), lanes);
  }
}

// ascending_in_range of core/check.h, compiled for the instruction set.
template <class V>
bool ascending(const int32_t* idx, int64_t count, int64_t limit) {
  if (count == 0) return true;
  int bad = (idx[0] < 0) | (idx[count - 1] >= limit);
  for (int64_t i = 1; i < count; ++i) bad |= idx[i] <= idx[i - 1];
  return !bad;
}

// How far ahead of their use one token's values are fetched, and the column indices of blocks one
// input wide: into L2 early enough for memory, into L1 when they are next. L1 has a buffer for each
// line on its way, too few of them for memory's latency (16 KiB ahead into L1 alone, on Zen 4: 12
// GB/s of 4x1 blocks instead of 17); without the second fetch, 1x1 blocks lose 10 %.
constexpr int64_t kStreamToL2 = 32768, kStreamToL1 = 1024;  // bytes

template <class T>
inline void fetch_twice(const T* at, int64_t to_l2, int64_t to_l1) {
  __builtin_prefetch(at + to_l2, 0, 2);
  __builtin_prefetch(at + to_l1);
}

// The last inputs of a row have to be fetched for as well: a line that is not, in each row, costs
// 1x1 blocks a quarter of their speed.
template <class T>
inline void fetch_stream(const T* at, int64_t count) {
  for (int64_t line = 0; line < count; line += kLine<T>)
    fetch_twice(at + line, kStreamToL2 / sizeof(T), kStreamToL1 / sizeof(T));
}

// One token: G groups of N rows of a block are the lanes, and the values stream through once. Four
// or more accumulators hide the latency of the FMA.
template <class V, int N, int G>
void matvec_rows(const TileArgs<typename V::T>& a, int64_t row, int64_t r0) {
  using T = typename V::T;
  using L = typename V::template Lanes<N>;
  constexpr int U = G >= 4 ? 1 : 4 / G;
  typename L::Reg acc[U][G];
  for (int u = 0; u < U; ++u)
    for (int g = 0; g < G; ++g) acc[u][g] = L::zero();
  const T* const src = a.src;
  const int64_t bo = a.bo, begin = a.row_begin[row], end = a.row_end[row];
  const T* v = a.values + begin * a.bi * bo + r0;
  const auto step = [&](T x, const T* w, int u) {
    for (int g = 0; g < G; ++g) acc[u][g] = L::fma(x, w + g * N, acc[u][g]);
  };
  if (a.bi == 1) {
    int64_t b = begin;
    const int64_t to_l1 = kStreamToL1 / (bo * static_cast<int64_t>(sizeof(T)));
    const int64_t to_l2 = kStreamToL2 / kStreamToL1 * to_l1;
    for (; b + U <= end; b += U, v += U * bo) {
      fetch_stream(v, U * G * N);
      fetch_twice(a.col_idx + b, to_l2, to_l1);
      for (int u = 0; u < U; ++u) step(src[a.col_idx[b + u]], v + u * bo, u);
    }
    fetch_stream(v, (end - b) * G * N);
    for (; b < end; ++b, v += bo) step(src[a.col_idx[b]], v, 0);
  } else {
    for (int64_t b = begin; b < end; ++b, v += a.bi * bo) {
      const int64_t group = a.col_idx[b];
      const int64_t width = group == a.last_group ? a.last_width : a.bi;
      const T* x = src + group * a.bi;
      int64_t k = 0;
      for (; k + U <= width; k += U) {
        fetch_stream(v + k * bo, U * G * N);
        for (int u = 0; u < U; ++u) step(x[k + u], v + (k + u) * bo, u);
      }
      if (k < width) fetch_stream(v + k * bo, (width - k) * G * N);
      for (; k < width; ++k) step(x[k], v + k * bo, 0);
    }
  }
  const int64_t slot = row * bo + r0;
  for (int g = 0; g < G; ++g) {
    for (int u = 1; u < U; ++u) acc[0][g] = L::add(acc[0][g], acc[u][g]);
    T sums[N];
    L::store(sums, acc[0][g]);
    for (int r = 0; r < N; ++r) {
      const int64_t s = slot + g * N + r;
      a.dst[a.slot_row[s]] = sums[r];
    }
  }
}

// Blocks of 1x1 (N = 1): the stored inputs are the lanes, their x gathered.
template <class V>
void matvec_elements(const TileArgs<typename V::T>& a, int64_t row) {
  using T = typename V::T;
  typename V::Reg acc[2] = {V::zero(), V::zero()};
  int64_t b = a.row_begin[row];
  const int64_t end = a.row_end[row];
  for (; b + 2 * V::W <= end; b += 2 * V::W) {
    fetch_stream(a.values + b, 2 * V::W);
    fetch_stream(a.col_idx + b, 2 * V::W);
    for (int u = 0; u < 2; ++u)
      acc[u] = V::fma(V::gather(a.src, a.col_idx + b + u * V::W), V::load(a.values + b + u * V::W),
                      acc[u]);
  }
  fetch_stream(a.values + b, end - b);
  fetch_stream(a.col_idx + b, end - b);
  if (b + V::W <= end) {
    acc[0] = V::fma(V::gather(a.src, a.col_idx + b), V::load(a.values + b), acc[0]);
    b += V::W;
  }
  T sum[2] = {V::sum(V::add(acc[0], acc[1])), 0};
  for (; b + 2 <= end; b += 2)
    for (int u = 0; u < 2; ++u) sum[u] += a.src[a.col_idx[b + u]] * a.values[b + u];
  if (b < end) sum[0] += a.src[a.col_idx[b]] * a.values[b];
  a.dst[a.slot_row[row]] = sum[0] + sum[1];
}

// Cuts a block's height into 4 W, 2 W, W, W/2, ... 1 rows.
template <class V, int N = V::W, int G = 4>
void matvec_block(const TileArgs<typename V::T>& a, int64_t row, int64_t r0) {
  for (; r0 + N * G <= a.block_rows_valid; r0 += N * G) matvec_rows<V, N, G>(a, row, r0);
  if constexpr (G > 1)
    matvec_block<V, N, G / 2>(a, row, r0);
  else if constexpr (N > 1)
    matvec_block<V, N / 2, 1>(a, row, r0);
}

template <class V>
void matvec(const TileArgs<typename V::T>& a) {
  const bool elements = a.bo == 1 && a.bi == 1;
  for (int64_t row = a.first_row; row < a.last_row; ++row) {
    if (elements)
      matvec_elements<V>(a, row);
    else
      matvec_block<V>(a, row, 0);
  }
}

template <class V>
double fma_chain(int64_t iterations) {
  constexpr int kChains = 12;  // latency 4, two a cycle: 8 would do
  typename V::Reg acc[kChains];
  for (int c = 0; c < kChains; ++c) acc[c] = V::bcast(static_cast<typename V::T>(c));
  const typename V::Reg x = V::bcast(static_cast<typename V::T>(0.5));
  for (int64_t i = 0; i < iterations; ++i)
    for (int c = 0; c < kChains; ++c) acc[c] = V::fma(acc[c], x, x);
  typename V::Reg sum = acc[0];
  for (int c = 1; c < kChains; ++c) sum = V::add(sum, acc[c]);
  volatile typename V::T keep = V::sum(sum);  // the result must be wanted
  (void)keep;
  return 2.0 * V::W * kChains * static_cast<double>(iterations);
}

}  // namespace tetris::cpu
