// What the lanes of a warp do together: shuffles and matrix instructions.
#include <cmath>

#include "cuda_emulator/cta.h"
#include "self_test.h"

namespace tetris::cuda::test {
namespace {

enum class Shuffle { kFrom, kXor, kDown, kUp };

template <class T>
__global__ void shuffle(T* out, Shuffle kind, int operand, int width) {
  const T mine = T(100 + threadIdx.x);
  T got = -1;
  if (kind == Shuffle::kFrom) got = __shfl_sync(0xffffffff, mine, operand, width);
  if (kind == Shuffle::kXor) got = __shfl_xor_sync(0xffffffff, mine, operand, width);
  if (kind == Shuffle::kDown) got = __shfl_down_sync(0xffffffff, mine, unsigned(operand), width);
  if (kind == Shuffle::kUp) got = __shfl_up_sync(0xffffffff, mine, unsigned(operand), width);
  out[threadIdx.x] = got;
}

template <class T>
std::vector<int> shuffled(Shuffle kind, int operand, int width) {
  std::vector<T> out(64);
  EXPECT_EQ("", launch(&shuffle<T>, {1, 1, 1, 64}, nullptr, out.data(), kind, operand, width));
  std::vector<int> from;
  for (int i = 0; i < 64; ++i) from.push_back(int(out[i]) - 100);
  return from;
}

TEST(Shuffles, MoveValuesWithinWarps) {
  const auto from = shuffled<float>(Shuffle::kFrom, 5, 32);
  const auto xored = shuffled<double>(Shuffle::kXor, 3, 32);
  const auto down = shuffled<int>(Shuffle::kDown, 4, 32);
  const auto up = shuffled<unsigned>(Shuffle::kUp, 4, 32);
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32;
    EXPECT_EQ(from[i], i / 32 * 32 + 5);
    EXPECT_EQ(xored[i], i ^ 3);
    EXPECT_EQ(down[i], lane < 28 ? i + 4 : i);
    EXPECT_EQ(up[i], lane >= 4 ? i - 4 : i);
  }
}

TEST(Shuffles, OrWithinSegments) {
  const auto from = shuffled<float>(Shuffle::kFrom, 9, 8);  // lane 9 modulo 8
  const auto down = shuffled<int>(Shuffle::kDown, 3, 8);
  const auto up = shuffled<int>(Shuffle::kUp, 3, 8);
  const auto xored = shuffled<int>(Shuffle::kXor, 8, 8);
  for (int i = 0; i < 64; ++i) {
    EXPECT_EQ(from[i], i / 8 * 8 + 1);
    EXPECT_EQ(down[i], i % 8 < 5 ? i + 3 : i);
    EXPECT_EQ(up[i], i % 8 >= 3 ? i - 3 : i);
    EXPECT_EQ(xored[i], i & 8 ? i - 8 : i);  // an earlier segment can be read, a later one not
  }
}

__global__ void half_a_warp(int* out) {
  if (threadIdx.x < 16) *out += __shfl_xor_sync(0xffffffff, 1, 1);
}
__global__ void two_places(int* out) {
  if (threadIdx.x < 16)
    *out += __shfl_xor_sync(0xffffffff, 1, 1);
  else
    *out += __shfl_xor_sync(0xffffffff, 1, 1);
}
__global__ void some_lanes(int* out) { *out += __shfl_xor_sync(0xffff, 1, 1); }

TEST(Shuffles, ADivergedWarpIsReported) {
  int out = 0;
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    const With seeded = with_seed(seed);
    const std::string half = launch(&half_a_warp, {1, 1, 1, 32}, nullptr, &out);
    EXPECT_MENTIONS(half, "__shfl_xor_sync (warp_test.cpp:");
    EXPECT_MENTIONS(half, "all threads of the warp must take part, and thread ");
    EXPECT_MENTIONS(
        launch(&two_places, {1, 1, 1, 32}, nullptr, &out),
        "the warp diverged: other threads of it are at __shfl_xor_sync (warp_test.cpp:");
  }
  EXPECT_MENTIONS(launch(&some_lanes, {1, 1, 1, 32}, nullptr, &out), "0xffffffff (got 65535)");
  EXPECT_MENTIONS(launch(&some_lanes, {1, 1, 1, 32}, nullptr, &out), "thread ");
}

