#include <algorithm>
#include <cstdint>
#include <string>

#include "cuda/hopper.cuh"
#include "cuda/hopper.h"
#include "cuda/launch.h"

namespace tetris::cuda {
namespace {

using hopper::kStep;

constexpr size_t kSharedBytes = 227 * 1024;      // that a CTA may have on compute capability 9.0
constexpr int64_t kMaxExtent = INT32_MAX - 512;  // coordinates of TMA are 32 bits wide

int tile_rows(const Product& p) { return p.w.height % 128 == 0 ? 128 : 64; }

int box_columns(const Product& p) {
  return p.w.width % 64 == 0 ? 64 : p.w.width % 32 == 0 ? 32 : 16;
}

// Where wgmma finds the columns k * kStep .. of a slab: in boxes of `box_bytes`, `step_bytes` apart
// within a box.
hopper::Operand operand(uint64_t layout, int box, int box_bytes, int step_bytes, int group) {
  hopper::Operand o{layout, group, {}};
  for (int k = 0; k < hopper::kSteps; ++k)
    o.step[k] = k * kStep / box * box_bytes + k * kStep % box / kStep * step_bytes;
  return o;
}

// Boxes of `rows` rows of 16, 32 or 64 columns; the second group's part begins `own` rows later.
hopper::Operand k_major(int rows, int box, int own) {
  const int row_bytes = 2 * box;
  return operand(ptx::wgmma_layout(row_bytes, 8 * row_bytes), box, rows * row_bytes, 2 * kStep,
                 own * row_bytes);
}

// Boxes of 16, 32 or 64 rows, one for each k, of 64 rows of the matrix; with 128 rows, two of them.
hopper::Operand mn_major(int rows, int box) {
  return operand(ptx::wgmma_layout(128, 8 * 128), box, rows / 64 * box * 128, kStep * 128,
                 rows == 128 ? box * 128 : 0);
}

// Maps of features as TMA sees them: [image][y][x][channel]. Where all pixels lie one behind the
// other and each sees its own, they are one line.
struct View {
  Geometry geometry;
  Strides x, y, residual;

