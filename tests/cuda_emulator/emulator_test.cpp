#include <gtest/gtest.h>

#include <vector>

#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace tetris::cuda {
namespace {

__global__ void reverse(int* data, int n, bool barrier) {
  int* shared = reinterpret_cast<int*>(dynamic_shared());
  const int t = threadIdx.x;
  shared[t] = data[blockIdx.x * n + t];
  if (barrier) __syncthreads();
  data[blockIdx.x * n + t] = shared[n - 1 - t];
}

TEST(Barriers, Reverse) {
  std::vector<int> data(256);
  for (int i = 0; i < 256; ++i) data[i] = i;
  ASSERT_EQ("", launch(&reverse, {2, 1, 1, 128, 512}, nullptr, data.data(), 128, true));
  for (int i = 0; i < 256; ++i) EXPECT_EQ(data[i], i < 128 ? 127 - i : 128 + 255 - i);
  EXPECT_EQ("", launch(&reverse, {2, 1, 1, 128, 512}, nullptr, data.data(), 128, false));
  int wrong = 0;
  for (int i = 0; i < 256; ++i) wrong += data[i] != i;
  EXPECT_GT(wrong, 0);
}

__global__ void diverge() {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __shfl_xor_sync(0xffffffff, 1, 1);
}
TEST(Barriers, Diverged) { EXPECT_EQ("", launch(&diverge, {2, 1, 1, 128, 512}, nullptr)); }

}  // namespace
}  // namespace tetris::cuda
