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

// What went wrong, which nobody else shall be told: torch asks for the last error behind its own
// launches.
inline std::string taken(cudaError_t error) {
  (void)cudaGetLastError();
  return cudaGetErrorString(error);
}

// Beyond 48 KiB a kernel must be allowed its shared memory; asking again costs well under a
// microsecond. Always as much as the device has: the limit belongs to the kernel, and that of one
// thread's launch would forbid another's that takes more.
inline std::string allow_shared_memory(const void* kernel, size_t bytes) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return taken(error);
  if (bytes > size_t(most))
    return "a block of threads takes " + std::to_string(bytes) +
           " bytes of shared memory, and this GPU has " + std::to_string(most);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  return error == cudaSuccess ? std::string() : taken(error);
}

template <class... P, class... A>
std::string launch(void (*kernel)(P...), const LaunchShape& shape, Stream stream, A... arguments) {
  if (shape.shared_bytes > 48 * 1024) {
    const std::string error =
        allow_shared_memory(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
    if (!error.empty()) return error;
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
