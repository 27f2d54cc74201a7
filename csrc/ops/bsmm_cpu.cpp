// CPU implementations: check, view the tensors as pointers, run.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "cpu/bsmm.h"
#include "ops/bsmm_checks.h"
#include "ops/output.h"
#include "ops/parallel.h"

namespace tetris::ops {
namespace {

using OptionalTensor = const std::optional<at::Tensor>&;

// [..., features] as a matrix of tokens whose rows are contiguous; copies only where strides force
// it.
at::Tensor as_tokens(const at::Tensor& x) {
  at::Tensor flat = x.reshape({x.numel() / std::max<int64_t>(1, x.size(-1)), x.size(-1)});
  return flat.size(1) <= 1 || flat.stride(1) == 1 ? flat : flat.contiguous();
}

template <class T>
cpu::Matrix<const T> input(const at::Tensor& tokens) {
  return {tokens.const_data_ptr<T>(), tokens.stride(0)};
}

at::Tensor empty_tokens(const at::Tensor& x, int64_t features) {
  auto sizes = x.sizes().vec();
  sizes.back() = features;
  return empty_output(sizes, x, at::MemoryFormat::Contiguous);
}

at::Tensor bsmm(const at::Tensor& x, const at::Tensor& values, const at::Tensor& row_ptr,
                const at::Tensor& col_idx, OptionalTensor row_perm, OptionalTensor col_perm,
                OptionalTensor bias, int64_t out_features, std::string_view activation) {
  constexpr const char* kOp = "tetris::bsmm";
  check_tokens(kOp, "x", x);
  check_values(kOp, x, "x", values, col_idx);
  check_bias(kOp, x, bias, out_features);
  const auto act = parse_activation(kOp, activation);
  const auto layout = check_layout(kOp, row_ptr, col_idx, row_perm, col_perm, out_features,
                                   x.size(-1), values.size(2), values.size(1));
  const at::Tensor tokens = as_tokens(x), v = values.contiguous();
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  at::Tensor y = empty_tokens(x, out_features);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), kOp, [&] {
    check_contents(kOp, cpu::bsmm_forward<scalar_t>(
                            layout.view, v.const_data_ptr<scalar_t>(), input<scalar_t>(tokens),
                            tokens.size(0), b.defined() ? b.const_data_ptr<scalar_t>() : nullptr,
                            act, {y.mutable_data_ptr<scalar_t>(), out_features}, parallel()));
  });
  return y;
}

at::Tensor bsmm_grad_input(const at::Tensor& grad, const at::Tensor& values,
                           const at::Tensor& row_ptr, const at::Tensor& col_idx,
                           OptionalTensor row_perm, OptionalTensor col_perm, int64_t in_features) {
  constexpr const char* kOp = "tetris::bsmm_grad_input";
  check_tokens(kOp, "grad", grad);
  check_values(kOp, grad, "grad", values, col_idx);
  const auto layout = check_layout(kOp, row_ptr, col_idx, row_perm, col_perm, grad.size(-1),
                                   in_features, values.size(2), values.size(1));
  const at::Tensor tokens = as_tokens(grad), v = values.contiguous();
  at::Tensor dx = empty_tokens(grad, in_features);
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), kOp, [&] {
    check_contents(
        kOp, cpu::bsmm_grad_input<scalar_t>(
                 layout.view, v.const_data_ptr<scalar_t>(), input<scalar_t>(tokens), tokens.size(0),
                 {dx.mutable_data_ptr<scalar_t>(), in_features}, parallel()));
  });
  return dx;
}

at::Tensor bsmm_grad_values(const at::Tensor& x, const at::Tensor& grad, const at::Tensor& row_ptr,
                            const at::Tensor& col_idx, OptionalTensor row_perm,
                            OptionalTensor col_perm, int64_t block_height, int64_t block_width) {
  constexpr const char* kOp = "tetris::bsmm_grad_values";
  check_tokens(kOp, "x", x);
  check_tokens(kOp, "grad", grad);
  TORCH_CHECK_TYPE(x.scalar_type() == grad.scalar_type(), kOp,
                   ": x and grad must have one type (got ", x.scalar_type(), " and ",
                   grad.scalar_type(), ")");
  const auto layout = check_layout(kOp, row_ptr, col_idx, row_perm, col_perm, grad.size(-1),
                                   x.size(-1), block_height, block_width);
  const at::Tensor xt = as_tokens(x), gt = as_tokens(grad);
  TORCH_CHECK(x.sizes().slice(0, x.dim() - 1) == grad.sizes().slice(0, grad.dim() - 1), kOp,
              ": x and grad must have the same leading shape (got ", x.sizes(), " and ",
              grad.sizes(), ")");
  at::Tensor dvalues =
      empty_output({layout.view.nnzb, block_width, block_height}, x, at::MemoryFormat::Contiguous);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), kOp, [&] {
    check_contents(kOp, cpu::bsmm_grad_values<scalar_t>(
                            layout.view, input<scalar_t>(xt), input<scalar_t>(gt), xt.size(0),
                            dvalues.mutable_data_ptr<scalar_t>(), parallel()));
  });
  return dvalues;
}

}  // namespace

TORCH_LIBRARY_IMPL(tetris, CPU, m) {
  m.impl("bsmm", &bsmm);
  m.impl("bsmm_grad_input", &bsmm_grad_input);
  m.impl("bsmm_grad_values", &bsmm_grad_values);
}

}  // namespace tetris::ops
