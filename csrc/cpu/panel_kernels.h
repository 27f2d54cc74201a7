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
// Tokens are the lanes, so neither the block's width nor its alignment matters, and both
// permutations cost nothing: they choose which panel row is read or written.
//
// Sums run over stored inputs in stored order, one accumulator per output, whatever the tile: the
// forward is bit-identical for any split over tokens or threads.
#pragma once

#include "cpu/activations.h"
#include "cpu/kernels.h"

namespace tetris::cpu {

// One stored input into the accumulators of a tile: x is its panel row, v its R weights.
template <class V, int R, int NV>
inline void forward_input(const typename V::T* x, const typename V::T* v, typename V::Reg (&acc)[R][NV]) {
  typename V::Reg xs[NV];
  for (int n = 0; n < NV; ++n) xs[n] = V::load(x + n * V::W);
  for (int r = 0; r < R; ++r) {
    const typename V::Reg w = V::bcast(v[r]);
    for (int n = 0; n < NV; ++n) acc[r][n] = V::fma(w, xs[n], acc[r][n]);
  }
}

// The tile of one block row, set from and stored to the y panel.
template <class V, int R, int NV>
struct ForwardTile {
  typename V::T* y[R];
  typename V::Reg acc[R][NV];

  explicit ForwardTile(const TileArgs<typename V::T>& a, int64_t row) {
    const int64_t slot = row * a.bo + a.row_offset;
    for (int r = 0; r < R; ++r) y[r] = a.dst + (a.slot_row ? a.slot_row[slot + r] : slot + r) * (NV * V::W);
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < NV; ++n) acc[r][n] = a.accumulate ? V::load(y[r] + n * V::W) : V::zero();
  }
  void store() {
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < NV; ++n) V::store(y[r] + n * V::W, acc[r][n]);
  }
};

// Stored blocks [b, end) of a row, or those before group_limit. Returns where it stopped.
template <class V, int R, int NV>
inline int64_t forward_row(const TileArgs<typename V::T>& a, int64_t b, int64_t end,
                           typename V::Reg (&acc)[R][NV]) {
  using T = typename V::T;
  constexpr int64_t kPanel = NV * V::W;
  const T* v = a.values + b * a.bi * a.bo + a.row_offset;
  for (; b < end; ++b) {
    const int64_t group = a.col_idx[b];
    if (group >= a.group_limit) break;
    const int64_t width = group == a.last_group ? a.last_width : a.bi;
    const T* x = a.src + group * a.bi * kPanel;
    const T* vk = v;
    for (int64_t k = 0; k < width; ++k, x += kPanel, vk += a.bo) {
      __builtin_prefetch(vk + a.prefetch, 0, 2);
      forward_input<V, R, NV>(x, vk, acc);
    }
    v += a.bi * a.bo;
  }
  return b;
}

template <int... M>
struct RowSet {};

// A tile of few accumulators would wait for the latency of its FMAs (4 cycles, 1 or 2 a cycle), so for
// blocks one input wide several block rows go side by side, as far as the shortest.
template <class V, int R, int NV, int... M>
void forward_side_by_side(const TileArgs<typename V::T>& a, int64_t row, RowSet<M...>) {
  using T = typename V::T;
  ForwardTile<V, R, NV> tile[] = {ForwardTile<V, R, NV>(a, row + M)...};
  const int32_t* const col[] = {a.col_idx + a.row_begin[row + M]...};
  const T* const v[] = {a.values + a.row_begin[row + M] * a.bo + a.row_offset...};
  const int64_t count[] = {(a.row_end[row + M] - a.row_begin[row + M])...};
  int64_t shortest = count[0];
  ((shortest = count[M] < shortest ? count[M] : shortest), ...);
  for (int64_t i = 0; i < shortest; ++i)
    (forward_input<V, R, NV>(a.src + col[M][i] * int64_t{NV * V::W}, v[M] + i * a.bo, tile[M].acc), ...);
  (forward_row<V, R, NV>(a, a.row_begin[row + M] + shortest, a.row_end[row + M], tile[M].acc), ...);
  (tile[M].store(), ...);
}

