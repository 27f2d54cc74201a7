// CPU implementations of the convolution ops: check, view the tensors as maps, run.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "cpu/conv.h"
#include "ops/conv_checks.h"
#include "ops/output.h"
#include "ops/parallel.h"

namespace tetris::ops {
namespace {

using Optional = const OptionalTensor&;
using at::IntArrayRef;
using at::Tensor;

// A map in the memory format it is closest to, copied only where its strides are of neither.
Tensor as_map(const Tensor& x, at::MemoryFormat format) { return x.contiguous(format); }

cpu::MapStrides strides(const Tensor& x, at::MemoryFormat format) {
  const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3);
  // One channel or one pixel is in both formats at once: take the one whose runs are long.
  if (channels > 1 && (format == at::MemoryFormat::ChannelsLast || pixels == 1))
    return {channels * pixels, 1, channels};
  return {channels * pixels, pixels, 1};
}

template <class T>
cpu::FeatureMap<const T> input(const Tensor& x, at::MemoryFormat format) {
  return {x.const_data_ptr<T>(), strides(x, format)};
}

template <class T>
cpu::FeatureMap<T> output(Tensor& y, at::MemoryFormat format) {
  return {y.mutable_data_ptr<T>(), strides(y, format)};
}

// Either product of a layer, from maps of one size to maps of the other.
struct Call {
  const char* op;
  const cpu::ConvShape& shape;
  cpu::ConvDirection direction;
  const Layout& layout;
};

Tensor run(const Call& call, const Tensor& x, const Tensor& values, Optional bias,
           Optional residual, Activation act, int64_t out_channels) {
  const auto& [images, ay, ax] = call.shape;
  const bool big = call.direction.transposed;
  const auto format = x.suggest_memory_format();
  Tensor y = empty_output({images, out_channels, big ? ay.big : ay.small, big ? ax.big : ax.small},
                          x, format);
  if (residual) check_residual(call.op, *residual, x, y.sym_sizes());
  const Tensor map = as_map(x, format), v = values.contiguous();
  const Tensor b = bias ? bias->contiguous() : Tensor();
  const Tensor r = residual ? as_map(*residual, format) : Tensor();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "tetris convolution", [&] {
    const auto out = output<scalar_t>(y, format);
    check_contents(call.op, cpu::convolve<scalar_t>(
                                call.layout.view, v.const_data_ptr<scalar_t>(), call.shape,
                                call.direction, input<scalar_t>(map, format),
                                b.defined() ? b.const_data_ptr<scalar_t>() : nullptr,
                                {r.defined() ? r.const_data_ptr<scalar_t>() : nullptr, out.strides},
                                act, out, parallel()));
  });
  return y;
}

Tensor bsconv2d(const Tensor& x, const Tensor& values, const Tensor& row_ptr, const Tensor& col_idx,
                Optional row_perm, Optional col_perm, Optional bias, int64_t out_channels,
                IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                IntArrayRef dilation, int64_t groups, std::string_view activation,
                Optional residual) {
  constexpr const char* kOp = "tetris::bsconv2d";
  const ConvArguments a{kernel_size, stride, padding, dilation, groups};
  check_map(kOp, "x", x);
  check_values(kOp, x, "x", values, col_idx);
  const auto shape = conv_shape(kOp, a, x.size(0), x.size(2), x.size(3));
  check_bias(kOp, x, bias, out_channels);
  const auto act = parse_activation(kOp, activation);
  const auto layout = check_conv_layout(kOp, a, row_ptr, col_idx, row_perm, col_perm, out_channels,
                                        x.size(1), values.size(2), values.size(1));
  return run({kOp, shape, {false, false}, layout}, x, values, bias, residual, act, out_channels);
}

Tensor bsconv_transpose2d(const Tensor& x, const Tensor& values, const Tensor& row_ptr,
                          const Tensor& col_idx, Optional row_perm, Optional col_perm,
                          Optional bias, int64_t out_channels, IntArrayRef kernel_size,
                          IntArrayRef stride, IntArrayRef padding, IntArrayRef output_padding,
                          IntArrayRef dilation, int64_t groups, std::string_view activation,
                          Optional residual) {
  constexpr const char* kOp = "tetris::bsconv_transpose2d";
  const ConvArguments a{kernel_size, stride, padding, dilation, groups};
  check_map(kOp, "x", x);
  check_values(kOp, x, "x", values, col_idx);
  const auto shape = transposed_shape(kOp, a, output_padding, x.size(0), x.size(2), x.size(3));
  check_bias(kOp, x, bias, out_channels);
  const auto act = parse_activation(kOp, activation);
  const auto layout = check_conv_layout(kOp, a, row_ptr, col_idx, row_perm, col_perm, out_channels,
                                        x.size(1), values.size(2), values.size(1));
  return run({kOp, shape, {true, false}, layout}, x, values, bias, residual, act, out_channels);
}

// The maps of a gradient op must fit together.
void check_small(const char* op, const char* name, const Tensor& x, const cpu::ConvShape& shape) {
  TORCH_CHECK_VALUE(
      x.size(0) == shape.images && x.size(2) == shape.y.small && x.size(3) == shape.x.small, op,
      ": ", name, " must be [", shape.images, ", C, ", shape.y.small, ", ", shape.x.small,
      "], which the other map's size gives (got shape ", x.sizes(), ")");
}

