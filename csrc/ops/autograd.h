// What the gradients of all ops share.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include <initializer_list>

#include "ops/bsmm_checks.h"

namespace tetris::ops {

// The index tensors of a layer.
struct Index {
  at::Tensor row_ptr, col_idx;
  OptionalTensor row_perm, col_perm;
};

// The tensors that a backward needs: two operands and the layout.
struct Saved {
  at::Tensor first, second;
  Index index;
};
void save(torch::autograd::AutogradContext* ctx, const at::Tensor& first, const at::Tensor& second,
          const Index& index);
Saved load(torch::autograd::AutogradContext* ctx);

// Forward-mode AD has no formula here; without this check its tangents would silently be dropped.
void check_no_tangent(const char* op, std::initializer_list<at::Tensor> operands);

// Whether one of the tensors (undefined ones are absent) takes part in the graph.
bool needs_grad(std::initializer_list<at::Tensor> operands);

// By torch's own functions, whose formulas hold for every order of gradient.
at::Tensor apply_activation(const at::Tensor& z, Activation act);

// Autocast. On CUDA to its type, like torch's own products; float64 stays. On the CPU there are no
// bfloat16 kernels, so lower-precision operands are raised to float32 and the result is float32,
// like torch's own ops on autocast's float32 list.
at::Tensor autocast(const at::Tensor& operand, c10::DeviceType device);
OptionalTensor autocast(const OptionalTensor& operand, c10::DeviceType device);

}  // namespace tetris::ops
