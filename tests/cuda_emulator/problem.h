// Random products with operands in memory of their own, and whether a kernel got them right.
//
//   ProductProblem problem(c, seed);
//   ASSERT_EQ("", simt_product(problem.product(), config, nullptr)) << c.name();
//   EXPECT_EQ("", problem.wrong()) << c.name();
//
// What no kernel may use is NaN: entries of ragged blocks outside the matrix, gaps between tokens,
// results before they are written.
#pragma once

#include <cstdio>
#include <optional>
#include <string>

#include "cuda_emulator/cases.h"
#include "cuda_emulator/reference.h"

namespace tetris::cuda::test {

// A feature map (or a matrix of tokens) in memory.
struct Map {
  int64_t images, pixels, channels;
  Strides strides;

  Map(int64_t images, int64_t pixels, int64_t channels, bool channels_last, int64_t gap)
      : images(images), pixels(pixels), channels(channels) {
    strides.pixel = channels_last ? channels + gap : 1;
    strides.channel = channels_last ? 1 : pixels + gap;
    strides.image = channels_last ? pixels * strides.pixel : channels * strides.channel;
  }
  int64_t size() const {
    if (images * pixels * channels == 0) return 0;
    return offset(strides, images - 1, pixels - 1, channels - 1) + 1;
  }
  template <class Fn>
  void for_each(Fn fn) const {  // fn(offset, number of the element [image][pixel][channel])
    int64_t number = 0;
    for (int64_t n = 0; n < images; ++n)
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = 0; c < channels; ++c) fn(offset(strides, n, p, c), number++);
  }
};

inline double draw(Random& random) { return (random.below(1u << 24) - 0x1p23) * 0x1p-23; }

inline Numbers random_map(DType dtype, const Map& map, int64_t shift, Random& random) {
  Numbers numbers(dtype, map.size(), shift);
  map.for_each([&](int64_t at, int64_t) { numbers.set(at, draw(random)); });
  return numbers;
}

// About one number in `one_in`, and the first.
inline void add_specials(Numbers& numbers, const Map& map, int one_in, Random& random) {
  const double specials[] = {INFINITY, -INFINITY, Numbers::kNan};
  map.for_each([&](int64_t at, int64_t number) {
    if (number == 0 || random.one_in(uint32_t(one_in))) numbers.set(at, specials[random.below(3)]);
  });
}

// Values of a layout, NaN outside the matrix.
inline Numbers random_values(DType dtype, const OwnedLayout& w, int64_t shift, Random& random) {
  Numbers values(dtype, w.view.nnzb * w.view.height * w.view.width, shift);
  for_each_entry(w.view, nullptr, nullptr, [&](int64_t at, int64_t row, int64_t, int64_t) {
    if (row >= 0) values.set(at, draw(random));
  });
  return values;
}

inline std::string differs(const std::string& what, double got, double want, double tolerance) {
  char text[120];
  std::snprintf(text, sizeof text, " is %.9g instead of %.9g +- %.2g", got, want, tolerance);
  return what + text;
}

class ProductProblem {
 public:
  explicit ProductProblem(const Case& c, uint64_t seed = 1)
      : ProductProblem(c, Random(seed), c.gradient ? reversed(c.geometry) : c.geometry) {}

  const Product& product() const { return product_; }
  Numbers& x() { return x_; }
  Numbers& y() { return y_; }
  Numbers& values() { return values_; }
  void clear() { y_.fill(Numbers::kNan); }  // before another run

  // Where the result is wrong, or an empty string.
  std::string wrong() const {
    const Sums want = reference(product_, values_, x_, product_.bias ? &bias_ : nullptr,
                                residual_ ? &*residual_ : nullptr);
    std::string first;
    int64_t count = 0;
    std::vector<bool> used(static_cast<size_t>(y_.size()));
    y_map_.for_each([&](int64_t at, int64_t i) {
      used[at] = true;
      const double sum = want.sum[i], result = activate(product_.activation, sum);
      const double bound = tolerance(product_.dtype, product_.allow_tf32, product_.activation,
                                     want.terms[i], want.scale[i], sum);
      if (close(y_.get(at), result, bound)) return;
      if (count++ == 0)
        first = differs("y[pixel " + std::to_string(i / product_.w.rows) + ", row " +
                            std::to_string(i % product_.w.rows) + "]",
                        y_.get(at), result, bound);
    });
    for (int64_t at = 0; at < y_.size() && count == 0; ++at)
      if (!used[at] && !std::isnan(y_.get(at)))
        return "y was written between its elements, at offset " + std::to_string(at);
    if (count == 0) return {};
    return first + " (" + std::to_string(count) + " of " + std::to_string(want.sum.size()) +
           " are wrong)";
  }

