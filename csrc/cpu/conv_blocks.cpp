#include "cpu/conv_blocks.h"

#include <algorithm>
#include <numeric>

#include "cpu/scratch.h"

namespace tetris::cpu {
namespace {

template <class T>
void set_cuts(ConvBlocks<T>& b, std::vector<const int32_t*> cuts) {
  b.cuts = std::move(cuts);
  b.begin = b.cuts.data();
  b.end = b.cuts.data() + 1;
}

}  // namespace

TapPhases phases_of(const LineGeometry& lines) {
  TapPhases phases{{}, lines.phases()};
  for (int64_t tap = 0; tap < lines.taps(); ++tap) {
    const int64_t phase = lines.phase(tap);
    phases.of_tap.push_back(phase < 0 ? phases.count : phase);
  }
  return phases;
}

TapPhases phase_for_each_tap(int64_t taps) {
  TapPhases phases{std::vector<int64_t>(taps), taps};
  std::iota(phases.of_tap.begin(), phases.of_tap.end(), 0);
  return phases;
}

template <class T>
ConvBlocks<T> conv_blocks(const BlockSparseView& w, const T* values, const TapPhases& phases,
                          bool transposed) {
  ConvBlocks<T> b{};
  b.bo = transposed ? w.bi : w.bo;
  b.bi = transposed ? w.bo : w.bi;
  b.out = transposed ? w.group_in() : w.group_out();
  b.in = transposed ? w.group_out() : w.group_in();
  b.rows = transposed ? w.in_groups() : w.group_rows();
  b.in_groups = transposed ? w.group_rows() : w.in_groups();
  b.phases = phases.count;
  const std::vector<int64_t>& phase = phases.of_tap;
  const bool as_stored = !transposed && std::is_sorted(phase.begin(), phase.end());
  if (as_stored && b.phases == 1 && phase.back() == 0) {
    b.values = values;
    b.col_idx = w.col_idx;
    set_cuts<T>(b, {w.row_ptr, w.row_ptr + 1});
    return b;
  }

  // Taps in the order of their phases, those of none last; a counting sort by (row, tap), which
  // keeps the order of the columns.
  std::vector<int64_t> taps(w.taps), rank(w.taps), phase_end(b.phases, 0);
  std::iota(taps.begin(), taps.end(), 0);
  std::stable_sort(taps.begin(), taps.end(),
                   [&](int64_t a, int64_t c) { return phase[a] < phase[c]; });
  for (int64_t r = 0; r < w.taps; ++r) {
    rank[taps[r]] = r;
    if (phase[taps[r]] < b.phases) phase_end[phase[taps[r]]] = r + 1;
  }
  for (int64_t p = 1; p < b.phases; ++p) phase_end[p] = std::max(phase_end[p], phase_end[p - 1]);

  const int64_t all_rows = w.groups * b.rows, keys = all_rows * w.taps, block = w.bo * w.bi;
  // start[key]: where blocks of that row and tap begin; then one array of cuts per phase.
  int32_t* const start = scratch<int32_t>(
      ScratchSlot::kIndex, keys + 1 + (b.phases + 1) * (all_rows + 1) + (as_stored ? 0 : w.nnzb));
  int32_t* const cut = start + keys + 1;
  std::fill_n(start, keys + 1, 0);
  const int64_t in_groups = w.in_groups(), group_rows = w.group_rows();
  const auto for_blocks = [&](auto&& fn) {
    for (int64_t row = 0; row < w.block_rows(); ++row) {
      const int64_t group = row / group_rows, r = row % group_rows;
      for (int64_t i = w.row_ptr[row]; i < w.row_ptr[row + 1]; ++i) {
        const int64_t tap = w.col_idx[i] / in_groups, g = w.col_idx[i] % in_groups;
        const int64_t new_row = group * b.rows + (transposed ? g : r);
        fn(i, new_row * w.taps + rank[tap], tap * b.in_groups + (transposed ? r : g));
      }
    }
  };
  for_blocks([&](int64_t, int64_t key, int64_t) { ++start[key + 1]; });
  for (int64_t key = 0; key < keys; ++key) start[key + 1] += start[key];
  std::vector<const int32_t*> cuts;
  for (int64_t p = 0; p <= b.phases; ++p) {
    int32_t* const at = cut + p * (all_rows + 1);
    for (int64_t row = 0; row < all_rows; ++row)
      at[row] = start[row * w.taps + (p > 0 ? phase_end[p - 1] : 0)];
    at[all_rows] = static_cast<int32_t>(w.nnzb);
    cuts.push_back(at);
  }
  set_cuts<T>(b, std::move(cuts));
  if (as_stored) {
    b.values = values;
    b.col_idx = w.col_idx;
    return b;
  }
  int32_t* const cols = cut + (b.phases + 1) * (all_rows + 1);
  T* const moved = scratch<T>(ScratchSlot::kValues, w.nnzb * block);
  for_blocks([&](int64_t i, int64_t key, int64_t col) {
    const int64_t at = start[key]++;
    cols[at] = static_cast<int32_t>(col);
    const T* const from = values + i * block;
    T* const to = moved + at * block;
    if (transposed) {
      for (int64_t k = 0; k < w.bi; ++k)
        for (int64_t r = 0; r < w.bo; ++r) to[r * w.bi + k] = from[k * w.bo + r];
    } else {
      std::copy_n(from, block, to);
    }
  });
  b.values = moved;
  b.col_idx = cols;
  return b;
}

template <class T>
ConvBlocks<T> blocks_of_tap(const ConvBlocks<T>& blocks, int64_t tap, const LineGeometry& lines) {
  ConvBlocks<T> b = blocks;
  b.phases = lines.phases();
  const int64_t phase = lines.phase(tap) < 0 ? b.phases : lines.phase(tap);
  std::vector<const int32_t*> cuts;
  for (int64_t p = 0; p <= b.phases; ++p)
    cuts.push_back(p <= phase ? blocks.begin[tap] : blocks.end[tap]);
  set_cuts<T>(b, std::move(cuts));
  return b;
}

template ConvBlocks<float> conv_blocks(const BlockSparseView&, const float*, const TapPhases&,
                                       bool);
template ConvBlocks<double> conv_blocks(const BlockSparseView&, const double*, const TapPhases&,
                                        bool);
template ConvBlocks<float> blocks_of_tap(const ConvBlocks<float>&, int64_t, const LineGeometry&);
template ConvBlocks<double> blocks_of_tap(const ConvBlocks<double>&, int64_t, const LineGeometry&);

}  // namespace tetris::cpu
