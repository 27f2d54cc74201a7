// Kernels of permute.h. Memory is read and written in runs of 16 bytes; what is not in order
// happens in shared memory.
//
// Elements of 2 bytes are worked on in pairs of rows, as words of 4 bytes: a random access to
// shared memory takes as long for 2 bytes as for 4 (some 3.5 wavefronts of 32 lanes in 32 banks),
// and at 2 it would take longer than the memory behind it (18 bytes a clock and SM; an H200 copies
// 16 each way).
#pragma once

#include "cuda/permute.h"
#include "cuda/platform.h"

namespace tetris::cuda {

// Elements of kBytes: what a word of shared memory holds of them, and a run of 16 bytes.
template <int kBytes>
struct Element;
template <>
struct Element<2> {
  using Type = uint16_t;
  using Word = uint32_t;
};
template <>
struct Element<4> {
  using Type = uint32_t;
  using Word = uint32_t;
};
template <>
struct Element<8> {
  using Type = uint2;
  using Word = uint2;
};

// A run of 16 bytes, as words of shared memory sees it: of 2-byte elements, two a word.
template <class Word>
TETRIS_DEVICE void split_run(const uint4& run, Word (&words)[16 / sizeof(Word)]) {
  if constexpr (sizeof(Word) == 4)
    words[0] = run.x, words[1] = run.y, words[2] = run.z, words[3] = run.w;
  else
    words[0] = make_uint2(run.x, run.y), words[1] = make_uint2(run.z, run.w);
}
template <class Word>
TETRIS_DEVICE uint4 join_run(const Word (&words)[16 / sizeof(Word)]) {
  if constexpr (sizeof(Word) == 4)
    return make_uint4(words[0], words[1], words[2], words[3]);
  else
    return make_uint4(words[0].x, words[0].y, words[1].x, words[1].y);
}

// kRun neighbouring elements of one row (of 2 bytes: of two), as one word for each column.
template <int kBytes, int kRun>
struct RowRun {
  using Type = typename Element<kBytes>::Type;
  using Word = typename Element<kBytes>::Word;
  static constexpr int kRows = sizeof(Word) / kBytes;
  static_assert(kRun == 1 || kRun * kBytes == 16);

  // at: the first element; stride: to the second row; rows: how many of the two there are.
  static TETRIS_DEVICE void load(const Type* at, int64_t stride, int rows, Word (&words)[kRun]) {
    if constexpr (kRun == 1 && kRows == 2) {
      const uint32_t second = rows > 1 ? __ldg(at + stride) : 0;
      words[0] = __ldg(at) | second << 16;
    } else if constexpr (kRun == 1) {
      words[0] = __ldg(at);
    } else if constexpr (kRows == 2) {
      uint32_t a[4], b[4] = {};
      split_run(__ldg(reinterpret_cast<const uint4*>(at)), a);
      if (rows > 1) split_run(__ldg(reinterpret_cast<const uint4*>(at + stride)), b);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[2 * i] = (a[i] & 0xffff) | b[i] << 16;
        words[2 * i + 1] = a[i] >> 16 | (b[i] & 0xffff0000);
      }
    } else {
      split_run(__ldg(reinterpret_cast<const uint4*>(at)), words);
    }
  }
  static TETRIS_DEVICE void store(Type* at, int64_t stride, int rows, const Word (&words)[kRun]) {
    if constexpr (kRun == 1 && kRows == 2) {
      at[0] = static_cast<uint16_t>(words[0] & 0xffff);
      if (rows > 1) at[stride] = static_cast<uint16_t>(words[0] >> 16);
    } else if constexpr (kRun == 1) {
      at[0] = words[0];
    } else if constexpr (kRows == 2) {
      uint32_t a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = (words[2 * i] & 0xffff) | words[2 * i + 1] << 16;
        b[i] = words[2 * i] >> 16 | (words[2 * i + 1] & 0xffff0000);
      }
      *reinterpret_cast<uint4*>(at) = join_run(a);
      if (rows > 1) *reinterpret_cast<uint4*>(at + stride) = join_run(b);
    } else {
      *reinterpret_cast<uint4*>(at) = join_run(words);
    }
  }
};

