#include "ops/conv_checks.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>

namespace tetris::ops {
namespace {

void check_pair(const char* op, const char* name, at::IntArrayRef pair, int64_t least) {
  TORCH_CHECK_VALUE(pair.size() == 2 && pair[0] >= least && pair[1] >= least, op, ": ", name,
                    " must be two numbers of at least ", least, " (got ", pair, ")");
  // Far beyond any map, and products of them stay in 64 bits.
  TORCH_CHECK_VALUE(pair[0] < (1 << 24) && pair[1] < (1 << 24), op, ": ", name,
                    " must be less than 2^24 (got ", pair, ")");
}

void check_arguments(const char* op, const ConvArguments& a) {
  check_pair(op, "kernel_size", a.kernel_size, 1);
  check_pair(op, "stride", a.stride, 1);
  check_pair(op, "padding", a.padding, 0);
  check_pair(op, "dilation", a.dilation, 1);
  TORCH_CHECK_VALUE(a.groups >= 1, op, ": groups must be at least 1 (got ", a.groups, ")");
}

int64_t reach(const ConvArguments& a, int i) { return a.dilation[i] * (a.kernel_size[i] - 1) + 1; }

cpu::ConvAxis axis(const ConvArguments& a, int i, int64_t big, int64_t small) {
  return {big, small, a.kernel_size[i], a.stride[i], a.padding[i], a.dilation[i]};
}

}  // namespace

cpu::ConvShape conv_shape(const char* op, const ConvArguments& a, int64_t images, int64_t big_h,
                          int64_t big_w) {
  check_arguments(op, a);
  const int64_t big[] = {big_h, big_w};
  int64_t small[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t room = big[i] + 2 * a.padding[i] - reach(a, i);
    TORCH_CHECK_VALUE(room >= 0, op, ": the map with its padding must be at least as large as the ",
                      "kernel's reach, dilation * (kernel_size - 1) + 1 (got ", big_h, "x", big_w,
                      ", padding ", a.padding, ", kernel_size ", a.kernel_size, " and dilation ",
                      a.dilation, ")");
    small[i] = room / a.stride[i] + 1;
  }
  return {images, axis(a, 0, big_h, small[0]), axis(a, 1, big_w, small[1])};
}

cpu::ConvShape transposed_shape(const char* op, const ConvArguments& a,
                                at::IntArrayRef output_padding, int64_t images, int64_t small_h,
                                int64_t small_w) {
  check_arguments(op, a);
  check_pair(op, "output_padding", output_padding, 0);
  const int64_t small[] = {small_h, small_w};
  int64_t big[2];
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK_VALUE(output_padding[i] < std::max(a.stride[i], a.dilation[i]), op,
                      ": output_padding must be less than stride or dilation (got ", output_padding,
                      ", stride ", a.stride, " and dilation ", a.dilation, ")");
    big[i] = (small[i] - 1) * a.stride[i] - 2 * a.padding[i] + reach(a, i) + output_padding[i];
    TORCH_CHECK_VALUE(big[i] >= 1, op, ": the output must have pixels (got a size of ", big[i],
                      " from ", small_h, "x", small_w, ", padding ", a.padding, ")");
  }
  return {images, axis(a, 0, big[0], small_h), axis(a, 1, big[1], small_w)};
}

cpu::ConvShape transposed_shape_between(const char* op, const ConvArguments& a, int64_t images,
                                        at::IntArrayRef small, at::IntArrayRef big) {
  check_arguments(op, a);
  for (int i = 0; i < 2; ++i) {
    // As many pixels as that are never reached, and products of fewer stay in 64 bits.
    const bool fits = small[i] <= big[i] + 2 * a.padding[i];
    const int64_t added =
        fits ? big[i] + 2 * a.padding[i] - (small[i] - 1) * a.stride[i] - reach(a, i) : -1;
    TORCH_CHECK_VALUE(
        added >= 0 && added < std::max(a.stride[i], a.dilation[i]), op,
        ": grad must have the size that the input's gives with an output_padding less "
        "than stride or dilation (got ",
        big, " from ", small, ")");
  }
  return {images, axis(a, 0, big[0], small[0]), axis(a, 1, big[1], small[1])};
}

void check_map(const char* op, const char* name, const at::Tensor& x, const Backend& backend) {
  check_operand(op, name, x, backend);
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": ", name, " must be [N, C, H, W] (got shape ", x.sizes(),
                    ")");
  TORCH_CHECK_VALUE(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, op, ": ", name,
                    " must have channels and pixels (got shape ", x.sizes(), ")");
}

void check_residual(const char* op, const at::Tensor& residual, const at::Tensor& x,
                    c10::SymIntArrayRef result_size) {
  TORCH_CHECK(residual.device() == x.device() && residual.layout() == at::kStrided, op,
              ": residual must be a dense tensor on the device of x (got ", residual.layout(),
              " on ", residual.device(), ")");
  TORCH_CHECK_TYPE(residual.scalar_type() == x.scalar_type(), op,
                   ": residual and x must have one type (got ", residual.scalar_type(), " and ",
                   x.scalar_type(), ")");
  TORCH_CHECK_VALUE(residual.sym_sizes() == result_size, op,
                    ": residual must be shaped like the result (got ", residual.sym_sizes(),
                    " and ", result_size, ")");
}

Layout check_conv_layout(const char* op, const ConvArguments& a, const at::Tensor& x,
                         const at::Tensor& row_ptr, const at::Tensor& col_idx,
                         const OptionalTensor& row_perm, const OptionalTensor& col_perm,
                         int64_t out_channels, int64_t in_channels, int64_t block_height,
                         int64_t block_width) {
  TORCH_CHECK_VALUE(
      out_channels >= 1 && out_channels % a.groups == 0 && in_channels % a.groups == 0, op,
      ": groups must divide the channels (got ", in_channels, " to ", out_channels,
      " channels and groups ", a.groups, ")");
  const int64_t taps = a.kernel_size[0] * a.kernel_size[1];  // less than 2^48, see check_pair
  TORCH_CHECK_VALUE(in_channels <= std::numeric_limits<int32_t>::max() / taps, op,
                    ": kernel positions times channels must be less than 2^31 (got kernel_size ",
                    a.kernel_size, " and ", in_channels, " channels)");
  return check_layout(op, x, row_ptr, col_idx, row_perm, col_perm, out_channels, in_channels,
                      block_height, block_width, taps, a.groups);
}

}  // namespace tetris::ops
