// Starting a kernel: the same call under nvcc and under the emulator.
//
// Nothing here synchronizes or allocates, so a launch may be captured into a CUDA graph. A problem
// that CUDA refuses comes back as a message; an empty string is success.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/platform.h"
#include "cuda/problem.h"

namespace tetris::cuda {

struct LaunchShape {
  unsigned blocks_x, blocks_y = 1, blocks_z = 1;
  int threads;
  size_t shared_bytes = 0;
};

#if defined(TETRIS_CUDA_EMULATOR)

template <class... P, class... A>
std::string launch(void (*kernel)(P...), const LaunchShape& shape, Stream, A... arguments) {
  return emulator::launch(kernel, {shape.blocks_x, shape.blocks_y, shape.blocks_z}, shape.threads,
                          shape.shared_bytes, P(arguments)...);
}

#elif defined(__CUDACC__)

template <class... P, class... A>
std::string launch(void (*kernel)(P...), const LaunchShape& shape, Stream stream, A... arguments) {
  // Beyond 48 KiB only on request; asking again costs well under a microsecond.
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  // clang-format off: of a header it takes >>> for three operators
  kernel<<<dim3(shape.blocks_x, shape.blocks_y, shape.blocks_z), shape.threads, shape.shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(P(arguments)...);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? std::string() : cudaGetErrorString(error);
}

#endif

}  // namespace tetris::cuda
