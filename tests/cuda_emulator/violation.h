// A rule of the execution model that a kernel broke. launch() returns it as a message.
#pragma once

#include <cstring>
#include <string>

namespace tetris::cuda::emulator {

// Where a kernel calls something. As a default argument, `Site site = Site::here()` is the
// caller's.
struct Site {
  const char* file = "";
  int line = 0;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  bool operator!=(const Site& other) const { return !(*this == other); }
  std::string str() const {
    const char* const name = std::strrchr(file, '/');
    return std::string(name ? name + 1 : file) + ":" + std::to_string(line);
  }
};

struct Violation {
  std::string message;
};

// `what` broke the rule at `site`; launch() adds the CTA and the thread.
[[noreturn]] inline void violate(const std::string& what, Site site, const std::string& rule) {
  throw Violation{what + " (" + site.str() + "): " + rule};
}

}  // namespace tetris::cuda::emulator
