// The permutation search: a ladder of methods that maximise the saliency kept by a given number of
// blocks. No rung returns less than identity or the L1 sort would keep (of axes that are not held).
#pragma once

#include <cstdint>
#include <vector>

#include "reorder/control.h"
#include "reorder/objective.h"
#include "reorder/problem.h"

namespace tetris::reorder {

enum class Method { kIdentity, kL1Sort, kSwap, kAssign, kThreshold };
enum class Start { kIdentity, kL1Sort, kBoth };

struct SearchOptions {
  Method method = Method::kThreshold;
  Start start = Start::kBoth;
  uint64_t seed = 0;
  int64_t sweeps = 0;   // threshold: sweeps per start; 0 = by time. swap, assign: rounds, 0 = 100
  double seconds = 2;   // threshold without sweeps; the result then depends on the machine's speed
  int64_t repeats = 1;  // threshold: searches from each start, which share the seconds
  int threads = 0;      // 0 = all
};

struct SearchResult {
  Order order;
  bool rows_moved = false, cols_moved = false;  // false: that axis is in identity order
  Selection selection;
  double total = 0;  // of the saliency
  double identity_mass = 0, l1_sort_mass = 0;
  double unstructured_share = 0;  // the heaviest single elements, the same share of them
  int64_t sweeps = 0;
  double seconds = 0;
  // swap, assign: removed mass after each half round of the better start, never rising
  std::vector<double> trace;
};

SearchResult search(const Problem& problem, const SearchOptions& options, Control& control);

}  // namespace tetris::reorder
