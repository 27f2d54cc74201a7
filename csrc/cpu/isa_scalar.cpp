#include <cmath>

#include "cpu/table.h"
#include "cpu/vec_scalar.h"

namespace tetris::cpu {

// The C library instead of polynomials: exact, and good for doubles too.
template <class T>
struct ActivationMath<scalar::Vec<T>> {
  using V = scalar::Vec<T>;
  using Reg = typename V::Reg;
  static Reg silu(Reg x) {
    return V::map([&](int i) { return x.v[i] / (1 + std::exp(-x.v[i])); });
  }
  static Reg gelu(Reg x) {
    return V::map(
        [&](int i) { return x.v[i] * (std::erfc(x.v[i] * T(-0.70710678118654752)) / 2); });
  }
  static Reg gelu_tanh(Reg x) {
    return V::map([&](int i) {
      const T a = x.v[i];
      const T s = T(0.79788456080286536) * (a + T(0.044715) * a * a * a);
      return a * ((1 + std::tanh(s)) / 2);
    });
  }
};

namespace scalar {

struct Isa {
  static constexpr const char* kName = "scalar";
  static constexpr unsigned kNeeds = 0;
  static constexpr int kMaxRows = 4;
  static constexpr int preferred_vecs(int rows) { return rows >= 3 ? 2 : rows == 2 ? 4 : 8; }
  static constexpr int conv_vecs(int rows) { return preferred_vecs(rows); }
};

extern const KernelTable<float> kTableF32;
extern const KernelTable<double> kTableF64;
constexpr KernelTable<float> kTableF32 = TableBuilder<Vec<float>, Isa>::build();
constexpr KernelTable<double> kTableF64 = TableBuilder<Vec<double>, Isa>::build();

}  // namespace scalar
}  // namespace tetris::cpu
