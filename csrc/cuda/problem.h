// What the CUDA kernels compute: pointers on the device, extents, no ownership, no torch.
//
// One form covers matrix products and convolutions, forward and backward. Pixels p of the result
// gather pixels of the source, one for each tap (kernel position) that hits the source at all:
//
//   product   y[p, r] = act(sum over stored blocks of w[r, tap, c] x[source(p, tap), c]
//                           + bias[r] + residual[p, r])
//   sampled   dw[r, tap, c] = sum over p of dy[p, r] x[source(p, tap), c], on stored blocks
//
// A matrix product has one tap, and its tokens are the pixels of one image one row high. The
// gradient for the input is a product again, with the layout transposed (rows are column groups)
// and, for a convolution, the direction reversed.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "cuda/platform.h"

namespace tetris::cuda {

enum class DType : int { kFloat16, kBFloat16, kFloat32, kFloat64 };

inline int size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The sparse operand, seen from the rows of the result. Rows and columns count packed slots.
struct SparseRows {
  const int32_t* row_ptr = nullptr;  // [block_rows() + 1]
  const int32_t* col_idx = nullptr;  // [nnzb] tap * col_groups() + column group, within its group
  const int32_t* block = nullptr;    // [nnzb] which of the values' blocks; nullptr: the same number
  const int32_t* order = nullptr;    // [block_rows()] longest first; nullptr: as they come
  int64_t nnzb = 0;
  int64_t rows = 0, cols = 0;  // channels of the result and of the source, all groups
  int groups = 1, taps = 1;    // groups divides rows and cols
  int height = 1, width = 1;   // of a block: along rows, along columns
  bool transposed = false;     // a block of values is [height][width]; else [width][height]

  TETRIS_HOST_DEVICE int64_t group_rows() const { return rows / groups; }
  TETRIS_HOST_DEVICE int64_t group_cols() const { return cols / groups; }
  TETRIS_HOST_DEVICE int64_t block_rows_per_group() const {
    return (group_rows() + height - 1) / height;
  }
  TETRIS_HOST_DEVICE int64_t block_rows() const { return groups * block_rows_per_group(); }
  TETRIS_HOST_DEVICE int64_t col_groups() const { return (group_cols() + width - 1) / width; }
};

// Which pixel of the source each pixel of the result sees through a tap.
struct Geometry {
  int images = 1;
  int source_h = 1, source_w = 1, result_h = 1, result_w = 1;
  int kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1;
  int pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
  bool transposed = false;  // from small to big maps: a transposed convolution, or a gradient

  TETRIS_HOST_DEVICE int64_t pixels() const { return int64_t(images) * result_h * result_w; }
  // Every pixel sees its own number and nothing else: a matrix product, or a 1x1 convolution. Maps
  // of two sizes are none: output padding may add pixels that see nothing.
  TETRIS_HOST_DEVICE bool pointwise() const {
    return kernel_h * kernel_w == 1 && stride_h == 1 && stride_w == 1 && pad_h == 0 && pad_w == 0 &&
           source_h == result_h && source_w == result_w;
  }
  // The pixel (n, y, x) of the result through tap (ky, kx): a row and a column of the source, or
  // false where it sees padding.
  TETRIS_HOST_DEVICE bool source(int y, int x, int ky, int kx, int* sy, int* sx) const {
    return along(y, ky, stride_h, pad_h, dilation_h, source_h, sy) &&
           along(x, kx, stride_w, pad_w, dilation_w, source_w, sx);
  }

 private:
  TETRIS_HOST_DEVICE bool along(int at, int k, int stride, int pad, int dilation, int size,
                                int* found) const {
    int s = transposed ? at + pad - k * dilation : at * stride - pad + k * dilation;
    if (transposed) {
      if (s % stride != 0) return false;
      s /= stride;
    }
    *found = s;
    return s >= 0 && s < size;
  }
};

// A feature map, or a matrix of tokens (pixel = distance between tokens, channel = 1). In elements.
struct Strides {
  int64_t image = 0, pixel = 1, channel = 1;  // rows of pixels lie width * pixel apart
};

struct Product {
  SparseRows w;
  Geometry geometry;
  const void* values = nullptr;
  const void* x = nullptr;
  Strides x_strides;
  const void* bias = nullptr;      // [rows] in original order, or nullptr
  const void* residual = nullptr;  // like y, or nullptr
  Strides residual_strides;
  void* y = nullptr;
  Strides y_strides;
  const int32_t* row_perm = nullptr;  // packed slot -> original channel; nullptr: identity
  const int32_t* col_perm = nullptr;
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kNone;
  bool allow_tf32 = false;  // float32 products may round their operands to TF32
};

struct SampledProduct {
  SparseRows w;  // never transposed: dvalues is [nnzb, width, height]
  Geometry geometry;
  const void* x = nullptr;  // pixels of the source
  Strides x_strides;
  const void* dy = nullptr;  // pixels of the result
  Strides dy_strides;
  void* dvalues = nullptr;  // entries outside the matrix become zero
  // Where pixels are split between blocks of threads, partial sums are added here, [nnzb, width,
  // height] in float32 for 16-bit types; nullptr: no split.
  float* partial = nullptr;
  const int32_t* row_perm = nullptr;
  const int32_t* col_perm = nullptr;
  DType dtype = DType::kFloat32;
  bool allow_tf32 = false;
};

using Stream = void*;  // a cudaStream_t

}  // namespace tetris::cuda
