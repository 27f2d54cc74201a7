// The convolution ops on the CPU: view the tensors as maps of pixels, run.
#include <ATen/Dispatch.h>

#include "cpu/conv.h"
#include "ops/conv_ops.h"
#include "ops/cpu.h"
#include "ops/parallel.h"

namespace tetris::ops {
namespace {

using at::Tensor;

template <class T>
cpu::FeatureMap<const T> input(const Map& x) {
  return {x.tensor.const_data_ptr<T>(), x.strides};
}

struct Cpu {
  static const Backend& backend() { return cpu_backend(); }

  static void convolve(const ConvCall& call, const Tensor& values, const Map& x, const Tensor& bias,
                       const Tensor& residual, Activation act, Map& y) {
    AT_DISPATCH_FLOATING_TYPES(x.tensor.scalar_type(), "tetris convolution", [&] {
      check_contents(
          call.op,
          cpu::convolve<scalar_t>(
              call.layout.view, values.const_data_ptr<scalar_t>(), call.shape, call.direction,
              input<scalar_t>(x), bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr,
              {residual.defined() ? residual.const_data_ptr<scalar_t>() : nullptr, y.strides}, act,
              {y.tensor.mutable_data_ptr<scalar_t>(), y.strides}, parallel()));
    });
  }

  static void grad_values(const char* op, const Layout& layout, const cpu::ConvShape& shape,
                          bool transposed, const Map& big, const Map& small, Tensor& dvalues) {
    AT_DISPATCH_FLOATING_TYPES(dvalues.scalar_type(), "tetris convolution", [&] {
      check_contents(
          op, cpu::conv_grad_values<scalar_t>(layout.view, shape, transposed, input<scalar_t>(big),
                                              input<scalar_t>(small),
                                              dvalues.mutable_data_ptr<scalar_t>(), parallel()));
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(tetris, CPU, m) { ConvOps<Cpu>::implement(m); }

}  // namespace tetris::ops
