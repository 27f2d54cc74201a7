#include "ops/bsmm_checks.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>

namespace tetris::ops {
namespace {

constexpr int64_t kMaxBlock = 128;

std::string place(const at::Device& device) { return device.is_cpu() ? "the CPU" : device.str(); }

void check_beside(const char* op, const char* name, const at::Tensor& t, const char* x_name,
                  const at::Tensor& x) {
  TORCH_CHECK(t.device() == x.device() && t.layout() == at::kStrided, op, ": ", name,
              " must be a dense tensor on ", place(x.device()), " like ", x_name, " (got ",
              t.layout(), " on ", t.device(), ")");
}

at::Tensor check_index(const char* op, const at::Tensor& x, const char* name, const at::Tensor& t,
                       int64_t size, const char* rule) {
  check_beside(op, name, t, "x", x);
  TORCH_CHECK_TYPE(t.scalar_type() == at::kInt, op, ": ", name, " must be int32 (got ",
                   t.scalar_type(), ")");
  TORCH_CHECK(t.dim() == 1, op, ": ", name, " must be one-dimensional (got shape ", t.sizes(), ")");
  TORCH_CHECK(t.numel() == size, op, ": ", name, " must have ", rule, " elements (got ", t.numel(),
              " and ", size, ")");
  return t.contiguous();
}

}  // namespace

Activation parse_activation(const char* op, std::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  TORCH_CHECK_VALUE(false, op, ": activation must be none, relu, gelu, gelu_tanh or silu (got '",
                    name, "')");
}

Layout check_layout(const char* op, const at::Tensor& x, const at::Tensor& row_ptr,
                    const at::Tensor& col_idx, const OptionalTensor& row_perm,
                    const OptionalTensor& col_perm, int64_t out_features, int64_t in_features,
                    int64_t block_height, int64_t block_width, int64_t taps, int64_t groups) {
  constexpr int64_t kMaxFeatures = std::numeric_limits<int32_t>::max();
  TORCH_CHECK(block_height >= 1 && block_height <= kMaxBlock && block_width >= 1 &&
                  block_width <= kMaxBlock,
              op, ": block height and width must be in [1, 128] (got ", block_height, "x",
              block_width, ")");
  TORCH_CHECK(out_features >= 1 && out_features <= kMaxFeatures, op,
              ": out_features must be in [1, 2^31) (got ", out_features, ")");
  TORCH_CHECK(in_features >= 1 && in_features <= kMaxFeatures, op,
              ": in_features must be in [1, 2^31) (got ", in_features, ")");
  Layout layout;
  BlockSparseView& v = layout.view;
  v.out = out_features;
  v.in = in_features;
  v.bo = block_height;
  v.bi = block_width;
  v.taps = taps;
  v.groups = groups;
  v.nnzb = col_idx.numel();
  layout.row_ptr =
      check_index(op, x, "row_ptr", row_ptr, v.block_rows() + 1,
                  groups == 1 ? "ceil(out_features / block height) + 1"
                              : "groups * ceil(out_features / groups / block height) + 1");
  layout.col_idx = check_index(op, x, "col_idx", col_idx, v.nnzb, "nnzb");
  v.row_ptr = layout.row_ptr.const_data_ptr<int32_t>();
  v.col_idx = layout.col_idx.const_data_ptr<int32_t>();
  if (row_perm) {
    layout.row_perm = check_index(op, x, "row_perm", *row_perm, v.out, "out_features");
    v.row_perm = layout.row_perm->const_data_ptr<int32_t>();
  }
  if (col_perm) {
    layout.col_perm = check_index(op, x, "col_perm", *col_perm, v.in, "in_features");
    v.col_perm = layout.col_perm->const_data_ptr<int32_t>();
  }
  return layout;
}

void check_operand(const char* op, const char* name, const at::Tensor& x, const Backend& backend) {
  TORCH_CHECK(x.device().type() == backend.device && x.layout() == at::kStrided, op, ": ", name,
              " must be a dense tensor on ", backend.place, " (got ", x.layout(), " on ",
              x.device(), ")");
  const auto& types = backend.types;
  TORCH_CHECK_TYPE(std::find(types.begin(), types.end(), x.scalar_type()) != types.end(), op, ": ",
                   name, " must be ", backend.type_names, " (got ", x.scalar_type(), ")",
                   backend.hint);
}

void check_tokens(const char* op, const char* name, const at::Tensor& x, const Backend& backend) {
  check_operand(op, name, x, backend);
  TORCH_CHECK(x.dim() >= 1, op, ": ", name,
              " must have at least one dimension, [..., features] (got a scalar)");
}

void check_values(const char* op, const at::Tensor& x, const char* x_name, const at::Tensor& values,
                  const at::Tensor& col_idx) {
  check_beside(op, "values", values, x_name, x);
  TORCH_CHECK(values.dim() == 3, op,
              ": values must be [nnzb, block width, block height] (got shape ", values.sizes(),
              ")");
  TORCH_CHECK_TYPE(values.scalar_type() == x.scalar_type(), op, ": values and ", x_name,
                   " must have one type (got ", values.scalar_type(), " and ", x.scalar_type(),
                   ")");
  TORCH_CHECK(values.size(0) == col_idx.numel(), op,
              ": values.size(0) and col_idx must both be nnzb, the stored blocks (got ",
              values.size(0), " and ", col_idx.numel(), ")");
}

void check_like(const char* op, const char* name, const at::Tensor& t, const char* x_name,
                const at::Tensor& x) {
  check_beside(op, name, t, x_name, x);
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), op, ": ", x_name, " and ", name,
                   " must have one type (got ", x.scalar_type(), " and ", t.scalar_type(), ")");
}

void check_bias(const char* op, const at::Tensor& x, const OptionalTensor& bias,
                int64_t out_features) {
  if (!bias) return;
  check_beside(op, "bias", *bias, "x", x);
  TORCH_CHECK_TYPE(bias->scalar_type() == x.scalar_type(), op,
                   ": bias and x must have one type (got ", bias->scalar_type(), " and ",
                   x.scalar_type(), ")");
  TORCH_CHECK(bias->dim() == 1 && bias->numel() == out_features, op,
              ": bias must be [out_features] (got shape ", bias->sizes(), " and out_features ",
              out_features, ")");
}

}  // namespace tetris::ops
