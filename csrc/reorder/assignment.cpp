#include "reorder/assignment.h"

#include <algorithm>
#include <limits>

namespace tetris::reorder {

// Each line in turn finds the cheapest chain "move to group g, whose line i moves on to group g',
// ..." that ends in a group with room: Dijkstra over groups with reduced costs
// cost[i][g] - line_price[i] - group_price[g] >= 0, zero for lines in their group.
std::vector<int32_t> assign_to_groups(const std::vector<double>& cost, int64_t n, int64_t groups,
                                      const std::vector<int64_t>& capacity,
                                      const std::function<void()>& poll) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  std::vector<int32_t> group_of(static_cast<size_t>(n), -1);
  std::vector<double> line_price(static_cast<size_t>(n)), group_price(static_cast<size_t>(groups));
  std::vector<std::vector<int32_t>> members(static_cast<size_t>(groups));
  std::vector<double> distance(static_cast<size_t>(groups));
  std::vector<int32_t> via(static_cast<size_t>(groups));  // the line that would move in
  std::vector<uint8_t> done(static_cast<size_t>(groups));

  for (int64_t line = 0; line < n; ++line) {
    if (poll) poll();
    const auto relax = [&](int64_t i, double so_far) {
      const double* c = cost.data() + i * groups;
      for (int64_t g = 0; g < groups; ++g) {
        const double d = so_far + (c[g] - line_price[i] - group_price[g]);
        if (!done[g] && d < distance[g]) {
          distance[g] = d;
          via[g] = static_cast<int32_t>(i);
        }
      }
    };
    std::fill(distance.begin(), distance.end(), kInfinity);
    std::fill(done.begin(), done.end(), uint8_t{0});
    relax(line, 0);
    std::vector<int64_t> settled;
    int64_t end = -1;
    while (true) {
      int64_t nearest = -1;
      for (int64_t g = 0; g < groups; ++g) {
        if (!done[g] && (nearest < 0 || distance[g] < distance[nearest])) nearest = g;
      }
      if (static_cast<int64_t>(members[nearest].size()) < capacity[nearest]) {
        end = nearest;
        break;
      }
      done[nearest] = 1;
      settled.push_back(nearest);
      for (int32_t i : members[nearest]) relax(i, distance[nearest]);
    }
    // Keep reduced costs non-negative, and zero along the chain.
    const double reach = distance[end];
    line_price[line] += reach;
    for (int64_t g : settled) {
      group_price[g] -= reach - distance[g];
      for (int32_t i : members[g]) line_price[i] += reach - distance[g];
    }
    for (int64_t g = end; g >= 0;) {
      const int32_t mover = via[g];
      const int32_t from = group_of[mover];
      if (from >= 0) {
        auto& list = members[from];
        for (int32_t& i : list) {
          if (i == mover) {
            i = list.back();
            list.pop_back();
            break;
          }
        }
      }
      members[g].push_back(mover);
      group_of[mover] = static_cast<int32_t>(g);
      g = from;
    }
  }
  return group_of;
}

}  // namespace tetris::reorder
