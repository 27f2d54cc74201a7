// Gradients of the convolution ops, on the pattern of bsmm_autograd.cpp: of the three products of
// one trilinear form, the gradient of each is made of the other two, for either direction.
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/autograd.h"
#include "ops/conv_checks.h"

namespace tetris::ops {
namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Optional = const OptionalTensor&;

// What else the ops take, beside operands and layout.
struct Settings {
  std::vector<int64_t> kernel_size, stride, padding, output_padding, dilation;
  int64_t groups;
  bool transposed;
};

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor call_conv(const Tensor& x, const Tensor& values, const Index& i, Optional bias,
                 SymInt out_channels, const Settings& s, std::string_view activation,
                 Optional residual) {
  if (s.transposed) {
    static const auto op =
        find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, Optional,
                       Optional, Optional, SymInt, IntArrayRef, IntArrayRef, IntArrayRef,
                       IntArrayRef, IntArrayRef, int64_t, std::string_view, Optional)>(
            "tetris::bsconv_transpose2d");
    return op.call(x, values, i.row_ptr, i.col_idx, i.row_perm, i.col_perm, bias,
                   std::move(out_channels), s.kernel_size, s.stride, s.padding, s.output_padding,
                   s.dilation, s.groups, activation, residual);
  }
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, Optional, Optional,
                     Optional, SymInt, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, int64_t,
                     std::string_view, Optional)>("tetris::bsconv2d");
  return op.call(x, values, i.row_ptr, i.col_idx, i.row_perm, i.col_perm, bias,
                 std::move(out_channels), s.kernel_size, s.stride, s.padding, s.dilation, s.groups,
                 activation, residual);
}

Tensor call_grad_input(const Tensor& grad, const Tensor& values, const Index& i, SymInt in_channels,
                       c10::SymIntArrayRef input_size, const Settings& s) {
  using Op =
      Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, Optional, Optional, SymInt,
             c10::SymIntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, int64_t);
  static const auto conv = find_op<Op>("tetris::bsconv2d_grad_input");
  static const auto transpose = find_op<Op>("tetris::bsconv_transpose2d_grad_input");
  return (s.transposed ? transpose : conv)
      .call(grad, values, i.row_ptr, i.col_idx, i.row_perm, i.col_perm, std::move(in_channels),
            input_size, s.kernel_size, s.stride, s.padding, s.dilation, s.groups);
}

Tensor call_grad_values(const Tensor& x, const Tensor& grad, const Index& i, IntArrayRef block,
                        const Settings& s) {
  using Op = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, Optional, Optional,
                    IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef, int64_t);
  static const auto conv = find_op<Op>("tetris::bsconv2d_grad_values");
  static const auto transpose = find_op<Op>("tetris::bsconv_transpose2d_grad_values");
  return (s.transposed ? transpose : conv)
      .call(x, grad, i.row_ptr, i.col_idx, i.row_perm, i.col_perm, block, s.kernel_size, s.stride,
            s.padding, s.dilation, s.groups);
}

void save_settings(AutogradContext* ctx, const Settings& s) {
  auto& data = ctx->saved_data;
  data["kernel_size"] = s.kernel_size;
  data["stride"] = s.stride;
  data["padding"] = s.padding;
  data["output_padding"] = s.output_padding;
  data["dilation"] = s.dilation;
  data["groups"] = s.groups;
  data["transposed"] = s.transposed;
}

Settings load_settings(AutogradContext* ctx) {
  auto& data = ctx->saved_data;
  return {data["kernel_size"].toIntVector(), data["stride"].toIntVector(),
          data["padding"].toIntVector(),     data["output_padding"].toIntVector(),
          data["dilation"].toIntVector(),    data["groups"].toInt(),
          data["transposed"].toBool()};
}

// The block shape is never symbolic: kernels are chosen by it.
std::vector<int64_t> block_of(const Tensor& values) { return {values.size(2), values.size(1)}; }

Tensor call_grad_input_like(const Tensor& x, const Tensor& grad, const Tensor& values,
                            const Index& i, const Settings& s) {
  const auto size = x.sym_sizes();
  return call_grad_input(grad, values, i, size[1], size.slice(2), s);
}

// NOTE: needs_input_grad counts the tensors that are there, so those that may be absent and need no
// gradient come last.
struct ConvFunction : Function<ConvFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& values, Optional bias,
                        const Index& index, SymInt out_channels, const Settings& s) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, x, values, index);
    save_settings(ctx, s);
    ctx->saved_data["bias"] = bias.has_value();
    return call_conv(x, values, index, bias, std::move(out_channels), s, "none", std::nullopt);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto [x, values, index] = load(ctx);
    const Settings s = load_settings(ctx);
    const Tensor& g = grads[0];
    variable_list result(6);
    if (ctx->needs_input_grad(0)) result[0] = call_grad_input_like(x, g, values, index, s);
    if (ctx->needs_input_grad(1)) result[1] = call_grad_values(x, g, index, block_of(values), s);
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2))
      result[2] = g.sum(IntArrayRef{0, 2, 3});
    return result;
  }
};

