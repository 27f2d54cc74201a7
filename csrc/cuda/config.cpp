#include "cuda/config.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>

#include "cuda/hopper.h"
#include "cuda/mma.h"
#include "cuda/pack.h"
#include "cuda/simt.h"
#include "cuda/skinny.h"

namespace tetris::cuda {
namespace {

constexpr Family kFamilies[] = {Family::kHopper, Family::kMma, Family::kSkinny, Family::kSimt};

bool on_tensor_cores(Family family) { return family == Family::kMma || family == Family::kHopper; }

std::string needs(const DeviceInfo& device, int major, const char* what) {
  return std::string(what) + " (this GPU has " + std::to_string(device.major) + "." +
         std::to_string(device.minor) +
         (major == 9 ? ", and sm_90a's code runs on 9.0 alone)" : ")");
}

// -- how long it would take -----------------------------------------------------------------------
//
// A roofline, to choose between families only; tiles are chosen by each family. Per multiprocessor
// and clock: what the cores do in multiply-adds, and what L2 delivers, 32 bytes. A number of x that
// is fetched once for a block row serves its height.

double clock_rate(const DeviceInfo& device) { return 1.5e9 * device.multiprocessors; }
double memory_rate(const DeviceInfo& device) { return device.major >= 9 ? 3e12 : 1.2e12; }
constexpr double kLaunch = 3e-6;

// Multiply-adds a clock that a family reaches on blocks of this height.
double rate(Family family, DType dtype, int height, const DeviceInfo& device) {
  const double bytes = size_of(dtype);
  const double narrow = dtype == DType::kFloat32 ? 0.5 : 1;  // TF32 at half the rate
  switch (family) {
    case Family::kHopper:
      return std::min(2048.0, 32 * height / bytes) * 0.8;
    case Family::kMma: {
      const double peak = (device.major >= 9 ? 1280 : device.major == 8 ? 1024 : 512) * narrow;
      // A block row lower than a tile wastes the rest of it, not what it fetches.
      return std::min(peak * std::min(1.0, height / 16.0), 32 * height / bytes) * 0.7;
    }
    case Family::kSkinny:
      return 96;
    case Family::kSimt: {
      const double cores = dtype == DType::kFloat64 ? 32 : 128;
      return cores * (height >= 8 ? 0.6 : height >= 4 ? 0.4 : 0.15);
    }
  }
  return 1;
}

double bytes_of(int64_t pixels, int64_t channels, DType dtype) {
  return double(pixels) * double(channels) * size_of(dtype);
}

template <class P>
double seconds(Family family, const P& p, const DeviceInfo& device) {
  const Geometry& g = p.geometry;
  const int64_t source = int64_t(g.images) * g.source_h * g.source_w;
  const double work = double(p.w.nnzb) * p.w.height * p.w.width;
  double time = kLaunch + work * double(g.pixels()) /
                              (rate(family, p.dtype, p.w.height, device) * clock_rate(device));
  // Values, and 4 bytes of index a block, come from memory once; skinny reads them again for every
  // 16 pixels, the others for tiles whose number the caches hide.
  const double readings = family == Family::kSkinny ? std::ceil(double(g.pixels()) / 16) : 1;
  const double streamed = (work * size_of(p.dtype) + 4.0 * double(p.w.nnzb)) * readings;
  time = std::max(time, kLaunch + streamed / memory_rate(device));
  // A tile of 64 pixels or more takes as long where most of it is empty.
  if (family != Family::kSkinny && g.pixels() < 64) {
    const double full =
        work * 64 / (rate(family, p.dtype, p.w.height, device) * clock_rate(device));
    time = std::max(time, kLaunch + full);
  }
  if (on_tensor_cores(family)) {
    const Packing packing = packing_of(p);
    const double x = bytes_of(source, p.w.cols, p.dtype),
                 y = bytes_of(g.pixels(), p.w.rows, p.dtype);
    if (packing.x) time += kLaunch + 2 * x / memory_rate(device);
    if (packing.y) time += kLaunch + 2 * y / memory_rate(device);
  }
  return time;
}

SkinnyConfig skinny_of(const Product& p, const DeviceInfo& device) {
  return skinny_config(p, device.multiprocessors, size_t(device.shared_bytes));
}

template <class P>
Family fastest(const P& p, const DeviceInfo& device) {
  Family best = Family::kSimt;
  double least = seconds(best, p, device);
  for (const Family family : kFamilies) {
    if (family == best || !refusal(family, p, device).empty()) continue;
    // Beyond a few readings of the values it lives on what L2 delivers, which is not modelled here.
    if (family == Family::kSkinny && p.geometry.pixels() > 4 * 16) continue;
    const double time = seconds(family, p, device);
    if (time < least) {
      least = time;
      best = family;
    }
  }
  return best;
}

// -- what was asked for ---------------------------------------------------------------------------

struct Overrides {
  std::mutex mutex;
  std::optional<std::string> forced;  // nullopt: the environment's
  std::map<std::string, std::map<std::string, GemmConfig>> measured;
};

Overrides& overrides() {
  static Overrides* const made = new Overrides;
  return *made;
}

std::string unknown(const std::string& text) {
  return "TETRIS_CUDA_KERNEL=" + text +
         ": no such kernel (there are simt, skinny, mma and hopper, each alone or with tiles as in "
         "'mma 128x256 4 stages')";
}

template <class P, class... Options>
Choice choose_any(const P& p, const DeviceInfo& device, const Options&... options) {
  // What is compiled starts there: without this, CUDA would find no kernel image, and say only
  // that.
  if (device.major < 8) return {{}, needs(device, 8, "CUDA kernels need compute capability 8.0")};
  const std::string forced = forced_kernel();
  if (!forced.empty()) {
    const auto config = parse_config(forced);
    if (!config) return {{}, unknown(forced)};
    const std::string why = refusal(config->family, p, device);
    if (!why.empty()) return {{}, "TETRIS_CUDA_KERNEL=" + forced + " cannot: " + why};
    GemmConfig bare;
    bare.family = config->family;
    return {*config == bare ? default_config(config->family, p, device) : *config, ""};
  }
  Overrides& o = overrides();
  {
    const std::lock_guard<std::mutex> lock(o.mutex);
    const auto table = o.measured.find(device.name);
    if (table != o.measured.end()) {
      const auto found = table->second.find(problem_key(p));
      if (found != table->second.end() && refusal(found->second.family, p, device).empty())
        return {found->second, ""};
    }
  }
  return {select_config(p, device, options...), ""};
}

// -- keys -----------------------------------------------------------------------------------------

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
  }
  return "?";
}

