// Runs a product: chooses a kernel, brings operands into the order that it takes them in.
#pragma once

#include <string>
#include <vector>

#include "cuda/problem.h"
#include "ops/cuda_device.h"

namespace tetris::ops {

cuda::DType cuda_type(at::ScalarType type);

// Whether torch's settings let float32 products, or convolutions, round their operands to TF32.
// Other types do not ask: settings that contradict each other raise, as in torch's own products.
bool matmul_may_round(at::ScalarType type);
bool conv_may_round(at::ScalarType type);

// Operands lie on the device of x, the current one. Raises where no kernel can, or where one that
// was asked for by name cannot.
void run(const char* op, const cuda::Product& product, const at::Tensor& x);
// Writes dvalues, to which product.dvalues points.
void run(const char* op, const cuda::SampledProduct& product, const at::Tensor& x,
         at::Tensor& dvalues);

// For tuning: the problems that ran since watching began, each once, and what could have run them.
struct WatchedProduct {
  std::string device, key;
  std::vector<std::string> candidates;
};
void watch_products(bool enabled);
std::vector<WatchedProduct> watched_products();  // and forgets them

}  // namespace tetris::ops
