// Unit tests of the permutation search, against obvious references in double.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <set>
#include <stdexcept>

#include "reorder/assignment.h"
#include "reorder/axis.h"
#include "reorder/objective.h"
#include "reorder/random.h"
#include "reorder/search.h"
#include "reorder/sort.h"
#include "reorder/swap.h"
#include "reorder/swap_values.h"

namespace tetris::reorder {
namespace {

std::vector<float> random_values(int64_t n, uint64_t seed) {
  Random random(seed);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& x : values) x = static_cast<float>(-std::log(random.uniform()));
  return values;
}

struct Case {
  std::vector<float> values;
  Problem problem;

  Case(int64_t rows, int64_t cols, int64_t positions, int64_t bo, int64_t bi, double sparsity,
       uint64_t seed = 1)
      : values(random_values(rows * cols * positions, seed)) {
    problem.saliency = values.data();
    problem.rows = rows;
    problem.cols = cols;
    problem.positions = positions;
    problem.block_rows = bo;
    problem.block_cols = bi;
    const double blocks = static_cast<double>(problem.blocks());
    problem.kept = problem.blocks() - static_cast<int64_t>(sparsity * blocks);
  }

  Order random_order(uint64_t seed) const {
    Order order = identity_order(problem);
    Random random(seed);
    shuffle(order.rows, random);
    shuffle(order.cols, random);
    return order;
  }

  std::vector<double> reference_sums(const Order& order) const {
    const Problem& p = problem;
    std::vector<double> sums(static_cast<size_t>(p.blocks()));
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t c = 0; c < p.cols; ++c) {
        for (int64_t k = 0; k < p.positions; ++k) {
          const int64_t column = k * p.col_groups() + c / p.block_cols;
          sums[r / p.block_rows * p.blocks_per_row() + column] +=
              values[(order.rows[r] * p.cols + order.cols[c]) * p.positions + k];
        }
      }
    }
    return sums;
  }
};

bool is_permutation(const Permutation& perm) {
  std::set<int32_t> seen(perm.begin(), perm.end());
  return seen.size() == perm.size() && *seen.begin() == 0 &&
         *seen.rbegin() == static_cast<int32_t>(perm.size()) - 1;
}

TEST(Pool, RunsEveryIndexOnce) {
  Pool pool(4);
  for (int64_t count : {0, 1, 3, 1000}) {
    std::vector<std::atomic<int>> hits(static_cast<size_t>(count));
    for (int repeat = 0; repeat < 50; ++repeat) {
      pool.run(count, [&](int64_t i, int worker) {
        ASSERT_LT(worker, 4);
        ++hits[i];
      });
    }
    for (auto& h : hits) EXPECT_EQ(h, 50);
  }
}

TEST(Pool, RethrowsWhatATaskThrows) {
  Pool pool(3);
  for (int repeat = 0; repeat < 20; ++repeat) {
    EXPECT_THROW(pool.run(100,
                          [](int64_t i, int) {
                            if (i == 50) throw std::runtime_error("task");
                          }),
                 std::runtime_error);
    std::atomic<int> count{0};
    pool.run(10, [&](int64_t, int) { ++count; });
    EXPECT_EQ(count, 10);
  }
}

