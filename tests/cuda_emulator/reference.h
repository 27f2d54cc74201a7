// Products in double precision, as plainly as possible, and how far from them a kernel may be.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda_emulator/layout.h"

namespace tetris::cuda::test {

// A sum and the sum of the absolute values of its terms, which bounds what rounding can do.
struct Sums {
  std::vector<double> sum, scale;
  std::vector<int64_t> terms;
  explicit Sums(int64_t n) : sum(n), scale(n), terms(n) {}
  void add(int64_t i, double term) {
    sum[i] += term;
    scale[i] += std::fabs(term);
    ++terms[i];
  }
};

inline int64_t offset(const Strides& s, int64_t image, int64_t pixel, int64_t channel) {
  return image * s.image + pixel * s.pixel + channel * s.channel;
}

// Calls fn(image, pixel of the result, pixel of the source) for all that meet through the tap.
template <class Fn>
void for_each_pixel(const Geometry& g, int64_t tap, Fn fn) {
  const int ky = int(tap) / g.kernel_w, kx = int(tap) % g.kernel_w;
  for (int64_t n = 0; n < g.images; ++n)
    for (int y = 0; y < g.result_h; ++y)
      for (int x = 0; x < g.result_w; ++x) {
        int sy, sx;
        if (g.source(y, x, ky, kx, &sy, &sx))
          fn(n, int64_t{y} * g.result_w + x, int64_t{sy} * g.source_w + sx);
      }
}

// Before the activation; element [image][pixel][row] of the result.
inline Sums reference(const Product& p, const Numbers& values, const Numbers& x,
                      const Numbers* bias, const Numbers* residual) {
  const Geometry& g = p.geometry;
  const int64_t pixels = int64_t{g.result_h} * g.result_w, rows = p.w.rows;
  Sums y(g.images * pixels * rows);
  for (int64_t n = 0; n < g.images; ++n)
    for (int64_t i = 0; i < pixels; ++i)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (n * pixels + i) * rows + r;
        if (bias) y.add(at, bias->get(r));
        if (residual) y.add(at, residual->get(offset(p.residual_strides, n, i, r)));
      }
  const std::vector<double> v = values.all(), source = x.all();
  for_each_entry(p.w, p.row_perm, p.col_perm, [&](int64_t at, int64_t r, int64_t tap, int64_t c) {
    if (r < 0) return;
    for_each_pixel(g, tap, [&](int64_t n, int64_t to, int64_t from) {
      y.add((n * pixels + to) * rows + r, v[at] * source[offset(p.x_strides, n, from, c)]);
    });
  });
  return y;
}

// Element [block][column][row] of the stored blocks, zero outside the matrix.
inline Sums reference(const SampledProduct& p, const Numbers& x, const Numbers& dy) {
  Sums dvalues(p.w.nnzb * p.w.height * p.w.width);
  const std::vector<double> source = x.all(), result = dy.all();
  for_each_entry(p.w, p.row_perm, p.col_perm, [&](int64_t at, int64_t r, int64_t tap, int64_t c) {
    if (r < 0) return;
    for_each_pixel(p.geometry, tap, [&](int64_t n, int64_t to, int64_t from) {
      dvalues.add(at,
                  result[offset(p.dy_strides, n, to, r)] * source[offset(p.x_strides, n, from, c)]);
    });
  });
  return dvalues;
}

inline double activate(Activation activation, double v) {
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:
      return v < 0 ? 0 : v;
    case Activation::kGelu:
      return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    case Activation::kGeluTanh:
      return 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    case Activation::kSilu:
      return v / (1 + std::exp(-v));
  }
  std::abort();
}

// Half the distance from 1 to the next number.
inline double unit(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return 0x1p-11;
    case DType::kBFloat16:
      return 0x1p-8;
    case DType::kFloat32:
      return 0x1p-24;
    case DType::kFloat64:
      return 0x1p-53;
  }
  std::abort();
}

// How far activate(sum) may be from the reference: each term is rounded when it is added, in float
// (double for double), the result once more in its own type. TF32 operands lose up to 2^-10 each
// where their low bits are cut off. Activations lose a few units of their argument and have slopes
// up to 1.13.
inline double tolerance(DType dtype, bool tf32, Activation activation, int64_t terms, double scale,
                        double sum) {
  const double accumulator = dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
  double bound = (double(terms) + 3) * accumulator * scale;
  if (tf32 && dtype == DType::kFloat32) bound += 0x1p-9 * scale;
  if (activation != Activation::kNone && activation != Activation::kRelu)
    bound = 1.13 * bound + 16 * accumulator * std::fabs(sum);
  const double smallest = dtype == DType::kFloat16 ? 0x1p-25 : 0;  // half a subnormal
  return bound + unit(dtype) * (std::fabs(activate(activation, sum)) + bound) + smallest;
}

// Infinities and NaN must be where the reference has them.
inline bool close(double got, double want, double tolerance) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return std::fabs(got - want) <= tolerance;
}

}  // namespace tetris::cuda::test