int power_of_two(double v) { return v <= 1 ? 0 : static_cast<int>(std::lround(std::log2(v))); }

template <class P>
std::string key_of(const char* kind, const P& p) {
  const Geometry& g = p.geometry;
  const Packing packing = packing_of(p);
  std::ostringstream key;
  key << kind << ' ' << name_of(p.dtype)
      << (p.allow_tf32 && p.dtype == DType::kFloat32 ? "-tf32" : "") << ' ' << p.w.rows << 'x'
      << p.w.cols << " blocks " << p.w.height << 'x' << p.w.width;
  if (p.w.transposed) key << " transposed";
  if (!g.pointwise())
    key << " kernel " << g.kernel_h << 'x' << g.kernel_w << " stride " << g.stride_h << 'x'
        << g.stride_w << (g.transposed ? " upwards" : "");
  if (p.w.groups > 1) key << " groups " << p.w.groups;
  key << " pixels 2^" << power_of_two(double(g.pixels())) << " stored 2^"
      << power_of_two(double(p.w.nnzb) * p.w.height * p.w.width);
  if (packing.x || packing.y) key << " packs" << (packing.x ? " x" : "") << (packing.y ? " y" : "");
  return key.str();
}

}  // namespace

// -- names ----------------------------------------------------------------------------------------

bool operator==(const GemmConfig& a, const GemmConfig& b) {
  return a.family == b.family && a.tile_rows == b.tile_rows && a.tile_pixels == b.tile_pixels &&
         a.stages == b.stages && a.splits == b.splits && a.by_row == b.by_row &&
         a.warps == b.warps && a.ctas == b.ctas && a.slab == b.slab &&
         a.strip_pixels == b.strip_pixels;
}

const char* name_of(Family family) {
  switch (family) {
    case Family::kSimt:
      return "simt";
    case Family::kSkinny:
      return "skinny";
    case Family::kMma:
      return "mma";
    case Family::kHopper:
      return "hopper";
  }
  return "?";
}

std::optional<Family> family_named(const std::string& name) {
  for (const Family family : kFamilies)
    if (name == name_of(family)) return family;
  return std::nullopt;
}

