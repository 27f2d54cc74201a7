// In a build without CUDA kernels: what an op on CUDA tensors says.
#include <torch/library.h>

namespace tetris::ops {
namespace {

void refuse(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().name(), ": this build of tetris has no CUDA kernels (", TETRIS_CUDA_WHY,
      "). Build it where nvcc and a torch with CUDA are: TETRIS_CUDA=1 pip install "
      "--no-build-isolation . (it then says what is missing), or move model and input to the CPU");
}

}  // namespace

TORCH_LIBRARY_IMPL(tetris, CUDA, m) {
  for (const char* name : {"bsmm", "bsmm_grad_input", "bsmm_grad_values", "bsconv2d",
                           "bsconv2d_grad_input", "bsconv2d_grad_values", "bsconv_transpose2d",
                           "bsconv_transpose2d_grad_input", "bsconv_transpose2d_grad_values"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse>());
}

}  // namespace tetris::ops
