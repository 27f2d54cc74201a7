// Products and convolutions on Hopper's tensor cores (sm_90a): float16 and bfloat16, blocks 64 or a
// multiple of 64 high and a multiple of 16 wide, channels last, no permutations, one group.
#pragma once

#include <string>

#include "cuda/problem.h"

namespace tetris::cuda {

struct HopperConfig {
  int tile_pixels = 256;     // 128 or 256, of the tile that a CTA computes at a time
  int stages = 4;            // of the ring of slabs, at most hopper_max_stages()
  int64_t strip_pixels = 0;  // tiles go strip by strip, so that a strip of x stays in L2; 0: all
  int ctas = 0;              // 0: one for each multiprocessor
};

// Why the product cannot run on this path, or "" where it can (on a GPU of compute capability 9.0).
std::string hopper_supports(const Product& product);

// What shared memory has room for.
int hopper_max_stages(const Product& product, int tile_pixels);

// What to start with where nothing was measured.
HopperConfig hopper_default(const Product& product, int multiprocessors = 132);

// "" or why it was not launched.
std::string hopper_product(const Product& product, const HopperConfig& config, Stream stream);

}  // namespace tetris::cuda
