// A convolution layer with operands in guarded memory, and its products in double precision.
#pragma once

#include <algorithm>

#include "cpu/conv.h"
#include "cpu/scratch.h"
#include "problem.h"

namespace tetris::test {

struct ConvLayerShape {
  int64_t images, in, out;  // channels of all groups
  int64_t groups = 1;
  cpu::ConvAxis y, x;  // from the big to the small map, whichever of them is the input
  int64_t bo = 1, bi = 1;
  double density = 0.5;
  bool transposed = false;
  bool in_channels_last = false, out_channels_last = false;
  bool row_perm = true, col_perm = true, bias = true, residual = false;

  int64_t taps() const { return y.kernel * x.kernel; }
  std::string name() const {
    const auto axis = [](const cpu::ConvAxis& a) {
      return "[" + std::to_string(a.big) + " to " + std::to_string(a.small) + " k" +
             std::to_string(a.kernel) + " s" + std::to_string(a.stride) + " p" +
             std::to_string(a.pad) + " d" + std::to_string(a.dilation) + "]";
    };
    return (transposed ? "transposed " : "") + std::to_string(images) + "x" + std::to_string(in) +
           "-" + std::to_string(out) + axis(y) + axis(x) + " g" + std::to_string(groups) + " b" +
           std::to_string(bo) + "x" + std::to_string(bi) + " d" +
           std::to_string(static_cast<int>(density * 100)) +
           (in_channels_last ? " nhwc" : " nchw") + (out_channels_last ? "-nhwc" : "-nchw");
  }
};

// The axis with this big map; small == 0 where the kernel reaches beyond it.
inline cpu::ConvAxis conv_axis(int64_t big, int64_t kernel, int64_t stride = 1, int64_t pad = 0,
                               int64_t dilation = 1) {
  const int64_t room = big + 2 * pad - dilation * (kernel - 1) - 1;
  return {big, room < 0 ? 0 : room / stride + 1, kernel, stride, pad, dilation};
}

inline std::vector<int32_t> grouped_permutation(int64_t n, int64_t groups, std::mt19937& rng) {
  std::vector<int32_t> all;
  for (int64_t g = 0; g < groups; ++g)
    for (int32_t p : random_permutation(n / groups, rng))
      all.push_back(static_cast<int32_t>(g * (n / groups) + p));
  return all;
}

inline Index random_index(const ConvLayerShape& s, std::mt19937& rng) {
  Index index;
  index.row_ptr.push_back(0);
  const int64_t rows = s.groups * ((s.out / s.groups + s.bo - 1) / s.bo);
  const int64_t cols = s.taps() * ((s.in / s.groups + s.bi - 1) / s.bi);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c)
      if (rng() % 1000 < s.density * 1000 && (rows < 3 || r != 1 || s.density >= 1))
        index.col_idx.push_back(static_cast<int32_t>(c));
    index.row_ptr.push_back(static_cast<int32_t>(index.col_idx.size()));
  }
  if (s.row_perm) index.row_perm = grouped_permutation(s.out, s.groups, rng);
  if (s.col_perm) index.col_perm = grouped_permutation(s.in, s.groups, rng);
  return index;
}

// Every array has exactly the size the interface promises; entries outside the weight are NaN.
template <class T>
struct ConvProblem {
  static constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
  ConvLayerShape s;
  BlockSparseView view;
  std::unique_ptr<Guarded<int32_t>> row_ptr, col_idx, row_perm, col_perm;
  Guarded<T> values, x, dy, bias, residual;

  static int64_t pixels(const ConvLayerShape& s, bool big) {
    return big ? s.y.big * s.x.big : s.y.small * s.x.small;
  }
  static int64_t in_size(const ConvLayerShape& s) {
    return s.images * s.in * pixels(s, !s.transposed);
  }
  static int64_t out_size(const ConvLayerShape& s) {
    return s.images * s.out * pixels(s, s.transposed);
  }

  ConvProblem(const ConvLayerShape& shape, const Index& index, std::mt19937& rng, Place place)
      : s(shape),
        row_ptr(guarded(index.row_ptr, place)),
        col_idx(guarded(index.col_idx, place)),
        row_perm(guarded(index.row_perm, place)),
        col_perm(guarded(index.col_perm, place)),
        values(static_cast<int64_t>(index.col_idx.size()) * s.bo * s.bi, place),
        x(in_size(s), place),
        dy(out_size(s), place),
        bias(s.out, place),
        residual(s.residual ? out_size(s) : 0, place) {
    view.out = s.out;
    view.in = s.in;
    view.taps = s.taps();
    view.groups = s.groups;
    view.bo = s.bo;
    view.bi = s.bi;
    view.nnzb = static_cast<int64_t>(index.col_idx.size());
    view.row_ptr = row_ptr->data();
    view.col_idx = col_idx->data();
    view.row_perm = s.row_perm ? row_perm->data() : nullptr;
    view.col_perm = s.col_perm ? col_perm->data() : nullptr;
    std::uniform_real_distribution<T> draw(-1, 1);
    for (auto* a : {&values, &x, &dy, &bias, &residual})
      for (auto& v : *a) v = draw(rng);
  }

  cpu::ConvShape shape() const { return {s.images, s.y, s.x}; }
  cpu::MapStrides strides(int64_t channels, int64_t pixels, bool channels_last) const {
    if (channels_last) return {channels * pixels, 1, channels};
    return {channels * pixels, pixels, 1};
  }
  cpu::MapStrides in_strides() const {
    return strides(s.in, pixels(s, !s.transposed), s.in_channels_last);
  }
  cpu::MapStrides out_strides() const {
    return strides(s.out, pixels(s, s.transposed), s.out_channels_last);
  }

