// Gradients. The three ops are the three products of one trilinear form
//
//   f(x, values, g) = sum_t sum_ij g[t, i] W(values)[i, j] x[t, j]
//
//   bsmm = df/dg        bsmm_grad_input = df/dx        bsmm_grad_values = df/dvalues
//
// so the gradient of each is made of the other two, and double backward needs nothing more. An
// activation other than none is applied by torch when a gradient is needed: its own formula then
// holds for every order.
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/autograd.h"

namespace tetris::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

Tensor call_bsmm(const Tensor& x, const Tensor& values, const Tensor& row_ptr,
                 const Tensor& col_idx, const OptionalTensor& row_perm,
                 const OptionalTensor& col_perm, const OptionalTensor& bias,
                 c10::SymInt out_features, std::string_view activation) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("tetris::bsmm", "")
          .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                        c10::SymInt, std::string_view)>();
  return op.call(x, values, row_ptr, col_idx, row_perm, col_perm, bias, out_features, activation);
}

Tensor call_grad_input(const Tensor& grad, const Tensor& values, const Tensor& row_ptr,
                       const Tensor& col_idx, const OptionalTensor& row_perm,
                       const OptionalTensor& col_perm, c10::SymInt in_features) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("tetris::bsmm_grad_input", "")
          .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const OptionalTensor&, const OptionalTensor&, c10::SymInt)>();
  return op.call(grad, values, row_ptr, col_idx, row_perm, col_perm, in_features);
}

Tensor call_grad_values(const Tensor& x, const Tensor& grad, const Tensor& row_ptr,
                        const Tensor& col_idx, const OptionalTensor& row_perm,
                        const OptionalTensor& col_perm, c10::SymInt height, c10::SymInt width) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("tetris::bsmm_grad_values", "")
          .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                        const OptionalTensor&, const OptionalTensor&, c10::SymInt, c10::SymInt)>();
  return op.call(x, grad, row_ptr, col_idx, row_perm, col_perm, height, width);
}

struct BsmmFunction : Function<BsmmFunction> {
  // NOTE: needs_input_grad counts the tensors that are there, so those that may be absent and need
  // no gradient come last.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& values,
                        const OptionalTensor& bias, const Tensor& row_ptr, const Tensor& col_idx,
                        const OptionalTensor& row_perm, const OptionalTensor& col_perm,
                        c10::SymInt out_features) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, x, values, {row_ptr, col_idx, row_perm, col_perm});
    ctx->saved_data["bias"] = bias.has_value();
    return call_bsmm(x, values, row_ptr, col_idx, row_perm, col_perm, bias, out_features, "none");
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto [x, values, index] = load(ctx);
    const auto& [row_ptr, col_idx, row_perm, col_perm] = index;
    const Tensor& g = grads[0];
    variable_list result(8);
    if (ctx->needs_input_grad(0))
      result[0] = call_grad_input(g, values, row_ptr, col_idx, row_perm, col_perm, x.sym_size(-1));
    if (ctx->needs_input_grad(1))
      result[1] = call_grad_values(x, g, row_ptr, col_idx, row_perm, col_perm, values.sym_size(2),
                                   values.sym_size(1));
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2))
      result[2] = g.dim() == 1 ? g : g.reshape_symint({-1, g.sym_size(-1)}).sum(0);
    return result;
  }
};

struct GradInputFunction : Function<GradInputFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& values,
                        const Tensor& row_ptr, const Tensor& col_idx,
                        const OptionalTensor& row_perm, const OptionalTensor& col_perm,
                        c10::SymInt in_features) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, grad, values, {row_ptr, col_idx, row_perm, col_perm});
    return call_grad_input(grad, values, row_ptr, col_idx, row_perm, col_perm, in_features);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto [grad, values, index] = load(ctx);
    const auto& [row_ptr, col_idx, row_perm, col_perm] = index;
    const Tensor& x = grads[0];  // takes the place of x in the form
    variable_list result(7);
    if (ctx->needs_input_grad(0))
      result[0] = call_bsmm(x, values, row_ptr, col_idx, row_perm, col_perm, std::nullopt,
                            grad.sym_size(-1), "none");
    if (ctx->needs_input_grad(1))
      result[1] = call_grad_values(x, grad, row_ptr, col_idx, row_perm, col_perm,
                                   values.sym_size(2), values.sym_size(1));
    return result;
  }
};

