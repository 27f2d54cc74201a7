// Running a kernel: one CTA after another, in an order that the seed chooses.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

#include "cuda_emulator/vector_types.h"

namespace tetris::cuda::emulator {

// An empty string, or what CUDA would refuse, or the first rule that the kernel broke: the CTA, the
// thread, the instruction, the line. Bad accesses to memory are AddressSanitizer's to report; it
// tells the CTA and thread, too.
std::string run_grid(dim3 grid, int threads, size_t shared_bytes, size_t parameter_bytes,
                     const std::function<void()>& kernel);

template <class T>
struct Identity {
  using type = T;
};

template <class... P>
std::string launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes,
                   typename Identity<P>::type... arguments) {
  return run_grid(grid, threads, shared_bytes, (sizeof(P) + ... + 0),
                  [&] { kernel(arguments...); });
}

}  // namespace tetris::cuda::emulator
