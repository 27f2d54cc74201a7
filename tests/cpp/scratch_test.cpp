// cpu/scratch.h
#include "cpu/scratch.h"

#include <gtest/gtest.h>

#include <cstring>
#include <thread>

namespace tetris::cpu {
namespace {

constexpr int kSlots = static_cast<int>(ScratchSlot::kCount);

TEST(Scratch, IsAlignedWritableAndKeptUntilItGrows) {
  for (size_t bytes :
       {size_t{0}, size_t{1}, size_t{63}, size_t{4096}, size_t{1} << 20, size_t{5} << 20}) {
    void* p = scratch_bytes(ScratchSlot::kX, bytes);
    ASSERT_NE(nullptr, p);
    EXPECT_EQ(0u, reinterpret_cast<uintptr_t>(p) % 64);
    std::memset(p, 1, bytes);
    EXPECT_EQ(p, scratch_bytes(ScratchSlot::kX, bytes / 2));
  }
}

TEST(Scratch, SlotsAndThreadsDoNotOverlap) {
  char* mine[kSlots];
  for (int s = 0; s < kSlots; ++s) {
    mine[s] = scratch<char>(static_cast<ScratchSlot>(s), 3000);
    std::memset(mine[s], s, 3000);
  }
  std::thread([&] {
    for (int s = 0; s < kSlots; ++s)
      std::memset(scratch<char>(static_cast<ScratchSlot>(s), 3000), 99, 3000);
  }).join();
  for (int s = 0; s < kSlots; ++s)
    for (int i = 0; i < 3000; ++i) ASSERT_EQ(s, mine[s][i]);
}

TEST(Scratch, FailureThrowsAndLeavesTheSlotUsable) {
  EXPECT_THROW(scratch_bytes(ScratchSlot::kY, size_t{1} << 60), std::bad_alloc);
  char* p = scratch<char>(ScratchSlot::kY, 100);
  ASSERT_NE(nullptr, p);
  std::memset(p, 1, 100);
}

}  // namespace
}  // namespace tetris::cpu
