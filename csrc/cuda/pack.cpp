#include "cuda/pack.h"

namespace tetris::cuda {
namespace {

// Whether a map has to be copied: its channels are apart or out of order, or not in whole chunks.
bool apart(const void* map, const Strides& s, const int32_t* perm, int64_t image_pixels,
           DType dtype) {
  const int64_t chunk = 16 / size_of(dtype);
  return perm || s.channel != 1 || reinterpret_cast<uintptr_t>(map) % 16 != 0 || s.pixel <= 0 ||
         s.pixel % chunk != 0 || s.image != image_pixels * s.pixel;
}

int64_t source_pixels(const Geometry& g) { return int64_t(g.source_h) * g.source_w; }
int64_t result_pixels(const Geometry& g) { return int64_t(g.result_h) * g.result_w; }

// The images of a matrix, or of one image, lie anyhow.
Strides with_image(Strides s, const Geometry& g, int64_t image_pixels) {
  if (g.images <= 1) s.image = image_pixels * s.pixel;
  return s;
}

}  // namespace

Packing packing_of(const Product& p) {
  const int64_t source = source_pixels(p.geometry), result = result_pixels(p.geometry);
  Packing packing;
  packing.x = apart(p.x, with_image(p.x_strides, p.geometry, source), p.col_perm, source, p.dtype);
  packing.y = apart(p.y, with_image(p.y_strides, p.geometry, result), p.row_perm, result, p.dtype);
  return packing;
}

Packing packing_of(const SampledProduct& p) {
  const int64_t source = source_pixels(p.geometry), result = result_pixels(p.geometry);
  Packing packing;
  packing.x = apart(p.x, with_image(p.x_strides, p.geometry, source), p.col_perm, source, p.dtype);
  packing.y =
      apart(p.dy, with_image(p.dy_strides, p.geometry, result), p.row_perm, result, p.dtype);
  return packing;
}

Product packed(const Product& product, const Packing& packing) {
  Product p = product;
  if (packing.x) {
    p.x = nullptr;
    p.x_strides = packed_strides(p.w.cols, source_pixels(p.geometry), p.dtype);
    p.col_perm = nullptr;
  }
  if (packing.y) {
    p.y = nullptr;
    p.y_strides = packed_strides(p.w.rows, result_pixels(p.geometry), p.dtype);
    p.row_perm = nullptr;
    if (p.residual) {
      p.residual_strides = p.y_strides;
    }
  }
  return p;
}

SampledProduct packed(const SampledProduct& product, const Packing& packing) {
  SampledProduct p = product;
  if (packing.x) {
    p.x = nullptr;
    p.x_strides = packed_strides(p.w.cols, source_pixels(p.geometry), p.dtype);
    p.col_perm = nullptr;
  }
  if (packing.y) {
    p.dy = nullptr;
    p.dy_strides = packed_strides(p.w.rows, result_pixels(p.geometry), p.dtype);
    p.row_perm = nullptr;
  }
  return p;
}

}  // namespace tetris::cuda
