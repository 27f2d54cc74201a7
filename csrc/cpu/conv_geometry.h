// How a convolution becomes shifted reads of lines.
//
// Each channel is one line: row after row, with as many zeros between rows as padding reads.
//
//     row 0 of the map     row 1                          pitch: from row to row
//     . a b c d            . e f g h           . i j ..   . = zero, shared by the end of one row
//     |____ pitch ____|                                       and the beginning of the next
//
// Images share a line behind each other, with rows of zeros between them, or side by side: row 0 of
// each, then row 1 of each. Zeros above and below then stand at the line's ends alone, but what a
// tap shifts by grows with the images.
//
// An output pixel has the position in the line that its row and column give, and kernel position
// (tap) k reads it `shift` further on, whatever the pixel: a run of output pixels times a weight is
// a run of the line, shifted. Where rows of the output are shorter than the pitch, runs compute a
// few pixels that do not exist; they are dropped when the result is stored.
//
// A stride s splits a map into s planes per axis, of every s-th column (row): again each tap reads
// one plane, shifted. A transposed convolution has one plane and splits the *output* into phases,
// each of which sees the taps that hit it.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace tetris::cpu {

// One axis of the convolution that maps `big` to `small` pixels. A transposed convolution is
// described by the convolution that it is the transpose of.
struct ConvAxis {
  int64_t big, small, kernel, stride, pad, dilation;
};

struct ConvShape {
  int64_t images;
  ConvAxis y, x;
};

// Where the pixels of a feature map lie, in elements. Rows are width * pixel apart.
struct MapStrides {
  int64_t image, channel, pixel;
};

// One axis of the lines.
struct LineAxis {
  struct Phase {
    int64_t begin, step, count;  // output index of column j in [0, count): begin + j * step
    std::vector<int> taps;
  };
  struct Plane {
    int64_t begin;        // source index of column u: begin + u * source_step
    int64_t first, last;  // columns that hold a source pixel which is read
  };
  int64_t source, source_step, out, pitch = 0;
  int64_t count = 0;  // columns of the longest phase
  std::vector<Phase> phases;
  std::vector<Plane> planes;
  std::vector<int> plane_of;   // [taps]
  std::vector<int64_t> shift;  // [taps]
};

// From `big` to `small`.
//
// Tried: a plane for each column of the kernel, moved into place, so that no column is wasted. It
// takes kernel times the memory: 3x3, 14x14 pixels, 256 channels, 10 % kept 154 GFLOP/s instead of
// 178; 7x7 pixels of 8 images, 512 channels, half kept 198 instead of 177, a quarter 184 and 177.
LineAxis sliding_axis(const ConvAxis& axis);
// From `small` to `big`.
LineAxis transposed_axis(const ConvAxis& axis);
// The small map's pixels which a tap connects with one of the big map.
struct PixelRange {
  int64_t first, last;
  int64_t count() const { return last < first ? 0 : last - first + 1; }
};
PixelRange tap_pixels(const ConvAxis& axis, int64_t tap);
// One tap of either alone, not shifted: at every output, or at those where it reads a pixel. No
// other tap hits any.
LineAxis tap_axis(const ConvAxis& axis, bool transposed, int64_t tap, bool every_output);

// Both axes together: lines of length(), `planes()` of them for each channel, for images() each.
class LineGeometry {
 public:
  LineGeometry(int64_t images, bool side_by_side, LineAxis y, LineAxis x);

  int64_t images() const { return images_; }
  // Whether images behind each other have rows of zeros between them.
  bool pads_images() const { return y_.pitch > y_.count; }
  int64_t planes() const { return static_cast<int64_t>(y_.planes.size() * x_.planes.size()); }
  int64_t phases() const { return static_cast<int64_t>(y_.phases.size() * x_.phases.size()); }
  int64_t length() const { return length_; }  // positions that hold an output pixel: [0, length)
  int64_t max_shift() const { return max_shift_; }  // positions that are read: + max_shift
  int64_t length(int64_t images) const;             // of lines for so many images
  int64_t max_shift(int64_t images) const;
  int64_t taps() const { return static_cast<int64_t>(y_.shift.size() * x_.shift.size()); }
  int64_t plane(int64_t tap) const;
  int64_t shift(int64_t tap) const;
  int64_t phase(int64_t tap) const;  // -1: it hits no output pixel

  // The source pixels in positions [begin, end) of a plane's line; line counts from `begin`. Of the
  // images only the first `present` are there.
  void source_segments(int64_t plane, int64_t begin, int64_t end, const MapStrides& map,
                       int64_t present, std::vector<Segment>& segments) const;
  // The output pixels of a phase in positions [begin, end).
  void out_segments(int64_t phase, int64_t begin, int64_t end, const MapStrides& map,
                    int64_t present, std::vector<Segment>& segments) const;
  // Between pixels of a segment.
  int64_t source_step(const MapStrides& map) const { return x_.source_step * map.pixel; }
  int64_t out_step(const MapStrides& map) const { return x_.phases[0].step * map.pixel; }

 private:
  struct Row {
    int64_t image, y;
  };
  Row row(int64_t i) const;                 // at the line's i-th pitch
  int64_t row_pitch(int64_t images) const;  // between rows of an image

  int64_t images_;
  bool side_by_side_;
  LineAxis y_, x_;
  int64_t row_pitch_, length_, max_shift_;  // for images_
};

}  // namespace tetris::cpu
