// Results, and errors found while computing them.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace tetris::ops {

// Uninitialized, of the type and on the device of `like`. On the CPU a large output is fresh
// memory: the first touch of each 4 KiB page costs a fault, which for 32 MB took 5 to 10 ms here,
// as long as a 95 % sparse product itself. Huge pages make it 16 faults.
at::Tensor empty_output(at::IntArrayRef sizes, const at::Tensor& like, at::MemoryFormat format);

// Raises if a kernel's driver found a rule of the index tensors broken.
void check_contents(const char* op, const std::string& error);

}  // namespace tetris::ops