Tensor grad_input(const char* op, bool transposed, const Tensor& grad, const Tensor& values,
                  const Tensor& row_ptr, const Tensor& col_idx, Optional row_perm,
                  Optional col_perm, int64_t in_channels, IntArrayRef input_size,
                  const ConvArguments& a) {
  check_map(op, "grad", grad);
  check_values(op, grad, "grad", values, col_idx);
  TORCH_CHECK_VALUE(
      input_size.size() == 2 && input_size[0] >= 1 && input_size[1] >= 1 && in_channels >= 1, op,
      ": input_size must be two numbers and in_channels one, at least 1 (got ", input_size, " and ",
      in_channels, ")");
  const auto shape =
      transposed ? transposed_shape_between(op, a, grad.size(0), input_size, grad.sizes().slice(2))
                 : conv_shape(op, a, grad.size(0), input_size[0], input_size[1]);
  if (!transposed) check_small(op, "grad", grad, shape);
  const auto layout = check_conv_layout(op, a, row_ptr, col_idx, row_perm, col_perm, grad.size(1),
                                        in_channels, values.size(2), values.size(1));
  return run({op, shape, {!transposed, true}, layout}, grad, values, std::nullopt, std::nullopt,
             Activation::kNone, in_channels);
}

Tensor bsconv2d_grad_input(const Tensor& grad, const Tensor& values, const Tensor& row_ptr,
                           const Tensor& col_idx, Optional row_perm, Optional col_perm,
                           int64_t in_channels, IntArrayRef input_size, IntArrayRef kernel_size,
                           IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                           int64_t groups) {
  return grad_input("tetris::bsconv2d_grad_input", false, grad, values, row_ptr, col_idx, row_perm,
                    col_perm, in_channels, input_size,
                    {kernel_size, stride, padding, dilation, groups});
}

Tensor bsconv_transpose2d_grad_input(const Tensor& grad, const Tensor& values,
                                     const Tensor& row_ptr, const Tensor& col_idx,
                                     Optional row_perm, Optional col_perm, int64_t in_channels,
                                     IntArrayRef input_size, IntArrayRef kernel_size,
                                     IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                     int64_t groups) {
  return grad_input("tetris::bsconv_transpose2d_grad_input", true, grad, values, row_ptr, col_idx,
                    row_perm, col_perm, in_channels, input_size,
                    {kernel_size, stride, padding, dilation, groups});
}

Tensor grad_values(const char* op, bool transposed, const Tensor& x, const Tensor& grad,
                   const Tensor& row_ptr, const Tensor& col_idx, Optional row_perm,
                   Optional col_perm, IntArrayRef block, const ConvArguments& a) {
  check_map(op, "x", x);
  check_map(op, "grad", grad);
  TORCH_CHECK_TYPE(x.scalar_type() == grad.scalar_type(), op,
                   ": x and grad must have one type (got ", x.scalar_type(), " and ",
                   grad.scalar_type(), ")");
  TORCH_CHECK_VALUE(block.size() == 2, op, ": block must be two numbers (got ", block, ")");
  const Tensor &big = transposed ? grad : x, &small = transposed ? x : grad;
  const auto shape = transposed
                         ? transposed_shape_between(op, a, big.size(0), small.sizes().slice(2),
                                                    big.sizes().slice(2))
                         : conv_shape(op, a, big.size(0), big.size(2), big.size(3));
  check_small(op, transposed ? "x" : "grad", small, shape);
  const auto layout = check_conv_layout(op, a, row_ptr, col_idx, row_perm, col_perm, grad.size(1),
                                        x.size(1), block[0], block[1]);
  const auto big_format = big.suggest_memory_format();
  const auto small_format = small.suggest_memory_format();
  const Tensor b = as_map(big, big_format), s = as_map(small, small_format);
  Tensor dvalues =
      empty_output({col_idx.numel(), block[1], block[0]}, x, at::MemoryFormat::Contiguous);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "tetris convolution", [&] {
    check_contents(op, cpu::conv_grad_values<scalar_t>(
                           layout.view, shape, transposed, input<scalar_t>(b, big_format),
                           input<scalar_t>(s, small_format), dvalues.mutable_data_ptr<scalar_t>(),
                           parallel()));
  });
  return dvalues;
}

Tensor bsconv2d_grad_values(const Tensor& x, const Tensor& grad, const Tensor& row_ptr,
                            const Tensor& col_idx, Optional row_perm, Optional col_perm,
                            IntArrayRef block, IntArrayRef kernel_size, IntArrayRef stride,
                            IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  return grad_values("tetris::bsconv2d_grad_values", false, x, grad, row_ptr, col_idx, row_perm,
                     col_perm, block, {kernel_size, stride, padding, dilation, groups});
}

Tensor bsconv_transpose2d_grad_values(const Tensor& x, const Tensor& grad, const Tensor& row_ptr,
                                      const Tensor& col_idx, Optional row_perm, Optional col_perm,
                                      IntArrayRef block, IntArrayRef kernel_size,
                                      IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                      int64_t groups) {
  return grad_values("tetris::bsconv_transpose2d_grad_values", true, x, grad, row_ptr, col_idx,
                     row_perm, col_perm, block, {kernel_size, stride, padding, dilation, groups});
}

}  // namespace

TORCH_LIBRARY_IMPL(tetris, CPU, m) {
  m.impl("bsconv2d", &bsconv2d);
  m.impl("bsconv2d_grad_input", &bsconv2d_grad_input);
  m.impl("bsconv2d_grad_values", &bsconv2d_grad_values);
  m.impl("bsconv_transpose2d", &bsconv_transpose2d);
  m.impl("bsconv_transpose2d_grad_input", &bsconv_transpose2d_grad_input);
  m.impl("bsconv_transpose2d_grad_values", &bsconv_transpose2d_grad_values);
}

}  // namespace tetris::ops
