#include "cuda_emulator/cuda.h"

namespace tetris::cuda::emulator {

void check_full_mask(unsigned mask, const char* what, Site site) {
  if (mask != 0xffffffff)
    violate(what, site,
            "kernels here name all lanes, 0xffffffff (got " + std::to_string(mask) + ")");
}

}  // namespace tetris::cuda::emulator
