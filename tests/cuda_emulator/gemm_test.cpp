// A matrix product as kernels of this project do it, right, and with each mistake that the emulator
// is there to find.
//
//   c [64, 64] = a [64, k] b [64, k]^T, half; four warps of 32 x 32; slabs of k = 32 in two stages
//
//     a row of a slab is four chunks of 16 bytes, chunk j of row i at j ^ (i / 2 % 4):
//     row 0  |0 1 2 3   row 2  |1 0 3 2   eight rows of one chunk lie in eight different banks'
//     rows row 1  |0 1 2 3   row 3  |1 0 3 2   ...
#include <cmath>

#include "cuda_emulator/numbers.h"
#include "cuda_emulator/statistics.h"
#include "self_test.h"

namespace tetris::cuda::test {
namespace {

enum class Mistake {
  kNone,
  kNoWait,                 // copies are used before they have landed
  kWaitsForTooFew,         // all but two groups where all but one are needed
  kNoBarrierAfterWait,     // other threads' copies are used before they have landed
  kNoBarrierBeforeRefill,  // a stage is filled while other warps still read it
  kOtherSwizzle,           // rows are read as if chunk j of row i lay at j ^ (i % 4)
  kNoSwizzle,              // or at j
  kSlowRows,               // rows are read and written without a swizzle: right, but banks conflict
  kRowsOfA,                // fragments of a: registers 1 and 2 change places
  kHalvesOfB,              // fragments of b: registers change places
  kAccumulators,           // c is stored with elements 1 and 2 in each other's place
  kTransposes,             // ldmatrix with .trans where b's rows are along k
  kSmallShared,            // one row too little shared memory is launched
  kUnaligned,              // ldmatrix from chunks shifted by two elements
  kOneWarpSkipsABarrier,
  kOneLaneSkipsABarrier,
  kOneLaneSkipsAnMma,
  kRaggedReads,  // copies read behind the last row of a
  kNoZeroFill,   // and its stale rows are multiplied
};

constexpr int kTile = 64, kSlab = 32, kChunks = kSlab / 8, kStageBytes = 2 * kTile * kSlab * 2;

template <Mistake mistake>
__device__ uint16_t* chunk(unsigned char* operand, int row, int j, bool reads) {
  int at = j ^ (row / 2 % 4);
  if (mistake == Mistake::kOtherSwizzle && reads) at = j ^ (row % 4);
  if (mistake == Mistake::kNoSwizzle && reads) at = j;
  if (mistake == Mistake::kSlowRows) at = j;
  const int shift = mistake == Mistake::kUnaligned && reads ? 2 : 0;
  return reinterpret_cast<uint16_t*>(operand) + (row * kChunks + at) * 8 + shift;
}

// a has `rows` of the 64.
template <Mistake mistake>
__global__ void __launch_bounds__(128)
    gemm(const uint16_t* a, const uint16_t* b, float* c, int rows, int k) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row0 = warp / 2 * 32, col0 = warp % 2 * 32;
  const auto operand = [&](int stage, int which) {
    return dynamic_shared() + stage * kStageBytes + which * kStageBytes / 2;
  };
  const auto fill = [&](int slab) {
    for (int i = thread; i < kTile * kChunks; i += 128) {
      const int row = i / kChunks, j = i % kChunks;
      const int64_t from = int64_t{row} * k + slab * kSlab + j * 8;
      uint16_t* const to = chunk<mistake>(operand(slab % 2, 0), row, j, false);
      if (row < rows || mistake == Mistake::kRaggedReads)
        ptx::cp_async_16(to, a + from);
      else if (mistake != Mistake::kNoZeroFill)
        ptx::cp_async_16(to, a, 0);
      ptx::cp_async_16(chunk<mistake>(operand(slab % 2, 1), row, j, false), b + from);
    }
  };
  float acc[2][4][4] = {};
  const int slabs = k / kSlab;
  fill(0);
  ptx::cp_async_commit();
  for (int slab = 0; slab < slabs; ++slab) {
    if (slab + 1 < slabs) fill(slab + 1);
    ptx::cp_async_commit();
    if (mistake == Mistake::kWaitsForTooFew)
      ptx::cp_async_wait<2>();
    else if (mistake != Mistake::kNoWait)
      ptx::cp_async_wait<1>();
    const bool skips = (mistake == Mistake::kOneWarpSkipsABarrier && warp == 1 && slab == 1) ||
                       (mistake == Mistake::kOneLaneSkipsABarrier && thread == 50 && slab == 1) ||
                       mistake == Mistake::kNoBarrierAfterWait;
    if (!skips) __syncthreads();
    for (int step = 0; step < kSlab / 16; ++step) {
      uint32_t fa[2][4], fb[4][2];
      for (int i = 0; i < 2; ++i) {
        // Matrices: rows 0-7 and 8-15 of the first eight columns, then of the others.
        const int row = row0 + 16 * i + lane % 16, j = 2 * step + lane / 16;
        ptx::ldmatrix_x4(fa[i], chunk<mistake>(operand(slab % 2, 0), row, j, true));
        if (mistake == Mistake::kRowsOfA) std::swap(fa[i][1], fa[i][2]);
      }
      for (int i = 0; i < 4; ++i) {
        const int row = col0 + 8 * i + lane % 8, j = 2 * step + lane / 8 % 2;
        uint16_t* const from = chunk<mistake>(operand(slab % 2, 1), row, j, true);
        if (mistake == Mistake::kTransposes)
          ptx::ldmatrix_x2_trans(fb[i], from);
        else
          ptx::ldmatrix_x2(fb[i], from);
        if (mistake == Mistake::kHalvesOfB) std::swap(fb[i][0], fb[i][1]);
      }
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j)
          if (mistake != Mistake::kOneLaneSkipsAnMma || thread != 77 || slab == 0)
            ptx::mma_m16n8k16_half(acc[i][j], fa[i], fb[j]);
    }
    if (mistake != Mistake::kNoBarrierBeforeRefill) __syncthreads();
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
      for (int e = 0; e < 4; ++e) {
        const int from = mistake == Mistake::kAccumulators && (e == 1 || e == 2) ? 3 - e : e;
        const int row = row0 + 16 * i + lane / 4 + e / 2 * 8;
        const int col = col0 + 8 * j + lane % 4 * 2 + e % 2;
        c[row * kTile + col] = acc[i][j][from];
      }
}

// What came of it: a message of the emulator, "wrong" or an empty string.
template <Mistake mistake>
std::string run(uint64_t seed, int rows = kTile) {
  const With seeded = with_seed(seed);
  const int k = 4 * kSlab;
  std::vector<float> c(kTile * kTile, NAN), fa(rows * k), fb(kTile * k);
  auto* const a = new (std::align_val_t{16}) uint16_t[fa.size()];
  auto* const b = new (std::align_val_t{16}) uint16_t[fb.size()];
  // Small integers whose sums are exact; no two rows, columns or halves alike.
  for (size_t i = 0; i < fa.size(); ++i)
    fa[i] = float(int(i * 7 % 23) - 11), a[i] = emulator::float_to_half(fa[i]);
  for (size_t i = 0; i < fb.size(); ++i)
    fb[i] = float(int(i * 5 % 19) - 9), b[i] = emulator::float_to_half(fb[i]);
  size_t shared = 2 * kStageBytes;
  if (mistake == Mistake::kSmallShared) shared -= 2 * kSlab;
  std::string result =
      launch(&gemm<mistake>, {1, 1, 1, 128, shared}, nullptr, a, b, c.data(), rows, k);
  for (int i = 0; i < kTile * kTile && result.empty(); ++i) {
    float want = 0;
    for (int l = 0; l < k && i / kTile < rows; ++l)
      want += fa[i / kTile * k + l] * fb[i % kTile * k + l];
    if (c[i] != want) result = "wrong";
  }
  operator delete[](a, std::align_val_t{16});
  operator delete[](b, std::align_val_t{16});
  return result;
}

constexpr int kSeeds = 10;

// In how many of the seeds the mistake shows, each time in this way.
template <Mistake mistake>
int shows(const std::string& how, int rows = kTile) {
  int count = 0;
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const std::string result = run<mistake>(seed, rows);
    if (result.empty()) continue;
    EXPECT_MENTIONS(result, how);
    ++count;
  }
  return count;
}

