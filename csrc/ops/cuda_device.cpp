#include "ops/cuda_device.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <deque>
#include <mutex>

namespace tetris::ops {

const Backend& cuda_backend() {
  static const Backend backend{c10::DeviceType::CUDA,
                               "a CUDA device",
                               {c10::kHalf, c10::kBFloat16, c10::kFloat, c10::kDouble},
                               "float16, bfloat16, float32 or float64",
                               ""};
  return backend;
}

cuda::Stream current_stream(const at::Tensor& x) {
  return c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
}

bool is_capturing(const at::Tensor&) {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

void synchronize(const at::Tensor& x) {
  c10::cuda::stream_synchronize(c10::cuda::getCurrentCUDAStream(x.device().index()));
}

std::shared_ptr<void> beside_captures() {
  return std::make_shared<c10::cuda::CUDAStreamCaptureModeGuard>(cudaStreamCaptureModeRelaxed);
}

void record_use(const at::Tensor& t, const at::Tensor& x) {
  c10::cuda::CUDACachingAllocator::recordStream(
      t.storage().data_ptr(), c10::cuda::getCurrentCUDAStream(x.device().index()));
}

const cuda::DeviceInfo& device_info(const at::Tensor& x) {
  static std::mutex mutex;
  static std::deque<cuda::DeviceInfo> known;  // never moves what it holds
  const int index = x.device().index();
  const std::lock_guard<std::mutex> lock(mutex);
  while (static_cast<int>(known.size()) <= index) {
    cudaDeviceProp properties;
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, static_cast<int>(known.size())));
    known.push_back(
        {properties.name, properties.major, properties.minor, properties.multiProcessorCount,
         static_cast<int64_t>(properties.sharedMemPerBlockOptin), properties.l2CacheSize});
  }
  return known[index];
}

}  // namespace tetris::ops
