#include "cpu/walk.h"

namespace tetris::cpu {
namespace {

std::string invert(const char* name, const int32_t* perm, int64_t n, int64_t groups,
                   ScratchSlot slot, const int32_t** inverse) {
  *inverse = nullptr;
  if (!perm) return {};
  int32_t* buffer = scratch<int32_t>(slot, n);
  *inverse = buffer;
  std::string error = check_permutation(name, perm, n, groups, buffer);
  if (!error.empty() || groups == 1) return error;
  const int64_t size = n / groups;
  for (int64_t c = 0; c < n; ++c) buffer[c] -= static_cast<int32_t>(c / size * size);
  return {};
}

}  // namespace

const int32_t* identity(int64_t n) {
  thread_local std::vector<int32_t> numbers;
  for (int64_t i = numbers.size(); i < n; ++i) numbers.push_back(static_cast<int32_t>(i));
  return numbers.data();
}

std::string check_and_invert(const BlockSparseView& w, Inverses* inverse) {
  std::string error = check_row_ptr(w);
  if (error.empty())
    error =
        invert("row_perm", w.row_perm, w.out, w.groups, ScratchSlot::kInverseRow, &inverse->row);
  if (error.empty())
    error = invert("col_perm", w.col_perm, w.in, w.groups, ScratchSlot::kInverseCol, &inverse->col);
  return error;
}

}  // namespace tetris::cpu
