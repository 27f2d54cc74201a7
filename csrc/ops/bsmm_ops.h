// The matrix ops, written once for every backend: check, view the tensors as matrices of tokens,
// let the backend compute.
//
// An Engine is a struct of static functions. Tokens are [tokens, features] with contiguous rows,
// values and bias contiguous, bias undefined where there is none:
//
//   const Backend& backend();
//   void forward(op, layout, values, tokens, bias, act, y);
//   void grad_input(op, layout, values, dy, dx);
//   void grad_values(op, layout, x, dy, dvalues);
#pragma once

#include <torch/library.h>

#include "ops/bsmm_checks.h"
#include "ops/output.h"

namespace tetris::ops {

// [..., features] as a matrix of tokens whose rows are contiguous; copies only where strides force
// it.
inline at::Tensor as_tokens(const at::Tensor& x) {
  at::Tensor flat = x.reshape({x.numel() / std::max<int64_t>(1, x.size(-1)), x.size(-1)});
  return flat.size(1) <= 1 || flat.stride(1) == 1 ? flat : flat.contiguous();
}

inline at::Tensor empty_tokens(const at::Tensor& x, int64_t features) {
  auto sizes = x.sizes().vec();
  sizes.back() = features;
  return empty_output(sizes, x, at::MemoryFormat::Contiguous);
}

template <class Engine>
struct BsmmOps {
  using Tensor = at::Tensor;
  using Optional = const OptionalTensor&;

  static Tensor bsmm(const Tensor& x, const Tensor& values, const Tensor& row_ptr,
                     const Tensor& col_idx, Optional row_perm, Optional col_perm, Optional bias,
                     int64_t out_features, std::string_view activation) {
    constexpr const char* kOp = "tetris::bsmm";
    check_tokens(kOp, "x", x, Engine::backend());
    check_values(kOp, x, "x", values, col_idx);
    check_bias(kOp, x, bias, out_features);
    const auto act = parse_activation(kOp, activation);
    const auto layout = check_layout(kOp, x, row_ptr, col_idx, row_perm, col_perm, out_features,
                                     x.size(-1), values.size(2), values.size(1));
    Tensor y = empty_tokens(x, out_features);
    Engine::forward(kOp, layout, values.contiguous(), as_tokens(x),
                    bias ? bias->contiguous() : Tensor(), act, y);
    return y;
  }

  static Tensor bsmm_grad_input(const Tensor& grad, const Tensor& values, const Tensor& row_ptr,
                                const Tensor& col_idx, Optional row_perm, Optional col_perm,
                                int64_t in_features) {
    constexpr const char* kOp = "tetris::bsmm_grad_input";
    check_tokens(kOp, "grad", grad, Engine::backend());
    check_values(kOp, grad, "grad", values, col_idx);
    const auto layout = check_layout(kOp, grad, row_ptr, col_idx, row_perm, col_perm, grad.size(-1),
                                     in_features, values.size(2), values.size(1));
    Tensor dx = empty_tokens(grad, in_features);
    Engine::grad_input(kOp, layout, values.contiguous(), as_tokens(grad), dx);
    return dx;
  }

  static Tensor bsmm_grad_values(const Tensor& x, const Tensor& grad, const Tensor& row_ptr,
                                 const Tensor& col_idx, Optional row_perm, Optional col_perm,
                                 int64_t block_height, int64_t block_width) {
    constexpr const char* kOp = "tetris::bsmm_grad_values";
    check_tokens(kOp, "x", x, Engine::backend());
    check_tokens(kOp, "grad", grad, Engine::backend());
    check_like(kOp, "grad", grad, "x", x);
    const auto layout = check_layout(kOp, x, row_ptr, col_idx, row_perm, col_perm, grad.size(-1),
                                     x.size(-1), block_height, block_width);
    TORCH_CHECK(x.sizes().slice(0, x.dim() - 1) == grad.sizes().slice(0, grad.dim() - 1), kOp,
                ": x and grad must have the same leading shape (got ", x.sizes(), " and ",
                grad.sizes(), ")");
    Tensor dvalues = empty_output({layout.view.nnzb, block_width, block_height}, x,
                                  at::MemoryFormat::Contiguous);
    Engine::grad_values(kOp, layout, as_tokens(x), as_tokens(grad), dvalues);
    return dvalues;
  }

  static void implement(torch::Library& m) {
    m.impl("bsmm", &bsmm);
    m.impl("bsmm_grad_input", &bsmm_grad_input);
    m.impl("bsmm_grad_values", &bsmm_grad_values);
  }
};

}  // namespace tetris::ops
