#include "reorder/search.h"

#include <algorithm>
#include <array>
#include <optional>

#include "reorder/parallel.h"
#include "reorder/sort.h"
#include "reorder/swap.h"
#include "reorder/threshold.h"

namespace tetris::reorder {
namespace {

struct Candidate {
  Order order;
  double mass = 0;
  int64_t sweeps = 0;
  std::vector<double> trace;
};

// Work per round below which threads are better spent on separate starts (their synchronisation
// would cost more than it brings), in pairs of numbers compared.
constexpr double kSmallRound = 2e6;

bool is_small(const Problem& p) {
  const double rows = static_cast<double>(p.rows * p.block_rows * p.blocks_per_row());
  const double cols = static_cast<double>(p.cols * p.block_cols * p.positions * p.row_groups());
  return std::max(p.rows_matter() ? rows : 0, p.cols_matter() ? cols : 0) / 2 < kSmallRound;
}

// Independent searches: from identity and from the L1 sort, or from one of them twice; and that
// several times. Small problems run them side by side, large ones one after the other with all
// threads.
std::vector<Candidate> run_threshold(const Problem& problem, const SearchOptions& options,
                                     const std::array<const Order*, 2>& starts, Control& control,
                                     Pool& pool) {
  const int64_t chains = 2 * std::max<int64_t>(1, options.repeats);
  std::vector<Candidate> found(static_cast<size_t>(chains));
  const bool together = is_small(problem) && pool.size() > 1;
  const int64_t at_once = together ? std::min<int64_t>(pool.size(), chains) : 1;
  const int64_t turns = (chains + at_once - 1) / at_once;
  const auto run = [&](int64_t i, Pool& threads) {
    ThresholdOptions chain;
    chain.seed = Random(options.seed, static_cast<uint64_t>(i)).next();
    chain.sweeps = options.sweeps;
    chain.seconds = std::max(0.0, options.seconds) / static_cast<double>(turns);
    ThresholdSearch search(problem, *starts[i % 2], chain, control, threads);
    search.run();
    found[i] = {search.best(), search.best_mass(), search.sweeps(), {}};
  };
  if (together) {
    pool.run(chains, [&](int64_t i, int) {
      Pool alone(1);
      run(i, alone);
    });
  } else {
    for (int64_t i = 0; i < chains; ++i) run(i, pool);
  }
  return found;
}

std::vector<Candidate> run_alternation(const Problem& problem, const SearchOptions& options,
                                       const std::array<const Order*, 2>& starts, Control& control,
                                       Pool& pool) {
  const MStep step = options.method == Method::kSwap ? MStep::kSwap : MStep::kAssign;
  const int64_t rounds = options.sweeps > 0 ? options.sweeps : 100;
  std::vector<Candidate> found;
  for (const Order* start : starts) {
    if (start == starts[0] && !found.empty()) continue;  // one start only
    Alternation a = alternate(problem, *start, step, rounds, control, pool);
    const double mass = kept_mass(problem, block_sums(problem, a.order, pool));
    found.push_back({std::move(a.order), mass, a.rounds, std::move(a.trace)});
  }
  return found;
}

}  // namespace

SearchResult search(const Problem& problem, const SearchOptions& options, Control& control) {
  const double begin = control.seconds();
  Pool pool(options.threads > 0 ? options.threads : Pool::hardware_threads());
  SearchResult result;
  const auto mass_of = [&](const Order& order) {
    return kept_mass(problem, block_sums(problem, order, pool));
  };

  const Order identity = identity_order(problem), sorted = l1_sorted_order(problem, pool);
  result.identity_mass = mass_of(identity);
  result.l1_sort_mass = mass_of(sorted);
  const double elements = static_cast<double>(problem.rows * problem.row_elements());
  const double share = static_cast<double>(budget(problem)) / static_cast<double>(problem.blocks());
  result.unstructured_share =
      heaviest_elements_share(problem.saliency, problem.rows * problem.row_elements(),
                              static_cast<int64_t>(elements * share + 0.5), pool);

  // Ties go to the simpler order.
  std::vector<Candidate> candidates{{identity, result.identity_mass, 0, {}}};
  if (options.method != Method::kIdentity) {
    candidates.push_back({sorted, result.l1_sort_mass, 0, {}});
  }
  const bool trivial = !(problem.rows_matter() || problem.cols_matter()) ||
                       budget(problem) >= problem.blocks() || budget(problem) <= 0;
  if (!trivial && options.method >= Method::kSwap) {
    const std::array<const Order*, 2> starts = {
        options.start == Start::kL1Sort ? &sorted : &identity,
        options.start == Start::kIdentity ? &identity : &sorted};
    std::vector<Candidate> found = options.method == Method::kThreshold
                                       ? run_threshold(problem, options, starts, control, pool)
                                       : run_alternation(problem, options, starts, control, pool);
    // `start` is a choice of the user: only a worse result than the trivial ones is overruled.
    for (Candidate& c : found) candidates.push_back(std::move(c));
  }
  size_t best = 0;
  for (size_t i = 1; i < candidates.size(); ++i) {
    result.sweeps = std::max(result.sweeps, candidates[i].sweeps);
    if (candidates[i].mass > candidates[best].mass) best = i;
  }
  result.order = std::move(candidates[best].order);
  result.trace = std::move(candidates[best].trace);
  result.rows_moved = !is_identity(result.order.rows);
  result.cols_moved = !is_identity(result.order.cols);
  const std::vector<float> sums = block_sums(problem, result.order, pool);
  for (float sum : sums) result.total += sum;
  result.selection = select_blocks(problem, sums);
  result.seconds = control.seconds() - begin;
  return result;
}

}  // namespace tetris::reorder