  explicit View(const Product& p)
      : geometry(p.geometry), x(p.x_strides), y(p.y_strides), residual(p.residual_strides) {
    const Geometry& g = p.geometry;
    const int64_t map = int64_t(g.result_h) * g.result_w;
    const auto in_line = [&](const Strides& s) { return s.image == map * s.pixel; };
    if (!g.pointwise() || g.pixels() > kMaxExtent) return;
    if (g.images > 1 && !(in_line(x) && in_line(y) && (!p.residual || in_line(residual)))) return;
    geometry.images = geometry.source_h = geometry.result_h = 1;
    geometry.source_w = geometry.result_w = int(g.pixels());
  }
};

// Why a map is not one that TMA can move.
std::string check_map(const char* name, const void* base, const Strides& s, int64_t images,
                      int64_t pixels, int64_t channels) {
  if (s.channel != 1) return std::string(name) + "'s channels must lie behind each other";
  if (pixels > 1 && (s.pixel < channels || s.pixel % 8 != 0))
    return std::string(name) + "'s pixels must be a multiple of 8 elements apart (got " +
           std::to_string(s.pixel) + ")";
  if (images > 1 && (s.image < 1 || s.image % 8 != 0))
    return std::string(name) + "'s images must be a multiple of 8 elements apart (got " +
           std::to_string(s.image) + ")";
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0)
    return std::string(name) + " must be aligned to 16 bytes";
  return "";
}

// A map and the box of it that is `w` x `h` pixels of `n` images.
TensorBox feature_box(const Product& p, const void* base, const Strides& s, int64_t channels,
                      int images, int h, int w, int box_channels, int box_w, int box_h, int box_n) {
  // A stride that nobody uses must be a possible one, too.
  const int64_t pixel = int64_t(h) * w > 1 ? s.pixel : (channels + 7) / 8 * 8;
  return {p.dtype,
          base,
          4,
          {channels, w, h, images},
          {1, pixel, w * pixel, images > 1 ? s.image : int64_t(h) * w * pixel},
          {box_channels, box_w, box_h, box_n}};
}

hopper::Axis axis(int size, int tile, int stride, int pad, int dilation, bool transposed) {
  int bits = 0;
  while (1 << bits < tile) ++bits;
  return {size,
          (size + tile - 1) / tile,
          bits,
          transposed ? 1 : stride,  // supported with stride 1 only
          transposed ? pad : -pad,
          transposed ? -dilation : dilation};
}

// The shape of a tile, in powers of two, that needs the fewest tiles; of equal ones the widest. A
// box reaches at most 256 pixels of the source along an axis.
struct TileShape {
  int w, h, n;
};
TileShape tile_shape(const Geometry& g, int pixels) {
  TileShape best{};
  int64_t fewest = INT64_MAX;
  for (int w = pixels; w >= 1; w /= 2)
    for (int h = pixels / w; h >= 1; h /= 2) {
      const int n = pixels / (w * h);
      if (!g.transposed && (w * g.stride_w > 256 || h * g.stride_h > 256)) continue;
      const int64_t tiles =
          int64_t((g.result_w + w - 1) / w) * ((g.result_h + h - 1) / h) * ((g.images + n - 1) / n);
      if (tiles >= fewest) continue;
      fewest = tiles;
      best = {w, h, n};
    }
  return best;
}

template <class T, int M, int N, bool transposed>
std::string run(const Product& p, const HopperConfig& config, Stream stream) {
  constexpr int kPixels = M == 128 ? N : 2 * N;
  const View view(p);
  const Geometry& g = view.geometry;
  const int box = box_columns(p);
  const TileShape tile = tile_shape(g, kPixels);

  TensorMap x, y, values, values_edge;
  TensorBox x_box = feature_box(p, p.x, view.x, p.w.cols, g.images, g.source_h, g.source_w, box,
                                tile.w, tile.h, tile.n);
  if (!g.transposed) {
    x_box.step[1] = g.stride_w;
    x_box.step[2] = g.stride_h;
  }
  std::string error = encode_tensor_map(x_box, &x);
  const int store_w = std::min(tile.w, hopper::kStorePixels);
  const int store_h = std::min(tile.h, hopper::kStorePixels / store_w);
  if (error.empty())
    error = encode_tensor_map(
        feature_box(p, p.y, view.y, p.w.rows, g.images, g.result_h, g.result_w, hopper::kStoreRows,
                    store_w, store_h, hopper::kStorePixels / (store_w * store_h)),
        &y);
  // The stored blocks as they are, or as far as the last column group has columns.
  const auto encode_values = [&](int64_t width, TensorMap* map) -> std::string {
    const int64_t height = p.w.height, size = height * p.w.width;
    if (p.w.nnzb == 0) {
      *map = x;  // of no use to anybody, but a map
      return "";
    }
    if (transposed)
      return encode_tensor_map({p.dtype,
                                p.values,
                                4,
                                {width, height, 1, p.w.nnzb},
                                {1, p.w.width, size, size},
                                {box, M, 1, 1}},
                               map);
    return encode_tensor_map({p.dtype,
                              p.values,
                              4,
                              {64, width, height / 64, p.w.nnzb},
                              {1, height, 64, size},
                              {64, box, M / 64, 1}},
                             map);
  };
  const int64_t edge = p.w.cols % p.w.width;
  if (error.empty()) error = encode_values(p.w.width, &values);
  if (error.empty()) error = encode_values(edge == 0 ? p.w.width : edge, &values_edge);
  if (!error.empty()) return error;

  hopper::Arguments a{};
  a.w = p.w;
  a.a = transposed ? k_major(M, box, M == 128 ? 64 : 0) : mn_major(M, box);
  a.b = k_major(kPixels, box, M == 64 ? N : 0);
  a.x = axis(g.result_w, tile.w, g.stride_w, g.pad_w, g.dilation_w, g.transposed);
  a.y = axis(g.result_h, tile.h, g.stride_h, g.pad_h, g.dilation_h, g.transposed);
  a.images = g.images;
  a.kernel_w = g.kernel_w;
  a.col_groups = int(p.w.col_groups());
  a.row_parts = p.w.height / M;
  a.bias = p.bias;
  a.residual = p.residual;
  a.residual_strides = view.residual;
  a.box = box;
  a.edge_column = edge == 0 ? -1 : int(p.w.cols - edge);
  a.stages = config.stages;
  a.activation = p.activation;

  const int64_t pixel_tiles = int64_t(a.x.tiles) * a.y.tiles * ((g.images + tile.n - 1) / tile.n);
  const int64_t row_tiles = p.w.block_rows() * a.row_parts, tiles = row_tiles * pixel_tiles;
  if (tiles > kMaxExtent) return "hopper: " + std::to_string(tiles) + " tiles are too many";
  a.row_tiles = int(row_tiles);
  a.pixel_tiles = int(pixel_tiles);
  a.strip_tiles = config.strip_pixels == 0
                      ? a.pixel_tiles
                      : int(std::clamp<int64_t>(config.strip_pixels / kPixels, 1, pixel_tiles));
  const LaunchShape shape{unsigned(std::min<int64_t>(tiles, config.ctas)), 1, 1, hopper::kThreads,
                          hopper::shared_bytes(M, kPixels, config.stages)};
  return launch(hopper::product<T, M, N, transposed>, shape, stream, values, values_edge, x, y, a);
}

template <class T, int M, int N>
std::string run(const Product& p, const HopperConfig& config, Stream stream) {
  return p.w.transposed ? run<T, M, N, true>(p, config, stream)
                        : run<T, M, N, false>(p, config, stream);
}

// What each of the two consumer groups computes is 64 rows times N pixels.
template <class T>
std::string run(const Product& p, const HopperConfig& config, Stream stream) {
  const bool wide = config.tile_pixels == 256;
  if (tile_rows(p) == 128)
    return wide ? run<T, 128, 256>(p, config, stream) : run<T, 128, 128>(p, config, stream);
  return wide ? run<T, 64, 128>(p, config, stream) : run<T, 64, 64>(p, config, stream);
}

int multiprocessors() {
#if defined(TETRIS_CUDA_EMULATOR)
  return 2;
#else
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
#endif
}

}  // namespace

