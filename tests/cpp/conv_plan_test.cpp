// Which layout of images in lines is chosen, and what tiles fetch.
#include "cpu/conv_plan.h"

#include <gtest/gtest.h>

#include <vector>

#include "core/cpu_features.h"
#include "cpu/conv_blocks.h"

namespace tetris::test {
namespace {

using cpu::ConvAxis;
using cpu::FetchPart;
using cpu::LineGeometry;
using cpu::LinePlan;
using cpu::LineWork;
using cpu::PixelRun;
using cpu::Segment;

// A 3x3 convolution of square maps with padding 1 and blocks of eight rows, a quarter of them
// stored, in vectors of 16 floats.
struct Layer {
  int64_t images, in, out, pixels;
  int threads = 1, groups = 1, padding = 1;

  LineGeometry lines(bool side_by_side) const {
    const ConvAxis a{pixels, pixels + 2 * padding - 2, 3, 1, padding, 1};
    return {side_by_side ? 1 : images, side_by_side, cpu::sliding_axis(a), cpu::sliding_axis(a)};
  }
  LineWork work() const {
    LineWork w{};
    w.images = images;
    w.groups = groups;
    w.threads = threads;
    w.in_lines = in / groups;
    w.out_lines = 8;
    w.products = in / groups * out / groups * 9 / 4;
    w.width = 16;
    w.element_bytes = 4;
    w.least = w.tile = 48;
    return w;
  }
  LinePlan plan() const { return cpu::plan_lines(lines(false), lines(true), work()); }
};

class Plans : public testing::Test {
 protected:
  void SetUp() override { assume_cache_bytes(32 << 10, 1 << 20); }
  void TearDown() override { assume_cache_bytes(0, 0); }
};

void expect(const LinePlan& plan, bool side_by_side, int64_t images, int64_t strips) {
  EXPECT_EQ(side_by_side, plan.side_by_side);
  EXPECT_EQ(images, plan.images);
  EXPECT_EQ(strips, plan.strips);
}

TEST_F(Plans, SideBySideAsManyAsTakeTheFewestVectors) {
  expect(Layer{8, 512, 512, 7}.plan(), true, 4, 1);   // 2 x 14 vectors; three take 3 x 11
  expect(Layer{8, 256, 256, 14}.plan(), true, 2, 1);  // 4 x 27
  expect(Layer{7, 256, 256, 14}.plan(), true, 1, 1);  // 7 x 14; 4 x 27 would leave room for one
}

TEST_F(Plans, BehindEachOtherWhereAnImageHasToBeCut) {
  // 8 * 57 * 57 - 58 positions; 1696 of 72 lines, and a reach of 132 of 64, take half of L2.
  expect(Layer{8, 64, 64, 56}.plan(), false, 8, 16);
  // 8 * 15 * 15 - 16 positions; 64 of 1032 lines, and a reach of 48 of 1024, but tiles take 48.
  expect(Layer{8, 1024, 512, 14}.plan(), false, 8, 38);
}

TEST_F(Plans, OneImageOrNoRowsOfZeros) {
  expect(Layer{1, 64, 64, 14}.plan(), false, 1, 1);
  Layer layer{4, 8, 8, 14};
  const ConvAxis one{14, 14, 1, 1, 0, 1};
  const LineGeometry lines{4, false, cpu::sliding_axis(one), cpu::sliding_axis(one)};
  EXPECT_FALSE(lines.pads_images());
  expect(cpu::plan_lines(lines, lines, layer.work()), false, 4, 1);
  layer.padding = 0;  // rows that taps reach over lie between images, too
  EXPECT_TRUE(layer.lines(false).pads_images());
  EXPECT_TRUE(layer.plan().side_by_side);
}

TEST_F(Plans, ThreadsGetAsMuch) {
  expect(Layer{8, 256, 256, 14, 4}.plan(), true, 2, 1);
  expect(Layer{8, 256, 256, 14, 8}.plan(), true, 1, 1);
  expect(Layer{8, 256, 256, 14, 7}.plan(), false, 8, 7);  // eight of anything would take two rounds
  expect(Layer{8, 256, 256, 14, 64}.plan(), false, 8, 64);
}

TEST_F(Plans, NoStripIsShorterThanTheLeast) {
  for (int64_t in : {16, 256, 1024, 4096, 100000})
    for (int64_t pixels : {1, 3, 7, 14, 30})
      for (int threads : {1, 3}) {
        const Layer layer{5, in, 64, pixels, threads};
        const LinePlan plan = layer.plan();
        const auto lines = layer.lines(plan.side_by_side);
        const int64_t length = lines.length(plan.images);
        ASSERT_GE(plan.strips, 1);
        ASSERT_LE(plan.strips, (length + 15) / 16);
        if (plan.side_by_side) {
          ASSERT_EQ(1, plan.strips);
        }
        if (threads == 1) {
          ASSERT_LE((plan.strips - 1) * layer.work().least, length) << in << " " << pixels;
        }
      }
}

// A 3x3 convolution that keeps the size; a share of `1 / kept` is stored.
bool by_taps(int64_t channels, int64_t pixels, int64_t dilation, int64_t kept = 4) {
  const ConvAxis a{pixels, pixels, 3, 1, dilation, dilation};
  const LineGeometry image{1, false, cpu::sliding_axis(a), cpu::sliding_axis(a)};
  LineWork w{};
  w.images = w.groups = w.threads = 1;
  w.in_lines = channels;
  w.out_lines = 8;
  w.products = channels * channels * 9 / kept;
  w.width = 16;
  w.element_bytes = 4;
  w.least = w.tile = 48;
  return cpu::tap_by_tap({1, a, a}, image, w, channels, channels);
}

TEST_F(Plans, TapByTapWhereTheKernelReachesFar) {
  for (int64_t pixels : {7, 14, 28, 56, 112})
    for (int64_t channels : {64, 256, 512}) EXPECT_FALSE(by_taps(channels, pixels, 1)) << pixels;
  EXPECT_FALSE(by_taps(512, 28, 2, 10));
  for (int64_t dilation : {12, 18, 24, 36})
    for (int64_t kept : {2, 10}) EXPECT_TRUE(by_taps(2048, 33, dilation, kept)) << dilation;
  EXPECT_TRUE(by_taps(64, 112, 16));
}

TEST(PixelRuns, OneOfEachImage) {
  // two images of 2x3 pixels side by side in pitches of 4, 100 elements apart
  const std::vector<Segment> segments{{0, 3, 0}, {4, 3, 100}, {8, 3, 3}, {12, 3, 103}};
  const auto runs = cpu::pixel_runs(segments, 2);
  ASSERT_EQ(2u, runs.size());
  EXPECT_EQ(0, runs[0].pixel);
  EXPECT_EQ(6, runs[0].count);
  EXPECT_EQ(100, runs[1].pixel);
  EXPECT_EQ(6, runs[1].count);
  EXPECT_TRUE(cpu::pixel_runs(segments, 1).empty());
  EXPECT_TRUE(cpu::pixel_runs({}, 1).empty());
}

TEST(ShareRuns, TilesCoverEachRunOnce) {
  const std::vector<PixelRun> runs{{10, 196}, {1010, 50}, {2010, 1}};
  for (int64_t channels : {0, 1, 8})
    for (int64_t tiles : {0, 1, 5, 12, 24, 25, 100}) {
      const auto parts = cpu::share_runs(runs, channels, tiles);
      const bool some = channels > 0 && 2 * tiles >= channels * 3;
      ASSERT_EQ(some ? tiles : 0, static_cast<int64_t>(parts.size()));
      std::vector<std::vector<int>> seen(channels, std::vector<int>(3000));
      for (const FetchPart& part : parts) {
        ASSERT_GE(part.channel, 0);
        ASSERT_LT(part.channel, channels);
        for (int64_t i = 0; i < part.count; ++i) ++seen[part.channel][part.pixel + i];
      }
      const bool all = tiles >= channels * 3;
      for (const auto& pixels : seen)
        for (int64_t i = 0; i < 3000; ++i) {
          bool stored = false;
          for (const PixelRun& run : runs) stored |= i >= run.pixel && i < run.pixel + run.count;
          ASSERT_LE(pixels[i], stored);
          if (all) {
            ASSERT_EQ(pixels[i], stored) << i << " tiles " << tiles;
          }
        }
    }
}

TEST(ConvBlocks, CountsOnePhaseOfOneGroup) {
  // Four rows, two of each group; each stores 10 blocks: of phase 0 the first 1, 9, 4 and 0.
  const int32_t begin[] = {0, 10, 20, 30}, middle[] = {1, 19, 24, 30}, end[] = {10, 20, 30, 40};
  const int32_t* const cuts[] = {begin, middle, end};
  cpu::ConvBlocks<float> blocks{};
  blocks.rows = 2;
  blocks.phases = 2;
  blocks.begin = cuts;
  blocks.end = cuts + 1;
  EXPECT_EQ(blocks.row_ptr(0, 0), (std::vector<int32_t>{0, 1, 10}));
  EXPECT_EQ(blocks.row_ptr(1, 0), (std::vector<int32_t>{0, 9, 10}));
  EXPECT_EQ(blocks.row_ptr(0, 1), (std::vector<int32_t>{0, 4, 4}));
  EXPECT_EQ(blocks.row_ptr(1, 1), (std::vector<int32_t>{0, 6, 16}));
}

}  // namespace
}  // namespace tetris::test
