// The test support itself: kernels that are too simple to be wrong get everything right, mistakes
// are found, references agree with each other.
#include "cuda_emulator/problem.h"

#include <set>

#include "cuda/numeric.cuh"
#include "self_test.h"

namespace tetris::cuda::test {
namespace {

// One thread for each element of the result, as the interface is written down. `mistake` is one of
// those that real kernels make.
enum class Mistake {
  kNone,
  kPadding,
  kBlockNumber,
  kOtherGroup,
  kSkipsEmpty,
  kWritesGaps,
  kAddsInHalf
};

template <class T>
__global__ void plain_product(const Product p, Mistake mistake) {
  using Math = Numeric<T>;
  using Sum = typename Math::Accumulator;
  const SparseRows& w = p.w;
  const Geometry& g = p.geometry;
  const int64_t number = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (number >= g.pixels() * w.rows) return;
  const int64_t slot = number % w.rows, pixel = number / w.rows;
  const int64_t map = int64_t{g.result_h} * g.result_w, n = pixel / map, at = pixel % map;
  const int64_t group = slot / w.group_rows(), in_group = slot % w.group_rows();
  const int64_t block_row = group * w.block_rows_per_group() + in_group / w.height;
  if (mistake == Mistake::kSkipsEmpty && w.row_ptr[block_row] == w.row_ptr[block_row + 1]) return;
  const T* const values = static_cast<const T*>(p.values);
  const T* const x = static_cast<const T*>(p.x);
  Sum sum = 0;
  for (int32_t b = w.row_ptr[block_row]; b < w.row_ptr[block_row + 1]; ++b) {
    const int64_t block = w.block && mistake != Mistake::kBlockNumber ? w.block[b] : b;
    const int64_t tap = w.col_idx[b] / w.col_groups();
    int sy, sx;
    if (!g.source(int(at / g.result_w), int(at % g.result_w), int(tap / g.kernel_w),
                  int(tap % g.kernel_w), &sy, &sx))
      continue;
    for (int j = 0; j < w.width; ++j) {
      const int64_t col = w.col_idx[b] % w.col_groups() * w.width + j;
      if (col >= w.group_cols() && mistake != Mistake::kPadding) continue;
      int64_t col_slot = (mistake == Mistake::kOtherGroup ? 0 : group) * w.group_cols() + col;
      if (col_slot >= w.cols) col_slot = w.cols - 1;
      const int64_t channel = p.col_perm ? p.col_perm[col_slot] : col_slot;
      const int i = int(in_group % w.height);
      const T value =
          values[block * w.height * w.width + (w.transposed ? i * w.width + j : j * w.height + i)];
      const int64_t from = n * p.x_strides.image +
                           (int64_t{sy} * g.source_w + sx) * p.x_strides.pixel +
                           channel * p.x_strides.channel;
      sum += Math::load(value) * Math::load(x[from]);
      if (mistake == Mistake::kAddsInHalf) sum = Math::load(Math::store(sum));
    }
  }
  const int64_t row = p.row_perm ? p.row_perm[slot] : slot;
  if (p.bias) sum += Math::load(static_cast<const T*>(p.bias)[row]);
  if (p.residual)
    sum += Math::load(static_cast<const T*>(
        p.residual)[n * p.residual_strides.image + at * p.residual_strides.pixel +
                    row * p.residual_strides.channel]);
  const int64_t to = n * p.y_strides.image + at * p.y_strides.pixel + row * p.y_strides.channel;
  static_cast<T*>(p.y)[to] = Math::store(Sum(activate(p.activation, sum)));
  if (mistake == Mistake::kWritesGaps && row == w.rows - 1 && pixel + 1 < g.pixels())
    static_cast<T*>(p.y)[to + 1] = T{};
}

template <class T>
std::string plain(const Product& p, Mistake mistake) {
  const int64_t elements = p.geometry.pixels() * p.w.rows;
  if (elements == 0) return {};
  return launch(&plain_product<T>, {unsigned((elements + 255) / 256), 1, 1, 256}, nullptr, p,
                mistake);
}

// The same for sampled products: one thread for each stored entry.
template <class T>
__global__ void plain_sampled_product(const SampledProduct p, Mistake mistake) {
  using Math = Numeric<T>;
  using Sum = typename Math::Accumulator;
  const SparseRows& w = p.w;
  const Geometry& g = p.geometry;
  const int64_t number = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t block = number / (w.height * w.width);
  if (block >= w.nnzb) return;
  const int i = int(number % w.height), j = int(number / w.height % w.width);
  int64_t block_row = 0;
  while (w.row_ptr[block_row + 1] <= block) ++block_row;
  const int64_t group = block_row / w.block_rows_per_group();
  const int64_t row = block_row % w.block_rows_per_group() * w.height + i;
  const int64_t col = w.col_idx[block] % w.col_groups() * w.width + j;
  Sum sum = 0;
  if (row < w.group_rows() && col < w.group_cols()) {
    const int tap = int(w.col_idx[block] / w.col_groups());
    const int64_t row_slot = group * w.group_rows() + row, col_slot = group * w.group_cols() + col;
    const int64_t r = p.row_perm ? p.row_perm[row_slot] : row_slot;
    const int64_t c = p.col_perm ? p.col_perm[col_slot] : col_slot;
    for (int n = 0; n < g.images; ++n)
      for (int y = 0; y < g.result_h; ++y)
        for (int x = 0; x < g.result_w; ++x) {
          int sy, sx;
          if (!g.source(y, x, tap / g.kernel_w, tap % g.kernel_w, &sy, &sx)) continue;
          const auto at = [&](const Strides& s, int width, int py, int px, int64_t channel) {
            return n * s.image + (int64_t{py} * width + px) * s.pixel + channel * s.channel;
          };
          const T from = static_cast<const T*>(p.x)[at(p.x_strides, g.source_w, sy, sx, c)];
          const T to = static_cast<const T*>(p.dy)[at(p.dy_strides, g.result_w, y, x, r)];
          sum += Math::load(from) * Math::load(to);
        }
  } else if (mistake == Mistake::kPadding) {
    return;
  }
  if (p.partial)
    atomicAdd(p.partial + number, float(sum));
  else
    static_cast<T*>(p.dvalues)[number] = Math::store(sum);
}

template <class T>
std::string plain(const SampledProduct& p, Mistake mistake) {
  const int64_t elements = p.w.nnzb * p.w.height * p.w.width;
  if (elements == 0) return {};
  return launch(&plain_sampled_product<T>, {unsigned((elements + 255) / 256), 1, 1, 256}, nullptr,
                p, mistake);
}

template <class Problem>
std::string run(Problem& problem, Mistake mistake = Mistake::kNone) {
  problem.clear();
  switch (problem.product().dtype) {
    case DType::kFloat16:
      return plain<Half>(problem.product(), mistake);
    case DType::kBFloat16:
      return plain<BFloat16>(problem.product(), mistake);
    case DType::kFloat32:
      return plain<float>(problem.product(), mistake);
    case DType::kFloat64:
      return plain<double>(problem.product(), mistake);
  }
  return "no such dtype";
}

constexpr DType kDTypes[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64};

void expect_right(const Case& c, uint64_t seed) {
  SCOPED_TRACE(c.name());
  ProductProblem problem(c, seed);
  ASSERT_EQ("", run(problem));
  EXPECT_EQ("", problem.wrong());
  if (c.gradient) return;
  Case split = c;
  split.split = c.dtype != DType::kFloat64 && seed % 2 == 0;
  SampledProblem sampled(split, seed);
  ASSERT_EQ("", run(sampled));
  EXPECT_EQ("", split.split ? sampled.wrong_partial() : sampled.wrong());
}

TEST(Problems, KernelsAsWrittenDownAreRight) {
  for (DType dtype : kDTypes)
    for (const Case& c : risky_cases(dtype, 4, 2)) expect_right(c, 7);
  uint64_t seed = 0;
  for (const Case& c : random_cases(100, 3)) expect_right(c, ++seed);
}

TEST(Problems, CasesHaveNamesOfTheirOwn) {
  std::set<std::string> names;
  const std::vector<Case> cases = risky_cases(DType::kFloat32, 16, 8);
  for (const Case& c : cases) EXPECT_TRUE(names.insert(c.name()).second) << c.name();
  EXPECT_GT(cases.size(), 80u);
}

TEST(Problems, RandomCasesStayWithinLimits) {
  Limits limits;
  limits.dtypes = {DType::kBFloat16};
  limits.heights = {16, 64};
  limits.widths = {8};
  limits.channels_first = limits.groups = limits.col_perm = limits.shifts = false;
  limits.multiple_of = 8;
  for (const Case& c : random_cases(300, 5, limits)) {
    EXPECT_EQ(c.dtype, DType::kBFloat16);
    EXPECT_TRUE(c.height == 16 || c.height == 64);
    EXPECT_TRUE(c.width == 8 && c.groups == 1 && c.shift == 0 && !c.col_perm);
    EXPECT_TRUE(c.x_channels_last && c.y_channels_last);
    EXPECT_TRUE(c.rows % 8 == 0 && c.cols % 8 == 0 && c.gap % 8 == 0) << c.name();
  }
}

// -- mistakes are found ---------------------------------------------------------------------------

std::string result_of(const Case& c, Mistake mistake) {
  ProductProblem problem(c, 3);
  EXPECT_EQ("", run(problem));
  EXPECT_EQ("", problem.wrong());
  EXPECT_EQ("", run(problem, mistake));
  return problem.wrong();
}

Case some_case(DType dtype) {
  Case c;
  c.dtype = dtype;
  c.rows = 23;  // ragged on both sides
  c.cols = 30;
  c.height = c.width = 4;
  c.geometry = tokens(9);
  return c;
}

TEST(Problems, MistakesOfProductsAreFound) {
  for (DType dtype : kDTypes) {
    Case c = some_case(dtype);
    EXPECT_MENTIONS(result_of(c, Mistake::kPadding), "is nan instead of");
    EXPECT_MENTIONS(result_of(c, Mistake::kSkipsEmpty), "is nan instead of");
    c.groups = 2;
    c.rows = 24;
    EXPECT_MENTIONS(result_of(c, Mistake::kOtherGroup), "instead of");
    c = some_case(dtype);
    c.gradient = true;
    EXPECT_MENTIONS(result_of(c, Mistake::kBlockNumber), "instead of");
    c.gap = 3;
    EXPECT_MENTIONS(result_of(c, Mistake::kWritesGaps), "between its elements, at offset");
  }
  Case c = some_case(DType::kFloat16);
  c.cols = 2000;
  EXPECT_MENTIONS(result_of(c, Mistake::kAddsInHalf), "are wrong");
}

TEST(Problems, MistakesOfSampledProductsAreFound) {
  for (DType dtype : kDTypes) {
    SampledProblem problem(some_case(dtype), 3);
    ASSERT_EQ("", run(problem, Mistake::kPadding));
    EXPECT_MENTIONS(problem.wrong(), "is nan instead of 0");
  }
}

TEST(Problems, SmallErrorsAreFound) {
  for (DType dtype : kDTypes) {
    ProductProblem problem(some_case(dtype), 3);
    ASSERT_EQ("", run(problem));
    int64_t largest = 0;
    for (int64_t i = 0; i < problem.y().size(); ++i)
      if (std::fabs(problem.y().get(i)) > std::fabs(problem.y().get(largest))) largest = i;
    const double right = problem.y().get(largest);
    problem.y().set(largest, right * (1 + (dtype < DType::kFloat32 ? 4 : 200) * unit(dtype)));
    EXPECT_MENTIONS(problem.wrong(), "(1 of 207 are wrong)");
  }
}

TEST(Problems, SpecialsMustBeInTheirPlaces) {
  Case c = some_case(DType::kFloat32);
  c.specials = true;
  ProductProblem problem(c, 5);
  ASSERT_EQ("", run(problem));
  ASSERT_EQ("", problem.wrong());
  int64_t finite = 0, infinite = 0, nan = 0;
  for (int64_t i = 0; i < problem.y().size(); ++i) {
    const double right = problem.y().get(i);
    (std::isfinite(right) ? finite : std::isinf(right) ? infinite : nan)++;
    for (double other : {0.0, double(INFINITY), double(-INFINITY), Numbers::kNan}) {
      problem.y().set(i, other);
      const bool same = other == right || (std::isnan(other) && std::isnan(right));
      EXPECT_EQ(problem.wrong().empty(), same) << other << " instead of " << right;
    }
    problem.y().set(i, right);
  }
  EXPECT_TRUE(finite > 0 && infinite > 0 && nan > 0) << finite << " " << infinite << " " << nan;
}

// -- references agree -----------------------------------------------------------------------------

double dot(const Numbers& a, const Map& map, const Sums& b) {
  double sum = 0;
  map.for_each([&](int64_t at, int64_t i) { sum += a.get(at) * b.sum[i]; });
  return sum;
}

// f(dy, W, x) = sum of dy (W x): the same from the product, from the transposed product, and from
// the sampled product with the values.
TEST(References, AgreeOnTheTrilinearForm) {
  uint64_t seed = 0;
  Limits limits;
  limits.dtypes = {DType::kFloat64};
  for (const Case& c : random_cases(60, 11, limits)) {
    SCOPED_TRACE(c.name());
    Random random(++seed);
    const Layout layout = random_layout(c, random);
    const OwnedLayout forward(layout), backward(transposed(layout));
    const Geometry& g = c.geometry;
    const Map source(g.images, g.source_h * g.source_w, c.cols, c.x_channels_last, 0);
    const Map result(g.images, g.result_h * g.result_w, c.rows, c.y_channels_last, 0);
    const Numbers values = random_values(c.dtype, forward, 0, random);
    const Numbers x = random_map(c.dtype, source, 0, random);
    const Numbers dy = random_map(c.dtype, result, 0, random);

    Product product;
    product.w = forward.view;
    product.geometry = g;
    product.x_strides = source.strides;
    product.row_perm = forward.row_perm;
    product.col_perm = forward.col_perm;
    const double want = dot(dy, result, reference(product, values, x, nullptr, nullptr));

    Product gradient;
    gradient.w = backward.view;
    gradient.geometry = reversed(g);
    gradient.x_strides = result.strides;
    gradient.row_perm = backward.row_perm;
    gradient.col_perm = backward.col_perm;
    const double from_gradient = dot(x, source, reference(gradient, values, dy, nullptr, nullptr));
    EXPECT_NEAR(from_gradient, want, 1e-9);

    SampledProduct sampled;
    sampled.w = forward.view;
    sampled.geometry = g;
    sampled.x_strides = source.strides;
    sampled.dy_strides = result.strides;
    sampled.row_perm = forward.row_perm;
    sampled.col_perm = forward.col_perm;
    const Sums dvalues = reference(sampled, x, dy);
    double from_sampled = 0;
    for (int64_t i = 0; i < values.size(); ++i)
      if (!std::isnan(values.get(i))) from_sampled += values.get(i) * dvalues.sum[i];
    EXPECT_NEAR(from_sampled, want, 1e-9);
  }
}

TEST(References, ByHand) {
  // y[p, r] of two tokens, three rows, two columns, blocks of 2 x 1:
  //   W' = [ 1 . ]   rows of W' are outputs 2, 0, 1; columns inputs 1, 0; the last row is ragged
  //        [ 2 . ]
  //        [ . 3 ]
  Layout layout;
  layout.shape.rows = 3;
  layout.shape.cols = 2;
  layout.shape.height = 2;
  layout.shape.nnzb = 2;
  layout.row_ptr = {0, 1, 2};
  layout.col_idx = {0, 1};
  layout.row_perm = {2, 0, 1};
  layout.col_perm = {1, 0};
  const OwnedLayout w(layout);
  Numbers values(DType::kFloat32, 4), x(DType::kFloat32, 4), bias(DType::kFloat32, 3);
  for (int i = 0; i < 3; ++i) values.set(i, i + 1), bias.set(i, 100 * i);
  const double tokens_of[] = {5, 7, 11, 13};
  for (int i = 0; i < 4; ++i) x.set(i, tokens_of[i]);
  Product p;
  p.w = w.view;
  p.geometry = tokens(2);
  p.x_strides = {0, 2, 1};
  p.row_perm = w.row_perm;
  p.col_perm = w.col_perm;
  const Sums y = reference(p, values, x, &bias, nullptr);
  EXPECT_EQ(y.sum, (std::vector<double>{14, 115, 207, 26, 133, 213}));
  EXPECT_EQ(y.terms, (std::vector<int64_t>(6, 2)));

  const Layout t = transposed(layout);
  EXPECT_EQ(t.row_ptr, (std::vector<int32_t>{0, 1, 2}));
  EXPECT_EQ(t.block, (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(t.col_idx, (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(t.shape.height, 1);
  EXPECT_EQ(t.shape.width, 2);
  EXPECT_TRUE(t.shape.transposed);
}

}  // namespace
}  // namespace tetris::cuda::test
