// A warp's part of a product on tensor cores: fragments from shared memory, mma.sync, accumulators.
//
//   d[m, n] += sum over k of a[m, k] b[k, n]     m16n8k16 (half, bfloat16), m16n8k8 (TF32)
//
// n are rows of the sparse operand, m pixels of the result (in the sampled product: columns of
// stored blocks), k whatever is summed over, a slab at a time. Pixels are m and not n because an
// accumulator then holds two neighbouring rows of one pixel, and results lie channels last: the
// epilogue moves whole pairs, and rows come in eights instead of sixteens.
//
// An operand's tile in shared memory is a slab: 64 bytes of k (32 elements of 16 bits, 16 of 32)
// for each of its m or n, in lines of 16-byte chunks, whichever way it lies in memory:
//
//   along k    one line for each m (n), four chunks of k          x; values of a transposed layout
//   across k   one line for each k, chunks of m (n)               values; both operands of dvalues
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/numeric.cuh"
#include "cuda/platform.h"
#include "cuda/ptx.cuh"

namespace tetris::cuda::mma {

constexpr int kThreads = 128;
constexpr int kChunkBytes = 16;
constexpr int kSlabChunks = 4;  // two steps of mma.sync, two chunks deep each

template <class T>
constexpr int kChunk = kChunkBytes / int(sizeof(T));  // elements

TETRIS_DEVICE void multiply_add(Half, float (&d)[4], const uint32_t (&a)[4],
                                const uint32_t (&b)[2]) {
  ptx::mma_m16n8k16_half(d, a, b);
}
TETRIS_DEVICE void multiply_add(BFloat16, float (&d)[4], const uint32_t (&a)[4],
                                const uint32_t (&b)[2]) {
  ptx::mma_m16n8k16_bfloat16(d, a, b);
}
TETRIS_DEVICE void multiply_add(float, float (&d)[4], const uint32_t (&a)[4],
                                const uint32_t (&b)[2]) {
  ptx::mma_m16n8k8_tf32(d, a, b);
}

enum class Lines { kAlongK, kAcrossK };

// Where chunks of an operand lie, and how a warp takes fragments from them.
//
// Shared memory serves eight chunks at a time, one for each group of four banks, and chunk c of
// line l of C chunks would lie in group (l C + c) % 8. ldmatrix takes the same chunk of eight
// consecutive lines: with C >= 8 all of them would be in one group, with C = 4 in two. So the chunk
// is moved by xor: by l with C >= 8, by l / 2 with C = 4 (two lines fill the groups), l / 4 with
// C = 2; each makes the eight differ. TF32 across k has no ldmatrix: a lane reads single elements,
// the warp two neighbouring chunks of four consecutive lines, and the moves are twice as far.
// Copies into the tile write whole lines, a permutation of their chunks: without conflict, too.
template <class T, Lines kLines, int kExtent>
struct OperandTile {
  static constexpr bool kAlongK = kLines == Lines::kAlongK;
  static constexpr int kSlab = kSlabChunks * kChunk<T>;
  static constexpr int kLineCount = kAlongK ? kExtent : kSlab;
  static constexpr int kLineChunks = kAlongK ? kSlabChunks : kExtent / kChunk<T>;
  static constexpr int kBytes = kLineCount * kLineChunks * kChunkBytes;
  static_assert(kLineChunks == 2 || kLineChunks == 4 || kLineChunks % 8 == 0,
                "the moves are made for these lines");

  static TETRIS_DEVICE unsigned at(unsigned line, unsigned chunk) {
    constexpr unsigned kGroups = kLineChunks < 8 ? kLineChunks : 8;
    constexpr unsigned kFar = !kAlongK && sizeof(T) == 4 ? 2 : 1;
    const unsigned move = line / (8 / kGroups) * kFar % kGroups;
    return (line * kLineChunks + (chunk ^ move)) * kChunkBytes;
  }

