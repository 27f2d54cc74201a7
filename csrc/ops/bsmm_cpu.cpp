// The matrix ops on the CPU: view the tensors as pointers, run.
#include <ATen/Dispatch.h>

#include "cpu/bsmm.h"
#include "ops/bsmm_ops.h"
#include "ops/cpu.h"
#include "ops/parallel.h"

namespace tetris::ops {
namespace {

using at::Tensor;

template <class T>
cpu::Matrix<const T> input(const Tensor& tokens) {
  return {tokens.const_data_ptr<T>(), tokens.stride(0)};
}

template <class T>
cpu::Matrix<T> output(Tensor& tokens) {
  return {tokens.mutable_data_ptr<T>(), tokens.size(-1)};
}

struct Cpu {
  static const Backend& backend() { return cpu_backend(); }

  static void forward(const char* op, const Layout& layout, const Tensor& values,
                      const Tensor& tokens, const Tensor& bias, Activation act, Tensor& y) {
    AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "tetris product", [&] {
      check_contents(
          op, cpu::bsmm_forward<scalar_t>(
                  layout.view, values.const_data_ptr<scalar_t>(), input<scalar_t>(tokens),
                  tokens.size(0), bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr, act,
                  output<scalar_t>(y), parallel()));
    });
  }

  static void grad_input(const char* op, const Layout& layout, const Tensor& values,
                         const Tensor& dy, Tensor& dx) {
    AT_DISPATCH_FLOATING_TYPES(dx.scalar_type(), "tetris product", [&] {
      check_contents(op, cpu::bsmm_grad_input<scalar_t>(
                             layout.view, values.const_data_ptr<scalar_t>(), input<scalar_t>(dy),
                             dy.size(0), output<scalar_t>(dx), parallel()));
    });
  }

  static void grad_values(const char* op, const Layout& layout, const Tensor& x, const Tensor& dy,
                          Tensor& dvalues) {
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "tetris product", [&] {
      check_contents(op, cpu::bsmm_grad_values<scalar_t>(
                             layout.view, input<scalar_t>(x), input<scalar_t>(dy), x.size(0),
                             dvalues.mutable_data_ptr<scalar_t>(), parallel()));
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(tetris, CPU, m) { BsmmOps<Cpu>::implement(m); }

}  // namespace tetris::ops
