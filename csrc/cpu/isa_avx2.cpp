#include "core/cpu_features.h"
#include "cpu/table.h"
#include "cpu/vec_avx2.h"

namespace tetris::cpu::avx2 {

struct Isa {
  static constexpr const char* kName = "avx2";
  static constexpr unsigned kNeeds = kAvx2Fma;
  static constexpr int kMaxRows = 4;
  // Twelve accumulators hide the FMA's latency at two a cycle. Tried: 4x16 (eight) is 20 % slower,
  // 6x16 is level for tall blocks and leaves a short tile over for most heights.
  static constexpr int preferred_vecs(int rows) { return rows >= 3 ? 3 : rows == 2 ? 4 : 8; }
  static constexpr int conv_vecs(int rows) { return preferred_vecs(rows); }
};

extern const KernelTable<float> kTableF32;
constexpr KernelTable<float> kTableF32 = TableBuilder<Vec, Isa>::build();

}  // namespace tetris::cpu::avx2
