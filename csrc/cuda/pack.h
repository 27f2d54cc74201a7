// Tensor cores take operands with channels side by side, in 16-byte chunks, in packed order. What
// has to be brought there first, and the product as it is then.
#pragma once

#include "cuda/problem.h"

namespace tetris::cuda {

// Which operands go through a pass of their own.
struct Packing {
  bool x = false, y = false;  // y: the residual and the bias, too; of a sampled product: dy
};

// Channels of a packed map lie this many elements apart from those of the next pixel.
inline int64_t packed_pixel(int64_t channels, DType dtype) {
  const int64_t chunk = 16 / size_of(dtype);
  return (channels + chunk - 1) / chunk * chunk;
}

inline Strides packed_strides(int64_t channels, int64_t image_pixels, DType dtype) {
  const int64_t pixel = packed_pixel(channels, dtype);
  return {image_pixels * pixel, pixel, 1};
}

Packing packing_of(const Product& product);
Packing packing_of(const SampledProduct& product);

// The product on packed operands. Pointers of those that are to be packed are null: the caller puts
// in its own.
Product packed(const Product& product, const Packing& packing);
SampledProduct packed(const SampledProduct& product, const Packing& packing);

}  // namespace tetris::cuda
