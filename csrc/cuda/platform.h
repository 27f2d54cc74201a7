// What CUDA C++ adds to C++, from nvcc or from the emulator.
//
// Kernels are written against this header and ptx.cuh alone. Compiled by nvcc, the names below are
// CUDA's own. Compiled by a host compiler with TETRIS_CUDA_EMULATOR defined, tests/cuda_emulator
// provides the same names on the CPU, so that the very sources that ship are tested where there is
// no GPU. A host compiler without it sees what the rest of the library needs: launchers' types.
//
// Two rules keep kernels portable between the two: all shared memory is dynamic and reached through
// dynamic_shared(), and nothing but ptx.cuh holds inline PTX.
#pragma once

#if defined(TETRIS_CUDA_EMULATOR)
#include "cuda_emulator/cuda.h"
#elif defined(__CUDACC__)
#include <cuda_runtime.h>

namespace tetris::cuda {

// The block's dynamic shared memory, aligned for any use (1024 bytes: a swizzled tile of TMA).
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char tetris_shared[];
  return tetris_shared;
}

}  // namespace tetris::cuda
#endif

#if defined(__CUDACC__) || defined(TETRIS_CUDA_EMULATOR)
#define TETRIS_DEVICE __device__ __forceinline__
#define TETRIS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TETRIS_HOST_DEVICE inline
#endif
