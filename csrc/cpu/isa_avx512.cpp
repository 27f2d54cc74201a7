#include "core/cpu_features.h"
#include "cpu/table.h"
#include "cpu/vec_avx512.h"

namespace tetris::cpu::avx512 {

struct Isa {
  static constexpr const char* kName = "avx512";
  static constexpr unsigned kNeeds = kAvx2Fma | kAvx512;
  static constexpr int kMaxRows = 16;
  // Two vectors for tall tiles: short rows (95 % sparse) run at 109 GFLOP/s with 8x32, at 100 with
  // 16x16.
  static constexpr int preferred_vecs(int rows) { return rows >= 5 ? 2 : 4; }
  // Rows of a convolution are kernel positions times as long, and a run that is cut into threes
  // never leaves a lone vector over: 8x48 ran at 212 GFLOP/s where 8x32 ran at 200.
  static constexpr int conv_vecs(int rows) { return rows >= 5 ? 3 : 4; }
};

extern const KernelTable<float> kTableF32;
constexpr KernelTable<float> kTableF32 = TableBuilder<Vec, Isa>::build();

}  // namespace tetris::cpu::avx512
