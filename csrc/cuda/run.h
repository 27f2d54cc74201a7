// Runs a product as a configuration says: from its words to the launcher of its family.
#pragma once

#include <string>

#include "cuda/config.h"
#include "cuda/problem.h"

namespace tetris::cuda {

// Operands are packed where the family needs that (pack.h). "" or why there is no result.
std::string run_product(const Product& product, const GemmConfig& config, Stream stream);

// Where splits need a place for their sums, in float32: how many numbers, else 0. The product's
// `partial` points to them; `zeroed`: they must be zero before.
int64_t partial_size(const SampledProduct& product, const GemmConfig& config, bool* zeroed);
// Whether the sums are left in `partial` alone, for the caller to round.
bool leaves_partial(const GemmConfig& config);
std::string run_product(const SampledProduct& product, const GemmConfig& config, Stream stream);

// "bsmm_bf16_128x256__sm90": what ran, op, type, tile, target.
std::string kernel_name(const Product& product, const GemmConfig& config);
std::string kernel_name(const SampledProduct& product, const GemmConfig& config);

}  // namespace tetris::cuda