template <class V, int R, int NV>
void forward_tile(const TileArgs<typename V::T>& a) {
  int64_t row = a.first_row;
  if (a.bi == 1 && !a.row_stop) {
    if constexpr (R * NV <= 2)
      for (; row + 4 <= a.last_row; row += 4)
        forward_side_by_side<V, R, NV>(a, row, RowSet<0, 1, 2, 3>());
    else if constexpr (R * NV <= 4)
      for (; row + 2 <= a.last_row; row += 2) forward_side_by_side<V, R, NV>(a, row, RowSet<0, 1>());
  }
  for (; row < a.last_row; ++row) {
    ForwardTile<V, R, NV> tile(a, row);
    const int64_t stop = forward_row<V, R, NV>(a, a.row_begin[row], a.row_end[row], tile.acc);
    if (a.row_stop) a.row_stop[row] = static_cast<int32_t>(stop);
    tile.store();
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
      const T* src = a.src + (a.slot_row ? a.slot_row[slot + r] : slot + r) * kPanel;
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
template <class V, int R>
void sample_rows(const SampleArgs<typename V::T>& a, int64_t r0) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  constexpr int U = V::W / R;
  const int64_t stride = a.nv * V::W;
  const T* dy = a.dy + r0 * stride;
  for (int64_t q = 0; q < a.count; q += U) {
    const int64_t inputs = q + U <= a.count ? U : a.count - q;
    const T* x[U];
    for (int u = 0; u < U; ++u)  // the tail repeats the last input and drops the result
      x[u] = a.x + a.inputs[u < inputs ? q + u : a.count - 1] * stride;
    Reg acc[U * R];
    for (int i = 0; i < U * R; ++i) acc[i] = V::zero();
    for (int64_t n = 0; n < stride; n += V::W) {
      Reg d[R];
      for (int r = 0; r < R; ++r) d[r] = V::load(dy + r * stride + n);
      for (int u = 0; u < U; ++u) {
        const Reg xs = V::load(x[u] + n);
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
      for (int r = 0; r < R; ++r) out[r] = a.accumulate ? out[r] + sums[u * R + r] : sums[u * R + r];
    }
  }
}

template <class V>
void sample(const SampleArgs<typename V::T>& a) {
  int64_t r = 0;
  for (; r + 4 <= a.rows; r += 4) sample_rows<V, 4>(a, r);
  if (a.rows - r >= 2) sample_rows<V, 2>(a, r), r += 2;
  if (r < a.rows) sample_rows<V, 1>(a, r);
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
  const typename V::Reg b = !bias ? V::zero() : kFull ? V::load(bias + first) : V::load_n(bias + first, cols);
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

template <class V, Activation kAct>
void unpack_as(const typename V::T* panel, int64_t nv, int64_t tokens, int64_t begin, int64_t end,
               const int32_t* src_row, const typename V::T* bias, typename V::T* y, int64_t ldy) {
  const int64_t stride = nv * V::W;
  for (int64_t n = 0; n * V::W < tokens; ++n) {
    const int64_t left = tokens - n * V::W;
    const int64_t rows = left >= V::W ? V::W : left;
    typename V::T* base = y + n * V::W * ldy;
    const typename V::T* in = panel + n * V::W;
    int64_t i = begin;
    if (rows == V::W)
      for (; i + V::W <= end; i += V::W)
        unpack_block<V, kAct, true>(in, stride, V::W, V::W, src_row, i, bias, base + i, ldy);
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

// One token: N rows of a block are the lanes, and the values stream through once. Four accumulators
// hide the latency of the FMA.
template <class V, int N>
void matvec_rows(const TileArgs<typename V::T>& a, int64_t row, int64_t r0) {
  using T = typename V::T;
  using L = typename V::template Lanes<N>;
  typename L::Reg acc[4] = {L::zero(), L::zero(), L::zero(), L::zero()};
  const int64_t begin = a.row_begin[row], end = a.row_end[row];
  const T* v = a.values + begin * a.bi * a.bo + r0;
  if (a.bi == 1) {
    int64_t b = begin;
    for (; b + 4 <= end; b += 4, v += 4 * a.bo)
      for (int u = 0; u < 4; ++u) acc[u] = L::fma(a.src[a.col_idx[b + u]], v + u * a.bo, acc[u]);
    for (; b < end; ++b, v += a.bo) acc[0] = L::fma(a.src[a.col_idx[b]], v, acc[0]);
  } else {
    for (int64_t b = begin; b < end; ++b, v += a.bi * a.bo) {
      const int64_t group = a.col_idx[b];
      const int64_t width = group == a.last_group ? a.last_width : a.bi;
      const T* x = a.src + group * a.bi;
      int64_t k = 0;
      for (; k + 4 <= width; k += 4)
        for (int u = 0; u < 4; ++u) acc[u] = L::fma(x[k + u], v + (k + u) * a.bo, acc[u]);
      for (; k < width; ++k) acc[0] = L::fma(x[k], v + k * a.bo, acc[0]);
    }
  }
  T sums[N];
  L::store(sums, L::add(L::add(acc[0], acc[1]), L::add(acc[2], acc[3])));
  const int64_t slot = row * a.bo + r0;
  for (int r = 0; r < N; ++r) a.dst[a.slot_row ? a.slot_row[slot + r] : slot + r] = sums[r];
}

// Cuts a block's height into W, W/2, ... 1 lanes.
template <class V, int N = V::W>
int64_t matvec_block(const TileArgs<typename V::T>& a, int64_t row, int64_t r0) {
  for (; r0 + N <= a.block_rows_valid; r0 += N) matvec_rows<V, N>(a, row, r0);
  if constexpr (N > 1)
    return matvec_block<V, N / 2>(a, row, r0);
  else
    return r0;
}

template <class V>
void matvec(const TileArgs<typename V::T>& a) {
  for (int64_t row = a.first_row; row < a.last_row; ++row) matvec_block<V>(a, row, 0);
}

}  // namespace tetris::cpu
