#include <algorithm>

#include "cuda/launch.h"
#include "cuda/simt.h"
#include "cuda/simt_strips.cuh"
#include "cuda/simt_tall.cuh"

namespace tetris::cuda {
namespace {

constexpr int64_t kIntMax = 0x7fffffff;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Rows of a strip: they divide a block's, and their values are one aligned run.
int strip_rows(const Product& p) {
  int rows = p.dtype == DType::kFloat64 ? 4 : 8;
  const auto fits = [&] {
    const size_t bytes = size_t(rows) * size_of(p.dtype);
    return p.w.height % rows == 0 && aligned(p.values, std::min<size_t>(bytes, 16));
  };
  while (!fits()) rows = p.dtype == DType::kFloat64 ? 1 : rows / 2;
  return rows;
}

template <class T, int TM, int TN>
std::string strips(const Product& p, const SimtConfig& config, Stream stream) {
  using S = Strips<T, TM, TN>;
  StripsPlan plan;
  plan.extents = extents_of(p.w, p.geometry);
  plan.slab = config.slab;
  plan.per_row = p.w.height / TM;
  const int64_t of_group = p.w.block_rows_per_group() * plan.per_row;
  const int64_t group_chunks = ceil_div(of_group, config.warps * S::kStrips);
  const int64_t chunks = group_chunks * p.w.groups;
  const int64_t ctas = chunks * ceil_div(p.geometry.pixels(), S::kPixels);
  if (ctas > kIntMax) return "simt: more than 2^31 tiles";
  plan.group_chunks = int(group_chunks);
  plan.chunks = unsigned(chunks);
  return launch(&simt_product_strips<T, TM, TN>,
                {unsigned(ctas), 1, 1, 32 * config.warps, S::shared_bytes(config.warps, plan.slab)},
                stream, p, plan);
}

template <class T, int TN>
std::string strips_of_height(const Product& p, const SimtConfig& config, Stream stream) {
  const int rows = strip_rows(p);
  if constexpr (sizeof(T) != 8) {  // float64 has two heights: it is not worth the code
    if (rows == 8) return strips<T, 8, TN>(p, config, stream);
    if (rows == 2) return strips<T, 2, TN>(p, config, stream);
  }
  if (rows == 4) return strips<T, 4, TN>(p, config, stream);
  return strips<T, 1, TN>(p, config, stream);
}

template <class T>
std::string strips_of_type(const Product& p, const SimtConfig& config, Stream stream) {
  if (config.warps < 1 || config.warps > kStripWarps)
    return "simt: warps must be in [1, " + std::to_string(kStripWarps) + "] (got " +
           std::to_string(config.warps) + ")";
  if (config.slab < p.w.width)
    return "simt: slab must be at least the width of a block (got " + std::to_string(config.slab) +
           " and " + std::to_string(p.w.width) + ")";
  if constexpr (sizeof(T) == 8) {
    if (config.pixels == 64) return strips_of_height<T, 2>(p, config, stream);
    return "simt: pixels must be 64 for float64 (got " + std::to_string(config.pixels) + ")";
  } else {
    if (config.pixels == 128) return strips_of_height<T, 4>(p, config, stream);
    if (config.pixels == 32) return strips_of_height<T, 1>(p, config, stream);
    return "simt: pixels must be 32 or 128 (got " + std::to_string(config.pixels) + ")";
  }
}

template <int kWarpsAlongRows>
std::string tall(const Product& p, Stream stream) {
  using Tile = Tall<kWarpsAlongRows>;
  constexpr int kRun = Tile::kSlab * Tile::kRows / Tile::kThreads;  // of values, a thread
  TallPlan plan;
  plan.extents = extents_of(p.w, p.geometry);
  plan.parts = int(ceil_div(p.w.height, Tile::kRows));
  const int64_t tiles = ceil_div(p.geometry.pixels(), Tile::kPixels);
  plan.tiles = unsigned(tiles);
  plan.vector = !p.w.transposed && p.w.height % kRun == 0 && aligned(p.values, 4 * kRun);
  const int64_t ctas = p.w.block_rows() * plan.parts * tiles;
  if (ctas > kIntMax) return "simt: more than 2^31 tiles";
  return launch(&simt_product_tall<kWarpsAlongRows>,
                {unsigned(ctas), 1, 1, Tile::kThreads, Tile::kSharedBytes}, stream, p, plan);
}

}  // namespace

SimtConfig simt_config(const Product& p, int multiprocessors) {
  const int64_t pixels = p.geometry.pixels();
  const int64_t strips = p.w.block_rows_per_group() * (p.w.height / strip_rows(p));
  const size_t sum = p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  const int64_t warps = ceil_div(strips, strips_of_warp(strip_rows(p), sum));
  SimtConfig config;
  config.slab = std::max(config.slab, p.w.width);
  if (p.dtype == DType::kFloat32 && p.w.height > 16 && pixels > 32) {
    const int rows = p.w.height <= 32 ? 32 : 64, tile = p.w.height <= 32 ? 256 : 128;
    config.kind = SimtConfig::kTall;
    if (p.w.block_rows() * ceil_div(p.w.height, rows) * ceil_div(pixels, tile) >= multiprocessors)
      return config;
    config.kind = SimtConfig::kStrips;  // too few tiles: more and smaller ones
  }
  const bool wide_only = p.dtype == DType::kFloat64;
  for (int tile : {128, 32}) {
    config.pixels = wide_only ? 64 : tile;
    if (tile == 128 && !wide_only && pixels <= 64) continue;
    for (int most : {12, 8, 4}) {
      config.warps = int(std::min<int64_t>(most, std::max<int64_t>(warps, 1)));
      const int64_t ctas =
          p.w.groups * ceil_div(warps, config.warps) * ceil_div(pixels, config.pixels);
      if (ctas >= multiprocessors) return config;
    }
  }
  return config;
}

std::string simt_product(const Product& p, const SimtConfig& config, Stream stream) {
  if (p.geometry.pixels() == 0 || p.w.rows == 0) return {};
  if (p.geometry.pixels() > kIntMax || p.w.rows > kIntMax || p.w.cols > kIntMax)
    return "simt: pixels and channels must be fewer than 2^31";
  if (config.kind == SimtConfig::kTall) {
    if (p.dtype != DType::kFloat32) return "simt: the tall kernel is for float32 only";
    return p.w.height <= 32 ? tall<1>(p, stream) : tall<2>(p, stream);
  }
  switch (p.dtype) {
    case DType::kFloat16:
      return strips_of_type<Half>(p, config, stream);
    case DType::kBFloat16:
      return strips_of_type<BFloat16>(p, config, stream);
    case DType::kFloat32:
      return strips_of_type<float>(p, config, stream);
    case DType::kFloat64:
      return strips_of_type<double>(p, config, stream);
  }
  return "simt: no such dtype";
}

}  // namespace tetris::cuda
