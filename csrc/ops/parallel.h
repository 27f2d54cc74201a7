// torch's threads for the kernels, which know no torch.
#pragma once

#include "cpu/parallel.h"

namespace tetris::ops {

// As many threads as torch.set_num_threads allows; one inside another parallel region (a data
// loader's, a user's own).
cpu::Parallel parallel();

// How many threads such a region really runs on, counted.
int threads_at_work();

}  // namespace tetris::ops
