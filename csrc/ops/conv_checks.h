// Argument checks shared by every implementation of the convolution ops.
#pragma once

#include "cpu/conv_geometry.h"
#include "ops/bsmm_checks.h"

namespace tetris::ops {

// The arguments that say which convolution it is.
struct ConvArguments {
  at::IntArrayRef kernel_size, stride, padding, dilation;
  int64_t groups;
};

// The convolution from big to small maps, given one of the two sizes; the other follows.
cpu::ConvShape conv_shape(const char* op, const ConvArguments& a, int64_t images, int64_t big_h,
                          int64_t big_w);
cpu::ConvShape transposed_shape(const char* op, const ConvArguments& a,
                                at::IntArrayRef output_padding, int64_t images, int64_t small_h,
                                int64_t small_w);
// The same given both, each (height, width): what a gradient of a transposed convolution sees.
cpu::ConvShape transposed_shape_between(const char* op, const ConvArguments& a, int64_t images,
                                        at::IntArrayRef small, at::IntArrayRef big);

// [N, C, H, W] with at least one channel and pixel; dense, on a device and of a type of this
// backend.
void check_map(const char* op, const char* name, const at::Tensor& x, const Backend& backend);

// residual: of the type and on the device of x, shaped like the result.
void check_residual(const char* op, const at::Tensor& residual, const at::Tensor& x,
                    c10::SymIntArrayRef result_size);

// The layout of a convolution; the block shape comes with the values or the caller.
Layout check_conv_layout(const char* op, const ConvArguments& a, const at::Tensor& x,
                         const at::Tensor& row_ptr, const at::Tensor& col_idx,
                         const OptionalTensor& row_perm, const OptionalTensor& col_perm,
                         int64_t out_channels, int64_t in_channels, int64_t block_height,
                         int64_t block_width);

}  // namespace tetris::ops
