// The convolution ops, written once for every backend: check, view the tensors as maps, let the
// backend compute.
//
// An Engine is a struct of static functions. Maps have the strides of one of the two memory
// formats, values and bias are contiguous, bias and residual undefined where there is none:
//
//   const Backend& backend();
//   void convolve(call, values, x, bias, residual, act, y);
//   void grad_values(op, layout, shape, transposed, big, small, dvalues);
#pragma once

#include <torch/library.h>

#include "cpu/conv.h"
#include "ops/conv_checks.h"
#include "ops/output.h"

namespace tetris::ops {

// A map in the memory format it is closest to, copied only where its strides are of neither.
struct Map {
  at::Tensor tensor;
  cpu::MapStrides strides;
};

inline cpu::MapStrides map_strides(const at::Tensor& x, at::MemoryFormat format) {
  const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3);
  // One channel or one pixel is in both formats at once: take the one whose runs are long.
  if (channels > 1 && (format == at::MemoryFormat::ChannelsLast || pixels == 1))
    return {channels * pixels, 1, channels};
  return {channels * pixels, pixels, 1};
}

inline Map as_map(const at::Tensor& x, at::MemoryFormat format) {
  return {x.contiguous(format), map_strides(x, format)};
}

inline Map as_map(const at::Tensor& x) { return as_map(x, x.suggest_memory_format()); }

// Either product of a layer, from maps of one size to maps of the other.
struct ConvCall {
  const char* op;
  const cpu::ConvShape& shape;
  cpu::ConvDirection direction;
  const Layout& layout;
};

template <class Engine>
struct ConvOps {
  using Optional = const OptionalTensor&;
  using IntArrayRef = at::IntArrayRef;
  using Tensor = at::Tensor;

  static Tensor run(const ConvCall& call, const Tensor& x, const Tensor& values, Optional bias,
                    Optional residual, Activation act, int64_t out_channels) {
    const auto& [images, ay, ax] = call.shape;
    const bool big = call.direction.transposed;
    const auto format = x.suggest_memory_format();
    Map y{empty_output({images, out_channels, big ? ay.big : ay.small, big ? ax.big : ax.small}, x,
                       format),
          {}};
    y.strides = map_strides(y.tensor, format);
    if (residual) check_residual(call.op, *residual, x, y.tensor.sym_sizes());
    Engine::convolve(call, values.contiguous(), as_map(x, format),
                     bias ? bias->contiguous() : Tensor(),
                     residual ? residual->contiguous(format) : Tensor(), act, y);
    return y.tensor;
  }

  static Tensor bsconv2d(const Tensor& x, const Tensor& values, const Tensor& row_ptr,
                         const Tensor& col_idx, Optional row_perm, Optional col_perm, Optional bias,
                         int64_t out_channels, IntArrayRef kernel_size, IntArrayRef stride,
                         IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                         std::string_view activation, Optional residual) {
    constexpr const char* kOp = "tetris::bsconv2d";
    const ConvArguments a{kernel_size, stride, padding, dilation, groups};
    check_map(kOp, "x", x, Engine::backend());
    check_values(kOp, x, "x", values, col_idx);
    const auto shape = conv_shape(kOp, a, x.size(0), x.size(2), x.size(3));
    check_bias(kOp, x, bias, out_channels);
    const auto act = parse_activation(kOp, activation);
    const auto layout = check_conv_layout(kOp, a, x, row_ptr, col_idx, row_perm, col_perm,
                                          out_channels, x.size(1), values.size(2), values.size(1));
    return run({kOp, shape, {false, false}, layout}, x, values, bias, residual, act, out_channels);
  }

  static Tensor bsconv_transpose2d(const Tensor& x, const Tensor& values, const Tensor& row_ptr,
                                   const Tensor& col_idx, Optional row_perm, Optional col_perm,
                                   Optional bias, int64_t out_channels, IntArrayRef kernel_size,
                                   IntArrayRef stride, IntArrayRef padding,
                                   IntArrayRef output_padding, IntArrayRef dilation, int64_t groups,
                                   std::string_view activation, Optional residual) {
    constexpr const char* kOp = "tetris::bsconv_transpose2d";
    const ConvArguments a{kernel_size, stride, padding, dilation, groups};
    check_map(kOp, "x", x, Engine::backend());
    check_values(kOp, x, "x", values, col_idx);
    const auto shape = transposed_shape(kOp, a, output_padding, x.size(0), x.size(2), x.size(3));
    check_bias(kOp, x, bias, out_channels);
    const auto act = parse_activation(kOp, activation);
    const auto layout = check_conv_layout(kOp, a, x, row_ptr, col_idx, row_perm, col_perm,
                                          out_channels, x.size(1), values.size(2), values.size(1));
    return run({kOp, shape, {true, false}, layout}, x, values, bias, residual, act, out_channels);
  }