TEST(SwapValues, AgreeWithTheDirectForm) {
  for (int64_t length : {1, 15, 16, 33, 100}) {
    for (int64_t count : {1, 3, 4, 7, 16, 20, 32, 50, 128}) {
      const int64_t stride = pad_lanes(length), width = pad_lanes(count);
      const std::vector<float> g = random_values(length, 1), h = random_values(length, 2);
      std::vector<float> diff(stride), floor(stride), base(stride), lines((count + 1) * stride);
      const std::vector<float> random = random_values((count + 1) * length, 3);
      for (int64_t j = 0; j <= count; ++j) {
        for (int64_t l = 0; l < length; ++l) {  // of lines, magnitudes count
          lines[j * stride + l] = random[j * length + l] * (l % 3 == 0 ? -1.0f : 1.0f);
        }
      }
      std::vector<float> tile(length * width);
      std::vector<int32_t> ids(count);
      double mean = 0;
      for (int64_t l = 0; l < length; ++l) {
        const float a = g[l] - 1.0f, b = h[l] - 1.0f;
        diff[l] = 0.5f * (a - b);
        floor[l] = std::fabs(0.5f * (a + b));
        mean += 0.5 * (a + b);
        for (int64_t j = 0; j < count; ++j) tile[l * width + j] = std::fabs(lines[j * stride + l]);
      }
      for (int64_t j = 0; j < count; ++j) ids[j] = static_cast<int32_t>(j);
      std::vector<float> along(count), across(width);
      const float* out = lines.data() + count * stride;
      swap_values_along(diff.data(), floor.data(), out, lines.data(), ids.data(), count, stride,
                        base.data(), along.data());
      swap_values_across(diff.data(), floor.data(), out, tile.data(), width, length, base.data(),
                         across.data());
      for (int64_t j = 0; j < count; ++j) {
        double expected = 0;
        for (int64_t l = 0; l < length; ++l) {
          const double change = std::fabs(lines[j * stride + l]) - std::fabs(out[l]);
          expected += std::max(g[l] - 1 + change, 0.0) + std::max(h[l] - 1 - change, 0.0);
        }
        EXPECT_NEAR(mean + along[j], expected, 1e-4 * length) << length << " " << count;
        EXPECT_NEAR(mean + across[j], expected, 1e-4 * length) << length << " " << count;
      }
    }
  }
}

TEST(SwapValues, BestPairs) {
  for (int64_t length : {1, 15, 16, 33, 100}) {
    for (int64_t count : {1, 4, 16, 20, 50}) {
      const int64_t width = pad_lanes(count);
      // Below the price, all of it: no zero may slip in from the padding.
      std::vector<float> mean = random_values(pad_lanes(length), 1);
      for (float& x : mean) x -= 20;
      const std::vector<float> diff = random_values(pad_lanes(length), 2);
      std::vector<float> lines = random_values((count + 1) * length, 3);
      for (size_t i = 0; i < lines.size(); i += 3) lines[i] = -lines[i];  // magnitudes count
      const float* out = lines.data() + count * length;
      std::vector<float> tile(length * width), base(length), best_g(width), best_h(width);
      for (int64_t l = 0; l < length; ++l) {
        base[l] = diff[l] - std::fabs(out[l]);
        for (int64_t j = 0; j < count; ++j) tile[l * width + j] = std::fabs(lines[j * length + l]);
      }
      best_pairs_across(mean.data(), base.data(), tile.data(), width, length, best_g.data(),
                        best_h.data());
      for (int64_t j = -1; j < count; ++j) {  // -1: no swap
        double g = -1e300, h = -1e300;
        for (int64_t l = 0; l < length; ++l) {
          const double d =
              j < 0 ? diff[l]
                    : double{diff[l]} - std::fabs(out[l]) + std::fabs(lines[j * length + l]);
          g = std::max(g, mean[l] + d);
          h = std::max(h, mean[l] - d);
        }
        const float* in = j < 0 ? nullptr : lines.data() + j * length;
        const BestPair best =
            best_pair(mean.data(), diff.data(), j < 0 ? nullptr : out, in, length);
        EXPECT_NEAR(best.g, g, 1e-5) << length << " " << j;
        EXPECT_NEAR(best.h, h, 1e-5) << length << " " << j;
        if (j < 0) continue;
        EXPECT_NEAR(best_g[j], g, 1e-5) << length << " " << j;
        EXPECT_NEAR(best_h[j], h, 1e-5) << length << " " << j;
      }
    }
  }
}

