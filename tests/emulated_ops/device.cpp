// The CUDA ops on the emulator: CPU tensors stand for CUDA's. What csrc/ops/cuda_device.cpp is on a
// machine with a GPU, so that the ops themselves, layouts and packing included, are tested where
// there is none. TETRIS_EMULATED_GPU=8.0 makes it another generation; TETRIS_EMULATED_CAPTURE=1
// claims that a CUDA graph is being captured, TETRIS_EMULATED_CAPTURE=elsewhere by another thread.
#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

#include "ops/cuda_device.h"

namespace tetris::ops {
namespace {

thread_local int beside = 0;  // what of beside_captures() lives

bool capturing(const std::string& who) {
  const char* value = std::getenv("TETRIS_EMULATED_CAPTURE");
  return value && value == who;
}

}  // namespace

const Backend& cuda_backend() {
  static const Backend backend{c10::DeviceType::CPU,
                               "the CPU, as an emulated CUDA device",
                               {c10::kHalf, c10::kBFloat16, c10::kFloat, c10::kDouble},
                               "float16, bfloat16, float32 or float64",
                               ""};
  return backend;
}

cuda::Stream current_stream(const at::Tensor&) { return nullptr; }

bool is_capturing(const at::Tensor&) { return capturing("1"); }

void synchronize(const at::Tensor&) {
  TORCH_CHECK(beside > 0 || !capturing("elsewhere"), "another thread's capture is invalid now");
}

std::shared_ptr<void> beside_captures() {
  ++beside;
  return {nullptr, [](void*) { --beside; }};
}

void record_use(const at::Tensor&, const at::Tensor&) {}

const cuda::DeviceInfo& device_info(const at::Tensor&) {
  static const cuda::DeviceInfo device = [] {
    const char* value = std::getenv("TETRIS_EMULATED_GPU");
    const std::string version = value ? value : "9.0";
    const size_t dot = version.find('.');
    return cuda::DeviceInfo{"emulated",
                            std::stoi(version),
                            dot == std::string::npos ? 0 : std::stoi(version.substr(dot + 1)),
                            4,
                            227 << 10,
                            50 << 20};
  }();
  return device;
}

}  // namespace tetris::ops
