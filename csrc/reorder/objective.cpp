#include "reorder/objective.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>

namespace tetris::reorder {
namespace {

// The k-th largest (k from 1) of values[0, n); reorders values.
float kth_largest(float* values, int64_t n, int64_t k) {
  std::nth_element(values, values + (k - 1), values + n, std::greater<float>());
  return values[k - 1];
}

// Marks the k largest of sums[0, n) that are not kept yet.
void keep_largest(const float* sums, int64_t n, int64_t k, uint8_t* keep) {
  if (k <= 0) return;
  std::vector<float> open;
  open.reserve(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    if (!keep[i]) open.push_back(sums[i]);
  }
  const float limit = kth_largest(open.data(), static_cast<int64_t>(open.size()), k);
  for (int64_t i = 0; i < n; ++i) {
    if (!keep[i] && sums[i] > limit) keep[i] = 1, --k;
  }
  for (int64_t i = 0; i < n && k > 0; ++i) {
    if (!keep[i] && sums[i] == limit) keep[i] = 1, --k;
  }
}

}  // namespace

std::vector<int32_t> groups_of(const Permutation& perm, int64_t block) {
  std::vector<int32_t> group(perm.size());
  for (size_t q = 0; q < perm.size(); ++q) {
    group[perm[q]] = static_cast<int32_t>(static_cast<int64_t>(q) / block);
  }
  return group;
}

std::vector<float> block_sums(const Problem& problem, const Order& order, Pool& pool) {
  const int64_t width = problem.blocks_per_row(), groups = problem.col_groups();
  const int64_t positions = problem.positions;
  const std::vector<int32_t> group = groups_of(order.cols, problem.block_cols);
  std::vector<float> sums(static_cast<size_t>(problem.blocks()));
  pool.run(problem.row_groups(), [&](int64_t g, int) {
    std::vector<double> acc(static_cast<size_t>(width));
    const int64_t end = std::min(problem.rows, (g + 1) * problem.block_rows);
    for (int64_t q = g * problem.block_rows; q < end; ++q) {
      const float* x = problem.saliency + order.rows[q] * problem.row_elements();
      for (int64_t j = 0; j < problem.cols; ++j) {
        for (int64_t p = 0; p < positions; ++p) acc[p * groups + group[j]] += *x++;
      }
    }
    std::copy(acc.begin(), acc.end(), sums.begin() + g * width);
  });
  return sums;
}

int64_t budget(const Problem& problem) {
  return problem.allow_empty_rows ? problem.kept : std::max(problem.kept, problem.row_groups());
}

Selection select_blocks(const Problem& problem, const std::vector<float>& sums) {
  const int64_t rows = problem.row_groups(), width = problem.blocks_per_row();
  Selection result;
  result.keep.assign(sums.size(), 0);
  result.kept = budget(problem);
  result.floor_bound = result.kept > problem.kept;
  uint8_t* keep = result.keep.data();
  if (problem.balanced) {
    const std::vector<int64_t> counts = balanced_counts(problem, sums);
    for (int64_t r = 0; r < rows; ++r) {
      keep_largest(sums.data() + r * width, width, counts[r], keep + r * width);
    }
  } else {
    int64_t left = result.kept;
    if (!problem.allow_empty_rows) {
      for (int64_t r = 0; r < rows; ++r) {
        const float* line = sums.data() + r * width;
        keep[r * width + (std::max_element(line, line + width) - line)] = 1;
      }
      left -= rows;
    }
    keep_largest(sums.data(), problem.blocks(), left, keep);
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    if (keep[i]) result.mass += sums[i];
  }
  return result;
}

std::vector<int64_t> balanced_counts(const Problem& problem, const std::vector<float>& sums) {
  const int64_t rows = problem.row_groups(), width = problem.blocks_per_row();
  const int64_t each = budget(problem) / rows, rest = budget(problem) % rows;
  std::vector<int64_t> counts(static_cast<size_t>(rows), each);
  if (rest == 0) return counts;
  std::vector<float> next(static_cast<size_t>(rows));
  std::vector<float> line(static_cast<size_t>(width));
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(sums.data() + r * width, width, line.data());
    next[r] = kth_largest(line.data(), width, each + 1);
  }
  std::vector<uint8_t> extra(static_cast<size_t>(rows));
  keep_largest(next.data(), rows, rest, extra.data());
  for (int64_t r = 0; r < rows; ++r) counts[r] += extra[r];
  return counts;
}

float separating_price(float* values, int64_t n, int64_t k) {
  if (n == 0) return 0;
  if (k <= 0) return *std::max_element(values, values + n);
  if (k >= n) return 0.5f * *std::min_element(values, values + n);
  const float kept = kth_largest(values, n, k);
  const float dropped = *std::max_element(values + k, values + n);
  return 0.5f * (kept + dropped);
}

