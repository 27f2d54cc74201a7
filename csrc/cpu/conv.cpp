#include "cpu/conv.h"

#include <algorithm>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/cpu_features.h"
#include "cpu/conv_blocks.h"
#include "cpu/conv_lines.h"
#include "cpu/conv_plan.h"
#include "cpu/dispatch.h"
#include "cpu/walk.h"

namespace tetris::cpu {
namespace {

// Strips of the lines shorter than this many tiles per thread are not worth cutting: block rows are
// split instead.
constexpr int64_t kTilesPerThread = 4;
// More threads than these pack a strip together. Measured with two (alone is faster); the number is
// a guess.
constexpr int kPackAlone = 4;
// An input that takes more than so many times L2 is expected to come from memory.
constexpr int64_t kCachedMaps = 4;
// Output lines that are computed before they are stored.
constexpr int64_t kLinesAtOnce = 8;
// Tiles of fewer stored inputs do not fetch what will be stored, nor from more runs than these.
constexpr int64_t kFetchInputs = 32, kFetchRuns = 64;

// One convolution, ready to run.
template <class T>
struct Job {
  const KernelTable<T>& k;
  const LineGeometry& lines;
  const ConvBlocks<T>& blocks;
  const int32_t* slot_of_input;                    // [all inputs] or nullptr, within the group
  const int32_t *slot_of_output, *output_of_slot;  // the same for outputs, and the way back
  FeatureMap<const T> x;
  const T* bias;
  FeatureMap<const T> residual;
  Activation act;
  FeatureMap<T> out;

  int preferred = 1;  // vectors of a tile
  // Block rows whose results are stored before the next are computed: a few that stay in L1, or all
  // where one pixel's channels lie next to each other.
  int64_t rows_at_once = 1;
  int64_t strip = 0;   // positions of the longest strip, whole vectors
  int64_t strips = 0;  // of an item
  int64_t in_stride = 0, out_stride = 0;
  std::vector<int32_t> offsets{};
  std::vector<LayerTiles<T>> by_vectors{};  // [vectors of a tile]
  // Maps that already are lines are read, unless from memory, or written where they lie. A strip's
  // last tile then ends with the strip, not with a whole vector, and computes some pixels twice:
  // beyond them may be nothing.
  bool read_in_place = false, write_in_place = false;
  bool fetch = false;               // maps are not expected in L2: packing and storing fetch ahead
  int64_t images = 0, batches = 0;  // all images, so many batches of those that share a line
  // An item of work is a batch of one group.
  ImageRange images_of(int64_t item) const {
    const int64_t first = item % batches * lines.images();
    return {first, std::min(lines.images(), images - first)};
  }
  int64_t group_of(int64_t item) const { return item / batches; }
  bool channels_first() const { return out.strides.channel != 1; }
  int64_t in_elements() const { return lines.planes() * blocks.in * in_stride; }
  int64_t out_elements() const { return rows_at_once * blocks.bo * out_stride; }
  // The calling thread's memory for lines and results; none where maps serve.
  T* in_buffer() const {
    return read_in_place ? nullptr : scratch<T>(ScratchSlot::kX, in_elements());
  }
  T* out_buffer() const {
    return write_in_place ? nullptr : scratch<T>(ScratchSlot::kY, out_elements());
  }
  // Strips differ by a vector at most: a short one over would run on narrow tiles.
  int64_t strip_begin(int64_t s) const {
    return ceil_div(lines.length(), k.width) * s / strips * k.width;
  }
  int64_t strip_end(int64_t s) const { return std::min(lines.length(), strip_begin(s + 1)); }
  std::vector<Panel> tiles(int64_t s) const {
    const int64_t length = strip_end(s) - strip_begin(s), units = ceil_div(length, k.width);
    auto panels = cut_panels(k, 0, units, preferred, units * k.width);
    if (read_in_place || write_in_place)
      panels.back().token = std::min(panels.back().token, length - panels.back().nv * k.width);
    return panels;
  }

