// hopper.h in a build without code for compute capability 9.0 (TETRIS_CUDA_TARGETS).
#include "cuda/hopper.h"

namespace tetris::cuda {

std::string hopper_supports(const Product&) {
  return "this build has no code for compute capability 9.0 (TETRIS_CUDA_TARGETS)";
}

int hopper_max_stages(const Product&, int) { return 0; }
HopperConfig hopper_default(const Product&, int) { return {}; }

std::string hopper_product(const Product& product, const HopperConfig&, Stream) {
  return "hopper: " + hopper_supports(product);
}

}  // namespace tetris::cuda
