#include <algorithm>
#include <cstdint>
#include <string>

#include "cuda/launch.h"
#include "cuda/mma.h"
#include "cuda/mma_product.cuh"

namespace tetris::cuda {
namespace mma {
namespace {

// Tiles, pixels x rows: a wide and a narrow one for each height. A warp takes 64x64 of it where it
// can, for then 16 loads of fragments serve 64 mma.sync.
template <class... S>
struct Shapes {};
using WideShapes = Shapes<Shape<2, 2, 4, 8>,     // 128x128
                          Shape<4, 1, 4, 8>,     // 256x64
                          Shape<4, 1, 4, 4>,     // 256x32
                          Shape<4, 1, 4, 2>>;    // 256x16
using NarrowShapes = Shapes<Shape<2, 2, 2, 8>,   // 64x128
                            Shape<4, 1, 2, 8>,   // 128x64
                            Shape<4, 1, 2, 4>,   // 128x32
                            Shape<4, 1, 2, 2>>;  // 128x16

// Of L2, what a panel of x may take: a third of an A100's or an H100's.
constexpr int64_t kPanelBytes = 16 << 20;

// Whether 16-byte accesses to runs of a map are aligned, wherever they start.
bool whole(const void* pointer, const Strides& strides, const Product& p, Maps maps, int chunk) {
  const bool last = maps == Maps::kChannelsLast;
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 &&
         (last ? strides.pixel : strides.channel) % chunk == 0 &&
         (p.geometry.images == 1 || strides.image % chunk == 0) &&
         (!last || p.w.groups == 1 || p.w.group_rows() % chunk == 0);
}

template <class T, Maps kMaps, bool kTransposed, class S>
std::string launch_tile(const Product& p, int stages, Stream stream) {
  const Geometry& g = p.geometry;
  ProductPlan plan;
  plan.extents = Extents::of(p.w, g, p.x_strides);
  plan.parts = (p.w.height + S::kN - 1) / S::kN;
  plan.pixel_tiles = (plan.extents.pixels + S::kM - 1) / S::kM;
  const int64_t row_tiles = p.w.block_rows() * plan.parts;
  if (row_tiles * plan.pixel_tiles > INT32_MAX) {
    return "mma: too many tiles (" + std::to_string(row_tiles) + " of rows, " +
           std::to_string(plan.pixel_tiles) + " of pixels)";
  }
  plan.row_tiles = int(row_tiles);
  const int64_t bytes = int64_t(g.images) * g.source_h * g.source_w * p.w.cols * int(sizeof(T));
  plan.panel = int(std::clamp<int64_t>(plan.pixel_tiles * kPanelBytes / std::max<int64_t>(1, bytes),
                                       1, plan.pixel_tiles));
  plan.stages = stages;
  plan.whole_y = whole(p.y, p.y_strides, p, kMaps, kChunk<T>);
  plan.whole_residual = whole(p.residual, p.residual_strides, p, kMaps, kChunk<T>);

  using Tile = ProductTile<T, kMaps, kTransposed, S>;
  const LaunchShape shape{unsigned(plan.row_tiles * plan.pixel_tiles), 1, 1, kThreads,
                          Tile::shared_bytes(plan)};
  return launch(product_kernel<T, kMaps, kTransposed, S>, shape, stream, p, plan);
}

template <class T, Maps kMaps, bool kTransposed, class... S>
bool launch_if_found(Shapes<S...>, const Product& p, const MmaConfig& config, Stream stream,
                     std::string* result) {
  return ((config.tile_pixels == S::kM && config.tile_rows == S::kN &&
           (*result = launch_tile<T, kMaps, kTransposed, S>(p, config.stages, stream), true)) ||
          ...);
}

template <class T, bool kTransposed>
std::string launch_product(const Product& p, const MmaConfig& config, Stream stream) {
  constexpr Maps kLast = Maps::kChannelsLast, kFirst = Maps::kFeatureMajor;
  std::string result;
  const bool last = p.x_strides.channel == 1;
  const bool found =
      last ? launch_if_found<T, kLast, kTransposed>(WideShapes(), p, config, stream, &result) ||
                 launch_if_found<T, kLast, kTransposed>(NarrowShapes(), p, config, stream, &result)
           : launch_if_found<T, kFirst, kTransposed>(WideShapes(), p, config, stream, &result);
  if (found) return result;
  return "mma: no tile of " + std::to_string(config.tile_pixels) + " pixels x " +
         std::to_string(config.tile_rows) + " rows" + (last ? "" : " for feature-major maps");
}

template <class T>
std::string launch_product(const Product& p, const MmaConfig& config, Stream stream) {
  return p.w.transposed ? launch_product<T, true>(p, config, stream)
                        : launch_product<T, false>(p, config, stream);
}

}  // namespace
}  // namespace mma

std::string mma_product(const Product& p, const MmaConfig& config, Stream stream) {
  const std::string reason = mma_supports(p);
  if (!reason.empty()) return reason;
  if (config.stages != 3 && config.stages != 4) {
    return "mma: stages must be 3 or 4 (got " + std::to_string(config.stages) + ")";
  }
  if (p.geometry.pixels() == 0 || p.w.rows == 0) return "";
  switch (p.dtype) {
    case DType::kFloat16:
      return mma::launch_product<Half>(p, config, stream);
    case DType::kBFloat16:
      return mma::launch_product<BFloat16>(p, config, stream);
    default:
      return mma::launch_product<float>(p, config, stream);
  }
}

}  // namespace tetris::cuda
