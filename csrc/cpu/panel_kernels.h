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

template <class V, int R, int NV>
void forward_tile(const TileArgs<typename V::T>& a) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  constexpr int64_t kPanel = NV * V::W;
  for (int64_t row = a.row_begin; row < a.row_end; ++row) {
    Reg acc[R][NV];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < NV; ++n) acc[r][n] = V::zero();

    const int64_t begin = a.row_ptr[row], end = a.row_ptr[row + 1];
    const T* v = a.values + begin * a.bi * a.bo + a.row_offset;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t group = a.col_idx[b];
      const int64_t width = group == a.last_group ? a.last_width : a.bi;
      const T* x = a.src + group * a.bi * kPanel;
      const T* vk = v;
      for (int64_t k = 0; k < width; ++k, x += kPanel, vk += a.bo) {
        Reg xs[NV];
        for (int n = 0; n < NV; ++n) xs[n] = V::load(x + n * V::W);
        for (int r = 0; r < R; ++r) {
          const Reg w = V::bcast(vk[r]);
          for (int n = 0; n < NV; ++n) acc[r][n] = V::fma(w, xs[n], acc[r][n]);
        }
      }
      v += a.bi * a.bo;
    }

    const int64_t slot = row * a.bo + a.row_offset;
    for (int r = 0; r < R; ++r) {
      T* y = a.dst + (a.slot_row ? a.slot_row[slot + r] : slot + r) * kPanel;
      for (int n = 0; n < NV; ++n) V::store(y + n * V::W, acc[r][n]);
    }
  }
}

template <class V, int R, int NV>
void grad_input_tile(const TileArgs<typename V::T>& a) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  constexpr int64_t kPanel = NV * V::W;
  for (int64_t row = a.row_begin; row < a.row_end; ++row) {
    Reg dy[R][NV];
    const int64_t slot = row * a.bo + a.row_offset;
    for (int r = 0; r < R; ++r) {
      const T* src = a.src + (a.slot_row ? a.slot_row[slot + r] : slot + r) * kPanel;
      for (int n = 0; n < NV; ++n) dy[r][n] = V::load(src + n * V::W);
    }
    const int64_t begin = a.row_ptr[row], end = a.row_ptr[row + 1];
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

// W rows of tokens, W columns at a time, transposed in registers.
template <class V>
void pack(const typename V::T* x, int64_t ldx, int64_t tokens, int64_t begin, int64_t end,
          const int32_t* dst_row, typename V::T* panel, int64_t nv) {
  using Reg = typename V::Reg;
  const int64_t stride = nv * V::W;
  for (int64_t n = 0; n < nv; ++n) {
    const int64_t left = tokens - n * V::W;
    const int64_t rows = left >= V::W ? V::W : (left > 0 ? left : 0);
    const typename V::T* base = x + n * V::W * ldx;
    for (int64_t i = begin; i < end; i += V::W) {
      const int64_t cols = end - i >= V::W ? V::W : end - i;
      Reg r[V::W];
      if (rows == V::W && cols == V::W) {
        for (int t = 0; t < V::W; ++t) r[t] = V::load(base + t * ldx + i);
      } else {
        for (int t = 0; t < V::W; ++t)
          r[t] = t < rows ? V::load_n(base + t * ldx + i, cols) : V::zero();
      }
      V::transpose(r);
      typename V::T* out = panel + n * V::W;
      if (cols == V::W) {
        for (int c = 0; c < V::W; ++c)
          V::store(out + (dst_row ? dst_row[i + c] : i + c) * stride, r[c]);
      } else {
        for (int c = 0; c < V::W; ++c)
          if (c < cols) V::store(out + (dst_row ? dst_row[i + c] : i + c) * stride, r[c]);
      }
    }
  }
}

template <class V, Activation kAct>
void unpack_as(const typename V::T* panel, int64_t nv, int64_t tokens, int64_t begin, int64_t end,
               const int32_t* src_row, const typename V::T* bias, typename V::T* y, int64_t ldy) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  const int64_t stride = nv * V::W;
  for (int64_t n = 0; n * V::W < tokens; ++n) {
    const int64_t left = tokens - n * V::W;
    const int64_t rows = left >= V::W ? V::W : left;
    T* base = y + n * V::W * ldy;
    for (int64_t i = begin; i < end; i += V::W) {
      const int64_t cols = end - i >= V::W ? V::W : end - i;
      Reg r[V::W];
      for (int c = 0; c < V::W; ++c) {
        const int64_t o = c < cols ? i + c : i;
        r[c] = V::load(panel + (src_row ? src_row[o] : o) * stride + n * V::W);
        if (bias) r[c] = V::add(r[c], V::bcast(bias[o]));
        r[c] = activate<V>(r[c], kAct);
      }
      V::transpose(r);
      if (rows == V::W && cols == V::W) {
        for (int t = 0; t < V::W; ++t) V::store(base + t * ldy + i, r[t]);
      } else {
        for (int t = 0; t < V::W; ++t)
          if (t < rows) V::store_n(base + t * ldy + i, r[t], cols);
      }
    }
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

// One token: up to W rows of a block are the lanes, and the values stream through once. Four
// accumulators hide the latency of the FMA.
template <class V>
void matvec_rows(const TileArgs<typename V::T>& a, int64_t row, int64_t r0, int64_t rows) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  Reg acc[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  const int64_t begin = a.row_ptr[row], end = a.row_ptr[row + 1];
  const T* v = a.values + begin * a.bi * a.bo + r0;
  auto step = [&](int64_t input, const T* w, Reg& sum) {
    sum = V::fma(V::bcast(a.src[input]), V::load_n(w, rows), sum);
  };
  if (a.bi == 1) {
    int64_t b = begin;
    for (; b + 4 <= end; b += 4, v += 4 * a.bo)
      for (int u = 0; u < 4; ++u) step(a.col_idx[b + u], v + u * a.bo, acc[u]);
    for (; b < end; ++b, v += a.bo) step(a.col_idx[b], v, acc[0]);
  } else {
    for (int64_t b = begin; b < end; ++b, v += a.bi * a.bo) {
      const int64_t group = a.col_idx[b];
      const int64_t width = group == a.last_group ? a.last_width : a.bi;
      int64_t k = 0;
      for (; k + 4 <= width; k += 4)
        for (int u = 0; u < 4; ++u) step(group * a.bi + k + u, v + (k + u) * a.bo, acc[u]);
      for (; k < width; ++k) step(group * a.bi + k, v + k * a.bo, acc[0]);
    }
  }
  T sums[V::W];
  V::store(sums, V::add(V::add(acc[0], acc[1]), V::add(acc[2], acc[3])));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t slot = row * a.bo + r0 + r;
    a.dst[a.slot_row ? a.slot_row[slot] : slot] = sums[r];
  }
}

template <class V>
void matvec(const TileArgs<typename V::T>& a) {
  for (int64_t row = a.row_begin; row < a.row_end; ++row)
    for (int64_t r = 0; r < a.block_rows_valid; r += V::W)
      matvec_rows<V>(a, row, r,
                     a.block_rows_valid - r >= V::W ? V::W : a.block_rows_valid - r);
}

}  // namespace tetris::cpu
