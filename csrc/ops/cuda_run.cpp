#include "ops/cuda_run.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>

#include "cpu/dispatch.h"
#include "cuda/pack.h"
#include "cuda/permute.h"
#include "cuda/run.h"

namespace tetris::ops {
namespace {

using at::Tensor;

void check_launch(const char* op, const std::string& error) {
  TORCH_CHECK(error.empty(), op, ": ", error);
}

// -- what is seen of the choice -------------------------------------------------------------------

struct Watch {
  std::atomic<bool> enabled{false};
  std::mutex mutex;
  std::map<std::string, WatchedProduct> seen;
};

Watch& watch() {
  static Watch* const made = new Watch;
  return *made;
}

// Names live as long as the process: set_last_kernel keeps the pointer. There are as many as
// kernels.
const char* lasting(const std::string& name) {
  static std::mutex mutex;
  static std::set<std::string>* const names = new std::set<std::string>;
  const std::lock_guard<std::mutex> lock(mutex);
  return names->insert(name).first->c_str();
}

template <class P>
void note(const char* op, const P& p, const cuda::GemmConfig& config,
          const cuda::DeviceInfo& device) {
  cpu::set_last_kernel(lasting(cuda::kernel_name(p, config)));
  static const bool print = [] {
    const char* value = std::getenv("TETRIS_PRINT_CONFIG");
    return value && std::string(value) == "1";
  }();
  if (print)
    std::fprintf(stderr, "%s: %s: %s\n", op, cuda::problem_key(p).c_str(),
                 cuda::to_string(config).c_str());
  Watch& w = watch();
  if (!w.enabled.load(std::memory_order_relaxed)) return;
  WatchedProduct seen{device.name, cuda::problem_key(p), {}};
  seen.candidates.push_back(cuda::to_string(cuda::select_config(p, device)));  // the guess first
  for (const cuda::GemmConfig& c : cuda::candidates(p, device)) {
    const std::string text = cuda::to_string(c);
    if (text != seen.candidates.front()) seen.candidates.push_back(text);
  }
  const std::lock_guard<std::mutex> lock(w.mutex);
  w.seen.emplace(seen.device + '/' + seen.key, seen);
}

// -- packing --------------------------------------------------------------------------------------

int64_t image_pixels(const cuda::Geometry& g, bool result) {
  return result ? int64_t{g.result_h} * g.result_w : int64_t{g.source_h} * g.source_w;
}

// Memory for a packed map; what lies between a pixel's channels and the next pixel is never read.
Tensor empty_packed(const Tensor& like, int64_t images, const cuda::Strides& s) {
  return at::empty({std::max<int64_t>(1, images * s.image)}, like.options());
}

bool on_tensor_cores(const cuda::GemmConfig& config) {
  return config.family == cuda::Family::kMma || config.family == cuda::Family::kHopper;
}

}  // namespace

cuda::DType cuda_type(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return cuda::DType::kFloat16;
    case at::kBFloat16:
      return cuda::DType::kBFloat16;
    case at::kFloat:
      return cuda::DType::kFloat32;
    default:
      TORCH_INTERNAL_ASSERT(type == at::kDouble);
      return cuda::DType::kFloat64;
  }
}

bool matmul_may_round(at::ScalarType type) {
  return type == at::kFloat && at::globalContext().allowTF32CuBLAS();
}

namespace {

// Convolutions' own setting where torch has one, else RNNs' must agree: named by an enumerator, in
// some releases by a string, in older ones there is but one. Its type tells, whatever the release.
template <class Op>
bool conv_allows_tf32(bool (at::Context::*get)(std::optional<Op>) const) {
  return (at::globalContext().*get)(Op::CONV);
}
[[maybe_unused]] bool conv_allows_tf32(bool (at::Context::*get)(const std::string&) const) {
  return (at::globalContext().*get)("conv");
}
[[maybe_unused]] bool conv_allows_tf32(bool (at::Context::*get)() const) {
  return (at::globalContext().*get)();
}

}  // namespace

bool conv_may_round(at::ScalarType type) {
  return type == at::kFloat && conv_allows_tf32(&at::Context::allowTF32CuDNN);
}

