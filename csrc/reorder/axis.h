// One axis of the problem, the other held still. Lines (rows, or columns) are what gets permuted;
// summed over the other axis' groups, a line shrinks to one number per group and position:
//
//     rows     lines[row] [p * col_groups + g]      groups of block_rows lines
//     columns  lines[col] [p * row_groups + g]      groups of block_cols lines
//
// Both searches work on these tables only, so each of them knows a single axis. Magnitudes of the
// numbers count: rows cut into blocks of one column are those of the saliency, and not copied.
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
  int64_t length = 0;             // numbers per line
  int64_t stride = 0;             // length, padded to kLanes; padding is zero
  const float* values = nullptr;  // [lines, stride], original line order

  LineTable() = default;
  LineTable(const LineTable&) = delete;  // values may lie in storage
  LineTable& operator=(const LineTable&) = delete;

  const float* line(int64_t i) const { return values + i * stride; }

  // Fills the table for `axis`; the saliency must outlive it. Storage is kept between calls.
  void build(const Problem& problem, const Order& order, Axis axis, Pool& pool);

  // Sums of each group's lines under perm, [groups, stride], accumulated in double.
  void group_sums(const Permutation& perm, std::vector<float>& sums, Pool& pool) const;

  // The same in the layout of the block sums (see problem.h).
  void block_sums(const Problem& problem, const Permutation& perm, std::vector<float>& sums,
                  Pool& pool) const;

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

 private:
  std::vector<float> storage_;

  // Calls visit(g, sums [stride]) for each group, on any thread.
  template <typename Visit>
  void visit_group_sums(const Permutation& perm, Pool& pool, const Visit& visit) const;
};

}  // namespace tetris::reorder
