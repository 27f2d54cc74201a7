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
// CPU kernels: bsmm_cpu.cpp. Gradients and autocast: bsmm_autograd.cpp. Fake kernels: ops.py.
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
}
