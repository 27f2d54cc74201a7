// One layer to test: what a Product or SampledProduct is made from.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/problem.h"

namespace tetris::cuda::test {

// A matrix product: one image, one row.
inline Geometry tokens(int count) {
  Geometry g;
  g.source_w = g.result_w = count;
  return g;
}

struct Window {
  int kernel = 1, stride = 1, pad = 0, dilation = 1;
};

// A convolution of a source of h x w pixels. `transposed`: to the big map; rows and columns of
// `output_pad` more are reached by nobody's convolution but exist.
inline Geometry convolution(int images, int h, int w, Window y, Window x, bool transposed = false,
                            int output_pad = 0) {
  const auto result = [&](int size, Window a) {
    const int reach = a.dilation * (a.kernel - 1) + 1;
    if (transposed) return (size - 1) * a.stride - 2 * a.pad + reach + output_pad;
    return (size + 2 * a.pad - reach) / a.stride + 1;
  };
  Geometry g;
  g.images = images;
  g.source_h = h;
  g.source_w = w;
  g.result_h = result(h, y);
  g.result_w = result(w, x);
  g.kernel_h = y.kernel;
  g.kernel_w = x.kernel;
  g.stride_h = y.stride;
  g.stride_w = x.stride;
  g.pad_h = y.pad;
  g.pad_w = x.pad;
  g.dilation_h = y.dilation;
  g.dilation_w = x.dilation;
  g.transposed = transposed;
  return g;
}

// The convolution in the other direction: that of the gradient for the input.
inline Geometry reversed(Geometry g) {
  std::swap(g.source_h, g.result_h);
  std::swap(g.source_w, g.result_w);
  g.transposed = !g.transposed;
  return g;
}

struct Case {
  DType dtype = DType::kFloat32;
  int64_t rows = 1, cols = 1;  // channels of the result and of the source, all groups
  int height = 1, width = 1;   // of a block
  double density = 0.5;        // below 1, the second of three or more block rows is empty
  int groups = 1;
  Geometry geometry = tokens(1);
  bool row_perm = true, col_perm = true, bias = true, residual = false;
  Activation activation = Activation::kNone;
  bool x_channels_last = true, y_channels_last = true;  // of the product's source and result
  bool ordered = false;                                 // give the order of block rows
  bool gradient = false;  // the product for the input: layout transposed, direction reversed
  bool allow_tf32 = false;
  int64_t gap = 0;        // elements of nobody between tokens (or channels, where those are last)
  int64_t shift = 0;      // elements by which maps and values miss the alignment of allocations
  bool specials = false;  // a few numbers of the source are infinite or NaN
  bool split = false;     // sampled products: partial sums

  int taps() const { return geometry.kernel_h * geometry.kernel_w; }

  std::string name() const {
    const char* const dtypes[] = {"f16", "bf16", "f32", "f64"};
    const char* const activations[] = {"", "-relu", "-gelu", "-gelu_tanh", "-silu"};
    const auto str = [](auto v) { return std::to_string(v); };
    const Geometry& g = geometry;
    std::string text = std::string(gradient ? "gradient-" : "") + dtypes[int(dtype)] +
                       (allow_tf32 ? "-tf32" : "") + "-" + str(rows) + "x" + str(cols) + "-b" +
                       str(height) + "x" + str(width) + "-d" + str(int(density * 100));
    if (groups > 1) text += "-g" + str(groups);
    if (g.images == 1 && g.source_h == 1 && g.pointwise()) {
      text += "-" + str(g.source_w) + "tokens";
    } else {
      const auto axis = [&](int from, int to, int k, int s, int p, int d) {
        return "[" + str(from) + " to " + str(to) + " k" + str(k) + " s" + str(s) + " p" + str(p) +
               " d" + str(d) + "]";
      };
      text += std::string(g.transposed ? "-transposed" : "-conv") + str(g.images) +
              axis(g.source_h, g.result_h, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h) +
              axis(g.source_w, g.result_w, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w);
    }
    text += activations[int(activation)];
    if (row_perm) text += "-rows";
    if (col_perm) text += "-cols";
    if (bias) text += "-bias";
    if (residual) text += "-residual";
    text += x_channels_last ? "-last" : "-first";
    text += y_channels_last ? "-last" : "-first";
    if (ordered) text += "-ordered";
    if (gap > 0) text += "-gap" + str(gap);
    if (shift > 0) text += "-shift" + str(shift);
    if (specials) text += "-specials";
    if (split) text += "-split";
    return text;
  }
};

}  // namespace tetris::cuda::test