TEST(Gemm, IsRight) {
  EXPECT_EQ(shows<Mistake::kNone>(""), 0);
  EXPECT_EQ(shows<Mistake::kNone>("", 37), 0);
}

TEST(Gemm, MissingWaitsShow) {
  EXPECT_EQ(shows<Mistake::kNoWait>("wrong"), kSeeds);
  EXPECT_EQ(shows<Mistake::kWaitsForTooFew>("wrong"), kSeeds);
}

TEST(Gemm, MissingBarriersShow) {
  EXPECT_EQ(shows<Mistake::kNoBarrierAfterWait>("wrong"), kSeeds);
  EXPECT_GE(shows<Mistake::kNoBarrierBeforeRefill>("wrong"), kSeeds / 2);  // a matter of luck
}

TEST(Gemm, WrongIndicesShow) {
  EXPECT_EQ(shows<Mistake::kOtherSwizzle>("wrong"), kSeeds);
  EXPECT_EQ(shows<Mistake::kNoSwizzle>("wrong"), kSeeds);
  EXPECT_EQ(shows<Mistake::kRowsOfA>("wrong"), kSeeds);
  EXPECT_EQ(shows<Mistake::kHalvesOfB>("wrong"), kSeeds);
  EXPECT_EQ(shows<Mistake::kAccumulators>("wrong"), kSeeds);
  EXPECT_EQ(shows<Mistake::kTransposes>("wrong"), kSeeds);
}

