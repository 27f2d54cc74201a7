// A fuzzer's input, as numbers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "problem.h"

namespace tetris::test {

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t next() { return at_ < size_ ? data_[at_++] : 0; }
  int64_t range(int64_t low, int64_t high) { return low + next() % (high - low + 1); }
  int32_t word() {
    uint32_t v = 0;
    for (int i = 0; i < 4; ++i) v = v << 8 | next();
    return static_cast<int32_t>(v);
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

// A valid index, then edits: a step from right to wrong is where checks fail.
inline void edit(Index& index, Bytes& in) {
  for (int64_t edits = in.range(0, 6); edits > 0; --edits) {
    std::vector<int32_t>* arrays[] = {&index.row_ptr, &index.col_idx, &index.row_perm,
                                      &index.col_perm};
    auto& a = *arrays[in.next() % 4];
    const int kind = in.next() % 4;
    if (kind == 3 && &a == &index.col_idx) a.resize(a.size() + in.range(0, 3));
    if (a.empty()) continue;
    const size_t at = (in.next() << 8 | in.next()) % a.size();
    if (kind == 0) a[at] = static_cast<int8_t>(in.next());
    if (kind == 1) a[at] = in.word();
    if (kind == 2) std::swap(a[at], a[in.next() % a.size()]);
  }
}

// Whether block rows ascend strictly through [0, col_groups): told independently of core/check.h.
inline bool valid_rows(const Index& index, int64_t rows, int64_t col_groups) {
  const int64_t blocks = static_cast<int64_t>(index.col_idx.size());
  int64_t begin = 0;
  if (index.row_ptr[0] != 0) return false;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t end = index.row_ptr[r + 1];
    if (end < begin || end > blocks) return false;
    for (int64_t b = begin; b < end; ++b) {
      if (index.col_idx[b] < 0 || index.col_idx[b] >= col_groups) return false;
      if (b > begin && index.col_idx[b] <= index.col_idx[b - 1]) return false;
    }
    begin = end;
  }
  return begin == blocks;
}

// Whether each group of slots holds its own channels, each once.
inline bool valid_permutation(std::vector<int32_t> p, int64_t groups = 1) {
  const auto size = static_cast<int64_t>(p.size()) / groups;
  for (int64_t g = 0; g < groups; ++g) std::sort(p.begin() + g * size, p.begin() + (g + 1) * size);
  for (size_t i = 0; i < p.size(); ++i)
    if (p[i] != static_cast<int32_t>(i)) return false;
  return true;
}

}  // namespace tetris::test