// A run of words in shared memory: columns [first, first + kRun), or where `order` says.
template <class Word, int kRun>
TETRIS_DEVICE void load_words(const Word* row, int first, Word (&words)[kRun]) {
  if constexpr (kRun > 1 && sizeof(Word) == 4) {
#pragma unroll
    for (int i = 0; i < kRun; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(row + first + i);
      words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) words[i] = row[first + i];
  }
}
template <class Word, int kRun>
TETRIS_DEVICE void store_words(Word* row, int first, const Word (&words)[kRun]) {
  if constexpr (kRun > 1 && sizeof(Word) == 4) {
#pragma unroll
    for (int i = 0; i < kRun; i += 4)
      *reinterpret_cast<uint4*>(row + first + i) =
          make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) row[first + i] = words[i];
  }
}

struct ColumnPlan {
  int at_once;  // words high: rows (of 2-byte elements: pairs of rows) in shared memory
  int pitch;    // of them
};

// One CTA: some rows at a time, copied to shared memory in order and from there out of order, or
// the other way round. A thread's indices serve all of these rows.
template <int kBytes, int kRun>
__global__ void __launch_bounds__(256, 4)
    permute_columns_kernel(const ColumnPermutation p, const ColumnPlan plan) {
  using R = RowRun<kBytes, kRun>;
  using Type = typename R::Type;
  using Word = typename R::Word;
  Word* const tile = reinterpret_cast<Word*>(dynamic_shared());
  const Type* const x = static_cast<const Type*>(p.x);
  Type* const y = static_cast<Type*>(p.y);
  const int columns = static_cast<int>(p.columns), rows_at_once = plan.at_once * R::kRows;

  for (int64_t first = int64_t(blockIdx.x) * rows_at_once; first < p.rows;
       first += int64_t(gridDim.x) * rows_at_once) {
    const int rows =
        static_cast<int>(p.rows - first < rows_at_once ? p.rows - first : rows_at_once);
    const int words_high = (rows + R::kRows - 1) / R::kRows;
    for (int column = threadIdx.x * kRun; column < columns; column += 256 * kRun) {
      int to[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) to[i] = p.scatter ? __ldg(p.perm + column + i) : column + i;
#pragma unroll(kRun > 1 ? 2 : 4)
      for (int w = 0; w < words_high; ++w) {
        Word words[kRun];
        R::load(x + (first + w * R::kRows) * p.x_stride + column, p.x_stride, rows - w * R::kRows,
                words);
        if (p.scatter) {
#pragma unroll
          for (int i = 0; i < kRun; ++i) tile[w * plan.pitch + to[i]] = words[i];
        } else {
          store_words(tile + w * plan.pitch, column, words);
        }
      }
    }
    __syncthreads();
    for (int column = threadIdx.x * kRun; column < columns; column += 256 * kRun) {
      int from[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) from[i] = p.scatter ? column + i : __ldg(p.perm + column + i);
#pragma unroll(kRun > 1 ? 2 : 4)
      for (int w = 0; w < words_high; ++w) {
        Word words[kRun];
        if (p.scatter) {
          load_words(tile + w * plan.pitch, column, words);
        } else {
#pragma unroll
          for (int i = 0; i < kRun; ++i) words[i] = tile[w * plan.pitch + from[i]];
        }
        R::store(y + (first + w * R::kRows) * p.y_stride + column, p.y_stride, rows - w * R::kRows,
                 words);
      }
    }
    __syncthreads();
  }
}

struct TransposePlan {
  unsigned row_tiles, column_tiles;
  bool x_runs, y_runs;  // rows of x (of y) can be read (written) in runs
};