struct ConvGradInputFunction : Function<ConvGradInputFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& values,
                        const Index& index, SymInt in_channels, c10::SymIntArrayRef input_size,
                        const Settings& s) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, grad, values, index);
    save_settings(ctx, s);
    return call_grad_input(grad, values, index, std::move(in_channels), input_size, s);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto [grad, values, index] = load(ctx);
    const Settings s = load_settings(ctx);
    const Tensor& x = grads[0];  // takes the place of x in the form
    variable_list result(6);
    if (ctx->needs_input_grad(0))
      result[0] =
          call_conv(x, values, index, std::nullopt, grad.sym_size(1), s, "none", std::nullopt);
    if (ctx->needs_input_grad(1)) result[1] = call_grad_values(x, grad, index, block_of(values), s);
    return result;
  }
};

struct ConvGradValuesFunction : Function<ConvGradValuesFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& grad,
                        const Index& index, std::vector<int64_t> block, const Settings& s) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, x, grad, index);
    save_settings(ctx, s);
    return call_grad_values(x, grad, index, block, s);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto [x, grad, index] = load(ctx);
    const Settings s = load_settings(ctx);
    const Tensor& values = grads[0];  // takes the place of values in the form
    variable_list result(5);
    if (ctx->needs_input_grad(0)) result[0] = call_grad_input_like(x, grad, values, index, s);
    if (ctx->needs_input_grad(1))
      result[1] =
          call_conv(x, values, index, std::nullopt, grad.sym_size(1), s, "none", std::nullopt);
    return result;
  }
};

Tensor conv_autograd(const char* op, const Tensor& x, const Tensor& values, const Index& index,
                     Optional bias, SymInt out_channels, const Settings& s,
                     std::string_view activation, Optional residual) {
  check_no_tangent(op, {x, values, bias.value_or(Tensor()), residual.value_or(Tensor())});
  if (!needs_grad({x, values, bias.value_or(Tensor()), residual.value_or(Tensor())})) {
    at::AutoDispatchBelowADInplaceOrView guard;  // inference: the fused path, and no graph
    return call_conv(x, values, index, bias, std::move(out_channels), s, activation, residual);
  }
  const auto act = parse_activation(op, activation);
  Tensor z = ConvFunction::apply(x, values, bias, index, std::move(out_channels), s);
  if (residual) {
    check_residual(op, *residual, x, z.sym_sizes());
    z = at::add(z, *residual);
  }
  return apply_activation(z, act);
}

Tensor bsconv2d_autograd(const Tensor& x, const Tensor& values, const Tensor& row_ptr,
                         const Tensor& col_idx, Optional row_perm, Optional col_perm, Optional bias,
                         SymInt out_channels, IntArrayRef kernel_size, IntArrayRef stride,
                         IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                         std::string_view activation, Optional residual) {
  const Settings s{kernel_size.vec(), stride.vec(), padding.vec(), {},
                   dilation.vec(),    groups,       false};
  return conv_autograd("tetris::bsconv2d", x, values, {row_ptr, col_idx, row_perm, col_perm}, bias,
                       std::move(out_channels), s, activation, residual);
}

Tensor bsconv_transpose2d_autograd(const Tensor& x, const Tensor& values, const Tensor& row_ptr,
                                   const Tensor& col_idx, Optional row_perm, Optional col_perm,
                                   Optional bias, SymInt out_channels, IntArrayRef kernel_size,
                                   IntArrayRef stride, IntArrayRef padding,
                                   IntArrayRef output_padding, IntArrayRef dilation, int64_t groups,
                                   std::string_view activation, Optional residual) {
  const Settings s{kernel_size.vec(), stride.vec(), padding.vec(), output_padding.vec(),
                   dilation.vec(),    groups,       true};
  return conv_autograd("tetris::bsconv_transpose2d", x, values,
                       {row_ptr, col_idx, row_perm, col_perm}, bias, std::move(out_channels), s,
                       activation, residual);
}

// What a transposed convolution adds to reach the size of `big` from that of `small`.
std::vector<int64_t> output_padding_of(const Tensor& big, IntArrayRef small,
                                       IntArrayRef kernel_size, IntArrayRef stride,
                                       IntArrayRef padding, IntArrayRef dilation) {
  if (big.dim() != 4) return {};  // these the op refuses
  for (const auto& pair : {small, kernel_size, stride, padding, dilation})
    if (pair.size() != 2) return {};
  std::vector<int64_t> result;
  for (int i = 0; i < 2; ++i)
    result.push_back(big.size(2 + i) - ((small[i] - 1) * stride[i] - 2 * padding[i] +
                                        dilation[i] * (kernel_size[i] - 1) + 1));
  return result;
}