  // A strip's lines: packed into `buffer`, or those of x.
  const T* planes(int64_t item, int64_t s, T* buffer) const {
    if (read_in_place) return x.data + images_of(item).first * x.strides.image + strip_begin(s);
    pack(item, s, 0, blocks.in, buffer);
    return buffer;
  }

  void pack(int64_t item, int64_t s, int64_t begin, int64_t end, T* planes) const {
    const int64_t first = group_of(item) * blocks.in;
    pack_planes(k, lines, x, images_of(item), first, begin, end,
                slot_of_input ? slot_of_input + first : nullptr, blocks.in, strip_begin(s),
                strip + lines.max_shift(), planes, in_stride, fetch);
  }

  // Block rows [begin, end) of a group, for the output pixels of one phase in one strip. Output i
  // of these rows goes to line line_of[i] of the results.
  void multiply(int64_t item, const std::vector<Panel>& tiles, int64_t phase, int64_t begin,
                int64_t end, const T* planes, T* results, int64_t stride, const int32_t* line_of,
                const LineArgs<T>* stored = nullptr,
                const std::vector<FetchPart>& fetched = {}) const {
    TileArgs<T> args{};
    args.values = blocks.values;
    args.row_begin = blocks.begin[phase] + group_of(item) * blocks.rows + begin;
    args.row_end = blocks.end[phase] + group_of(item) * blocks.rows + begin;
    args.col_idx = blocks.col_idx;
    args.bo = blocks.bo;
    args.bi = blocks.bi;
    args.last_group = blocks.in_groups - 1;
    args.last_width = blocks.in - args.last_group * blocks.bi;
    args.offset = offsets.data();
    args.src_stride = in_stride;
    args.slot_row = line_of;
    args.dst_stride = stride;
    args.rows_ahead = 1;
    args.fetch_end = end - begin;
    args.later = reinterpret_cast<const char*>(blocks.values);
    args.prefetch = std::max(kAheadInputs * blocks.bo, kAheadValues);
    const int64_t full = std::clamp<int64_t>(blocks.out / blocks.bo - begin, 0, end - begin);
    for (const bool whole : {true, false}) {
      const int64_t first = whole ? 0 : full, last = whole ? full : end - begin;
      if (first == last) continue;
      const int64_t inputs = (args.row_end[last - 1] - args.row_begin[first]) * blocks.bi;
      args.later_first = args.row_begin[first] * blocks.bi;
      for (size_t i = 0; i < tiles.size(); ++i) {
        const LayerTiles<T>& layer = by_vectors[tiles[i].nv];
        if (!fetched.empty() && inputs > 0)
          set_fetch(args, inputs, layer.passes(), *stored, fetched[i]);
        args.src = planes + tiles[i].token;
        args.dst = results + tiles[i].token;
        layer.run(args, first, last, whole);
      }
    }
  }

  // Has a tile, which takes so many stored inputs in each pass, fetch a part of what `a` says will
  // be stored, before that waits for it: HACKING.md has figures. Maps of 28x28 pixels and less gain
  // nothing, nor would results that are written in place, which could fetch the next rows'.
  void set_fetch(TileArgs<T>& args, int64_t inputs, int64_t passes, const LineArgs<T>& a,
                 const FetchPart& part) const {
    constexpr uint32_t kMost = 64;  // a line for each stored input
    args.later_step = 0;
    if (part.channel >= a.end - a.begin) return;  // the last rows may have fewer
    const int64_t slot = a.begin + part.channel;
    const int64_t channel = a.channel_of ? a.channel_of[slot] - a.first_channel : slot;
    args.later = reinterpret_cast<const char*>(a.out + channel * a.channel_stride + part.pixel);
    args.later_step = std::min<uint32_t>(
        kMost,
        static_cast<uint32_t>(part.count * sizeof(T)) / static_cast<uint32_t>(inputs * passes) + 1);
    args.later_of_tile = inputs * args.later_step;
  }

