// How a convolution's images are laid out in lines, and what its tiles fetch for those who store.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv_geometry.h"
#include "cpu/kernels.h"

namespace tetris::cpu {

// How many bytes of L2 lines that are not cut into strips may take: two images of 14x14 pixels with
// 256 channels take a little more than half.
int64_t most_line_bytes();

// What the choice depends on.
struct LineWork {
  int64_t images, groups;
  int threads;                  // that take strips; 1 where they share out block rows
  int64_t in_lines, out_lines;  // that a strip takes in cache
  int64_t products;             // of a group, for each position
  int64_t width;                // of a vector
  int64_t element_bytes;
  int64_t least;  // positions of a strip
  int64_t tile;   // positions that strips are whole multiples of, if L2 decides on them
};

// How many strips to cut lines into: each takes at most half of L2, unless it had less than `least`
// positions. Of the work in_lines, out_lines, width, element_bytes, least and tile count.
int64_t count_strips(const LineGeometry& lines, const LineWork& work);

struct LinePlan {
  int64_t images;  // that share a line
  bool side_by_side;
  int64_t strips;  // of a line

  int64_t batches(const LineWork& work) const { return (work.images - 1) / images + 1; }
};

// The cheaper of: all images behind each other, cut into strips of at most half of L2; or as many
// side by side as take the least time, uncut, because what a tap shifts by is packed for each
// strip. `behind` and `side_by_side` are lines of all images and of any number.
LinePlan plan_lines(const LineGeometry& behind, const LineGeometry& side_by_side,
                    const LineWork& work);

// The outputs for which a tap reads a pixel.
struct TapWindow {
  int64_t rows, columns;
  int64_t positions() const { return rows * columns; }
};
TapWindow tap_window(const ConvShape& shape, int64_t tap);

// Whether a convolution is clearly faster as a sum over its taps, each in its own window. The lines
// of all taps hold zeros as far as the kernel reaches beyond the map, which are multiplied, and
// every strip packs what a tap shifts by: more than the map where a dilation is large. `work` is of
// one image on one thread, with channels of a group.
//
// The choice depends neither on threads nor on the number of images, so that no result does.
bool tap_by_tap(const ConvShape& shape, const LineGeometry& image, const LineWork& work, int64_t in,
                int64_t out);

// How many passes the calling thread's last convolution took: several, tap by tap.
void set_conv_passes(int passes);
int conv_passes();
// For tests: decides for every convolution of more than one tap, in this process.
enum class Taps { kByCost, kTogether, kApart };
void force_taps(Taps taps);

// A run of pixels next to each other, in elements from a channel's first.
struct PixelRun {
  int64_t pixel, count;
};

// The runs that segments, one pixel apart, make up: one for each image, unless their rows are not
// whole. Empty where they are more than `most`.
std::vector<PixelRun> pixel_runs(const std::vector<Segment>& segments, int64_t most);

// What one tile fetches: `count` elements of a channel's run.
struct FetchPart {
  int64_t channel, pixel, count;
};

// Shares the runs of `channels` channels out among tiles. Where there are more tiles than runs,
// several share one; where there are fewer, some runs are left out, and all where it were more than
// half.
std::vector<FetchPart> share_runs(const std::vector<PixelRun>& runs, int64_t channels,
                                  int64_t tiles);

}  // namespace tetris::cpu
