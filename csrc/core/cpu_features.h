#pragma once

namespace tetris {

// Bits of what the CPU and its operating system support.
enum CpuFeature : unsigned {
  kAvx2Fma = 1u << 0,  // AVX2 and FMA
  kAvx512 = 1u << 1,   // AVX-512 F, BW, DQ, VL (every server part since 2017)
};

unsigned cpu_features();

// Size in bytes of one core's level-2 cache; 1 MiB where it cannot be read.
long l2_cache_bytes();

// Makes l2_cache_bytes return something else (0: the truth again), so that tests reach with small
// matrices what only large ones do otherwise.
void assume_l2_cache_bytes(long bytes);

}  // namespace tetris
