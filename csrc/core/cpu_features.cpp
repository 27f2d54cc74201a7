#include "core/cpu_features.h"

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

// sysconf asks the processor each time, and a virtual machine traps that: measured at tens of
// microseconds, so the callers below ask once.
long cache_bytes([[maybe_unused]] int name, long otherwise) {
  long size = 0;
#if defined(__unix__)
  size = sysconf(name);
#endif
  return size > 0 ? size : otherwise;
}

}  // namespace

#if defined(_SC_LEVEL2_CACHE_SIZE) && defined(_SC_LEVEL3_CACHE_SIZE)
constexpr int kL2 = _SC_LEVEL2_CACHE_SIZE, kL3 = _SC_LEVEL3_CACHE_SIZE;
#else
constexpr int kL2 = -1, kL3 = -1;  // sysconf(-1) fails
#endif

long l2_cache_bytes() {
  static const long size = cache_bytes(kL2, 1L << 20);
  return size;
}

long l3_cache_bytes() {
  static const long size = cache_bytes(kL3, 8 * l2_cache_bytes());
  return size;
}

}  // namespace tetris
