// The emulation of sm_90a's instructions against the PTX ISA's own examples and rules.
#include "cuda/ptx_sm90.cuh"

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/numeric.cuh"
#include "cuda_emulator/buffer.h"
#include "cuda_emulator/options.h"

namespace tetris::cuda {
namespace {

using emulator::Random;
using emulator::wgmma_element;
using test::Numbers;

constexpr uint32_t kBase = emulator::SharedMemory::kBase;

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Runs `body` in each thread of a CTA.
__global__ void call(const std::function<void(int)>* body) { (*body)(int(threadIdx.x)); }

std::string run(int threads, const std::function<void(int)>& body, size_t shared_bytes = 65536) {
  return launch(&call, LaunchShape{1, 1, 1, threads, shared_bytes}, nullptr, &body);
}

// At many orders of threads and times of copies; the first message that is not empty.
std::string run_often(int threads, const std::function<void(int)>& body) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    emulator::options().seed = seed;
    const std::string error = run(threads, body);
    if (!error.empty()) return error;
  }
  return {};
}

uint64_t* barrier(int i) { return reinterpret_cast<uint64_t*>(dynamic_shared() + 60000) + i; }

void init(int thread, int count, int arrivals) {
  if (thread == 0) {
    for (int i = 0; i < count; ++i) ptx::mbarrier_init(barrier(i), arrivals);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

void wait(uint64_t* b, int parity) {
  while (!ptx::mbarrier_try_wait(b, parity)) {
  }
}

// -- mbarrier -------------------------------------------------------------------------------------

TEST(Mbarrier, PhasesGoBackAndForth) {
  EXPECT_EQ("", run_often(64, [](int t) {
              init(t, 2, 32);
              int* const box = reinterpret_cast<int*>(dynamic_shared());
              for (int round = 0; round < 5; ++round) {
                if (t < 32) {  // fills
                  wait(barrier(1), round % 2 ^ 1);
                  box[t] = round;
                  ptx::mbarrier_arrive(barrier(0));
                } else {  // empties
                  wait(barrier(0), round % 2);
                  for (int i = 0; i < 32; ++i)
                    if (box[i] != round) emulator::violate("box", emulator::Site::here(), "stale");
                  ptx::mbarrier_arrive(barrier(1));
                }
              }
            }));
}

TEST(Mbarrier, RulesThatAreBroken) {
  EXPECT_PRED2(contains, run(32, [](int) { ptx::mbarrier_arrive(barrier(0)); }), "not an init");
  EXPECT_PRED2(contains,
               run(64,
                   [](int t) {
                     if (t == 0) ptx::mbarrier_init(barrier(0), 64);
                     __syncthreads();
                     ptx::mbarrier_arrive(barrier(0));
                   }),
               "not fenced");
  EXPECT_PRED2(contains,
               run(64,
                   [](int t) {
                     init(t, 1, 65);
                     ptx::mbarrier_arrive(barrier(0));
                     wait(barrier(0), 0);
                   }),
               "deadlock");
  EXPECT_PRED2(contains,
               run(64,
                   [](int t) {
                     init(t, 1, 64);
                     *barrier(0) = 0;
                     __syncthreads();
                     ptx::mbarrier_arrive(barrier(0));
                   }),
               "not an init");
  // Bytes are outstanding: nobody may pass, and they are never more than 2^20.
  EXPECT_PRED2(contains,
               run(32,
                   [](int t) {
                     init(t, 1, 32);
                     ptx::mbarrier_arrive_expect_tx(barrier(0), 16);
                     wait(barrier(0), 0);
                   }),
               "deadlock");
  EXPECT_PRED2(contains,
               run(32,
                   [](int t) {
                     init(t, 1, 1);
                     if (t == 0) ptx::mbarrier_arrive_expect_tx(barrier(0), 1 << 20);
                   }),
               "2^20");
}

// -- bulk copies ----------------------------------------------------------------------------------

TEST(Bulk, LoadLands) {
  Numbers source(DType::kFloat16, 512);
  for (int i = 0; i < 512; ++i) source.set(i, i);
  EXPECT_EQ("", run_often(64, [&](int t) {
              init(t, 1, 1);
              if (t == 0) {
                ptx::mbarrier_arrive_expect_tx(barrier(0), 1024);
                ptx::bulk_load(dynamic_shared(), source.data(), 1024, barrier(0));
              }
              wait(barrier(0), 0);
              if (std::memcmp(dynamic_shared(), source.data(), 1024) != 0)
                emulator::violate("bulk_load", emulator::Site::here(), "did not land");
            }));
}

// PTX ISA, "Swizzling Modes": where the table of the mode has piece c of 16 bytes in each line of
// 128 bytes, one line below the other from a multiple of the pattern on.
int piece_at(int row_bytes, int line, int place) {
  return row_bytes == 128  ? place ^ line % 8
         : row_bytes == 64 ? place ^ line % 4
                           : place ^ line % 2;
}

TEST(Tma, BoxesAreSwizzledAndZeroOutside) {
  constexpr int kRows = 40, kColumns = 72, kStride = 80;
  Numbers source(DType::kFloat16, kRows * kStride);
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) source.set(r * kStride + c, r * 32 + c % 32 + 1);
  for (int box : {16, 32, 64}) {
    TensorMap map;
    ASSERT_EQ("", encode_tensor_map({DType::kFloat16,
                                     source.data(),
                                     4,
                                     {kColumns, kRows, 1, 1},
                                     {1, kStride, 8, 8},
                                     {box, 32, 1, 1}},
                                    &map));
    for (const auto& [column, row] : std::vector<std::pair<int, int>>{
             {0, 0}, {8, 3}, {48, 20}, {64, 32}, {-8, -4}, {80, 0}, {0, 40}}) {
      EXPECT_EQ(
          "", run_often(32, [&, column = column, row = row](int t) {
            init(t, 1, 1);
            if (t == 0) {
              ptx::mbarrier_arrive_expect_tx(barrier(0), box * 32 * 2);
              ptx::tma_load_4d(dynamic_shared(), &map, column, row, 0, 0, barrier(0));
            }
            wait(barrier(0), 0);
            const auto* const shared = reinterpret_cast<const uint16_t*>(dynamic_shared());
            for (int at = 0; at < box * 32; ++at) {
              const int line = at / 64, element = 8 * piece_at(2 * box, line, at % 64 / 8) + at % 8;
              const int number = line * 64 + element;  // within the box as if it were not swizzled
              const int r = row + number / box, c = column + number % box;
              const bool inside = 0 <= r && r < kRows && 0 <= c && c < kColumns;
              const float want = inside ? float(source.get(r * kStride + c)) : 0;
              if (ptx::half_to_float(shared[at]) != want)
                emulator::violate("tma_load_4d", emulator::Site::here(),
                                  "element " + std::to_string(at));
            }
          }));
    }
  }
}

TEST(Tma, FourDimensions) {
  // [2 blocks][3 k][128 rows], as [block][half][k][64 rows], k beyond 2 outside.
  Numbers source(DType::kFloat16, 2 * 3 * 128);
  for (int i = 0; i < source.size(); ++i) source.set(i, i);
  TensorMap map;
  ASSERT_EQ(
      "",
      encode_tensor_map(
          {DType::kFloat16, source.data(), 4, {64, 2, 2, 2}, {1, 128, 64, 3 * 128}, {64, 16, 2, 1}},
          &map));
  EXPECT_EQ("", run_often(32, [&](int t) {
              init(t, 1, 1);
              if (t == 0) {
                ptx::mbarrier_arrive_expect_tx(barrier(0), 64 * 16 * 2 * 2);
                ptx::tma_load_4d(dynamic_shared(), &map, 0, 0, 0, 1, barrier(0));
              }
              wait(barrier(0), 0);
              const auto* const shared = reinterpret_cast<const uint16_t*>(dynamic_shared());
              for (int half = 0; half < 2; ++half)
                for (int k = 0; k < 16; ++k)
                  for (int r = 0; r < 64; ++r) {
                    const int line = half * 16 + k;
                    const int at = line * 64 + piece_at(128, line, r / 8) * 8 + r % 8;
                    const float want = k < 2 ? float(3 * 128 + k * 128 + half * 64 + r) : 0;
                    if (ptx::half_to_float(shared[at]) != want)
                      emulator::violate("tma_load_4d", emulator::Site::here(),
                                        "element " + std::to_string(at));
                  }
            }));
}

// Every second column and every third row of an image, from (-1, -2) on, as a convolution with
// these strides sees it.
TEST(Tma, Steps) {
  constexpr int kWidth = 5, kHeight = 7;
  Numbers source(DType::kFloat16, kHeight * kWidth * 16);
  for (int i = 0; i < source.size(); ++i) source.set(i, i + 1);
  TensorBox box{DType::kFloat16,
                source.data(),
                4,
                {16, kWidth, kHeight, 1},
                {1, 16, kWidth * 16, kHeight * kWidth * 16},
                {16, 4, 4, 1}};
  box.step[1] = 2;
  box.step[2] = 3;
  TensorMap map;
  ASSERT_EQ("", encode_tensor_map(box, &map));
  EXPECT_EQ("", run_often(32, [&](int t) {
              init(t, 1, 1);
              if (t == 0) {
                ptx::mbarrier_arrive_expect_tx(barrier(0), 16 * 4 * 4 * 2);
                ptx::tma_load_4d(dynamic_shared(), &map, 0, -1, -2, 0, barrier(0));
              }
              wait(barrier(0), 0);
              const auto* const shared = reinterpret_cast<const uint16_t*>(dynamic_shared());
              for (int at = 0; at < 256; ++at) {
                const int number = at / 64 * 64 + piece_at(32, at / 64, at % 64 / 8) * 8 + at % 8;
                const int x = number / 16 % 4 * 2 - 1, y = number / 64 * 3 - 2;
                const bool inside = 0 <= x && x < kWidth && 0 <= y && y < kHeight;
                const float want = inside ? float((y * kWidth + x) * 16 + number % 16 + 1) : 0;
                if (ptx::half_to_float(shared[at]) != want)
                  emulator::violate("tma_load_4d", emulator::Site::here(),
                                    "element " + std::to_string(at));
              }
            }));
}

// stmatrix, fence, barrier, store: a transposed tile arrives, clipped.
std::string store_tile(Numbers& result, bool fence, bool wait_read) {
  TensorMap map;
  const std::string error = encode_tensor_map(
      {DType::kFloat16, result.data(), 4, {60, 20, 1, 1}, {1, 64, 8, 8}, {64, 32, 1, 1}}, &map);
  if (!error.empty()) return error;
  return run_often(128, [&](int t) {
    const int warp = t / 32, lane = t % 32;
    for (int j = 0; j < 2; ++j) {  // rows 16 warp ..., pixels 16 j ...
      uint32_t r[4];
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * warp + 8 * (i % 2) + lane / 4,
                  pixel = 16 * j + i / 2 * 8 + lane % 4 * 2;
        r[i] = ptx::pack_half(float(pixel * 64 + row), float((pixel + 1) * 64 + row));
      }
      const int pixel = 16 * j + lane / 16 * 8 + lane % 8, piece = 2 * warp + lane / 8 % 2;
      ptx::stmatrix_x4_trans(dynamic_shared() + pixel * 128 + (piece ^ pixel % 8) * 16, r);
    }
    if (fence) ptx::fence_proxy_async();
    ptx::named_barrier(3, 128);
    if (t == 0) {
      ptx::tma_store_4d(&map, 0, 0, 0, 0, dynamic_shared());
      ptx::bulk_commit();
      if (wait_read) ptx::bulk_wait_read<0>();
    }
  });
}

