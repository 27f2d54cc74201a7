#include "cuda_emulator/ptx.h"

#include <algorithm>
#include <cstring>

#include "cuda_emulator/statistics.h"

namespace tetris::cuda::ptx {
namespace {

using namespace emulator;

// -- ldmatrix -------------------------------------------------------------------------------------
//
// Lane 8 i + j names row j of matrix i: 8 elements of 16 bits. Lane l receives of each matrix the
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, the first in the low half of the register;
// with .trans, rows and columns change places.
//
// NOTE: a row is read when the lane that names it comes, not when all have met. The instruction is
// no barrier for memory: rows that other lanes stored need a __syncwarp() before.

struct Rows {
  uint16_t row[8];
  uint32_t address;
  uint32_t* registers;
};

void count_conflicts(Rows* const* rows) {  // eight lanes
  int in_banks[8] = {};
  for (int j = 0; j < 8; ++j) ++in_banks[rows[j]->address / 16 % 8];
  ++statistics().ldmatrix_matrices;
  statistics().ldmatrix_conflicts += uint64_t(*std::max_element(in_banks, in_banks + 8) - 1);
}

void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* shared_row, const char* what,
              Site site) {
  const int thread = this_thread().number, lane = thread % kWarp;
  Rows mine{{}, 0, r};
  if (lane < 8 * matrices) {
    mine.address = shared_memory().address(shared_row, what, site, 16, 16);
    std::memcpy(mine.row, shared_row, 16);
  }
  this_cta().warp().meet(thread, what, site, mine, [&](Rows* const* all) {
    for (int i = 0; i < matrices; ++i) count_conflicts(all + 8 * i);
    for (int l = 0; l < kWarp; ++l)
      for (int i = 0; i < matrices; ++i) {
        const auto element = [&](int row, int column) {
          return uint32_t{transposed ? all[8 * i + column]->row[row]
                                     : all[8 * i + row]->row[column]};
        };
        const int row = l / 4, column = l % 4 * 2;
        all[l]->registers[i] = element(row, column) | element(row, column + 1) << 16;
      }
  });
}

// -- mma ------------------------------------------------------------------------------------------
//
// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "... for mma.m16n8k8",
// with group = lane / 4 and member = lane % 4 (there: groupID, threadID_in_group).

struct Operands {
  float* d;
  const uint32_t *a, *b;
};

// m16n8k16: a register holds two elements, neighbours along k.
template <float (*to_float)(uint16_t)>
struct Pairs {
  static constexpr int kDepth = 16;
  static float get(uint32_t word, int half) {
    return to_float(static_cast<uint16_t>(half ? word >> 16 : word));
  }
  // a_i, i = 0..7, two to a register: row = group for i = 0, 1, 4, 5, else group + 8;
  //                                   column = 2 member + i % 2, and 8 more for i >= 4
  static void unpack_a(const uint32_t* a, int group, int member, float (*matrix)[kDepth]) {
    for (int i = 0; i < 8; ++i) {
      const int row = group + (i < 2 || (4 <= i && i < 6) ? 0 : 8);
      const int column = 2 * member + i % 2 + (i < 4 ? 0 : 8);
      matrix[row][column] = get(a[i / 2], i % 2);
    }
  }
  // b_i, i = 0..3: row = 2 member + i % 2, and 8 more for i >= 2; column = group
  static void unpack_b(const uint32_t* b, int group, int member, float (*matrix)[8]) {
    for (int i = 0; i < 4; ++i)
      matrix[2 * member + i % 2 + (i < 2 ? 0 : 8)][group] = get(b[i / 2], i % 2);
  }
};

// m16n8k8 with .tf32: a register holds one element.
struct Tf32 {
  static constexpr int kDepth = 8;
  // a_i, i = 0..3: row = group for i = 0, 2, else group + 8; column = member, and 4 more for i >= 2
  static void unpack_a(const uint32_t* a, int group, int member, float (*matrix)[kDepth]) {
    for (int i = 0; i < 4; ++i)
      matrix[group + (i % 2 == 0 ? 0 : 8)][member + (i < 2 ? 0 : 4)] = tf32_to_float(a[i]);
  }
  // b_i, i = 0, 1: row = member + 4 i; column = group
  static void unpack_b(const uint32_t* b, int group, int member, float (*matrix)[8]) {
    for (int i = 0; i < 2; ++i) matrix[member + 4 * i][group] = tf32_to_float(b[i]);
  }
};

template <class Format>
void mma(float* d, const uint32_t* a, const uint32_t* b, const char* what, Site site) {
  const int thread = this_thread().number;
  Operands mine{d, a, b};
  this_cta().warp().meet(thread, what, site, mine, [](Operands* const* all) {
    float left[16][Format::kDepth], right[Format::kDepth][8];
    for (int l = 0; l < kWarp; ++l) {
      Format::unpack_a(all[l]->a, l / 4, l % 4, left);
      Format::unpack_b(all[l]->b, l / 4, l % 4, right);
    }
    // d_i, i = 0..3: row = group for i < 2, else group + 8; column = 2 member + i % 2. Products of
    // these formats are exact in float; hardware adds them in an order of its own.
    for (int l = 0; l < kWarp; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + (i < 2 ? 0 : 8), column = l % 4 * 2 + i % 2;
        float sum = all[l]->d[i];
        for (int k = 0; k < Format::kDepth; ++k) sum += left[row][k] * right[k][column];
        all[l]->d[i] = sum;
      }
  });
}

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, Site site) {
  ldmatrix(r, 4, false, shared_row, "ldmatrix_x4", site);
}
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, Site site) {
  ldmatrix(r, 4, true, shared_row, "ldmatrix_x4_trans", site);
}
void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row, Site site) {
  ldmatrix(r, 2, false, shared_row, "ldmatrix_x2", site);
}
void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row, Site site) {
  ldmatrix(r, 2, true, shared_row, "ldmatrix_x2_trans", site);
}

void mma_m16n8k16_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  mma<Pairs<emulator::half_to_float>>(d, a, b, "mma_m16n8k16_half", site);
}
void mma_m16n8k16_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                           Site site) {
  mma<Pairs<emulator::bfloat16_to_float>>(d, a, b, "mma_m16n8k16_bfloat16", site);
}
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  mma<Tf32>(d, a, b, "mma_m16n8k8_tf32", site);
}

}  // namespace tetris::cuda::ptx
