// Reordering channels, on the emulator: every element size, aligned and not.
#include "cuda/permute.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "cuda_emulator/layout.h"

namespace tetris::cuda::test {
namespace {

constexpr size_t kShared = 227 * 1024;

// Rows of elements in exact memory; element i holds bytes that only i has, gaps hold 0xee.
class Rows {
 public:
  Rows(int64_t rows, int64_t stride, int64_t columns, int size, int64_t shift = 0)
      : size_(size),
        elements_(rows == 0 || columns == 0 ? 0 : (rows - 1) * stride + columns),
        buffer_(static_cast<size_t>(elements_ * size), static_cast<size_t>(shift * size)) {
    std::memset(buffer_.data(), 0xee, buffer_.bytes());
  }
  void count() {
    for (int64_t i = 0; i < elements_; ++i) {
      const uint64_t bits = uint64_t(i + 1) * 0x9e3779b97f4a7c15 >> 3;
      std::memcpy(at(i), &bits, size_t(size_));
    }
  }
  char* at(int64_t i) const { return static_cast<char*>(buffer_.data()) + i * size_; }
  void* data() const { return buffer_.data(); }
  int64_t elements() const { return elements_; }
  int64_t untouched() const {
    int64_t n = 0;
    for (int64_t i = 0; i < elements_; ++i) {
      const std::vector<char> gap(size_t(size_), char(0xee));
      n += std::memcmp(at(i), gap.data(), gap.size()) == 0;
    }
    return n;
  }

