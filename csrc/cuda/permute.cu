#include <algorithm>

#include "cuda/launch.h"
#include "cuda/permute.cuh"

namespace tetris::cuda {
namespace {

constexpr int64_t kIntMax = 0x7fffffff;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows can be read or written 16 bytes at a time.
bool runs(const void* pointer, int element_size, std::initializer_list<int64_t> extents) {
  bool all = reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  for (int64_t extent : extents) all = all && extent * element_size % 16 == 0;
  return all;
}

std::string wrong_size(int element_size) {
  return "permute: elements must be 2, 4 or 8 bytes (got " + std::to_string(element_size) + ")";
}

template <int kBytes, int kRun>
std::string columns(const ColumnPermutation& p, int multiprocessors, size_t shared_bytes,
                    Stream stream) {
  using R = RowRun<kBytes, kRun>;
  ColumnPlan plan;
  plan.pitch = int(ceil_div(p.columns, 4) * 4);
  const size_t each = sizeof(typename R::Word) * plan.pitch;
  if (each > shared_bytes)
    return "permute: a row must fit in shared memory (" + std::to_string(each) + " bytes of " +
           std::to_string(shared_bytes) + ")";
  // Four CTAs an SM, so that some read while others write; up to 8 words, which share the indices.
  const size_t aim = std::min<size_t>(shared_bytes, 48 * 1024);
  const int64_t high = ceil_div(p.rows, R::kRows);
  plan.at_once = int(std::clamp<int64_t>(int64_t(aim / each), 1, 8));
  // Fewer where that would leave SMs without work.
  plan.at_once = int(std::clamp<int64_t>(high / (2 * multiprocessors), 1, plan.at_once));
  const int64_t ctas =
      std::min<int64_t>(ceil_div(high, plan.at_once), int64_t(4) * multiprocessors);
  return launch(&permute_columns_kernel<kBytes, kRun>,
                {unsigned(ctas), 1, 1, 256, each * plan.at_once}, stream, p, plan);
}

template <int kBytes>
std::string columns_of_size(const ColumnPermutation& p, int multiprocessors, size_t shared_bytes,
                            Stream stream) {
  if (runs(p.x, kBytes, {p.columns, p.x_stride}) && runs(p.y, kBytes, {p.y_stride}))
    return columns<kBytes, 16 / kBytes>(p, multiprocessors, shared_bytes, stream);
  return columns<kBytes, 1>(p, multiprocessors, shared_bytes, stream);
}

template <int kBytes>
std::string transpose(const TransposedPermutation& p, Stream stream) {
  using S = Square<kBytes>;
  TransposePlan plan;
  const int64_t row_tiles = ceil_div(p.rows, S::kSide),
                column_tiles = ceil_div(p.columns, S::kSide);
  if (row_tiles * column_tiles > kIntMax / p.matrices) return "permute: more than 2^31 tiles";
  plan.row_tiles = unsigned(row_tiles);
  plan.column_tiles = unsigned(column_tiles);
  plan.x_runs = runs(p.x, kBytes, {p.columns, p.x_stride, p.x_matrix});
  plan.y_runs = runs(p.y, kBytes, {p.rows, p.y_stride, p.y_matrix});
  return launch(
      &permute_transpose_kernel<kBytes>,
      {unsigned(row_tiles * column_tiles * p.matrices), 1, 1, S::kThreads, S::kSharedBytes}, stream,
      p, plan);
}

}  // namespace

std::string permute_columns(const ColumnPermutation& p, int multiprocessors, size_t shared_bytes,
                            Stream stream) {
  if (p.rows == 0 || p.columns == 0) return {};
  if (p.columns > kIntMax) return "permute: columns must be fewer than 2^31";
  switch (p.element_size) {
    case 2:
      return columns_of_size<2>(p, multiprocessors, shared_bytes, stream);
    case 4:
      return columns_of_size<4>(p, multiprocessors, shared_bytes, stream);
    case 8:
      return columns_of_size<8>(p, multiprocessors, shared_bytes, stream);
  }
  return wrong_size(p.element_size);
}

std::string permute_transpose(const TransposedPermutation& p, Stream stream) {
  if (p.matrices == 0 || p.rows == 0 || p.columns == 0) return {};
  switch (p.element_size) {
    case 2:
      return transpose<2>(p, stream);
    case 4:
      return transpose<4>(p, stream);
    case 8:
      return transpose<8>(p, stream);
  }
  return wrong_size(p.element_size);
}

}  // namespace tetris::cuda
