#include "cuda/mma.h"

#include <algorithm>
#include <cstdint>
#include <string>

namespace tetris::cuda {
namespace {

constexpr int kLongest = 1 << 30;  // pixels and columns are counted in int, sums of two fit

std::string must(const std::string& what, const std::string& rule, int64_t got) {
  return "mma: " + what + " must be " + rule + " (got " + std::to_string(got) + ")";
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether a map's channels can be copied in 16-byte chunks: "" or why not.
std::string check_map(const std::string& name, const void* map, const Strides& strides, int images,
                      int chunk) {
  if (strides.channel != 1) return must(name + "'s channel stride", "1", strides.channel);
  if (strides.pixel <= 0 || strides.pixel % chunk != 0) {
    return must(name + "'s pixel stride", "a positive multiple of " + std::to_string(chunk),
                strides.pixel);
  }
  if (images > 1 && (strides.image < 0 || strides.image % strides.pixel != 0)) {
    return must(name + "'s image stride",
                "a multiple of its pixel stride " + std::to_string(strides.pixel), strides.image);
  }
  if (!aligned(map)) return "mma: " + name + " must start at a multiple of 16 bytes";
  return "";
}

// The same for feature-major maps, chunks being of pixels.
std::string check_feature_major(const std::string& name, const void* map, const Strides& strides,
                                const Geometry& g, int chunk) {
  const std::string multiple = "a multiple of " + std::to_string(chunk) + " in feature-major maps";
  if (strides.pixel != 1) return must(name + "'s channel or pixel stride", "1", strides.pixel);
  if (!g.pointwise())
    return "mma: feature-major maps are for 1x1 kernels without stride or padding";
  if (strides.channel <= 0 || strides.channel % chunk != 0) {
    return must(name + "'s channel stride", multiple, strides.channel);
  }
  if (g.images > 1 && strides.image % chunk != 0) {
    return must(name + "'s image stride", multiple, strides.image);
  }
  const int64_t pixels = int64_t(g.source_h) * g.source_w;
  if (g.images > 1 && pixels % chunk != 0) return must("pixels of an image", multiple, pixels);
  if (!aligned(map)) return "mma: " + name + " must start at a multiple of 16 bytes";
  return "";
}

// What a product and a sampled product have in common.
std::string check(const SparseRows& w, const Geometry& g, DType dtype, bool allow_tf32) {
  if (dtype == DType::kFloat64) return "mma: float64 is not supported";
  if (dtype == DType::kFloat32 && !allow_tf32) return "mma: float32 needs allow_tf32";
  const int chunk = 16 / size_of(dtype);
  const std::string multiple = "a multiple of " + std::to_string(chunk);
  if (w.height % chunk != 0) return must("block height", multiple, w.height);
  if (w.width % chunk != 0) return must("block width", multiple, w.width);
  if (g.pixels() > kLongest) {
    return must("the result's pixels", "at most " + std::to_string(kLongest), g.pixels());
  }
  const int64_t columns = w.taps * w.col_groups() * w.width;
  if (columns > kLongest) {
    return must("columns of all taps", "at most " + std::to_string(kLongest), columns);
  }
  if (w.rows > kLongest) return must("rows", "at most " + std::to_string(kLongest), w.rows);
  if (g.transposed && std::max(g.stride_h, g.stride_w) >= 1 << 16) {
    return must("strides", "less than 65536", std::max(g.stride_h, g.stride_w));
  }
  return "";
}

// What a source with channels last asks for.
std::string check_source(const SparseRows& w, const Geometry& g, const void* x,
                         const Strides& strides, const int32_t* row_perm, const int32_t* col_perm,
                         int chunk) {
  if (row_perm || col_perm) return "mma: permutations must be folded or applied before";
  if (w.groups > 1 && w.group_cols() % chunk != 0) {
    return must("columns of a group", "a multiple of " + std::to_string(chunk), w.group_cols());
  }
  const std::string reason = check_map("x", x, strides, g.images, chunk);
  if (!reason.empty()) return reason;
  const int64_t image_pixels = g.images > 1 ? strides.image / strides.pixel : 0;
  const int64_t pixels = image_pixels * g.images + int64_t(g.source_h) * g.source_w;
  if (pixels > kLongest) {
    return must("the source's pixels", "at most " + std::to_string(kLongest), pixels);
  }
  return "";
}

// Tiles are 16, 32, 64 and 128 rows high. A block row of up to 128 is one tile, so that x is read
// once for it; of a higher one as little as possible is padding.
int tile_rows(int height) {
  for (int tile : {16, 32, 64}) {
    if (height <= tile) return tile;
  }
  const auto padded = [height](int tile) { return (height + tile - 1) / tile * tile; };
  return height <= 128 || padded(128) <= padded(64) ? 128 : 64;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

std::string mma_supports(const Product& p) {
  const std::string reason = check(p.w, p.geometry, p.dtype, p.allow_tf32);
  if (!reason.empty()) return reason;
  const int chunk = 16 / size_of(p.dtype);
  const bool last = p.x_strides.channel == 1;
  const std::string source =
      last ? check_source(p.w, p.geometry, p.x, p.x_strides, p.row_perm, p.col_perm, chunk)
           : check_feature_major("x", p.x, p.x_strides, p.geometry, chunk);
  if (!source.empty()) return source;
  if (!aligned(p.values)) return "mma: values must start at a multiple of 16 bytes";
  const std::string stride = std::string(last ? "channel" : "pixel") + " stride";
  const auto along_runs = [last](const Strides& s) { return last ? s.channel : s.pixel; };
  const int64_t y = along_runs(p.y_strides), residual = along_runs(p.residual_strides);
  if (y != 1) return must("y's " + stride, "1, like x's", y);
  if (p.residual && residual != 1) return must("the residual's " + stride, "1, like x's", residual);
  return "";
}

// Many pixels a tile, for short blocks are bound by x in L2 and the rest by values, unless that
// leaves multiprocessors, which take two tiles each, without work.
MmaConfig mma_config(const Product& p, int multiprocessors) {
  MmaConfig config;
  config.tile_rows = tile_rows(p.w.height);
  config.tile_pixels = config.tile_rows == 128 ? 128 : 256;
  const int64_t row_tiles = p.w.block_rows() * ceil_div(p.w.height, config.tile_rows);
  const int64_t tiles = row_tiles * ceil_div(p.geometry.pixels(), config.tile_pixels);
  if (tiles < 2 * multiprocessors && p.x_strides.channel == 1) {  // feature-major: wide ones only
    config.tile_pixels /= 2;
  }
  // Two tiles of 256x64 fit an A100's shared memory with three stages each.
  config.stages = config.tile_rows == 64 && config.tile_pixels == 256 ? 3 : 4;
  return config;
}

std::string mma_supports(const SampledProduct& p) {
  const std::string reason = check(p.w, p.geometry, p.dtype, p.allow_tf32);
  if (!reason.empty()) return reason;
  const int chunk = 16 / size_of(p.dtype);
  const std::string source =
      check_source(p.w, p.geometry, p.x, p.x_strides, p.row_perm, p.col_perm, chunk);
  if (!source.empty()) return source;
  const std::string dy = check_map("dy", p.dy, p.dy_strides, p.geometry.images, chunk);
  if (!dy.empty()) return dy;
  const int64_t map = int64_t(p.geometry.result_h) * p.geometry.result_w * p.dy_strides.pixel;
  if (p.geometry.images > 1 && p.dy_strides.image != map) {
    return must("dy's image stride", std::to_string(map) + ", that of a map without gaps",
                p.dy_strides.image);
  }
  if (p.w.groups > 1 && p.w.group_rows() % chunk != 0) {
    return must("rows of a group", "a multiple of " + std::to_string(chunk), p.w.group_rows());
  }
  if (p.w.transposed) return "mma: a sampled product's layout cannot be transposed";
  if (!aligned(p.dvalues)) return "mma: dvalues must start at a multiple of 16 bytes";
  return "";
}

// Pixels are split only as far as multiprocessors, which take two tiles each, are without work, and
// not into parts of less than 1024: each part costs an addition in memory for every value.
MmaSampledConfig mma_config(const SampledProduct& p, int multiprocessors) {
  MmaSampledConfig config;
  config.tile_rows = tile_rows(p.w.height);
  config.tile_columns = config.tile_rows == 128 ? 128 : 256;
  const int64_t parts = ceil_div(p.w.height, config.tile_rows);
  const auto tiles = [&] {
    return parts * (p.w.nnzb * p.w.width / config.tile_columns + p.w.block_rows());
  };
  // Block rows of few columns leave most of a wide tile empty.
  const int64_t columns_per_row = p.w.nnzb * p.w.width / std::max<int64_t>(1, p.w.block_rows());
  if (tiles() < 2 * multiprocessors || columns_per_row < config.tile_columns) {
    config.tile_columns /= 2;
  }
  if (p.partial) {
    const int64_t wanted = ceil_div(2 * multiprocessors, std::max<int64_t>(1, tiles()));
    config.splits = int(std::clamp<int64_t>(wanted, 1, ceil_div(p.geometry.pixels(), 1024)));
  }
  config.stages = config.tile_rows == 64 && config.tile_columns == 256 ? 3 : 4;
  return config;
}

}  // namespace tetris::cuda