TEST(SwapValues, LargestNoisy) {
  for (int64_t count : {1, 4, 15, 16, 17, 64, 128}) {
    const std::vector<float> values = random_values(count, 1), noise = random_values(count, 2);
    std::vector<float> noisy(count);
    int64_t expected = 0;
    const auto sum = [&](int64_t j) { return values[j] + 0.5f * noise[j]; };
    for (int64_t j = 1; j < count; ++j) {
      if (sum(j) > sum(expected)) expected = j;
    }
    const auto largest = [&](float to_beat) {
      return largest_noisy(values.data(), noise.data(), 0.5f, count, to_beat, noisy.data());
    };
    EXPECT_EQ(largest(0).index, expected) << count;
    EXPECT_NEAR(largest(0).value, sum(expected), 1e-5) << count;
    EXPECT_EQ(largest(sum(expected) + 1).index, -1) << count;
  }
  const std::vector<float> equal(40, 1.0f), none(40, 0.0f);
  std::vector<float> noisy(40);
  EXPECT_EQ(largest_noisy(equal.data(), none.data(), 0, 40, 0, noisy.data()).index, 0);
}

TEST(Objective, BlockSumsAndTablesAgreeWithTheReference) {
  for (const Case& c : {Case(20, 30, 1, 4, 5, .5), Case(19, 31, 3, 4, 8, .5),
                        Case(70, 130, 1, 1, 16, .5), Case(7, 5, 9, 16, 16, .5)}) {
    Pool pool(2);
    const Order order = c.random_order(7);
    const std::vector<double> expected = c.reference_sums(order);
    const std::vector<float> sums = block_sums(c.problem, order, pool);
    ASSERT_EQ(sums.size(), expected.size());
    for (size_t b = 0; b < sums.size(); ++b) EXPECT_NEAR(sums[b], expected[b], 1e-3);
    for (const Axis axis : {Axis::kRows, Axis::kCols}) {
      LineTable table;
      table.build(c.problem, order, axis, pool);
      const Permutation& perm = axis == Axis::kRows ? order.rows : order.cols;
      std::vector<float> groups, blocks;
      table.group_sums(perm, groups, pool);
      table.block_sums(c.problem, perm, blocks, pool);
      for (size_t b = 0; b < blocks.size(); ++b) EXPECT_NEAR(blocks[b], expected[b], 1e-3);
      for (int64_t g = 0; g < table.groups; ++g) {
        for (int64_t l = 0; l < table.length; ++l) {
          EXPECT_EQ(groups[g * table.stride + l], blocks[table.block_index(c.problem, g, l)]);
        }
      }
    }
  }
}

TEST(Objective, SelectionIsTheBestOfAllSelections) {
  // 3 x 3 blocks: try all 512 subsets.
  for (const bool balanced : {false, true}) {
    for (const bool allow_empty : {false, true}) {
      for (int64_t kept = 0; kept <= 9; ++kept) {
        Case c(3, 3, 1, 1, 1, .5, 11);
        c.problem.kept = kept;
        c.problem.balanced = balanced;
        c.problem.allow_empty_rows = allow_empty;
        const Selection found = select_blocks(c.problem, c.values);
        const int64_t count = allow_empty ? kept : std::max<int64_t>(kept, 3);
        double best = 0;
        for (int set = 0; set < 512; ++set) {
          int64_t rows[3] = {}, size = 0;
          double mass = 0;
          for (int b = 0; b < 9; ++b) {
            if (set >> b & 1) ++size, ++rows[b / 3], mass += c.values[b];
          }
          const int64_t most = *std::max_element(rows, rows + 3);
          const int64_t least = *std::min_element(rows, rows + 3);
          if (size != count || (!allow_empty && least == 0)) continue;
          if (balanced && most - least > 1) continue;
          best = std::max(best, mass);
        }
        // With a floor the selection keeps each row's best, then the best of the rest.
        EXPECT_NEAR(found.mass, best, 1e-5) << balanced << allow_empty << kept;
        EXPECT_EQ(std::count(found.keep.begin(), found.keep.end(), 1), count);
        EXPECT_EQ(found.floor_bound, count > kept);
      }
    }
  }
}