std::vector<float> block_row_prices(const Problem& problem, const std::vector<float>& sums) {
  const int64_t rows = problem.row_groups(), width = problem.blocks_per_row();
  std::vector<float> prices(static_cast<size_t>(rows));
  if (problem.balanced) {
    const std::vector<int64_t> counts = balanced_counts(problem, sums);
    std::vector<float> line(static_cast<size_t>(width));
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(sums.data() + r * width, width, line.data());
      prices[r] = separating_price(line.data(), width, counts[r]);
    }
    return prices;
  }
  std::vector<float> open(sums);
  int64_t left = budget(problem);
  if (!problem.allow_empty_rows) {
    // Each row's best block is kept anyway; the common price settles the others.
    for (int64_t r = 0; r < rows; ++r) {
      const auto begin = open.begin() + r * width;
      *std::max_element(begin, begin + width) = -1;
    }
    left -= rows;
  }
  // Price of the others; with nothing left, no other block may look worth keeping.
  const float common = left > 0
                           ? std::max(0.0f, separating_price(open.data(), problem.blocks(), left))
                           : *std::max_element(sums.begin(), sums.end());
  std::fill(prices.begin(), prices.end(), common);
  return prices;
}

double heaviest_elements_share(const float* values, int64_t size, int64_t count, Pool& pool) {
  // Few values are copied and partitioned: the histograms below take 50 ms however few there are.
  constexpr int64_t kFew = 1 << 19;
  if (size <= kFew) {
    std::vector<float> ranked(values, values + size);
    const auto end = ranked.begin() + std::min(count, size);
    std::nth_element(ranked.begin(), end, ranked.end(), std::greater<float>());
    const double top = std::accumulate(ranked.begin(), end, 0.0);
    const double all = std::accumulate(end, ranked.end(), top);
    return all > 0 ? std::min(1.0, top / all) : 1;
  }
  // Non-negative floats sort like their bit patterns: histogram the upper 16 bits, then, within
  // the bin that holds the limit, the lower 16. No copy of the values.
  constexpr int kBins = 1 << 16;
  constexpr int kChunks = 16;  // fixed, so that sums do not depend on the number of threads
  constexpr int kAtOnce = 4;   // each of them takes a megabyte
  struct Histogram {
    std::vector<int64_t> count = std::vector<int64_t>(kBins);
    std::vector<double> mass = std::vector<double>(kBins);
  };
  const auto bits_of = [](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits & 0x7fffffff;  // -0.0 counts as 0
  };
  const auto fill = [&](bool upper, uint32_t wanted) {
    Histogram all;
    std::vector<Histogram> parts(kAtOnce);
    for (int first = 0; first < kChunks; first += kAtOnce) {
      pool.run(kAtOnce, [&](int64_t i, int) {
        Histogram& part = parts[i];
        std::fill(part.count.begin(), part.count.end(), 0);
        std::fill(part.mass.begin(), part.mass.end(), 0.0);
        const int64_t chunk = first + i, end = size * (chunk + 1) / kChunks;
        for (int64_t j = size * chunk / kChunks; j < end; ++j) {
          const uint32_t bits = bits_of(values[j]);
          if (!upper && bits >> 16 != wanted) continue;
          const uint32_t bin = upper ? bits >> 16 : bits & 0xffff;
          ++part.count[bin];
          part.mass[bin] += values[j];
        }
      });
      for (const Histogram& part : parts) {
        for (int bin = 0; bin < kBins; ++bin) {
          all.count[bin] += part.count[bin];
          all.mass[bin] += part.mass[bin];
        }
      }
    }
    return all;
  };
  const Histogram coarse = fill(true, 0);
  double total = 0, kept = 0;
  for (double mass : coarse.mass) total += mass;
  if (total <= 0) return 1;
  int bin = kBins - 1;
  for (; bin > 0 && coarse.count[bin] <= count; --bin) {
    count -= coarse.count[bin];
    kept += coarse.mass[bin];
  }
  if (count > 0) {
    const Histogram fine = fill(false, static_cast<uint32_t>(bin));
    for (int low = kBins - 1; low >= 0 && count > 0; --low) {
      const int64_t taken = std::min(count, fine.count[low]);
      if (taken == 0) continue;
      kept += fine.mass[low] / static_cast<double>(fine.count[low]) * static_cast<double>(taken);
      count -= taken;
    }
  }
  return std::min(1.0, kept / total);
}

}  // namespace tetris::reorder
