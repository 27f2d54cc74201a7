// Where an implementation of the ops runs and what it computes with: what the shared checks, and
// their messages, depend on.
#pragma once

#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>

#include <vector>

namespace tetris::ops {

struct Backend {
  c10::DeviceType device;
  const char* place;  // such a device, in messages
  std::vector<c10::ScalarType> types;
  const char* type_names;
  const char* hint;  // what to do with other types
};

}  // namespace tetris::ops
