// Block-sparse matrix products on the CPU: blocking, threads, and the order of the work.
//
//   forward       y  = act(x W^T + bias)
//   grad_input    dx = dy W
//   grad_values   dW on stored blocks only
//
// Arguments are in range by their extents (the caller's duty); index contents are checked here,
// each block row just before it is first used. A function returns an empty string, or the broken
// rule.
#pragma once

#include <cstdint>
#include <string>

#include "core/view.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace tetris::cpu {

// Tokens are rows of a matrix whose rows are contiguous; ld is the distance between rows.
template <class T>
struct Matrix {
  T* data;
  int64_t ld;
};

template <class T>
std::string bsmm_forward(const BlockSparseView& w, const T* values, Matrix<const T> x,
                         int64_t tokens, const T* bias, Activation act, Matrix<T> y,
                         const Parallel& parallel);

template <class T>
std::string bsmm_grad_input(const BlockSparseView& w, const T* values, Matrix<const T> dy,
                            int64_t tokens, Matrix<T> dx, const Parallel& parallel);

template <class T>
std::string bsmm_grad_values(const BlockSparseView& w, Matrix<const T> x, Matrix<const T> dy,
                             int64_t tokens, T* dvalues, const Parallel& parallel);

}  // namespace tetris::cpu