namespace {

// One map, from its own order into packed order (gather) or back (scatter). In packed order
// channels are neighbours; otherwise they or the pixels are.
struct MapCopy {
  const void* from;
  cuda::Strides from_strides;
  void* to;
  cuda::Strides to_strides;
  const int32_t* perm;  // packed slot -> channel, or nullptr
  bool scatter;
};

// The map as a tensor [images, pixels, channels] of another tensor's kind.
Tensor as_tensor(const void* map, const cuda::Strides& s, int64_t images, int64_t pixels,
                 int64_t channels, const Tensor& like) {
  const std::array<int64_t, 3> sizes{images, pixels, channels},
      strides{s.image, s.pixel, s.channel};
  // The device is said, not asked for by the pointer: calls of CUDA that a capture may refuse.
  return at::for_blob(const_cast<void*>(map), sizes)
      .strides(strides)
      .options(like.options())
      .target_device(like.device())
      .make_tensor();
}

// What no kernel of permute.h takes: by torch.
void copy_by_torch(const MapCopy& m, int64_t images, int64_t pixels, int64_t channels,
                   const Tensor& like) {
  const Tensor from = as_tensor(m.from, m.from_strides, images, pixels, channels, like);
  Tensor to = as_tensor(m.to, m.to_strides, images, pixels, channels, like);
  if (!m.perm) {
    to.copy_(from);
    return;
  }
  const std::array<int64_t, 1> size{channels};
  const Tensor perm = at::for_blob(const_cast<int32_t*>(m.perm), size)
                          .options(like.options().dtype(at::kInt))
                          .target_device(like.device())
                          .make_tensor();
  if (m.scatter)
    to.index_copy_(2, perm.to(at::kLong), from);
  else
    to.copy_(from.index_select(2, perm));
}

void copy_map(const char* op, const MapCopy& m, int64_t images, int64_t pixels, int64_t channels,
              const Tensor& like) {
  const cuda::DeviceInfo& device = device_info(like);
  const cuda::Strides& own = m.scatter ? m.to_strides : m.from_strides;
  const int size = static_cast<int>(like.element_size());
  const auto rows = [&](const cuda::Strides& s) {
    return images == 1 || s.image == pixels * s.pixel;
  };
  if (own.channel != 1 && own.pixel == 1) {  // channels first: transposed on the way
    cuda::TransposedPermutation p;
    p.x = m.from;
    p.y = m.to;
    p.matrices = images;
    p.x_matrix = m.from_strides.image;
    p.y_matrix = m.to_strides.image;
    p.rows = m.scatter ? pixels : channels;
    p.columns = m.scatter ? channels : pixels;
    p.x_stride = m.scatter ? m.from_strides.pixel : m.from_strides.channel;
    p.y_stride = m.scatter ? m.to_strides.channel : m.to_strides.pixel;
    (m.scatter ? p.y_rows : p.x_rows) = m.perm;
    p.element_size = size;
    check_launch(op, cuda::permute_transpose(p, current_stream(like)));
  } else if (m.perm && own.channel == 1 && rows(m.from_strides) && rows(m.to_strides) &&
             4 * channels * size <= device.shared_bytes) {
    cuda::ColumnPermutation p;
    p.x = m.from;
    p.y = m.to;
    p.perm = m.perm;
    p.rows = images * pixels;
    p.columns = channels;
    p.x_stride = m.from_strides.pixel;
    p.y_stride = m.to_strides.pixel;
    p.element_size = size;
    p.scatter = m.scatter;
    check_launch(
        op, cuda::permute_columns(p, device.multiprocessors,
                                  static_cast<size_t>(device.shared_bytes), current_stream(like)));
  } else {
    copy_by_torch(m, images, pixels, channels, like);
  }
}

// The product with operands in packed order, and what to do with its result.
void run_packed(const char* op, const cuda::Product& p, const cuda::GemmConfig& config,
                const Tensor& x) {
  const cuda::Stream stream = current_stream(x);
  const cuda::Packing packing = cuda::packing_of(p);
  cuda::Product q = cuda::packed(p, packing);
  const cuda::Geometry& g = p.geometry;
  const int64_t source = image_pixels(g, false), result = image_pixels(g, true);
  Tensor xs, ys, residuals, biases;
  if (packing.x) {
    xs = empty_packed(x, g.images, q.x_strides);
    q.x = xs.const_data_ptr();
    copy_map(op, {p.x, p.x_strides, xs.mutable_data_ptr(), q.x_strides, p.col_perm, false},
             g.images, source, p.w.cols, x);
  }
  if (packing.y) {
    ys = empty_packed(x, g.images, q.y_strides);
    q.y = ys.mutable_data_ptr();
    if (p.residual) {
      residuals = empty_packed(x, g.images, q.residual_strides);
      q.residual = residuals.const_data_ptr();
      copy_map(op,
               {p.residual, p.residual_strides, residuals.mutable_data_ptr(), q.residual_strides,
                p.row_perm, false},
               g.images, result, p.w.rows, x);
    }
    if (p.bias && p.row_perm) {
      const cuda::Strides line = cuda::packed_strides(p.w.rows, 1, p.dtype);
      biases = empty_packed(x, 1, line);
      q.bias = biases.const_data_ptr();
      copy_map(op, {p.bias, line, biases.mutable_data_ptr(), line, p.row_perm, false}, 1, 1,
               p.w.rows, x);
    }
  }
  check_launch(op, cuda::run_product(q, config, stream));
  if (packing.y)
    copy_map(op, {q.y, q.y_strides, p.y, p.y_strides, p.row_perm, true}, g.images, result, p.w.rows,
             x);
}

}  // namespace

