#include "cuda/run.h"

#include "cuda/hopper.h"
#include "cuda/mma.h"
#include "cuda/simt.h"
#include "cuda/skinny.h"

namespace tetris::cuda {
namespace {

const char* short_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return "f16";
    case DType::kBFloat16:
      return "bf16";
    case DType::kFloat32:
      return "f32";
    case DType::kFloat64:
      return "f64";
  }
  return "?";
}

const char* target(Family family) {
  switch (family) {
    case Family::kSimt:
      return "simt";
    case Family::kSkinny:
      return "skinny";
    case Family::kMma:
      return "sm80";
    case Family::kHopper:
      return "sm90";
  }
  return "?";
}

template <class P>
std::string name(const char* what, const P& p, const GemmConfig& c) {
  const bool tf32 = c.family == Family::kMma && p.dtype == DType::kFloat32;
  std::string text = std::string(p.geometry.pointwise() && p.w.taps == 1 ? "bsmm" : "bsconv") +
                     what + '_' + (tf32 ? "tf32" : short_name(p.dtype));
  if (c.tile_rows)
    text += '_' + std::to_string(c.tile_rows) + 'x' + std::to_string(c.tile_pixels);
  else if (c.by_row)
    text += "_row";
  if (c.splits > 1) text += "_split" + std::to_string(c.splits);
  return text + "__" + target(c.family);
}

}  // namespace

std::string run_product(const Product& p, const GemmConfig& c, Stream stream) {
  switch (c.family) {
    case Family::kHopper: {
      HopperConfig config;
      config.tile_pixels = c.tile_pixels;
      config.stages = c.stages;
      config.strip_pixels = c.strip_pixels;
      return hopper_product(p, config, stream);
    }
    case Family::kMma:
      return mma_product(p, {c.tile_rows, c.tile_pixels, c.stages}, stream);
    case Family::kSkinny:
      return skinny_product(p, {c.tile_pixels, c.warps, c.ctas}, stream);
    case Family::kSimt: {
      SimtConfig config;
      config.kind = c.by_row ? SimtConfig::kTall : SimtConfig::kStrips;
      config.warps = c.warps;
      config.pixels = c.tile_pixels;
      config.slab = c.slab;
      return simt_product(p, config, stream);
    }
  }
  return "unknown family";
}

int64_t partial_size(const SampledProduct& p, const GemmConfig& c, bool* zeroed) {
  // simt clears them itself.
  *zeroed = c.family == Family::kMma;
  return c.splits > 1 ? p.w.nnzb * p.w.width * p.w.height : 0;
}

bool leaves_partial(const GemmConfig& c) { return c.family == Family::kMma && c.splits > 1; }

std::string run_product(const SampledProduct& p, const GemmConfig& c, Stream stream) {
  if (c.family == Family::kMma) {
    MmaSampledConfig config;
    config.tile_rows = c.tile_rows;
    config.tile_columns = c.tile_pixels;
    config.splits = c.splits;
    config.stages = c.stages;
    return mma_product(p, config, stream);
  }
  if (c.family == Family::kSimt) {
    SimtSampledConfig config;
    config.by_row = c.by_row;
    config.splits = c.splits;
    return simt_sampled_product(p, config, stream);
  }
  return std::string(name_of(c.family)) + " has no kernel for gradients of values";
}

std::string kernel_name(const Product& p, const GemmConfig& c) { return name("", p, c); }
std::string kernel_name(const SampledProduct& p, const GemmConfig& c) {
  return name("_grad_values", p, c);
}

}  // namespace tetris::cuda
