// What the CUDA ops need of torch's CUDA side: the device, its stream, whether that is being
// captured into a graph. Kernels and their drivers know no torch. The tests have these functions a
// second time, over CPU tensors, to run the ops on the emulator (tests/emulated_ops).
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "cuda/config.h"
#include "cuda/problem.h"
#include "ops/backend.h"

namespace tetris::ops {

// CUDA tensors; the types that kernels have.
const Backend& cuda_backend();

// Of the current stream of x's device, which must be the current device.
cuda::Stream current_stream(const at::Tensor& x);
bool is_capturing(const at::Tensor& x);
void synchronize(const at::Tensor& x);

// As long as what it returns lives, the calling thread may wait, copy and allocate while another
// captures a CUDA graph, which would be invalid otherwise: torch captures in the mode "global". The
// thread that gets it must be the one that lets it go, and its stream must not be captured itself.
std::shared_ptr<void> beside_captures();

// Memory of t must not be used again before what the current stream was given is done.
void record_use(const at::Tensor& t, const at::Tensor& x);

const cuda::DeviceInfo& device_info(const at::Tensor& x);

}  // namespace tetris::ops
