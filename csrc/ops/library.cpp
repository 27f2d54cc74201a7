// Every op of the library on one page.
//
//   x        [..., in]           float32 or float64, any strides
//   values   [nnzb, bi, bo]      stored blocks, input-major; the block shape is read from here
//   row_ptr  int32[G + 1]        G = ceil(out / bo) block rows over packed output slots
//   col_idx  int32[nnzb]         column group of each block, ascending within a block row
//   row_perm int32[out]          packed slot s is original output row_perm[s]; None: identity
//   col_perm int32[in]           the same for inputs
//   activation                   none | relu | gelu | gelu_tanh | silu
//
// Convolutions: x [N, C, H, W], contiguous or channels_last, and the result in the format of x.
// Blocks lie at single kernel positions (taps): col_idx counts tap * ceil(in / bi) + column group,
// tap = ky * kw + kx. Of several groups, each has its own block rows, one group's behind the
// other's, and col_idx counts within the group. Of a transposed convolution too, rows are outputs.
//
// CPU kernels: *_cpu.cpp. Gradients and autocast: *_autograd.cpp. Fake kernels: ops.py.
#include <torch/library.h>

TORCH_LIBRARY(tetris, m) {
  // y = activation(x W^T + bias), W the dense weight that the blocks stand for
  m.def(
      "bsmm(Tensor x, Tensor values, Tensor row_ptr, Tensor col_idx, Tensor? row_perm, "
      "Tensor? col_perm, Tensor? bias, SymInt out_features, str activation=\"none\") -> Tensor");
  // dx = dy W
  m.def(
      "bsmm_grad_input(Tensor grad, Tensor values, Tensor row_ptr, Tensor col_idx, "
      "Tensor? row_perm, Tensor? col_perm, SymInt in_features) -> Tensor");
  // dvalues = dy^T x on the stored blocks; entries outside the matrix are zero
  m.def(
      "bsmm_grad_values(Tensor x, Tensor grad, Tensor row_ptr, Tensor col_idx, Tensor? row_perm, "
      "Tensor? col_perm, SymInt block_height, SymInt block_width) -> Tensor");
  // y = activation(conv2d(x, W) + bias + residual)
  m.def(
      "bsconv2d(Tensor x, Tensor values, Tensor row_ptr, Tensor col_idx, Tensor? row_perm, "
      "Tensor? col_perm, Tensor? bias, SymInt out_channels, int[2] kernel_size, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, str activation=\"none\", "
      "Tensor? residual=None) -> Tensor");
  // its gradients, as above: dx of the size given, dvalues on the stored blocks
  m.def(
      "bsconv2d_grad_input(Tensor grad, Tensor values, Tensor row_ptr, Tensor col_idx, "
      "Tensor? row_perm, Tensor? col_perm, SymInt in_channels, SymInt[2] input_size, "
      "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor");
  m.def(
      "bsconv2d_grad_values(Tensor x, Tensor grad, Tensor row_ptr, Tensor col_idx, "
      "Tensor? row_perm, Tensor? col_perm, int[2] block, int[2] kernel_size, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups) -> Tensor");
  // y = activation(conv_transpose2d(x, W) + bias + residual)
  m.def(
      "bsconv_transpose2d(Tensor x, Tensor values, Tensor row_ptr, Tensor col_idx, "
      "Tensor? row_perm, Tensor? col_perm, Tensor? bias, SymInt out_channels, int[2] kernel_size, "
      "int[2] stride, int[2] padding, int[2] output_padding, int[2] dilation, int groups, "
      "str activation=\"none\", Tensor? residual=None) -> Tensor");
  m.def(  // as for bsconv2d
      "bsconv_transpose2d_grad_input(Tensor grad, Tensor values, Tensor row_ptr, Tensor col_idx, "
      "Tensor? row_perm, Tensor? col_perm, SymInt in_channels, SymInt[2] input_size, "
      "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor");
  m.def(
      "bsconv_transpose2d_grad_values(Tensor x, Tensor grad, Tensor row_ptr, Tensor col_idx, "
      "Tensor? row_perm, Tensor? col_perm, int[2] block, int[2] kernel_size, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups) -> Tensor");
}
