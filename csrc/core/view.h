// The block-sparse format as kernels see it: pointers and extents, no ownership.
//
//     W[row_perm][:, col_perm] =  [ K K . . ]   row_ptr 0 2 3     K = stored block, bo x bi
//                                 [ . . K . ]   col_idx 0 1 2     . = zero, not stored
//
// Packed slot s of the output axis is original row row_perm[s]; nullptr means identity, and the
// same for inputs. values[b][k][r] is input k, output r of stored block b: input-major, so that a
// kernel streams it front to back. The last block row and column group may be ragged.
#pragma once

#include <cstdint>

namespace tetris {

struct BlockSparseView {
  int64_t out = 0, in = 0;            // extents of the dense weight W[out, in]
  int64_t bo = 1, bi = 1;             // block height along out, width along in
  int64_t nnzb = 0;                   // stored blocks
  const int32_t* row_ptr = nullptr;   // [block_rows() + 1]
  const int32_t* col_idx = nullptr;   // [nnzb], ascending within a block row
  const int32_t* row_perm = nullptr;  // [out] or nullptr
  const int32_t* col_perm = nullptr;  // [in] or nullptr

  int64_t block_rows() const { return (out + bo - 1) / bo; }
  int64_t col_groups() const { return (in + bi - 1) / bi; }
};

}  // namespace tetris