// -- ldmatrix -------------------------------------------------------------------------------------

// Row j of matrix i holds 100 i + 10 j + column; matrices lie behind each other, rows 16 bytes.
__global__ void load(uint32_t* out, int matrices, bool transposed, int shift) {
  auto* shared = reinterpret_cast<uint16_t*>(dynamic_shared());
  for (int at = threadIdx.x; at < 64 * matrices; at += 32)
    shared[at] = uint16_t(100 * (at / 64) + 10 * (at / 8 % 8) + at % 8);
  __syncthreads();
  const uint16_t* row = shared + threadIdx.x % (8 * matrices) * 8 + shift;
  if (matrices == 4) {
    uint32_t r[4];
    if (transposed)
      ptx::ldmatrix_x4_trans(r, row);
    else
      ptx::ldmatrix_x4(r, row);
    for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
  } else {
    uint32_t r[2];
    if (transposed)
      ptx::ldmatrix_x2_trans(r, row);
    else
      ptx::ldmatrix_x2(r, row);
    for (int i = 0; i < 2; ++i) out[4 * threadIdx.x + i] = r[i];
  }
}

TEST(Ldmatrix, GivesEachLaneTwoNeighboursOfARow) {
  for (int matrices : {2, 4})
    for (bool transposed : {false, true}) {
      std::vector<uint32_t> out(128);
      ASSERT_EQ("",
                launch(&load, {1, 1, 1, 32, 512}, nullptr, out.data(), matrices, transposed, 0));
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < matrices; ++i) {
          const int row = lane / 4, column = lane % 4 * 2;
          const int low = transposed ? 10 * column + row : 10 * row + column;
          const int high = low + (transposed ? 10 : 1);
          EXPECT_EQ(out[4 * lane + i], uint32_t(100 * i + low) | uint32_t(100 * i + high) << 16);
        }
    }
}

TEST(Ldmatrix, RowsAreAlignedAndInSharedMemory) {
  std::vector<uint32_t> out(128);
  EXPECT_MENTIONS(launch(&load, {1, 1, 1, 32, 520}, nullptr, out.data(), 4, false, 4),
                  "is not a multiple of 16");
  EXPECT_MENTIONS(launch(&load, {1, 1, 1, 32, 512}, nullptr, out.data(), 4, false, 8),
                  "not 16 bytes of shared memory (its offset is 512 of 512)");
}

__global__ void load_own_rows(uint32_t* out, bool fence) {
  auto* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  for (int i = 0; i < 4; ++i) shared[128 - 4 * (threadIdx.x + 1) + i] = 7;  // another lane's row
  if (fence) __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, shared + 4 * threadIdx.x);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = r[i];
}

TEST(Ldmatrix, IsNoFence) {
  std::vector<uint32_t> out(128);
  const auto stale = [&] { return std::count(out.begin(), out.end(), 0xffffffffu); };
  EXPECT_EQ("", launch(&load_own_rows, {1, 1, 1, 32, 512}, nullptr, out.data(), true));
  EXPECT_EQ(stale(), 0);
  EXPECT_EQ("", launch(&load_own_rows, {1, 1, 1, 32, 512}, nullptr, out.data(), false));
  EXPECT_GT(stale(), 0);
}

// -- mma ------------------------------------------------------------------------------------------

enum class Format { kHalf, kBFloat16, kTf32 };

