// What an order of rows and columns is worth: block sums, the best blocks to keep, their mass.
#pragma once

#include <cstdint>
#include <vector>

#include "reorder/parallel.h"
#include "reorder/problem.h"

namespace tetris::reorder {

// Group of each original line under a permutation: group[perm[q]] = q / block.
std::vector<int32_t> groups_of(const Permutation& perm, int64_t block);

// Block sums [row_groups, blocks_per_row], accumulated in double.
std::vector<float> block_sums(const Problem& problem, const Order& order, Pool& pool);

struct Selection {
  std::vector<uint8_t> keep;  // per block, same layout as the sums
  double mass = 0;            // sum of the kept blocks
  int64_t kept = 0;
  bool floor_bound = false;  // the budget was below one block per block row and was raised
};

// The heaviest set of blocks the problem allows; ties go to the lower index.
Selection select_blocks(const Problem& problem, const std::vector<float>& sums);

// The mass of that set alone.
double kept_mass(const Problem& problem, const std::vector<float>& sums);

// Blocks that select_blocks keeps: problem.kept, or one per block row if that is more and the
// floor applies.
int64_t budget(const Problem& problem);

// How many blocks each block row keeps in balanced mode: an equal share, and the remainder goes to
// the rows whose next block is heaviest.
std::vector<int64_t> balanced_counts(const Problem& problem, const std::vector<float>& sums);

// The k-th largest of values[0, n) and the next one, averaged: a price that separates k values from
// the others. k = 0 gives the largest value; beyond the last value lies 0. Reorders values.
float separating_price(float* values, int64_t n, int64_t k);

// A price per block row, such that keeping the blocks above it is (nearly) the best selection:
// halfway between the lightest kept block and the heaviest dropped one. Where a floor applies, each
// row's best block is kept whatever the price.
std::vector<float> block_row_prices(const Problem& problem, const std::vector<float>& sums);

// The share of the total that `count` single elements can hold, by their magnitudes.
double heaviest_elements_share(const float* values, int64_t size, int64_t count, Pool& pool);

}  // namespace tetris::reorder
