#include "cpu/conv_plan.h"

#include <algorithm>
#include <atomic>

#include "core/cpu_features.h"

namespace tetris::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Positions whose lines take so many bytes.
int64_t positions_in(int64_t bytes, const LineWork& work, int64_t max_shift) {
  return (bytes / work.element_bytes - work.in_lines * (max_shift + work.width)) /
         (work.in_lines + work.out_lines);
}

// Cycles of the thread that has most to do, at one FMA a cycle and some 0.3 cycles to pack an
// element; whole ones, so that equal costs compare equal on every CPU.
int64_t cycles(const LineWork& work, const LinePlan& plan, int64_t length, int64_t max_shift) {
  const int64_t strips = work.groups * plan.batches(work) * plan.strips;
  const int64_t vectors = ceil_div(ceil_div(length, work.width), plan.strips);
  const int64_t packed = work.in_lines * (vectors * work.width + max_shift);
  return ceil_div(strips, work.threads) * (vectors * work.products + packed * 3 / 10);
}

std::atomic<Taps> forced_taps{Taps::kByCost};
thread_local int passes_of_last = 0;

}  // namespace

void set_conv_passes(int passes) { passes_of_last = passes; }
int conv_passes() { return passes_of_last; }
void force_taps(Taps taps) { forced_taps.store(taps, std::memory_order_relaxed); }

int64_t most_line_bytes() { return l2_cache_bytes() / 8 * 5; }

int64_t count_strips(const LineGeometry& lines, const LineWork& work) {
  const int64_t fit = positions_in(l2_cache_bytes() / 2, work, lines.max_shift());
  return ceil_div(lines.length(), std::max(work.least, fit / work.tile * work.tile));
}

LinePlan plan_lines(const LineGeometry& behind, const LineGeometry& side_by_side,
                    const LineWork& work) {
  const int64_t length = behind.length(), shift = behind.max_shift();
  LinePlan best{work.images, false, count_strips(behind, work)};
  const int64_t each = ceil_div(work.threads, work.groups);  // threads for a group's strips
  best.strips = ceil_div(best.strips, each) * each;
  best.strips = std::min(best.strips, ceil_div(length, work.width));
  if (work.images == 1 || !behind.pads_images()) return best;

  int64_t least = cycles(work, best, length, shift);
  for (int64_t n = 1; n <= work.images; ++n) {
    const int64_t line = side_by_side.length(n), reach = side_by_side.max_shift(n);
    if (line > positions_in(most_line_bytes(), work, reach)) break;
    const LinePlan plan{n, true, 1};
    const int64_t time = cycles(work, plan, line, reach);
    if (line < work.least || time > least) continue;
    least = time;
    best = plan;
  }
  return best;
}

TapWindow tap_window(const ConvShape& shape, int64_t tap) {
  return {tap_pixels(shape.y, tap / shape.x.kernel).count(),
          tap_pixels(shape.x, tap % shape.x.kernel).count()};
}

bool tap_by_tap(const ConvShape& shape, const LineGeometry& image, const LineWork& work, int64_t in,
                int64_t out) {
  constexpr int64_t kMostTaps = 1 << 12;  // more are not worth the time to look at each
  const int64_t taps = image.taps();
  const Taps choice = forced_taps.load(std::memory_order_relaxed);
  if (taps == 1 || choice != Taps::kByCost) return taps > 1 && choice == Taps::kApart;
  if (taps > kMostTaps) return false;
  // Cycles: as above to pack an element or to store it, twice that to add to one in memory; some
  // for each row of pixels of a channel, and for each pass; and values wait for memory where they
  // serve a vector alone. On AVX2, over 28 layers of 7 to 224 pixels with kernels of 3 and 7 and
  // dilations of 1 to 36, that gave the gain to 40 % or said too little, except for 49 taps on 7x7
  // pixels. Without dilation there was none, or one of 5 %: a third is asked for.
  constexpr int64_t kLeast = 2, kRow = 6, kPass = 20000;
  const LinePlan plan{1, false, count_strips(image, work)};
  const int64_t together = cycles(work, plan, image.length(), image.max_shift()) / work.groups +
                           out * image.length() * 3 / 10;
  int64_t apart = 0;
  for (int64_t tap = 0; tap < taps; ++tap)
    if (const TapWindow w = tap_window(shape, tap); w.positions() > 0)
      apart += std::max(kLeast, ceil_div(w.positions(), work.width)) * (work.products / taps) +
               (in + 2 * out) * (w.positions() * 3 / 10 + w.rows * kRow) + kPass / work.groups;
  return apart * 4 < together * 3;
}

std::vector<PixelRun> pixel_runs(const std::vector<Segment>& segments, int64_t most) {
  std::vector<PixelRun> runs;
  for (const Segment& s : segments) {
    const auto run = std::find_if(runs.begin(), runs.end(),
                                  [&](const PixelRun& r) { return r.pixel + r.count == s.pixel; });
    if (run != runs.end())
      run->count += s.count;
    else
      runs.push_back({s.pixel, s.count});
    if (static_cast<int64_t>(runs.size()) > most) return {};
  }
  return runs;
}

std::vector<FetchPart> share_runs(const std::vector<PixelRun>& runs, int64_t channels,
                                  int64_t tiles) {
  std::vector<FetchPart> parts;
  const int64_t each = runs.size(), all = channels * each;
  if (all == 0 || 2 * tiles < all) return parts;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t at = all * i / tiles;  // the run of tile i, which tiles [begin, end) share
    const int64_t begin = ceil_div(at * tiles, all), end = ceil_div((at + 1) * tiles, all);
    const PixelRun& run = runs[at % each];
    const int64_t from = run.count * (i - begin) / (end - begin);
    const int64_t to = run.count * (i + 1 - begin) / (end - begin);
    parts.push_back({at / each, run.pixel + from, to - from});
  }
  return parts;
}

}  // namespace tetris::cpu
