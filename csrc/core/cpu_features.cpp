#include "core/cpu_features.h"

#include <atomic>

#if defined(__unix__)
#include <unistd.h>
#endif

namespace tetris {

unsigned cpu_features() {
  unsigned have = 0;
#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
  // The compiler's run-time library also asks the operating system whether it saves the registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) have |= kAvx2Fma;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    have |= kAvx512;
#endif
  return have;
}

namespace {

std::atomic<long> assumed_l2{0};

// sysconf asks the processor, which a virtual machine traps: tens of microseconds, so only once.
long read_l2_cache_bytes() {
  long size = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return size > 0 ? size : 1L << 20;
}

}  // namespace

long l2_cache_bytes() {
  static const long size = read_l2_cache_bytes();
  const long assumed = assumed_l2.load(std::memory_order_relaxed);
  return assumed > 0 ? assumed : size;
}

void assume_l2_cache_bytes(long bytes) { assumed_l2.store(bytes, std::memory_order_relaxed); }

}  // namespace tetris