  // The same for line + i, from at(line, chunk): moves repeat every eight lines.
  static TETRIS_DEVICE unsigned at(unsigned first, unsigned line, unsigned i, unsigned chunk) {
    return i % 8 == 0 ? first + i * kLineChunks * kChunkBytes : at(line + i, chunk);
  }

  // Fragments are of sixteen m (n) by one step of k, in four 8x8 matrices (of 32 bits: 8x4). `a`
  // has its matrices in order of m first, `b`, which is two fragments eight n wide, in order of k.
  //
  // Where a lane finds its part of the fragments of a warp whose m (n) start at `extent`. From
  // there load() goes by constants, xor along a line and plus across lines.
  template <bool kKFirst>
  static TETRIS_DEVICE unsigned start(unsigned extent, unsigned lane) {
    if constexpr (kAlongK || sizeof(T) == 2) {
      const unsigned matrix = lane / 8;
      const unsigned outer = kKFirst ? matrix / 2 : matrix % 2;  // which eight of the extent
      const unsigned inner = kKFirst ? matrix % 2 : matrix / 2;  // which half of the step
      if constexpr (kAlongK) return at(extent + outer * 8 + lane % 8, inner);
      return at(inner * 8 + lane % 8, extent / kChunk<T> + outer);
    } else {
      return at(lane % 4, (extent + lane / 4) / 4) + lane / 4 % 4 * 4;
    }
  }

  template <bool kKFirst>
  static TETRIS_DEVICE void load(uint32_t (&r)[4], const unsigned char* tile, unsigned start,
                                 unsigned extent, unsigned step) {
    if constexpr (kAlongK) {
      constexpr unsigned kLine = kLineChunks * kChunkBytes;
      ptx::ldmatrix_x4(r, tile + (start ^ step * 2 * kChunkBytes) + extent * kLine);
    } else if constexpr (sizeof(T) == 2) {
      ptx::ldmatrix_x4_trans(r, tile + across(start, extent, step * 16));
    } else {
#pragma unroll
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned outer = kKFirst ? i / 2 : i % 2, inner = kKFirst ? i % 2 : i / 2;
        r[i] = *reinterpret_cast<const uint32_t*>(
            tile + across(start, extent + outer * 8, step * 8 + inner * 4));
      }
    }
  }

 private:
  static TETRIS_DEVICE unsigned across(unsigned start, unsigned extent, unsigned lines) {
    const unsigned chunk = extent / kChunk<T>;
    return (start ^ chunk % 8 * kChunkBytes) + (chunk / 8 * 8 + lines * kLineChunks) * kChunkBytes;
  }
};

// The tile of a block of four warps, by warps and by fragments of a warp (16 m, 8 n).
template <int kMWarps_, int kNWarps_, int kMFragments_, int kNFragments_>
struct Shape {
  static constexpr int kMWarps = kMWarps_, kNWarps = kNWarps_;
  static constexpr int kMFragments = kMFragments_, kNFragments = kNFragments_;
  static constexpr int kWarpM = kMFragments * 16, kWarpN = kNFragments * 8;
  static constexpr int kM = kMWarps * kWarpM, kN = kNWarps * kWarpN;
  static_assert(kMWarps * kNWarps * 32 == kThreads, "a warp for each part of the tile");
  static_assert(kNFragments % 2 == 0, "fragments of b come in pairs");
};

template <class T, Lines kALines, Lines kBLines, class S>
class WarpTile {
 public:
  using A = OperandTile<T, kALines, S::kM>;
  using B = OperandTile<T, kBLines, S::kN>;
  static constexpr int kStageBytes = A::kBytes + B::kBytes;  // a, then b

