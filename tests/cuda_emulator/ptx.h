// The functions of csrc/cuda/ptx.cuh on the CPU, from the PTX ISA (version 8 and newer): "Data
// Movement and Conversion Instructions: cp.async", "Warp Level Matrix Instructions: ldmatrix, mma".
#pragma once

#include <cstdint>

#include "cuda_emulator/cta.h"
#include "cuda_emulator/numbers.h"

namespace tetris::cuda::ptx {

using emulator::Site;

// -- numbers --------------------------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) { return emulator::as_float(bits); }
inline uint32_t float_to_bits(float v) { return emulator::as_bits(v); }
inline float half_to_float(uint16_t bits) { return emulator::half_to_float(bits); }
inline uint16_t float_to_half(float v) { return emulator::float_to_half(v); }
inline uint32_t pack_half(float low, float high) {
  return emulator::float_to_half(low) | uint32_t{emulator::float_to_half(high)} << 16;
}
inline uint32_t pack_bfloat16(float low, float high) {
  return emulator::float_to_bfloat16(low) | uint32_t{emulator::float_to_bfloat16(high)} << 16;
}
inline uint32_t to_tf32(float v) { return emulator::float_to_tf32(v); }

// -- asynchronous copies (sm_80)
// --------------------------------------------------------------------

inline uint32_t shared_address(const void* pointer, Site site = Site::here()) {
  return emulator::shared_memory().address(pointer, "shared_address", site);
}

inline void cp_async_16(void* shared, const void* global, int bytes = 16,
                        Site site = Site::here()) {
  emulator::this_thread().copies.issue(shared, global, 16, bytes, "cp_async_16", site);
}
inline void cp_async_8(void* shared, const void* global, int bytes = 8, Site site = Site::here()) {
  emulator::this_thread().copies.issue(shared, global, 8, bytes, "cp_async_8", site);
}
inline void cp_async_4(void* shared, const void* global, int bytes = 4, Site site = Site::here()) {
  emulator::this_thread().copies.issue(shared, global, 4, bytes, "cp_async_4", site);
}
inline void cp_async_commit() { emulator::this_thread().copies.commit(); }
template <int pending>
void cp_async_wait() {
  emulator::this_thread().copies.wait(pending);
}

// -- fragments (sm_75, sm_80)
// -----------------------------------------------------------------------

void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, Site site = Site::here());
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, Site site = Site::here());
void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row, Site site = Site::here());
void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row, Site site = Site::here());

void mma_m16n8k16_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                       Site site = Site::here());
void mma_m16n8k16_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                           Site site = Site::here());
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                      Site site = Site::here());

}  // namespace tetris::cuda::ptx
