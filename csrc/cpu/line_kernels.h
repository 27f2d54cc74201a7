// Feature maps to lines and back, for convolutions.
//
// A line is one channel of a feature map laid out for the tiles: rows of pixels behind each other,
// with as many zeros between them as padding asks for. What exists are segments; pack_lines copies
// them and clears the rest, store_lines writes an output's segments to where they belong and drops
// the rest.
//
// Both memory formats of a map pass through here: with pixels next to each other (NCHW) lines are
// copied, with channels next to each other (channels_last) W lines at a time are transposed in
// registers.
//
// Whole vectors are written to lines, up to W - 1 numbers too many, in ascending order: what
// follows overwrites them, and a line's end has room for them.
#pragma once

#include "cpu/panel_kernels.h"

namespace tetris::cpu {

// `count` pixels, `step` apart, and zeros behind them up to the end of a vector (none where they
// lie more than two apart); how many numbers that are.
template <class V>
int64_t copy_pixels(const typename V::T* in, int64_t step, int64_t count, typename V::T* line) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + V::W <= count; i += V::W) V::store(line + i, V::load(in + i));
    if (i == count) return count;
    V::store(line + i, V::load_n(in + i, count - i));
    return i + V::W;
  }
  if (step == 2) {
    for (; i + V::W < count; i += V::W)  // reads one number past the last pixel: not at the end
      V::store(line + i, V::every_second(V::load(in + 2 * i), V::load(in + 2 * i + V::W)));
    const int64_t left = 2 * (count - i) - 1;
    const typename V::Reg low = left < V::W ? V::load_n(in + 2 * i, left) : V::load(in + 2 * i);
    V::store(
        line + i,
        V::every_second(low, left <= V::W ? V::zero() : V::load_n(in + 2 * i + V::W, left - V::W)));
    return i + V::W;
  }
  for (; i < count; ++i) line[i] = in[i * step];
  return count;
}

template <class V>
void clear_line(typename V::T* line, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += V::W) V::store(line + i, V::zero());
}

// What packing and storing fetch ahead goes into L2: L1 has too few buffers for cache lines on
// their way from memory, and with channels last 64 to 256 channels of 56x56 pixels, with a
// residual, are slower then than without fetching.
template <class T>
inline void fetch_run(const T* at, int64_t count) {
  for (int64_t i = 0; i < count; i += kLine<T>) __builtin_prefetch(at + i, 0, 2);
}

// A cache line of each of some pixels, which lie too far apart for the hardware to see a run.
template <class T>
inline void fetch_pixels(const T* at, int64_t count, int64_t step) {
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(at + i * step, 0, 2);
}
// So many pixels ahead: packing goes along the pixels, storing along the channels. Half as many for
// packing, or twice as many for storing, are as good.
constexpr int64_t kPackAhead = 64, kStoreAhead = 16;

// Runs of a channel are too short for the hardware to fetch ahead: 3x3, 64 channels of 224x224
// pixels, 10 % kept 124 GFLOP/s with this and 111 without (Zen 5, into L1). Farther ahead is no
// better.
constexpr int64_t kChannelsAhead = 2;

template <class V>
void pack_lines_by_row(const LineArgs<typename V::T>& a) {
  using T = typename V::T;
  for (int64_t c = a.begin; c < a.end; ++c) {
    T* const line = a.lines + (a.line_of ? a.line_of[c] : c) * a.line_stride;
    const T* const in = a.in + c * a.channel_stride;
    int64_t at = 0;
    for (int64_t s = 0; s < a.segment_count; ++s) {
      const Segment& segment = a.segments[s];
      if (a.fetch)
        fetch_run(in + kChannelsAhead * a.channel_stride + segment.pixel, segment.count * a.step);
      clear_line<V>(line, at, segment.line);
      at = segment.line +
           copy_pixels<V>(in + segment.pixel, a.step, segment.count, line + segment.line);
    }
    clear_line<V>(line, at, a.length);
  }
}

template <class V>
void pack_lines_transposed(const LineArgs<typename V::T>& a) {
  using T = typename V::T;
  for (int64_t c = a.begin; c < a.end; c += V::W) {
    const int64_t cols = a.end - c < V::W ? a.end - c : V::W;
    const bool fetch = a.fetch && (c == a.begin || c % kLine<T> == 0);
    const auto clear = [&](int64_t begin, int64_t end) {
      for (int64_t k = 0; begin < end && k < cols; ++k)
        clear_line<V>(a.lines + (a.line_of ? a.line_of[c + k] : c + k) * a.line_stride, begin, end);
    };
    int64_t at = 0;
    for (int64_t s = 0; s < a.segment_count; ++s) {
      const Segment& segment = a.segments[s];
      clear(at, segment.line);
      const T* const in = a.in + segment.pixel + c;
      for (int64_t i = 0; i < segment.count; i += V::W) {
        const int64_t rows = segment.count - i < V::W ? segment.count - i : V::W;
        if (fetch) fetch_pixels(in + (i + kPackAhead) * a.step, rows, a.step);
        if (rows == V::W && cols == V::W)
          pack_block<V, true>(in + i * a.step, a.step, V::W, V::W, a.line_of, c,
                              a.lines + segment.line + i, a.line_stride);
        else
          pack_block<V, false>(in + i * a.step, a.step, rows, cols, a.line_of, c,
                               a.lines + segment.line + i, a.line_stride);
      }
      at = segment.line + segment.count;
    }
    clear(at, a.length);
  }
}

template <class V>
void pack_lines(const LineArgs<typename V::T>& a) {
  if (a.channel_stride == 1)
    pack_lines_transposed<V>(a);
  else
    pack_lines_by_row<V>(a);
}