 private:
  int size_;
  int64_t elements_;
  Buffer buffer_;
};

struct ColumnCase {
  int size;
  int64_t rows, columns, x_gap, y_gap, shift;
};

void expect_right(const ColumnCase& c, bool scatter, int multiprocessors) {
  SCOPED_TRACE(std::to_string(c.rows) + "x" + std::to_string(c.columns) + " of " +
               std::to_string(c.size) + " gaps " + std::to_string(c.x_gap) + " " +
               std::to_string(c.y_gap) + " shift " + std::to_string(c.shift) +
               (scatter ? " scatter" : " gather"));
  Random random(7);
  const std::vector<int32_t> perm = random_permutation(c.columns, 1, random);
  const Indices indices(perm);
  ColumnPermutation p;
  p.perm = indices.data();
  p.rows = c.rows;
  p.columns = c.columns;
  p.x_stride = c.columns + c.x_gap;
  p.y_stride = c.columns + c.y_gap;
  p.element_size = c.size;
  p.scatter = scatter;
  Rows x(c.rows, p.x_stride, c.columns, c.size, c.shift);
  Rows y(c.rows, p.y_stride, c.columns, c.size);
  x.count();
  p.x = x.data();
  p.y = y.data();
  ASSERT_EQ("", permute_columns(p, multiprocessors, kShared, nullptr));
  int64_t wrong = 0;
  for (int64_t t = 0; t < c.rows; ++t)
    for (int64_t i = 0; i < c.columns; ++i) {
      const int64_t from = scatter ? i : perm[i], to = scatter ? perm[i] : i;
      wrong +=
          std::memcmp(x.at(t * p.x_stride + from), y.at(t * p.y_stride + to), size_t(c.size)) != 0;
    }
  EXPECT_EQ(0, wrong);
  EXPECT_EQ(y.elements() - c.rows * c.columns, y.untouched());
}

TEST(PermuteColumns, EveryElementAlignedAndNot) {
  for (int size : {2, 4, 8})
    for (bool scatter : {false, true})
      for (const ColumnCase& c :
           {ColumnCase{size, 1, 8, 0, 0, 0}, ColumnCase{size, 7, 64, 8, 16, 0},
            ColumnCase{size, 40, 264, 0, 8, 0}, ColumnCase{size, 33, 2200, 0, 0, 0},
            ColumnCase{size, 7, 1, 0, 0, 0}, ColumnCase{size, 7, 61, 0, 3, 0},
            ColumnCase{size, 40, 300, 1, 0, 0}, ColumnCase{size, 9, 64, 0, 0, 1},
            ColumnCase{size, 0, 64, 0, 0, 0}, ColumnCase{size, 3, 0, 0, 0, 0}})
        for (int multiprocessors : {1, 100}) expect_right(c, scatter, multiprocessors);
}

TEST(PermuteColumns, ThereAndBackIsTheIdentity) {
  Random random(3);
  const std::vector<int32_t> perm = random_permutation(96, 1, random);
  const Indices indices(perm);
  Rows x(50, 96, 96, 2), y(50, 96, 96, 2), z(50, 96, 96, 2);
  x.count();
  ColumnPermutation p;
  p.perm = indices.data();
  p.rows = 50;
  p.columns = p.x_stride = p.y_stride = 96;
  p.element_size = 2;
  p.x = x.data(), p.y = y.data();
  ASSERT_EQ("", permute_columns(p, 4, kShared, nullptr));
  p.x = y.data(), p.y = z.data(), p.scatter = true;
  ASSERT_EQ("", permute_columns(p, 4, kShared, nullptr));
  EXPECT_EQ(0, std::memcmp(x.at(0), z.at(0), 50 * 96 * 2));
}

TEST(PermuteColumns, SaysWhatItDoesNotTake) {
  ColumnPermutation p;
  p.rows = 1;
  p.columns = 100000;
  p.element_size = 2;
  EXPECT_EQ("permute: a row must fit in shared memory (400000 bytes of 232448)",
            permute_columns(p, 132, kShared, nullptr));
  p.element_size = 3;
  EXPECT_EQ("permute: elements must be 2, 4 or 8 bytes (got 3)",
            permute_columns(p, 132, kShared, nullptr));
}

struct TransposeCase {
  int size;
  int64_t matrices, rows, columns, x_gap, y_gap, shift;
};

void expect_right(const TransposeCase& c, bool x_perm, bool y_perm) {
  SCOPED_TRACE(std::to_string(c.matrices) + "x" + std::to_string(c.rows) + "x" +
               std::to_string(c.columns) + " of " + std::to_string(c.size) + " gaps " +
               std::to_string(c.x_gap) + " " + std::to_string(c.y_gap) + " shift " +
               std::to_string(c.shift) + (x_perm ? " rows of x" : "") +
               (y_perm ? " rows of y" : ""));
  Random random(7);
  const std::vector<int32_t> from = random_permutation(c.rows, 1, random);
  const std::vector<int32_t> to = random_permutation(c.columns, 1, random);
  const Indices x_rows(from), y_rows(to);
  TransposedPermutation p;
  p.x_rows = x_perm ? x_rows.data() : nullptr;
  p.y_rows = y_perm ? y_rows.data() : nullptr;
  p.matrices = c.matrices;
  p.rows = c.rows;
  p.columns = c.columns;
  p.x_stride = c.columns + c.x_gap;
  p.y_stride = c.rows + c.y_gap;
  p.x_matrix = c.rows * p.x_stride;
  p.y_matrix = c.columns * p.y_stride;
  p.element_size = c.size;
  Rows x(c.matrices * c.rows, p.x_stride, c.columns, c.size, c.shift);
  Rows y(c.matrices * c.columns, p.y_stride, c.rows, c.size);
  x.count();
  p.x = x.data();
  p.y = y.data();
  ASSERT_EQ("", permute_transpose(p, nullptr));
  int64_t wrong = 0;
  for (int64_t n = 0; n < c.matrices; ++n)
    for (int64_t i = 0; i < c.rows; ++i)
      for (int64_t j = 0; j < c.columns; ++j) {
        const int64_t row = x_perm ? from[i] : i, column = y_perm ? to[j] : j;
        wrong += std::memcmp(x.at(n * p.x_matrix + row * p.x_stride + j),
                             y.at(n * p.y_matrix + column * p.y_stride + i), size_t(c.size)) != 0;
      }
  EXPECT_EQ(0, wrong);
  EXPECT_EQ(y.elements() - c.matrices * c.rows * c.columns, y.untouched());
}

TEST(PermuteTranspose, EveryElementAlignedAndNot) {
  for (int size : {2, 4, 8})
    for (const TransposeCase& c :
         {TransposeCase{size, 2, 64, 64, 0, 0, 0}, TransposeCase{size, 1, 8, 200, 8, 0, 0},
          TransposeCase{size, 3, 72, 49, 0, 0, 0}, TransposeCase{size, 2, 49, 136, 0, 8, 0},
          TransposeCase{size, 2, 65, 33, 3, 1, 0}, TransposeCase{size, 1, 64, 64, 0, 0, 1},
          TransposeCase{size, 2, 1, 1, 0, 0, 0}, TransposeCase{size, 0, 5, 5, 0, 0, 0},
          TransposeCase{size, 2, 0, 5, 0, 0, 0}})
      for (bool x_perm : {false, true})
        for (bool y_perm : {false, true}) expect_right(c, x_perm, y_perm);
}

TEST(PermuteTranspose, SaysWhatItDoesNotTake) {
  TransposedPermutation p;
  p.rows = p.columns = 1;
  p.element_size = 1;
  EXPECT_EQ("permute: elements must be 2, 4 or 8 bytes (got 1)", permute_transpose(p, nullptr));
}

}  // namespace
}  // namespace tetris::cuda::test