  // The maps of a gradient op must fit together.
  static void check_small(const char* op, const char* name, const Tensor& x,
                          const cpu::ConvShape& shape) {
    TORCH_CHECK_VALUE(
        x.size(0) == shape.images && x.size(2) == shape.y.small && x.size(3) == shape.x.small, op,
        ": ", name, " must be [", shape.images, ", C, ", shape.y.small, ", ", shape.x.small,
        "], which the other map's size gives (got shape ", x.sizes(), ")");
  }

  static Tensor grad_input(const char* op, bool transposed, const Tensor& grad,
                           const Tensor& values, const Tensor& row_ptr, const Tensor& col_idx,
                           Optional row_perm, Optional col_perm, int64_t in_channels,
                           IntArrayRef input_size, const ConvArguments& a) {
    check_map(op, "grad", grad, Engine::backend());
    check_values(op, grad, "grad", values, col_idx);
    TORCH_CHECK_VALUE(
        input_size.size() == 2 && input_size[0] >= 1 && input_size[1] >= 1 && in_channels >= 1, op,
        ": input_size must be two numbers and in_channels one, at least 1 (got ", input_size,
        " and ", in_channels, ")");
    const auto shape = transposed ? transposed_shape_between(op, a, grad.size(0), input_size,
                                                             grad.sizes().slice(2))
                                  : conv_shape(op, a, grad.size(0), input_size[0], input_size[1]);
    if (!transposed) check_small(op, "grad", grad, shape);
    const auto layout =
        check_conv_layout(op, a, grad, row_ptr, col_idx, row_perm, col_perm, grad.size(1),
                          in_channels, values.size(2), values.size(1));
    return run({op, shape, {!transposed, true}, layout}, grad, values, std::nullopt, std::nullopt,
               Activation::kNone, in_channels);
  }

  template <bool kTransposed>
  static Tensor grad_input_op(const Tensor& grad, const Tensor& values, const Tensor& row_ptr,
                              const Tensor& col_idx, Optional row_perm, Optional col_perm,
                              int64_t in_channels, IntArrayRef input_size, IntArrayRef kernel_size,
                              IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                              int64_t groups) {
    return grad_input(
        kTransposed ? "tetris::bsconv_transpose2d_grad_input" : "tetris::bsconv2d_grad_input",
        kTransposed, grad, values, row_ptr, col_idx, row_perm, col_perm, in_channels, input_size,
        {kernel_size, stride, padding, dilation, groups});
  }

  static Tensor grad_values(const char* op, bool transposed, const Tensor& x, const Tensor& grad,
                            const Tensor& row_ptr, const Tensor& col_idx, Optional row_perm,
                            Optional col_perm, IntArrayRef block, const ConvArguments& a) {
    check_map(op, "x", x, Engine::backend());
    check_map(op, "grad", grad, Engine::backend());
    check_like(op, "grad", grad, "x", x);
    TORCH_CHECK_VALUE(block.size() == 2, op, ": block must be two numbers (got ", block, ")");
    const Tensor &big = transposed ? grad : x, &small = transposed ? x : grad;
    const auto shape = transposed
                           ? transposed_shape_between(op, a, big.size(0), small.sizes().slice(2),
                                                      big.sizes().slice(2))
                           : conv_shape(op, a, big.size(0), big.size(2), big.size(3));
    check_small(op, transposed ? "x" : "grad", small, shape);
    const auto layout = check_conv_layout(op, a, x, row_ptr, col_idx, row_perm, col_perm,
                                          grad.size(1), x.size(1), block[0], block[1]);
    Tensor dvalues =
        empty_output({col_idx.numel(), block[1], block[0]}, x, at::MemoryFormat::Contiguous);
    Engine::grad_values(op, layout, shape, transposed, as_map(big), as_map(small), dvalues);
    return dvalues;
  }

  template <bool kTransposed>
  static Tensor grad_values_op(const Tensor& x, const Tensor& grad, const Tensor& row_ptr,
                               const Tensor& col_idx, Optional row_perm, Optional col_perm,
                               IntArrayRef block, IntArrayRef kernel_size, IntArrayRef stride,
                               IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
    return grad_values(
        kTransposed ? "tetris::bsconv_transpose2d_grad_values" : "tetris::bsconv2d_grad_values",
        kTransposed, x, grad, row_ptr, col_idx, row_perm, col_perm, block,
        {kernel_size, stride, padding, dilation, groups});
  }

  static void implement(torch::Library& m) {
    m.impl("bsconv2d", &bsconv2d);
    m.impl("bsconv2d_grad_input", &grad_input_op<false>);
    m.impl("bsconv2d_grad_values", &grad_values_op<false>);
    m.impl("bsconv_transpose2d", &bsconv_transpose2d);
    m.impl("bsconv_transpose2d_grad_input", &grad_input_op<true>);
    m.impl("bsconv_transpose2d_grad_values", &grad_values_op<true>);
  }
};

}  // namespace tetris::ops
