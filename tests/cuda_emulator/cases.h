// Layers that find what kernels get wrong: edges, nothing, everything, and combinations by chance.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "cuda_emulator/case.h"
#include "cuda_emulator/options.h"

namespace tetris::cuda::test {

// What a kernel takes; cases keep within.
struct Limits {
  std::vector<DType> dtypes{DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64};
  std::vector<int> heights{1, 2, 4, 8, 16, 32}, widths{1, 2, 4, 8, 16};
  int most_block_rows = 4, most_col_groups = 5;  // per group
  int most_tokens = 140;
  bool convolutions = true, groups = true, gradients = true;
  bool channels_first = true;  // else channels are always last
  bool col_perm = true, row_perm = true;
  bool ragged = true;               // else channels are multiples of blocks
  bool gaps = true, shifts = true;  // tokens lie apart, operands are not aligned to 256 bytes
  int multiple_of = 1;              // of channels of maps whose channels are last, and of gaps
};

// One case by chance.
inline Case random_case(emulator::Random& random, const Limits& limits = {}) {
  const auto below = [&](int n) { return int(random.below(uint32_t(n))); };
  const auto between = [&](int low, int high) { return low + below(high - low + 1); };
  const auto pick = [&](const auto& from) { return from[below(int(from.size()))]; };
  const auto sometimes = [&](bool allowed) { return allowed && below(2) == 1; };
  Case c;
  c.dtype = pick(limits.dtypes);
  c.height = pick(limits.heights);
  c.width = pick(limits.widths);
  c.groups = limits.groups && below(3) == 0 ? between(2, 3) : 1;
  const auto channels = [&](int block, int most_blocks) {
    int n = between(1, most_blocks) * block;
    if (limits.ragged && block > 1 && below(2) == 0) n -= between(1, block - 1);
    const int step = limits.multiple_of;
    return int64_t{c.groups} * ((n + step - 1) / step * step);
  };
  c.rows = channels(c.height, limits.most_block_rows);
  c.cols = channels(c.width, limits.most_col_groups);
  c.density = std::vector<double>{0, 0.2, 0.5, 0.8, 1}[below(5)];
  if (limits.convolutions && below(2) == 0) {
    const auto window = [&] {
      return Window{between(1, 3), between(1, 3), below(3), between(1, 2)};
    };
    do {
      c.geometry = convolution(between(1, 3), between(1, 9), between(1, 9), window(), window(),
                               sometimes(true), below(2));
    } while (c.geometry.result_h < 1 || c.geometry.result_w < 1);
  } else {
    c.geometry = tokens(between(1, limits.most_tokens));
  }
  c.row_perm = sometimes(limits.row_perm);
  c.col_perm = sometimes(limits.col_perm);
  c.bias = sometimes(true);
  c.residual = sometimes(true);
  c.activation = Activation(below(5));
  c.x_channels_last = !sometimes(limits.channels_first);
  c.y_channels_last = !sometimes(limits.channels_first);
  c.ordered = sometimes(true);
  c.gradient = sometimes(limits.gradients);
  if (limits.gaps && below(4) == 0) c.gap = limits.multiple_of * between(1, 3);
  if (limits.shifts && below(4) == 0) c.shift = limits.multiple_of * between(1, 3);
  return c;
}

inline std::vector<Case> random_cases(int count, uint64_t seed, const Limits& limits = {}) {
  emulator::Random random(seed);
  std::vector<Case> cases;
  for (int i = 0; i < count; ++i) cases.push_back(random_case(random, limits));
  return cases;
}

// Named risks, for one block and dtype. Each starts from a case that is none: 3 block rows by 4
// column groups, 20 tokens, half of the blocks stored.
inline std::vector<Case> risky_cases(DType dtype, int height, int width) {
  Case base;
  base.dtype = dtype;
  base.height = height;
  base.width = width;
  base.rows = 3 * height;
  base.cols = 4 * width;
  base.geometry = tokens(20);
  std::vector<Case> cases{base};
  const auto add = [&](const std::function<void(Case&)>& change) {
    for (bool gradient : {false, true}) {
      Case c = base;
      c.gradient = gradient;
      change(c);
      cases.push_back(c);
    }
  };
  add([](Case& c) { c.density = 0; });
  add([](Case& c) { c.density = 1; });
  add([](Case& c) { c.density = 0, c.bias = false; });
  add([](Case& c) { c.rows = c.height, c.cols = c.width, c.density = 1; });
  add([](Case& c) { c.rows = 1, c.cols = 1, c.density = 1; });  // smaller than a block
  if (height > 1) add([](Case& c) { c.rows -= 1; });
  if (height > 2) add([](Case& c) { c.rows -= c.height - 1; });
  if (width > 1) add([](Case& c) { c.cols -= 1; });
  if (width > 2) add([](Case& c) { c.cols -= c.width - 1; });
  for (int count : {0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 200})
    cases.push_back(base), cases.back().geometry = tokens(count);
  add([](Case& c) { c.row_perm = c.col_perm = false; });
  add([](Case& c) { c.residual = true, c.activation = Activation::kRelu; });
  for (Activation a : {Activation::kGelu, Activation::kGeluTanh, Activation::kSilu})
    cases.push_back(base), cases.back().activation = a;
  add([](Case& c) { c.x_channels_last = false; });
  add([](Case& c) { c.y_channels_last = false, c.residual = true; });
  add([](Case& c) { c.x_channels_last = c.y_channels_last = false; });
  add([](Case& c) { c.ordered = true; });
  add([](Case& c) { c.gap = 8; });
  add([](Case& c) { c.gap = 3, c.shift = 1; });
  add([](Case& c) { c.specials = true, c.density = 0.2; });
  add([](Case& c) { c.groups = 3, c.rows *= 3, c.cols *= 3; });
  // 1x1, and yet the maps differ in size: a pixel more at the end, which sees nothing.
  add([](Case& c) { c.geometry = convolution(2, 3, 4, {}, {}, true, 1); });
  add([](Case& c) { c.groups = 2, c.rows = 2 * (2 * c.height - c.height / 2), c.cols *= 2; });
  add([](Case& c) { c.groups = 2, c.rows *= 2, c.cols = 2 * (2 * c.width - c.width / 2); });
  // Infinite neighbours: what lies behind a ragged edge is another group's.
  add([](Case& c) {
    c.groups = 2, c.rows = 2 * (2 * c.height - c.height / 2);
    c.cols = 2 * (2 * c.width - c.width / 2), c.specials = true;
  });
  const Window same{3, 1, 1, 1}, strided{3, 2, 1, 1}, dilated{2, 1, 1, 2}, wide{2, 3, 2, 1};
  for (bool transposed : {false, true}) {
    add([&](Case& c) { c.geometry = convolution(2, 5, 6, same, same, transposed); });
    add([&](Case& c) { c.geometry = convolution(1, 7, 4, strided, strided, transposed, 1); });
    add([&](Case& c) { c.geometry = convolution(2, 5, 5, dilated, wide, transposed); });
    add([&](Case& c) { c.geometry = convolution(3, 1, 9, {}, strided, transposed); });
    add([&](Case& c) {
      c.geometry = convolution(2, 5, 4, same, strided, transposed);
      c.x_channels_last = false, c.residual = true;
    });
    add([&](Case& c) {
      c.geometry = convolution(2, 4, 5, strided, same, transposed);
      c.y_channels_last = false, c.groups = 2, c.rows *= 2, c.cols *= 2, c.gap = 8;
    });
  }
  add([](Case& c) { c.geometry = convolution(3, 4, 5, {}, {}), c.density = 1; });  // 1x1
  add([](Case& c) { c.geometry = convolution(0, 4, 5, {}, {}); });
  add([](Case& c) { c.geometry = convolution(2, 6, 6, {1, 2, 0, 1}, {1, 2, 0, 1}); });
  return cases;
}

}  // namespace tetris::cuda::test
