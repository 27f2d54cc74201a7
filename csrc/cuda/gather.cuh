// A tile of a feature map in shared memory, whatever the map's strides, permutation and geometry.
//
//   tile[slot * pitch + pixel]      slot: a channel, perhaps seen through a tap;  A = float, double
//
// Pixels lie along the rows of the tile, because in kernels they are the lanes. A map with pixels
// side by side is read 32 pixels a warp. One with channels side by side (tokens, channels-last) is
// read in patches of 8 slots x 4 pixels: each of a warp's four sectors of 32 bytes is used whole
// (float), and with a pitch of 4 modulo 32 all 32 numbers go to different banks.
#pragma once

#include "cuda/numeric.cuh"
#include "cuda/problem.h"
#include "cuda/vector.cuh"

namespace tetris::cuda {

// A pixel of the result. Maps that are read pixel by pixel lie in one row: y = 0.
struct Pixel {
  int32_t image;  // -1: there is no such pixel
  int32_t y, x;
};

// Of less than 2^31 pixels (launchers see to it): 32-bit divisions are several times faster.
TETRIS_DEVICE Pixel pixel_at(const Geometry& g, uint32_t pixel, uint32_t pixels) {
  if (pixel >= pixels) return {-1, 0, 0};
  const uint32_t map = uint32_t(g.result_h) * uint32_t(g.result_w);
  const uint32_t image = g.images == 1 ? 0 : pixel / map;
  const uint32_t rest = pixel - image * map;
  if (g.pointwise()) return {int32_t(image), 0, int32_t(rest)};
  const uint32_t y = rest / uint32_t(g.result_w);
  return {int32_t(image), int32_t(y), int32_t(rest - y * uint32_t(g.result_w))};
}

// Where channel 0 of a pixel of the result lies.
TETRIS_DEVICE int64_t result_element(const Geometry& g, const Strides& s, const Pixel& p) {
  return p.image * s.image + (int64_t(p.y) * g.result_w + p.x) * s.pixel;
}

// Where channel 0 of what the pixel sees through a tap lies; -1: nothing, which counts as zero.
TETRIS_DEVICE int64_t source_element(const Geometry& g, const Strides& s, const Pixel& p, int ky,
                                     int kx) {
  if (p.image < 0) return -1;
  if (g.pointwise()) return p.image * s.image + p.x * s.pixel;
  int y, x;
  if (!g.source(p.y, p.x, ky, kx, &y, &x)) return -1;
  return p.image * s.image + (int64_t(y) * g.source_w + x) * s.pixel;
}

// Whether lanes should lie along channels when they read or write a map.
TETRIS_HOST_DEVICE bool channels_inside(const Strides& s) { return s.channel < s.pixel; }

// Whether 16-byte runs of channels that begin at `channel` are aligned at every pixel.
template <class T>
TETRIS_HOST_DEVICE bool aligned_runs(const void* x, const Strides& s, int64_t channel) {
  const int64_t run = 16 / int64_t(sizeof(T));
  return s.channel == 1 && s.pixel % run == 0 && s.image % run == 0 && channel % run == 0 &&
         reinterpret_cast<uintptr_t>(x) % 16 == 0;
}

// A map's numbers, of a type known when compiling, and of a 16-bit or 32-bit type known later.
template <class T>
struct NumbersOf {
  const T* x;
  TETRIS_DEVICE typename Numeric<T>::Accumulator load(int64_t element) const {
    return Numeric<T>::load(x[element]);
  }
};
struct AnyNumbers {
  const void* x;
  DType dtype;
  TETRIS_DEVICE float load(int64_t element) const {  // predicated loads, no branches
    uint32_t bits;
    if (dtype == DType::kFloat32)
      bits = __ldg(static_cast<const uint32_t*>(x) + element);
    else
      bits = __ldg(static_cast<const uint16_t*>(x) + element);
    if (dtype == DType::kFloat16) return ptx::half_to_float(uint16_t(bits));
    return ptx::bits_to_float(dtype == DType::kFloat32 ? bits : bits << 16);
  }
};

// Fills tile with `slots` rows of `pixels` (a multiple of 32) numbers. `Map` says what is where:
//   map.at(pixel)            anything about a pixel of the tile that serves all its slots
//   map.element(&at, slot)   element of x, or -1 for zero
// Each thread has kBatch loads in flight. They are unconditional, at an element that exists, and
// what is zero is selected afterwards: branches around them would make them wait for each other.
template <int kBatch = 8, class X, class A, class Map>
TETRIS_DEVICE void gather_tile(A* tile, int pitch, int slots, int pixels, const X& x,
                               bool channels_inside, const Map& map) {
  const int along = channels_inside ? 8 : 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int patch = 32 / along, patches = pixels / patch;
  const int batches = (slots + kBatch * along - 1) / (kBatch * along);
  for (int unit = warp; unit < patches * batches; unit += warps) {
    const int pixel = unit % patches * patch + lane / along;
    const int first = unit / patches * (kBatch * along) + lane % along;
    auto at = map.at(pixel);
    int64_t element[kBatch];
    A v[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      element[i] = map.element(&at, min(first + i * along, slots - 1));
#pragma unroll
    for (int i = 0; i < kBatch; ++i) v[i] = x.load(element[i] < 0 ? 0 : element[i]);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int slot = first + i * along;
      if (slot < slots) tile[slot * pitch + pixel] = element[i] < 0 ? A(0) : v[i];
    }
  }
}

// The same where slots are neighbours in memory (aligned_runs, and slots a multiple of the run): 16
// bytes a load. A warp reads two runs of 16 pixels: whole sectors, and for float no bank conflict.
template <class T, class A, class Map>
TETRIS_DEVICE void gather_tile_runs(A* tile, int pitch, int slots, int pixels, const T* x,
                                    const Map& map) {
  constexpr int kRun = 16 / sizeof(T);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int patches = pixels / 16, pairs = (slots + 2 * kRun - 1) / (2 * kRun);
  for (int unit = warp; unit < patches * pairs; unit += warps) {
    const int pixel = unit % patches * 16 + lane / 2;
    const int slot = unit / patches * (2 * kRun) + lane % 2 * kRun;
    if (slot >= slots) continue;
    auto at = map.at(pixel);
    const int64_t element = map.element(&at, slot);
    A v[kRun] = {};
    if (element >= 0) load_global(x + element, v);
#pragma unroll
    for (int i = 0; i < kRun; ++i) tile[(slot + i) * pitch + pixel] = v[i];
  }
}

}  // namespace tetris::cuda
