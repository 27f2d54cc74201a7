// Products on tensor cores with mma.sync: sm_80 and newer.
//
// Half and bfloat16, and float32 where it may be rounded to TF32. Accumulates in float32; the same
// bits from run to run, but for a SampledProduct with partial sums.
//
// Blocks are any multiple of 16 bytes high and wide (8 elements of 16 bits, 4 of float32), channels
// lie last and permutations are the caller's. Products of 1x1 kernels take feature-major maps, too
// (channels first, pixels side by side), and any permutation with them. A block row is cut into
// tiles of 16, 32, 64 or 128 rows; one that is 48 high runs in a tile of 64, a quarter of it zeros.
#pragma once

#include <string>

#include "cuda/problem.h"

namespace tetris::cuda {

struct MmaConfig {
  int tile_rows = 128;
  int tile_pixels = 128;
  int stages = 4;  // 3 or 4 slabs in shared memory
};

// Why these kernels cannot compute a product, or "".
std::string mma_supports(const Product& product);
MmaConfig mma_config(const Product& product, int multiprocessors);
// "" or what is wrong: an unsupported product, an unknown tile, CUDA's error.
std::string mma_product(const Product& product, const MmaConfig& config, Stream stream);

// A tile of dvalues is tile_rows rows of a block row by tile_columns columns of its stored blocks,
// which count as if they lay side by side.
struct MmaSampledConfig {
  int tile_rows = 128;
  int tile_columns = 128;
  int splits = 1;  // of the pixels; more than one needs SampledProduct::partial
  int stages = 4;
};

std::string mma_supports(const SampledProduct& product);
MmaSampledConfig mma_config(const SampledProduct& product, int multiprocessors);
// Adds to `partial` where that is given, and leaves dvalues alone.
std::string mma_product(const SampledProduct& product, const MmaSampledConfig& config,
                        Stream stream);

}  // namespace tetris::cuda
