#include "reorder/threshold.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "reorder/objective.h"
#include "reorder/swap_values.h"

namespace tetris::reorder {
namespace {

constexpr size_t kNoise = 8192;  // Gumbel variates, read from a random offset on
constexpr int64_t kMaxBlock = 256;

// The lines of two groups that one thread goes through should stay in its cache.
constexpr int64_t kClusterBytes = 384 << 10;

// Rounds between exact sums, and passes between table rebuilds, follow from rough costs (ns):
// a pair of lines costs 1/15 per element, an element of saliency 1, a block 40 (it is selected).
constexpr double kSwapCost = 1.0 / 15, kBuildCost = 1.0, kBlockCost = 40.0;

// Rounds that may last longer (ns) look at the clock and for Ctrl-C in between.
constexpr double kLongRound = 2e7;

// A block row with this many blocks above the price is not about to lose them all. Three would be
// exact at the moment of counting: two groups that swap lines hold one each.
constexpr int64_t kRichRow = 6;

int64_t clamp_to_int(double x, double low, double high) {
  return static_cast<int64_t>(std::ceil(std::min(high, std::max(low, x))));
}

}  // namespace

void ThresholdSearch::Scratch::resize(int64_t stride, int64_t width) {
  if (static_cast<int64_t>(mean.size()) < stride) {
    for (std::vector<float>* v : {&mean, &diff, &floor, &base, &sorted}) {
      v->resize(static_cast<size_t>(stride));
    }
  }
  if (static_cast<int64_t>(values.size()) < width) {
    for (std::vector<float>* v : {&values, &noisy, &best_g, &best_h}) {
      v->resize(static_cast<size_t>(width));
    }
  }
}

ThresholdSearch::ThresholdSearch(const Problem& problem, Order start,
                                 const ThresholdOptions& options, Control& control, Pool& pool)
    : problem_(problem),
      options_(options),
      control_(control),
      pool_(pool),
      order_(start),
      best_(std::move(start)),
      gumbel_(kNoise + kMaxBlock),
      scratch_(static_cast<size_t>(pool.size())) {
  Random random(options.seed, 0x6e6f697365);
  for (float& x : gumbel_) {
    x = static_cast<float>(-std::log(-std::log(random.uniform() * 0.999999)));
  }
  start_seconds_ = control.seconds();
}

double ThresholdSearch::progress() const {
  if (options_.sweeps > 0) {
    return static_cast<double>(sweep_) / static_cast<double>(options_.sweeps);
  }
  return (control_.seconds() - start_seconds_) / std::max(options_.seconds, 1e-9);
}

bool ThresholdSearch::time_is_up() const { return options_.sweeps <= 0 && progress() >= 1; }

double ThresholdSearch::temperature(double done) const {
  const double annealed = done / (1 - options_.descent);
  if (annealed >= 1 || options_.hot <= 0) return 0;
  return options_.hot * std::pow(options_.cold / options_.hot, annealed);
}

void ThresholdSearch::run() {
  int idle = 0;
  while (progress() < 1) {
    accepted_ = 0;
    // The first sweep descends: temperatures are measured in the swaps of what it reaches.
    const double heat = sweep_ == 0 ? 0 : temperature(progress());
    const bool descending = heat == 0 && sweep_ > 0;
    if (problem_.rows_matter()) pass(Axis::kRows, heat);
    if (problem_.cols_matter()) pass(Axis::kCols, heat);
    ++sweep_;
    // A sweep of a large matrix does not visit all pairs, hence more than one idle sweep.
    idle = descending && accepted_ == 0 ? idle + 1 : 0;
    if (idle == 8) break;
  }
  // The last rounds have not been accounted for.
  if (perm_) settle_accounts();
}

void ThresholdSearch::pass(Axis axis, double heat) {
  const bool rows = axis == Axis::kRows;
  const bool alone = !(problem_.rows_matter() && problem_.cols_matter());
  perm_ = rows ? &order_.rows : &order_.cols;
  if (sweep_ == 0 || !alone) table_.build(problem_, order_, axis, pool_);
  exact_rows_ = rows && problem_.balanced;
  const bool floor = !problem_.balanced && !problem_.allow_empty_rows;
  floor_rows_ = rows && floor;
  floor_cols_ = !rows && floor;

  // Neighbouring groups of a random order form clusters that are paired as a whole.
  const int64_t group_bytes = 4 * table_.stride * (table_.block + 1);
  const int64_t cluster =
      std::max<int64_t>(1, std::min(kClusterBytes / (2 * group_bytes), table_.groups / 16));
  const int64_t clusters = (table_.groups + cluster - 1) / cluster;
  const int64_t turns = clusters < 2 ? 0 : clusters - 1 + clusters % 2;

  // NOTE: nothing here may depend on the number of threads.
  const double lines = static_cast<double>(table_.lines);
  const double length = static_cast<double>(table_.length);
  const double elements = static_cast<double>(problem_.rows * problem_.row_elements());
  const double round_cost =
      lines * static_cast<double>(table_.block * cluster) * length / 2 * kSwapCost;
  const double exact_cost =
      static_cast<double>(problem_.blocks()) * kBlockCost + lines * length * 0.3;
  const int64_t rounds = clamp_to_int(8 * exact_cost / round_cost, 4, 512);
  const bool long_round = round_cost > kLongRound;
  const double segment_cost = static_cast<double>(rounds) * round_cost;
  const int64_t segments =
      alone ? 1 : clamp_to_int(3 * elements * kBuildCost / segment_cost, 1, 64);

  std::vector<int32_t> groups(static_cast<size_t>(table_.groups));
  int64_t turn = turns;
  for (int64_t segment = 0; segment < segments; ++segment) {
    settle_accounts();
    double& scale = scale_[rows];
    if (scale < 0 && sweep_ > 0) scale = swap_scale(Random(options_.seed, 0x7363616c65));
    temperature_ = heat > 0 ? static_cast<float>(heat * scale) : 0.0f;
    for (int64_t r = 0; r < rounds; ++r, ++turn) {
      if (time_is_up()) return;
      control_.poll(progress());
      Random random(options_.seed, Random::mix(static_cast<uint64_t>(sweep_) * 2 + rows) ^
                                       static_cast<uint64_t>(segment * rounds + r));
      if (turn >= turns) {
        std::iota(groups.begin(), groups.end(), 0);
        shuffle(groups, random);
        turn = 0;
      }
      // Round-robin tournament: cluster 0 stays, the others rotate; an odd one sits out.
      const int64_t players = turns + 1;
      const auto player = [&](int64_t seat) {
        return seat == 0 ? 0 : 1 + (seat - 1 + turn) % turns;
      };
      const uint64_t stream = random.next();
      if (floor_cols_) find_best_blocks();
      pool_.run(players / 2, [&](int64_t match, int worker) {
        const int64_t a = player(match), b = player(players - 1 - match);
        if (a >= clusters || b >= clusters) return;
        if (long_round) {
          if (time_is_up()) return;
          control_.poll(progress());
        }
        uint64_t visits = 0;
        for (int64_t i = a * cluster; i < std::min(table_.groups, (a + 1) * cluster); ++i) {
          for (int64_t j = b * cluster; j < std::min(table_.groups, (b + 1) * cluster); ++j) {
            const uint64_t id = (static_cast<uint64_t>(match) << 32) + visits++;
            visit(groups[i], groups[j], Random(stream, id), scratch_[worker]);
          }
        }
      });
    }
  }
}

// Sums groups exactly, notes the order if it is the best so far, and sets the price.
void ThresholdSearch::settle_accounts() {
  // One array for both layouts of the sums, to add them up twice: of narrow blocks, it is a large
  // part of the matrix.
  sums_.reserve(static_cast<size_t>(table_.groups * table_.stride));
  table_.block_sums(problem_, *perm_, sums_, pool_);
  const double mass = kept_mass(problem_, sums_);
  if (mass > best_mass_) {
    best_mass_ = mass;
    best_ = order_;
  }
  prices_ = block_row_prices(problem_, sums_);
  if (exact_rows_) counts_ = balanced_counts(problem_, sums_);
  if (floor_cols_) find_poor_rows();
  table_.group_sums(*perm_, sums_, pool_);
  for (int64_t g = 0; g < table_.groups; ++g) {
    float* sum = sums_.data() + g * table_.stride;
    for (int64_t l = 0; l < table_.length; ++l) {
      sum[l] -= prices_[table_.block_row(problem_, g, l)];
    }
  }
}

// Floor, columns: which block rows to watch until the next exact sums.
void ThresholdSearch::find_poor_rows() {
  const int64_t width = problem_.blocks_per_row();
  poor_.clear();
  for (int64_t r = 0; r < problem_.row_groups(); ++r) {
    const float* line = sums_.data() + r * width;
    int64_t above = 0;
    for (int64_t b = 0; b < width; ++b) above += line[b] > prices_[r];
    if (above < kRichRow) {
      poor_.emplace_back();
      poor_.back().row = r;
    }
  }
}

// Floor, columns: what holds up the poor rows. Once a round, so that visits of one round agree on
// it, whichever comes first.
void ThresholdSearch::find_best_blocks() {
  constexpr int64_t kRowsPerTask = 64;
  constexpr float kLowest = std::numeric_limits<float>::lowest();
  const int64_t count = static_cast<int64_t>(poor_.size()), rows = problem_.row_groups();
  pool_.run((count + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
    BestBlocks* const begin = poor_.data() + task * kRowsPerTask;
    BestBlocks* const end = poor_.data() + std::min(count, (task + 1) * kRowsPerTask);
    for (BestBlocks* best = begin; best < end; ++best) {
      std::fill_n(best->sum, 3, kLowest);
      std::fill_n(best->at, 3, int64_t{-1});
    }
    for (int64_t g = 0; g < table_.groups; ++g) {
      for (int64_t first = 0; first < table_.length; first += rows) {
        for (BestBlocks* best = begin; best < end; ++best) {
          const int64_t at = g * table_.stride + first + best->row;
          const float sum = sums_[at];
          if (!(sum > best->sum[2])) continue;
          int k = 2;
          for (; k > 0 && sum > best->sum[k - 1]; --k) {
            best->sum[k] = best->sum[k - 1];
            best->at[k] = best->at[k - 1];
          }
          best->sum[k] = sum;
          best->at[k] = at;
        }
      }
    }
  });
}

// What the milder tenth of random swaps changes, to measure temperatures by. The mean, even the
// median, would be ruled by pairs of very unequal lines, which are out of the question anyway.
double ThresholdSearch::swap_scale(Random random) {
  constexpr int kSamples = 511;
  std::vector<double> sizes;
  for (int i = 0; i < kSamples; ++i) {
    const int64_t p = random.below(static_cast<uint32_t>(table_.lines));
    const int64_t q = random.below(static_cast<uint32_t>(table_.lines));
    const int64_t g = p / table_.block, h = q / table_.block;
    if (g == h) continue;
    const float* a = table_.line((*perm_)[p]);
    const float* b = table_.line((*perm_)[q]);
    const float* sum_g = sums_.data() + g * table_.stride;
    const float* sum_h = sums_.data() + h * table_.stride;
    double gain = 0;
    for (int64_t l = 0; l < table_.length; ++l) {
      const float change = std::fabs(b[l]) - std::fabs(a[l]);
      gain += std::max(sum_g[l] + change, 0.0f) + std::max(sum_h[l] - change, 0.0f) -
              std::max(sum_g[l], 0.0f) - std::max(sum_h[l], 0.0f);
    }
    if (gain != 0) sizes.push_back(std::fabs(gain));
  }
  if (sizes.empty()) return 0;
  const size_t tenth = sizes.size() / 10;
  std::nth_element(sizes.begin(), sizes.begin() + static_cast<std::ptrdiff_t>(tenth), sizes.end());
  return sizes[tenth];
}

void ThresholdSearch::visit(int64_t g, int64_t h, Random random, Scratch& s) {
  const int64_t stride = table_.stride, length = table_.length;
  int32_t* lines_g = perm_->data() + g * table_.block;
  int32_t* lines_h = perm_->data() + h * table_.block;
  const int64_t count_g = std::min(table_.block, table_.lines - g * table_.block);
  const int64_t count_h = std::min(table_.block, table_.lines - h * table_.block);
  const int64_t width = pad_lanes(count_h);
  float* sum_g = sums_.data() + g * stride;
  float* sum_h = sums_.data() + h * stride;
  s.resize(stride, width);
  float* diff = s.diff.data();

  for (int64_t l = 0; l < stride; ++l) {
    s.mean[l] = 0.5f * (sum_g[l] + sum_h[l]);
    diff[l] = 0.5f * (sum_g[l] - sum_h[l]);
    s.floor[l] = std::fabs(s.mean[l]);
  }
  if (floor_cols_) {
    for (const BestBlocks& best : poor_) {
      for (int64_t l = best.row; l < length; l += problem_.row_groups()) {
        const int64_t at_g = g * stride + l, at_h = h * stride + l;
        int k = 0;
        while (k < 2 && (best.at[k] == at_g || best.at[k] == at_h)) ++k;
        s.floor[l] = std::max(s.mean[l], std::min(best.sum[k], 0.0f) - s.mean[l]);
      }
    }
  }
  // Measured: candidates along the lanes win for tall blocks, unless lines are long.
  const bool across = count_h >= 12 && (length <= 256 || count_h > 16);
  if (across) {
    if (static_cast<int64_t>(s.tile.size()) < length * width) {
      s.tile.resize(static_cast<size_t>(length * width));
    }
    float* tile = s.tile.data();  // columns from count_h on hold anything: nobody looks there
    int64_t j = 0;
    for (; j + 4 <= count_h; j += 4) {
      const float* line[4];
      for (int64_t u = 0; u < 4; ++u) line[u] = table_.line(lines_h[j + u]);
      for (int64_t l = 0; l < length; ++l) {
        for (int64_t u = 0; u < 4; ++u) tile[l * width + j + u] = std::fabs(line[u][l]);
      }
    }
    for (; j < count_h; ++j) {
      const float* line = table_.line(lines_h[j]);
      for (int64_t l = 0; l < length; ++l) tile[l * width + j] = std::fabs(line[l]);
    }
  }

  float value = pair_value(diff, s.floor.data(), stride);
  double shortfall = floor_rows_ ? shortfall_after(s, nullptr, nullptr) : 0;
  double exact = exact_rows_ ? exact_mass_after(g, h, s, nullptr, nullptr) : 0;
  bool changed = false;
  for (int64_t i = 0; i < count_g; ++i) {
    const float* out = table_.line(lines_g[i]);
    float* values = s.values.data();
    if (across) {
      swap_values_across(diff, s.floor.data(), out, s.tile.data(), width, length, s.base.data(),
                         values);
    } else {
      swap_values_along(diff, s.floor.data(), out, table_.values, lines_h, count_h, stride,
                        s.base.data(), values);
    }
    // A group below the price is worth its best block all the same: as long as one of the two is,
    // every candidate needs a look at its maxima. Otherwise only the winner does.
    const bool each = shortfall < 0;
    if (each && across) {
      float* best_g = s.best_g.data();
      float* best_h = s.best_h.data();
      best_pairs_across(s.mean.data(), s.base.data(), s.tile.data(), width, length, best_g, best_h);
      for (int64_t j = 0; j < count_h; ++j) {
        values[j] += std::min(best_g[j], 0.0f) + std::min(best_h[j], 0.0f);
      }
    } else if (each) {
      for (int64_t j = 0; j < count_h; ++j) {
        values[j] += static_cast<float>(shortfall_after(s, out, table_.line(lines_h[j])));
      }
    }
    // Staying must be beaten by more than the rounding of the sums.
    float to_beat = value + static_cast<float>(shortfall);
    const float rounding = 1e-6f * std::fabs(to_beat);
    const float* noise = gumbel_.data();
    if (temperature_ > 0) {
      noise += random.below(kNoise);
      to_beat += temperature_ * noise[count_h];
    }
    to_beat += rounding;
    const Largest best =
        largest_noisy(values, noise, temperature_, count_h, to_beat, s.noisy.data());
    const int64_t j = best.index;
    if (j < 0) continue;

    const float* in = table_.line(lines_h[j]);
    double shortfall_then = 0, exact_then = 0;
    if (floor_rows_) {
      shortfall_then = shortfall_after(s, out, in);
      if (!each && !(best.value + shortfall_then > to_beat)) continue;
    }
    if (exact_rows_) {
      exact_then = exact_mass_after(g, h, s, out, in);
      const double loss = temperature_ > 0 ? -temperature_ * std::log(random.uniform()) : 0;
      if (!(exact_then + loss > exact + rounding)) continue;
    }
    for (int64_t l = 0; l < stride; ++l) diff[l] += std::fabs(in[l]) - std::fabs(out[l]);
    if (across) {
      for (int64_t l = 0; l < length; ++l) s.tile[l * width + j] = std::fabs(out[l]);
    }
    std::swap(lines_g[i], lines_h[j]);
    value = values[j] - (each ? static_cast<float>(shortfall_then) : 0.0f);
    shortfall = shortfall_then;
    changed = true;
    if (exact_rows_) {
      exact = exact_then;
      reprice(g, h, s);
      value = pair_value(diff, s.floor.data(), stride);
    }
  }
  if (!changed) return;
  accepted_.fetch_add(1, std::memory_order_relaxed);
  for (int64_t l = 0; l < stride; ++l) {
    sum_g[l] = s.mean[l] + diff[l];
    sum_h[l] = s.mean[l] - diff[l];
  }
}

// How far the best blocks of both groups lie below the price, once `in` has replaced `out` in the
// first and `out` has replaced `in` in the second.
double ThresholdSearch::shortfall_after(const Scratch& s, const float* out, const float* in) const {
  const BestPair best = best_pair(s.mean.data(), s.diff.data(), out, in, table_.length);
  return std::min(best.g, 0.0f) + std::min(best.h, 0.0f);
}

// Balanced mode: the mass that two block rows keep after the swap, and the prices that go with it.
double ThresholdSearch::exact_mass_after(int64_t g, int64_t h, Scratch& s, const float* out,
                                         const float* in) {
  const int64_t length = table_.length;
  double mass = 0;
  for (const int64_t group : {g, h}) {
    const float sign = group == g ? 1.0f : -1.0f;
    for (int64_t l = 0; l < length; ++l) {
      const float change = out ? std::fabs(in[l]) - std::fabs(out[l]) : 0.0f;
      const float diff = s.diff[l] + change;
      s.sorted[l] = s.mean[l] + sign * diff;
    }
    const float price = separating_price(s.sorted.data(), length, counts_[group]);
    s.price_shift[group == h] = price;
    // separating_price leaves the largest counts_[group] values in front.
    for (int64_t l = 0; l < counts_[group]; ++l) mass += s.sorted[l];
    mass += static_cast<double>(prices_[group]) * static_cast<double>(counts_[group]);
  }
  return mass;
}

// Balanced mode: moves both groups' sums to the prices found by exact_mass_after.
void ThresholdSearch::reprice(int64_t g, int64_t h, Scratch& s) {
  const float shift_g = s.price_shift[0], shift_h = s.price_shift[1];
  prices_[g] += shift_g;
  prices_[h] += shift_h;
  for (int64_t l = 0; l < table_.length; ++l) {
    s.mean[l] -= 0.5f * (shift_g + shift_h);
    s.diff[l] -= 0.5f * (shift_g - shift_h);
    s.floor[l] = std::fabs(s.mean[l]);
  }
}

}  // namespace tetris::reorder
