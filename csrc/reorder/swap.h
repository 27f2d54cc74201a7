// The alternation of TETRIS (Ji et al., NeurIPS 2018), in a grouped form.
//
//     E: remove the lightest blocks; f = removed mass
//     M: blocks frozen, permute rows, then columns:
//          T[i, g] = removed mass if line i were in group g
//          gain of swapping i of g with j of h = T[i,g] - T[i,h] + T[j,h] - T[j,g]
//
// The paper's table is n x n over slots; lines of a group are interchangeable, so n x groups does.
// The gain separates into a part of i and a part of j: the best of each group against each other
// group are kept in a groups x groups table, and a swap refreshes two of its rows.
#pragma once

#include <vector>

#include "reorder/control.h"
#include "reorder/parallel.h"
#include "reorder/problem.h"

namespace tetris::reorder {

struct Alternation {
  Order order;
  std::vector<double> trace;  // removed mass after each E step and each M step
  int64_t rounds = 0;
};

// M step by swap descent, or by exact balanced assignment (assignment.h).
enum class MStep { kSwap, kAssign };

Alternation alternate(const Problem& problem, Order start, MStep step, int64_t max_rounds,
                      Control& control, Pool& pool);

}  // namespace tetris::reorder