struct GradValuesFunction : Function<GradValuesFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& grad,
                        const Tensor& row_ptr, const Tensor& col_idx,
                        const OptionalTensor& row_perm, const OptionalTensor& col_perm,
                        c10::SymInt height, c10::SymInt width) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, x, grad, {row_ptr, col_idx, row_perm, col_perm});
    return call_grad_values(x, grad, row_ptr, col_idx, row_perm, col_perm, height, width);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto [x, grad, index] = load(ctx);
    const auto& [row_ptr, col_idx, row_perm, col_perm] = index;
    const Tensor& values = grads[0];  // takes the place of values in the form
    variable_list result(8);
    if (ctx->needs_input_grad(0))
      result[0] =
          call_grad_input(grad, values, row_ptr, col_idx, row_perm, col_perm, x.sym_size(-1));
    if (ctx->needs_input_grad(1))
      result[1] = call_bsmm(x, values, row_ptr, col_idx, row_perm, col_perm, std::nullopt,
                            grad.sym_size(-1), "none");
    return result;
  }
};

Tensor bsmm_autograd(const Tensor& x, const Tensor& values, const Tensor& row_ptr,
                     const Tensor& col_idx, const OptionalTensor& row_perm,
                     const OptionalTensor& col_perm, const OptionalTensor& bias,
                     c10::SymInt out_features, std::string_view activation) {
  check_no_tangent("tetris::bsmm", {x, values, bias.value_or(Tensor())});
  if (!needs_grad({x, values, bias.value_or(Tensor())})) {
    at::AutoDispatchBelowADInplaceOrView guard;  // inference: the fused path, and no graph
    return call_bsmm(x, values, row_ptr, col_idx, row_perm, col_perm, bias, out_features,
                     activation);
  }
  const auto act = parse_activation("tetris::bsmm", activation);
  return apply_activation(
      BsmmFunction::apply(x, values, bias, row_ptr, col_idx, row_perm, col_perm, out_features),
      act);
}

Tensor grad_input_autograd(const Tensor& grad, const Tensor& values, const Tensor& row_ptr,
                           const Tensor& col_idx, const OptionalTensor& row_perm,
                           const OptionalTensor& col_perm, c10::SymInt in_features) {
  check_no_tangent("tetris::bsmm_grad_input", {grad, values});
  return GradInputFunction::apply(grad, values, row_ptr, col_idx, row_perm, col_perm, in_features);
}

Tensor grad_values_autograd(const Tensor& x, const Tensor& grad, const Tensor& row_ptr,
                            const Tensor& col_idx, const OptionalTensor& row_perm,
                            const OptionalTensor& col_perm, c10::SymInt height, c10::SymInt width) {
  check_no_tangent("tetris::bsmm_grad_values", {x, grad});
  return GradValuesFunction::apply(x, grad, row_ptr, col_idx, row_perm, col_perm, height, width);
}

template <c10::DeviceType kDevice>
Tensor bsmm_autocast(const Tensor& x, const Tensor& values, const Tensor& row_ptr,
                     const Tensor& col_idx, const OptionalTensor& row_perm,
                     const OptionalTensor& col_perm, const OptionalTensor& bias,
                     c10::SymInt out_features, std::string_view activation) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  return call_bsmm(autocast(x, kDevice), autocast(values, kDevice), row_ptr, col_idx, row_perm,
                   col_perm, autocast(bias, kDevice), out_features, activation);
}

}  // namespace

TORCH_LIBRARY_IMPL(tetris, Autograd, m) {
  m.impl("bsmm", &bsmm_autograd);
  m.impl("bsmm_grad_input", &grad_input_autograd);
  m.impl("bsmm_grad_values", &grad_values_autograd);
}

TORCH_LIBRARY_IMPL(tetris, AutocastCPU, m) { m.impl("bsmm", &bsmm_autocast<c10::DeviceType::CPU>); }

TORCH_LIBRARY_IMPL(tetris, AutocastCUDA, m) {
  m.impl("bsmm", &bsmm_autocast<c10::DeviceType::CUDA>);
}

}  // namespace tetris::ops
