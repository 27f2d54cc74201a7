// A build for other GPUs than Hopper's links, and computes without its kernels.
#include <gtest/gtest.h>

#include "cuda/config.h"
#include "cuda/run.h"

namespace tetris::cuda {
namespace {

TEST(NoHopper, OthersComputeAndAskingForItSaysWhy) {
  const DeviceInfo device{"NVIDIA H200", 9, 0, 132, 227 << 10, 50 << 20};
  Product p;
  p.w.rows = p.w.cols = 4096;
  p.w.height = p.w.width = 128;
  p.w.nnzb = 100;
  p.geometry.source_w = p.geometry.result_w = 4096;
  p.x_strides = p.y_strides = {0, 4096, 1};
  p.dtype = DType::kBFloat16;

  EXPECT_EQ(Family::kMma, select_config(p, device).family);
  for (const GemmConfig& c : candidates(p, device)) EXPECT_NE(Family::kHopper, c.family);
  const std::string why = "this build has no code for compute capability 9.0 (TETRIS_CUDA_TARGETS)";
  EXPECT_EQ(why, refusal(Family::kHopper, p, device));
  GemmConfig hopper;
  hopper.family = Family::kHopper;
  EXPECT_EQ("hopper: " + why, run_product(p, hopper, nullptr));
}

}  // namespace
}  // namespace tetris::cuda