TEST(Tma, StoresWhatStmatrixWrote) {
  Numbers result(DType::kFloat16, 20 * 64);
  ASSERT_EQ("", store_tile(result, true, true));
  for (int i = 0; i < result.size(); ++i) {
    if (i % 64 < 60)
      EXPECT_EQ(result.get(i), i);
    else
      EXPECT_TRUE(std::isnan(result.get(i)));
  }
  EXPECT_PRED2(contains, store_tile(result, false, true), "without a fence_proxy_async");
  EXPECT_PRED2(contains, store_tile(result, true, false), "ended before its shared memory");
}

TEST(Tma, MapsThatAreRefused) {
  Numbers source(DType::kFloat16, 1024);
  const auto encode = [&](const std::function<void(TensorBox&)>& change) {
    TensorBox box{DType::kFloat16, source.data(), 2, {64, 16}, {1, 64}, {64, 16}};
    change(box);
    TensorMap map;
    return encode_tensor_map(box, &map);
  };
  EXPECT_EQ("", encode([](TensorBox&) {}));
  EXPECT_NE("", encode([](TensorBox& b) { b.base = static_cast<const char*>(b.base) + 8; }));
  EXPECT_NE("", encode([](TensorBox& b) { b.stride[1] = 60; }));
  EXPECT_NE("", encode([](TensorBox& b) { b.extent[1] = 0; }));
  EXPECT_NE("", encode([](TensorBox& b) { b.box[1] = 257; }));
  EXPECT_NE("", encode([](TensorBox& b) { b.box[0] = 8; }));
  EXPECT_NE("", encode([](TensorBox& b) { b.step[1] = 9; }));
  EXPECT_NE("", encode([](TensorBox& b) { b.box[1] = 129, b.step[1] = 2; }));
}

