#include "ops/cuda_layout.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <array>
#include <future>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "core/check.h"
#include "ops/cuda_device.h"
#include "ops/output.h"

namespace tetris::ops {

using at::Tensor;

namespace {

// Far more layers than a model has. Beyond it the layout that was used longest ago is forgotten.
constexpr size_t kMaxLayouts = 4096;

// Extents, and of each index tensor: storage, address, version.
using Key = std::array<int64_t, 20>;
using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t h = 0;
    for (const int64_t v : key)
      h = (h ^ static_cast<uint64_t>(v)) * 0x9e3779b97f4a7c15u + (h >> 29);
    return h;
  }
};

const std::array<const Tensor*, 4> tensors(const Layout& layout) {
  static const Tensor none;
  return {&layout.row_ptr, &layout.col_idx, layout.row_perm ? &*layout.row_perm : &none,
          layout.col_perm ? &*layout.col_perm : &none};
}

Key key_of(const Layout& layout, const Tensor& x) {
  const BlockSparseView& v = layout.view;
  Key key{v.out, v.in, v.taps, v.groups, v.bo, v.bi, v.nnzb, x.device().index()};
  size_t at = 8;
  for (const Tensor* t : tensors(layout)) {
    if (t->defined()) {
      key[at] = reinterpret_cast<int64_t>(t->storage().unsafeGetStorageImpl());
      key[at + 1] = reinterpret_cast<int64_t>(t->const_data_ptr());
      key[at + 2] = t->is_inference() ? -1 : static_cast<int64_t>(t->_version());
    }
    at += 3;
  }
  return key;
}

bool counts_versions(const Layout& layout) {
  for (const Tensor* t : tensors(layout))
    if (t->defined() && t->is_inference()) return false;
  return true;
}

// What is made for one direction; undefined: as the layer has it.
struct Index {
  Tensor row_ptr, col_idx, block, order;
  cuda::Stream stream = nullptr;  // whose memory they are
};

}  // namespace

struct PreparedLayout {
  std::vector<WeakStorage> alive;  // the storages of the layer's tensors
  Index forward, transposed;
  bool has_transposed = false;
  bool pinned = false;  // a CUDA graph reads it: kept for as long as the layer's tensors live
  uint64_t last_use = 0;
  std::mutex mutex;

  bool expired() const {
    return std::any_of(alive.begin(), alive.end(), [](const auto& s) { return s.expired(); });
  }
};

namespace {

struct Cache {
  std::mutex mutex;
  std::unordered_map<Key, std::shared_ptr<PreparedLayout>, KeyHash> layouts;
  uint64_t clock = 0;
};

Cache& cache() {
  static Cache* const made = new Cache;  // never destroyed: CUDA may be gone before it would be
  return *made;
}

std::shared_ptr<PreparedLayout> find(const Key& key) {
  Cache& c = cache();
  const std::lock_guard<std::mutex> lock(c.mutex);
  const auto found = c.layouts.find(key);
  if (found == c.layouts.end() || found->second->expired()) return nullptr;
  found->second->last_use = ++c.clock;
  return found->second;
}

void keep(const Key& key, const std::shared_ptr<PreparedLayout>& layout) {
  Cache& c = cache();
  std::vector<std::shared_ptr<PreparedLayout>> dropped;  // freed outside of the lock
  const std::lock_guard<std::mutex> lock(c.mutex);
  for (auto it = c.layouts.begin(); it != c.layouts.end();) {
    if (it->second->expired()) {
      dropped.push_back(std::move(it->second));
      it = c.layouts.erase(it);
    } else {
      ++it;
    }
  }
  if (c.layouts.size() >= kMaxLayouts) {
    auto oldest = c.layouts.end();
    for (auto it = c.layouts.begin(); it != c.layouts.end(); ++it)
      if (!it->second->pinned &&
          (oldest == c.layouts.end() || it->second->last_use < oldest->second->last_use))
        oldest = it;
    if (oldest != c.layouts.end()) {
      dropped.push_back(std::move(oldest->second));
      c.layouts.erase(oldest);
    }
  }
  layout->last_use = ++c.clock;
  c.layouts[key] = layout;
}

void refuse_capture(const char* op, const Tensor& x, const char* what) {
  TORCH_CHECK(!is_capturing(x), op, ": ", what,
              " needs the host, which must not wait for the device while a CUDA graph is captured: "
              "run the same layers once before the capture, forward and, if it is captured too, "
              "backward");
}

// Calls fn on a thread of its own and waits for it. What fn leaves behind outlives the call that it
// is made for, so it must not come from what that call's thread has for the time being: a pool of
// memory (torch.compile's mode "reduce-overhead" runs a model once in the pool of its graphs, and
// raises if anything but the model's results is left in there), a stream, inference mode. Another
// thread may be capturing a graph meanwhile.
template <class Fn>
auto apart(const Tensor& x, Fn fn) {
  {
    const auto beside = beside_captures();
    synchronize(x);  // what the index tensors hold is there
  }
  return std::async(std::launch::async,
                    [&] {
                      const auto beside = beside_captures();
                      const c10::OptionalDeviceGuard guard(x.device());
                      const at::NoGradGuard no_grad;
                      auto made = fn();
                      synchronize(x);  // other streams may be the next to use it
                      return made;
                    })
      .get();
}

// The host's rules, on a copy: one definition of what is valid, with one set of messages.
std::shared_ptr<PreparedLayout> check(const char* op, const Layout& layout, const Tensor& x) {
  BlockSparseView view = layout.view;
  const int32_t** const places[] = {&view.row_ptr, &view.col_idx, &view.row_perm, &view.col_perm};
  std::vector<Tensor> host;
  const auto device = tensors(layout);
  auto made = std::make_shared<PreparedLayout>();
  for (size_t i = 0; i < device.size(); ++i) {
    if (!device[i]->defined()) continue;
    host.push_back(device[i]->cpu());
    *places[i] = host.back().const_data_ptr<int32_t>();
    made->alive.emplace_back(device[i]->storage().getWeakStorageImpl());
  }
  check_contents(op, check_index(view));
  const int64_t rows = view.block_rows();
  bool equal = true;
  for (int64_t r = 1; r < rows && equal; ++r)
    equal = view.row_ptr[r + 1] - view.row_ptr[r] == view.row_ptr[1];
  if (!equal)
    made->forward.order =
        layout.row_ptr.diff().argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true).to(at::kInt);
  made->forward.stream = current_stream(x);
  return made;
}

