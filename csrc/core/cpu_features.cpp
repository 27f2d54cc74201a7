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

long l2_cache_bytes() {
  long size = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return size > 0 ? size : 1L << 20;
}

}  // namespace tetris
