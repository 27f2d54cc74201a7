#include "ops/output.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tetris::ops {

at::Tensor empty_output(at::IntArrayRef sizes, const at::Tensor& like, at::MemoryFormat format) {
  at::Tensor y = at::empty(sizes, like.options().memory_format(format));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kHugePage = size_t{2} << 20;
  if (y.is_cpu() && y.nbytes() >= 4 * kHugePage) {
    const auto data = reinterpret_cast<uintptr_t>(y.mutable_data_ptr());
    const auto begin = (data + kHugePage - 1) / kHugePage * kHugePage;
    const auto end = (data + y.nbytes()) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(begin), end - begin,
            MADV_HUGEPAGE);  // advice: failure is harmless
  }
#endif
  return y;
}

void check_contents(const char* op, const std::string& error) {
  TORCH_CHECK_VALUE(error.empty(), op, ": ", error);
}

}  // namespace tetris::ops