  std::string forward(T* y, Activation act, const cpu::Parallel& parallel) const {
    return cpu::convolve<T>(view, values.data(), shape(), {s.transposed, false},
                            {x.data(), in_strides()}, s.bias ? bias.data() : nullptr,
                            {s.residual ? residual.data() : nullptr, out_strides()}, act,
                            {y, out_strides()}, parallel);
  }
  std::string grad_input(T* dx, const cpu::Parallel& parallel) const {
    return cpu::convolve<T>(view, values.data(), shape(), {!s.transposed, true},
                            {dy.data(), out_strides()}, nullptr, {nullptr, in_strides()},
                            Activation::kNone, {dx, in_strides()}, parallel);
  }
  std::string grad_values(T* dvalues, const cpu::Parallel& parallel) const {
    const cpu::FeatureMap<const T> in{x.data(), in_strides()}, out{dy.data(), out_strides()};
    return cpu::conv_grad_values<T>(view, shape(), s.transposed, s.transposed ? out : in,
                                    s.transposed ? in : out, dvalues, parallel);
  }

  // Calls fn(offset in values, output, input, tap) for each stored entry inside the weight,
  // channels counted over all groups; the others get fn(offset, -1, -1, -1). Needs valid index
  // arrays.
  template <class Fn>
  void for_each_entry(Fn fn) const {
    const int64_t group_out = s.out / s.groups, group_in = s.in / s.groups;
    const int64_t rows = (group_out + s.bo - 1) / s.bo, cols = (group_in + s.bi - 1) / s.bi;
    for (int64_t r = 0; r < rows * s.groups; ++r)
      for (int64_t b = view.row_ptr[r]; b < view.row_ptr[r + 1]; ++b)
        for (int64_t i = 0; i < s.bi; ++i)
          for (int64_t o = 0; o < s.bo; ++o) {
            const int64_t at = (b * s.bi + i) * s.bo + o, group = r / rows;
            const int64_t out = r % rows * s.bo + o, in = view.col_idx[b] % cols * s.bi + i;
            if (out >= group_out || in >= group_in) {
              fn(at, int64_t{-1}, int64_t{-1}, int64_t{-1});
              continue;
            }
            const int64_t out_slot = group * group_out + out, in_slot = group * group_in + in;
            fn(at, view.row_perm ? view.row_perm[out_slot] : out_slot,
               view.col_perm ? view.col_perm[in_slot] : in_slot, view.col_idx[b] / cols);
          }
  }
  void poison_padding() {
    for_each_entry([&](int64_t at, int64_t o, int64_t, int64_t) {
      if (o < 0) values[at] = kNan;
    });
  }

  struct Products {
    typename Problem<T>::Reference y, dx, dvalues;
  };
  // All three at once: the sum over entries and the pairs of pixels that meet there.
  Products products() const {
    Products p{typename Problem<T>::Reference(dy.size()), typename Problem<T>::Reference(x.size()),
               typename Problem<T>::Reference(values.size())};
    const auto in = in_strides(), out = out_strides();
    const int64_t out_pixels = pixels(s, s.transposed);
    for (int64_t n = 0; n < s.images; ++n)
      for (int64_t o = 0; o < s.out; ++o)
        for (int64_t i = 0; i < out_pixels; ++i) {
          const int64_t at = n * out.image + o * out.channel + i * out.pixel;
          if (s.bias) p.y.add(at, bias[o]);
          if (s.residual) p.y.add(at, residual[at]);
        }
    for_each_entry([&](int64_t at, int64_t o, int64_t c, int64_t tap) {
      if (o < 0) return;
      const int64_t ky = tap / s.x.kernel, kx = tap % s.x.kernel;
      for (int64_t n = 0; n < s.images; ++n)
        for (int64_t sy = 0; sy < s.y.small; ++sy) {
          const int64_t by = sy * s.y.stride - s.y.pad + ky * s.y.dilation;
          if (by < 0 || by >= s.y.big) continue;
          for (int64_t sx = 0; sx < s.x.small; ++sx) {
            const int64_t bx = sx * s.x.stride - s.x.pad + kx * s.x.dilation;
            if (bx < 0 || bx >= s.x.big) continue;
            const int64_t small = sy * s.x.small + sx, big = by * s.x.big + bx;
            const int64_t from =
                n * in.image + c * in.channel + (s.transposed ? small : big) * in.pixel;
            const int64_t to =
                n * out.image + o * out.channel + (s.transposed ? big : small) * out.pixel;
            p.y.add(to, double(values[at]) * x[from]);
            p.dx.add(from, double(values[at]) * dy[to]);
            p.dvalues.add(at, double(x[from]) * dy[to]);
          }
        }
    });
    return p;
  }
  int64_t out_terms() const { return s.in / s.groups * s.taps() + 2; }
  int64_t in_terms() const { return s.out / s.groups * s.taps(); }
  int64_t values_terms() const { return s.images * s.y.small * s.x.small; }
};

// Fills the working memory that the calling thread keeps, so that a read of stale data shows.
template <class T>
void poison_scratch() {
  using cpu::ScratchSlot;
  for (ScratchSlot slot : {ScratchSlot::kX, ScratchSlot::kY, ScratchSlot::kValues})
    std::fill_n(cpu::scratch<T>(slot, 1 << 15), 1 << 15, ConvProblem<T>::kNan);
}

}  // namespace tetris::test
