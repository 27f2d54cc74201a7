// What other units than the threads do for them, later: copies, matrix products of warp groups.
//
// A posted action runs at some time that the seed chooses, at the latest when someone calls
// finish() for it or nothing else can run. Actions of one queue run in order, those of different
// queues in any.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <utility>

#include "cuda_emulator/options.h"

namespace tetris::cuda::emulator {

class Actions {
 public:
  struct Ticket {
    uint64_t queue = 0, number = 0;
  };

  uint64_t new_queue() { return next_queue_++; }

  Ticket post(uint64_t queue, std::function<void()> act) {
    queues_[queue].push_back({++posted_, std::move(act)});
    return {queue, posted_};
  }
  // In a queue of its own, so that nothing orders it.
  Ticket post(std::function<void()> act) { return post(new_queue(), std::move(act)); }

  bool done(Ticket ticket) const {
    const auto q = queues_.find(ticket.queue);
    return q == queues_.end() || q->second.front().number > ticket.number;
  }
  // Runs everything of its queue up to this action.
  void finish(Ticket ticket) {
    while (!done(ticket)) run_first(queues_.find(ticket.queue));
  }
  // Runs the first action of some queue; false where there is none.
  bool run_some(Random& random) {
    if (queues_.empty()) return false;
    run_first(std::next(queues_.begin(), random.below(static_cast<uint32_t>(queues_.size()))));
    return true;
  }
  bool empty() const { return queues_.empty(); }
  void clear() { queues_.clear(); }

 private:
  struct Action {
    uint64_t number;
    std::function<void()> act;
  };
  using Queues = std::map<uint64_t, std::deque<Action>>;  // none of them empty

  void run_first(Queues::iterator q) {
    const std::function<void()> act = std::move(q->second.front().act);
    q->second.pop_front();
    if (q->second.empty()) queues_.erase(q);
    act();  // which may post another
  }

  Queues queues_;
  uint64_t next_queue_ = uint64_t{1} << 32;  // below: numbers that the caller chooses
  uint64_t posted_ = 0;
};

}  // namespace tetris::cuda::emulator