TEST(Objective, ManyBlocksAreSelectedAsFewAre) {
  // Beyond some number the limit comes from histograms; by a sort here. Of few values: ties.
  for (const bool coarse : {false, true}) {
    for (const bool allow_empty : {false, true}) {
      for (const int64_t kept : {200, 1000, 17000, 39999}) {
        Case c(200, 200, 1, 1, 1, .5, 3);
        c.problem.kept = kept;
        c.problem.allow_empty_rows = allow_empty;
        if (coarse) {
          for (float& x : c.values) x = std::floor(x * 4);
        }
        std::vector<uint8_t> expected(c.values.size());
        int64_t left = kept;
        for (int64_t r = 0; r < 200 && !allow_empty; ++r, --left) {
          const auto line = c.values.begin() + r * 200;
          expected[std::max_element(line, line + 200) - c.values.begin()] = 1;
        }
        std::vector<int32_t> order = identity_permutation(200 * 200);
        std::stable_sort(order.begin(), order.end(),
                         [&](int32_t a, int32_t b) { return c.values[a] > c.values[b]; });
        double mass = 0;
        for (const int32_t i : order) {
          if (!expected[i] && left > 0) expected[i] = 1, --left;
        }
        for (size_t i = 0; i < expected.size(); ++i) mass += expected[i] ? c.values[i] : 0;
        const Selection found = select_blocks(c.problem, c.values);
        EXPECT_EQ(found.keep, expected) << coarse << allow_empty << kept;
        EXPECT_EQ(found.mass, mass);
        EXPECT_EQ(kept_mass(c.problem, c.values), mass);
        // The price lies between what is kept and what is not, of blocks that no floor keeps.
        float kept_least = 1e9f, dropped_most = 0;
        for (int64_t r = 0; r < 200; ++r) {
          const auto line = c.values.begin() + r * 200;
          const int64_t floor =
              allow_empty ? -1 : std::max_element(line, line + 200) - c.values.begin();
          for (int64_t i = r * 200; i < (r + 1) * 200; ++i) {
            if (i == floor) continue;
            if (expected[i]) kept_least = std::min(kept_least, c.values[i]);
            if (!expected[i]) dropped_most = std::max(dropped_most, c.values[i]);
          }
        }
        if (kept > 200) {
          for (const float price : block_row_prices(c.problem, c.values)) {
            EXPECT_EQ(price, 0.5f * (kept_least + dropped_most));
          }
        }
      }
    }
  }
}

TEST(Objective, SignsAreIgnored) {
  Case c(70, 130, 1, 4, 2, .7);
  for (const Method method : {Method::kL1Sort, Method::kSwap, Method::kThreshold}) {
    SearchOptions options;
    options.method = method;
    options.sweeps = 2;
    Control control;
    const SearchResult plain = search(c.problem, options, control);
    std::vector<float> weight = c.values;
    for (size_t i = 0; i < weight.size(); i += 3) weight[i] = -weight[i];
    Problem signed_problem = c.problem;
    signed_problem.saliency = weight.data();
    const SearchResult found = search(signed_problem, options, control);
    EXPECT_EQ(found.order.rows, plain.order.rows);
    EXPECT_EQ(found.order.cols, plain.order.cols);
    EXPECT_EQ(found.selection.keep, plain.selection.keep);
    EXPECT_EQ(found.total, plain.total);
    EXPECT_EQ(found.unstructured_share, plain.unstructured_share);
  }
}

TEST(Objective, TiesGoToTheLowerIndex) {
  Case c(1, 6, 1, 1, 1, .5);
  c.values = {1, 2, 1, 2, 1, 1};
  c.problem.saliency = c.values.data();
  c.problem.kept = 4;
  EXPECT_EQ(select_blocks(c.problem, c.values).keep, (std::vector<uint8_t>{1, 1, 1, 1, 0, 0}));
}

