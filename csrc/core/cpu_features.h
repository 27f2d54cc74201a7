#pragma once

namespace tetris {

// Bits of what the CPU and its operating system support.
enum CpuFeature : unsigned {
  kAvx2Fma = 1u << 0,  // AVX2 and FMA
  kAvx512 = 1u << 1,   // AVX-512 F, BW, DQ, VL (every server part since 2017)
};

unsigned cpu_features();

// Size in bytes of one core's caches; 32 KiB (data) and 1 MiB where they cannot be read.
long l1_cache_bytes();
long l2_cache_bytes();

// Makes the two above return something else (0: the truth again), so that tests reach with small
// matrices what only large ones do otherwise.
void assume_cache_bytes(long l1, long l2);

}  // namespace tetris
