// One axis of the problem, the other held still. Lines (rows, or columns) are what gets permuted;
// summed over the other axis' groups, a line shrinks to one number per group and position:
//
//     rows     lines[row] [p * col_groups + g]      groups of block_rows lines
//     columns  lines[col] [p * row_groups + g]      groups of block_cols lines
//
// Both searches work on these tables only, so each of them knows a single axis.
#pragma once

#include <cstdint>
#include <vector>

#include "reorder/parallel.h"
#include "reorder/problem.h"

namespace tetris::reorder {

enum class Axis { kRows, kCols };

struct LineTable {
  Axis axis = Axis::kRows;
  int64_t lines = 0, groups = 0, block = 1;
  int64_t length = 0;         // numbers per line
  int64_t stride = 0;         // length, padded to kLanes; padding is zero
  std::vector<float> values;  // [lines, stride], original line order

  const float* line(int64_t i) const { return values.data() + i * stride; }

  // Fills the table for `axis`; storage is kept between calls.
  void build(const Problem& problem, const Order& order, Axis axis, Pool& pool);

  // Sums of each group's lines under perm, [groups, stride], accumulated in double.
  void group_sums(const Permutation& perm, std::vector<float>& sums, Pool& pool) const;

  // Element l of group g of this axis is block [row group, p * col_groups + col group].
  // to_block_sums copies group sums into that layout (see problem.h).
  std::vector<float> to_block_sums(const Problem& problem, const std::vector<float>& sums) const;

  // The block behind element l of group g, as an index into the block sums.
  int64_t block_index(const Problem& problem, int64_t g, int64_t l) const {
    if (axis == Axis::kRows) return g * problem.blocks_per_row() + l;
    const int64_t rows = problem.row_groups();
    return (l % rows) * problem.blocks_per_row() + l / rows * problem.col_groups() + g;
  }

  // The block row of element l of group g.
  int64_t block_row(const Problem& problem, int64_t g, int64_t l) const {
    return axis == Axis::kRows ? g : l % problem.row_groups();
  }
};

}  // namespace tetris::reorder