TEST(Objective, HeaviestElements) {
  Pool pool(2);
  for (int64_t size : {1001, 600001}) {  // by partition and by histograms
    std::vector<float> values = random_values(size, 5);
    values[3] = values[4] = values[5] = 0.5f;
    std::vector<float> sorted = values;
    std::sort(sorted.rbegin(), sorted.rend());
    const double total = std::accumulate(values.begin(), values.end(), 0.0);
    const int64_t ties = std::find(sorted.begin(), sorted.end(), 0.5f) - sorted.begin();
    for (int64_t count :
         {int64_t{0}, int64_t{1}, int64_t{2}, size / 2, ties, ties + 1, ties + 2, size - 1, size}) {
      const double expected = std::accumulate(sorted.begin(), sorted.begin() + count, 0.0) / total;
      EXPECT_NEAR(heaviest_elements_share(values.data(), size, count, pool), expected, 1e-9);
    }
    std::fill(values.begin(), values.end(), 0.0f);
    EXPECT_EQ(heaviest_elements_share(values.data(), size, 7, pool), 1);
  }
}

TEST(Sort, DescendingAndStable) {
  Case c(4, 2, 1, 2, 2, .5);
  c.values = {1, 1, 3, 3, 1, 1, 4, 5};
  c.problem.saliency = c.values.data();
  Pool pool(1);
  EXPECT_EQ(l1_sorted_order(c.problem, pool).rows, (Permutation{3, 1, 0, 2}));
}

TEST(Assignment, BeatsEveryPermutation) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    Random random(seed);
    const int64_t n = 7, groups = 3;
    const std::vector<int64_t> capacity = {3, 3, 1};
    std::vector<double> cost(n * groups);
    for (double& x : cost) x = random.below(seed % 2 ? 5 : 1000);
    const std::vector<int32_t> group = assign_to_groups(cost, n, groups, capacity);
    std::vector<int64_t> used(groups);
    double found = 0, best = 1e300;
    for (int64_t i = 0; i < n; ++i) found += cost[i * groups + group[i]], ++used[group[i]];
    EXPECT_EQ(used, capacity);
    std::vector<int32_t> slots = {0, 0, 0, 1, 1, 1, 2};
    do {
      double total = 0;
      for (int64_t i = 0; i < n; ++i) total += cost[i * groups + slots[i]];
      best = std::min(best, total);
    } while (std::next_permutation(slots.begin(), slots.end()));
    EXPECT_NEAR(found, best, 1e-9);
  }
}

TEST(Alternation, RemovedMassNeverRises) {
  for (const MStep step : {MStep::kSwap, MStep::kAssign}) {
    for (const Case& c : {Case(64, 48, 1, 8, 8, .75), Case(37, 29, 2, 8, 4, .6)}) {
      Pool pool(2);
      Control control;
      const Alternation a = alternate(c.problem, c.random_order(3), step, 100, control, pool);
      EXPECT_TRUE(is_permutation(a.order.rows));
      EXPECT_TRUE(is_permutation(a.order.cols));
      for (size_t i = 1; i < a.trace.size(); ++i) EXPECT_LE(a.trace[i], a.trace[i - 1] + 1e-3);
      EXPECT_LT(a.trace.back(), a.trace.front());
    }
  }
}

class SearchModes : public testing::TestWithParam<std::tuple<bool, bool, int>> {};

TEST_P(SearchModes, NeverWorseAndTheSameForAnyNumberOfThreads) {
  const auto [balanced, allow_empty, shape] = GetParam();
  Case c = shape == 0   ? Case(64, 48, 1, 16, 16, .75)
           : shape == 1 ? Case(50, 70, 1, 4, 1, .75)
           : shape == 2 ? Case(33, 21, 9, 8, 4, .8)
                        : Case(130, 257, 1, 1, 32, .5);
  c.problem.balanced = balanced;
  c.problem.allow_empty_rows = allow_empty;
  SearchOptions options;
  options.sweeps = 4;
  SearchResult first;
  for (int threads : {1, 2, 4}) {
    options.threads = threads;
    Control control;
    const SearchResult found = search(c.problem, options, control);
    EXPECT_TRUE(is_permutation(found.order.rows));
    EXPECT_TRUE(is_permutation(found.order.cols));
    EXPECT_GE(found.selection.mass, found.identity_mass);
    EXPECT_GE(found.selection.mass, found.l1_sort_mass);
    if (threads == 1) first = found;
    EXPECT_EQ(found.order.rows, first.order.rows);
    EXPECT_EQ(found.order.cols, first.order.cols);
    EXPECT_EQ(found.selection.keep, first.selection.keep);
  }
}

