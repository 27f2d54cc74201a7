// Products for a few pixels (decoding), as fast as the values come from memory. See skinny.cuh.
//
// float32 and 16-bit types, layouts that are not transposed, any block, any geometry; best up to 16
// pixels, which share one reading of the values while their x fits in shared memory. Deterministic.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/problem.h"

namespace tetris::cuda {

struct SkinnyConfig {
  int pixels = 16;  // of a CTA: 1, 4, 8 or 16; more than these read the values again
  int split = 8;    // warps that share a block row: 1, 2, 4 or 8
  int ctas = 132;   // for each group and pixel chunk; each reads all of its x once
};

// `shared_bytes`: what a CTA may have of shared memory.
SkinnyConfig skinny_config(const Product& p, int multiprocessors, size_t shared_bytes);
// Bytes of shared memory that a CTA takes.
size_t skinny_shared_bytes(const Product& p, const SkinnyConfig& config);
// An empty string, or why there is no result.
std::string skinny_product(const Product& p, const SkinnyConfig& config, Stream stream);

}  // namespace tetris::cuda
