// cpu/dispatch.h: the choice of an instruction set, and the tables it chooses from.
#include "cpu/dispatch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>

#include "core/cpu_features.h"

namespace tetris::cpu {
namespace {

TEST(Isas, ScalarIsAlwaysThereAndLast) {
  ASSERT_FALSE(isas_built().empty());
  EXPECT_EQ("scalar", isas_built().back());
  ASSERT_FALSE(isas_supported().empty());
  EXPECT_EQ("scalar", isas_supported().back());
}

TEST(Isas, TheBestSupportedOneIsTheDefault) {
  unsetenv("TETRIS_CPU_ISA");
  force_isa("");
  EXPECT_EQ(isas_supported().front(), isa_in_use());
}

TEST(Isas, EachSupportedOneCanBeForced) {
  for (const auto& name : isas_supported()) {
    force_isa(name);
    EXPECT_EQ(name, isa_in_use());
    EXPECT_EQ(name, kernels<float>().isa);
    EXPECT_EQ(std::string("scalar"), kernels<double>().isa);
  }
  force_isa("");
}

TEST(Isas, UnknownAndUnsupportedOnesThrowAndChangeNothing) {
  force_isa("scalar");
  EXPECT_THROW(force_isa("altivec"), std::runtime_error);
  for (const auto& name : isas_built()) {
    const auto have = isas_supported();
    if (std::find(have.begin(), have.end(), name) == have.end()) {
      EXPECT_THROW(force_isa(name), std::runtime_error);
    }
  }
  EXPECT_EQ("scalar", isa_in_use());
  force_isa("");
}

TEST(Isas, TheEnvironmentIsReadAndAWrongNameThrowsEachTime) {
  setenv("TETRIS_CPU_ISA", "scalar", 1);
  force_isa("");
  EXPECT_EQ("scalar", isa_in_use());
  setenv("TETRIS_CPU_ISA", "altivec", 1);
  force_isa("");
  EXPECT_THROW(isa_in_use(), std::runtime_error);
  EXPECT_THROW(kernels<float>(), std::runtime_error);
  EXPECT_THROW(kernels<double>(), std::runtime_error);
  unsetenv("TETRIS_CPU_ISA");
  EXPECT_EQ(isas_supported().front(), isa_in_use());
}

TEST(LastKernel, BelongsToItsThread) {
  set_last_kernel("mine");
  std::thread([] { EXPECT_STREQ("", last_kernel()); }).join();
  EXPECT_STREQ("mine", last_kernel());
}

// Tables of any built instruction set can be read on any CPU: they hold pointers, run nothing.
template <class T>
void check_table(const KernelTable<T>& k) {
  EXPECT_GT(k.width, 0);
  ASSERT_GE(k.max_rows, 1);
  ASSERT_LE(k.max_rows, kMaxTileRows);
  std::set<std::string> names;
  for (int r = 1; r <= kMaxTileRows; ++r)
    for (int v = 1; v <= kMaxTileVecs; ++v) {
      const auto& tile = k.tiles[r][v];
      EXPECT_EQ(tile.forward == nullptr, tile.name == nullptr);
      if (!tile.forward) continue;
      EXPECT_NE(tile.grad_input, nullptr);
      EXPECT_TRUE(names.insert(tile.name).second) << tile.name;
      EXPECT_NE(std::string(tile.name).find("_" + std::to_string(r) + "x" +
                                            std::to_string(v * k.width) + "__"),
                std::string::npos)
          << tile.name;
    }
  // Whatever remains of a block can be cut into tiles, for each panel width in use.
  for (int v = 1; v <= kMaxTileVecs; ++v) {
    bool any = false;
    for (int r = 1; r <= k.max_rows; ++r) any = any || k.tiles[r][v].forward;
    if (any) {
      EXPECT_NE(k.tiles[1][v].forward, nullptr) << v;
    }
  }
  for (const auto& sampler : k.samplers) {
    EXPECT_NE(sampler.run, nullptr);
    EXPECT_NE(sampler.name, nullptr);
  }
  EXPECT_NE(k.tiles[1][kMaxTileVecs].forward, nullptr);
}

TEST(Tables, AreComplete) {
  for (const auto& name : isas_supported()) {
    force_isa(name);
    SCOPED_TRACE(name);
    check_table(kernels<float>());
  }
  force_isa("");
  check_table(kernels<double>());
}

TEST(Features, ImplyTheirPredecessors) {
  const unsigned have = cpu_features();
  if (have & kAvx512) {
    EXPECT_TRUE(have & kAvx2Fma);
  }
  EXPECT_GT(l2_cache_bytes(), 0);
}

}  // namespace
}  // namespace tetris::cpu
