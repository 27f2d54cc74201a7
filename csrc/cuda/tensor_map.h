// What TMA needs to know of a tensor in global memory: CUDA's CUtensorMap, 128 opaque bytes that
// the host fills and a kernel takes as a __grid_constant__ parameter.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/platform.h"
#include "cuda/problem.h"

namespace tetris::cuda {

struct alignas(128) TensorMap {
  unsigned char opaque[128];
};

// A tensor of 16-bit elements and the box of it that one load or store moves, the innermost
// dimension first. A load may take every second element along a dimension, or every third ... In
// shared memory a box lies as if it were an array of its own, in which the innermost rows, of 16,
// 32 or 64 elements, are swizzled over their 32, 64 or 128 bytes (ptx_sm90.cuh: wgmma_layout).
// Strides need not grow from one dimension to the next, nor be multiples of each other, as they do
// and are in the documentation's example. CUTLASS asks for multiples of 16 bytes below 2^40 alone
// (make_tma_copy_desc), and encodes maps for FlashAttention-3 that have the heads of
// [batch][token][head][channel] behind the tokens; ThunderKittens cuts rows into pieces of the
// swizzle, strides of a row and then of 128 bytes, as hopper.cu cuts values (create_tensor_map).
struct TensorBox {
  static constexpr int kMaxRank = 4;
  DType dtype;
  const void* base;  // aligned to 16 bytes
  int rank;
  int64_t extent[kMaxRank];  // positive
  int64_t stride[kMaxRank];  // in elements: multiples of 8, but for the innermost, which is 1
  int box[kMaxRank];         // elements that are moved; times the step at most 256
  int step[kMaxRank] = {1, 1, 1, 1};  // at most 8, 1 for the innermost dimension
};

}  // namespace tetris::cuda

#if defined(TETRIS_CUDA_EMULATOR)
#include "cuda_emulator/tensor_map.h"  // encode_tensor_map
#elif defined(__CUDACC__)
#include <cudaTypedefs.h>

#include "cuda/launch.h"

namespace tetris::cuda {

// The function that fills a map is the driver's. It is asked for by name, so that nothing links
// against libcuda, which machines without a GPU do not have, and once: a launch fills four maps.
struct TensorMapEncoder {
  PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
  std::string error;

  TensorMapEncoder() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    // 12.5 brought the one by version, and what is compiled with it loads with no older library.
#if CUDART_VERSION >= 13000
    const cudaError_t result = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                                12000, cudaEnableDefault, &status);
#else
    const cudaError_t result =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
    if (result != cudaSuccess)
      error = taken(result);
    else if (status != cudaDriverEntryPointSuccess)
      error = "the driver has no cuTensorMapEncodeTiled (CUDA 12.0 brought it)";
    encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }
};

inline std::string encode_tensor_map(const TensorBox& box, TensorMap* map) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) &&
                alignof(TensorMap) >= alignof(CUtensorMap));
  static const TensorMapEncoder encoder;
  if (!encoder.error.empty()) return encoder.error;

  cuuint64_t extents[TensorBox::kMaxRank], strides[TensorBox::kMaxRank];  // strides of 1, 2, ..
  cuuint32_t boxes[TensorBox::kMaxRank], steps[TensorBox::kMaxRank];
  for (int i = 0; i < box.rank; ++i) {
    extents[i] = cuuint64_t(box.extent[i]);
    if (i > 0) strides[i - 1] = cuuint64_t(box.stride[i]) * 2;
    // The box is given as it is before the steps: TMA moves box / step elements, rounded up.
    boxes[i] = cuuint32_t(box.box[i] * box.step[i]);
    steps[i] = cuuint32_t(box.step[i]);
  }
  const auto encode = [&] {
    return encoder.encode(reinterpret_cast<CUtensorMap*>(map),
                          box.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                       : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                          cuuint32_t(box.rank), const_cast<void*>(box.base), extents, strides,
                          boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                          box.box[0] == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                          : box.box[0] == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                             : CU_TENSOR_MAP_SWIZZLE_32B,
                          // Neighbours of what a box brings are soon asked for by other tiles: DRAM
                          // is read in 128 bytes even where boxes are narrower.
                          CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode();
  // A thread that has not called the runtime yet has no context, and the driver makes none.
  if (result == CUDA_ERROR_INVALID_CONTEXT) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error != cudaSuccess) return taken(error);
    result = encode();
  }
  if (result == CUDA_SUCCESS) return "";
  return "cuTensorMapEncodeTiled: error " + std::to_string(int(result));
}

}  // namespace tetris::cuda
#endif
