// The simplest reordering: heavy rows and heavy columns first.
#pragma once

#include "reorder/parallel.h"
#include "reorder/problem.h"

namespace tetris::reorder {

// Rows and columns by descending L1 norm; ties keep their original order. An axis that is held, or
// whose order is irrelevant (blocks one line high or wide), keeps that of identity_order.
Order l1_sorted_order(const Problem& problem, Pool& pool);

}  // namespace tetris::reorder
