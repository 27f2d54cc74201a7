// Dynamic shared memory: alignment, poison, ends, addresses. What the sanitizers find elsewhere.
#include "cuda_emulator/shared_memory.h"

#include "self_test.h"

namespace tetris::cuda::test {
namespace {

__global__ void count_poison(int* poisoned, int bytes) {
  const unsigned char* shared = dynamic_shared();
  if (reinterpret_cast<uintptr_t>(shared) % 1024 != 0) return;
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) atomicAdd(poisoned, int(shared[i] == 0xff));
  __syncthreads();
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) dynamic_shared()[i] = 3;
}

TEST(SharedMemory, IsPoisonedForEachCta) {
  int poisoned = 0;
  EXPECT_EQ("", launch(&count_poison, {4, 1, 1, 64, 1000}, nullptr, &poisoned, 1000));
  EXPECT_EQ(poisoned, 4000);
}

__global__ void touch(int at, bool write, int* sum) {
  if (threadIdx.x != 5) return;
  volatile unsigned char* shared = dynamic_shared();
  if (write)
    shared[at] = 1;
  else
    *sum += shared[at];
}

TEST(SharedMemory, AccessesBehindTheEndAreFound) {
  int sum = 0;
  EXPECT_EQ("", launch(&touch, {1, 1, 1, 32, 1003}, nullptr, 1002, true, &sum));
  EXPECT_EQ("", launch(&touch, {1, 1, 1, 32, 1003}, nullptr, 1002, false, &sum));
  for (int at : {1003, 1004, 1500, 5000}) {
    if (emulator::kAsan) {
      for (bool write : {false, true})
        EXPECT_DEATH(launch(&touch, {2, 1, 1, 32, 1003}, nullptr, at, write, &sum),
                     "use-after-poison(.|\n)*CUDA emulator: that was CTA .*thread 5, seed 1");
    } else if (at < 2000) {
      EXPECT_MENTIONS(launch(&touch, {1, 1, 1, 32, 1003}, nullptr, at, true, &sum),
                      "behind its end (1003 bytes were launched)");
    }
  }
  EXPECT_DEATH(launch(&touch, {1, 1, 1, 32, 1003}, nullptr, -1, true, &sum), "");
}

__global__ void address(uint32_t* out, int at, int bytes, int alignment) {
  const auto& shared = emulator::shared_memory();
  const uint32_t a = shared.address(dynamic_shared() + at, "test", {}, bytes, alignment);
  if (shared.pointer(a, "test", {}, bytes, alignment) == dynamic_shared() + at) *out = a;
}

TEST(SharedMemory, Addresses) {
  uint32_t out = 0;
  EXPECT_EQ("", launch(&address, {1, 1, 1, 1, 256}, nullptr, &out, 240, 16, 16));
  EXPECT_EQ(out, 240 + emulator::SharedMemory::kBase);
  EXPECT_EQ("", launch(&address, {1, 1, 1, 1, 256}, nullptr, &out, 256, 0, 256)) << "the end";
  EXPECT_MENTIONS(launch(&address, {1, 1, 1, 1, 256}, nullptr, &out, 241, 16, 1),
                  "not 16 bytes of shared memory (its offset is 241 of 256)");
  EXPECT_MENTIONS(launch(&address, {1, 1, 1, 1, 256}, nullptr, &out, -1, 1, 1),
                  "not 1 bytes of shared memory");
  EXPECT_MENTIONS(launch(&address, {1, 1, 1, 1, 256}, nullptr, &out, 8, 16, 16),
                  "is not a multiple of 16");
}

// -- memory elsewhere -----------------------------------------------------------------------------

__global__ void read_all(const float* from, int n, float* to) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) to[i] = from[i];
}

TEST(GlobalMemory, AccessesBehindTheEndAreFound) {
  if (!emulator::kAsan) GTEST_SKIP() << "needs AddressSanitizer";
  const std::vector<float> from(100);
  std::vector<float> to(101);
  EXPECT_EQ("", launch(&read_all, {4, 1, 1, 32}, nullptr, from.data(), 100, to.data()));
  EXPECT_DEATH(launch(&read_all, {4, 1, 1, 32}, nullptr, from.data(), 101, to.data()),
               "heap-buffer-overflow(.|\n)*that was CTA \\(3, 0, 0\\), thread 4, seed 1");
}

__global__ void read_four(const float* from, float* to) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  *to = v.x + v.y + v.z + v.w;
}

TEST(GlobalMemory, MisalignedVectorsAreFound) {
  alignas(16) const float from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  float to = 0;
  EXPECT_EQ("", launch(&read_four, {1, 1, 1, 1}, nullptr, from + 4, &to));
  EXPECT_EQ(to, 26);
#if defined(TETRIS_UBSAN)
  EXPECT_DEATH(launch(&read_four, {1, 1, 1, 1}, nullptr, from + 2, &to), "misaligned address");
#else
  GTEST_SKIP() << "needs UBSan";
#endif
}

}  // namespace
}  // namespace tetris::cuda::test
