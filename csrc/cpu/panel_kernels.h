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

// The tile of one block row, set from and stored to the y panel.
template <class V, int R, int NV>
struct ForwardTile {
  typename V::T* y[R];
  typename V::Reg acc[R][NV];

  explicit ForwardTile(const TileArgs<typename V::T>& a, int64_t row) {
    const int64_t slot = row * a.bo + a.row_offset;
    for (int r = 0; r < R; ++r)
      y[r] = a.dst + (a.slot_row ? a.slot_row[slot + r] : slot + r) * (NV * V::W);
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

// A tile of few accumulators would wait for the latency of its FMAs (4 cycles, 1 or 2 a cycle), so
// for blocks one input wide several block rows go side by side, as far as the shortest.
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
    (forward_input<V, R, NV>(a.src + col[M][i] * int64_t{NV * V::W}, v[M] + i * a.bo, tile[M].acc),
     ...);
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
      for (; row + 2 <= a.last_row; row += 2)
        forward_side_by_side<V, R, NV>(a, row, RowSet<0, 1>());
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
      for (int r = 0; r < R; ++r)
        out[r] = a.accumulate ? out[r] + sums[u * R + r] : sums[u * R + r];
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

// How far ahead of its use one token's stream of values is fetched, for blocks of one or two rows
// (2x1, half kept, 4096x4096: 3.4 to 4.7 GFLOP/s). For taller ones no gain was seen.
constexpr int64_t kStreamAheadBytes = 4096;

// One token: G groups of N rows of a block are the lanes, and the values stream through once. Four
// or more accumulators hide the latency of the FMA.
template <class V, int N, int G>
void matvec_rows(const TileArgs<typename V::T>& a, int64_t row, int64_t r0) {
  using T = typename V::T;
  using L = typename V::template Lanes<N>;
  constexpr int U = G >= 4 ? 1 : 4 / G;
  constexpr int64_t kAhead = kStreamAheadBytes / sizeof(T);
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
    for (; b + U <= end; b += U, v += U * bo) {
      if (N <= 2) __builtin_prefetch(v + kAhead);
      for (int u = 0; u < U; ++u) step(src[a.col_idx[b + u]], v + u * bo, u);
    }
    for (; b < end; ++b, v += bo) step(src[a.col_idx[b]], v, 0);
  } else {
    for (int64_t b = begin; b < end; ++b, v += a.bi * bo) {
      const int64_t group = a.col_idx[b];
      const int64_t width = group == a.last_group ? a.last_width : a.bi;
      const T* x = src + group * a.bi;
      int64_t k = 0;
      for (; k + U <= width; k += U)
        for (int u = 0; u < U; ++u) step(x[k + u], v + (k + u) * bo, u);
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
      a.dst[a.slot_row ? a.slot_row[s] : s] = sums[r];
    }
  }
}

// Blocks of 1x1 (N = 1): the stored inputs are the lanes, their x gathered.
template <class V>
void matvec_elements(const TileArgs<typename V::T>& a, int64_t row) {
  using T = typename V::T;
  constexpr int64_t kAhead = kStreamAheadBytes / sizeof(T);
  typename V::Reg acc[2] = {V::zero(), V::zero()};
  int64_t b = a.row_begin[row];
  const int64_t end = a.row_end[row];
  for (; b + 2 * V::W <= end; b += 2 * V::W) {
    __builtin_prefetch(a.values + b + kAhead);
    __builtin_prefetch(a.values + b + kAhead + V::W);
    for (int u = 0; u < 2; ++u)
      acc[u] = V::fma(V::gather(a.src, a.col_idx + b + u * V::W), V::load(a.values + b + u * V::W),
                      acc[u]);
  }
  T sum = V::sum(V::add(acc[0], acc[1]));
  for (; b < end; ++b) sum += a.src[a.col_idx[b]] * a.values[b];
  a.dst[a.slot_row ? a.slot_row[row] : row] = sum;
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
