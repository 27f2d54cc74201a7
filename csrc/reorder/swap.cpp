#include "reorder/swap.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "reorder/assignment.h"
#include "reorder/axis.h"
#include "reorder/objective.h"

namespace tetris::reorder {
namespace {

constexpr double kTolerance = 1e-5;  // of the total; a swap's share of it is 1 / n

// T[i, g], row-major: what line i would lose in group g. `removed` is 1 for removed blocks, in the
// layout of the group sums, [groups, length].
std::vector<double> removed_by_group(const LineTable& table, const std::vector<float>& removed,
                                     Pool& pool, const std::function<void()>& poll) {
  const int64_t groups = table.groups, length = table.length;
  std::vector<float> columns(static_cast<size_t>(length * groups));  // transposed
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t l = 0; l < length; ++l) columns[l * groups + g] = removed[g * length + l];
  }
  std::vector<double> cost(static_cast<size_t>(table.lines * groups));
  pool.run(table.lines, [&](int64_t i, int) {
    poll();
    const float* line = table.line(i);
    double* t = cost.data() + i * groups;
    for (int64_t l = 0; l < length; ++l) {
      const double x = std::fabs(line[l]);
      const float* column = columns.data() + l * groups;
      for (int64_t g = 0; g < groups; ++g) t[g] += x * column[g];
    }
  });
  return cost;
}

// Best swap between every two groups, kept up to date while lines move.
class SwapDescent {
 public:
  SwapDescent(const LineTable& table, const std::vector<double>& cost, Permutation& perm)
      : table_(table),
        cost_(cost),
        perm_(perm),
        groups_(table.groups),
        best_(static_cast<size_t>(groups_ * groups_)),
        slot_(static_cast<size_t>(groups_ * groups_)),
        partner_(static_cast<size_t>(groups_)) {
    for (int64_t g = 0; g < groups_; ++g) refresh(g);
    for (int64_t g = 0; g < groups_; ++g) find_partner(g);
  }

  void run(double least_gain, const std::function<void()>& poll) {
    // Each swap gains at least least_gain, so this ends; the bound only guards against rounding.
    for (int64_t swaps = 0; swaps < 64 * table_.lines; ++swaps) {
      if (swaps % 256 == 0) poll();
      int64_t g = 0;
      for (int64_t i = 1; i < groups_; ++i) {
        if (gain(i, partner_[i]) > gain(g, partner_[g])) g = i;
      }
      const int64_t h = partner_[g];
      if (!(gain(g, h) > least_gain)) return;
      std::swap(perm_[slot_[g * groups_ + h]], perm_[slot_[h * groups_ + g]]);
      refresh(g);
      refresh(h);
      for (int64_t i = 0; i < groups_; ++i) {
        if (i == g || i == h || partner_[i] == g || partner_[i] == h) {
          find_partner(i);
        } else {
          if (gain(i, g) > gain(i, partner_[i])) partner_[i] = g;
          if (gain(i, h) > gain(i, partner_[i])) partner_[i] = h;
        }
      }
    }
  }

 private:
  double gain(int64_t g, int64_t h) const {
    return g == h ? 0 : best_[g * groups_ + h] + best_[h * groups_ + g];
  }

  // For every h: the line of g that gains most by moving to h.
  void refresh(int64_t g) {
    const int64_t end = std::min(table_.lines, (g + 1) * table_.block);
    double* best = best_.data() + g * groups_;
    int64_t* slot = slot_.data() + g * groups_;
    for (int64_t q = g * table_.block; q < end; ++q) {
      const double* t = cost_.data() + perm_[q] * groups_;
      for (int64_t h = 0; h < groups_; ++h) {
        const double x = t[g] - t[h];
        if (q == g * table_.block || x > best[h]) {
          best[h] = x;
          slot[h] = q;
        }
      }
    }
  }

  void find_partner(int64_t g) {
    int64_t partner = g == 0 ? 1 : 0;
    for (int64_t h = 0; h < groups_; ++h) {
      if (h != g && gain(g, h) > gain(g, partner)) partner = h;
    }
    partner_[g] = partner;
  }

  const LineTable& table_;
  const std::vector<double>& cost_;
  Permutation& perm_;
  const int64_t groups_;
  std::vector<double> best_;
  std::vector<int64_t> slot_, partner_;
};

void assign_exactly(const LineTable& table, const std::vector<double>& cost, Permutation& perm,
                    const std::function<void()>& poll) {
  std::vector<int64_t> capacity(static_cast<size_t>(table.groups), table.block);
  capacity.back() = table.lines - (table.groups - 1) * table.block;
  const std::vector<int32_t> group =
      assign_to_groups(cost, table.lines, table.groups, capacity, poll);
  // Lines that stay in their group keep their order.
  const std::vector<int32_t> now = groups_of(perm, table.block);
  double before = 0, after = 0;
  for (int64_t i = 0; i < table.lines; ++i) {
    before += cost[i * table.groups + now[i]];
    after += cost[i * table.groups + group[i]];
  }
  if (!(after < before)) return;  // equal cost: rounding only
  std::vector<int64_t> next(static_cast<size_t>(table.groups));
  for (int64_t g = 0; g < table.groups; ++g) next[g] = g * table.block;
  const Permutation old = perm;
  for (int32_t i : old) perm[next[group[i]]++] = i;
}

}  // namespace

Alternation alternate(const Problem& problem, Order start, MStep step, int64_t max_rounds,
                      Control& control, Pool& pool) {
  Alternation result;
  result.order = std::move(start);
  LineTable table;
  while (result.rounds < max_rounds) {
    const auto poll = [&] {
      control.poll(static_cast<double>(result.rounds) / static_cast<double>(max_rounds));
    };
    poll();
    // E step
    const std::vector<float> sums = block_sums(problem, result.order, pool);
    const std::vector<uint8_t> keep = select_blocks(problem, sums).keep;
    double total = 0, removed = 0;
    for (size_t b = 0; b < sums.size(); ++b) {
      total += sums[b];
      if (!keep[b]) removed += sums[b];
    }
    result.trace.push_back(removed);
    // M step, one axis after the other
    double after = removed;
    for (const Axis axis : {Axis::kRows, Axis::kCols}) {
      if (axis == Axis::kRows ? !problem.rows_matter() : !problem.cols_matter()) continue;
      table.build(problem, result.order, axis, pool);
      std::vector<float> mask(static_cast<size_t>(table.groups * table.length));
      for (int64_t g = 0; g < table.groups; ++g) {
        for (int64_t l = 0; l < table.length; ++l) {
          mask[g * table.length + l] = !keep[table.block_index(problem, g, l)];
        }
      }
      const std::vector<double> cost = removed_by_group(table, mask, pool, poll);
      Permutation& perm = axis == Axis::kRows ? result.order.rows : result.order.cols;
      if (step == MStep::kSwap) {
        SwapDescent(table, cost, perm)
            .run(kTolerance * total / static_cast<double>(table.lines), poll);
      } else {
        assign_exactly(table, cost, perm, poll);
      }
      const std::vector<int32_t> group = groups_of(perm, table.block);
      double now = 0;
      for (int64_t i = 0; i < table.lines; ++i) now += cost[i * table.groups + group[i]];
      after = now;
    }
    result.trace.push_back(after);
    ++result.rounds;
    if (removed - after <= kTolerance * total) break;
  }
  return result;
}

}  // namespace tetris::reorder