void run(const char* op, const cuda::Product& p, const Tensor& x) {
  if (p.geometry.pixels() == 0) return;
  const cuda::DeviceInfo& device = device_info(x);
  const cuda::Choice choice = cuda::choose(p, device);
  TORCH_CHECK_VALUE(choice.error.empty(), op, ": ", choice.error);
  if (on_tensor_cores(choice.config))
    run_packed(op, p, choice.config, x);
  else
    check_launch(op, cuda::run_product(p, choice.config, current_stream(x)));
  note(op, p, choice.config, device);
}

void run(const char* op, const cuda::SampledProduct& p, const Tensor& x, Tensor& dvalues) {
  if (p.geometry.pixels() == 0 || p.w.nnzb == 0) {
    dvalues.zero_();
    return;
  }
  const cuda::DeviceInfo& device = device_info(x);
  const cuda::Stream stream = current_stream(x);
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  const cuda::Choice choice = cuda::choose(p, device, deterministic);
  TORCH_CHECK_VALUE(choice.error.empty(), op, ": ", choice.error);
  const cuda::GemmConfig& config = choice.config;

  cuda::SampledProduct q = p;
  Tensor xs, dys, partial;
  if (on_tensor_cores(config)) {
    const cuda::Packing packing = cuda::packing_of(p);
    q = cuda::packed(p, packing);
    const cuda::Geometry& g = p.geometry;
    if (packing.x) {
      xs = empty_packed(x, g.images, q.x_strides);
      q.x = xs.const_data_ptr();
      copy_map(op, {p.x, p.x_strides, xs.mutable_data_ptr(), q.x_strides, p.col_perm, false},
               g.images, image_pixels(g, false), p.w.cols, x);
    }
    if (packing.y) {
      dys = empty_packed(x, g.images, q.dy_strides);
      q.dy = dys.const_data_ptr();
      copy_map(op, {p.dy, p.dy_strides, dys.mutable_data_ptr(), q.dy_strides, p.row_perm, false},
               g.images, image_pixels(g, true), p.w.rows, x);
    }
  }
  bool zeroed = false;
  if (const int64_t size = cuda::partial_size(q, config, &zeroed)) {
    const auto options = x.options().dtype(at::kFloat);
    partial = zeroed ? at::zeros({size}, options) : at::empty({size}, options);
    q.partial = partial.mutable_data_ptr<float>();
  }
  check_launch(op, cuda::run_product(q, config, stream));
  if (cuda::leaves_partial(config) && partial.defined())
    dvalues.copy_(partial.view(dvalues.sizes()));
  note(op, p, config, device);
}

void watch_products(bool enabled) {
  watch().enabled = enabled;
  watched_products();
}

std::vector<WatchedProduct> watched_products() {
  Watch& w = watch();
  const std::lock_guard<std::mutex> lock(w.mutex);
  std::vector<WatchedProduct> result;
  for (auto& [key, seen] : w.seen) result.push_back(std::move(seen));
  w.seen.clear();
  return result;
}

}  // namespace tetris::ops
