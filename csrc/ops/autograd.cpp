#include "ops/autograd.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>

namespace tetris::ops {

using at::Tensor;
using torch::autograd::AutogradContext;

void save(AutogradContext* ctx, const Tensor& first, const Tensor& second, const Index& index) {
  ctx->save_for_backward({first, second, index.row_ptr, index.col_idx,
                          index.row_perm.value_or(Tensor()), index.col_perm.value_or(Tensor())});
}

Saved load(AutogradContext* ctx) {
  const auto s = ctx->get_saved_variables();
  const auto optional = [](const Tensor& t) {
    return t.defined() ? OptionalTensor(t) : std::nullopt;
  };
  return {s[0], s[1], {s[2], s[3], optional(s[4]), optional(s[5])}};
}

void check_no_tangent(const char* op, std::initializer_list<Tensor> operands) {
  for (const Tensor& t : operands)
    TORCH_CHECK_NOT_IMPLEMENTED(!t.defined() || !t._fw_grad(/*level=*/0).defined(), op,
                                ": forward-mode automatic differentiation (torch.func.jvp, jacfwd, "
                                "dual tensors) is not implemented; use reverse mode (backward, "
                                "autograd.grad)");
}

bool needs_grad(std::initializer_list<Tensor> operands) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor& t : operands)
    if (t.defined() && t.requires_grad()) return true;
  return false;
}

Tensor apply_activation(const Tensor& z, Activation act) {
  switch (act) {
    case Activation::kNone:
      return z;
    case Activation::kRelu:
      return at::relu(z);
    case Activation::kGelu:
      return at::gelu(z, "none");
    case Activation::kGeluTanh:
      return at::gelu(z, "tanh");
    case Activation::kSilu:
      return at::silu(z);
  }
  return z;
}

Tensor autocast(const Tensor& operand, c10::DeviceType device) {
  const bool cpu = device == c10::DeviceType::CPU;
  const auto type = cpu ? at::kFloat : at::autocast::get_autocast_dtype(device);
  return at::autocast::cached_cast(type, operand, device);
}

OptionalTensor autocast(const OptionalTensor& operand, c10::DeviceType device) {
  return operand ? OptionalTensor(autocast(*operand, device)) : std::nullopt;
}

}  // namespace tetris::ops
