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

  // The fragment of sixteen m (n) by one step of k, as four 8x8 matrices (of 32 bits: 8x4). `a` has
  // its matrices in order of m first, `b`, which is two fragments eight n wide, in order of k.
  template <bool kKFirst>
  static TETRIS_DEVICE void load(uint32_t (&r)[4], const unsigned char* tile, unsigned extent,
                                 unsigned step, unsigned lane) {
    if constexpr (kAlongK || sizeof(T) == 2) {
      const unsigned matrix = lane / 8;
      const unsigned outer = kKFirst ? matrix / 2 : matrix % 2;  // which eight of the extent
      const unsigned inner = kKFirst ? matrix % 2 : matrix / 2;  // which half of the step
      if constexpr (kAlongK) {
        ptx::ldmatrix_x4(r, tile + at(extent + outer * 8 + lane % 8, step * 2 + inner));
      } else {
        ptx::ldmatrix_x4_trans(
            r, tile + at(step * 16 + inner * 8 + lane % 8, extent / kChunk<T> + outer));
      }
    } else {
#pragma unroll
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned e = extent + (kKFirst ? i / 2 : i % 2) * 8 + lane / 4;
        const unsigned k = step * 8 + (kKFirst ? i % 2 : i / 2) * 4 + lane % 4;
        r[i] = reinterpret_cast<const uint32_t*>(tile + at(k, e / 4))[e % 4];
      }
    }
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
  // Registers for the fragments of the step after the one that is multiplied. Rounding to TF32
  // takes registers, too: with both, some were spilled.
  static constexpr int kBuffers = sizeof(T) == 2 ? 2 : 1;

  // Every accumulator of n starts at initial(n).
  template <class Initial>
  explicit TETRIS_DEVICE WarpTile(Initial&& initial)
      : lane_(threadIdx.x % 32),
        m_(threadIdx.x / 32 % S::kMWarps * S::kWarpM),
        n_(threadIdx.x / 32 / S::kMWarps * S::kWarpN) {
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
      A::template load<false>(a_[kStep % kBuffers][i], stage, m_ + i * 16, kStep, lane_);
    }
