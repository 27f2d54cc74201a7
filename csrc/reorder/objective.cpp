#include "reorder/objective.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

namespace tetris::reorder {
namespace {

// The k-th largest (k from 1) of values[0, n); reorders values.
float kth_largest(float* values, int64_t n, int64_t k) {
  std::nth_element(values, values + (k - 1), values + n, std::greater<float>());
  return values[k - 1];
}

// Magnitudes sort like these.
uint32_t magnitude_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffff;
}

constexpr int kBins = 1 << 16;  // of the upper half of the bits, or of the lower one

// Where the k largest of some values end: all above `limit` are among them, and the first `ties` of
// those that equal it.
struct Cut {
  float limit = std::numeric_limits<float>::infinity();
  int64_t ties = 0;

  // To be asked for each value, in order.
  bool takes(float value) { return value > limit || (value == limit && ties-- > 0); }
};

// Of non-negative values, n at most and k at least; each(visit) visits all of them.
template <typename Each>
Cut cut_after(int64_t k, int64_t n, const Each& each) {
  Cut cut;
  if (k <= 0) return cut;
  constexpr int64_t kFew = 1 << 14;  // to go through histograms takes longer than to sort these
  if (n <= kFew) {
    std::vector<float> values;
    values.reserve(static_cast<size_t>(n));
    each([&](float value) { values.push_back(value); });
    cut.limit = kth_largest(values.data(), static_cast<int64_t>(values.size()), k);
    cut.ties = k - std::count_if(values.begin(), values.end(),
                                 [&](float value) { return value > cut.limit; });
    return cut;
  }
  // No copy of the values: of narrow blocks, it would be a large part of the matrix.
  std::vector<int64_t> count(kBins);
  const auto find_bin = [&] {
    uint32_t bin = kBins - 1;
    for (; bin > 0 && count[bin] < k; --bin) k -= count[bin];
    return bin;
  };
  each([&](float value) { ++count[magnitude_bits(value) >> 16]; });
  const uint32_t upper = find_bin();
  std::fill(count.begin(), count.end(), 0);
  each([&](float value) {
    const uint32_t bits = magnitude_bits(value);
    if (bits >> 16 == upper) ++count[bits & 0xffff];
  });
  const uint32_t bits = upper << 16 | find_bin();
  std::memcpy(&cut.limit, &bits, sizeof bits);
  cut.ties = k;
  return cut;
}

Cut cut_after(int64_t k, const float* values, int64_t n) {
  return cut_after(k, n, [&](const auto& visit) { std::for_each(values, values + n, visit); });
}

// With a floor, each row's best block, the first of its largest; otherwise -1.
std::vector<int64_t> floor_blocks(const Problem& problem, const std::vector<float>& sums) {
  const int64_t width = problem.blocks_per_row();
  std::vector<int64_t> best(static_cast<size_t>(problem.row_groups()), -1);
  if (problem.allow_empty_rows) return best;
  for (int64_t r = 0; r < problem.row_groups(); ++r) {
    const float* line = sums.data() + r * width;
    best[r] = std::max_element(line, line + width) - line;
  }
  return best;
}

// The blocks that compete for what the floor leaves.
template <typename Visit>
void visit_others(const Problem& problem, const std::vector<float>& sums,
                  const std::vector<int64_t>& floor, const Visit& visit) {
  const int64_t width = problem.blocks_per_row();
  for (int64_t r = 0; r < problem.row_groups(); ++r) {
    const float* line = sums.data() + r * width;
    for (int64_t i = 0; i < width; ++i) {
      if (i != floor[r]) visit(line[i]);
    }
  }
}

int64_t budget_of_others(const Problem& problem) {
  return budget(problem) - (problem.allow_empty_rows ? 0 : problem.row_groups());
}

Cut cut_of_others(const Problem& problem, const std::vector<float>& sums,
                  const std::vector<int64_t>& floor) {
  return cut_after(budget_of_others(problem), problem.blocks(),
                   [&](const auto& visit) { visit_others(problem, sums, floor, visit); });
}

// Visits the blocks of the heaviest set, in ascending order.
template <typename Visit>
void visit_kept(const Problem& problem, const std::vector<float>& sums, const Visit& visit) {
  const int64_t rows = problem.row_groups(), width = problem.blocks_per_row();
  if (problem.balanced) {
    const std::vector<int64_t> counts = balanced_counts(problem, sums);
    for (int64_t r = 0; r < rows; ++r) {
      const float* line = sums.data() + r * width;
      Cut cut = cut_after(counts[r], line, width);
      for (int64_t i = 0; i < width; ++i) {
        if (cut.takes(line[i])) visit(r * width + i);
      }
    }
    return;
  }
  const std::vector<int64_t> floor = floor_blocks(problem, sums);
  Cut cut = cut_of_others(problem, sums, floor);
  for (int64_t r = 0; r < rows; ++r) {
    const float* line = sums.data() + r * width;
    for (int64_t i = 0; i < width; ++i) {
      if (i == floor[r] || cut.takes(line[i])) visit(r * width + i);
    }
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
        for (int64_t p = 0; p < positions; ++p) acc[p * groups + group[j]] += std::fabs(*x++);
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
  Selection result;
  result.keep.assign(sums.size(), 0);
  result.kept = budget(problem);
  result.floor_bound = result.kept > problem.kept;
  visit_kept(problem, sums, [&](int64_t i) {
    result.keep[i] = 1;
    result.mass += sums[i];
  });
  return result;
}

double kept_mass(const Problem& problem, const std::vector<float>& sums) {
  double mass = 0;
  visit_kept(problem, sums, [&](int64_t i) { mass += sums[i]; });
  return mass;
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
  Cut cut = cut_after(rest, next.data(), rows);
  for (int64_t r = 0; r < rows; ++r) counts[r] += cut.takes(next[r]);
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
  // Each row's best block is kept anyway; the common price settles the others.
  float common;
  if (budget_of_others(problem) > 0) {
    const std::vector<int64_t> floor = floor_blocks(problem, sums);
    const float limit = cut_of_others(problem, sums, floor).limit;
    int64_t left = budget_of_others(problem);
    float below = 0;
    visit_others(problem, sums, floor, [&](float sum) {
      if (sum >= limit) {
        --left;
      } else {
        below = std::max(below, sum);
      }
    });
    common = 0.5f * (limit + (left < 0 ? limit : below));  // left < 0: ties that are dropped
  } else {  // with nothing left, no other block may look worth keeping
    common = *std::max_element(sums.begin(), sums.end());
  }
  std::fill(prices.begin(), prices.end(), common);
  return prices;
}

double heaviest_elements_share(const float* values, int64_t size, int64_t count, Pool& pool) {
  // Few values are copied and partitioned: the histograms below take 50 ms however few there are.
  constexpr int64_t kFew = 1 << 19;
  if (size <= kFew) {
    std::vector<float> ranked(static_cast<size_t>(size));
    std::transform(values, values + size, ranked.begin(), [](float x) { return std::fabs(x); });
    const auto end = ranked.begin() + std::min(count, size);
    std::nth_element(ranked.begin(), end, ranked.end(), std::greater<float>());
    const double top = std::accumulate(ranked.begin(), end, 0.0);
    const double all = std::accumulate(end, ranked.end(), top);
    return all > 0 ? std::min(1.0, top / all) : 1;
  }
  // Histogram the upper 16 bits, then, within the bin that holds the limit, the lower 16.
  constexpr int kChunks = 16;  // fixed, so that sums do not depend on the number of threads
  constexpr int kAtOnce = 4;   // each of them takes a megabyte
  struct Histogram {
    std::vector<int64_t> count = std::vector<int64_t>(kBins);
    std::vector<double> mass = std::vector<double>(kBins);
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
          const uint32_t bits = magnitude_bits(values[j]);
          if (!upper && bits >> 16 != wanted) continue;
          const uint32_t bin = upper ? bits >> 16 : bits & 0xffff;
          ++part.count[bin];
          part.mass[bin] += std::fabs(values[j]);
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
