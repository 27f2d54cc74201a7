// Products on ordinary cores: the general path. Every dtype, block from 1x1 to 128x128, stride,
// permutation, geometry, group and direction; float32 without rounding to TF32.
//
// Three kernels, which their own files explain:
//   simt_product_strips  many short block rows share a tile of x; any height
//   simt_product_tall    float32, one block row a tile of y; from about 24 rows on
//   simt_sampled_items   the sampled product
// All are deterministic, but for sampled products that are split over pixels.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/problem.h"

namespace tetris::cuda {

struct SimtConfig {
  enum Kind { kStrips, kTall };
  Kind kind = kStrips;
  int warps = 12;    // strips: of a CTA, 1 to 12; each has 4 or 8 rows
  int pixels = 128;  // strips: of a tile, 128 or 32; 64 for float64
  int slab = 96;     // strips: columns of a tile of x, at least the width of a block; 96 are as
                     // many as rows, whose results the tile holds in the end, and fit in 64 KiB
};

// The largest tiles that still give every multiprocessor one.
SimtConfig simt_config(const Product& p, int multiprocessors);
// An empty string, or why there is no result.
std::string simt_product(const Product& p, const SimtConfig& config, Stream stream);

struct SimtSampledConfig {
  bool by_row = false;  // tiles of one block row; else regions of several, width at most 64 (32
                        // for float64)
  int splits = 1;       // parts of the pixels; more than 1 needs SampledProduct::partial
};

SimtSampledConfig simt_sampled_config(const SampledProduct& p, int multiprocessors);
// Where p.partial is given it is overwritten with the sums, and dvalues gets them rounded.
std::string simt_sampled_product(const SampledProduct& p, const SimtSampledConfig& config,
                                 Stream stream);

}  // namespace tetris::cuda
