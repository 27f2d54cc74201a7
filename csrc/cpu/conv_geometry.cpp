#include "cpu/conv_geometry.h"

#include <algorithm>
#include <utility>

namespace tetris::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }
int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// Finds what each plane holds and the smallest pitch at which no read meets another row's pixels.
void set_pitch(LineAxis& axis) {
  axis.count = 0;
  for (const auto& phase : axis.phases) axis.count = std::max(axis.count, phase.count);
  axis.pitch = std::max<int64_t>(axis.count, 1);
  for (size_t p = 0; p < axis.planes.size(); ++p) {
    int64_t low = -1, high = 0;  // shifts of the plane's taps
    for (size_t k = 0; k < axis.shift.size(); ++k)
      if (axis.plane_of[k] == static_cast<int>(p)) {
        low = low < 0 ? axis.shift[k] : std::min(low, axis.shift[k]);
        high = std::max(high, axis.shift[k]);
      }
    auto& plane = axis.planes[p];
    const int64_t reach = axis.count - 1 + high;
    plane.first = std::max<int64_t>(0, ceil_div(-plane.begin, axis.source_step));
    plane.last = std::min(reach, floor_div(axis.source - 1 - plane.begin, axis.source_step));
    if (plane.first > plane.last) continue;  // all padding
    axis.pitch = std::max({axis.pitch, reach + 1 - plane.first, plane.last + 1 - low});
  }
}

void push(std::vector<Segment>& segments, int64_t line, int64_t count, int64_t pixel,
          int64_t step) {
  if (!segments.empty()) {
    Segment& last = segments.back();
    if (last.line + last.count == line && last.pixel + last.count * step == pixel) {
      last.count += static_cast<int32_t>(count);
      return;
    }
  }
  segments.push_back({static_cast<int32_t>(line), static_cast<int32_t>(count), pixel});
}

}  // namespace

LineAxis sliding_axis(const ConvAxis& a) {
  LineAxis axis{};
  axis.source = a.big;
  axis.source_step = a.stride;
  axis.out = a.small;
  axis.phases.push_back({0, 1, a.small, {}});
  std::vector<int> plane_of_remainder(a.stride, -1);
  for (int k = 0; k < a.kernel; ++k) {
    const int64_t at = k * a.dilation, remainder = at % a.stride;
    axis.phases[0].taps.push_back(k);
    int& plane = plane_of_remainder[remainder];
    if (plane < 0) {
      plane = static_cast<int>(axis.planes.size());
      axis.planes.push_back({remainder - a.pad, 0, 0});
    }
    axis.plane_of.push_back(plane);
    axis.shift.push_back(at / a.stride);
  }
  set_pitch(axis);
  return axis;
}

// Output i = s j + f - pad gets tap k from source j - (k d - f) / s, where that divides.
LineAxis transposed_axis(const ConvAxis& a) {
  LineAxis axis{};
  axis.source = a.small;
  axis.source_step = 1;
  axis.out = a.big;
  const int64_t lead = (a.kernel - 1) * a.dilation / a.stride;  // the largest (k d - f) / s
  axis.planes.push_back({-lead, 0, 0});
  axis.plane_of.assign(a.kernel, 0);
  axis.shift.assign(a.kernel, 0);
  for (int64_t f = 0; f < a.stride; ++f) {
    const int64_t first = std::max<int64_t>(0, ceil_div(a.pad - f, a.stride));
    const int64_t last = floor_div(a.big - 1 + a.pad - f, a.stride);
    if (last < first) continue;  // its taps hit no pixel
    LineAxis::Phase phase{first * a.stride + f - a.pad, a.stride, last - first + 1, {}};
    for (int k = 0; k < a.kernel; ++k)
      if (k * a.dilation % a.stride == f) {
        phase.taps.push_back(k);
        axis.shift[k] = lead - k * a.dilation / a.stride + first;
      }
    axis.phases.push_back(std::move(phase));
  }
  set_pitch(axis);
  return axis;
}

PixelRange tap_pixels(const ConvAxis& a, int64_t tap) {
  const int64_t lead = a.pad - tap * a.dilation;
  return {std::max<int64_t>(0, ceil_div(lead, a.stride)),
          std::min(a.small - 1, floor_div(a.big - 1 + lead, a.stride))};
}

LineAxis tap_axis(const ConvAxis& a, bool transposed, int64_t tap, bool every_output) {
  LineAxis axis{};
  axis.source = transposed ? a.small : a.big;
  axis.source_step = transposed ? 1 : a.stride;
  axis.out = transposed ? a.big : a.small;
  axis.plane_of.assign(a.kernel, 0);
  axis.shift.assign(a.kernel, 0);
  axis.planes.push_back({0, 0, 0});
  // Pixel j of the small map meets pixel j s - lead of the big one.
  const int64_t s = a.stride, lead = a.pad - tap * a.dilation;
  // A phase for pixels [first, last] of the small map, `off` to the right in the big one.
  const auto add = [&](int64_t first, int64_t last, int64_t off) {
    if (last < first) return;
    const int64_t big = first * s - lead + off;
    axis.phases.push_back({transposed ? big : first, transposed ? s : 1, last - first + 1, {}});
    if (off != 0) return;
    axis.planes[0].begin = transposed ? first : big;
    axis.phases.back().taps.push_back(static_cast<int>(tap));
  };
  if (every_output && transposed) {
    for (int64_t off = 0; off < s; ++off)
      add(ceil_div(lead - off, s), floor_div(a.big - 1 + lead - off, s), off);
  } else if (every_output) {
    add(0, a.small - 1, 0);
  } else {
    const PixelRange met = tap_pixels(a, tap);
    add(met.first, met.last, 0);
  }
  set_pitch(axis);
  return axis;
}