template <class V, Activation kAct>
void store_lines_by_row(const LineArgs<typename V::T>& a) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  for (int64_t slot = a.begin; slot < a.end; ++slot) {
    const int64_t c = a.channel_of ? a.channel_of[slot] - a.first_channel : slot;
    const T* const line = a.lines + (a.in_place ? c : slot - a.begin) * a.line_stride;
    const int64_t channel = c * a.channel_stride;
    const Reg bias = a.bias ? V::bcast(a.bias[c]) : V::zero();
    if (a.fetch && a.in && slot + 1 < a.end) {
      const int64_t next = a.channel_of ? a.channel_of[slot + 1] - a.first_channel : slot + 1;
      for (int64_t s = 0; s < a.segment_count; ++s)
        fetch_run(a.in + next * a.channel_stride + a.segments[s].pixel,
                  a.segments[s].count * a.step);
    }
    for (int64_t s = 0; s < a.segment_count; ++s) {
      const Segment& segment = a.segments[s];
      const T* const from = line + segment.line;
      T* const out = a.out + channel + segment.pixel;
      const T* const add = a.in ? a.in + channel + segment.pixel : nullptr;
      if (a.step == 1) {
        int64_t i = 0;
        for (; i + V::W <= segment.count; i += V::W) {
          Reg v = V::add(V::load(from + i), bias);
          if (add) v = V::add(v, V::load(add + i));
          V::store(out + i, activate<V>(v, kAct));
        }
        if (const int64_t left = segment.count - i; left > 0) {
          Reg v = V::add(V::load_n(from + i, left), bias);
          if (add) v = V::add(v, V::load_n(add + i, left));
          V::store_n(out + i, activate<V>(v, kAct), left);
        }
        continue;
      }
      for (int64_t i = 0; i < segment.count; i += V::W) {  // a transposed convolution's phase
        const int64_t n = segment.count - i < V::W ? segment.count - i : V::W;
        T buffer[V::W] = {};
        if (add)
          for (int64_t j = 0; j < n; ++j) buffer[j] = add[(i + j) * a.step];
        Reg v = V::add(V::load_n(from + i, n), bias);
        if (add) v = V::add(v, V::load(buffer));
        V::store(buffer, activate<V>(v, kAct));
        for (int64_t j = 0; j < n; ++j) out[(i + j) * a.step] = buffer[j];
      }
    }
  }
}

// W channels of W pixels; a full block is its own instantiation, without a branch or a mask.
template <class V, Activation kAct, bool kFull>
void store_block(const LineArgs<typename V::T>& a, int64_t position, int64_t pixel, int64_t c,
                 int64_t rows, int64_t cols) {
  using T = typename V::T;
  typename V::Reg r[V::W];
  for (int k = 0; k < V::W; ++k) {
    const int64_t line = a.line_of && (kFull || k < cols) ? a.line_of[c + k] : c + k;
    r[k] = kFull || k < cols ? V::load(a.lines + line * a.line_stride + position) : V::zero();
  }
  V::transpose(r);
  const T* const b = a.bias ? a.bias + c : nullptr;
  const typename V::Reg bias = !b ? V::zero() : kFull ? V::load(b) : V::load_n(b, cols);
  for (int t = 0; t < V::W; ++t) {
    if (!kFull && t >= rows) break;
    const int64_t at = pixel + t * a.step + c;
    typename V::Reg v = V::add(r[t], bias);
    if (a.in) v = V::add(v, kFull ? V::load(a.in + at) : V::load_n(a.in + at, cols));
    v = activate<V>(v, kAct);
    if (kFull)
      V::store(a.out + at, v);
    else
      V::store_n(a.out + at, v, cols);
  }
}

template <class V, Activation kAct>
void store_lines_transposed(const LineArgs<typename V::T>& a) {
  using T = typename V::T;
  for (int64_t s = 0; s < a.segment_count; ++s) {
    const Segment& segment = a.segments[s];
    for (int64_t i = 0; i < segment.count; i += V::W) {
      const int64_t rows = segment.count - i < V::W ? segment.count - i : V::W;
      const int64_t pixel = segment.pixel + i * a.step;
      for (int64_t c = a.begin; c < a.end; c += V::W) {
        const int64_t cols = a.end - c < V::W ? a.end - c : V::W;
        if (a.fetch && (c == a.begin || c % kLine<T> == 0)) {
          const int64_t next = pixel + kStoreAhead * a.step + c;
          fetch_pixels(a.out + next, rows, a.step);
          if (a.in) fetch_pixels(a.in + next, rows, a.step);
        }
        if (rows == V::W && cols == V::W)
          store_block<V, kAct, true>(a, segment.line + i, pixel, c, V::W, V::W);
        else
          store_block<V, kAct, false>(a, segment.line + i, pixel, c, rows, cols);
      }
    }
  }
}

template <class V>
void store_lines(const LineArgs<typename V::T>& a) {
  using Fn = void (*)(const LineArgs<typename V::T>&);
  static constexpr Fn kByRow[] = {
      store_lines_by_row<V, Activation::kNone>, store_lines_by_row<V, Activation::kRelu>,
      store_lines_by_row<V, Activation::kGelu>, store_lines_by_row<V, Activation::kGeluTanh>,
      store_lines_by_row<V, Activation::kSilu>};
  static constexpr Fn kTransposed[] = {store_lines_transposed<V, Activation::kNone>,
                                       store_lines_transposed<V, Activation::kRelu>,
                                       store_lines_transposed<V, Activation::kGelu>,
                                       store_lines_transposed<V, Activation::kGeluTanh>,
                                       store_lines_transposed<V, Activation::kSilu>};
  (a.channel_stride == 1 ? kTransposed : kByRow)[static_cast<int>(a.act)](a);
}

}  // namespace tetris::cpu
