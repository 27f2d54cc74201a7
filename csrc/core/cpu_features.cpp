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

std::atomic<long> assumed_l1{0}, assumed_l2{0};

// sysconf asks the processor, which a virtual machine traps: tens of microseconds, so only once.
long read_cache_bytes(int level) {
  long size = 0;
#if defined(_SC_LEVEL1_DCACHE_SIZE) && defined(_SC_LEVEL2_CACHE_SIZE)
  size = sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : _SC_LEVEL2_CACHE_SIZE);
#endif
  return size > 0 ? size : level == 1 ? 32L << 10 : 1L << 20;
}

long assumed_or(const std::atomic<long>& assumed, long size) {
  const long bytes = assumed.load(std::memory_order_relaxed);
  return bytes > 0 ? bytes : size;
}

}  // namespace

long l1_cache_bytes() {
  static const long size = read_cache_bytes(1);
  return assumed_or(assumed_l1, size);
}

long l2_cache_bytes() {
  static const long size = read_cache_bytes(2);
  return assumed_or(assumed_l2, size);
}

void assume_cache_bytes(long l1, long l2) {
  assumed_l1.store(l1, std::memory_order_relaxed);
  assumed_l2.store(l2, std::memory_order_relaxed);
}

}  // namespace tetris
