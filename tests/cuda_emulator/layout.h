// Random sparse operands and their transposes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cuda_emulator/buffer.h"
#include "cuda_emulator/case.h"
#include "cuda_emulator/options.h"

namespace tetris::cuda::test {

using emulator::Random;

struct Layout {
  SparseRows shape;  // extents; its pointers are not set
  std::vector<int32_t> row_ptr, col_idx, row_perm, col_perm;
  std::vector<int32_t> block, order;  // empty: nullptr
};

// A permutation that stays within groups.
inline std::vector<int32_t> random_permutation(int64_t n, int groups, Random& random) {
  std::vector<int32_t> p(static_cast<size_t>(n));
  std::iota(p.begin(), p.end(), 0);
  const int64_t each = n / groups;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = each - 1; i > 0; --i)
      std::swap(p[g * each + i], p[g * each + random.below(static_cast<uint32_t>(i + 1))]);
  return p;
}

// Block rows, those with most blocks first.
inline std::vector<int32_t> longest_first(const std::vector<int32_t>& row_ptr) {
  std::vector<int32_t> order(row_ptr.size() - 1);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return row_ptr[a + 1] - row_ptr[a] > row_ptr[b + 1] - row_ptr[b];
  });
  return order;
}

inline Layout random_layout(const Case& c, Random& random) {
  Layout layout;
  SparseRows& s = layout.shape;
  s.rows = c.rows;
  s.cols = c.cols;
  s.groups = c.groups;
  s.taps = c.taps();
  s.height = c.height;
  s.width = c.width;
  layout.row_ptr.push_back(0);
  for (int64_t r = 0; r < s.block_rows(); ++r) {
    const bool empty = c.density < 1 && s.block_rows() >= 3 && r == 1;
    for (int64_t i = 0; i < s.taps * s.col_groups() && !empty; ++i)
      if (random.below(1000) < c.density * 1000) layout.col_idx.push_back(int32_t(i));
    layout.row_ptr.push_back(int32_t(layout.col_idx.size()));
  }
  s.nnzb = int64_t(layout.col_idx.size());
  if (c.row_perm) layout.row_perm = random_permutation(c.rows, c.groups, random);
  if (c.col_perm) layout.col_perm = random_permutation(c.cols, c.groups, random);
  if (c.ordered) layout.order = longest_first(layout.row_ptr);
  return layout;
}

// Rows become columns: the same blocks, sorted by column group, then by tap and block row.
inline Layout transposed(const Layout& layout) {
  const SparseRows& s = layout.shape;
  Layout t;
  t.shape = s;
  std::swap(t.shape.rows, t.shape.cols);
  std::swap(t.shape.height, t.shape.width);
  t.shape.transposed = !s.transposed;
  struct Entry {
    int64_t row, col;
    int32_t block;
  };
  std::vector<Entry> entries;
  const int64_t rows = s.block_rows_per_group(), cols = s.col_groups();
  for (int64_t r = 0; r < s.block_rows(); ++r)
    for (int32_t b = layout.row_ptr[r]; b < layout.row_ptr[r + 1]; ++b) {
      const int64_t group = r / rows, tap = layout.col_idx[b] / cols;
      entries.push_back({group * cols + layout.col_idx[b] % cols, tap * rows + r % rows,
                         layout.block.empty() ? b : layout.block[b]});
    }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return a.row != b.row ? a.row < b.row : a.col < b.col;
  });
  t.row_ptr.assign(static_cast<size_t>(t.shape.block_rows() + 1), 0);
  for (const Entry& e : entries) {
    ++t.row_ptr[e.row + 1];
    t.col_idx.push_back(int32_t(e.col));
    t.block.push_back(e.block);
  }
  std::partial_sum(t.row_ptr.begin(), t.row_ptr.end(), t.row_ptr.begin());
  t.row_perm = layout.col_perm;
  t.col_perm = layout.row_perm;
  t.order = longest_first(t.row_ptr);
  return t;
}

// A layout in exact memory, as kernels get it.
class OwnedLayout {
 public:
  explicit OwnedLayout(const Layout& l)
      : row_ptr_(l.row_ptr),
        col_idx_(l.col_idx),
        block_(l.block),
        order_(l.order),
        row_perm_(l.row_perm),
        col_perm_(l.col_perm),
        view(l.shape),
        row_perm(l.row_perm.empty() ? nullptr : row_perm_.data()),
        col_perm(l.col_perm.empty() ? nullptr : col_perm_.data()) {
    view.row_ptr = row_ptr_.data();
    view.col_idx = col_idx_.data();
    view.block = l.block.empty() ? nullptr : block_.data();
    view.order = l.order.empty() ? nullptr : order_.data();
  }

 private:
  Indices row_ptr_, col_idx_, block_, order_, row_perm_, col_perm_;

 public:
  SparseRows view;
  const int32_t *row_perm, *col_perm;
};

// Calls fn(offset in values, row, tap, column) for each stored entry inside the matrix, channels in
// original order; for the others fn(offset, -1, -1, -1).
template <class Fn>
void for_each_entry(const SparseRows& w, const int32_t* row_perm, const int32_t* col_perm, Fn fn) {
  const int64_t rows = w.block_rows_per_group(), cols = w.col_groups();
  for (int64_t r = 0; r < w.block_rows(); ++r)
    for (int64_t b = w.row_ptr[r]; b < w.row_ptr[r + 1]; ++b)
      for (int64_t i = 0; i < w.height; ++i)
        for (int64_t j = 0; j < w.width; ++j) {
          const int64_t number = w.block ? w.block[b] : b;
          const int64_t at =
              number * w.height * w.width + (w.transposed ? i * w.width + j : j * w.height + i);
          const int64_t row = r % rows * w.height + i, col = w.col_idx[b] % cols * w.width + j;
          if (row >= w.group_rows() || col >= w.group_cols()) {
            fn(at, int64_t{-1}, int64_t{-1}, int64_t{-1});
            continue;
          }
          const int64_t row_slot = r / rows * w.group_rows() + row;
          const int64_t col_slot = r / rows * w.group_cols() + col;
          fn(at, row_perm ? row_perm[row_slot] : row_slot, w.col_idx[b] / cols,
             col_perm ? col_perm[col_slot] : col_slot);
        }
}

}  // namespace tetris::cuda::test