// -- registers ------------------------------------------------------------------------------------

TEST(Registers, ComeFromThePool) {
  EXPECT_EQ("", run_often(384, [](int t) {
              t < 128 ? ptx::set_max_registers_down<40>() : ptx::set_max_registers_up<232>();
            }));
  EXPECT_PRED2(contains,
               run_often(384,
                         [](int t) {
                           t < 128 ? ptx::set_max_registers_down<40>()
                                   : ptx::set_max_registers_up<240>();
                         }),
               "deadlock");
}

// -- wgmma ----------------------------------------------------------------------------------------

uint64_t descriptor(int mode, uint32_t start, uint32_t leading, uint32_t stride) {
  return uint64_t(mode) << 62 | uint64_t(stride >> 4) << 32 | uint64_t(leading >> 4) << 16 |
         start >> 4;
}

// CuTe's Swizzle<bits, 4, 3> acts on bytes, "Exact layout" on elements (PTX ISA, "Canonical
// Layouts", its examples for bf16 and those for tf32 read as pairs of 16-bit elements).
uint32_t swizzled(uint32_t byte, int bits) { return byte ^ (byte >> 7 & ((1u << bits) - 1)) << 4; }

TEST(Wgmma, TheExamplesOfTheIsa) {
  for (int mn = 0; mn < 16; ++mn)
    for (int k = 0; k < 16; ++k) {
      const auto at = [&](int mode, int leading, int stride, bool transposed) {
        return wgmma_element(descriptor(mode, 1024, uint32_t(leading), uint32_t(stride)),
                             transposed, mn, k) -
               1024;
      };
      // Figure 168: MN-major, no swizzle. ((8,1,2),(8,2)):((1,8,64),(8,128)), LBO 128, SBO 64.
      EXPECT_EQ(at(0, 256, 128, true), 2u * (mn % 8 + mn / 8 * 64 + k % 8 * 8 + k / 8 * 128));
    }
  for (int mn = 0; mn < 32; ++mn)
    for (int k = 0; k < 16; ++k) {
      // Figure 169: MN-major, 32 bytes. ((8,2,2),(8,2)):((1,8,128),(16,256)), LBO 128, SBO 256.
      EXPECT_EQ(
          wgmma_element(descriptor(3, 1024, 256, 512), true, mn, k) - 1024,
          swizzled(2u * (mn % 8 + mn / 8 % 2 * 8 + mn / 16 * 128 + k % 8 * 16 + k / 8 * 256), 1));
    }
  for (int mn = 0; mn < 64; ++mn)
    for (int k = 0; k < 16; ++k) {
      // Figure 170: MN-major, 64 bytes. ((8,4,2),(8,2)):((1,8,256),(32,512)), LBO 256, SBO 512.
      EXPECT_EQ(
          wgmma_element(descriptor(2, 1024, 512, 1024), true, mn, k) - 1024,
          swizzled(2u * (mn % 8 + mn / 8 % 4 * 8 + mn / 32 * 256 + k % 8 * 32 + k / 8 * 512), 2));
    }
  // Figures 166 and 167, K-major: tf32 elements are twice as wide, and so are two of ours.
  for (int mn = 0; mn < 16; ++mn)
    for (int k = 0; k < 16; ++k) {
      const int tf32 = k / 2, low = k % 2 * 2;
      // ((8,2),(4,4)):((4,32),(1,64)), LBO 64, SBO 32.
      EXPECT_EQ(wgmma_element(descriptor(0, 1024, 256, 128), false, mn, k) - 1024,
                uint32_t(4 * (mn % 8 * 4 + mn / 8 * 32 + tf32 % 4 + tf32 / 4 * 64) + low));
      // ((8,2),(4,4)):((8,64),(1,4)), SBO 64.
      EXPECT_EQ(
          wgmma_element(descriptor(3, 1024, 16, 256), false, mn, k) - 1024,
          swizzled(uint32_t(4 * (mn % 8 * 8 + mn / 8 * 64 + tf32 % 4 + tf32 / 4 * 4) + low), 1));
    }
}

