// Barriers, waiting, and what is reported when nobody can go on.
#include <set>

#include "cuda_emulator/cta.h"
#include "self_test.h"

namespace tetris::cuda::test {
namespace {

using emulator::this_cta;
using emulator::this_thread;

// Turns around what each CTA holds.
__global__ void reverse(int* data, bool barrier) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  const int n = blockDim.x, t = threadIdx.x;
  int* const mine = data + blockIdx.x * n;
  shared[t] = mine[t];
  if (barrier) __syncthreads();
  mine[t] = shared[n - 1 - t];
}

bool reverses(bool barrier, int threads) {
  std::vector<int> data(2 * threads);
  for (int i = 0; i < 2 * threads; ++i) data[i] = i;
  EXPECT_EQ(
      "", launch(&reverse, {2, 1, 1, threads, size_t(threads) * 4}, nullptr, data.data(), barrier));
  for (int i = 0; i < 2 * threads; ++i)
    if (data[i] != i / threads * threads + threads - 1 - i % threads) return false;
  return true;
}

TEST(Barriers, AMissingOneShows) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const With seeded = with_seed(seed);
    for (int threads : {32, 48, 256, 1024}) {
      EXPECT_TRUE(reverses(true, threads));
      EXPECT_FALSE(reverses(false, threads));
    }
  }
}

__global__ void split_barrier() {
  if (threadIdx.x < 64)
    __syncthreads();
  else
    __syncthreads();
}
TEST(Barriers, FromTwoPlacesAreAViolation) {
  EXPECT_MENTIONS(launch(&split_barrier, {1, 1, 1, 128}, nullptr),
                  "other threads have come to this barrier from __syncthreads (barrier_test.cpp:");
}

__global__ void one_lane_stays_away() {
  if (threadIdx.x != 3) __syncthreads();
  __syncwarp();
}
TEST(Barriers, ADivergentOneIsReported) {
  const std::string text = launch(&one_lane_stays_away, {1, 1, 1, 64}, nullptr);
  EXPECT_MENTIONS(text, "deadlock: threads 0-2, 4-63 at __syncthreads (barrier_test.cpp:");
  EXPECT_MENTIONS(text, "; thread 3 at __syncwarp (barrier_test.cpp:");
}

__global__ void some_end_first(int* count) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  ++*count;
}
TEST(Barriers, ThreadsThatEndedAreNotWaitedFor) {  // as CUDA has it since sm_70
  int count = 0;
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    const With seeded = with_seed(seed);
    EXPECT_EQ("", launch(&some_end_first, {1, 1, 1, 128}, nullptr, &count));
  }
  EXPECT_EQ(count, 400);
}

// Two halves of a CTA hand a number back and forth: named barriers 1 and 2.
__global__ void ping_pong(int* value, int rounds, bool wait) {
  using emulator::Site;
  const auto barrier = [](int number) -> emulator::Barrier& {
    return this_cta().barrier(number, "bar", Site::here());
  };
  const bool first = threadIdx.x < 64;
  for (int i = 0; i < rounds; ++i) {
    if (first) {
      if (threadIdx.x == 0) *value = 2 * i;
      barrier(1).arrive(128, "bar.arrive", Site::here());
      if (wait) barrier(2).sync(128, false, "bar.sync", Site::here());
    } else {
      barrier(1).sync(128, false, "bar.sync", Site::here());
      if (threadIdx.x == 64 && *value == 2 * i) *value = 2 * i + 1;
      if (wait) barrier(2).arrive(128, "bar.arrive", Site::here());
    }
  }
}
TEST(Barriers, NamedOnesJoinSomeWarps) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    const With seeded = with_seed(seed);
    int value = -1;
    EXPECT_EQ("", launch(&ping_pong, {1, 1, 1, 128}, nullptr, &value, 5, true));
    EXPECT_EQ(value, 9);
  }
}

