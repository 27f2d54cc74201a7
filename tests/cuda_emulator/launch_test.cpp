// Grids, limits, built-in variables, fibers.
#include <numeric>

#include "cuda_emulator/fiber.h"
#include "self_test.h"

namespace tetris::cuda::test {
namespace {

TEST(Fibers, TakeTurns) {
  struct State {
    std::vector<int> seen;
    emulator::Fiber a, b;
  } state;
  const auto entry = [](void* argument) {
    auto& s = *static_cast<State*>(argument);
    for (int i = 0; i < 3; ++i) {
      s.seen.push_back(i);
      emulator::Fiber::pause();
    }
  };
  state.a.start(entry, &state);
  state.b.start(entry, &state);
  while (!state.a.finished()) {
    state.a.resume();
    if (!state.b.finished()) state.b.resume();
  }
  EXPECT_EQ(state.seen, (std::vector<int>{0, 0, 1, 1, 2, 2}));
}

TEST(Fibers, AnAbandonedStackIsUsedAgain) {
  emulator::Fiber fiber;
  const auto entry = [](void* count) {
    volatile char frame[1000];
    for (auto& c : frame) c = 1;
    emulator::Fiber::pause();
    ++*static_cast<int*>(count);
  };
  int count = 0;
  for (int i = 0; i < 3; ++i) {
    fiber.start(entry, &count);
    fiber.resume();
  }
  EXPECT_EQ(count, 0);
  fiber.resume();
  EXPECT_EQ(count, 1);
  EXPECT_TRUE(fiber.finished());
}

__global__ void number_threads(int* cta_of, int* order, int* next) {
  const int cta = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int number = cta * blockDim.x + threadIdx.x;
  cta_of[number] += cta + 1;
  order[(*next)++] = number;
}

std::vector<int> order_of(uint64_t seed) {
  const With seeded = with_seed(seed);
  const int n = 2 * 3 * 4 * 48;
  std::vector<int> cta_of(n), order(n);
  int next = 0;
  EXPECT_EQ("",
            launch(&number_threads, {2, 3, 4, 48}, nullptr, cta_of.data(), order.data(), &next));
  EXPECT_EQ(next, n);
  for (int i = 0; i < n; ++i) EXPECT_EQ(cta_of[i], i / 48 + 1);
  return order;
}

TEST(Launch, EveryThreadOnceInAnOrderOfTheSeed) {
  const std::vector<int> first = order_of(1);
  EXPECT_EQ(first, order_of(1));
  EXPECT_NE(first, order_of(2));
  std::vector<int> sorted = first, all(first.size());
  std::sort(sorted.begin(), sorted.end());
  std::iota(all.begin(), all.end(), 0);
  EXPECT_EQ(sorted, all);
}

__global__ void nothing() {}
struct Large {
  char bytes[4097];
};
__global__ void takes(Large) {}

TEST(Launch, RefusesWhatCudaRefuses) {
  EXPECT_EQ("", launch(&nothing, {1, 1, 1, 1024, 227 * 1024}, nullptr));
  EXPECT_MENTIONS(launch(&nothing, {1, 1, 1, 1025}, nullptr), "1024] (got 1025)");
  EXPECT_MENTIONS(launch(&nothing, {1, 1, 1, 0}, nullptr), "[1, 1024] (got 0)");
  EXPECT_MENTIONS(launch(&nothing, {1, 1, 1, 32, 227 * 1024 + 1}, nullptr), "(got 232449)");
  EXPECT_MENTIONS(launch(&nothing, {0, 1, 1, 32}, nullptr), "(got 0 x 1 x 1)");
  EXPECT_MENTIONS(launch(&nothing, {1, 65536, 1, 32}, nullptr), "(got 1 x 65536 x 1)");
  EXPECT_MENTIONS(launch(&takes, {1, 1, 1, 32}, nullptr, Large{}), "(got 4097)");
}

__global__ void fails() {
  if (blockIdx.x == 1 && threadIdx.x == 70) ptx::shared_address(nullptr);
}

TEST(Launch, AViolationSaysWhatAndWhere) {
  const std::string text = launch(&fails, {3, 1, 1, 128, 64}, nullptr);
  EXPECT_MENTIONS(text, "CTA (1, 0, 0), thread 70, seed 1: shared_address (launch_test.cpp:");
  EXPECT_MENTIONS(text, "not 0 bytes of shared memory");
  EXPECT_EQ("", launch(&nothing, {3, 1, 1, 128, 64}, nullptr)) << "the next launch is fresh";
}

TEST(Launch, DeviceFunctionsBelongInKernels) { EXPECT_THROW(__syncthreads(), std::logic_error); }

}  // namespace
}  // namespace tetris::cuda::test