  LineArgs<T> store_args(int64_t item, const std::vector<Segment>& segments, T* results) const {
    const int64_t first = group_of(item) * blocks.out, image = images_of(item).first;
    LineArgs<T> a{};
    a.segments = segments.data();
    a.segment_count = segments.size();
    a.lines = results;
    a.line_stride = out_stride;
    a.in = residual.data ? residual.data + image * out.strides.image + first * out.strides.channel
                         : nullptr;
    a.out = out.data + image * out.strides.image + first * out.strides.channel;
    a.channel_stride = out.strides.channel;
    a.step = lines.out_step(out.strides);
    a.bias = bias ? bias + first : nullptr;
    a.act = act;
    a.fetch = fetch;
    return a;
  }

  // Multiplies and stores block rows [begin, end), in maps with channels first.
  void finish_rows(int64_t item, int64_t s, int64_t phase, int64_t begin, int64_t end,
                   const T* planes, T* results) const {
    std::vector<Segment> segments;
    lines.out_segments(phase, strip_begin(s), strip_end(s), out.strides, images_of(item).count,
                       segments);
    const auto tiles_of_strip = tiles(s);
    const int32_t* const numbers = identity(blocks.rows * blocks.bo);
    LineArgs<T> a = store_args(item, segments, results);
    a.channel_of = output_of_slot ? output_of_slot + group_of(item) * blocks.out : nullptr;
    a.first_channel = group_of(item) * blocks.out;
    T* const map = out.data + images_of(item).first * out.strides.image + strip_begin(s);
    if (write_in_place) {  // what is stored is read from where it goes
      a.lines = map;
      a.line_stride = out.strides.channel;
      a.in_place = true;
    }
    std::vector<FetchPart> fetched;
    const int64_t row = group_of(item) * blocks.rows,
                  inputs = blocks.bi *
                           (blocks.end[phase][row + end - 1] - blocks.begin[phase][row + begin]);
    if (blocks.phases == 1 && !write_in_place && inputs >= kFetchInputs * (end - begin))
      fetched = share_runs(pixel_runs(segments, kFetchRuns),
                           std::min(rows_at_once * blocks.bo, blocks.out), tiles_of_strip.size());
    for (int64_t r = begin; r < end; r += rows_at_once) {
      const int64_t next = std::min(end, r + rows_at_once), slot = r * blocks.bo;
      a.begin = slot;
      a.end = std::min(blocks.out, next * blocks.bo);
      if (write_in_place) {
        multiply(item, tiles_of_strip, phase, r, next, planes, map, out.strides.channel,
                 (a.channel_of ? a.channel_of : numbers) + slot);
        if (bias || residual.data || act != Activation::kNone) k.store_lines(a);
      } else {
        multiply(item, tiles_of_strip, phase, r, next, planes, results, out_stride, numbers, &a,
                 fetched);
        k.store_lines(a);
      }
    }
  }

