#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tetris::cpu {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// Panels from this size on get a huge page of their own: in small pages, which lie anywhere in
// physical memory, parts of a panel push each other out of L2.
constexpr size_t kHugeFrom = size_t{64} << 10;

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }

  void* reserve(size_t bytes) {
    if (bytes <= size) return data;
    std::free(data);
    data = nullptr;
    size = 0;
    const size_t align = bytes >= kHugeFrom ? kHugePage : 64;
    const size_t rounded = (bytes + align - 1) / align * align;
    if (posix_memalign(&data, align, rounded) != 0) {
      data = nullptr;
      throw std::bad_alloc();
    }
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (align == kHugePage) madvise(data, rounded, MADV_HUGEPAGE);  // advice: failure is harmless
#endif
    size = rounded;
    return data;
  }
};

thread_local Buffer buffers[static_cast<int>(ScratchSlot::kCount)];

}  // namespace

void* scratch_bytes(ScratchSlot slot, size_t bytes) {
  return buffers[static_cast<int>(slot)].reserve(bytes > 0 ? bytes : 1);
}

}  // namespace tetris::cpu