template <bool kTransposed>
Tensor grad_input_autograd(const Tensor& grad, const Tensor& values, const Tensor& row_ptr,
                           const Tensor& col_idx, Optional row_perm, Optional col_perm,
                           SymInt in_channels, c10::SymIntArrayRef input_size,
                           IntArrayRef kernel_size, IntArrayRef stride, IntArrayRef padding,
                           IntArrayRef dilation, int64_t groups) {
  check_no_tangent(
      kTransposed ? "tetris::bsconv_transpose2d_grad_input" : "tetris::bsconv2d_grad_input",
      {grad, values});
  const Index index{row_ptr, col_idx, row_perm, col_perm};
  Settings s{kernel_size.vec(), stride.vec(), padding.vec(), {},
             dilation.vec(),    groups,       kTransposed};
  if (!needs_grad({grad, values})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_grad_input(grad, values, index, std::move(in_channels), input_size, s);
  }
  if (kTransposed) {
    std::vector<int64_t> size;
    for (const auto& n : input_size) size.push_back(n.guard_int(__FILE__, __LINE__));
    s.output_padding = output_padding_of(grad, size, kernel_size, stride, padding, dilation);
  }
  return ConvGradInputFunction::apply(grad, values, index, std::move(in_channels), input_size, s);
}

template <bool kTransposed>
Tensor grad_values_autograd(const Tensor& x, const Tensor& grad, const Tensor& row_ptr,
                            const Tensor& col_idx, Optional row_perm, Optional col_perm,
                            IntArrayRef block, IntArrayRef kernel_size, IntArrayRef stride,
                            IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  check_no_tangent(
      kTransposed ? "tetris::bsconv_transpose2d_grad_values" : "tetris::bsconv2d_grad_values",
      {x, grad});
  const Index index{row_ptr, col_idx, row_perm, col_perm};
  Settings s{kernel_size.vec(), stride.vec(), padding.vec(), {},
             dilation.vec(),    groups,       kTransposed};
  if (!needs_grad({x, grad})) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_grad_values(x, grad, index, block, s);
  }
  if (kTransposed && x.dim() == 4)
    s.output_padding =
        output_padding_of(grad, x.sizes().slice(2), kernel_size, stride, padding, dilation);
  return ConvGradValuesFunction::apply(x, grad, index, block.vec(), s);
}

template <c10::DeviceType kDevice>
Tensor bsconv2d_autocast(const Tensor& x, const Tensor& values, const Tensor& row_ptr,
                         const Tensor& col_idx, Optional row_perm, Optional col_perm, Optional bias,
                         SymInt out_channels, IntArrayRef kernel_size, IntArrayRef stride,
                         IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                         std::string_view activation, Optional residual) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const Settings s{kernel_size.vec(), stride.vec(), padding.vec(), {},
                   dilation.vec(),    groups,       false};
  return call_conv(autocast(x, kDevice), autocast(values, kDevice),
                   {row_ptr, col_idx, row_perm, col_perm}, autocast(bias, kDevice),
                   std::move(out_channels), s, activation, autocast(residual, kDevice));
}

template <c10::DeviceType kDevice>
Tensor bsconv_transpose2d_autocast(const Tensor& x, const Tensor& values, const Tensor& row_ptr,
                                   const Tensor& col_idx, Optional row_perm, Optional col_perm,
                                   Optional bias, SymInt out_channels, IntArrayRef kernel_size,
                                   IntArrayRef stride, IntArrayRef padding,
                                   IntArrayRef output_padding, IntArrayRef dilation, int64_t groups,
                                   std::string_view activation, Optional residual) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const Settings s{kernel_size.vec(), stride.vec(), padding.vec(), output_padding.vec(),
                   dilation.vec(),    groups,       true};
  return call_conv(autocast(x, kDevice), autocast(values, kDevice),
                   {row_ptr, col_idx, row_perm, col_perm}, autocast(bias, kDevice),
                   std::move(out_channels), s, activation, autocast(residual, kDevice));
}

}  // namespace

TORCH_LIBRARY_IMPL(tetris, Autograd, m) {
  m.impl("bsconv2d", &bsconv2d_autograd);
  m.impl("bsconv2d_grad_input", &grad_input_autograd<false>);
  m.impl("bsconv2d_grad_values", &grad_values_autograd<false>);
  m.impl("bsconv_transpose2d", &bsconv_transpose2d_autograd);
  m.impl("bsconv_transpose2d_grad_input", &grad_input_autograd<true>);
  m.impl("bsconv_transpose2d_grad_values", &grad_values_autograd<true>);
}

TORCH_LIBRARY_IMPL(tetris, AutocastCPU, m) {
  m.impl("bsconv2d", &bsconv2d_autocast<c10::DeviceType::CPU>);
  m.impl("bsconv_transpose2d", &bsconv_transpose2d_autocast<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(tetris, AutocastCUDA, m) {
  m.impl("bsconv2d", &bsconv2d_autocast<c10::DeviceType::CUDA>);
  m.impl("bsconv_transpose2d", &bsconv_transpose2d_autocast<c10::DeviceType::CUDA>);
}

}  // namespace tetris::ops