  // Stores channels [begin, end) of results of all rows, in maps with channels last.
  void store_pixels(int64_t item, int64_t s, int64_t phase, int64_t begin, int64_t end,
                    T* results) const {
    std::vector<Segment> segments;
    lines.out_segments(phase, strip_begin(s), strip_end(s), out.strides, images_of(item).count,
                       segments);
    LineArgs<T> a = store_args(item, segments, results);
    a.begin = begin;
    a.end = end;
    a.line_of = slot_of_output ? slot_of_output + group_of(item) * blocks.out : nullptr;
    k.store_lines(a);
  }
};

// Each thread takes strips and does everything for them.
template <class T>
void run_by_strips(const Job<T>& job, int64_t items, int threads, const Parallel& parallel) {
  const int64_t all = items * job.strips, rows = job.blocks.rows;
  run(parallel, threads, [&](int t) {
    T* const buffer = job.in_buffer();
    T* const results = job.out_buffer();
    for (int64_t i = all * t / threads; i < all * (t + 1) / threads; ++i) {
      const int64_t item = i / job.strips, s = i % job.strips;
      const T* const planes = job.planes(item, s, buffer);
      for (int64_t phase = 0; phase < job.blocks.phases; ++phase) {
        if (job.channels_first()) {
          job.finish_rows(item, s, phase, 0, rows, planes, results);
        } else {
          job.multiply(item, job.tiles(s), phase, 0, rows, planes, results, job.out_stride,
                       identity(rows * job.blocks.bo));
          job.store_pixels(item, s, phase, 0, job.blocks.out, results);
        }
      }
    }
  });
}

// Too few pixels for that: all threads work on each strip, split by block rows.
//
// Each packs the strip for itself: that takes microseconds, as long as it takes to wait for the
// others, and lines that another core has just written take longer to fetch. A strip that L2 would
// not hold is packed together and shared, and so is one that several phases or many threads read.
template <class T>
void run_by_rows(const Job<T>& job, int64_t items, int threads, const Parallel& parallel) {
  const bool share = !job.read_in_place &&
                     (job.blocks.phases > 1 || threads > kPackAlone ||
                      job.in_elements() * static_cast<int64_t>(sizeof(T)) > most_line_bytes());
  T* const shared = share ? scratch<T>(ScratchSlot::kX, job.in_elements()) : nullptr;
  T* const all = job.channels_first() ? nullptr : scratch<T>(ScratchSlot::kY, job.out_elements());
  const auto range = [&](int64_t n, int t) { return share_begin(n, job.k.width, t, threads); };
  for (int64_t item = 0; item < items; ++item) {
    for (int64_t s = 0; s < job.strips; ++s) {
      if (share)
        run(parallel, threads, [&](int t) {
          job.pack(item, s, range(job.blocks.in, t), range(job.blocks.in, t + 1), shared);
        });
      for (int64_t phase = 0; phase < job.blocks.phases; ++phase) {
        const auto bounds = split_rows(job.blocks.row_ptr(phase, job.group_of(item)).data(),
                                       job.blocks.rows, threads);
        run(parallel, threads, [&](int t) {
          const int64_t begin = bounds[t], end = bounds[t + 1];
          const T* const planes = share ? shared : job.planes(item, s, job.in_buffer());
          if (job.channels_first())
            job.finish_rows(item, s, phase, begin, end, planes, job.out_buffer());
          else
            job.multiply(item, job.tiles(s), phase, begin, end, planes,
                         all + begin * job.blocks.bo * job.out_stride, job.out_stride,
                         identity((end - begin) * job.blocks.bo));
        });
        if (!job.channels_first())
          run(parallel, threads, [&](int t) {
            job.store_pixels(item, s, phase, range(job.blocks.out, t), range(job.blocks.out, t + 1),
                             all);
          });
      }
    }
  }
}

template <class T>
int preferred_vectors(const KernelTable<T>& k, int64_t bo, int64_t out) {
  return k.conv_vecs[std::min({bo, out, static_cast<int64_t>(k.max_rows)})];
}

// Which maps of a convolution at one kernel position are lines already, image by image, that tiles
// may read and write.
struct InPlace {
  bool read = false, write = false;
};

template <class T>
InPlace in_place(const KernelTable<T>& k, const LineGeometry& image, int64_t images, int preferred,
                 int64_t bi, const int32_t* channel_of, int64_t in, const MapStrides& x,
                 int64_t out, const MapStrides& y) {
  if (ceil_div(image.length(), k.width) <= preferred) return {};  // strips are two tiles at least
  // Tiles skip most channels and would wait for each line that they read from memory, longer than
  // packing takes, which fetches ahead: HACKING.md has figures.
  const bool cached = in * images * image.length() * static_cast<int64_t>(sizeof(T)) <=
                      kCachedMaps * l2_cache_bytes();
  return {cached && (bi == 1 || !channel_of) && map_is_lines<T>(image, x, in),
          map_is_lines<T>(image, y, out)};
}

// With channels last, threads that split block rows wait for each other before they store pixels,
// most of whose channels come from other cores then: strips of half a tile are better, unless what
// their ends have in common is as much again to pack. Many threads would have too few vectors each
// to share them out evenly; more than two were not measured.
bool short_strips(const LineGeometry& image, int64_t pixels, int threads, int64_t tile) {
  const int64_t strip = pixels / threads;
  return threads <= kPackAlone && 2 * strip >= tile && image.max_shift() <= strip;
}

// Image by image each ends in a part of a vector, which many images behind each other share; but
// packing and storing cost some 0.3 cycles an element, which several multiplications would do.
template <class T>
bool images_one_by_one(const KernelTable<T>& k, const LineGeometry& image, int64_t stored,
                       const InPlace& maps, int64_t in, int64_t out) {
  constexpr double kCyclesPerElement = 0.3;
  const int64_t length = image.length(), idle = ceil_div(length, k.width) * k.width - length;
  const double lost = static_cast<double>(stored) / k.width * idle;
  const double saved = kCyclesPerElement * (maps.read * in + maps.write * out) * length;
  return (maps.read || maps.write) && lost <= saved;
}

// Block rows of so many outputs whose results are stored before the next are computed.
int64_t rows_at_once(int64_t rows, int64_t bo, const MapStrides& out) {
  return out.channel == 1 ? rows : ceil_div(kLinesAtOnce, bo);
}

// A group's product for one image on one thread.
template <class T>
LineWork line_work(const KernelTable<T>& k, int64_t groups, int64_t bo, int64_t rows, int64_t out,
                   int64_t in_lines, int64_t stored, const MapStrides& strides) {
  LineWork work{};
  work.images = work.threads = 1;
  work.groups = groups;
  work.in_lines = in_lines;
  work.out_lines = rows_at_once(rows, bo, strides) * bo;
  work.products = stored / groups;
  work.width = k.width;
  work.element_bytes = sizeof(T);
  work.least = work.tile = preferred_vectors(k, bo, out) * k.width;
  return work;
}

// What the passes of a call share.
template <class T>
struct Call {
  const KernelTable<T>& k;
  const BlockSparseView& w;
  const Inverses& inverse;
  bool swapped;  // rows of the layout are channels of x
  int64_t images;
  FeatureMap<const T> x;
  FeatureMap<T> out;
  bool fetch;
  const Parallel& parallel;
};

// out = act(product + bias + residual) at the outputs that the lines have. The residual may be out.
template <class T>
std::string run_pass(const Call<T>& call, const LineAxes& axes, const ConvBlocks<T>& blocks,
                     const T* bias, FeatureMap<const T> residual, Activation act) {
  const auto& [k, w, inverse, swapped, images, x, out, fetch, parallel] = call;
  const LineGeometry image = axes.lines(1, false);
  const int32_t* const channel_of = swapped ? w.row_perm : w.col_perm;
  const int preferred = preferred_vectors(k, blocks.bo, blocks.out);
  InPlace maps;
  if (w.groups == 1)
    maps = in_place(k, image, images, preferred, blocks.bi, channel_of, blocks.in, x.strides,
                    blocks.out, out.strides);
  if (residual.data == out.data) maps.write = false;
  const int64_t pixels = images * image.length(), stored = blocks.stored(w.groups);
  const int threads = useful_threads(parallel, (stored + 4 * (w.in + w.out)) * pixels);
  const int64_t tile = preferred * k.width, enough = threads * kTilesPerThread * tile;
  const bool by_strips =
      w.groups * pixels >= enough ||
      (out.strides.channel == 1 && short_strips(image, w.groups * pixels, threads, tile));
  // Not where threads would share out the block rows of each image.
  const bool one_by_one = images > 1 && (threads == 1 || pixels >= enough) &&
                          images_one_by_one(k, image, stored, maps, blocks.in, blocks.out);
  if (images > 1 && !one_by_one) maps = {};
  const LineGeometry behind = axes.lines(one_by_one ? 1 : images, false);
  // The longest of the shortest strips; in place they are two tiles.
  std::string error =
      check_reach(behind.planes() * blocks.in, behind.max_shift(), 2 * tile + k.width);
  if (!error.empty()) return error;
  LineWork work = line_work(k, w.groups, blocks.bo, blocks.rows, blocks.out,
                            behind.planes() * blocks.in, stored, out.strides);
  work.images = behind.images();
  work.groups = one_by_one ? images : w.groups;
  work.threads = by_strips ? threads : 1;
  const LinePlan plan = plan_lines(behind, axes.lines(1, true), work);
  const LineGeometry lines = axes.lines(plan.images, plan.side_by_side);
  const int64_t items = work.groups * plan.batches(work), length = lines.length();

  Job<T> job{k,
             lines,
             blocks,
             swapped ? inverse.row : inverse.col,
             swapped ? inverse.col : inverse.row,
             swapped ? w.col_perm : w.row_perm,
             x,
             bias,
             residual,
             act,
             out};
  job.preferred = preferred;
  job.images = images;
  job.batches = ceil_div(images, plan.images);
  job.read_in_place = maps.read;
  job.write_in_place = maps.write;
  job.fetch = fetch;
  job.rows_at_once = rows_at_once(blocks.rows, blocks.bo, out.strides);
  job.strips = plan.strips;
  if (maps.read || maps.write)
    job.strips = std::min(job.strips, ceil_div(length, k.width) / (preferred + 1));
  const int64_t units = ceil_div(ceil_div(length, k.width), job.strips);
  job.strip = units * k.width;
  const Panel last = cut_panels(k, 0, units, preferred, job.strip).back();
  const int64_t widest = last.token + last.nv * k.width;  // a tile may be wider than what is left
  job.out_stride = line_stride(k, widest);
  if (maps.read) {
    job.in_stride = x.strides.channel;
    job.offsets = column_offsets_in_place(blocks.in_groups, blocks.bi, channel_of, job.in_stride);
  } else {
    job.in_stride = line_stride(k, widest + lines.max_shift());
    job.offsets = column_offsets(lines, blocks.in_groups, blocks.bi, blocks.in, job.in_stride);
  }
  for (int nv = 0; nv <= preferred; ++nv) {
    int built = std::max(nv, 1);  // none has 0; of those that are not, cut_panels takes the next
    while (!k.tiles[1][built].conv) ++built;
    job.by_vectors.emplace_back(k, &Tile<T>::conv, blocks.bo, blocks.out, built);
  }
  if (by_strips || threads == 1)
    run_by_strips(job, items, static_cast<int>(std::min<int64_t>(threads, items * job.strips)),
                  parallel);
  else
    run_by_rows(job, items, threads, parallel);
  const int nv = job.tiles(0)[0].nv;
  const int64_t height = std::min(blocks.bo, blocks.out);
  set_last_kernel(k.tiles[tile_rows(k, height, nv)][nv].conv_name);
  return {};
}

// A pass for each tap. The first is for the tap that hits most, and for every output, so that the
// others have something to add to.
template <class T>
std::string run_tap_by_tap(const Call<T>& call, const ConvShape& shape, bool transposed,
                           const T* values, const T* bias, FeatureMap<const T> residual,
                           Activation act) {
  const ConvBlocks<T> blocks =
      conv_blocks(call.w, values, phase_for_each_tap(call.w.taps), call.swapped);
  std::vector<int64_t> positions;
  for (int64_t tap = 0; tap < call.w.taps; ++tap)
    positions.push_back(tap_window(shape, tap).positions());
  const int64_t first = std::max_element(positions.begin(), positions.end()) - positions.begin();
  LineAxes axes = tap_axes(shape, transposed, first, true);
  std::string error = run_pass(call, axes, blocks_of_tap(blocks, first, axes.lines(1, false)), bias,
                               residual, Activation::kNone);
  int passes = 1;
  for (int64_t tap = 0; tap < call.w.taps && error.empty(); ++tap) {
    if (tap == first || positions[tap] == 0) continue;
    axes = tap_axes(shape, transposed, tap, false);
    const ConvBlocks<T> of_tap = blocks_of_tap(blocks, tap, axes.lines(1, false));
    if (of_tap.stored(call.w.groups) == 0) continue;
    const FeatureMap<const T> sum{call.out.data, call.out.strides};
    error = run_pass<T>(call, axes, of_tap, nullptr, sum, Activation::kNone);
    ++passes;
  }
  set_conv_passes(passes);
  if (!error.empty() || act == Activation::kNone) return error;

  const int64_t big = shape.y.big * shape.x.big, small = shape.y.small * shape.x.small;
  const int64_t all =
      shape.images * (call.swapped ? call.w.in : call.w.out) * (transposed ? big : small);
  const int threads = useful_threads(call.parallel, 4 * all);
  run(call.parallel, threads, [&](int t) {
    const int64_t begin = share_begin(all, call.k.width, t, threads);
    const int64_t end = share_begin(all, call.k.width, t + 1, threads);
    call.k.epilogue(call.out.data + begin, end - begin, nullptr, act);
  });
  return {};
}

}  // namespace

template <class T>
std::string convolve(const BlockSparseView& w, const T* values, const ConvShape& shape,
                     ConvDirection direction, FeatureMap<const T> x, const T* bias,
                     FeatureMap<const T> residual, Activation act, FeatureMap<T> out,
                     const Parallel& parallel) {
  const auto& k = kernels<T>();
  Inverses inverse;
  std::string error = check_and_invert(w, &inverse);
  if (error.empty()) error = check_col_idx(w, 0, w.block_rows());
  if (!error.empty()) return error;
  const auto [transposed, swapped] = direction;
  const LineAxes axes = line_axes(shape, transposed);
  const LineGeometry image = axes.lines(1, false);
  if (shape.images == 0 || image.length() == 0) return {};

  const int64_t all_in = swapped ? w.out : w.in, all_out = swapped ? w.in : w.out;
  const bool fetch =
      map_bytes<T>(shape, transposed, all_in, all_out, residual.data != nullptr) > l2_cache_bytes();
  const Call<T> call{k, w, inverse, swapped, shape.images, x, out, fetch, parallel};
  const int64_t bo = swapped ? w.bi : w.bo, group_out = all_out / w.groups;
  const LineWork work =
      line_work(k, w.groups, bo, ceil_div(group_out, bo), group_out,
                image.planes() * all_in / w.groups, w.nnzb * w.bo * w.bi, out.strides);
  if (tap_by_tap(shape, image, work, all_in / w.groups, group_out))
    return run_tap_by_tap(call, shape, transposed, values, bias, residual, act);
  set_conv_passes(1);
  return run_pass(call, axes, conv_blocks(w, values, phases_of(image), swapped), bias, residual,
                  act);
}

#define TETRIS_INSTANTIATE(T)                                                                 \
  template std::string convolve<T>(                                                           \
      const BlockSparseView&, const T*, const ConvShape&, ConvDirection, FeatureMap<const T>, \
      const T*, FeatureMap<const T>, Activation, FeatureMap<T>, const Parallel&);
TETRIS_INSTANTIATE(float)
TETRIS_INSTANTIATE(double)
#undef TETRIS_INSTANTIATE

}  // namespace tetris::cpu
