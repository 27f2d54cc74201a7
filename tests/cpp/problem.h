// A layer with operands in guarded memory, and its products in double precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/view.h"
#include "cpu/bsmm.h"
#include "guarded.h"

namespace tetris::test {

struct Shape {
  int64_t m, n, k, bo, bi;
  double density;
  bool row_perm = true, col_perm = true, bias = true;

  std::string name() const {
    return "m" + std::to_string(m) + "-n" + std::to_string(n) + "-k" + std::to_string(k) + "-b" +
           std::to_string(bo) + "x" + std::to_string(bi) + "-d" +
           std::to_string(static_cast<int>(density * 100));
  }
};

// Index arrays in plain vectors: easy to build and to break.
struct Index {
  std::vector<int32_t> row_ptr, col_idx, row_perm, col_perm;
};

inline std::vector<int32_t> random_permutation(int64_t n, std::mt19937& rng) {
  std::vector<int32_t> p(n);
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<int32_t>(i);
  for (int64_t i = n - 1; i > 0; --i) std::swap(p[i], p[rng() % (i + 1)]);
  return p;
}

inline Index random_index(const Shape& s, std::mt19937& rng) {
  Index index;
  index.row_ptr.push_back(0);
  const int64_t rows = (s.n + s.bo - 1) / s.bo, groups = (s.k + s.bi - 1) / s.bi;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t g = 0; g < groups; ++g)
      if (rng() % 1000 < s.density * 1000 && (rows < 3 || r != 1 || s.density >= 1))
        index.col_idx.push_back(static_cast<int32_t>(g));
    index.row_ptr.push_back(static_cast<int32_t>(index.col_idx.size()));
  }
  if (s.row_perm) index.row_perm = random_permutation(s.n, rng);
  if (s.col_perm) index.col_perm = random_permutation(s.k, rng);
  return index;
}

template <class T>
std::unique_ptr<Guarded<T>> guarded(const std::vector<T>& v, Place place) {
  auto g = std::make_unique<Guarded<T>>(v.size(), place);
  for (size_t i = 0; i < v.size(); ++i) (*g)[i] = v[i];
  return g;
}

// Every array has exactly the size the interface promises. Entries that no kernel may use (padding
// of ragged blocks, gaps between the rows of x and dy) are NaN.
template <class T>
struct Problem {
  static constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
  Shape s;
  BlockSparseView view;
  std::unique_ptr<Guarded<int32_t>> row_ptr, col_idx, row_perm, col_perm;
  Guarded<T> values, x, dy, bias;
  int64_t ldx, ldg;

  static int64_t matrix_size(int64_t m, int64_t n, int64_t ld) {
    return m == 0 ? 0 : (m - 1) * ld + n;
  }

  Problem(const Shape& shape, const Index& index, std::mt19937& rng, Place place, int64_t gap)
      : s(shape),
        row_ptr(guarded(index.row_ptr, place)),
        col_idx(guarded(index.col_idx, place)),
        row_perm(guarded(index.row_perm, place)),
        col_perm(guarded(index.col_perm, place)),
        values(static_cast<int64_t>(index.col_idx.size()) * s.bo * s.bi, place),
        x(matrix_size(s.m, s.k, s.k + gap), place),
        dy(matrix_size(s.m, s.n, s.n + gap), place),
        bias(s.n, place),
        ldx(s.k + gap),
        ldg(s.n + gap) {
    view.out = s.n;
    view.in = s.k;
    view.bo = s.bo;
    view.bi = s.bi;
    view.nnzb = static_cast<int64_t>(index.col_idx.size());
    view.row_ptr = row_ptr->data();
    view.col_idx = col_idx->data();
    view.row_perm = s.row_perm ? row_perm->data() : nullptr;
    view.col_perm = s.col_perm ? col_perm->data() : nullptr;
    std::uniform_real_distribution<T> draw(-1, 1);
    const auto fill = [&](Guarded<T>& a, int64_t n, int64_t ld) {
      for (int64_t i = 0; i < a.size(); ++i) a[i] = i % ld < n ? draw(rng) : kNan;
    };
    fill(values, 1, 1);
    fill(x, s.k, ldx);
    fill(dy, s.n, ldg);
    fill(bias, 1, 1);
  }

  // Calls fn(offset in values, output, input) for each stored entry inside the matrix; the others
  // get fn(offset, -1, -1). Needs valid index arrays.
  template <class Fn>
  void for_each_entry(Fn fn) const {
    for (int64_t r = 0; r < view.block_rows(); ++r)
      for (int64_t b = view.row_ptr[r]; b < view.row_ptr[r + 1]; ++b)
        for (int64_t i = 0; i < s.bi; ++i)
          for (int64_t o = 0; o < s.bo; ++o) {
            const int64_t at = (b * s.bi + i) * s.bo + o;
            const int64_t out = r * s.bo + o, in = view.col_idx[b] * s.bi + i;
            if (out < s.n && in < s.k)
              fn(at, view.row_perm ? view.row_perm[out] : out,
                 view.col_perm ? view.col_perm[in] : in);
            else
              fn(at, int64_t{-1}, int64_t{-1});
          }
  }
  void poison_padding() {
    for_each_entry([&](int64_t at, int64_t o, int64_t) {
      if (o < 0) values[at] = kNan;
    });
  }

  // A product and the sum of the absolute values of its terms.
  struct Reference {
    std::vector<double> sum, scale;
    explicit Reference(int64_t n) : sum(n), scale(n) {}
    void add(int64_t i, double term) {
      sum[i] += term;
      scale[i] += std::fabs(term);
    }
  };
  Reference forward() const {
    Reference y(s.m * s.n);
    for (int64_t t = 0; t < s.m; ++t)
      for (int64_t o = 0; o < s.n && s.bias; ++o) y.add(t * s.n + o, bias[o]);
    for_each_entry([&](int64_t at, int64_t o, int64_t i) {
      for (int64_t t = 0; t < s.m && o >= 0; ++t)
        y.add(t * s.n + o, double(values[at]) * x[t * ldx + i]);
    });
    return y;
  }
  Reference grad_input() const {
    Reference dx(s.m * s.k);
    for_each_entry([&](int64_t at, int64_t o, int64_t i) {
      for (int64_t t = 0; t < s.m && o >= 0; ++t)
        dx.add(t * s.k + i, double(values[at]) * dy[t * ldg + o]);
    });
    return dx;
  }
  Reference grad_values() const {
    Reference dv(values.size());
    for_each_entry([&](int64_t at, int64_t o, int64_t i) {
      for (int64_t t = 0; t < s.m && o >= 0; ++t)
        dv.add(at, double(x[t * ldx + i]) * dy[t * ldg + o]);
    });
    return dv;
  }
};

// The first element of got[m, n] that lies further from the reference than `terms` roundings can
// move it, or -1. Unwritten elements are NaN, which is far from everything.
template <class T, class R>
int64_t first_wrong(const T* got, int64_t ld, int64_t m, int64_t n, const R& want, int64_t terms) {
  const double unit = std::numeric_limits<T>::epsilon() / 2;
  for (int64_t t = 0; t < m; ++t)
    for (int64_t i = 0; i < n; ++i) {
      const double bound = (terms + 3) * unit * want.scale[t * n + i];
      if (!(std::fabs(got[t * ld + i] - want.sum[t * n + i]) <= bound)) return t * n + i;
    }
  return -1;
}

}  // namespace tetris::test
