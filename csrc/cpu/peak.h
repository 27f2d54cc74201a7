// The ceiling: fused multiply-adds per second on one core, measured.
#pragma once

namespace tetris::cpu {

// Floating-point operations per second (two per FMA lane) of independent FMAs in registers on the
// calling thread, with the vectors of the instruction set in use, over about `seconds`.
double fma_peak(double seconds);

}  // namespace tetris::cpu
