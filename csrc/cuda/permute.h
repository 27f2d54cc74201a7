// Reordering channels at the speed of a copy, for elements of 2, 4 or 8 bytes.
//
// A permutation that the product cannot fold away (narrow gathers of tokens would read a sector of
// 32 bytes for each number) is one pass of these:
//   permute_columns    of tokens or channels-last maps, gather and scatter
//   permute_transpose  between channels-first and channels-last
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/problem.h"

namespace tetris::cuda {

// y[t, i] = x[t, perm[i]], or with `scatter` its inverse y[t, perm[i]] = x[t, i]. x and y may not
// overlap.
struct ColumnPermutation {
  const void* x = nullptr;
  void* y = nullptr;
  const int32_t* perm = nullptr;  // [columns], a permutation
  int64_t rows = 0, columns = 0;
  int64_t x_stride = 0, y_stride = 0;  // from row to row, in elements; columns are neighbours
  int element_size = 4;
  bool scatter = false;
};

// `shared_bytes`: what a CTA may have of shared memory. A row (of 2-byte elements: two) must fit.
std::string permute_columns(const ColumnPermutation& p, int multiprocessors, size_t shared_bytes,
                            Stream stream);

// y[n, y_rows[j], i] = x[n, x_rows[i], j]: matrices are transposed, with their rows in any order.
//
//   channels-first to last, y[n, q, i] = x[n, perm[i], q]: rows are channels, x_rows = perm
//   channels-last to first, y[n, perm[j], q] = x[n, q, j]: rows are pixels, y_rows = perm
//
// The other two ways take the inverse permutation, so that what is read and written are whole rows.
struct TransposedPermutation {
  const void* x = nullptr;
  void* y = nullptr;
  const int32_t* x_rows = nullptr;              // [rows] or nullptr: identity
  const int32_t* y_rows = nullptr;              // [columns] or nullptr
  int64_t matrices = 1, rows = 0, columns = 0;  // of x
  int64_t x_stride = 0, y_stride = 0;           // from row to row, in elements
  int64_t x_matrix = 0, y_matrix = 0;           // from matrix to matrix
  int element_size = 4;
};

std::string permute_transpose(const TransposedPermutation& p, Stream stream);

}  // namespace tetris::cuda