// One CTA: a square of x of 8 runs by 8 runs. Words hold one column of x each, so that those of a
// row of y are neighbours; the odd pitch puts what a warp stores at once into different banks (two
// lanes a bank for 2-byte elements).
template <int kBytes>
struct Square {
  static constexpr int kRun = 16 / kBytes, kSide = 8 * kRun;
  static constexpr int kRows = RowRun<kBytes, 1>::kRows;  // of x, a word
  static constexpr int kWords = kSide / kRows, kPitch = kWords + 1;
  static constexpr int kThreads = 8 * kWords;
  using Word = typename Element<kBytes>::Word;
  static constexpr size_t kSharedBytes = sizeof(Word) * kSide * kPitch;
};

template <int kBytes>
__global__ void __launch_bounds__(256)
    permute_transpose_kernel(const TransposedPermutation p, const TransposePlan plan) {
  using S = Square<kBytes>;
  using Type = typename Element<kBytes>::Type;
  using Word = typename S::Word;
  constexpr int kRun = S::kRun;
  Word* const tile = reinterpret_cast<Word*>(dynamic_shared());
  const unsigned row_tile = blockIdx.x % plan.row_tiles, rest = blockIdx.x / plan.row_tiles;
  const int64_t first_row = int64_t(row_tile) * S::kSide;
  const int64_t first_column = int64_t(rest % plan.column_tiles) * S::kSide;
  const int64_t matrix = rest / plan.column_tiles;
  const Type* const x = static_cast<const Type*>(p.x) + matrix * p.x_matrix;
  Type* const y = static_cast<Type*>(p.y) + matrix * p.y_matrix;
  const int lane = threadIdx.x % 8, line = threadIdx.x / 8;  // 8 lanes along a row

  {
    Word words[kRun] = {};
#pragma unroll
    for (int half = 0; half < S::kRows; ++half) {
      const int64_t i = first_row + line * S::kRows + half;
      if (i >= p.rows) continue;
      const Type* const row = x + (p.x_rows ? __ldg(p.x_rows + i) : i) * p.x_stride + first_column;
      const int64_t columns = p.columns - first_column;
      Type v[kRun] = {};
      if (plan.x_runs) {
        if (lane * kRun < columns) {
          const uint4 run = __ldg(reinterpret_cast<const uint4*>(row) + lane);
          if constexpr (kBytes == 2) {
            uint32_t two[4];
            split_run(run, two);
#pragma unroll
            for (int j = 0; j < kRun; ++j)
              v[j] = static_cast<uint16_t>(j % 2 == 0 ? two[j / 2] & 0xffff : two[j / 2] >> 16);
          } else {
            split_run(run, v);
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < kRun; ++j)
          if (lane + 8 * j < columns) v[j] = __ldg(row + lane + 8 * j);
      }
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if constexpr (kBytes == 2)
          words[j] |= uint32_t(v[j]) << (16 * half);
        else
          words[j] = v[j];
      }
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j)
      tile[(plan.x_runs ? lane * kRun + j : lane + 8 * j) * S::kPitch + line] = words[j];
  }
  __syncthreads();
#pragma unroll
  for (int part = 0; part < S::kRows; ++part) {
    const int line_of = line + part * (S::kThreads / 8);  // a column of x, a row of y
    const int64_t j = first_column + line_of;
    if (j >= p.columns) continue;
    Type* const row = y + (p.y_rows ? __ldg(p.y_rows + j) : j) * p.y_stride + first_row;
    const int64_t rows = p.rows - first_row;
    const Word* const words = tile + line_of * S::kPitch;
    if (plan.y_runs) {
      constexpr int kWordsOfRun = kRun / S::kRows;
      if (lane * kRun >= rows) continue;
      Word run[kWordsOfRun];
#pragma unroll
      for (int i = 0; i < kWordsOfRun; ++i) run[i] = words[lane * kWordsOfRun + i];
      reinterpret_cast<uint4*>(row)[lane] = join_run(run);
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const int r = lane + 8 * i;
        if (r >= rows) continue;
        if constexpr (kBytes == 2)
          row[r] = static_cast<uint16_t>(words[r / 2] >> (16 * (r % 2)));
        else
          row[r] = words[r];
      }
    }
  }
}

}  // namespace tetris::cuda
