// What an instruction set provides: one table of plain function pointers per element type.
//
// clang-format off
// Vocabulary (W = vector lanes, NV = vectors per panel row):
//   panel   T[n][NV*W]: row i holds input (or output) i of NV*W tokens, which are the vector lanes
//   tile    R output rows x NV vectors of accumulators that live in registers
// clang-format on
//
// Nothing here or below includes a header that other files share inline code with: the linker might
// keep the AVX-512 copy of a shared inline function and crash an older CPU.
#pragma once

#include <cstdint>

namespace tetris::cpu {

enum class Activation : int { kNone, kRelu, kGelu, kGeluTanh, kSilu };

// A range of block rows of one layer, multiplied into one panel.
template <class T>
struct TileArgs {
  const T* values;           // [nnzb, bi, bo]
  const int32_t* row_begin;  // [block_rows] first stored block of each row (or of a slab of it) ...
  const int32_t* row_end;    // ... and one past the last
  const int32_t* col_idx;    // [nnzb]
  int64_t bo, bi;
  int64_t last_group, last_width;  // the column group that may be ragged, and its width
  const int32_t* slot_row;  // packed output slot -> row of the output-side panel; nullptr: identity
  int64_t first_row, last_row;  // block rows [first, last)
  int64_t row_offset;           // first row of the tile inside its block
  int64_t block_rows_valid;     // matvec: rows of these blocks that exist (the last may be ragged)
  const T* src;                 // forward: x panel [in];   grad_input: dy panel [out]
  T* dst;                       // forward: y panel [out];  grad_input: dx panel [in]
  bool accumulate;              // forward: go on from what dst holds (grad_input always does)
  int64_t prefetch;             // forward: how many values ahead to prefetch, one row at a time ...
  int64_t rows_ahead;           // ... or how many block rows, for tiles of one or two rows ...
  int64_t fetch_end;  // ... up to this one; rows side by side fetch those that follow them
};
template <class T>
using TileFn = void (*)(const TileArgs<T>&);

// Sampled product for one block row: dvalues[q] (+)= sum over tokens of x[input q] * dy[rows].
template <class T>
struct SampleArgs {
  const T* x;   // panel [in][nv*W]
  const T* dy;  // panel [bo rows of this block row][nv*W], packed order
  int64_t nv;
  const int32_t* inputs;   // [count] x panel row of each stored input
  const int64_t* offsets;  // [count] where its bo values start in dvalues
  int64_t count;
  int64_t rows;  // valid rows of this block row, at most bo
  T* dvalues;
  bool accumulate;
};
template <class T>
using SampleFn = void (*)(const SampleArgs<T>&);

// Tokens to panel: panel[dst_row ? dst_row[i] : i][t] = x[t*ldx + i]; missing tokens become 0.
template <class T>
using PackFn = void (*)(const T* x, int64_t ldx, int64_t tokens, int64_t begin, int64_t end,
                        const int32_t* dst_row, T* panel, int64_t nv);
// Panel to tokens: y[t*ldy + i] = act(panel[src_row ? src_row[i] : i][t] + bias[i]).
template <class T>
using UnpackFn = void (*)(const T* panel, int64_t nv, int64_t tokens, int64_t begin, int64_t end,
                          const int32_t* src_row, const T* bias, Activation act, T* y, int64_t ldy);
// y[i] = act(y[i] + bias[i])
template <class T>
using EpilogueFn = void (*)(T* y, int64_t n, const T* bias, Activation act);

// Whether column groups ascend strictly and lie in [0, limit).
using AscendingFn = bool (*)(const int32_t* idx, int64_t count, int64_t limit);

// Independent FMAs in registers, for measuring the peak: how many floating-point operations were
// done.
using FmaChainFn = double (*)(int64_t iterations);

inline constexpr int kMaxTileRows = 16;
inline constexpr int kMaxTileVecs = 8;

template <class T>
struct Tile {
  const char* name = nullptr;  // op_dtype_RxN__isa, N = NV*W tokens
  TileFn<T> forward = nullptr;
  TileFn<T> grad_input = nullptr;
};

template <class T>
struct KernelTable {
  const char* isa;
  unsigned needs;                                     // CpuFeature bits
  int width;                                          // W
  Tile<T> tiles[kMaxTileRows + 1][kMaxTileVecs + 1];  // [R][NV]; forward == nullptr: not built
  int max_rows;                                       // tallest tile to cut a block into
  int preferred_vecs[kMaxTileRows + 1];               // [R] -> NV for many tokens
  PackFn<T> pack;
  UnpackFn<T> unpack;
  EpilogueFn<T> epilogue;
  TileFn<T> matvec;  // one token: dst[slot_row[s]] = sum; src is x in packed order
  SampleFn<T> sample;
  AscendingFn ascending;
  FmaChainFn fma_chain;
  const char* matvec_name;
  const char* sample_name;
};

}  // namespace tetris::cpu
