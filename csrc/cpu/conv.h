// Block-sparse convolutions on the CPU, directly on shifted lines of pixels: no im2col.
//
// One trilinear form, over output channels o, input channels c, kernel positions k and pixels p,
//
//   f(x, W, g) = sum  g[o, p]  W[o, c, k]  x[c, p * stride - pad + k * dilation]
//
// gives all six functions: `convolve` is df/dg; with `transposed` the map x is the small one and
// the result the big one. A gradient for the input is the other of the two with the layout
// transposed.
//
// Index contents are checked here; extents are the caller's duty. A function returns an empty
// string, or the broken rule.
#pragma once

#include <string>

#include "core/view.h"
#include "cpu/conv_geometry.h"
#include "cpu/parallel.h"

namespace tetris::cpu {

template <class T>
struct FeatureMap {
  T* data;
  MapStrides strides;
};

// How a layer's blocks are used; with_layout_transposed gives the gradient of the other direction.
struct ConvDirection {
  bool transposed;              // from small to big maps
  bool with_layout_transposed;  // rows are the source's channels
};

// out = act(W x + bias + residual). residual.data and bias may be nullptr; out overlaps neither x
// nor residual, and has no gaps.
template <class T>
std::string convolve(const BlockSparseView& w, const T* values, const ConvShape& shape,
                     ConvDirection direction, FeatureMap<const T> x, const T* bias,
                     FeatureMap<const T> residual, Activation act, FeatureMap<T> out,
                     const Parallel& parallel);

// Gradient of the stored blocks; `big` and `small` are the maps on either side of the form. Rows of
// the layout are channels of `small`, or, for a transposed convolution, of `big`.
template <class T>
std::string conv_grad_values(const BlockSparseView& w, const ConvShape& shape, bool transposed,
                             FeatureMap<const T> big, FeatureMap<const T> small, T* dvalues,
                             const Parallel& parallel);

}  // namespace tetris::cpu