LineGeometry::LineGeometry(int64_t images, bool side_by_side, LineAxis y, LineAxis x)
    : images_(images), side_by_side_(side_by_side), y_(std::move(y)), x_(std::move(x)) {
  row_pitch_ = row_pitch(images);
  length_ = length(images);
  max_shift_ = max_shift(images);
}

int64_t LineGeometry::row_pitch(int64_t images) const {
  return side_by_side_ ? images * x_.pitch : x_.pitch;
}

int64_t LineGeometry::length(int64_t images) const {
  if (images == 0 || y_.count == 0 || x_.count == 0) return 0;
  const int64_t rows = side_by_side_ ? images * y_.count : (images - 1) * y_.pitch + y_.count;
  return (rows - 1) * x_.pitch + x_.count;
}

int64_t LineGeometry::max_shift(int64_t images) const {
  return *std::max_element(y_.shift.begin(), y_.shift.end()) * row_pitch(images) +
         *std::max_element(x_.shift.begin(), x_.shift.end());
}

LineGeometry::Row LineGeometry::row(int64_t i) const {
  if (side_by_side_) return {i % images_, i / images_};
  return {i / y_.pitch, i % y_.pitch};
}

int64_t LineGeometry::plane(int64_t tap) const {
  const int64_t kw = x_.shift.size();
  return y_.plane_of[tap / kw] * static_cast<int64_t>(x_.planes.size()) + x_.plane_of[tap % kw];
}

int64_t LineGeometry::shift(int64_t tap) const {
  const int64_t kw = x_.shift.size();
  return y_.shift[tap / kw] * row_pitch_ + x_.shift[tap % kw];
}

int64_t LineGeometry::phase(int64_t tap) const {
  const int64_t kw = x_.shift.size();
  const auto find = [](const LineAxis& axis, int64_t k) {
    for (size_t p = 0; p < axis.phases.size(); ++p)
      for (int t : axis.phases[p].taps)
        if (t == k) return static_cast<int64_t>(p);
    return int64_t{-1};
  };
  const int64_t y = find(y_, tap / kw), x = find(x_, tap % kw);
  return y < 0 || x < 0 ? -1 : y * static_cast<int64_t>(x_.phases.size()) + x;
}

void LineGeometry::source_segments(int64_t plane, int64_t begin, int64_t end, const MapStrides& map,
                                   int64_t present, std::vector<Segment>& segments) const {
  segments.clear();
  const int64_t nx = x_.planes.size();
  const auto &py = y_.planes[plane / nx], &px = x_.planes[plane % nx];
  if (py.first > py.last || px.first > px.last) return;
  const int64_t step = source_step(map);
  // Pixels of a row may reach into what counts as the next one (last >= pitch), so rows are found
  // by where their pixels start.
  const int64_t first = py.first * row_pitch_ + px.first;
  const int64_t rows = images_ * (side_by_side_ ? py.last - py.first + 1 : y_.pitch);
  for (int64_t i = std::max<int64_t>(0, (begin - first) / x_.pitch - 1); i < rows; ++i) {
    const int64_t start = first + i * x_.pitch;
    if (start >= end) break;
    const auto [image, y] = row(i);
    const int64_t u = y + py.first;
    if (image >= present || u > py.last) continue;
    const int64_t from = std::max(begin, start);
    const int64_t to = std::min(end, start + px.last - px.first + 1);
    if (from >= to) continue;
    const int64_t iy = py.begin + u * y_.source_step;
    const int64_t ix = px.begin + (px.first + from - start) * x_.source_step;
    push(segments, from - begin, to - from, image * map.image + (iy * x_.source + ix) * map.pixel,
         step);
  }
}

void LineGeometry::out_segments(int64_t phase, int64_t begin, int64_t end, const MapStrides& map,
                                int64_t present, std::vector<Segment>& segments) const {
  segments.clear();
  const int64_t nx = x_.phases.size();
  const auto &py = y_.phases[phase / nx], &px = x_.phases[phase % nx];
  for (int64_t i = begin / x_.pitch; i < images_ * y_.pitch && i * x_.pitch < end; ++i) {
    const auto [image, j] = row(i);
    if (image >= present || j >= py.count) continue;
    const int64_t start = i * x_.pitch;
    const int64_t from = std::max(begin, start), to = std::min(end, start + px.count);
    if (from >= to) continue;
    const int64_t oy = py.begin + j * py.step, ox = px.begin + (from - start) * px.step;
    push(segments, from - begin, to - from, image * map.image + (oy * x_.out + ox) * map.pixel,
         out_step(map));
  }
}

}  // namespace tetris::cpu
