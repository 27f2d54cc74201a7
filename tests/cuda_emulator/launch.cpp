#include "cuda_emulator/launch.h"

#include <cstdio>
#include <numeric>
#include <vector>

#include "cuda_emulator/asan.h"
#include "cuda_emulator/cta.h"

namespace tetris::cuda::emulator {
namespace {

const Cta* in_flight = nullptr;

std::string where(const Cta& cta) {
  std::string text = "CTA (" + std::to_string(cta.index.x) + ", " + std::to_string(cta.index.y) +
                     ", " + std::to_string(cta.index.z) + ")";
  if (const Thread* const thread = cta.running())
    text += ", thread " + std::to_string(thread->number);
  return text + ", seed " + std::to_string(options().seed);
}

// The limits of compute capability 8.0 to 9.0 (CUDA C++ Programming Guide, technical
// specifications).
std::string refuse(dim3 grid, int threads, size_t shared_bytes, size_t parameter_bytes) {
  const auto str = [](auto v) { return std::to_string(v); };
  if (threads < 1 || threads > 1024)
    return "threads of a CTA must be in [1, 1024] (got " + str(threads) + ")";
  if (shared_bytes > SharedMemory::kMaxBytes)
    return "shared memory must be at most " + str(SharedMemory::kMaxBytes) + " bytes (got " +
           str(shared_bytes) + ")";
  if (grid.x < 1 || grid.x > 0x7fffffff || grid.y < 1 || grid.y > 65535 || grid.z < 1 ||
      grid.z > 65535)
    return "a grid must be in [1, 2^31) x [1, 65536) x [1, 65536) (got " + str(grid.x) + " x " +
           str(grid.y) + " x " + str(grid.z) + ")";
  if (parameter_bytes > 4096)
    return "parameters must be at most 4096 bytes (got " + str(parameter_bytes) + ")";
  if (in_flight != nullptr) return "a kernel was launched from within a kernel";
  return {};
}

[[maybe_unused]] void on_asan_report(const char*) {
  if (in_flight != nullptr)
    std::fprintf(stderr, "CUDA emulator: that was %s\n", where(*in_flight).c_str());
}

}  // namespace

std::string run_grid(dim3 grid, int threads, size_t shared_bytes, size_t parameter_bytes,
                     const std::function<void()>& kernel) {
  const std::string refused = refuse(grid, threads, shared_bytes, parameter_bytes);
  if (!refused.empty()) return "CUDA emulator: " + refused;
#if defined(TETRIS_ASAN)
  __asan_set_error_report_callback(on_asan_report);
#endif
  Random random(options().seed);
  std::vector<uint64_t> order(size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), uint64_t{0});
  for (size_t left = order.size(); left > 1; --left)
    std::swap(order[left - 1], order[random.next() % left]);
  for (const uint64_t number : order) {
    const uint3 index{static_cast<unsigned>(number % grid.x),
                      static_cast<unsigned>(number / grid.x % grid.y),
                      static_cast<unsigned>(number / grid.x / grid.y)};
    Cta cta(grid, index, threads, shared_bytes, random.next());
    in_flight = &cta;
    std::string broken;
    try {
      cta.run(kernel);
    } catch (const Violation& violation) {
      broken = "CUDA emulator: " + where(cta) + ": " + violation.message;
    } catch (...) {
      in_flight = nullptr;
      throw;
    }
    in_flight = nullptr;
    if (!broken.empty()) return broken;
  }
  return {};
}

}  // namespace tetris::cuda::emulator
