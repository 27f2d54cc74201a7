// Exact M step: put n lines into groups of fixed capacity at the least total cost.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace tetris::reorder {

// cost is [n, groups], row-major; capacities sum to n. Returns the group of each line.
// Successive shortest paths with potentials, O(n^2 * groups) at worst: meant for n up to 1024.
// `poll` is called for each line; it may throw.
std::vector<int32_t> assign_to_groups(const std::vector<double>& cost, int64_t n, int64_t groups,
                                      const std::vector<int64_t>& capacity,
                                      const std::function<void()>& poll = nullptr);

}  // namespace tetris::reorder
