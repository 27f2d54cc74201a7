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

#include "core/activation.h"

namespace tetris::cpu {

// A range of block rows of one layer, multiplied into one panel.
template <class T>
struct TileArgs {
  const T* values;           // [nnzb, bi, bo]
  const int32_t* row_begin;  // [block_rows] first stored block of each row (or of a slab of it) ...
  const int32_t* row_end;    // ... and one past the last
  const int32_t* col_idx;    // [nnzb]
  int64_t bo, bi;
  int64_t last_group, last_width;  // the column group that may be ragged, and its width
  const int32_t* slot_row;  // packed output slot -> row of the output-side panel or line of results
  const int32_t* offset;  // convolution: [column groups] where a block's first input starts in src
  int64_t src_stride,
      dst_stride;               // convolution: from input to input, from output row to output row
  int64_t first_row, last_row;  // block rows [first, last)
  int64_t row_offset;           // first row of the tile inside its block
  int64_t block_rows_valid;     // rows of these blocks that exist (the last may be ragged)
  const T* src;                 // forward: x panel [in];   grad_input: dy panel [out]
  T* dst;                       // forward: y panel [out];  grad_input: dx panel [in]
  bool accumulate;              // forward: go on from what dst holds (grad_input always does)
  int64_t prefetch;             // forward: how many values ahead to prefetch, one row at a time ...
  int64_t rows_ahead;           // ... or how many block rows, for tiles of one or two rows ...
  int64_t fetch_end;  // ... up to this one; rows side by side fetch those that follow them
  // forward: memory that is touched when the tiles are done, fetched into L2 while they compute: so
  // many bytes for each stored input from number later_first of the layer on. 0 bytes: none. The
  // tiles of a block's height have parts of their own, later_of_tile bytes each.
  const char* later;
  int64_t later_first, later_step, later_of_tile;
};
template <class T>
using TileFn = void (*)(const TileArgs<T>&);

// The most tokens that a sampled product of tall blocks takes at a time.
inline constexpr int kSampleTokens = 128;

// Sampled product for one block row: dvalues[q] (+)= sum over tokens of x[input q] * dy[rows].
template <class T>
struct SampleArgs {
  const T* x;
  const T* dy;  // rows of this block row, nv*W long each, packed order
  int64_t dy_stride, nv;
  const int64_t* inputs;   // [count] where the row of each stored input starts in x
  const int64_t* offsets;  // [count] where its bo values start in dvalues
  int64_t count;
  int64_t rows;  // valid rows of this block row, at most bo
  T* dvalues;
  bool accumulate;
  // Convolutions: lanes that are pixels have all bits set, the others none, and what one side holds
  // there, maybe Inf, is taken for zero. nullptr: all lanes count. Only samplers[0] takes masks.
  const T* mask;
  bool mask_dy;  // it is the side of dy that is masked, not that of x
};
template <class T>
struct Sampler {
  void (*run)(const SampleArgs<T>&);
  const char* name;  // sample_dtype_RxU__isa, R outputs x U inputs
};

// A run of pixels in a line of a convolution's plane (see conv_geometry.h).
struct Segment {
  int32_t line, count;  // where it starts in the line, and how many pixels it has
  int64_t pixel;        // where the first of them lies in the feature map, in elements
};

// Channels of a feature map to lines or back: the segments get pixels, what lies between zeros.
template <class T>
struct LineArgs {
  const Segment* segments;
  int64_t segment_count;
  int64_t begin, end;      // channels; storing to a map with channels first: slots, one line each
  const int32_t* line_of;  // [channels] line of each channel; nullptr: its number
  const int32_t* channel_of;  // [slots] channel + first_channel of each slot; nullptr: its number
  int64_t first_channel;
  T* lines;                      // lines start line_stride apart, at least W more than length ...
  bool in_place;                 // ... unless they are those of the map already (storing)
  int64_t line_stride, length;   // length: filled (zeros included) when packing
  const T* in;                   // packing: the map;  storing: added to the result, or nullptr
  T* out;                        // storing: the map
  int64_t channel_stride, step;  // of the maps: between channels, between pixels of a segment
  const T* bias;                 // storing: [channels] or nullptr
  Activation act;
  bool fetch;  // the maps are not expected in L2
};
template <class T>
using LinesFn = void (*)(const LineArgs<T>&);

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
  TileFn<T> conv = nullptr;  // forward on shifted planes
  const char* conv_name = nullptr;
};

template <class T>
struct KernelTable {
  const char* isa;
  unsigned needs;                                     // CpuFeature bits
  int width;                                          // W
  Tile<T> tiles[kMaxTileRows + 1][kMaxTileVecs + 1];  // [R][NV]; forward == nullptr: not built
  int max_rows;                                       // tallest tile to cut a block into
  int preferred_vecs[kMaxTileRows + 1];               // [R] -> NV for many tokens ...
  int conv_vecs[kMaxTileRows + 1];                    // ... and for a convolution's pixels
  PackFn<T> pack;
  UnpackFn<T> unpack;
  EpilogueFn<T> epilogue;
  TileFn<T> matvec;        // one token: dst[slot_row[s]] = sum; src is x in packed order
  Sampler<T> samplers[3];  // for any block, and for those at least one or two vectors high
  LinesFn<T> pack_lines, store_lines;
  AscendingFn ascending;
  FmaChainFn fma_chain;
  const char* matvec_name;
};

}  // namespace tetris::cpu
