// Per-thread working memory that is kept between calls.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tetris::cpu {

enum class ScratchSlot : int {
  kX,
  kY,
  kInverseRow,
  kInverseCol,
  kVector,
  kLists,
  kValues,
  kIndex,
  kCount
};

// At least `bytes` bytes, 64-byte aligned, contents undefined, owned by the calling thread and
// valid until it asks for the same slot again. Large buffers sit on huge pages where the system
// gives them: panel rows are read in random order, and 4 KiB pages would miss the TLB.
void* scratch_bytes(ScratchSlot slot, size_t bytes);

template <class T>
T* scratch(ScratchSlot slot, int64_t count) {
  return static_cast<T*>(scratch_bytes(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace tetris::cpu
