// The CPU as a backend.
#pragma once

#include "ops/backend.h"

namespace tetris::ops {

inline const Backend& cpu_backend() {
  static const Backend backend{c10::DeviceType::CPU,
                               "the CPU",
                               {c10::kFloat, c10::kDouble},
                               "float32 or float64",
                               "; other types have no CPU kernel: convert to float32, as CPU "
                               "autocast does"};
  return backend;
}

}  // namespace tetris::ops
