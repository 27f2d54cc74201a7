// Activations on vectors of any instruction set.
//
// The scalar path calls the C library. The vector paths use our own exp and erfc: relative error of
// a few 1e-7, plus what rounding a^2 costs in GELU's tail (exp(-a^2 / 2): 2e-6 at -6, where GELU is
// 1e-8). NaN in, NaN out; infinities as in the textbook formulas.
#pragma once

#include "cpu/kernels.h"

namespace tetris::cpu {

// exp(a) = 2^n exp(r), n = round(a / ln 2), |r| <= ln 2 / 2; Taylor to r^7 leaves 5e-9.
// 2^n is applied in halves, so that all of float's range, subnormal numbers too, is reached; the
// clamps lie where the result is 0 and infinity.
template <class V>
typename V::Reg vexp(typename V::Reg a) {
  using Reg = typename V::Reg;
  a = V::max(V::bcast(-110.0f), V::min(V::bcast(89.0f), a));  // this operand order keeps NaN
  const Reg n = V::round(V::mul(a, V::bcast(1.44269504f)));
  Reg r = V::fnma(n, V::bcast(0.693359375f), a);  // ln 2 in two parts: n * high is exact
  r = V::fnma(n, V::bcast(-2.12194440e-4f), r);
  const float taylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  Reg p = V::bcast(1.0f / 5040);
  for (float c : taylor) p = V::fma(p, r, V::bcast(c));
  const Reg half = V::round(V::mul(n, V::bcast(0.5f)));
  return V::mul(V::mul(p, V::pow2(half)), V::pow2(V::fnma(half, V::bcast(1.0f), n)));
}

// erfc(a), a >= 0, as t q(u) exp(-a^2) with t = 1 / (1 + 0.3 a) and q a Chebyshev interpolant of
// degree 8 on a in [0, 10], i.e. t in [0.25, 1], u in [-1, 1]: relative error 2.5e-8 before
// rounding. Writing 1 + erf(-a) this way keeps the relative accuracy of GELU's tail, where 1 + erf
// cancels.
template <class V>
typename V::Reg verfc(typename V::Reg a) {
  using Reg = typename V::Reg;
  const Reg t = V::div(V::bcast(1.0f), V::fma(a, V::bcast(0.3f), V::bcast(1.0f)));
  const Reg u = V::fma(t, V::bcast(1 / 0.375f), V::bcast(-0.625f / 0.375f));
  const float q_of_u[] = {-5.1140054e-05f, -0.000168857237f, 0.000544375915f,
                          0.0062215412f,   0.0273090228f,    0.0800473616f,
                          0.175846636f,    0.30161795f,      0.408633083f};
  Reg q = V::zero();
  for (float c : q_of_u) q = V::fma(q, u, V::bcast(c));
  return V::mul(V::mul(t, q), vexp<V>(V::fnma(a, a, V::zero())));
}

// x / (1 + exp(-s))
template <class V>
typename V::Reg times_sigmoid(typename V::Reg x, typename V::Reg s) {
  return V::div(x, V::add(V::bcast(1.0f), vexp<V>(V::mul(s, V::bcast(-1.0f)))));
}

template <class V>
struct ActivationMath {
  using Reg = typename V::Reg;
  static Reg silu(Reg x) { return times_sigmoid<V>(x, x); }
  // x (1 + erf(x / sqrt 2)) / 2
  static Reg gelu(Reg x) {
    const Reg half_erfc =
        V::mul(V::bcast(0.5f), verfc<V>(V::mul(V::abs(x), V::bcast(0.70710678f))));
    const Reg cdf =
        V::if_negative(x, half_erfc, V::fnma(half_erfc, V::bcast(1.0f), V::bcast(1.0f)));
    return V::mul(x, cdf);
  }
  // x (1 + tanh(s)) / 2 = x sigmoid(2 s), s = sqrt(2 / pi) (x + 0.044715 x^3)
  static Reg gelu_tanh(Reg x) {
    const Reg cubic = V::fma(V::mul(x, x), V::bcast(0.044715f), V::bcast(1.0f));
    return times_sigmoid<V>(x, V::mul(V::mul(x, cubic), V::bcast(1.59576912f)));
  }
};

template <class V>
typename V::Reg activate(typename V::Reg x, Activation act) {
  switch (act) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      return V::max(V::zero(), x);  // NaN stays NaN
    case Activation::kGelu:
      return ActivationMath<V>::gelu(x);
    case Activation::kGeluTanh:
      return ActivationMath<V>::gelu_tanh(x);
    case Activation::kSilu:
      return ActivationMath<V>::silu(x);
  }
  return x;
}

}  // namespace tetris::cpu