 private:
  ProductProblem(const Case& c, Random random, const Geometry& g)
      : layout_(c.gradient ? transposed(random_layout(c, random)) : random_layout(c, random)),
        values_(random_values(c.dtype, layout_, c.shift, random)),
        x_map_(g.images, int64_t{g.source_h} * g.source_w, layout_.view.cols, c.x_channels_last,
               c.gap),
        y_map_(g.images, int64_t{g.result_h} * g.result_w, layout_.view.rows, c.y_channels_last,
               c.gap),
        x_(random_map(c.dtype, x_map_, c.shift, random)),
        bias_(random_map(c.dtype, Map(1, 1, layout_.view.rows, true, 0), 0, random)),
        y_(c.dtype, y_map_.size(), c.shift) {
    if (c.specials) add_specials(x_, x_map_, 200, random);
    product_.w = layout_.view;
    product_.geometry = g;
    product_.values = values_.data();
    product_.x = x_.data();
    product_.x_strides = x_map_.strides;
    if (c.bias) product_.bias = bias_.data();
    if (c.residual) {
      residual_.emplace(random_map(c.dtype, y_map_, c.shift, random));
      product_.residual = residual_->data();
      product_.residual_strides = y_map_.strides;
    }
    product_.y = y_.data();
    product_.y_strides = y_map_.strides;
    product_.row_perm = layout_.row_perm;
    product_.col_perm = layout_.col_perm;
    product_.dtype = c.dtype;
    product_.activation = c.activation;
    product_.allow_tf32 = c.allow_tf32;
  }

  OwnedLayout layout_;
  Numbers values_;
  Map x_map_, y_map_;
  Numbers x_, bias_, y_;
  std::optional<Numbers> residual_;
  Product product_;
};

class SampledProblem {
 public:
  explicit SampledProblem(const Case& c, uint64_t seed = 1) : SampledProblem(c, Random(seed)) {}

  const SampledProduct& product() const { return product_; }
  Numbers& x() { return x_; }
  Numbers& dy() { return dy_; }
  Numbers& dvalues() { return dvalues_; }
  void clear() {
    dvalues_.fill(Numbers::kNan);
    partial_.fill(0);
  }

  std::string wrong() const { return wrong("dvalues", dvalues_); }
  std::string wrong_partial() const { return wrong("partial", partial_); }

 private:
  SampledProblem(const Case& c, Random random)
      : layout_(random_layout(c, random)),
        x_map_(c.geometry.images, int64_t{c.geometry.source_h} * c.geometry.source_w, c.cols,
               c.x_channels_last, c.gap),
        dy_map_(c.geometry.images, int64_t{c.geometry.result_h} * c.geometry.result_w, c.rows,
                c.y_channels_last, c.gap),
        x_(random_map(c.dtype, x_map_, c.shift, random)),
        dy_(random_map(c.dtype, dy_map_, c.shift, random)),
        dvalues_(c.dtype, layout_.view.nnzb * c.height * c.width, c.shift),
        partial_(DType::kFloat32, c.split ? dvalues_.size() : 0) {
    partial_.fill(0);
    if (c.specials) add_specials(x_, x_map_, 200, random);
    product_.w = layout_.view;
    product_.geometry = c.geometry;
    product_.x = x_.data();
    product_.x_strides = x_map_.strides;
    product_.dy = dy_.data();
    product_.dy_strides = dy_map_.strides;
    product_.dvalues = dvalues_.data();
    if (c.split) product_.partial = static_cast<float*>(partial_.data());
    product_.row_perm = layout_.row_perm;
    product_.col_perm = layout_.col_perm;
    product_.dtype = c.dtype;
    product_.allow_tf32 = c.allow_tf32;
  }

  std::string wrong(const char* what, const Numbers& got) const {
    const Sums want = reference(product_, x_, dy_);
    const int64_t height = product_.w.height, size = height * product_.w.width;
    std::string first;
    int64_t count = 0;
    for (int64_t i = 0; i < int64_t(want.sum.size()); ++i) {
      // A dtype of 16 bits accumulates like float, whichever type the sums have at last.
      const double bound = tolerance(got.dtype(), product_.allow_tf32, Activation::kNone,
                                     want.terms[i], want.scale[i], want.sum[i]);
      if (close(got.get(i), want.sum[i], bound)) continue;
      if (count++ == 0)
        first = differs(std::string(what) + "[block " + std::to_string(i / size) + ", column " +
                            std::to_string(i % size / height) + ", row " +
                            std::to_string(i % height) + "]",
                        got.get(i), want.sum[i], bound);
    }
    if (count == 0) return {};
    return first + " (" + std::to_string(count) + " of " + std::to_string(want.sum.size()) +
           " are wrong)";
  }

  OwnedLayout layout_;
  Map x_map_, dy_map_;
  Numbers x_, dy_, dvalues_, partial_;
  SampledProduct product_;
};

}  // namespace tetris::cuda::test
