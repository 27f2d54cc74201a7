// What the permutation search is asked: which rows and columns of a saliency matrix should share
// blocks, so that the `kept` heaviest blocks hold as much of it as possible.
//
//     saliency [rows, cols, positions]      positions = kh * kw of a convolution, else 1; its
//                                           magnitude counts: a weight need not be copied
//     block    block_rows x block_cols      at one position; the last ones may be ragged
//     sums     [row_groups, positions * col_groups], column p * col_groups + g
//
// Permutations gather: order.rows[q] is the original row at packed position q.
#pragma once

#include <cstdint>
#include <numeric>
#include <vector>

namespace tetris::reorder {

using Permutation = std::vector<int32_t>;

struct Problem {
  const float* saliency = nullptr;  // finite, row-major
  int64_t rows = 0, cols = 0, positions = 1;
  int64_t block_rows = 1, block_cols = 1;
  int64_t kept = 0;               // blocks to keep
  bool balanced = false;          // every block row keeps the same number, give or take one
  bool allow_empty_rows = false;  // otherwise every block row keeps its best block
  // Orders to keep, of this axis' length; where there is none, the axis is searched. For layers
  // that share an order: one is searched for all of them and held while the other axes move.
  const Permutation* held_rows = nullptr;
  const Permutation* held_cols = nullptr;

  int64_t row_groups() const { return (rows + block_rows - 1) / block_rows; }
  int64_t col_groups() const { return (cols + block_cols - 1) / block_cols; }
  int64_t blocks_per_row() const { return positions * col_groups(); }
  int64_t blocks() const { return row_groups() * blocks_per_row(); }
  int64_t row_elements() const { return cols * positions; }

  // Axes to search. Blocks one line high or wide do not care about the order of that axis.
  bool rows_matter() const { return !held_rows && block_rows > 1 && row_groups() > 1; }
  bool cols_matter() const { return !held_cols && block_cols > 1 && col_groups() > 1; }
};

inline bool is_identity(const Permutation& perm) {
  for (size_t i = 0; i < perm.size(); ++i) {
    if (perm[i] != static_cast<int32_t>(i)) return false;
  }
  return true;
}

struct Order {
  Permutation rows, cols;
};

inline Permutation identity_permutation(int64_t n) {
  Permutation p(static_cast<size_t>(n));
  std::iota(p.begin(), p.end(), 0);
  return p;
}

// Identity, where nothing else is held.
inline Order identity_order(const Problem& problem) {
  return {problem.held_rows ? *problem.held_rows : identity_permutation(problem.rows),
          problem.held_cols ? *problem.held_cols : identity_permutation(problem.cols)};
}

}  // namespace tetris::reorder