// One product of matrices in memory: fragments are gathered element by element, from the figures of
// the PTX ISA and written apart from the emulator's code.
__global__ void multiply(const float* a, const float* b, float* c, Format format) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const int depth = format == Format::kTf32 ? 8 : 16;
  const auto at_a = [&](int row, int col) { return a[row * depth + col]; };
  const auto at_b = [&](int row, int col) { return b[row * 8 + col]; };
  uint32_t fa[4], fb[2];
  float d[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t],
                c[(g + 8) * 8 + 2 * t + 1]};
  if (format == Format::kTf32) {
    fa[0] = ptx::float_to_bits(at_a(g, t));
    fa[1] = ptx::float_to_bits(at_a(g + 8, t));
    fa[2] = ptx::float_to_bits(at_a(g, t + 4));
    fa[3] = ptx::float_to_bits(at_a(g + 8, t + 4));
    fb[0] = ptx::float_to_bits(at_b(t, g));
    fb[1] = ptx::float_to_bits(at_b(t + 4, g));
    ptx::mma_m16n8k8_tf32(d, fa, fb);
  } else {
    const auto pack = [&](float low, float high) {
      return format == Format::kHalf ? ptx::pack_half(low, high) : ptx::pack_bfloat16(low, high);
    };
    fa[0] = pack(at_a(g, 2 * t), at_a(g, 2 * t + 1));
    fa[1] = pack(at_a(g + 8, 2 * t), at_a(g + 8, 2 * t + 1));
    fa[2] = pack(at_a(g, 2 * t + 8), at_a(g, 2 * t + 9));
    fa[3] = pack(at_a(g + 8, 2 * t + 8), at_a(g + 8, 2 * t + 9));
    fb[0] = pack(at_b(2 * t, g), at_b(2 * t + 1, g));
    fb[1] = pack(at_b(2 * t + 8, g), at_b(2 * t + 9, g));
    if (format == Format::kHalf)
      ptx::mma_m16n8k16_half(d, fa, fb);
    else
      ptx::mma_m16n8k16_bfloat16(d, fa, fb);
  }
  c[g * 8 + 2 * t] = d[0];
  c[g * 8 + 2 * t + 1] = d[1];
  c[(g + 8) * 8 + 2 * t] = d[2];
  c[(g + 8) * 8 + 2 * t + 1] = d[3];
}

TEST(Mma, MultipliesAndAdds) {
  for (Format format : {Format::kHalf, Format::kBFloat16, Format::kTf32}) {
    const int depth = format == Format::kTf32 ? 8 : 16;
    std::vector<float> a(16 * depth), b(depth * 8), c(128), want(128);
    // Small integers: exact in every format, and no two elements of a row or column alike.
    for (int i = 0; i < int(a.size()); ++i) a[i] = float(i * 7 % 61 - 30);
    for (int i = 0; i < int(b.size()); ++i) b[i] = float(i * 11 % 53 - 26);
    for (int i = 0; i < 128; ++i) {
      want[i] = c[i] = float(i);
      for (int k = 0; k < depth; ++k) want[i] += a[i / 8 * depth + k] * b[k * 8 + i % 8];
    }
    ASSERT_EQ("", launch(&multiply, {1, 1, 1, 32}, nullptr, a.data(), b.data(), c.data(), format));
    EXPECT_EQ(c, want);
  }
}

TEST(Mma, Tf32IgnoresTheLowBits) {
  std::vector<float> a(128), b(64), c(128);
  a[0] = 1 + 0x1p-10f + 0x1.8p-11f;  // 10 bits are kept
  b[0] = 1;
  ASSERT_EQ("",
            launch(&multiply, {1, 1, 1, 32}, nullptr, a.data(), b.data(), c.data(), Format::kTf32));
  EXPECT_EQ(c[0], 1 + 0x1p-10f);
}

TEST(Mma, NanStaysInItsRow) {
  std::vector<float> a(256, 1), b(128, 1), c(128);
  a[3 * 16 + 5] = NAN;
  ASSERT_EQ("",
            launch(&multiply, {1, 1, 1, 32}, nullptr, a.data(), b.data(), c.data(), Format::kHalf));
  for (int i = 0; i < 128; ++i) EXPECT_EQ(std::isnan(c[i]), i / 8 == 3);
}

__global__ void multiply_diverged() {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x < 8)
    ptx::mma_m16n8k16_half(d, a, b);
  else
    ptx::mma_m16n8k16_bfloat16(d, a, b);
}
TEST(Mma, NeedsTheWholeWarp) {
  EXPECT_MENTIONS(launch(&multiply_diverged, {1, 1, 1, 32}, nullptr), "the warp diverged");
  EXPECT_MENTIONS(launch(&multiply_diverged, {1, 1, 1, 8}, nullptr), "and thread 8 is not there");
}

}  // namespace
}  // namespace tetris::cuda::test
