#include <algorithm>

#include "cuda/launch.h"
#include "cuda/skinny.cuh"
#include "cuda/skinny.h"

namespace tetris::cuda {
namespace {

constexpr int64_t kIntMax = 0x7fffffff;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How values are read: rows and inputs of a vector. 16 bytes where heights allow, else an element.
struct Vector {
  int rows, inputs;
};

Vector vector_of(const Product& p) {
  const int most = 16 / size_of(p.dtype), height = p.w.height;
  if (reinterpret_cast<uintptr_t>(p.values) % 16 != 0) return {1, 1};
  if (height % most == 0) return {most, 1};
  if (most % height == 0) return {height, most / height};
  return {1, 1};
}

SkinnyPlan plan_of(const Product& p, const SkinnyConfig& config) {
  const Vector vector = vector_of(p);
  const int lanes = int(ceil_div(p.w.height, vector.rows));  // of an input
  SkinnyPlan plan;
  plan.extents = extents_of(p.w, p.geometry);
  plan.planes = config.pixels <= 4 ? 1 : config.pixels / 4;
  plan.slots_of_tap = plan.extents.col_groups * p.w.width;
  plan.slots = p.w.taps * plan.slots_of_tap;
  plan.parts = int(ceil_div(lanes, 32 / plan.planes));
  plan.lanes_of_input = int(ceil_div(lanes, plan.parts));
  plan.split = config.split;
  const int step = 32 / plan.planes / plan.lanes_of_input * vector.inputs * config.split;
  plan.block_step = step / p.w.width;
  plan.input_step = step % p.w.width;
  plan.pixel_chunks = int(ceil_div(p.geometry.pixels(), config.pixels));
  plan.inputs_of_last = p.w.width - (plan.slots_of_tap - plan.extents.group_cols);
  plan.index_runs = p.w.width == 1 && reinterpret_cast<uintptr_t>(p.w.col_idx) % 16 == 0;
  return plan;
}

// Calls fn with the kernel's types: fn.template operator()<T, HV, ITEMS, PX>().
template <class T, int PX, class Fn>
auto with_vector(const Vector& v, Fn fn) {
  constexpr int kMost = 16 / sizeof(T);
  if (v.rows == kMost) return fn(Skinny<T, kMost, 1, PX>());
  if (v.inputs == kMost) return fn(Skinny<T, 1, kMost, PX>());
  if (v.rows == 2) return fn(Skinny<T, 2, kMost / 2, PX>());
  if constexpr (kMost == 8)
    if (v.rows == 4) return fn(Skinny<T, 4, 2, PX>());
  return fn(Skinny<T, 1, 1, PX>());
}
template <class T, class Fn>
auto with_pixels(const Product& p, int pixels, Fn fn) {
  const Vector v = vector_of(p);
  return pixels == 1 ? with_vector<T, 1>(v, fn) : with_vector<T, 4>(v, fn);
}
template <class Fn>
auto with_types(const Product& p, int pixels, Fn fn) {
  if (p.dtype == DType::kFloat16) return with_pixels<Half>(p, pixels, fn);
  if (p.dtype == DType::kBFloat16) return with_pixels<BFloat16>(p, pixels, fn);
  return with_pixels<float>(p, pixels, fn);
}

template <class T, int HV, int ITEMS, int PX>
auto kernel_of(Skinny<T, HV, ITEMS, PX>) {
  return &skinny_vectors<T, HV, ITEMS, PX>;
}

}  // namespace

size_t skinny_shared_bytes(const Product& p, const SkinnyConfig& config) {
  const SkinnyPlan plan = plan_of(p, config);
  return with_types(p, config.pixels,
                    [&](auto skinny) { return skinny.shared_bytes(plan, p.w.taps); });
}

SkinnyConfig skinny_config(const Product& p, int multiprocessors, size_t shared_bytes) {
  const int64_t pixels = p.geometry.pixels();
  SkinnyConfig config;
  config.pixels = pixels <= 1 ? 1 : pixels <= 4 ? 4 : pixels <= 8 ? 8 : 16;
  while (config.pixels > 1 && skinny_shared_bytes(p, config) > shared_bytes)
    config.pixels /= config.pixels == 4 ? 4 : 2;
  const SkinnyPlan plan = plan_of(p, config);
  const Vector vector = vector_of(p);
  // Enough warps to wait for memory with (24 an SM), each with four steps or more to take.
  const int64_t units = std::max<int64_t>(1, p.w.block_rows() * plan.parts);
  const int64_t step = 32 / plan.planes / plan.lanes_of_input * vector.inputs;
  const int64_t steps = p.w.nnzb * p.w.width / (units / plan.parts * step);
  config.split = 1;
  while (config.split < 8 && units * config.split < 24 * multiprocessors &&
         8 * config.split <= steps)
    config.split *= 2;
  // As many CTAs as run at once, since each copies all of x.
  // CUDA itself takes another KiB for each.
  const size_t used = skinny_shared_bytes(p, config);
  const int by_registers =
      with_types(p, config.pixels, [](auto skinny) { return skinny.kResident; });
  const int64_t resident =
      std::clamp<int64_t>(int64_t((shared_bytes + 1024) / (used + 1024)), 1, by_registers);
  const int64_t most =
      std::max<int64_t>(1, multiprocessors * resident / (p.w.groups * plan.pixel_chunks));
  const int64_t needed = ceil_div(p.w.block_rows_per_group() * plan.parts * config.split, 8);
  config.ctas = int(std::clamp<int64_t>(needed, 1, most));
  return config;
}

std::string skinny_product(const Product& p, const SkinnyConfig& config, Stream stream) {
  if (p.geometry.pixels() == 0 || p.w.rows == 0) return {};
  const auto is_one_of = [](int v, std::initializer_list<int> all) {
    return std::find(all.begin(), all.end(), v) != all.end();
  };
  if (p.dtype == DType::kFloat64) return "skinny: float64 is not taken";
  if (p.w.transposed || p.w.block) return "skinny: transposed layouts are not taken";
  if (p.geometry.pixels() > kIntMax || p.w.rows > kIntMax || p.w.cols > kIntMax)
    return "skinny: pixels and channels must be fewer than 2^31";
  if (!is_one_of(config.pixels, {1, 4, 8, 16}))
    return "skinny: pixels must be 1, 4, 8 or 16 (got " + std::to_string(config.pixels) + ")";
  if (!is_one_of(config.split, {1, 2, 4, 8}))
    return "skinny: split must be 1, 2, 4 or 8 (got " + std::to_string(config.split) + ")";
  if (config.ctas < 1)
    return "skinny: ctas must be at least 1 (got " + std::to_string(config.ctas) + ")";
  const SkinnyPlan plan = plan_of(p, config);
  const int64_t ctas = int64_t(config.ctas) * p.w.groups * plan.pixel_chunks;
  if (ctas > kIntMax) return "skinny: more than 2^31 CTAs";
  return with_types(p, config.pixels, [&](auto skinny) {
    return launch(kernel_of(skinny),
                  {unsigned(ctas), 1, 1, 32 * skinny.kWarps, skinny.shared_bytes(plan, p.w.taps)},
                  stream, p, plan);
  });
}

}  // namespace tetris::cuda