INSTANTIATE_TEST_SUITE_P(All, SearchModes,
                         testing::Combine(testing::Bool(), testing::Bool(), testing::Range(0, 4)));

TEST(Search, RoundsInParallelGiveTheSameResult) {
  // Large enough for the threads to share rounds instead of starts.
  Case c(512, 2048, 1, 16, 1, .75);
  SearchOptions options;
  options.sweeps = 1;
  options.threads = 1;
  Control one, four;
  const SearchResult alone = search(c.problem, options, one);
  options.threads = 4;
  const SearchResult together = search(c.problem, options, four);
  EXPECT_EQ(alone.order.rows, together.order.rows);
  EXPECT_GT(alone.selection.mass, alone.l1_sort_mass);
}

TEST(Search, FindsTheBestOrderOfNearlyAllSmallProblems) {
  // 4 x 6 in blocks of 2 x 2: all 3 pairings of rows with all 15 of columns.
  for (const bool allow_empty : {false, true}) {
    int missed = 0;
    for (int64_t kept = 1; kept <= 4; ++kept) {
      for (uint64_t seed = 0; seed < 8; ++seed) {
        Case c(4, 6, 1, 2, 2, .5, 100 + seed);
        for (int64_t i = 12; i < 24; ++i) c.values[i] *= 0.2f;  // poor rows
        c.problem.kept = kept;
        c.problem.allow_empty_rows = allow_empty;
        SearchOptions options;
        options.sweeps = 40;
        options.threads = 1;
        Control control;
        const double found = search(c.problem, options, control).selection.mass;
        Pool pool(1);
        Order order = identity_order(c.problem);
        double best = 0;
        do {
          do {
            const std::vector<float> sums = block_sums(c.problem, order, pool);
            best = std::max(best, select_blocks(c.problem, sums).mass);
            // The first line may stay: the order of groups does not matter.
          } while (std::next_permutation(order.cols.begin() + 1, order.cols.end()));
        } while (std::next_permutation(order.rows.begin() + 1, order.rows.end()));
        EXPECT_LE(found, best + 1e-4);
        missed += found < best - 1e-4;
      }
    }
    EXPECT_LE(missed, 1) << "of 32, " << allow_empty;
  }
}

class HeldAxis : public testing::TestWithParam<Method> {};

