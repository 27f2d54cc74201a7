#include <algorithm>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "core/cpu_features.h"
#include "cpu/conv.h"
#include "cpu/conv_blocks.h"
#include "cpu/conv_lines.h"
#include "cpu/conv_plan.h"
#include "cpu/dispatch.h"
#include "cpu/walk.h"

namespace tetris::cpu {
namespace {

// What the passes of a call share. Rows of the layout are channels of the small map, columns of the
// big one, or, `transposed`, the reverse.
template <class T>
struct GradCall {
  const KernelTable<T>& k;
  const BlockSparseView& w;
  const Inverses& inverse;
  bool transposed;
  int64_t images;
  FeatureMap<const T> big, small;
  T* dvalues;
  bool fetch;
  const Parallel& parallel;

  int64_t big_channels() const { return transposed ? w.group_out() : w.group_in(); }
  int64_t small_channels() const { return transposed ? w.group_in() : w.group_out(); }
  LineWork work(int64_t planes) const {
    LineWork work{};
    work.images = work.threads = 1;
    work.groups = w.groups;
    work.in_lines = planes * big_channels();
    work.out_lines = small_channels();
    work.products = w.nnzb * w.bo * w.bi / w.groups;
    work.width = k.width;
    work.element_bytes = sizeof(T);
    work.least = 128 / k.width * k.width;
    work.tile = k.width;
    return work;
  }
};

// The gradient of one phase's blocks, at the small map's pixels that the lines have.
template <class T>
std::string run_pass(const GradCall<T>& call, const LineGeometry& lines,
                     const ConvBlocks<T>& blocks, int64_t phase) {
  const KernelTable<T>& k = call.k;
  const BlockSparseView& w = call.w;
  const bool transposed = call.transposed;
  const int64_t out = w.group_out(), in = w.group_in(), in_groups = w.in_groups();
  const int64_t big_channels = call.big_channels(), small_channels = call.small_channels();
  const int32_t* const big_lines = transposed ? call.inverse.row : call.inverse.col;
  const int32_t* const small_lines = transposed ? call.inverse.col : call.inverse.row;
  const LineWork work = call.work(lines.planes());
  std::string error = check_reach(work.in_lines, lines.max_shift(), work.least);
  if (!error.empty()) return error;
  const int64_t strips = count_strips(lines, work);
  const int64_t strip = ceil_div(ceil_div(lines.length(), strips), k.width) * k.width;
  const int64_t big_stride = line_stride(k, strip + lines.max_shift());
  const int64_t small_stride = line_stride(k, strip);
  const int threads = useful_threads(call.parallel, w.nnzb * w.bo * w.bi * lines.length());
  T* const bigs = scratch<T>(ScratchSlot::kX, lines.planes() * big_channels * big_stride);
  T* const smalls = scratch<T>(ScratchSlot::kY, small_channels * small_stride);
  const auto offsets = column_offsets(lines, in_groups, w.bi, big_channels, big_stride);
  const Sampler<T>& kernel = k.samplers[0];  // the one that takes masks
  std::vector<Segment> segments;
  // Between rows of pixels there are positions of none: the small lines hold zeros there, but the
  // big ones are read at real pixels, and 0 * Inf is not zero.
  T* const mask = scratch<T>(ScratchSlot::kVector, strip);
  const auto range = [&](int64_t n, int t) { return share_begin(n, k.width, t, threads); };

  for (int64_t group = 0; group < w.groups; ++group) {
    const int32_t* const row_begin = blocks.begin[phase] + group * w.group_rows();
    const int32_t* const row_end = blocks.end[phase] + group * w.group_rows();
    const auto bounds = split_rows(blocks.row_ptr(phase, group).data(), w.group_rows(), threads);
    for (int64_t s = 0; s * strip < lines.length(); ++s) {
      const int64_t begin = s * strip, end = std::min(lines.length(), begin + strip);
      lines.out_segments(0, begin, end, call.small.strides, call.images, segments);
      std::fill_n(mask, strip, T(0));
      for (const Segment& segment : segments)
        std::memset(mask + segment.line, 0xff, segment.count * sizeof(T));
      run(call.parallel, threads, [&](int t) {
        const int64_t first_big = group * big_channels, first_small = group * small_channels;
        pack_planes(k, lines, call.big, {0, call.images}, first_big, range(big_channels, t),
                    range(big_channels, t + 1), big_lines ? big_lines + first_big : nullptr,
                    big_channels, begin, strip + lines.max_shift(), bigs, big_stride, call.fetch);
        LineArgs<T> a{};
        a.segments = segments.data();
        a.segment_count = segments.size();
        a.begin = range(small_channels, t);
        a.end = range(small_channels, t + 1);
        a.line_of = small_lines ? small_lines + first_small : nullptr;
        a.lines = smalls;
        a.line_stride = small_stride;
        a.length = strip;
        a.in = call.small.data + first_small * call.small.strides.channel;
        a.channel_stride = call.small.strides.channel;
        a.step = lines.out_step(call.small.strides);
        a.fetch = call.fetch;
        k.pack_lines(a);
      });
      run(call.parallel, threads, [&](int t) {
        for (int64_t row = bounds[t]; row < bounds[t + 1]; ++row) {
          const int64_t first = row_begin[row], last = row_end[row];
          int64_t* const at = scratch<int64_t>(ScratchSlot::kLists, 2 * (last - first) * w.bi);
          int64_t* const inputs = at + (last - first) * w.bi;
          SampleArgs<T> a{};
          a.nv = strip / k.width;
          a.inputs = inputs;
          a.offsets = at;
          a.rows = std::min(w.bo, out - row * w.bo);
          a.dvalues = call.dvalues;
          a.accumulate = s > 0;
          a.mask = mask;
          a.mask_dy = transposed;
          // All blocks of the row at once, or, where the rows are what a tap shifts, tap by tap.
          for (int64_t b = first; b < last;) {
            const int64_t tap = w.col_idx[b] / in_groups;
            a.count = 0;
            for (; b < last && (!transposed || w.col_idx[b] / in_groups == tap); ++b) {
              const int64_t g = w.col_idx[b] % in_groups;
              for (int64_t j = 0; j < w.bi && g * w.bi + j < in; ++j) {
                inputs[a.count] = transposed ? (g * w.bi + j) * small_stride
                                             : offsets[w.col_idx[b]] + j * big_stride;
                at[a.count++] = (b * w.bi + j) * w.bo;
              }
            }
            if (transposed) {
              a.x = smalls;
              a.dy = bigs + (lines.plane(tap) * big_channels + row * w.bo) * big_stride +
                     lines.shift(tap);
              a.dy_stride = big_stride;
            } else {
              a.x = bigs;
              a.dy = smalls + row * w.bo * small_stride;
              a.dy_stride = small_stride;
            }
            kernel.run(a);
          }
        }
      });
    }
  }
  set_last_kernel(kernel.name);
  return {};
}

}  // namespace

template <class T>
std::string conv_grad_values(const BlockSparseView& w, const ConvShape& shape, bool transposed,
                             FeatureMap<const T> big, FeatureMap<const T> small, T* dvalues,
                             const Parallel& parallel) {
  const auto& k = kernels<T>();
  Inverses inverse;
  std::string error = check_and_invert(w, &inverse);
  if (error.empty()) error = check_col_idx(w, 0, w.block_rows());
  if (!error.empty()) return error;
  const bool fetch = map_bytes<T>(shape, false, transposed ? w.out : w.in,
                                  transposed ? w.in : w.out, false) > l2_cache_bytes();
  const GradCall<T> call{k,   w,     inverse, transposed, shape.images,
                         big, small, dvalues, fetch,      parallel};
  const LineAxes axes = line_axes(shape, /*transposed=*/false);
  const LineGeometry image = axes.lines(1, false);
  const bool empty = shape.images == 0 || image.length() == 0;
  const bool apart = !empty && tap_by_tap(shape, image, call.work(image.planes()),
                                          call.big_channels(), call.small_channels());
  // Entries outside the weight stay zero, and so do those of taps that read no pixel.
  if (empty || apart || w.group_out() % w.bo != 0 || w.group_in() % w.bi != 0)
    std::fill_n(dvalues, w.nnzb * w.bi * w.bo, T(0));
  if (empty) return {};

  // Side by side, images gained nothing here.
  if (!apart) {
    set_conv_passes(1);
    const TapPhases together{std::vector<int64_t>(w.taps), 1};
    return run_pass(call, axes.lines(shape.images, false),
                    conv_blocks<T>(w, dvalues, together, false), 0);
  }
  const ConvBlocks<T> blocks = conv_blocks<T>(w, dvalues, phase_for_each_tap(w.taps), false);
  int passes = 0;
  for (int64_t tap = 0; tap < w.taps && error.empty(); ++tap)
    if (tap_window(shape, tap).positions() > 0) {
      error = run_pass(call, tap_axes(shape, false, tap, false).lines(shape.images, false), blocks,
                       tap);
      ++passes;
    }
  set_conv_passes(passes);
  return error;
}

template std::string conv_grad_values<float>(const BlockSparseView&, const ConvShape&, bool,
                                             FeatureMap<const float>, FeatureMap<const float>,
                                             float*, const Parallel&);
template std::string conv_grad_values<double>(const BlockSparseView&, const ConvShape&, bool,
                                              FeatureMap<const double>, FeatureMap<const double>,
                                              double*, const Parallel&);

}  // namespace tetris::cpu
