#include <algorithm>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "core/cpu_features.h"
#include "cpu/conv.h"
#include "cpu/conv_lines.h"
#include "cpu/conv_plan.h"
#include "cpu/dispatch.h"
#include "cpu/walk.h"

namespace tetris::cpu {

template <class T>
std::string conv_grad_values(const BlockSparseView& w, const ConvShape& shape, bool transposed,
                             FeatureMap<const T> big, FeatureMap<const T> small, T* dvalues,
                             const Parallel& parallel) {
  const auto& k = kernels<T>();
  Inverses inverse;
  std::string error = check_and_invert(w, &inverse);
  if (error.empty()) error = check_col_idx(w, 0, w.block_rows());
  if (!error.empty()) return error;
  // Side by side, images gained nothing here.
  const LineGeometry lines = line_geometry(shape, /*transposed=*/false, shape.images, false);
  const int64_t out = w.group_out(), in = w.group_in(), in_groups = w.in_groups();
  if (lines.length() == 0 || out % w.bo != 0 || in % w.bi != 0)
    std::fill_n(dvalues, w.nnzb * w.bi * w.bo, T(0));  // entries outside the weight stay zero
  if (lines.length() == 0) return {};

  // Rows of the layout are channels of the small map, columns of the big one, or the reverse.
  const int64_t big_channels = transposed ? out : in, small_channels = transposed ? in : out;
  const int32_t* const big_lines = transposed ? inverse.row : inverse.col;
  const int32_t* const small_lines = transposed ? inverse.col : inverse.row;
  const int64_t least = 128 / k.width * k.width;
  error = check_reach(lines.planes() * big_channels, lines.max_shift(), least);
  if (!error.empty()) return error;
  LineWork work{};
  work.in_lines = lines.planes() * big_channels;
  work.out_lines = small_channels;
  work.width = k.width;
  work.element_bytes = sizeof(T);
  work.least = least;
  const int64_t strips = count_strips(lines, work);
  const int64_t strip = ceil_div(ceil_div(lines.length(), strips), k.width) * k.width;
  const int64_t big_stride = line_stride(k, strip + lines.max_shift());
  const int64_t small_stride = line_stride(k, strip);
  const int threads = useful_threads(parallel, w.nnzb * w.bo * w.bi * lines.length());
  T* const bigs = scratch<T>(ScratchSlot::kX, lines.planes() * big_channels * big_stride);
  T* const smalls = scratch<T>(ScratchSlot::kY, small_channels * small_stride);
  const bool fetch = map_bytes<T>(shape, false, w.groups * big_channels, w.groups * small_channels,
                                  false) > l2_cache_bytes();
  const auto offsets = column_offsets(lines, in_groups, w.bi, big_channels, big_stride);
  const Sampler<T>& kernel = k.samplers[0];  // the one that takes masks
  std::vector<Segment> segments;
  // Between rows of pixels there are positions of none: the small lines hold zeros there, but the
  // big ones are read at real pixels, and 0 * Inf is not zero.
  T* const mask = scratch<T>(ScratchSlot::kVector, strip);
  const auto range = [&](int64_t n, int t) { return share_begin(n, k.width, t, threads); };

  for (int64_t group = 0; group < w.groups; ++group) {
    const int32_t* const row_ptr = w.row_ptr + group * w.group_rows();
    const auto bounds = split_rows(row_ptr, w.group_rows(), threads);
    for (int64_t s = 0; s * strip < lines.length(); ++s) {
      const int64_t begin = s * strip, end = std::min(lines.length(), begin + strip);
      lines.out_segments(0, begin, end, small.strides, shape.images, segments);
      std::fill_n(mask, strip, T(0));
      for (const Segment& segment : segments)
        std::memset(mask + segment.line, 0xff, segment.count * sizeof(T));
      run(parallel, threads, [&](int t) {
        const int64_t first_big = group * big_channels, first_small = group * small_channels;
        pack_planes(k, lines, big, {0, shape.images}, first_big, range(big_channels, t),
                    range(big_channels, t + 1), big_lines ? big_lines + first_big : nullptr,
                    big_channels, begin, strip + lines.max_shift(), bigs, big_stride, fetch);
        LineArgs<T> a{};
        a.segments = segments.data();
        a.segment_count = segments.size();
        a.begin = range(small_channels, t);
        a.end = range(small_channels, t + 1);
        a.line_of = small_lines ? small_lines + first_small : nullptr;
        a.lines = smalls;
        a.line_stride = small_stride;
        a.length = strip;
        a.in = small.data + first_small * small.strides.channel;
        a.channel_stride = small.strides.channel;
        a.step = lines.out_step(small.strides);
        a.fetch = fetch;
        k.pack_lines(a);
      });
      run(parallel, threads, [&](int t) {
        for (int64_t row = bounds[t]; row < bounds[t + 1]; ++row) {
          const int64_t first = row_ptr[row], last = row_ptr[row + 1];
          int64_t* const at = scratch<int64_t>(ScratchSlot::kLists, 2 * (last - first) * w.bi);
          int64_t* const inputs = at + (last - first) * w.bi;
          SampleArgs<T> a{};
          a.nv = strip / k.width;
          a.inputs = inputs;
          a.offsets = at;
          a.rows = std::min(w.bo, out - row * w.bo);
          a.dvalues = dvalues;
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

template std::string conv_grad_values<float>(const BlockSparseView&, const ConvShape&, bool,
                                             FeatureMap<const float>, FeatureMap<const float>,
                                             float*, const Parallel&);
template std::string conv_grad_values<double>(const BlockSparseView&, const ConvShape&, bool,
                                              FeatureMap<const double>, FeatureMap<const double>,
                                              double*, const Parallel&);

}  // namespace tetris::cpu
