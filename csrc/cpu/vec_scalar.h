// Plain C++ on short arrays: runs on any CPU, and compilers turn the loops into whatever vectors
// the baseline has (SSE2 on x86-64, NEON on arm64). Also the double-precision path.
#pragma once

#include <cmath>
#include <cstdint>

namespace tetris::cpu::scalar {

template <class T, int N>
struct ArrayLanes {
  struct Reg {
    T v[N];
  };
  static Reg zero() { return {}; }
  static Reg add(Reg a, Reg b) {
    for (int i = 0; i < N; ++i) a.v[i] += b.v[i];
    return a;
  }
  static Reg fma(T x, const T* w, Reg c) {
    for (int i = 0; i < N; ++i) c.v[i] += x * w[i];
    return c;
  }
  static void store(T* p, Reg a) {
    for (int i = 0; i < N; ++i) p[i] = a.v[i];
  }
};

template <class Scalar>
struct Vec {
  using T = Scalar;
  template <int N>
  using Lanes = ArrayLanes<T, N>;
  static constexpr int W = 4;
  static constexpr int kRegisters = 16;
  struct Reg {
    T v[W];
  };

  template <class F>
  static Reg map(F f) {
    Reg r;
    for (int i = 0; i < W; ++i) r.v[i] = f(i);
    return r;
  }
  static Reg zero() { return bcast(0); }
  static Reg load(const T* p) {
    return map([=](int i) { return p[i]; });
  }
  static void store(T* p, Reg a) {
    for (int i = 0; i < W; ++i) p[i] = a.v[i];
  }
  static Reg bcast(T a) {
    return map([=](int) { return a; });
  }
  static Reg gather(const T* p, const int32_t* index) {
    return map([=](int i) { return p[index[i]]; });
  }
  static Reg load_n(const T* p, int64_t n) {
    return map([=](int i) { return i < n ? p[i] : T(0); });
  }
  static void store_n(T* p, Reg a, int64_t n) {
    for (int i = 0; i < n; ++i) p[i] = a.v[i];
  }
  static Reg fma(Reg a, Reg b, Reg c) {
    return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static Reg fnma(Reg a, Reg b, Reg c) {
    return map([&](int i) { return c.v[i] - a.v[i] * b.v[i]; });
  }
  static Reg add(Reg a, Reg b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
  }
  static Reg mul(Reg a, Reg b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
  }
  static Reg div(Reg a, Reg b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
  }
  static Reg max(Reg a, Reg b) {
    return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });  // b where one is NaN
  }
  static Reg min(Reg a, Reg b) {
    return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static Reg if_negative(Reg a, Reg b, Reg c) {
    return map([&](int i) { return a.v[i] < 0 ? b.v[i] : c.v[i]; });
  }
  // a where the bits of m are set (a NaN, not equal to 0), 0 where they are not
  static Reg keep(Reg a, Reg m) {
    return map([&](int i) { return m.v[i] != 0 ? a.v[i] : T(0); });
  }
  // a[0], a[2], ... b[0], b[2], ...
  static Reg every_second(Reg a, Reg b) {
    return map([&](int i) { return i < W / 2 ? a.v[2 * i] : b.v[2 * i - W]; });
  }
  static T sum(Reg a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

  static void transpose(Reg (&r)[W]) {
    for (int i = 0; i < W; ++i)
      for (int j = 0; j < i; ++j) {
        const T t = r[i].v[j];
        r[i].v[j] = r[j].v[i];
        r[j].v[i] = t;
      }
  }
};

}  // namespace tetris::cpu::scalar
