#include "core/check.h"

#include <algorithm>
#include <vector>

namespace tetris {
namespace {

std::string str(int64_t v) { return std::to_string(v); }

}  // namespace

std::string check_row_ptr(const BlockSparseView& w) {
  const int64_t rows = w.block_rows();
  if (w.row_ptr[0] != 0) return "row_ptr[0] must be 0 (got " + str(w.row_ptr[0]) + ")";
  for (int64_t r = 0; r < rows; ++r) {
    if (w.row_ptr[r + 1] < w.row_ptr[r])
      return "row_ptr must not decrease (got row_ptr[" + str(r) + "] = " + str(w.row_ptr[r]) +
             " and row_ptr[" + str(r + 1) + "] = " + str(w.row_ptr[r + 1]) + ")";
  }
  if (w.row_ptr[rows] != w.nnzb)
    return "row_ptr must end at the number of stored blocks (got row_ptr[" + str(rows) +
           "] = " + str(w.row_ptr[rows]) + " and values.size(0) = " + str(w.nnzb) + ")";
  return {};
}

bool ascending_in_range(const int32_t* idx, int64_t count, int64_t limit) {
  if (count == 0) return true;
  // Strictly ascending, so the first and the last bound all the others. Branch-free: vectorizes.
  int bad = (idx[0] < 0) | (idx[count - 1] >= limit);
  for (int64_t i = 1; i < count; ++i) bad |= idx[i] <= idx[i - 1];
  return !bad;
}

std::string check_col_idx(const BlockSparseView& w, int64_t begin, int64_t end) {
  const int64_t groups = w.col_groups();
  for (int64_t r = begin; r < end; ++r) {
    const int32_t* idx = w.col_idx + w.row_ptr[r];
    const int64_t count = w.row_ptr[r + 1] - w.row_ptr[r];
    if (ascending_in_range(idx, count, groups)) continue;
    for (int64_t i = 0; i < count; ++i) {
      const std::string at = "col_idx[" + str(w.row_ptr[r] + i) + "] (block row " + str(r) + ")";
      if (idx[i] < 0 || idx[i] >= groups)
        return at + " must be in [0, " + str(groups) + "), the column groups (got " + str(idx[i]) +
               ")";
      if (i > 0 && idx[i] <= idx[i - 1])
        return "col_idx must ascend strictly within a block row: " + at + " is " + str(idx[i]) +
               " after " + str(idx[i - 1]);
    }
  }
  return {};
}

std::string check_permutation(const char* name, const int32_t* perm, int64_t n, int32_t* inverse) {
  for (int64_t i = 0; i < n; ++i) inverse[i] = -1;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t p = perm[i];
    if (p < 0 || p >= n)
      return std::string(name) + "[" + str(i) + "] must be in [0, " + str(n) + ") (got " + str(p) +
             ")";
    if (inverse[p] >= 0)
      return std::string(name) + " must hold each index once (got " + str(p) + " at positions " +
             str(inverse[p]) + " and " + str(i) + ")";
    inverse[p] = static_cast<int32_t>(i);
  }
  return {};
}

std::string check_permutation(const char* name, const int32_t* perm, int64_t n, int64_t groups,
                              int32_t* inverse) {
  std::string error = check_permutation(name, perm, n, inverse);
  if (!error.empty() || groups == 1) return error;
  const int64_t size = n / groups;
  for (int64_t c = 0; c < n; ++c) {
    if (inverse[c] / size != c / size)
      return std::string(name) + " must keep each channel in its group of " + str(size) +
             " (got channel " + str(c) + " at position " + str(inverse[c]) + ")";
  }
  return {};
}

std::string check_index(const BlockSparseView& w) {
  std::string error = check_row_ptr(w);
  if (error.empty()) error = check_col_idx(w, 0, w.block_rows());
  std::vector<int32_t> inverse(static_cast<size_t>(std::max(w.out, w.in)));
  if (error.empty() && w.row_perm)
    error = check_permutation("row_perm", w.row_perm, w.out, w.groups, inverse.data());
  if (error.empty() && w.col_perm)
    error = check_permutation("col_perm", w.col_perm, w.in, w.groups, inverse.data());
  return error;
}

}  // namespace tetris