// Holding an axis is the same as searching the other axis of a matrix that is permuted already.
TEST_P(HeldAxis, StaysAndTheOtherOneIsSearched) {
  for (const bool hold_rows : {true, false}) {
    for (const bool balanced : {false, true}) {
      Case c(52, 45, 2, 4, 6, 0.7, 5);
      c.problem.balanced = balanced;
      const Order order = c.random_order(3);
      (hold_rows ? c.problem.held_rows : c.problem.held_cols) =
          hold_rows ? &order.rows : &order.cols;
      SearchOptions options;
      options.method = GetParam();
      options.sweeps = 6;
      options.threads = 2;
      Control control;
      const SearchResult found = search(c.problem, options, control);
      const Permutation& held = hold_rows ? found.order.rows : found.order.cols;
      const Permutation& other = hold_rows ? found.order.cols : found.order.rows;
      EXPECT_EQ(held, hold_rows ? order.rows : order.cols);
      EXPECT_TRUE(hold_rows ? found.rows_moved : found.cols_moved);
      EXPECT_TRUE(is_permutation(other));
      const auto mass_of = [&](const Order& o) {
        const std::vector<double> sums = c.reference_sums(o);
        const std::vector<float> rounded(sums.begin(), sums.end());
        return select_blocks(c.problem, rounded).mass;
      };
      EXPECT_NEAR(found.selection.mass, mass_of(found.order), 1e-3);
      Order start = identity_order(c.problem);
      EXPECT_EQ(hold_rows ? start.rows : start.cols, held);
      EXPECT_NEAR(found.identity_mass, mass_of(start), 1e-3);
      Pool pool(1);
      const Order sorted = l1_sorted_order(c.problem, pool);
      EXPECT_EQ(hold_rows ? sorted.rows : sorted.cols, held);
      EXPECT_NEAR(found.l1_sort_mass, mass_of(sorted), 1e-3);
      EXPECT_GE(found.selection.mass, found.identity_mass);
      if (options.method != Method::kIdentity) {
        EXPECT_GE(found.selection.mass, found.l1_sort_mass);
      }

      std::vector<float> permuted(c.values.size());
      const int64_t positions = c.problem.positions;
      for (int64_t r = 0; r < c.problem.rows; ++r) {
        for (int64_t k = 0; k < c.problem.cols; ++k) {
          const int64_t from = start.rows[r] * c.problem.cols + start.cols[k];
          const int64_t to = r * c.problem.cols + k;
          std::copy_n(c.values.data() + from * positions, positions,
                      permuted.data() + to * positions);
        }
      }
      Problem same = c.problem;
      same.saliency = permuted.data();
      const Order identity{identity_permutation(same.rows), identity_permutation(same.cols)};
      same.held_rows = hold_rows ? &identity.rows : nullptr;
      same.held_cols = hold_rows ? nullptr : &identity.cols;
      const SearchResult again = search(same, options, control);
      EXPECT_EQ(hold_rows ? again.order.cols : again.order.rows, other);
      EXPECT_FALSE(hold_rows ? again.rows_moved : again.cols_moved);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Methods, HeldAxis,
                         testing::Values(Method::kIdentity, Method::kL1Sort, Method::kSwap,
                                         Method::kAssign, Method::kThreshold));

TEST(Search, HoldsBothAxes) {
  Case c(24, 20, 1, 4, 5, 0.5);
  const Order order = c.random_order(9);
  c.problem.held_rows = &order.rows;
  c.problem.held_cols = &order.cols;
  Control control;
  const SearchResult found = search(c.problem, {}, control);
  EXPECT_EQ(found.order.rows, order.rows);
  EXPECT_EQ(found.order.cols, order.cols);
  EXPECT_EQ(found.selection.mass, found.identity_mass);
}

TEST(Search, StopsInTheMiddleOfALongRound) {
  // Pairing all groups compares 2048 * 128 * 256 / 2 numbers a round: long in debug builds.
  Case c(2048, 2048, 1, 128, 8, .75);
  for (const Method method : {Method::kThreshold, Method::kSwap}) {
    SearchOptions options;
    options.method = method;
    options.seconds = 600;
    options.threads = 1;
    Control timer;
    double asked = 0;
    Control control([&](double) {
      asked = timer.seconds();
      return asked < 0.5;
    });
    try {
      search(c.problem, options, control);
      if (method == Method::kThreshold) FAIL() << "ten minutes were allowed";  // swap may converge
    } catch (const Cancelled&) {
      EXPECT_LT(timer.seconds() - asked, 5);  // sanitizers and emulators are slow; a round is not
    }
  }
}

TEST(Search, StopsWhenToldTo) {
  Case c(256, 256, 1, 8, 8, .75);
  SearchOptions options;
  options.seconds = 60;
  options.threads = 2;
  Control control([](double) { return false; });
  EXPECT_THROW(search(c.problem, options, control), Cancelled);
  EXPECT_LT(control.seconds(), 10);
}

}  // namespace
}  // namespace tetris::reorder