  // Every accumulator of n starts at initial(n).
  template <class Initial>
  explicit TETRIS_DEVICE WarpTile(Initial&& initial)
      : lane_(threadIdx.x % 32),
        m_(threadIdx.x / 32 % S::kMWarps * S::kWarpM),
        n_(threadIdx.x / 32 / S::kMWarps * S::kWarpN),
        a_start_(A::template start<false>(m_, lane_)),
        b_start_(B::template start<true>(n_, lane_)) {
#pragma unroll
    for (int j = 0; j < S::kNFragments; ++j) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const float value = initial(int(n_ + j * 8 + lane_ % 4 * 2 + v));
#pragma unroll
        for (int i = 0; i < S::kMFragments; ++i) d_[i][j][v] = d_[i][j][v + 2] = value;
      }
    }
  }

  // Takes the fragments of one of a slab's two steps into the registers set aside for it.
  template <int kStep>
  TETRIS_DEVICE void load(const unsigned char* stage) {
#pragma unroll
    for (int i = 0; i < S::kMFragments; ++i) {
      A::template load<false>(a_[kStep][i], stage, a_start_, i * 16, kStep);
    }
#pragma unroll
    for (int j = 0; j < S::kNFragments; j += 2) {
      uint32_t pair[4];
      B::template load<true>(pair, stage + A::kBytes, b_start_, j * 8, kStep);
      b_[kStep][j][0] = pair[0], b_[kStep][j][1] = pair[1];
      b_[kStep][j + 1][0] = pair[2], b_[kStep][j + 1][1] = pair[3];
    }
  }

  template <int kStep>
  TETRIS_DEVICE void multiply() {
    if constexpr (sizeof(T) == 4) round(a_[kStep]), round(b_[kStep]);
#pragma unroll
    for (int i = 0; i < S::kMFragments; ++i) {
#pragma unroll
      for (int j = 0; j < S::kNFragments; ++j) {
        multiply_add(T{}, d_[i][j], a_[kStep][i], b_[kStep][j]);
      }
    }
  }

  // Hands the results on in runs, sink(m, n, values[kRun]): neighbours along n, or along m.
  // `scratch` is kScratchBytes of shared memory that nobody else uses. Leaves the accumulators in
  // disorder.
  //
  // Sixteen m at a time pass through it, in lines along the runs. Lines are 8 floats longer than
  // the fragments (4 where a pair of n is written to two lines), so that a warp's writes spread
  // evenly.
  static constexpr int kScratchBytes =
      kThreads / 32 * 4 * (S::kWarpN < 32 ? 16 * (S::kWarpN + 8) : 20 * S::kWarpN);

  template <int kRun, bool kAlongM = false, class Sink>
  TETRIS_DEVICE void drain(unsigned char* scratch, Sink&& sink) {
    constexpr unsigned kLines = kAlongM ? S::kWarpN : 16;
    constexpr unsigned kLine = kAlongM ? 16 + 4 : S::kWarpN + 8;
    constexpr unsigned kRuns = (kAlongM ? 16 : S::kWarpN) / kRun;  // a line's, a lane each
    static_assert(kRuns <= 32 && 32 % kRuns == 0, "a warp takes whole lines");
    static_assert(kThreads / 32 * 4 * kLines * kLine <= kScratchBytes, "scratch is large enough");
    float* lines = reinterpret_cast<float*>(scratch) + threadIdx.x / 32 * (kLines * kLine);
    const unsigned in_line = lane_ % kRuns * kRun;
    // Fragments move up one by one: the sink, which is long, is there once, not kMFragments times.
#pragma unroll 1
    for (unsigned i = 0; i < S::kMFragments; ++i) {
#pragma unroll
      for (int j = 0; j < S::kNFragments; ++j) {
        const unsigned m = lane_ / 4, n = j * 8 + lane_ % 4 * 2;
        if constexpr (kAlongM) {
          lines[n * kLine + m] = d_[0][j][0];
          lines[(n + 1) * kLine + m] = d_[0][j][1];
          lines[n * kLine + m + 8] = d_[0][j][2];
          lines[(n + 1) * kLine + m + 8] = d_[0][j][3];
        } else {
          *reinterpret_cast<float2*>(lines + m * kLine + n) = {d_[0][j][0], d_[0][j][1]};
          *reinterpret_cast<float2*>(lines + (m + 8) * kLine + n) = {d_[0][j][2], d_[0][j][3]};
        }
#pragma unroll
        for (int up = 1; up < S::kMFragments; ++up) {
#pragma unroll
          for (int v = 0; v < 4; ++v) d_[up - 1][j][v] = d_[up][j][v];
        }
      }
      __syncwarp();
#pragma unroll 1
      for (unsigned line = lane_ / kRuns; line < kLines; line += 32 / kRuns) {
        using Piece = std::conditional_t<kRun % 4 == 0, float4, float2>;
        constexpr int kPiece = sizeof(Piece) / 4;
        float* const place = lines + line * kLine + in_line;
        float run[kRun];
#pragma unroll
        for (int v = 0; v < kRun; v += kPiece) {
          const Piece piece = *reinterpret_cast<const Piece*>(place + v);
          run[v] = piece.x, run[v + 1] = piece.y;
          if constexpr (kPiece == 4) run[v + 2] = piece.z, run[v + 3] = piece.w;
        }
        sink(int(m_ + i * 16 + (kAlongM ? in_line : line)), int(n_ + (kAlongM ? line : in_line)),
             run, place);
      }
      __syncwarp();
    }
  }

 private:
  // mma.sync would cut off what TF32 has no bits for.
  template <int kFragments, int kRegisters>
  static TETRIS_DEVICE void round(uint32_t (&r)[kFragments][kRegisters]) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int v = 0; v < kRegisters; ++v) r[i][v] = ptx::to_tf32(ptx::bits_to_float(r[i][v]));
    }
  }

  float d_[S::kMFragments][S::kNFragments][4];
  uint32_t a_[2][S::kMFragments][4], b_[2][S::kNFragments][2];
  const unsigned lane_, m_, n_, a_start_, b_start_;
};