// d = a b with operands of random numbers, written to shared memory by threads: a where
// wgmma_element() says for each kind of layout, which the test before has tied to the ISA.
template <int n, bool transposed, class T>
std::string multiply(uint64_t seed,
                     void (*wgmma)(float (&)[n / 2], uint64_t, uint64_t, emulator::Site)) {
  Random random(seed);
  std::vector<float> a(64 * 16), b(n * 16);
  const auto draw = [&] { return (float(random.below(64)) - 32) / 16; };
  for (float& v : a) v = draw();
  for (float& v : b) v = draw();
  const uint64_t layout_a = transposed ? ptx::wgmma_layout(128, 1024) : ptx::wgmma_layout(32, 256);
  const uint64_t layout_b = ptx::wgmma_layout(64, 512);
  const uint64_t to_a = ptx::wgmma_descriptor(layout_a, kBase);
  const uint64_t to_b = ptx::wgmma_descriptor(layout_b, kBase + 8192 + 32);  // the second half of K
  return run_often(128, [&](int t) {
    const auto put = [](uint32_t address, float v) {
      *reinterpret_cast<T*>(dynamic_shared() + (address - kBase)) = Numeric<T>::store(v);
    };
    for (int i = t; i < 64 * 16; i += 128)
      put(wgmma_element(to_a, transposed, i / 16, i % 16), a[i]);
    for (int i = t; i < n * 16; i += 128) put(wgmma_element(to_b, false, i / 16, i % 16), b[i]);
    ptx::fence_proxy_async();
    __syncthreads();
    float d[n / 2];
    for (float& v : d) v = 1;
    ptx::wgmma_fence(d);
    wgmma(d, to_a, to_b, emulator::Site::here());
    wgmma(d, to_a, to_b, emulator::Site::here());
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
    for (int i = 0; i < n / 2; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8,
                column = i / 4 * 8 + t % 4 * 2 + i % 2;
      float want = 1;
      for (int k = 0; k < 16; ++k) want += 2 * a[row * 16 + k] * b[column * 16 + k];
      if (d[i] != want)
        emulator::violate("wgmma", emulator::Site::here(), "element " + std::to_string(i));
    }
  });
}

