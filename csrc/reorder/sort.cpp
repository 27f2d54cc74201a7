#include "reorder/sort.h"

#include <algorithm>
#include <cmath>

namespace tetris::reorder {
namespace {

Permutation descending(const std::vector<double>& norms) {
  Permutation perm = identity_permutation(static_cast<int64_t>(norms.size()));
  std::stable_sort(perm.begin(), perm.end(),
                   [&](int32_t a, int32_t b) { return norms[a] > norms[b]; });
  return perm;
}

}  // namespace

Order l1_sorted_order(const Problem& problem, Pool& pool) {
  Order order = identity_order(problem);
  if (problem.rows_matter()) {
    std::vector<double> norms(static_cast<size_t>(problem.rows));
    pool.run(problem.rows, [&](int64_t i, int) {
      const float* x = problem.saliency + i * problem.row_elements();
      norms[i] = std::accumulate(x, x + problem.row_elements(), 0.0,
                                 [](double sum, float value) { return sum + std::fabs(value); });
    });
    order.rows = descending(norms);
  }
  if (problem.cols_matter()) {
    std::vector<double> norms(static_cast<size_t>(problem.cols));
    for (int64_t i = 0; i < problem.rows; ++i) {
      const float* x = problem.saliency + i * problem.row_elements();
      for (int64_t j = 0; j < problem.cols; ++j) {
        for (int64_t p = 0; p < problem.positions; ++p) norms[j] += std::fabs(*x++);
      }
    }
    order.cols = descending(norms);
  }
  return order;
}

}  // namespace tetris::reorder