// Multiplies `slabs` slabs, which issue(slab, stage) starts to copy, through a ring of stages.
//
//   slab s     load step 1 | copy slab s + stages - 1 | multiply step 0 | barrier
//              load step 0 of s + 1                   | multiply step 1
//
// One barrier a slab: it tells that s + 1 has landed for all, and that nobody reads s any more, so
// that the next copies may go where it was. The fragments after it arrive under the multiplications
// before. The first stages - 1 turns only copy: the loop has them, too, for issue() is long.
//
// What issue() writes to shared memory itself is seen by the issue() of the next slab, but for the
// first stages - 1.
template <class Warp, class Issue>
TETRIS_DEVICE void multiply_slabs(Warp& warp, unsigned char* ring, int stages, int slabs,
                                  Issue&& issue) {
  const auto barrier = [stages] {
    if (stages == 4) {
      ptx::cp_async_wait<2>();
    } else {
      ptx::cp_async_wait<1>();
    }
    __syncthreads();
  };
  unsigned char* const end = ring + stages * Warp::kStageBytes;
  unsigned char* write = ring;
  unsigned char* read = end - Warp::kStageBytes;  // before slab 0 what is read is of no use
#pragma unroll 1
  for (int slab = 1 - stages; slab < slabs; ++slab) {
    warp.template load<1>(read);
    if (slab + stages - 1 < slabs) issue(slab + stages - 1, write);
    ptx::cp_async_commit();
    if (slab < 0) {
      write += Warp::kStageBytes;
      if (slab == -1) {
        barrier();
        read = ring;
        warp.template load<0>(read);
      }
      continue;
    }
    warp.template multiply<0>();
    barrier();
    write = read;
    read += Warp::kStageBytes;
    if (read == end) read = ring;
    warp.template load<0>(read);  // nor is it after the last slab
    warp.template multiply<1>();
  }
  // What is left in flight is empty; the ring is free for other uses.
  ptx::cp_async_wait<0>();
  __syncthreads();
}

}  // namespace tetris::cuda::mma