__global__ void named(int number, int threads) {
  this_cta()
      .barrier(number, "bar.sync", emulator::Site::here())
      .sync(threads, false, "bar.sync", emulator::Site::here());
}
TEST(Barriers, NamedOnesAreChecked) {
  EXPECT_EQ("", launch(&named, {1, 1, 1, 64}, nullptr, 15, 64));
  EXPECT_MENTIONS(launch(&named, {1, 1, 1, 64}, nullptr, 16, 64), "barriers 0 to 15 (got 16)");
  EXPECT_MENTIONS(launch(&named, {1, 1, 1, 64}, nullptr, 1, 40), "multiple of 32 (got 40)");
  EXPECT_MENTIONS(launch(&named, {1, 1, 1, 64}, nullptr, 1, 96),
                  "deadlock: threads 0-63 at bar.sync");
}

__global__ void turns(int* next, std::vector<int>* seen, int last) {
  const int t = threadIdx.x;
  this_cta().wait_until([=] { return *next == t; }, "a turn", emulator::Site::here());
  seen->push_back(t);
  *next = t == last ? -1 : t + 1;
}
TEST(Waiting, UntilAConditionHolds) {
  int next = 0;
  std::vector<int> seen;
  EXPECT_EQ("", launch(&turns, {1, 1, 1, 70}, nullptr, &next, &seen, 100));
  for (int i = 0; i < 70; ++i) EXPECT_EQ(seen[i], i);
  next = 0;
  EXPECT_MENTIONS(launch(&turns, {1, 1, 1, 70}, nullptr, &next, &seen, 32),
                  "deadlock: threads 0-32 ended; threads 33-69 at a turn (barrier_test.cpp:");
}

__global__ void poll(volatile int* flag) {
  if (threadIdx.x == 40) *flag = 1;
  while (*flag == 0) this_cta().yield();
}
TEST(Waiting, LoopsThatPollLetOthersRun) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const With seeded = with_seed(seed);
    int flag = 0;
    EXPECT_EQ("", launch(&poll, {1, 1, 1, 256}, nullptr, &flag));
  }
}

// Actions of two queues; the second thread waits for one of them.
__global__ void post(std::vector<int>* log, bool finish) {
  auto& actions = this_cta().actions;
  if (threadIdx.x == 0) {
    emulator::Actions::Ticket ticket;
    for (int i = 0; i < 4; ++i) {
      ticket = actions.post(1, [=] { log->push_back(i); });
      actions.post(2, [=] { log->push_back(10 + i); });
    }
    if (finish) {
      actions.finish(ticket);
      EXPECT_TRUE(actions.done(ticket));
      EXPECT_GE(log->size(), 4u);
    }
  } else {
    this_cta().wait_until([=] { return log->size() == 8; }, "actions", emulator::Site::here());
  }
}
TEST(Actions, RunInTheOrderOfTheirQueue) {
  std::set<std::vector<int>> orders;
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    const With seeded = with_seed(seed);
    std::vector<int> log;
    EXPECT_EQ("", launch(&post, {1, 1, 1, 2}, nullptr, &log, seed % 2 == 0));
    std::vector<int> first, second;
    for (int i : log) (i < 10 ? first : second).push_back(i);
    EXPECT_EQ(first, (std::vector<int>{0, 1, 2, 3}));
    EXPECT_EQ(second, (std::vector<int>{10, 11, 12, 13}));
    orders.insert(log);
  }
  EXPECT_GT(orders.size(), 10u) << "queues are not ordered among each other";
}

struct Counter : emulator::Extension {
  int count = 0;
  void end_of_cta() override {
    if (count != 64) throw emulator::Violation{"counted " + std::to_string(count)};
  }
};
__global__ void extend() { ++this_cta().extension<Counter>().count; }
TEST(Extensions, LiveForACta) {
  EXPECT_EQ("", launch(&extend, {3, 1, 1, 64}, nullptr));
  EXPECT_MENTIONS(launch(&extend, {3, 1, 1, 32}, nullptr), "counted 32");
}

}  // namespace
}  // namespace tetris::cuda::test
