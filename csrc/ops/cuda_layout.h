// Layouts as CUDA kernels read them: contents checked, rows in the order in which to start them,
// and the transposed index that a gradient for the input walks.
//
// All this is made once for the index tensors of a layer, on the device, and kept as long as they
// live: making it waits for the device, every later call does not. A layout is known by where its
// tensors' memory is and by their version counters, so an in-place change makes it a new one.
// NOTE: tensors made in torch.inference_mode() count no versions; those are checked on every call.
#pragma once

#include <memory>

#include "cuda/problem.h"
#include "ops/bsmm_checks.h"

namespace tetris::ops {

struct PreparedLayout;

// What a kernel takes, and what keeps it alive.
struct PreparedRows {
  cuda::SparseRows rows;
  std::shared_ptr<const PreparedLayout> owner;
};

// The rows of a layout on the device of x, or with `transposed` the rows of its transpose, whose
// col_idx counts tap * block rows of a group + block row. Raises where the contents of an index
// tensor break a rule, and while a CUDA graph is being captured if the layout is new.
PreparedRows prepare_rows(const char* op, const Layout& layout, bool transposed,
                          const at::Tensor& x);

// How many layouts are kept, and forgetting them all: for tests.
int64_t prepared_layouts();
void forget_prepared_layouts();

}  // namespace tetris::ops
