// CUDA's built-in variables, set whenever a thread of a kernel goes on.
#pragma once

#include "cuda_emulator/vector_types.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;
