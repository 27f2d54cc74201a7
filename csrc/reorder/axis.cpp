#include "reorder/axis.h"

#include <algorithm>

#include "reorder/objective.h"
#include "reorder/swap_values.h"

namespace tetris::reorder {
namespace {

void build_rows(const Problem& problem, const Order& order, LineTable& table, Pool& pool) {
  const std::vector<int32_t> group = groups_of(order.cols, problem.block_cols);
  const int64_t groups = problem.col_groups(), positions = problem.positions;
  // Tasks of many rows: a task costs about a microsecond to hand out.
  constexpr int64_t kRowsPerTask = 16;
  pool.run((problem.rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    const int64_t end = std::min(problem.rows, (task + 1) * kRowsPerTask);
    for (int64_t i = task * kRowsPerTask; i < end; ++i) {
      const float* x = problem.saliency + i * problem.row_elements();
      float* line = table.values.data() + i * table.stride;
      std::fill_n(line, table.stride, 0.0f);
      if (positions == 1) {
        for (int64_t j = 0; j < problem.cols; ++j) line[group[j]] += x[j];
      } else {
        for (int64_t j = 0; j < problem.cols; ++j) {
          for (int64_t p = 0; p < positions; ++p) line[p * groups + group[j]] += *x++;
        }
      }
    }
  });
}

void build_cols(const Problem& problem, const Order& order, LineTable& table, Pool& pool) {
  const int64_t groups = problem.row_groups(), positions = problem.positions;
  // Columns by tasks; inside, kGroups block rows at a time, so that the transposed write fills
  // whole cache lines.
  constexpr int64_t kColsPerTask = 64, kGroups = 16;
  pool.run((problem.cols + kColsPerTask - 1) / kColsPerTask, [&](int64_t task, int) {
    const int64_t first = task * kColsPerTask;
    const int64_t count = std::min(problem.cols - first, kColsPerTask);
    const int64_t elements = count * positions;
    std::vector<float> acc(static_cast<size_t>(kGroups * elements));
    std::fill_n(table.values.data() + first * table.stride, count * table.stride, 0.0f);
    for (int64_t g0 = 0; g0 < groups; g0 += kGroups) {
      const int64_t g1 = std::min(groups, g0 + kGroups);
      std::fill(acc.begin(), acc.end(), 0.0f);
      for (int64_t g = g0; g < g1; ++g) {
        float* sum = acc.data() + (g - g0) * elements;
        const int64_t end = std::min(problem.rows, (g + 1) * problem.block_rows);
        for (int64_t q = g * problem.block_rows; q < end; ++q) {
          const float* x =
              problem.saliency + order.rows[q] * problem.row_elements() + first * positions;
          for (int64_t e = 0; e < elements; ++e) sum[e] += x[e];
        }
      }
      for (int64_t j = 0; j < count; ++j) {
        float* line = table.values.data() + (first + j) * table.stride;
        for (int64_t p = 0; p < positions; ++p) {
          const float* sum = acc.data() + j * positions + p;
          for (int64_t g = g0; g < g1; ++g) line[p * groups + g] = sum[(g - g0) * elements];
        }
      }
    }
  });
}

}  // namespace

void LineTable::build(const Problem& problem, const Order& order, Axis which, Pool& pool) {
  axis = which;
  const bool rows = which == Axis::kRows;
  lines = rows ? problem.rows : problem.cols;
  groups = rows ? problem.row_groups() : problem.col_groups();
  block = rows ? problem.block_rows : problem.block_cols;
  length = problem.positions * (rows ? problem.col_groups() : problem.row_groups());
  stride = pad_lanes(length);
  values.resize(static_cast<size_t>(lines * stride));
  rows ? build_rows(problem, order, *this, pool) : build_cols(problem, order, *this, pool);
}

void LineTable::group_sums(const Permutation& perm, std::vector<float>& sums, Pool& pool) const {
  sums.resize(static_cast<size_t>(groups * stride));
  pool.run(groups, [&](int64_t g, int) {
    std::vector<double> acc(static_cast<size_t>(stride));
    const int64_t end = std::min(lines, (g + 1) * block);
    for (int64_t q = g * block; q < end; ++q) {
      const float* x = line(perm[q]);
      for (int64_t l = 0; l < stride; ++l) acc[l] += x[l];
    }
    std::copy(acc.begin(), acc.end(), sums.begin() + g * stride);
  });
}

std::vector<float> LineTable::to_block_sums(const Problem& problem,
                                            const std::vector<float>& sums) const {
  std::vector<float> blocks(static_cast<size_t>(problem.blocks()));
  const int64_t width = problem.blocks_per_row();
  if (axis == Axis::kRows) {
    for (int64_t g = 0; g < groups; ++g) {
      std::copy_n(sums.data() + g * stride, length, blocks.data() + g * width);
    }
  } else {
    const int64_t row_groups = problem.row_groups();
    for (int64_t p = 0; p < problem.positions; ++p) {
      for (int64_t r = 0; r < row_groups; ++r) {
        float* line = blocks.data() + r * width + p * groups;
        for (int64_t g = 0; g < groups; ++g) line[g] = sums[g * stride + p * row_groups + r];
      }
    }
  }
  return blocks;
}

}  // namespace tetris::reorder