TEST(Gemm, ConflictsBetweenBanksAreCounted) {
  auto& counted = emulator::statistics();
  // A slab: two steps, four warps, two times four matrices of a and four times two of b.
  const uint64_t matrices = 4 * 2 * 4 * (2 * 4 + 4 * 2);
  counted = {};
  EXPECT_EQ("", run<Mistake::kNone>(1));
  EXPECT_EQ(counted.ldmatrix_matrices, matrices);
  EXPECT_EQ(counted.ldmatrix_conflicts, 0u);
  counted = {};
  EXPECT_EQ("", run<Mistake::kSlowRows>(1));
  EXPECT_EQ(counted.ldmatrix_conflicts, 3 * matrices) << "rows of 64 bytes: four turns, not one";
}

TEST(Gemm, BadAddressesAreReported) {
  EXPECT_EQ(shows<Mistake::kSmallShared>("not 16 bytes of shared memory"), kSeeds);
  EXPECT_EQ(shows<Mistake::kUnaligned>("is not a multiple of 16"), kSeeds);
  if (emulator::kAsan) {
    EXPECT_EQ(shows<Mistake::kRaggedReads>("are not all in an allocation", 37), kSeeds);
  }
  EXPECT_EQ(shows<Mistake::kNoZeroFill>("wrong", 37), kSeeds);
}

TEST(Gemm, DivergenceIsReported) {
  EXPECT_EQ(shows<Mistake::kOneWarpSkipsABarrier>("other threads have come to this barrier from"),
            kSeeds);
  EXPECT_EQ(shows<Mistake::kOneLaneSkipsABarrier>("gemm_test.cpp:"), kSeeds);
  EXPECT_EQ(shows<Mistake::kOneLaneSkipsAnMma>("the warp diverged"), kSeeds);
}

}  // namespace
}  // namespace tetris::cuda::test