std::string to_string(const GemmConfig& c) {
  std::ostringstream text;
  text << name_of(c.family);
  if (c.tile_rows) text << ' ' << c.tile_rows << 'x' << c.tile_pixels;
  if (c.by_row) text << " by row";
  const auto count = [&](int64_t n, const char* unit) { text << ' ' << n << ' ' << unit; };
  if (!c.tile_rows && c.tile_pixels) count(c.tile_pixels, "pixels");
  if (c.warps) count(c.warps, "warps");
  if (c.ctas) count(c.ctas, "ctas");
  if (c.slab) count(c.slab, "slab");
  if (c.stages) count(c.stages, "stages");
  if (c.splits != 1) count(c.splits, "splits");
  if (c.strip_pixels) count(c.strip_pixels, "strip");
  return text.str();
}

std::optional<GemmConfig> parse_config(const std::string& text) {
  std::istringstream words(text);
  std::string name, word, unit;
  GemmConfig config;
  if (!(words >> name)) return std::nullopt;
  const auto family = family_named(name);
  if (!family) return std::nullopt;
  config.family = *family;
  while (words >> word) {
    int rows = 0, pixels = 0, end = 0;
    if (std::sscanf(word.c_str(), "%dx%d%n", &rows, &pixels, &end) == 2 &&
        end == static_cast<int>(word.size()) && rows > 0 && pixels > 0) {
      config.tile_rows = rows;
      config.tile_pixels = pixels;
      continue;
    }
    if (!(words >> unit)) return std::nullopt;
    if (word == "by" && unit == "row") {
      config.by_row = true;
      continue;
    }
    if (word.size() > 9 || word.find_first_not_of("0123456789") != std::string::npos)
      return std::nullopt;
    const int count = std::stoi(word);
    if (unit == "pixels") {
      config.tile_pixels = count;
    } else if (unit == "warps") {
      config.warps = count;
    } else if (unit == "ctas") {
      config.ctas = count;
    } else if (unit == "slab") {
      config.slab = count;
    } else if (unit == "stages") {
      config.stages = count;
    } else if (unit == "splits" && count >= 1) {
      config.splits = count;
    } else if (unit == "strip") {
      config.strip_pixels = count;
    } else {
      return std::nullopt;
    }
  }
  return config;
}

std::string problem_key(const Product& p) { return key_of("product", p); }
std::string problem_key(const SampledProduct& p) { return key_of("sampled", p); }

// -- rules ----------------------------------------------------------------------------------------

std::string refusal(Family family, const Product& p, const DeviceInfo& device) {
  switch (family) {
    case Family::kHopper:
      if (device.major != 9) return needs(device, 9, "hopper needs compute capability 9.0");
      return hopper_supports(packed(p, packing_of(p)));
    case Family::kMma:
      if (device.major < 8) return needs(device, 8, "mma needs compute capability 8.0");
      return mma_supports(packed(p, packing_of(p)));
    case Family::kSkinny:
      if (p.dtype == DType::kFloat64) return "skinny has no float64 kernel";
      if (p.w.transposed) return "skinny takes no transposed layout, which gradients need";
      if (skinny_shared_bytes(p, skinny_of(p, device)) > size_t(device.shared_bytes))
        return "skinny keeps a pixel's inputs in shared memory, which these do not fit";
      return "";
    case Family::kSimt:
      return "";
  }
  return "unknown family";
}

std::string refusal(Family family, const SampledProduct& p, const DeviceInfo& device) {
  switch (family) {
    case Family::kHopper:
      return "hopper has no kernel for gradients of values";
    case Family::kMma:
      if (device.major < 8) return needs(device, 8, "mma needs compute capability 8.0");
      return mma_supports(packed(p, packing_of(p)));
    case Family::kSkinny:
      return "skinny has no kernel for gradients of values";
    case Family::kSimt:
      return "";
  }
  return "unknown family";
}

GemmConfig default_config(Family family, const Product& p, const DeviceInfo& device) {
  GemmConfig config;
  config.family = family;
  if (family == Family::kMma) {
    const MmaConfig c = mma_config(packed(p, packing_of(p)), device.multiprocessors);
    config.tile_rows = c.tile_rows;
    config.tile_pixels = c.tile_pixels;
    config.stages = c.stages;
  } else if (family == Family::kHopper) {
    const HopperConfig c = hopper_default(packed(p, packing_of(p)), device.multiprocessors);
    config.tile_rows = p.w.height % 128 == 0 ? 128 : 64;
    config.tile_pixels = c.tile_pixels;
    config.stages = c.stages;
    config.strip_pixels = c.strip_pixels;
  } else if (family == Family::kSkinny) {
    const SkinnyConfig c = skinny_of(p, device);
    config.tile_pixels = c.pixels;
    config.warps = c.split;
    config.ctas = c.ctas;
  } else if (family == Family::kSimt) {
    const SimtConfig c = simt_config(p, device.multiprocessors);
    config.by_row = c.kind == SimtConfig::kTall;
    config.tile_pixels = c.pixels;
    config.warps = c.warps;
    config.slab = c.slab;
  }
  return config;
}

