// Which kernel computes a product, and with which tiles: a pure function of the product and the
// device, which can be printed, overridden by what was measured (tetris tune), and forced.
//
//   family   what it needs                                        what it is for
//   hopper   compute capability 9.0, 16 bits, blocks 64 k x 16 k  wgmma and TMA
//   mma      8.0; 16 bits or TF32, blocks a multiple of 16 bytes  mma.sync and cp.async
//   skinny   not float64, not a transposed layout                 decoding: one token, a few
//   simt     anything                                             everything else
//
// The first two take operands with channels last and in packed order: where a product has them
// otherwise, its caller brings them into that order first (pack.h), at the speed of a copy.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/problem.h"

namespace tetris::cuda {

enum class Family : int { kSimt, kSkinny, kMma, kHopper };

struct DeviceInfo {
  std::string name;
  int major = 0, minor = 0;
  int multiprocessors = 1;
  int64_t shared_bytes = 48 << 10;  // of one CTA, at most
  int64_t l2_bytes = 0;
};

struct GemmConfig {
  Family family = Family::kSimt;
  int tile_rows = 0;    // of a CTA: rows of the result; 0: the family's own choice, here and below
  int tile_pixels = 0;  // and pixels, or for a sampled product columns of stored blocks
  int stages = 0;       // of the pipeline
  int splits = 1;       // of a sampled product's pixels
  bool by_row = false;  // simt: a tile is of one block row (simt.h)
  int warps = 0;        // simt: of a CTA; skinny: that share a block row
  int ctas = 0;         // skinny: for each group and chunk of pixels
  int slab = 0;         // simt: columns of a tile of x
  int64_t strip_pixels = 0;  // hopper: tiles go strip by strip
};

bool operator==(const GemmConfig& a, const GemmConfig& b);

const char* name_of(Family family);
std::optional<Family> family_named(const std::string& name);

// "mma 128x256 4 stages": a family, rows x pixels, and what else it chose. parse_config inverts it.
std::string to_string(const GemmConfig& config);
std::optional<GemmConfig> parse_config(const std::string& text);

// Why a family cannot compute a product on a device, or "". Operands count as packed where the
// family needs that.
std::string refusal(Family family, const Product& product, const DeviceInfo& device);
std::string refusal(Family family, const SampledProduct& product, const DeviceInfo& device);

// Of one family, which does not refuse: what to start with where nothing was measured.
GemmConfig default_config(Family family, const Product& product, const DeviceInfo& device);
GemmConfig default_config(Family family, const SampledProduct& product, const DeviceInfo& device);

// The best guess. `deterministic` forbids splits, whose sums come in any order.
GemmConfig select_config(const Product& product, const DeviceInfo& device);
GemmConfig select_config(const SampledProduct& product, const DeviceInfo& device,
                         bool deterministic = false);

// What `tetris tune` measures: a few of each family that does not refuse.
std::vector<GemmConfig> candidates(const Product& product, const DeviceInfo& device);
std::vector<GemmConfig> candidates(const SampledProduct& product, const DeviceInfo& device);

// What a measurement is valid for: extents, types and kinds of operands. Pixels and stored blocks
// count in powers of two.
std::string problem_key(const Product& product);
std::string problem_key(const SampledProduct& product);

// The choice, in this order: what was forced, what was measured for this device and problem, the
// best guess. An error is that of a forced family.
struct Choice {
  GemmConfig config;
  std::string error;
};
Choice choose(const Product& product, const DeviceInfo& device);
Choice choose(const SampledProduct& product, const DeviceInfo& device, bool deterministic);

// Forces a family ("mma") or a configuration ("mma 128x256 4 stages") for this process, in place of
// TETRIS_CUDA_KERNEL; "" returns to the environment's choice. Returns what is wrong with it, or "".
std::string force_kernel(const std::string& text);
std::string forced_kernel();

// What was measured on the device of a name; replaces what was set for it before.
using Measured = std::vector<std::pair<std::string, GemmConfig>>;
void set_measured(const std::string& device, const Measured& measured);

}  // namespace tetris::cuda