TEST(Wgmma, Multiplies) {
  EXPECT_EQ("", (multiply<64, false, Half>(1, &ptx::wgmma_m64n64k16_half<false>)));
  EXPECT_EQ("", (multiply<64, true, BFloat16>(2, &ptx::wgmma_m64n64k16_bfloat16<true>)));
  EXPECT_EQ("", (multiply<128, true, Half>(3, &ptx::wgmma_m64n128k16_half<true>)));
  EXPECT_EQ("", (multiply<128, false, BFloat16>(4, &ptx::wgmma_m64n128k16_bfloat16<false>)));
  EXPECT_EQ("", (multiply<256, false, Half>(5, &ptx::wgmma_m64n256k16_half<false>)));
  EXPECT_EQ("", (multiply<256, true, BFloat16>(6, &ptx::wgmma_m64n256k16_bfloat16<true>)));
}

TEST(Wgmma, RulesThatAreBroken) {
  const auto with = [](const std::function<void(int, float (&)[32], uint64_t)>& body) {
    return run_often(128, [&](int t) {
      std::memset(dynamic_shared() + t * 128, 0, 128);
      ptx::fence_proxy_async();
      __syncthreads();
      float d[32] = {};
      body(t, d, ptx::wgmma_descriptor(ptx::wgmma_layout(32, 256), kBase));
    });
  };
  const auto multiply = [](float (&d)[32], uint64_t at) {
    ptx::wgmma_m64n64k16_half<false>(d, at, at);
  };
  EXPECT_EQ("", with([&](int, float (&d)[32], uint64_t at) {
              ptx::wgmma_fence(d);
              multiply(d, at);
              multiply(d, at);
              ptx::wgmma_commit();
              ptx::wgmma_wait<0>(d);
              d[0] = 1;
              ptx::wgmma_fence(d);
              multiply(d, at);
              ptx::wgmma_commit();
              ptx::wgmma_wait<0>(d);
            }));
  EXPECT_PRED2(contains, with([&](int, float (&d)[32], uint64_t at) { multiply(d, at); }),
               "without a wgmma_fence");
  EXPECT_PRED2(contains, with([&](int, float (&d)[32], uint64_t at) {
                 ptx::wgmma_fence(d);
                 multiply(d, at);
                 ptx::wgmma_commit();
                 ptx::wgmma_wait<0>(d);
                 d[0] = 1;
                 multiply(d, at);
               }),
               "without a wgmma_fence");
  EXPECT_PRED2(contains, with([&](int, float (&d)[32], uint64_t at) {
                 ptx::wgmma_fence(d);
                 multiply(d, at);
                 ptx::wgmma_commit();
                 d[0] = 1;
                 ptx::wgmma_wait<0>(d);
               }),
               "changed before it was complete");
  EXPECT_PRED2(contains, with([&](int, float (&d)[32], uint64_t at) {
                 ptx::wgmma_fence(d);
                 multiply(d, at);
                 ptx::wgmma_commit();
               }),
               "ended before it was complete");
  EXPECT_PRED2(contains, with([&](int t, float (&d)[32], uint64_t at) {
                 ptx::wgmma_fence(d);
                 multiply(d, t < 32 ? at : ptx::wgmma_advance(at, 512));
               }),
               "different descriptors");
  EXPECT_PRED2(contains, with([&](int, float (&d)[32], uint64_t at) {
                 ptx::wgmma_fence(d);
                 multiply(d, ptx::wgmma_advance(at, 64));
               }),
               "begins within its pattern");
  EXPECT_PRED2(contains, with([&](int, float (&d)[32], uint64_t at) {
                 const uint32_t r[4] = {};
                 if (threadIdx.x < 32)
                   ptx::stmatrix_x4_trans(dynamic_shared() + threadIdx.x * 16, r);
                 __syncthreads();
                 ptx::wgmma_fence(d);
                 multiply(d, at);
                 ptx::wgmma_commit();
                 ptx::wgmma_wait<0>(d);
               }),
               "without a fence_proxy_async");
}

}  // namespace
}  // namespace tetris::cuda
