// The functions of csrc/cuda/ptx_sm90.cuh on the CPU, from the PTX ISA (9.x): "mbarrier",
// "cp.async.bulk" and "cp.async.bulk.tensor", "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate Instructions".
//
// What runs behind a thread's back here runs as actions (actions.h): a bulk copy or a wgmma is done
// when the seed says so, at the latest when somebody waits for it. So operands are read and results
// written as early and as late as the rules allow. What a kernel may not rely on is poison: the
// destination of a copy until it has landed.
#pragma once

#include <cstdint>

#include "cuda_emulator/cta.h"

namespace tetris::cuda::emulator {

// Mistakes to make on purpose, so that tests see them found: instructions that do nothing, or not
// what they should.
enum class Sabotage {
  kNone,
  kNoInitFence,  // fence_mbarrier_init
  kNoWait,       // mbarrier_try_wait: true at once
  kWrongPhase,   // ... with the other parity
  kFewerBytes,   // mbarrier_arrive_expect_tx: 16 less
  kTwoArrivals,  // mbarrier_arrive: twice
  kNoWgmmaFence,
  kNoWgmmaWait,
  kWrongSwizzle,  // wgmma: 128 bytes for 64 and so on
  kWrongStride,   // ... the stride byte offset doubled
  kWrongMajor,    // ... a's transposition
  kNoProxyFence,  // fence_proxy_async
  kNoBarrier,     // named_barrier
  kNoReadWait,    // bulk_wait_read
};
inline Sabotage& sabotage() {
  static Sabotage current = Sabotage::kNone;
  return current;
}

// The shared address of element (mn, k) of an operand of wgmma: row mn of a, column mn of b.
uint32_t wgmma_element(uint64_t descriptor, bool transposed, int mn, int k);

}  // namespace tetris::cuda::emulator

namespace tetris::cuda::ptx {

using emulator::Site;

void mbarrier_init(uint64_t* barrier, int arrivals, Site site = Site::here());
void fence_mbarrier_init();
void mbarrier_arrive(uint64_t* barrier, Site site = Site::here());
void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes, Site site = Site::here());
bool mbarrier_try_wait(uint64_t* barrier, int parity, Site site = Site::here());
void fence_proxy_async();

void prefetch_tensor_map(const TensorMap* map, Site site = Site::here());
void tma_load_4d(void* shared, const TensorMap* map, int at0, int at1, int at2, int at3,
                 uint64_t* barrier, Site site = Site::here());
void tma_store_4d(const TensorMap* map, int at0, int at1, int at2, int at3, const void* shared,
                  Site site = Site::here());
void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier,
               Site site = Site::here());
void bulk_commit();
void bulk_wait_read(int pending);
template <int pending>
void bulk_wait_read() {
  bulk_wait_read(pending);
}

void named_barrier(int id, int threads, Site site = Site::here());
void set_max_registers(int registers, bool up, Site site);
template <int registers>
void set_max_registers_down(Site site = Site::here()) {
  static_assert(registers % 8 == 0 && 24 <= registers && registers <= 256);
  set_max_registers(registers, false, site);
}
template <int registers>
void set_max_registers_up(Site site = Site::here()) {
  static_assert(registers % 8 == 0 && 24 <= registers && registers <= 256);
  set_max_registers(registers, true, site);
}
void stmatrix_x4_trans(void* shared_row, const uint32_t (&r)[4], Site site = Site::here());

void wgmma_fence(Site site);
template <int n>
void wgmma_fence(float (&)[n], Site site = Site::here()) {
  wgmma_fence(site);
}
void wgmma_commit(Site site = Site::here());
void wgmma_wait(int pending, Site site);
template <int pending, int n>
void wgmma_wait(float (&)[n], Site site = Site::here()) {
  wgmma_wait(pending, site);
}
void wgmma(float* d, int n, uint64_t a, uint64_t b, bool transposed, float (*to_float)(uint16_t),
           const char* what, Site site);

float half_to_float(uint16_t bits);  // ptx.h
inline float bfloat16_to_float(uint16_t bits) { return bits_to_float(uint32_t{bits} << 16); }

#define TETRIS_WGMMA(n, type)                                                           \
  template <bool transposed>                                                            \
  void wgmma_m64n##n##k16_##type(float (&d)[n / 2], uint64_t a, uint64_t b,             \
                                 Site site = Site::here()) {                            \
    wgmma(d, n, a, b, transposed, type##_to_float, "wgmma_m64n" #n "k16_" #type, site); \
  }
TETRIS_WGMMA(64, half)
TETRIS_WGMMA(64, bfloat16)
TETRIS_WGMMA(128, half)
TETRIS_WGMMA(128, bfloat16)
TETRIS_WGMMA(256, half)
TETRIS_WGMMA(256, bfloat16)
#undef TETRIS_WGMMA

}  // namespace tetris::cuda::ptx
