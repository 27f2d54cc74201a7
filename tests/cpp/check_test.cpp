// core/check.h and core/view.h.
#include "core/check.h"

#include <gtest/gtest.h>

#include <limits>
#include <vector>

namespace tetris {
namespace {

constexpr int32_t kMax = std::numeric_limits<int32_t>::max(),
                  kMin = std::numeric_limits<int32_t>::min();

struct Arrays {
  std::vector<int32_t> row_ptr{0, 2, 2, 5}, col_idx{1, 3, 0, 2, 3};

  BlockSparseView view() const {
    BlockSparseView v;
    v.out = 12;
    v.in = 10;
    v.bo = 4;
    v.bi = 3;
    v.nnzb = static_cast<int64_t>(col_idx.size());
    v.row_ptr = row_ptr.data();
    v.col_idx = col_idx.data();
    return v;
  }
};

TEST(View, CountsRaggedRowsAndGroups) {
  BlockSparseView v;
  v.out = 12;
  v.in = 10;
  v.bo = 4;
  v.bi = 3;
  EXPECT_EQ(3, v.block_rows());
  EXPECT_EQ(4, v.col_groups());
  v.out = 13;
  v.in = 9;
  EXPECT_EQ(4, v.block_rows());
  EXPECT_EQ(3, v.col_groups());
  v.out = v.in = kMax;
  v.bo = v.bi = 128;
  EXPECT_EQ(16777216, v.block_rows());
}

TEST(RowPtr, AcceptsEmptyRows) { EXPECT_EQ("", check_row_ptr(Arrays().view())); }

TEST(RowPtr, AcceptsNoBlocksAtAll) {
  Arrays a;
  a.row_ptr = {0, 0, 0, 0};
  a.col_idx = {};
  EXPECT_EQ("", check_row_ptr(a.view()));
  EXPECT_EQ("", check_col_idx(a.view(), 0, 3));
}

TEST(RowPtr, NamesTheBrokenRule) {
  Arrays a;
  a.row_ptr[0] = 1;
  EXPECT_EQ("row_ptr[0] must be 0 (got 1)", check_row_ptr(a.view()));
  a.row_ptr = {0, 3, 2, 5};
  EXPECT_EQ("row_ptr must not decrease (got row_ptr[1] = 3 and row_ptr[2] = 2)",
            check_row_ptr(a.view()));
  a.row_ptr = {0, 2, 2, 6};
  EXPECT_EQ(
      "row_ptr must end at the number of stored blocks (got row_ptr[3] = 6 and values.size(0) = 5)",
      check_row_ptr(a.view()));
  for (int32_t v : {kMin, kMax, -1}) {
    a.row_ptr = {0, v, 2, 5};
    EXPECT_NE("", check_row_ptr(a.view()));
  }
}

TEST(ColIdx, NamesTheBrokenRule) {
  Arrays a;
  EXPECT_EQ("", check_col_idx(a.view(), 0, 3));
  a.col_idx[1] = 4;
  EXPECT_EQ("col_idx[1] (block row 0) must be in [0, 4), the column groups (got 4)",
            check_col_idx(a.view(), 0, 3));
  EXPECT_EQ("", check_col_idx(a.view(), 1, 3));
  a.col_idx = {1, 3, 0, 0, 3};
  EXPECT_EQ(
      "col_idx must ascend strictly within a block row: col_idx[3] (block row 2) is 0 after 0",
      check_col_idx(a.view(), 0, 3));
  a.col_idx = {1, 3, kMin, 2, 3};
  EXPECT_NE("", check_col_idx(a.view(), 0, 3));
}

// The fast yes/no and the message agree, on everything short.
TEST(ColIdx, AscendingAgreesWithTheDefinition) {
  const int32_t candidates[] = {kMin, -1, 0, 1, 2, 3, kMax};
  for (int32_t a : candidates)
    for (int32_t b : candidates)
      for (int32_t c : candidates) {
        const int32_t idx[] = {a, b, c};
        for (int64_t count = 0; count <= 3; ++count) {
          bool want = true;
          for (int64_t i = 0; i < count; ++i)
            want = want && idx[i] >= 0 && idx[i] < 3 && (i == 0 || idx[i] > idx[i - 1]);
          EXPECT_EQ(want, ascending_in_range(idx, count, 3)) << a << " " << b << " " << c;
        }
      }
}

TEST(ColIdx, AscendingFindsOneBadIndexAnywhereInALongRow) {
  std::vector<int32_t> idx(1000);
  for (int i = 0; i < 1000; ++i) idx[i] = 2 * i;
  EXPECT_TRUE(ascending_in_range(idx.data(), 1000, 1999));
  EXPECT_FALSE(ascending_in_range(idx.data(), 1000, 1998));
  for (int i = 0; i < 1000; ++i)
    for (int32_t v : {kMin, -1, i > 0 ? idx[i - 1] : -2, kMax}) {
      const int32_t before = idx[i];
      idx[i] = v;
      EXPECT_FALSE(ascending_in_range(idx.data(), 1000, 1999)) << i << " " << v;
      idx[i] = before;
    }
}

TEST(Permutation, InvertsAndRefuses) {
  std::vector<int32_t> perm{2, 0, 3, 1}, inverse(4);
  EXPECT_EQ("", check_permutation("p", perm.data(), 4, inverse.data()));
  EXPECT_EQ((std::vector<int32_t>{1, 3, 0, 2}), inverse);
  perm = {2, 0, 2, 1};
  EXPECT_EQ("p must hold each index once (got 2 at positions 0 and 2)",
            check_permutation("p", perm.data(), 4, inverse.data()));
  for (int32_t v : {kMin, -1, 4, kMax}) {
    perm = {2, 0, v, 1};
    EXPECT_EQ("p[2] must be in [0, 4) (got " + std::to_string(v) + ")",
              check_permutation("p", perm.data(), 4, inverse.data()));
  }
}

TEST(Permutation, KeepsChannelsInTheirGroup) {
  std::vector<int32_t> perm{1, 0, 3, 2}, inverse(4);
  EXPECT_EQ("", check_permutation("p", perm.data(), 4, 2, inverse.data()));
  perm = {1, 2, 0, 3};
  EXPECT_EQ("", check_permutation("p", perm.data(), 4, 1, inverse.data()));
  EXPECT_EQ("p must keep each channel in its group of 2 (got channel 0 at position 2)",
            check_permutation("p", perm.data(), 4, 2, inverse.data()));
}

TEST(Index, AllRulesAtOnce) {
  Arrays a;
  BlockSparseView v = a.view();
  EXPECT_EQ("", check_index(v));
  std::vector<int32_t> rows(12), cols(10);
  for (int i = 0; i < 12; ++i) rows[i] = 11 - i;
  for (int i = 0; i < 10; ++i) cols[i] = 9 - i;
  v.row_perm = rows.data();
  v.col_perm = cols.data();
  EXPECT_EQ("", check_index(v));
  cols[3] = 10;
  EXPECT_EQ("col_perm[3] must be in [0, 10) (got 10)", check_index(v));
  rows[0] = rows[1];
  EXPECT_NE("", check_index(v));
  a.col_idx[1] = 4;  // rules of the index come first
  EXPECT_EQ("col_idx[1] (block row 0) must be in [0, 4), the column groups (got 4)",
            check_index(v));
  a.row_ptr[1] = kMax;  // and this one before col_idx is read by it
  EXPECT_EQ(0u, check_index(v).find("row_ptr must not decrease"));
}

}  // namespace
}  // namespace tetris
