// Lines of a convolution in memory: how long, where, and packed from a map.
#pragma once

#include <limits>
#include <string>
#include <vector>

#include "cpu/conv.h"
#include "cpu/walk.h"

namespace tetris::cpu {

// The element offset of each column group's first line: tap by tap, group by group.
inline std::vector<int32_t> column_offsets(const LineGeometry& lines, int64_t in_groups, int64_t bi,
                                           int64_t channels, int64_t stride) {
  std::vector<int32_t> offsets(lines.taps() * in_groups);
  for (int64_t tap = 0; tap < lines.taps(); ++tap) {
    const int64_t first = lines.plane(tap) * channels * stride + lines.shift(tap);
    for (int64_t g = 0; g < in_groups; ++g)
      offsets[tap * in_groups + g] = static_cast<int32_t>(first + g * bi * stride);
  }
  return offsets;
}

// The same where the map itself serves as lines, `stride` from channel to channel. channel_of says
// which one a slot is (nullptr: its number), for blocks one channel wide.
inline std::vector<int32_t> column_offsets_in_place(int64_t in_groups, int64_t bi,
                                                    const int32_t* channel_of, int64_t stride) {
  std::vector<int32_t> offsets(in_groups);
  for (int64_t g = 0; g < in_groups; ++g)
    offsets[g] = static_cast<int32_t>((channel_of ? channel_of[g] : g * bi) * stride);
  return offsets;
}

// Numbers from one line to the next: room for a vector that starts in it, and an odd number of
// cache lines, so that lines do not fall into the same sets of a cache.
template <class T>
int64_t line_stride(const KernelTable<T>& k, int64_t length) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return (ceil_div(length + k.width, kLine) | 1) * kLine;
}

// Offsets into the lines of one strip are 32 bits wide. A strip is at least `least` positions long.
inline std::string check_reach(int64_t count, int64_t max_shift, int64_t least) {
  constexpr int64_t kRoom = 128;  // more than line_stride adds
  if (count <= std::numeric_limits<int32_t>::max() / (max_shift + least + kRoom)) return {};
  return "input channels times the pixels that the kernel reaches over must be less than 2^31 "
         "(got " +
         std::to_string(count) + " and " + std::to_string(max_shift + least) + ")";
}

// The images of a batch that a line holds.
struct ImageRange {
  int64_t first, count;
};

// What a convolution reads and writes, with so many channels in all groups.
template <class T>
int64_t map_bytes(const ConvShape& shape, bool transposed, int64_t in, int64_t out, bool residual) {
  const int64_t big = shape.y.big * shape.x.big, small = shape.y.small * shape.x.small;
  const int64_t read = in * (transposed ? small : big), written = out * (transposed ? big : small);
  return shape.images * (read + written + residual * written) * static_cast<int64_t>(sizeof(T));
}

// One group's channels of a map, packed into lines: planes of `channels` lines each.
template <class T>
void pack_planes(const KernelTable<T>& k, const LineGeometry& lines, FeatureMap<const T> x,
                 ImageRange images, int64_t first_channel, int64_t begin, int64_t end,
                 const int32_t* line_of, int64_t channels, int64_t position, int64_t length,
                 T* planes, int64_t stride, bool fetch) {
  std::vector<Segment> segments;
  for (int64_t p = 0; p < lines.planes(); ++p) {
    lines.source_segments(p, position, position + length, x.strides, images.count, segments);
    LineArgs<T> a{};
    a.segments = segments.data();
    a.segment_count = segments.size();
    a.begin = begin;
    a.end = end;
    a.line_of = line_of;
    a.lines = planes + p * channels * stride;
    a.line_stride = stride;
    a.length = length;
    a.in = x.data + images.first * x.strides.image + first_channel * x.strides.channel;
    a.channel_stride = x.strides.channel;
    a.step = lines.source_step(x.strides);
    a.fetch = fetch;
    k.pack_lines(a);
  }
}

// Whether the channels of an image already are lines: pixels next to each other, one kernel
// position (a transposed convolution may have others, which hit no pixel) and no shift. Not where
// channels lie so that they share few sets of a cache.
template <class T>
bool map_is_lines(const LineGeometry& lines, const MapStrides& map, int64_t channels) {
  constexpr int64_t kSharedSets = 512;  // bytes
  std::vector<Segment> segments;
  if (lines.taps() != 1 || map.pixel != 1 || lines.planes() != 1 || lines.phases() != 1 ||
      lines.max_shift() != 0 || map.channel < lines.length() ||
      map.channel * static_cast<int64_t>(sizeof(T)) % kSharedSets == 0 ||
      map.channel * channels > std::numeric_limits<int32_t>::max())
    return false;
  lines.source_segments(0, 0, lines.length(), map, lines.images(), segments);
  return segments.size() == 1 && segments[0].count == lines.length() && segments[0].pixel == 0 &&
         lines.source_step(map) == 1;
}

// Both axes of a convolution, or of one of its taps.
struct LineAxes {
  LineAxis y, x;
  LineGeometry lines(int64_t images, bool side_by_side) const {
    return {images, side_by_side, y, x};
  }
};

inline LineAxes line_axes(const ConvShape& shape, bool transposed) {
  if (transposed) return {transposed_axis(shape.y), transposed_axis(shape.x)};
  return {sliding_axis(shape.y), sliding_axis(shape.x)};
}

inline LineAxes tap_axes(const ConvShape& shape, bool transposed, int64_t tap, bool every_output) {
  return {tap_axis(shape.y, transposed, tap / shape.x.kernel, every_output),
          tap_axis(shape.x, transposed, tap % shape.x.kernel, every_output)};
}

}  // namespace tetris::cpu
