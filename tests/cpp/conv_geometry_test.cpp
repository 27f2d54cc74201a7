// Every tap of every output pixel reads its source pixel from the lines, or a zero: by brute force.
#include "cpu/conv_geometry.h"

#include <gtest/gtest.h>

#include <map>
#include <string>

namespace tetris::test {
namespace {

using cpu::ConvAxis;
using cpu::ConvShape;
using cpu::LineGeometry;
using cpu::MapStrides;
using cpu::Segment;

constexpr int64_t kZero = -1;

LineGeometry geometry(const ConvShape& s, bool transposed, bool side_by_side = false,
                      int64_t room = 0) {
  const int64_t images = s.images + room;
  if (transposed)
    return {images, side_by_side, cpu::transposed_axis(s.y), cpu::transposed_axis(s.x)};
  return {images, side_by_side, cpu::sliding_axis(s.y), cpu::sliding_axis(s.x)};
}

LineGeometry geometry_of_tap(const ConvShape& s, bool transposed, bool side_by_side, int64_t room,
                             int64_t tap, bool every_output) {
  return {s.images + room, side_by_side,
          cpu::tap_axis(s.y, transposed, tap / s.x.kernel, every_output),
          cpu::tap_axis(s.x, transposed, tap % s.x.kernel, every_output)};
}

// Where the pixel lies that output o reads at tap k, or kZero.
int64_t source_of(const ConvAxis& a, bool transposed, int64_t o, int64_t k) {
  if (!transposed) {
    const int64_t i = o * a.stride - a.pad + k * a.dilation;
    return i >= 0 && i < a.big ? i : kZero;
  }
  const int64_t scaled = o + a.pad - k * a.dilation;
  return scaled >= 0 && scaled % a.stride == 0 && scaled / a.stride < a.small ? scaled / a.stride
                                                                              : kZero;
}

std::string name(const ConvAxis& a) {
  return "[" + std::to_string(a.big) + " to " + std::to_string(a.small) + " k" +
         std::to_string(a.kernel) + " s" + std::to_string(a.stride) + " p" + std::to_string(a.pad) +
         " d" + std::to_string(a.dilation) + "]";
}

// Pixels by position. A position that holds two is a collision.
using Line = std::map<int64_t, int64_t>;

void place(const std::vector<Segment>& segments, int64_t begin, int64_t end, int64_t step,
           Line& line) {
  int64_t at = begin;
  for (const Segment& s : segments) {
    ASSERT_GT(s.count, 0);
    ASSERT_GE(begin + s.line, at) << "segments must ascend and not overlap";
    at = begin + s.line + s.count;
    ASSERT_LE(at, end);
    for (int64_t i = 0; i < s.count; ++i) line[begin + s.line + i] = s.pixel + i * step;
  }
}

struct Maps {
  int64_t height, width;
  int64_t channels;  // > 1: next to each other
  MapStrides strides() const { return {height * width * channels, 1, channels}; }
  int64_t at(int64_t image, int64_t y, int64_t x) const {
    return ((image * height + y) * width + x) * channels;
  }
};

// Which taps a geometry is of, and of which outputs.
constexpr int64_t kAllTaps = -1;
struct Taps {
  int64_t tap = kAllTaps;
  bool every_output = true;
};

// Cuts the lines into strips of `strip` positions, as the kernels do; they have room for `room`
// more images.
void check(const ConvShape& s, bool transposed, int64_t strip, bool side_by_side, int64_t room = 0,
           Taps taps = {}) {
  SCOPED_TRACE(name(s.y) + name(s.x) + (transposed ? " transposed" : "") + " images " +
               std::to_string(s.images) + " + " + std::to_string(room) +
               (side_by_side ? " side by side" : "") + " strip " + std::to_string(strip) + " tap " +
               std::to_string(taps.tap) + (taps.every_output ? "" : " alone"));
  const LineGeometry lines =
      taps.tap == kAllTaps
          ? geometry(s, transposed, side_by_side, room)
          : geometry_of_tap(s, transposed, side_by_side, room, taps.tap, taps.every_output);
  const Maps big{s.y.big, s.x.big, 3}, small{s.y.small, s.x.small, 3};
  const Maps &source = transposed ? small : big, &out = transposed ? big : small;
  ASSERT_EQ(s.y.kernel * s.x.kernel, lines.taps());
  const int64_t length = lines.length();
  if (strip == 0) strip = length;

  std::map<int64_t, int> written;  // output pixels
  std::vector<Segment> segments;
  for (int64_t begin = 0; begin < length; begin += strip) {
    const int64_t end = std::min(length, begin + strip), reach = end + lines.max_shift();
    std::vector<Line> planes(lines.planes());
    for (int64_t p = 0; p < lines.planes(); ++p) {
      lines.source_segments(p, begin, reach, source.strides(), s.images, segments);
      ASSERT_NO_FATAL_FAILURE(
          place(segments, begin, reach, lines.source_step(source.strides()), planes[p]));
    }
    for (int64_t phase = 0; phase < lines.phases(); ++phase) {
      Line pixels;
      lines.out_segments(phase, begin, end, out.strides(), s.images, segments);
      ASSERT_NO_FATAL_FAILURE(place(segments, begin, end, lines.out_step(out.strides()), pixels));
      for (const auto& [position, pixel] : pixels) {
        ++written[pixel];
        ASSERT_EQ(0, pixel % out.channels);
        const int64_t p = pixel / out.channels, ox = p % out.width, oy = p / out.width % out.height,
                      image = p / out.width / out.height;
        for (int64_t tap = 0; tap < lines.taps(); ++tap) {
          if (taps.tap != kAllTaps && tap != taps.tap) {
            ASSERT_EQ(-1, lines.phase(tap)) << "tap " << tap;
            continue;
          }
          const int64_t sy = source_of(s.y, transposed, oy, tap / s.x.kernel);
          const int64_t sx = source_of(s.x, transposed, ox, tap % s.x.kernel);
          const int64_t want = sy == kZero || sx == kZero ? kZero : source.at(image, sy, sx);
          if (lines.phase(tap) != phase) {  // this tap is not applied to the phase's pixels
            ASSERT_EQ(kZero, want) << "pixel " << pixel << " misses tap " << tap;
            continue;
          }
          ASSERT_GE(lines.shift(tap), 0);
          ASSERT_LE(lines.shift(tap), lines.max_shift());
          const Line& line = planes[lines.plane(tap)];
          const auto found = line.find(position + lines.shift(tap));
          ASSERT_EQ(want, found == line.end() ? kZero : found->second)
              << "image " << image << " output " << oy << "," << ox << " tap " << tap;
        }
      }
    }
  }
  // Every output pixel, or those for which the tap reads one, once.
  int64_t outputs = out.height * out.width;
  if (!taps.every_output) {
    const auto count = [&](const ConvAxis& a, int64_t size, int64_t tap) {
      int64_t n = 0;
      for (int64_t o = 0; o < size; ++o) n += source_of(a, transposed, o, tap) != kZero;
      EXPECT_EQ(n, cpu::tap_pixels(a, tap).count());
      return n;
    };
    outputs = count(s.y, out.height, taps.tap / s.x.kernel) *
              count(s.x, out.width, taps.tap % s.x.kernel);
  }
  ASSERT_EQ(s.images * outputs, static_cast<int64_t>(written.size()));
  for (const auto& [pixel, times] : written) {
    ASSERT_EQ(1, times) << pixel;
    ASSERT_LT(pixel, s.images * out.height * out.width * out.channels);
  }
}

// All axes with these parameters that a convolution can have. For a transposed one also those whose
// output_padding lies beyond the stride: fewer small pixels than the convolution would give.
std::vector<ConvAxis> axes(bool transposed, std::initializer_list<int64_t> bigs,
                           std::initializer_list<int64_t> kernels,
                           std::initializer_list<int64_t> strides,
                           std::initializer_list<int64_t> pads,
                           std::initializer_list<int64_t> dilations) {
  std::vector<ConvAxis> result;
  for (int64_t big : bigs)
    for (int64_t kernel : kernels)
      for (int64_t stride : strides)
        for (int64_t pad : pads)
          for (int64_t dilation : dilations) {
            const int64_t room = big + 2 * pad - dilation * (kernel - 1) - 1;
            if (room < 0) continue;
            const int64_t small = room / stride + 1;
            result.push_back({big, small, kernel, stride, pad, dilation});
            if (transposed && dilation > stride && small > 1)
              result.push_back({big, small - 1, kernel, stride, pad, dilation});
          }
  return result;
}

class Geometry : public testing::TestWithParam<bool> {};

TEST_P(Geometry, EveryTapOfEveryPixelAlongOneAxis) {
  const ConvAxis one{2, 2, 1, 1, 0, 1};
  for (const ConvAxis& a : axes(GetParam(), {1, 2, 3, 5, 8, 12}, {1, 2, 3, 4, 5}, {1, 2, 3, 5, 7},
                                {0, 1, 2, 3, 6, 9}, {1, 2, 3, 4})) {
    for (bool side_by_side : {false, true})
      for (int64_t room : {0, 1}) {
        check({2, one, a}, GetParam(), 0, side_by_side, room);
        check({2, a, one}, GetParam(), 0, side_by_side, room);
        if (testing::Test::HasFatalFailure()) return;
      }
  }
}

TEST_P(Geometry, BothAxesInStrips) {
  const auto some = axes(GetParam(), {1, 4, 7}, {1, 3, 4}, {1, 2, 3}, {0, 1, 5}, {1, 3});
  // Pairs of different axes: each with the one that a stride coprime to the number of them reaches.
  for (size_t i = 0; i < some.size(); ++i)
    for (int64_t strip : {1, 5, 16, 0}) {
      for (bool side_by_side : {false, true})
        check({3, some[i], some[(7 * i + 3) % some.size()]}, GetParam(), strip, side_by_side,
              i % 3);
      if (testing::Test::HasFatalFailure()) return;
    }
}

TEST_P(Geometry, OneTapAlone) {
  const auto some = axes(GetParam(), {1, 4, 7}, {1, 3, 4}, {1, 2, 3}, {0, 1, 5, 9}, {1, 3, 8});
  for (size_t i = 0; i < some.size(); ++i) {
    const ConvShape s{2, some[i], some[(7 * i + 3) % some.size()]};
    for (int64_t tap = 0; tap < s.y.kernel * s.x.kernel; ++tap)
      for (bool every_output : {false, true})
        for (bool side_by_side : {false, true})
          check(s, GetParam(), tap % 3 * 4, side_by_side, i % 2, {tap, every_output});
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST_P(Geometry, NoImages) {
  const ConvAxis a{5, 5, 3, 1, 1, 1};
  EXPECT_EQ(0, geometry({0, a, a}, GetParam()).length());
}

TEST_P(Geometry, LinesOfPixelsWithoutPaddingAreOneSegment) {
  const ConvAxis one{4, 4, 1, 1, 0, 1};
  const LineGeometry lines = geometry({1, one, one}, GetParam());
  std::vector<Segment> segments;
  lines.source_segments(0, 0, lines.length(), {16, 16, 1}, 1, segments);
  ASSERT_EQ(1u, segments.size());  // a 1x1 convolution copies whole maps
  EXPECT_EQ(16, segments[0].count);
  EXPECT_EQ(16, lines.length());
}

// A row of zeros above and one below, once: not between images.
TEST(Lines, OfImagesSideBySide) {
  const ConvAxis a{7, 7, 3, 1, 1, 1};
  const LineGeometry behind = geometry({4, a, a}, false), side = geometry({4, a, a}, false, true);
  EXPECT_TRUE(behind.pads_images());
  EXPECT_EQ((4 * 8 - 1) * 8 - 1, behind.length());
  EXPECT_EQ(2 * 8 + 2, behind.max_shift());
  EXPECT_EQ(4 * 7 * 8 - 1, side.length());
  EXPECT_EQ(2 * 4 * 8 + 2, side.max_shift());
  EXPECT_EQ(side.length(1), behind.length(1));
}

INSTANTIATE_TEST_SUITE_P(, Geometry, testing::Values(false, true),
                         [](const auto& info) { return info.param ? "Transposed" : "Sliding"; });

}  // namespace
}  // namespace tetris::test
