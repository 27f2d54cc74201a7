// Argument checks shared by every implementation of the bsmm ops. A message gives op, rule, values.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "core/activation.h"
#include "core/view.h"
#include "ops/backend.h"

namespace tetris::ops {

using OptionalTensor = std::optional<at::Tensor>;

// The index tensors of one layer, contiguous and alive, and the view kernels take.
struct Layout {
  at::Tensor row_ptr, col_idx;
  OptionalTensor row_perm, col_perm;
  BlockSparseView view;
};

Activation parse_activation(const char* op, std::string_view name);

// x: dense, on a device and of a type of this backend.
void check_operand(const char* op, const char* name, const at::Tensor& x, const Backend& backend);

// The same, [..., features]. Other operands must lie beside it.
void check_tokens(const char* op, const char* name, const at::Tensor& x, const Backend& backend);

// Shapes, types and devices of the index tensors; their contents are checked by the CPU kernels'
// driver, and on CUDA when a layout is first seen (cuda_layout.h).
Layout check_layout(const char* op, const at::Tensor& x, const at::Tensor& row_ptr,
                    const at::Tensor& col_idx, const OptionalTensor& row_perm,
                    const OptionalTensor& col_perm, int64_t out_features, int64_t in_features,
                    int64_t block_height, int64_t block_width, int64_t taps = 1,
                    int64_t groups = 1);

// values: [nnzb, bi, bo] of the type of x.
void check_values(const char* op, const at::Tensor& x, const char* x_name, const at::Tensor& values,
                  const at::Tensor& col_idx);

// grad, or x of a gradient: of the type and on the device of x.
void check_like(const char* op, const char* name, const at::Tensor& t, const char* x_name,
                const at::Tensor& x);

void check_bias(const char* op, const at::Tensor& x, const OptionalTensor& bias,
                int64_t out_features);

}  // namespace tetris::ops
