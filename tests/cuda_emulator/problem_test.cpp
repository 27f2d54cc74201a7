// The test support itself: a kernel that is too simple to be wrong gets everything right, and
// mistakes are found.
#include "cuda_emulator/problem.h"

#include <gtest/gtest.h>

#include "cuda/launch.h"
#include "cuda/numeric.cuh"

namespace tetris::cuda::test {
namespace {

// One thread for each element of the result, as the interface is written down. `mistake` is one of
// those that real kernels make.
enum class Mistake { kNone, kPadding, kBlockNumber, kOtherGroup, kSkipsEmpty, kIgnoresGap };

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
    }
  }
  const int64_t row = p.row_perm ? p.row_perm[slot] : slot;
  if (p.bias) sum += Math::load(static_cast<const T*>(p.bias)[row]);
  if (p.residual)
    sum += Math::load(static_cast<const T*>(
        p.residual)[n * p.residual_strides.image + at * p.residual_strides.pixel +
                    row * p.residual_strides.channel]);
  static_cast<T*>(p.y)[n * p.y_strides.image + at * p.y_strides.pixel + row * p.y_strides.channel] =
      Math::store(Sum(activate(p.activation, sum)));
}

template <class T>
std::string plain(const Product& p, Mistake mistake) {
  const int64_t elements = p.geometry.pixels() * p.w.rows;
  if (elements == 0) return {};
  return launch(&plain_product<T>, {unsigned((elements + 255) / 256), 1, 1, 256}, nullptr, p,
                mistake);
}

std::string run(ProductProblem& problem, Mistake mistake = Mistake::kNone) {
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

void expect_right(const Case& c, uint64_t seed) {
  SCOPED_TRACE(c.name());
  ProductProblem problem(c, seed);
  ASSERT_EQ("", run(problem));
  EXPECT_EQ("", problem.wrong());
}

TEST(Problems, AKernelAsWrittenDownIsRight) {
  for (DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64})
    for (const Case& c : risky_cases(dtype, 4, 2)) expect_right(c, 7);
  uint64_t seed = 0;
  for (const Case& c : random_cases(100, 3)) expect_right(c, ++seed);
}

}  // namespace
}  // namespace tetris::cuda::test