std::string hopper_supports(const Product& p) {
  const SparseRows& w = p.w;
  const Geometry& g = p.geometry;
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return "only float16 and bfloat16";
  if (w.groups != 1) return "only one group of channels";
  if (g.transposed && (g.stride_h != 1 || g.stride_w != 1))
    return "only stride 1 from small to big maps";
  if (std::max(g.stride_h, g.stride_w) > 8) return "only strides up to 8";
  if (p.row_perm || p.col_perm) return "no permutations";
  if (w.height % 64 != 0 || w.width % 16 != 0)
    return "only blocks a multiple of 64 high and of 16 wide (got " + std::to_string(w.height) +
           "x" + std::to_string(w.width) + ")";
  if (w.cols < 1 || (g.pixels() > 0 && int64_t(g.source_h) * g.source_w < 1))
    return "an empty source";
  if (std::max({w.rows + w.height, w.cols + w.width, g.pixels() / std::max(g.images, 1), w.nnzb,
                int64_t(g.source_w) + 2 * g.pad_w, int64_t(g.source_h) + 2 * g.pad_h}) > kMaxExtent)
    return "too large for 32-bit coordinates";
  if (reinterpret_cast<uintptr_t>(p.values) % 16 != 0) return "values must be aligned to 16 bytes";
  const int64_t source = int64_t(g.source_h) * g.source_w,
                result = int64_t(g.result_h) * g.result_w;
  std::string reason = check_map("x", p.x, p.x_strides, g.images, source, w.cols);
  if (reason.empty()) reason = check_map("y", p.y, p.y_strides, g.images, result, w.rows);
  return reason;
}

int hopper_max_stages(const Product& p, int tile_pixels) {
  const size_t none = hopper::shared_bytes(tile_rows(p), tile_pixels, 0);
  return int((kSharedBytes - none) / (hopper::shared_bytes(tile_rows(p), tile_pixels, 1) - none));
}

HopperConfig hopper_default(const Product& p, int multiprocessors) {
  HopperConfig config;
  const int64_t row_tiles = p.w.block_rows() * p.w.height / tile_rows(p);
  const int64_t wide_tiles = row_tiles * ((p.geometry.pixels() + 255) / 256);
  config.tile_pixels = wide_tiles >= multiprocessors ? 256 : 128;
  config.stages = hopper_max_stages(p, config.tile_pixels);
  constexpr int64_t kStripBytes = 16 << 20;  // of L2's 50 MB, of which an SM is near to half
  const int64_t strip = kStripBytes / (2 * std::max<int64_t>(p.w.cols, 1));
  if (strip < p.geometry.pixels()) config.strip_pixels = std::max<int64_t>(strip, 1);
  return config;
}

std::string hopper_product(const Product& p, const HopperConfig& given, Stream stream) {
  if (p.w.rows == 0 || p.geometry.pixels() == 0) return "";
  const std::string reason = hopper_supports(p);
  if (!reason.empty()) return "hopper: " + reason;
  HopperConfig config = given;
  if (config.tile_pixels != 128 && config.tile_pixels != 256)
    return "hopper: tile_pixels must be 128 or 256 (got " + std::to_string(config.tile_pixels) +
           ")";
  const int most = hopper_max_stages(p, config.tile_pixels);
  if (config.stages < 2 || config.stages > most)
    return "hopper: stages must be 2 to " + std::to_string(most) + " (got " +
           std::to_string(config.stages) + ")";
  if (config.strip_pixels < 0 || config.ctas < 0)
    return "hopper: strip_pixels and ctas must not be negative";
  if (config.ctas == 0) config.ctas = multiprocessors();
  return p.dtype == DType::kFloat16 ? run<Half>(p, config, stream)
                                    : run<BFloat16>(p, config, stream);
}

}  // namespace tetris::cuda
