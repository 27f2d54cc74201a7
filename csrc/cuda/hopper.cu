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

// Why a map of features [pixels][channels] is not one that TMA can move.
std::string check_map(const char* name, const void* base, const Strides& s, const Product& p,
                      int64_t channels) {
  const Geometry& g = p.geometry;
  const std::string stride = std::to_string(s.pixel);
  if (s.channel != 1) return std::string(name) + "'s channels must lie behind each other";
  if (g.images > 1 && s.image != s.pixel * g.result_h * g.result_w)
    return std::string(name) + "'s images must lie behind each other";
  if (g.pixels() > 1 && (s.pixel < channels || s.pixel % 8 != 0))
    return std::string(name) + "'s pixels must be a multiple of 8 elements apart (got " + stride +
           ")";
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0)
    return std::string(name) + " must be aligned to 16 bytes";
  return "";
}

template <class T, int M, int N, bool transposed>
std::string run(const Product& p, const HopperConfig& config, Stream stream) {
  constexpr int kPixels = M == 128 ? N : 2 * N;
  const int64_t pixels = p.geometry.pixels();
  const int box = box_columns(p);
  const auto stride = [&](const Strides& s, int64_t channels) {
    return pixels > 1 ? s.pixel : (channels + 7) / 8 * 8;
  };

  TensorMap x, y, values, values_edge;
  std::string error = encode_tensor_map(
      {p.dtype, p.x, 2, {p.w.cols, pixels}, {1, stride(p.x_strides, p.w.cols)}, {box, kPixels}},
      &x);
  if (error.empty())
    error = encode_tensor_map({p.dtype,
                               p.y,
                               2,
                               {p.w.rows, pixels},
                               {1, stride(p.y_strides, p.w.rows)},
                               {hopper::kStoreRows, hopper::kStorePixels}},
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
  a.bias = p.bias;
  a.residual = p.residual;
  a.residual_stride = p.residual_strides.pixel;
  a.pixels = int(pixels);
  a.pixel_tiles = int((pixels + kPixels - 1) / kPixels);
  a.strip_tiles = config.strip_pixels == 0
                      ? a.pixel_tiles
                      : int(std::clamp<int64_t>(config.strip_pixels / kPixels, 1, a.pixel_tiles));
  a.box = box;
  a.edge_group = edge == 0 ? -1 : int(p.w.col_groups()) - 1;
  a.stages = config.stages;
  a.activation = p.activation;

  const int64_t tiles = p.w.block_rows() * (p.w.height / M) * a.pixel_tiles;
  if (tiles > kMaxExtent) return "hopper: " + std::to_string(tiles) + " tiles are too many";
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
  const int64_t pixels = p.geometry.pixels();
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return "only float16 and bfloat16";
  if (!p.geometry.pointwise() || w.taps != 1 || w.groups != 1)
    return "only matrix products and 1x1 convolutions of one group";
  if (p.row_perm || p.col_perm) return "no permutations";
  if (w.height % 64 != 0 || w.width % 16 != 0)
    return "only blocks a multiple of 64 high and of 16 wide (got " + std::to_string(w.height) +
           "x" + std::to_string(w.width) + ")";
  if (w.cols < 1) return "at least one column";
  if (std::max({w.rows + w.height, w.cols + w.width, pixels, w.nnzb}) > kMaxExtent)
    return "too large for 32-bit coordinates";
  if (reinterpret_cast<uintptr_t>(p.values) % 16 != 0) return "values must be aligned to 16 bytes";
  std::string reason = check_map("x", p.x, p.x_strides, p, w.cols);
  if (reason.empty()) reason = check_map("y", p.y, p.y_strides, p, w.rows);
  if (reason.empty() && p.residual) {
    const Strides& s = p.residual_strides;
    if (s.channel != 1) reason = "residual's channels must lie behind each other";
    if (p.geometry.images > 1 && s.image != s.pixel * p.geometry.result_h * p.geometry.result_w)
      reason = "residual's images must lie behind each other";
  }
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
