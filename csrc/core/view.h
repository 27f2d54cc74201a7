// The block-sparse format as kernels see it: pointers and extents, no ownership.
//
//     W[row_perm][:, col_perm] =  [ K K . . ]   row_ptr 0 2 3     K = stored block, bo x bi
//                                 [ . . K . ]   col_idx 0 1 2     . = zero, not stored
//
// Packed slot s of the output axis is original row row_perm[s]; nullptr means identity, and the
// same for inputs. values[b][k][r] is input k, output r of stored block b: input-major, so that a
// kernel streams it front to back. The last block row and column group may be ragged.
//
// A convolution's blocks lie at single kernel positions (taps): column group tap * in_groups() + g.
// Of several groups each has its own rows and columns, blocks never cross from one to the next, and
// col_idx counts within the group.
#pragma once

#include <cstdint>

namespace tetris {

struct BlockSparseView {
  int64_t out = 0, in = 0;            // all outputs (channels) and all inputs
  int64_t taps = 1;                   // kernel positions, kh * kw
  int64_t groups = 1;                 // of channels; divides out and in
  int64_t bo = 1, bi = 1;             // block height along out, width along in
  int64_t nnzb = 0;                   // stored blocks
  const int32_t* row_ptr = nullptr;   // [block_rows() + 1]
  const int32_t* col_idx = nullptr;   // [nnzb], ascending within a block row
  const int32_t* row_perm = nullptr;  // [out] or nullptr
  const int32_t* col_perm = nullptr;  // [in] or nullptr

  int64_t group_out() const { return out / groups; }
  int64_t group_in() const { return in / groups; }
  int64_t group_rows() const { return (group_out() + bo - 1) / bo; }
  int64_t in_groups() const { return (group_in() + bi - 1) / bi; }
  int64_t block_rows() const { return groups * group_rows(); }
  int64_t col_groups() const { return taps * in_groups(); }
};

}  // namespace tetris