GemmConfig default_config(Family family, const SampledProduct& product, const DeviceInfo& device) {
  GemmConfig config;
  config.family = family;
  // Families split pixels only where partial sums have a place. The caller makes one if they do.
  float place;
  SampledProduct p = product;
  p.partial = &place;
  if (family == Family::kMma) {
    const MmaSampledConfig c = mma_config(packed(p, packing_of(p)), device.multiprocessors);
    config.tile_rows = c.tile_rows;
    config.tile_pixels = c.tile_columns;
    config.stages = c.stages;
    config.splits = c.splits;
  } else if (family == Family::kSimt) {
    const SimtSampledConfig c = simt_sampled_config(p, device.multiprocessors);
    config.by_row = c.by_row;
    config.splits = c.splits;
  }
  return config;
}

GemmConfig select_config(const Product& p, const DeviceInfo& device) {
  return default_config(fastest(p, device), p, device);
}

GemmConfig select_config(const SampledProduct& p, const DeviceInfo& device, bool deterministic) {
  GemmConfig config = default_config(fastest(p, device), p, device);
  if (deterministic) config.splits = 1;
  return config;
}

std::vector<GemmConfig> candidates(const Product& p, const DeviceInfo& device) {
  std::vector<GemmConfig> all;
  for (const Family family : kFamilies) {
    if (!refusal(family, p, device).empty()) continue;
    GemmConfig c = default_config(family, p, device);
    all.push_back(c);
    if (family == Family::kMma) {
      const int wide = c.tile_rows == 128 ? 128 : 256;
      for (const int pixels : {wide, wide / 2})
        for (const int stages : {3, 4}) {
          c.tile_pixels = pixels;
          c.stages = stages;
          all.push_back(c);
        }
    } else if (family == Family::kHopper) {
      const int64_t strip = c.strip_pixels;
      for (const int pixels : {256, 128})
        for (const int64_t s : {strip, int64_t{0}, strip / 2}) {
          c.tile_pixels = pixels;
          c.stages = hopper_max_stages(packed(p, packing_of(p)), pixels);
          c.strip_pixels = s;
          all.push_back(c);
        }
    }
  }
  std::vector<GemmConfig> distinct;
  for (const GemmConfig& c : all)
    if (std::find(distinct.begin(), distinct.end(), c) == distinct.end()) distinct.push_back(c);
  return distinct;
}

std::vector<GemmConfig> candidates(const SampledProduct& p, const DeviceInfo& device) {
  std::vector<GemmConfig> all;
  for (const Family family : kFamilies) {
    if (!refusal(family, p, device).empty()) continue;
    GemmConfig c = default_config(family, p, device);
    all.push_back(c);
    if (family == Family::kMma) {
      const int wide = c.tile_rows == 128 ? 128 : 256;
      for (const int columns : {wide, wide / 2})
        for (const int splits : {1, c.splits, 2 * c.splits, 4 * c.splits}) {
          GemmConfig other = c;
          other.tile_pixels = columns;
          other.splits = splits;
          all.push_back(other);
        }
    }
  }
  std::vector<GemmConfig> distinct;
  for (const GemmConfig& c : all)
    if (std::find(distinct.begin(), distinct.end(), c) == distinct.end()) distinct.push_back(c);
  return distinct;
}

// -- the choice -----------------------------------------------------------------------------------

Choice choose(const Product& p, const DeviceInfo& device) { return choose_any(p, device); }

Choice choose(const SampledProduct& p, const DeviceInfo& device, bool deterministic) {
  Choice choice = choose_any(p, device, deterministic);
  if (deterministic) choice.config.splits = 1;
  return choice;
}

std::string force_kernel(const std::string& text) {
  if (!text.empty() && !parse_config(text)) return unknown(text);
  const std::lock_guard<std::mutex> lock(overrides().mutex);
  overrides().forced = text.empty() ? std::nullopt : std::optional<std::string>(text);
  return "";
}

std::string forced_kernel() {
  static const char* const environment = std::getenv("TETRIS_CUDA_KERNEL");
  const std::lock_guard<std::mutex> lock(overrides().mutex);
  return overrides().forced.value_or(environment ? environment : "");
}

void set_measured(const std::string& device, const Measured& measured) {
  const std::lock_guard<std::mutex> lock(overrides().mutex);
  auto& table = overrides().measured[device];
  table.clear();
  for (const auto& [key, config] : measured) table[key] = config;
}

}  // namespace tetris::cuda
