// Threshold swap search: the default method, ours (not in the TETRIS paper).
//
// The paper alternates between choosing blocks and swapping lines under frozen blocks, and stalls
// early: 4 x 1 blocks never move. Here the choice of blocks moves with each swap. Let the price be
// halfway between the lightest kept block and the heaviest dropped one. Then
//
//     sum_B max(S_B - price, 0)  +  price * kept
//
// is the mass that the best choice keeps, and a swap of two lines of groups g and h changes S_g and
// S_h only: its gain, blocks chosen anew, costs one pass over two groups' sums.
//
// With the floor, a block row without a block above the price is worth its best block all the same,
// which adds sum_r min(max_{B in r} S_B - price, 0). Swapping rows, that is a look at the maxima of
// two groups. Swapping columns, let o be the best block of a row outside g and h, less the price;
// then with the mean a and the half difference d of swap_values.h, row l of the pair is worth
//
//     max(a + d, 0) + max(a - d, 0) + min(max(o, a + |d|), 0)  =  a + max(a, min(o, 0) - a, |d|)
//
// the same inner loop with another constant in place of |a|.
//
//     for each sweep, axis by axis:
//       sum lines over the other axis' groups            (LineTable)
//       several times: sum groups exactly, set the price, then some rounds of
//         pair the groups up, anew in each round; for each pair, by any thread:
//           for each line a of g: value of swapping a with every b of h; take the best
//
// Taking the best of value + temperature * Gumbel noise samples swaps (and "stay") with
// probability proportional to exp(value / temperature): annealing, cooled to zero.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "reorder/axis.h"
#include "reorder/control.h"
#include "reorder/parallel.h"
#include "reorder/problem.h"
#include "reorder/random.h"

namespace tetris::reorder {

struct ThresholdOptions {
  uint64_t seed = 0;
  int64_t sweeps = 0;  // how many, or 0: as many as fit into `seconds`
  double seconds = 0;
  // Start temperature, in units of what the milder tenth of random swaps changes.
  // Measured: see benchmarks/reorder.py.
  double hot = 0.2;
  double cold = 0.04;     // temperature before it drops to zero
  double descent = 0.12;  // share of the work at temperature zero
};

class ThresholdSearch {
 public:
  // Starts from `start`; the problem and the pool must outlive the search.
  ThresholdSearch(const Problem& problem, Order start, const ThresholdOptions& options,
                  Control& control, Pool& pool);

  void run();

  const Order& best() const { return best_; }
  double best_mass() const { return best_mass_; }
  int64_t sweeps() const { return sweep_; }

 private:
  struct Scratch {
    std::vector<float> mean, diff, floor, base, sorted;  // per element of a line
    std::vector<float> values, noisy, best_g, best_h;    // per candidate
    std::vector<float> tile;                             // [length, candidates]
    float price_shift[2] = {0, 0};

    void resize(int64_t stride, int64_t width);
  };

  // The three best blocks of a block row, less the price, and where they are in sums_.
  struct BestBlocks {
    int64_t row = 0;
    float sum[3];
    int64_t at[3];
  };

  double progress() const;
  double temperature(double done) const;
  bool time_is_up() const;
  void pass(Axis axis, double heat);
  void settle_accounts();
  void find_poor_rows();
  void find_best_blocks();
  void visit(int64_t g, int64_t h, Random random, Scratch& scratch);
  double shortfall_after(const Scratch& s, const float* out, const float* in) const;
  double exact_mass_after(int64_t g, int64_t h, Scratch& s, const float* out, const float* in);
  void reprice(int64_t g, int64_t h, Scratch& s);
  double swap_scale(Random random);

  const Problem& problem_;
  const ThresholdOptions options_;
  Control& control_;
  Pool& pool_;
  Order order_, best_;
  double best_mass_ = -1;
  int64_t sweep_ = 0;

  // The pass in progress.
  LineTable table_;
  Permutation* perm_ = nullptr;
  std::vector<float> sums_;       // [groups, stride], less the price; while that is set, of blocks
  std::vector<float> prices_;     // per block row
  std::vector<int64_t> counts_;   // blocks per block row, balanced mode
  bool exact_rows_ = false;       // balanced mode, rows: check swaps exactly
  bool floor_rows_ = false;       // floor, rows: a group's best block counts even below the price
  bool floor_cols_ = false;       // floor, columns
  std::vector<BestBlocks> poor_;  // floor, columns: the rows with few blocks above the price
  float temperature_ = 0;
  double scale_[2] = {-1, -1};  // of random swaps, per axis
  std::vector<float> gumbel_;
  std::vector<Scratch> scratch_;  // per worker
  std::atomic<int64_t> accepted_{0};
  double start_seconds_ = 0;
};

}  // namespace tetris::reorder
