#include <cstdint>
#include <string>

#include "cuda/launch.h"
#include "cuda/mma.h"
#include "cuda/mma_sampled.cuh"

namespace tetris::cuda {
namespace mma {
namespace {

// Tiles, columns x rows: a wide and a narrow one for each height, as of the product.
template <class... S>
struct Shapes {};
using SampledShapes = Shapes<Shape<2, 2, 4, 8>, Shape<2, 2, 2, 8>,   // 128x128  64x128
                             Shape<4, 1, 4, 8>, Shape<4, 1, 2, 8>,   // 256x64  128x64
                             Shape<4, 1, 4, 4>, Shape<4, 1, 2, 4>,   // 256x32  128x32
                             Shape<4, 1, 4, 2>, Shape<4, 1, 2, 2>>;  // 256x16  128x16

template <class T, class S>
std::string launch_tile(const SampledProduct& p, const MmaSampledConfig& config, Stream stream) {
  SampledPlan plan;
  plan.extents = Extents::of(p.w, p.geometry, p.x_strides);
  plan.block_rows = int(p.w.block_rows());
  plan.parts = (p.w.height + S::kN - 1) / S::kN;
  plan.splits = config.splits;
  plan.stages = config.stages;
  // Each block row may have one tile that is not full.
  const int64_t tiles = p.w.nnzb * p.w.width / S::kM + plan.block_rows;
  if (tiles * plan.parts * plan.splits > INT32_MAX) {
    return "mma: too many tiles (" + std::to_string(tiles * plan.parts) + " in " +
           std::to_string(plan.splits) + " splits)";
  }
  plan.tiles = int(tiles);

  const LaunchShape shape{unsigned(plan.tiles * plan.parts * plan.splits), 1, 1, kThreads,
                          SampledTile<T, S>::shared_bytes(plan)};
  return launch(sampled_kernel<T, S>, shape, stream, p, plan);
}

template <class T, class... S>
std::string launch_sampled(Shapes<S...>, const SampledProduct& p, const MmaSampledConfig& config,
                           Stream stream) {
  std::string result = "mma: no tile of " + std::to_string(config.tile_columns) + " columns x " +
                       std::to_string(config.tile_rows) + " rows";
  const bool found = ((config.tile_columns == S::kM && config.tile_rows == S::kN &&
                       (result = launch_tile<T, S>(p, config, stream), true)) ||
                      ...);
  (void)found;
  return result;
}

}  // namespace
}  // namespace mma

std::string mma_product(const SampledProduct& p, const MmaSampledConfig& config, Stream stream) {
  const std::string reason = mma_supports(p);
  if (!reason.empty()) return reason;
  if (config.stages != 3 && config.stages != 4) {
    return "mma: stages must be 3 or 4 (got " + std::to_string(config.stages) + ")";
  }
  if (config.splits < 1 || (config.splits > 1 && !p.partial)) {
    return "mma: splits must be 1, or more with partial sums (got " +
           std::to_string(config.splits) + ")";
  }
  if (p.w.nnzb == 0) return "";
  switch (p.dtype) {
    case DType::kFloat16:
      return mma::launch_sampled<Half>(mma::SampledShapes(), p, config, stream);
    case DType::kBFloat16:
      return mma::launch_sampled<BFloat16>(mma::SampledShapes(), p, config, stream);
    default:
      return mma::launch_sampled<float>(mma::SampledShapes(), p, config, stream);
  }
}

}  // namespace tetris::cuda
