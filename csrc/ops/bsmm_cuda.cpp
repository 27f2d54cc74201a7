// The matrix ops on CUDA: tokens are the pixels of one image, one row high.
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "ops/bsmm_ops.h"
#include "ops/cuda_layout.h"
#include "ops/cuda_run.h"

namespace tetris::ops {
namespace {

using at::Tensor;

// Pixels are counted in 32 bits along an axis of a map: more tokens go in parts.
constexpr int64_t kMaxTokens = int64_t{1} << 30;

cuda::Strides strides(const Tensor& tokens) {
  return {0, tokens.size(1) > 0 ? tokens.stride(0) : 1, 1};
}

// [..., features] as a matrix; it is contiguous.
Tensor matrix(const Tensor& y) { return y.view({y.numel() / y.size(-1), y.size(-1)}); }

cuda::Geometry line(int64_t tokens) {
  cuda::Geometry g;
  g.source_w = g.result_w = static_cast<int>(tokens);
  return g;
}

template <class Fn>
void in_parts(int64_t tokens, Fn fn) {
  for (int64_t begin = 0; begin < tokens; begin += kMaxTokens)
    fn(begin, std::min(kMaxTokens, tokens - begin));
}

void product(const char* op, const Layout& layout, bool transposed, const Tensor& values,
             const Tensor& x, const Tensor& bias, Activation act, const Tensor& result) {
  const c10::OptionalDeviceGuard guard(x.device());
  const PreparedRows prepared = prepare_rows(op, layout, transposed, x);
  const Tensor y = matrix(result);
  cuda::Product p;
  p.w = prepared.rows;
  p.values = values.const_data_ptr();
  p.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  p.x_strides = strides(x);
  p.y_strides = strides(y);
  p.row_perm = transposed ? layout.view.col_perm : layout.view.row_perm;
  p.col_perm = transposed ? layout.view.row_perm : layout.view.col_perm;
  p.dtype = cuda_type(x.scalar_type());
  p.activation = act;
  p.allow_tf32 = matmul_may_round(x.scalar_type());
  in_parts(x.size(0), [&](int64_t begin, int64_t count) {
    p.geometry = line(count);
    p.x = static_cast<const char*>(x.const_data_ptr()) + begin * x.stride(0) * x.element_size();
    p.y = static_cast<char*>(y.mutable_data_ptr()) + begin * y.stride(0) * y.element_size();
    run(op, p, x);
  });
}

struct Cuda {
  static const Backend& backend() { return cuda_backend(); }

  static void forward(const char* op, const Layout& layout, const Tensor& values,
                      const Tensor& tokens, const Tensor& bias, Activation act, Tensor& y) {
    product(op, layout, false, values, tokens, bias, act, y);
  }

  static void grad_input(const char* op, const Layout& layout, const Tensor& values,
                         const Tensor& dy, Tensor& dx) {
    product(op, layout, true, values, dy, Tensor(), Activation::kNone, dx);
  }

  static void grad_values(const char* op, const Layout& layout, const Tensor& x, const Tensor& dy,
                          Tensor& dvalues) {
    TORCH_CHECK_VALUE(x.size(0) <= kMaxTokens, op, ": tokens must be at most 2^30 (got ", x.size(0),
                      "); pass them in parts and add the results");
    const c10::OptionalDeviceGuard guard(x.device());
    const PreparedRows prepared = prepare_rows(op, layout, false, x);
    cuda::SampledProduct p;
    p.w = prepared.rows;
    p.geometry = line(x.size(0));
    p.x = x.const_data_ptr();
    p.x_strides = strides(x);
    p.dy = dy.const_data_ptr();
    p.dy_strides = strides(dy);
    p.dvalues = dvalues.mutable_data_ptr();
    p.row_perm = layout.view.row_perm;
    p.col_perm = layout.view.col_perm;
    p.dtype = cuda_type(x.scalar_type());
    p.allow_tf32 = matmul_may_round(x.scalar_type());
    run(op, p, x, dvalues);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(tetris, TETRIS_CUDA_KEY, m) { BsmmOps<Cuda>::implement(m); }

}  // namespace tetris::ops
