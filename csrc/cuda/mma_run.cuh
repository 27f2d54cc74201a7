// Sixteen bytes of neighbouring elements in memory, in float.
#pragma once

#include "cuda/mma_tile.cuh"
#include "cuda/numeric.cuh"
#include "cuda/platform.h"

namespace tetris::cuda::mma {

template <class T>
struct alignas(16) Run {
  T element[kChunk<T>];
};

// Of a run the first `count` elements exist; `whole`: 16-byte accesses are aligned.
template <class T>
TETRIS_DEVICE void add_run(float (&run)[kChunk<T>], const T* from, int count, bool whole) {
  if (whole && count >= kChunk<T>) {
    const Run<T> all = *reinterpret_cast<const Run<T>*>(from);
#pragma unroll
    for (int v = 0; v < kChunk<T>; ++v) run[v] += Numeric<T>::load(all.element[v]);
  } else {
#pragma unroll
    for (int v = 0; v < kChunk<T>; ++v) {
      if (v < count) run[v] += Numeric<T>::load(from[v]);
    }
  }
}

template <class T>
TETRIS_DEVICE void store_run(T* to, const float (&run)[kChunk<T>], int count, bool whole) {
  Run<T> all;
#pragma unroll
  for (int v = 0; v < kChunk<T>; ++v) all.element[v] = Numeric<T>::store(run[v]);
  if (whole && count >= kChunk<T>) {
    *reinterpret_cast<Run<T>*>(to) = all;
  } else {
#pragma unroll
    for (int v = 0; v < kChunk<T>; ++v) {
      if (v < count) to[v] = all.element[v];
    }
  }
}

}  // namespace tetris::cuda::mma
