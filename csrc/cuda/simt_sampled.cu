#include <algorithm>

#include "cuda/launch.h"
#include "cuda/simt.h"
#include "cuda/simt_sampled.cuh"

namespace tetris::cuda {
namespace {

constexpr int64_t kIntMax = 0x7fffffff;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class A, int TM, int TK>
std::string items(const SampledProduct& p, const SimtSampledConfig& config, Stream stream) {
  using S = Sampled<A, TM, TK>;
  const SparseRows& w = p.w;
  SampledPlan plan;
  plan.extents = extents_of(w, p.geometry);
  plan.by_row = config.by_row;
  int64_t taps = 1;
  if (config.by_row) {
    plan.block_rows = 1;
    plan.slots = std::min(S::kMaxSlots, S::kCapacity / w.height) / TK * TK;
    const int64_t inputs = ceil_div(w.nnzb, w.block_rows()) * w.width;  // of a block row
    plan.column_chunks = int(std::max<int64_t>(1, ceil_div(inputs, plan.slots)));
  } else {
    plan.block_rows = S::kMaxRows / w.height;
    plan.slots = S::kRegionColumns / w.width * w.width;
    plan.column_chunks = int(ceil_div(w.col_groups(), plan.slots / w.width));
    taps = w.taps;
  }
  plan.rows = plan.block_rows * w.height;
  plan.row_chunks = int(ceil_div(w.block_rows_per_group(), plan.block_rows));
  plan.most_items = plan.rows / TM * (plan.slots / TK);
  const int64_t pixels = p.geometry.pixels();
  const int64_t each =
      std::max<int64_t>(1, ceil_div(ceil_div(pixels, S::kPixels), config.splits)) * S::kPixels;
  plan.pixels_per_split = unsigned(each);
  plan.splits = unsigned(std::max<int64_t>(1, ceil_div(pixels, each)));
  const int64_t ctas =
      int64_t{plan.splits} * plan.column_chunks * taps * plan.row_chunks * w.groups;
  if (ctas > kIntMax) return "simt: more than 2^31 tiles";
  return launch(&simt_sampled_items<A, TM, TK>,
                {unsigned(ctas), 1, 1, S::kThreads, sampled_shared_bytes<A, TM, TK>(plan)}, stream,
                p, plan);
}

std::string items_of_type(const SampledProduct& p, const SimtSampledConfig& config, Stream stream) {
  const int height = p.w.height, width = p.w.width;
  if (p.dtype == DType::kFloat64) {  // two shapes of items: more are not worth the code
    if (height % 4 == 0) return items<double, 4, 1>(p, config, stream);
    return items<double, 1, 1>(p, config, stream);
  }
  if (height % 4 == 0 && (width % 4 == 0 || config.by_row))
    return items<float, 4, 4>(p, config, stream);
  if (height % 8 == 0) return items<float, 8, 1>(p, config, stream);
  if (height % 4 == 0) return items<float, 4, 1>(p, config, stream);
  return items<float, 1, 1>(p, config, stream);
}

int region_columns(DType dtype) {
  return dtype == DType::kFloat64 ? Sampled<double, 1, 1>::kRegionColumns
                                  : Sampled<float, 1, 1>::kRegionColumns;
}

__global__ void zero_partial(float* partial, int64_t count) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step)
    partial[i] = 0;
}

__global__ void round_partial(const float* partial, const SampledProduct p, int64_t count) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step)
    store_sum(p, i, partial[i]);
}

}  // namespace

SimtSampledConfig simt_sampled_config(const SampledProduct& p, int multiprocessors) {
  SimtSampledConfig config;
  // A block row on its own gathers single columns where blocks are narrow: of tokens, that reads
  // a sector of 32 bytes for each number.
  const bool gathers_well = p.w.width >= 8 || !channels_inside(p.x_strides);
  config.by_row = p.w.width > region_columns(p.dtype) || (p.w.height >= 16 && gathers_well);
  if (p.partial && p.dtype != DType::kFloat64) {  // partial sums are float32
    const int64_t sums = config.by_row ? p.w.nnzb * p.w.height * p.w.width
                                       : ceil_div(p.w.group_rows(), 128) * 128 * p.w.groups *
                                             ceil_div(p.w.group_cols(), 64) * 64 * p.w.taps;
    const int64_t ctas = std::max<int64_t>(1, sums / 8192);
    const int64_t most = std::max<int64_t>(1, p.geometry.pixels() / 256);
    config.splits = int(std::min(most, std::max<int64_t>(1, 2 * multiprocessors / ctas)));
  }
  return config;
}

std::string simt_sampled_product(const SampledProduct& p, const SimtSampledConfig& config,
                                 Stream stream) {
  const int64_t count = p.w.nnzb * p.w.height * p.w.width;
  if (count == 0) return {};
  if (p.w.transposed) return "simt: the layout of a sampled product must not be transposed";
  if (p.geometry.pixels() > kIntMax || p.w.rows > kIntMax || p.w.cols > kIntMax)
    return "simt: pixels and channels must be fewer than 2^31";
  if (config.splits < 1 || (config.splits > 1 && !p.partial))
    return "simt: splits must be 1 where there is no memory for partial sums (got " +
           std::to_string(config.splits) + ")";
  if (p.partial && p.dtype == DType::kFloat64)
    return "simt: partial sums are float32 and no use to float64";
  if (!config.by_row && p.w.width > region_columns(p.dtype))
    return "simt: blocks wider than " + std::to_string(region_columns(p.dtype)) +
           " need by_row (got " + std::to_string(p.w.width) + ")";
  if (!p.partial) return items_of_type(p, config, stream);

  const LaunchShape shape = {unsigned(std::min<int64_t>(ceil_div(count, 256), 1024)), 1, 1, 256};
  std::string error = launch(&zero_partial, shape, stream, p.partial, count);
  if (error.empty()) error = items_of_type(p, config, stream);
  if (!error.empty() || p.partial == p.dvalues) return error;
  SampledProduct rounded = p;
  rounded.partial = nullptr;
  return launch(&round_partial, shape, stream, p.partial, rounded, count);
}

}  // namespace tetris::cuda