Index transpose(const Layout& layout, const Tensor& x) {
  const BlockSparseView& v = layout.view;
  const int64_t rows = v.group_rows(), cols = v.in_groups();
  const int64_t result_rows = v.groups * cols, result_cols = v.taps * rows;
  const auto like = layout.row_ptr.options();
  Index t;
  t.stream = current_stream(x);
  if (v.nnzb == 0) {
    t.row_ptr = at::zeros({result_rows + 1}, like);
    t.col_idx = t.block = layout.col_idx;
    return t;
  }
  const auto longs = like.dtype(at::kLong);
  const Tensor row = at::repeat_interleave(at::arange(v.block_rows(), longs),
                                           layout.row_ptr.diff().to(at::kLong), 0, v.nnzb);
  const Tensor col = layout.col_idx.to(at::kLong);
  const auto over = [](const Tensor& a, int64_t b) { return a.div(b, "floor"); };
  const Tensor tap = over(col, cols), group = over(row, rows);
  const Tensor key =
      (group * cols + col - tap * cols) * result_cols + tap * rows + row - group * rows;
  const auto [sorted, block] = key.sort();
  t.row_ptr = at::searchsorted(sorted, at::arange(result_rows + 1, longs) * result_cols,
                               /*out_int32=*/true);
  t.col_idx = sorted.remainder(result_cols).to(at::kInt);
  t.block = block.to(at::kInt);
  t.order = t.row_ptr.diff().argsort(true, 0, true).to(at::kInt);
  return t;
}

const int32_t* data(const Tensor& t) { return t.defined() ? t.const_data_ptr<int32_t>() : nullptr; }

}  // namespace

PreparedRows prepare_rows(const char* op, const Layout& layout, bool transposed, const Tensor& x) {
  const Key key = key_of(layout, x);
  const bool cacheable = counts_versions(layout);
  std::shared_ptr<PreparedLayout> found = cacheable ? find(key) : nullptr;
  if (!found) {
    refuse_capture(op, x, "checking these index tensors, which are new,");
    found = apart(x, [&] { return check(op, layout, x); });
    if (cacheable) keep(key, found);
  }

  const BlockSparseView& v = layout.view;
  PreparedRows result;
  cuda::SparseRows& w = result.rows;
  w.nnzb = v.nnzb;
  w.groups = static_cast<int>(v.groups);
  w.taps = static_cast<int>(v.taps);
  w.transposed = transposed;
  const Index& made = transposed ? found->transposed : found->forward;
  if (transposed) {
    const std::lock_guard<std::mutex> lock(found->mutex);
    if (!found->has_transposed) {
      refuse_capture(op, x, "transposing a layout");
      found->transposed = apart(x, [&] { return transpose(layout, x); });
      found->has_transposed = true;
    }
    w.row_ptr = data(made.row_ptr);
    w.col_idx = data(made.col_idx);
    w.block = data(made.block);
    w.rows = v.in;
    w.cols = v.out;
    w.height = static_cast<int>(v.bi);
    w.width = static_cast<int>(v.bo);
  } else {
    w.row_ptr = v.row_ptr;
    w.col_idx = v.col_idx;
    w.rows = v.out;
    w.cols = v.in;
    w.height = static_cast<int>(v.bo);
    w.width = static_cast<int>(v.bi);
  }
  w.order = data(made.order);
  if (is_capturing(x)) {
    const std::lock_guard<std::mutex> lock(cache().mutex);
    found->pinned = true;
  } else if (current_stream(x) != made.stream) {
    for (const Tensor& t : {made.row_ptr, made.col_idx, made.block, made.order})
      if (t.defined()) record_use(t, x);
  }
  result.owner = std::move(found);
  return result;
}

int64_t prepared_layouts() {
  const std::lock_guard<std::mutex> lock(cache().mutex);
  return static_cast<int64_t>(cache().layouts.size());
}

void forget_prepared_layouts() {
  std::unordered_map<Key, std::shared_ptr<PreparedLayout>, KeyHash> dropped;
  const std::lock_guard<std::mutex> lock(cache().mutex);
  dropped.swap(cache().layouts);
}

}  // namespace tetris::ops
