#include "reorder/axis.h"

#include <algorithm>
#include <cmath>

#include "reorder/objective.h"
#include "reorder/swap_values.h"

namespace tetris::reorder {
namespace {

void build_rows(const Problem& problem, const Order& order, const LineTable& table, float* values,
                Pool& pool) {
  const std::vector<int32_t> group = groups_of(order.cols, problem.block_cols);
  const int64_t groups = problem.col_groups(), positions = problem.positions;
  // Tasks of many rows: a task costs about a microsecond to hand out.
  constexpr int64_t kRowsPerTask = 16;
  pool.run((problem.rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    const int64_t end = std::min(problem.rows, (task + 1) * kRowsPerTask);
    for (int64_t i = task * kRowsPerTask; i < end; ++i) {
      const float* x = problem.saliency + i * problem.row_elements();
      float* line = values + i * table.stride;
      std::fill_n(line, table.stride, 0.0f);
      if (positions == 1) {
        for (int64_t j = 0; j < problem.cols; ++j) line[group[j]] += std::fabs(x[j]);
      } else {
        for (int64_t j = 0; j < problem.cols; ++j) {
          for (int64_t p = 0; p < positions; ++p) line[p * groups + group[j]] += std::fabs(*x++);
        }
      }
    }
  });
}

void build_cols(const Problem& problem, const Order& order, const LineTable& table, float* values,
                Pool& pool) {
  const int64_t groups = problem.row_groups(), positions = problem.positions;
  // Columns by tasks; inside, kGroups block rows at a time, so that the transposed write fills
  // whole cache lines.
  constexpr int64_t kColsPerTask = 64, kGroups = 16;
  pool.run((problem.cols + kColsPerTask - 1) / kColsPerTask, [&](int64_t task, int) {
    const int64_t first = task * kColsPerTask;
    const int64_t count = std::min(problem.cols - first, kColsPerTask);
    const int64_t elements = count * positions;
    std::vector<float> acc(static_cast<size_t>(kGroups * elements));
    std::fill_n(values + first * table.stride, count * table.stride, 0.0f);
    for (int64_t g0 = 0; g0 < groups; g0 += kGroups) {
      const int64_t g1 = std::min(groups, g0 + kGroups);
      std::fill(acc.begin(), acc.end(), 0.0f);
      for (int64_t g = g0; g < g1; ++g) {
        float* sum = acc.data() + (g - g0) * elements;
        const int64_t end = std::min(problem.rows, (g + 1) * problem.block_rows);
        for (int64_t q = g * problem.block_rows; q < end; ++q) {
          const float* x =
              problem.saliency + order.rows[q] * problem.row_elements() + first * positions;
          for (int64_t e = 0; e < elements; ++e) sum[e] += std::fabs(x[e]);
        }
      }
      for (int64_t j = 0; j < count; ++j) {
        float* line = values + (first + j) * table.stride;
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
  if (rows && problem.block_cols == 1 && problem.positions == 1 && stride == length &&
      is_identity(order.cols)) {
    values = problem.saliency;
    return;
  }
  storage_.resize(static_cast<size_t>(lines * stride));
  values = storage_.data();
  rows ? build_rows(problem, order, *this, storage_.data(), pool)
       : build_cols(problem, order, *this, storage_.data(), pool);
}

template <typename Visit>
void LineTable::visit_group_sums(const Permutation& perm, Pool& pool, const Visit& visit) const {
  pool.run(groups, [&](int64_t g, int) {
    std::vector<double> sum(static_cast<size_t>(stride));
    const int64_t end = std::min(lines, (g + 1) * block);
    for (int64_t q = g * block; q < end; ++q) {
      const float* x = line(perm[q]);
      for (int64_t l = 0; l < stride; ++l) sum[l] += std::fabs(x[l]);
    }
    visit(g, sum);
  });
}

void LineTable::group_sums(const Permutation& perm, std::vector<float>& sums, Pool& pool) const {
  sums.resize(static_cast<size_t>(groups * stride));
  visit_group_sums(perm, pool, [&](int64_t g, const std::vector<double>& sum) {
    std::copy(sum.begin(), sum.end(), sums.begin() + g * stride);
  });
}

void LineTable::block_sums(const Problem& problem, const Permutation& perm,
                           std::vector<float>& sums, Pool& pool) const {
  sums.resize(static_cast<size_t>(problem.blocks()));
  visit_group_sums(perm, pool, [&](int64_t g, const std::vector<double>& sum) {
    for (int64_t l = 0; l < length; ++l) {
      sums[block_index(problem, g, l)] = static_cast<float>(sum[l]);
    }
  });
}

}  // namespace tetris::reorder
