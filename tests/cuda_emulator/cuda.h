// What CUDA C++ adds to C++, on the CPU: what csrc/cuda/platform.h takes from here.
//
// Kernels see threads that run one at a time until they wait (see cta.h), so everything that makes
// a thread wait for others is a function of the emulator, and the rest is plain C++. A name that is
// missing here is one that kernels of this project do without: __shared__ above all, for which
// there is dynamic_shared().
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "cuda_emulator/builtins.h"
#include "cuda_emulator/cta.h"
#include "cuda_emulator/launch.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

namespace tetris::cuda {

// The block's dynamic shared memory, aligned for any use (1024 bytes: a swizzled tile of TMA).
inline unsigned char* dynamic_shared() { return emulator::shared_memory().data(); }

}  // namespace tetris::cuda

// -- threads wait for each other ------------------------------------------------------------------

inline void __syncthreads(
    tetris::cuda::emulator::Site site = tetris::cuda::emulator::Site::here()) {
  auto& cta = tetris::cuda::emulator::this_cta();
  cta.barrier(0, "__syncthreads", site).sync(cta.alive(), true, "__syncthreads", site);
}

namespace tetris::cuda::emulator {

// Only whole warps: a mask of some lanes asks for code that diverged.
void check_full_mask(unsigned mask, const char* what, Site site);

// Each lane gets the value of lane source(own lane).
template <class T, class Source>
T shuffle(unsigned mask, T value, int width, const char* what, Site site, Source source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 32-bit and 64-bit values");
  check_full_mask(mask, what, site);
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0)
    violate(what, site,
            "width must be a power of two up to 32 (got " + std::to_string(width) + ")");
  const int thread = this_thread().number, lane = thread % kWarp;
  struct Slot {
    T value, result;
    int from;
  } slot{value, value, source(lane, lane / width * width)};
  this_cta().warp().meet(thread, what, site, slot, [](Slot* const* all) {
    for (int l = 0; l < kWarp; ++l) all[l]->result = all[all[l]->from]->value;
  });
  return slot.result;
}

}  // namespace tetris::cuda::emulator

inline void __syncwarp(unsigned mask = 0xffffffff,
                       tetris::cuda::emulator::Site site = tetris::cuda::emulator::Site::here()) {
  using namespace tetris::cuda::emulator;
  check_full_mask(mask, "__syncwarp", site);
  this_cta().warp().meet(this_thread().number, "__syncwarp", site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              tetris::cuda::emulator::Site site = tetris::cuda::emulator::Site::here()) {
  return tetris::cuda::emulator::shuffle(
      mask, value, width, "__shfl_sync", site,
      [=](int, int first) { return first + (source & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  tetris::cuda::emulator::Site site = tetris::cuda::emulator::Site::here()) {
  // A partner in a later segment cannot be read, one in an earlier segment can.
  return tetris::cuda::emulator::shuffle(
      mask, value, width, "__shfl_xor_sync", site,
      [=](int lane, int first) { return (lane ^ lanes) < first + width ? lane ^ lanes : lane; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   tetris::cuda::emulator::Site site = tetris::cuda::emulator::Site::here()) {
  return tetris::cuda::emulator::shuffle(
      mask, value, width, "__shfl_down_sync", site, [=](int lane, int first) {
        return lane + int(delta) < first + width ? lane + int(delta) : lane;
      });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 tetris::cuda::emulator::Site site = tetris::cuda::emulator::Site::here()) {
  return tetris::cuda::emulator::shuffle(
      mask, value, width, "__shfl_up_sync", site,
      [=](int lane, int first) { return lane - int(delta) >= first ? lane - int(delta) : lane; });
}

// -- memory ---------------------------------------------------------------------------------------

template <class T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, int> ||
                    std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>,
                "atomicAdd has no such type");
  const T old = *address;
  *address = old + value;
  return old;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

// -- arithmetic: CUDA's global names that <math.h> lacks ------------------------------------------

template <class T>
constexpr T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return a < b ? b : a;
}
inline float rsqrtf(float v) { return 1 / std::sqrt(v); }