#pragma unroll
    for (int j = 0; j < S::kNFragments; j += 2) {
      uint32_t pair[4];
      B::template load<true>(pair, stage + A::kBytes, n_ + j * 8, kStep, lane_);
      b_[kStep % kBuffers][j][0] = pair[0], b_[kStep % kBuffers][j][1] = pair[1];
      b_[kStep % kBuffers][j + 1][0] = pair[2], b_[kStep % kBuffers][j + 1][1] = pair[3];
    }
  }

  template <int kStep>
  TETRIS_DEVICE void multiply() {
    if constexpr (sizeof(T) == 4) round(a_[0]), round(b_[0]);
#pragma unroll
    for (int i = 0; i < S::kMFragments; ++i) {
#pragma unroll
      for (int j = 0; j < S::kNFragments; ++j) {
        multiply_add(T{}, d_[i][j], a_[kStep % kBuffers][i], b_[kStep % kBuffers][j]);
      }
    }
  }

  // Hands the results on in runs along n: sink(m, n, values[kRun]). `scratch` is kScratchBytes of
  // shared memory that nobody else uses. Leaves the accumulators in disorder.
  static constexpr unsigned kScratchLine = S::kWarpN + 8;  // floats; + 8 keeps pairs off each other
  static constexpr int kScratchBytes = kThreads / 32 * 16 * int(kScratchLine) * 4;

  template <int kRun, class Sink>
  TETRIS_DEVICE void drain(unsigned char* scratch, Sink&& sink) {
    constexpr unsigned kRuns = S::kWarpN / kRun;  // a line's, a lane each
    static_assert(kRuns <= 32 && 32 % kRuns == 0, "a warp takes whole lines");
    float* lines = reinterpret_cast<float*>(scratch) + threadIdx.x / 32 * 16 * kScratchLine;
    const unsigned n = lane_ % kRuns * kRun;
    // Fragments move up one by one: the sink, which is long, is there once, not kMFragments times.
#pragma unroll 1
    for (unsigned i = 0; i < S::kMFragments; ++i) {
#pragma unroll
      for (int j = 0; j < S::kNFragments; ++j) {
        float* at = lines + lane_ / 4 * kScratchLine + j * 8 + lane_ % 4 * 2;
        *reinterpret_cast<float2*>(at) = {d_[0][j][0], d_[0][j][1]};
        *reinterpret_cast<float2*>(at + 8 * kScratchLine) = {d_[0][j][2], d_[0][j][3]};
#pragma unroll
        for (int up = 1; up < S::kMFragments; ++up) {
#pragma unroll
          for (int v = 0; v < 4; ++v) d_[up - 1][j][v] = d_[up][j][v];
        }
      }
      __syncwarp();
#pragma unroll 1
      for (unsigned line = lane_ / kRuns; line < 16; line += 32 / kRuns) {
        using Piece = std::conditional_t<kRun % 4 == 0, float4, float2>;
        constexpr int kPiece = sizeof(Piece) / 4;
        float run[kRun];
#pragma unroll
        for (int v = 0; v < kRun; v += kPiece) {
          const float* from = lines + line * kScratchLine + n + v;
          const Piece piece = *reinterpret_cast<const Piece*>(from);
          run[v] = piece.x, run[v + 1] = piece.y;
          if constexpr (kPiece == 4) run[v + 2] = piece.z, run[v + 3] = piece.w;
        }
        sink(int(m_ + i * 16 + line), int(n_ + n), run);
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
  uint32_t a_[kBuffers][S::kMFragments][4], b_[kBuffers][S::kNFragments][2];
  unsigned lane_, m_, n_;
};

// Multiplies `slabs` slabs, which issue(slab, stage) starts to copy, through a ring of stages.
//
//   slab s     load step 1 | copy slab s + stages - 1 | multiply step 0 | barrier
//   slab s+1   load step 0 | multiply step 1 of s     | load step 1     | ...
//
// One barrier a slab: it tells that s + 1 has landed for all, and that nobody reads s any more, so
// that the next copies may go where it was. The fragments after it arrive under the multiplications
// before. What issue() writes to shared memory itself is seen by the issue() of the next slab but
// for the first stages - 1.
template <class Warp, class Issue>
TETRIS_DEVICE void multiply_slabs(Warp& warp, unsigned char* ring, int stages, int slabs,
                                  Issue&& issue) {
  const auto wait = [stages] {
    if (stages == 4) {
      ptx::cp_async_wait<2>();
    } else {
      ptx::cp_async_wait<1>();
    }
  };
  for (int slab = 0; slab < stages - 1; ++slab) {
    if (slab < slabs) issue(slab, ring + slab * Warp::kStageBytes);
    ptx::cp_async_commit();
  }
  wait();
  __syncthreads();

  unsigned char* const end = ring + stages * Warp::kStageBytes;
  unsigned char* read = ring;
  unsigned char* write = end - Warp::kStageBytes;
  warp.template load<0>(read);
#pragma unroll 1
  for (int slab = 0; slab < slabs; ++slab) {
    if (Warp::kBuffers == 2) warp.template load<1>(read);
    if (slab + stages - 1 < slabs) issue(slab + stages - 1, write);
    ptx::cp_async_commit();
    warp.template multiply<0>();
    if (Warp::kBuffers == 1) warp.template load<1>(read);
    wait();
    __syncthreads();
    write = read;
    read += Warp::kStageBytes;
    if (read == end) read = ring;
    // After the last slab not used.
    if (Warp::kBuffers == 2) warp.template load<0>(read);
    warp.template multiply<1>();
    if (Warp::kBuffers == 1) warp.template load<0>(read);
  }
  // What is left in flight is empty; the ring is free for other uses.
  ptx::cp_async_wait<0>();
  __syncthreads();
}

}  // namespace tetris::cuda::mma
