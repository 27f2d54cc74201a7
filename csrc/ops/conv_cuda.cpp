// The convolution ops on CUDA: which pixels of the source each pixel of the result sees.
#include <c10/core/DeviceGuard.h>

#include <limits>

#include "ops/conv_ops.h"
#include "ops/cuda_layout.h"
#include "ops/cuda_run.h"

namespace tetris::ops {
namespace {

using at::Tensor;

cuda::Strides strides(const Map& map) {
  return {map.strides.image, map.strides.pixel, map.strides.channel};
}

// From big to small maps, or with `transposed` from small to big.
cuda::Geometry geometry(const char* op, const cpu::ConvShape& shape, bool transposed) {
  const auto& [images, y, x] = shape;
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  for (const cpu::ConvAxis& axis : {y, x})
    TORCH_CHECK_VALUE(images <= kMax && axis.big + axis.pad <= kMax / 2 &&
                          axis.small * axis.stride <= kMax / 2 &&
                          axis.kernel * axis.dilation <= kMax / 2,
                      op, ": a map's sides with their padding, and the images, must be less than ",
                      "2^30 (got ", images, " images and a side of ", axis.big, ")");
  cuda::Geometry g;
  g.images = static_cast<int>(images);
  g.source_h = static_cast<int>(transposed ? y.small : y.big);
  g.source_w = static_cast<int>(transposed ? x.small : x.big);
  g.result_h = static_cast<int>(transposed ? y.big : y.small);
  g.result_w = static_cast<int>(transposed ? x.big : x.small);
  g.kernel_h = static_cast<int>(y.kernel);
  g.kernel_w = static_cast<int>(x.kernel);
  g.stride_h = static_cast<int>(y.stride);
  g.stride_w = static_cast<int>(x.stride);
  g.pad_h = static_cast<int>(y.pad);
  g.pad_w = static_cast<int>(x.pad);
  g.dilation_h = static_cast<int>(y.dilation);
  g.dilation_w = static_cast<int>(x.dilation);
  g.transposed = transposed;
  return g;
}

struct Cuda {
  static const Backend& backend() { return cuda_backend(); }

  static void convolve(const ConvCall& call, const Tensor& values, const Map& x, const Tensor& bias,
                       const Tensor& residual, Activation act, Map& y) {
    const c10::OptionalDeviceGuard guard(x.tensor.device());
    const bool swapped = call.direction.with_layout_transposed;
    const PreparedRows prepared = prepare_rows(call.op, call.layout, swapped, x.tensor);
    const BlockSparseView& v = call.layout.view;
    cuda::Product p;
    p.w = prepared.rows;
    p.geometry = geometry(call.op, call.shape, call.direction.transposed);
    p.values = values.const_data_ptr();
    p.x = x.tensor.const_data_ptr();
    p.x_strides = strides(x);
    p.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
    p.residual = residual.defined() ? residual.const_data_ptr() : nullptr;
    p.y = y.tensor.mutable_data_ptr();
    p.y_strides = p.residual_strides = strides(y);
    p.row_perm = swapped ? v.col_perm : v.row_perm;
    p.col_perm = swapped ? v.row_perm : v.col_perm;
    p.dtype = cuda_type(x.tensor.scalar_type());
    p.activation = act;
    p.allow_tf32 = conv_may_round(x.tensor.scalar_type());
    run(call.op, p, x.tensor);
  }

  static void grad_values(const char* op, const Layout& layout, const cpu::ConvShape& shape,
                          bool transposed, const Map& big, const Map& small, Tensor& dvalues) {
    const Map &x = transposed ? small : big, &dy = transposed ? big : small;
    const c10::OptionalDeviceGuard guard(x.tensor.device());
    const PreparedRows prepared = prepare_rows(op, layout, false, x.tensor);
    cuda::SampledProduct p;
    p.w = prepared.rows;
    p.geometry = geometry(op, shape, transposed);
    p.x = x.tensor.const_data_ptr();
    p.x_strides = strides(x);
    p.dy = dy.tensor.const_data_ptr();
    p.dy_strides = strides(dy);
    p.dvalues = dvalues.mutable_data_ptr();
    p.row_perm = layout.view.row_perm;
    p.col_perm = layout.view.col_perm;
    p.dtype = cuda_type(x.tensor.scalar_type());
    p.allow_tf32 = conv_may_round(x.tensor.scalar_type());
    run(op, p, x.tensor, dvalues);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(tetris, TETRIS_CUDA_KEY, m) { ConvOps<Cuda>::implement(m); }

}  // namespace tetris::ops
