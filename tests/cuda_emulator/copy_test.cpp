// cp.async: when it lands, what it reads and writes, what it must not.
#include "cuda_emulator/cta.h"
#include "self_test.h"

namespace tetris::cuda::test {
namespace {

using emulator::Landing;

// Issues three groups of one copy each, waits for all but `pending`, and looks.
template <int pending>
__global__ void three_groups(const int* source, int* seen) {
  auto* shared = reinterpret_cast<int*>(dynamic_shared());
  for (int i = 0; i < 3; ++i) {
    ptx::cp_async_16(shared + 4 * i, source + 4 * i);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<pending>();
  for (int i = 0; i < 12; ++i) seen[i] = shared[i];
}

TEST(Copies, LandWhenTheirGroupIsWaitedFor) {
  alignas(16) static const int source[12] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  const With latest = with_landing(Landing::kLatest);
  std::vector<int> seen(12);
  ASSERT_EQ("", launch(&three_groups<3>, {1, 1, 1, 1, 48}, nullptr, source, seen.data()));
  EXPECT_EQ(seen, std::vector<int>(12, -1));
  ASSERT_EQ("", launch(&three_groups<1>, {1, 1, 1, 1, 48}, nullptr, source, seen.data()));
  EXPECT_EQ(seen, (std::vector<int>{1, 2, 3, 4, 5, 6, 7, 8, -1, -1, -1, -1}));
  ASSERT_EQ("", launch(&three_groups<0>, {1, 1, 1, 1, 48}, nullptr, source, seen.data()));
  EXPECT_EQ(seen, std::vector<int>(source, source + 12));
  const With at_once = with_landing(Landing::kAtOnce);
  ASSERT_EQ("", launch(&three_groups<3>, {1, 1, 1, 1, 48}, nullptr, source, seen.data()));
  EXPECT_EQ(seen, std::vector<int>(source, source + 12));
}

TEST(Copies, LandAtRandomTimes) {
  alignas(16) static const int source[12] = {};
  int late = 0;
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    const With seeded = with_seed(seed);
    std::vector<int> seen(12);
    ASSERT_EQ("", launch(&three_groups<3>, {1, 1, 1, 1, 48}, nullptr, source, seen.data()));
    for (int i = 0; i < 3; ++i) late += seen[4 * i] == -1;
  }
  EXPECT_NEAR(late, 150, 40);
}

// The source is read late, too.
__global__ void change_the_source(int* source, int* seen) {
  ptx::cp_async_4(dynamic_shared(), source);
  ptx::cp_async_commit();
  *source = 2;
  ptx::cp_async_wait<0>();
  *seen = *reinterpret_cast<int*>(dynamic_shared());
}
TEST(Copies, ReadTheirSourceWhenTheyLand) {
  int source = 1, seen = 0;
  const With latest = with_landing(Landing::kLatest);
  ASSERT_EQ("", launch(&change_the_source, {1, 1, 1, 1, 4}, nullptr, &source, &seen));
  EXPECT_EQ(seen, 2);
}

template <int size>
__global__ void partly(const unsigned char* source, unsigned char* seen, int bytes) {
  if (size == 16) ptx::cp_async_16(dynamic_shared(), source, bytes);
  if (size == 8) ptx::cp_async_8(dynamic_shared(), source, bytes);
  if (size == 4) ptx::cp_async_4(dynamic_shared(), source, bytes);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < size; ++i) seen[i] = dynamic_shared()[i];
}

TEST(Copies, FillWithZeros) {
  std::vector<unsigned char> source(16), seen(16);
  for (int i = 0; i < 16; ++i) source[i] = static_cast<unsigned char>(i + 1);
  for (Landing landing : {Landing::kAtOnce, Landing::kLatest}) {
    const With with = with_landing(landing);
    for (int bytes : {0, 1, 4, 6, 16}) {
      ASSERT_EQ("",
                launch(&partly<16>, {1, 1, 1, 1, 16}, nullptr, source.data(), seen.data(), bytes));
      for (int i = 0; i < 16; ++i) EXPECT_EQ(seen[i], i < bytes ? i + 1 : 0);
    }
    ASSERT_EQ("", launch(&partly<8>, {1, 1, 1, 1, 8}, nullptr, source.data(), seen.data(), 3));
    for (int i = 0; i < 8; ++i) EXPECT_EQ(seen[i], i < 3 ? i + 1 : 0);
    ASSERT_EQ("", launch(&partly<4>, {1, 1, 1, 1, 4}, nullptr, source.data(), seen.data(), 4));
    for (int i = 0; i < 4; ++i) EXPECT_EQ(seen[i], i + 1);
    ASSERT_EQ("", launch(&partly<16>, {1, 1, 1, 1, 16}, nullptr, nullptr, seen.data(), 0));
  }
  EXPECT_MENTIONS(launch(&partly<8>, {1, 1, 1, 1, 8}, nullptr, source.data(), seen.data(), 9),
                  "0 to 8 bytes (got 9)");
}

__global__ void copy(int shared_at, const char* source) {
  ptx::cp_async_16(dynamic_shared() + shared_at, source);
}
__global__ void copy_from_shared() { ptx::cp_async_16(dynamic_shared(), dynamic_shared() + 16); }
__global__ void copy_from_a_stack() {
  alignas(16) int here[4] = {};
  ptx::cp_async_16(dynamic_shared(), here);
}

TEST(Copies, AreChecked) {
  alignas(16) static const char source[40] = {};
  EXPECT_EQ("", launch(&copy, {1, 1, 1, 1, 32}, nullptr, 16, source));
  EXPECT_MENTIONS(launch(&copy, {1, 1, 1, 1, 32}, nullptr, 8, source), "is not a multiple of 16");
  EXPECT_MENTIONS(launch(&copy, {1, 1, 1, 1, 24}, nullptr, 16, source),
                  "not 16 bytes of shared memory (its offset is 16 of 24)");
  EXPECT_MENTIONS(launch(&copy, {1, 1, 1, 1, 32}, nullptr, 16, source + 8),
                  "cp_async_16 (copy_test.cpp:");
  EXPECT_MENTIONS(launch(&copy, {1, 1, 1, 1, 32}, nullptr, 16, source + 8),
                  "the source is not aligned to 16 bytes");
  EXPECT_MENTIONS(launch(&copy_from_shared, {1, 1, 1, 1, 32}, nullptr), "not in global memory");
  EXPECT_MENTIONS(launch(&copy_from_a_stack, {1, 1, 1, 1, 32}, nullptr), "not in global memory");
  if (emulator::kAsan) {
    EXPECT_MENTIONS(launch(&copy, {1, 1, 1, 1, 32}, nullptr, 16, source + 32),
                    "16 bytes are not all in an allocation");
  }
}

}  // namespace
}  // namespace tetris::cuda::test
