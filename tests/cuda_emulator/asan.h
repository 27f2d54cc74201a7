// AddressSanitizer's view of memory, where there is one.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define TETRIS_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TETRIS_ASAN 1
#endif
#endif

#if defined(TETRIS_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace tetris::cuda::emulator {

#if defined(TETRIS_ASAN)
constexpr bool kAsan = true;
inline void forbid(const void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
inline void permit(const void* memory, size_t bytes) {
  __asan_unpoison_memory_region(memory, bytes);
}
inline bool permitted(const void* memory, size_t bytes) {
  return __asan_region_is_poisoned(const_cast<void*>(memory), bytes) == nullptr;
}
#else
constexpr bool kAsan = false;
inline void forbid(const void*, size_t) {}
inline void permit(const void*, size_t) {}
inline bool permitted(const void*, size_t) { return true; }
#endif

}  // namespace tetris::cuda::emulator
