// y^T = W x^T on Hopper's tensor cores.
//
//             stored columns, slab by slab (64)             pixels
//            +-------+-------+------                     +---------+
//       rows |   A   |   A   |            x     slab     |    B    |      A: values, B: x
//     (64 or | 64 k  |       |                           +---------+
//      128)  +-------+-------+------                     |         |
//
// A CTA computes tiles of M rows of one block row times 128 or 256 pixels, one after the other. One
// warpgroup, the producer, lets TMA fetch slabs into a ring of stages; two more, the consumers,
// multiply what has arrived. For M = 128 they split the rows, for M = 64 the pixels.
//
// The pixels of a tile are a box of the result, some wide, some high, of some images. Through a tap
// they see a box of the source, shifted, or one of every second pixel where the stride is two: that
// is a box of TMA as well, and padding is what lies outside the source.
//
// The stored blocks of a block row lie behind each other along K, cut into boxes of 64, 32 or 16
// columns (the widest that divides the block's width); 1, 2 or 4 boxes, whatever blocks they are
// of, fill a slab of 64. Only the last slab of a block row may have fewer.
//
// In shared memory (wgmma_layout in ptx_sm90.cuh says what a layout is):
//   B   a box is [pixels][16, 32 or 64 columns], K-major, swizzled over the row of 32, 64, 128
//       bytes. Boxes follow each other, so 16 further along K is either 32 bytes further on, or in
//       the next box.
//   A   values of a block [width][height]: a box is [M / 64][16, 32 or 64 k][64 rows], MN-major,
//       128 bytes a row. 16 further along K is 16 rows of memory further on, or in the next box.
//       values of a block [height][width] (transposed): like B, [M rows][16, 32 or 64 columns].
//
// Edges: TMA fills with zeros what lies outside x, and does not write what lies outside y. Rows of
// A beyond the matrix give results that nobody stores. Columns of A beyond the matrix would meet
// those zeros of x, but they may hold anything, NaN too: a second map of values ends where the last
// column group does.
//
// Roofline, for 16-bit types: the tensor cores of an SM want 4096 / M bytes of x each clock, and
// 4096 / pixels bytes of values, of what L2 delivers (25 to 40 bytes): for 128x256 that is 32 + 16.
// So the pipeline is bound by L2, and the time that an epilogue takes from the tensor cores is
// partly hidden: the producer runs ahead of it as far as the ring reaches.
#pragma once

#include <cstdint>

#include "cuda/epilogue.cuh"
#include "cuda/numeric.cuh"
#include "cuda/platform.h"
#include "cuda/problem.h"
#include "cuda/ptx_sm90.cuh"
#include "cuda/tensor_map.h"

namespace tetris::cuda::hopper {

constexpr int kGroup = 128;           // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;  // the producer's and two of consumers
constexpr int kSlab = 64;             // columns
constexpr int kStep = 16;             // columns that one wgmma multiplies
constexpr int kSteps = kSlab / kStep;
constexpr int kStoreRows = 64, kStorePixels = 32;  // of the box that a consumer group stores
constexpr int kStoreBytes = kStoreRows * kStorePixels * 2;
constexpr int kStoreBuffers = 4;  // of each group

// Registers. The kernel starts with 168 for each of 384 threads, 64512 of the SM's 65536. The
// producer's group gives 112 each back, the consumers take 56 more each: 56 + 2 * 224 = 3 * 168.
// With 40 for the producer it had to spill.
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

// Where wgmma finds an operand in a stage.
struct Operand {
  uint64_t layout;
  int group;         // bytes between what the two consumer groups read
  int step[kSteps];  // bytes from the slab's start to 16 columns of it
};

// Along one axis of an image: how many pixels, how many tiles of 2^bits, and where in the source a
// pixel sees kernel position k: at * stride + origin + k * step.
struct Axis {
  int size, tiles, bits;
  int stride, origin, step;
};

struct Arguments {
  SparseRows w;
  Operand a, b;
  Axis x, y;
  int images;
  int kernel_w;
  int col_groups;            // as in w, which would divide anew
  int row_tiles, row_parts;  // all, and those of a block row
  int pixel_tiles, strip_tiles;
  const void* bias;
  const void* residual;
  Strides residual_strides;
  int box;          // columns
  int edge_column;  // where the last column group begins if it is ragged, else -1
  int stages;
  Activation activation;
};

// What a CTA works on. Row tiles go longest first, pixel tiles of a strip innermost: CTAs that run
// at the same time share values and the strip of x.
struct Tile {
  int row, x, y, image;  // of the result, the first
  int part;              // row within the block
  int begin, end;        // stored blocks
};

template <int M, int kPixels>
class Tiles {
 public:
  explicit TETRIS_DEVICE Tiles(const Arguments& a) : a_(a) {}
  // The next of this CTA, false after the last. Rounds go back and forth, so that nobody gets the
  // longer one each time.
  TETRIS_DEVICE bool next(Tile* tile) {
    const int ctas = int(gridDim.x), cta = int(blockIdx.x);
    const int i = round_ * ctas + (round_ % 2 == 0 ? cta : ctas - 1 - cta);
    ++round_;
    if (i >= a_.row_tiles * a_.pixel_tiles) return false;
    const int strip = i / (a_.row_tiles * a_.strip_tiles);
    const int within = i - strip * a_.row_tiles * a_.strip_tiles;
    const int width = min(a_.strip_tiles, a_.pixel_tiles - strip * a_.strip_tiles);
    const int row_tile = within / width;
    const int at = row_tile / a_.row_parts;
    const int block_row = a_.w.order ? a_.w.order[at] : at;
    tile->part = (row_tile - at * a_.row_parts) * M;
    tile->row = block_row * a_.w.height + tile->part;
    const int pixels = strip * a_.strip_tiles + within - row_tile * width;
    const int line = pixels / a_.x.tiles, stack = line / a_.y.tiles;
    tile->x = (pixels - line * a_.x.tiles) << a_.x.bits;
    tile->y = (line - stack * a_.y.tiles) << a_.y.bits;
    tile->image = stack * (kPixels >> (a_.x.bits + a_.y.bits));
    tile->begin = a_.w.row_ptr[block_row];
    tile->end = a_.w.row_ptr[block_row + 1];
    return true;
  }

 private:
  const Arguments& a_;
  int round_ = 0;
};

// The ring of stages. `full[s]` completes when TMA has filled stage s for each warp of the
// producer, `empty[s]` when each warp of the consumers has read it. Both sides go round in step;
// the phase's parity flips with each round.
struct Ring {
  unsigned char* slabs;
  uint64_t *full, *empty;
  int stages;
  int stage = 0, parity = 0;

  TETRIS_DEVICE void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

TETRIS_DEVICE void wait(uint64_t* barrier, int parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {
  }
}

// A stored block as the producer sees it: its first column, how far its tap is from the first one,
// and where its values are.
struct Block {
  int column, dx, dy, stored;
};

// The stored blocks of a block row: each lane looks after one of 32, and fetches one of the next.
class Blocks {
 public:
  TETRIS_DEVICE Blocks(const Arguments& a, int begin, int end) : a_(a), base_(begin), end_(end) {
    fetch(begin);
    decode();
    fetch(begin + 32);
  }
  // Called by the whole warp, with ascending numbers that leave out no more than a few.
  TETRIS_DEVICE Block at(int number) {
    if (number - base_ >= 32) {
      base_ += 32;
      decode();
      fetch(base_ + 32);
    }
    const int lane = number - base_;
    return {__shfl_sync(0xffffffff, own_.column, lane), __shfl_sync(0xffffffff, own_.dx, lane),
            __shfl_sync(0xffffffff, own_.dy, lane), __shfl_sync(0xffffffff, own_.stored, lane)};
  }

 private:
  TETRIS_DEVICE void fetch(int base) {
    const int i = base + int(threadIdx.x % 32);
    index_ = i < end_ ? a_.w.col_idx[i] : 0;
    stored_ = i < end_ && a_.w.block ? a_.w.block[i] : i;
  }
  TETRIS_DEVICE void decode() {
    int tap = 0, group = index_;
    if (a_.w.taps > 1) {
      tap = index_ / a_.col_groups;
      group = index_ - tap * a_.col_groups;
    }
    const int ky = tap / a_.kernel_w, kx = tap - ky * a_.kernel_w;
    own_ = {group * a_.w.width, kx * a_.x.step, ky * a_.y.step, stored_};
  }

  const Arguments& a_;
  int base_, end_;
  Block own_;
  int index_, stored_;  // of the next 32
};

// One of four warps: two load x and two the values, each every second box. A slab of narrow boxes
// is eight loads, and a warp takes longer to issue them than the tensor cores to multiply them. All
// lanes keep count, the first one talks to TMA.
template <int M, int kPixels, bool transposed>
TETRIS_DEVICE void produce(const TensorMap* values, const TensorMap* values_edge,
                           const TensorMap* x, const Arguments& a, Ring ring, int warp) {
  const bool leader = threadIdx.x % 32 == 0, loads_x = warp % 2 == 0;
  const int turn = warp / 2;
  const int per_slab = kSlab / a.box, box_bytes = (loads_x ? kPixels : M) * a.box * 2;

  Tiles<M, kPixels> tiles(a);
  Tile tile, next;
  bool more = tiles.next(&tile);
  while (more) {
    more = tiles.next(&next);  // early: loads that depend on each other
    Blocks blocks(a, tile.begin, tile.end);
    const int boxes = (tile.end - tile.begin) * (a.w.width / a.box);
    const int source_x = tile.x * a.x.stride + a.x.origin;
    const int source_y = tile.y * a.y.stride + a.y.origin;
    int number = tile.begin, k = 0;  // the next box: its block, and its columns within
    for (int first = 0; first < boxes; first += per_slab) {
      const int count = min(per_slab, boxes - first);
      unsigned char* to = ring.slabs + ring.stage * (M + kPixels) * kSlab * 2;
      if (loads_x) to += M * kSlab * 2;
      uint64_t* const full = &ring.full[ring.stage];
      wait(&ring.empty[ring.stage], ring.parity ^ 1);  // a fresh barrier lets the first round pass
      // All lanes have seen this phase before anything can end the next, whose parity is the other.
      __syncwarp();
      if (leader) ptx::mbarrier_arrive_expect_tx(full, (count + 1 - turn) / 2 * box_bytes);
#pragma unroll 1
      for (int i = 0; i < count; ++i, to += box_bytes) {
        if (i % 2 == turn) {
          const Block block = blocks.at(number);
          if (leader && loads_x)
            ptx::tma_load_4d(to, x, block.column + k, source_x + block.dx, source_y + block.dy,
                             tile.image, full);
          if (leader && !loads_x)
            ptx::tma_load_4d(to, block.column == a.edge_column ? values_edge : values,
                             transposed ? k : 0, transposed ? tile.part : k,
                             transposed ? 0 : tile.part / 64, block.stored, full);
        }
        k += a.box;
        if (k == a.w.width) {
          k = 0;
          ++number;
        }
      }
      ring.advance();
    }
    tile = next;
  }
}

template <class T, int N, bool transposed>
TETRIS_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) {
  constexpr bool half = kDType<T> == DType::kFloat16;
  if constexpr (N == 64 && half) ptx::wgmma_m64n64k16_half<transposed>(d, a, b);
  if constexpr (N == 64 && !half) ptx::wgmma_m64n64k16_bfloat16<transposed>(d, a, b);
  if constexpr (N == 128 && half) ptx::wgmma_m64n128k16_half<transposed>(d, a, b);
  if constexpr (N == 128 && !half) ptx::wgmma_m64n128k16_bfloat16<transposed>(d, a, b);
  if constexpr (N == 256 && half) ptx::wgmma_m64n256k16_half<transposed>(d, a, b);
  if constexpr (N == 256 && !half) ptx::wgmma_m64n256k16_bfloat16<transposed>(d, a, b);
}

template <class T>
TETRIS_DEVICE uint32_t pack(float low, float high) {
  return kDType<T> == DType::kFloat16 ? ptx::pack_half(low, high) : ptx::pack_bfloat16(low, high);
}

// The results of a consumer group, 64 rows times N pixels, from registers to y.
//
// 32 pixels at a time, in a loop that is not unrolled: the activations' code is long, and with all
// of a thread's results it would be longer than the caches of instructions. Registers have no
// index, so a switch fetches the results of a round.
//
// What was stored from a buffer must have been read before the group writes to it again: the thread
// that stores waits for that a round before, so that one barrier serves for both.
template <class T, int N>
class Epilogue {
 public:
  TETRIS_DEVICE Epilogue(const Arguments& a, const TensorMap* y, unsigned char* buffers, int group)
      : a_(a), y_(y), buffers_(buffers), barrier_(1 + group) {}

  // Before the product, so that it is there behind it.
  TETRIS_DEVICE void load_bias(int row) {
    const int warp = int(threadIdx.x) % kGroup / 32, lane = int(threadIdx.x) % 32;
    row_ = row + 16 * warp + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      bias_[i] = a_.bias && row_ + 8 * i < a_.w.rows
                     ? Numeric<T>::load(static_cast<const T*>(a_.bias)[row_ + 8 * i])
                     : 0.0f;
  }

  // `first`: the group's first pixel of the tile.
  TETRIS_DEVICE void store(const float (&d)[N / 2], const Tile& tile, int row, int first) {
#pragma unroll 1
    for (int round = 0; round < N / kStorePixels; ++round) {
      const Pixel from = pixel(tile, first + round * kStorePixels);
      if (!inside(from)) continue;  // then the others are outside, too
      float v[16];
      fetch(d, round, v);
      finish(v, tile, first + round * kStorePixels);
      unsigned char* const buffer = buffers_ + which_ * kStoreBytes;
      which_ = (which_ + 1) % kStoreBuffers;
      write(v, buffer);
      ptx::fence_proxy_async();
      const bool leader = threadIdx.x % kGroup == 0;
      if (leader) ptx::bulk_wait_read<kStoreBuffers - 2>();
      ptx::named_barrier(barrier_, kGroup);
      if (leader) {
        ptx::tma_store_4d(y_, row, from.x, from.y, from.image, buffer);
        ptx::bulk_commit();
      }
    }
  }

  // Shared memory must outlive what reads it.
  TETRIS_DEVICE void drain() {
    if (threadIdx.x % kGroup == 0) ptx::bulk_wait_read<0>();
  }

 private:
  struct Pixel {
    int x, y, image;
  };
  TETRIS_DEVICE Pixel pixel(const Tile& tile, int number) const {
    const int line = number >> a_.x.bits, stack = line >> a_.y.bits;
    return {tile.x + number - (line << a_.x.bits), tile.y + line - (stack << a_.y.bits),
            tile.image + stack};
  }
  TETRIS_DEVICE bool inside(Pixel p) const {
    return p.x < a_.x.size && p.y < a_.y.size && p.image < a_.images;
  }

  // A jump, not a selection: that took 128 instructions a round.
  static TETRIS_DEVICE void fetch(const float (&d)[N / 2], int round, float (&v)[16]) {
    switch (round) {
      case 0:
        return copy<0>(d, v);
      case 1:
        return copy<1>(d, v);
      case 2:
        return copy<2>(d, v);
      case 3:
        return copy<3>(d, v);
      case 4:
        return copy<4>(d, v);
      case 5:
        return copy<5>(d, v);
      case 6:
        return copy<6>(d, v);
      default:
        return copy<7>(d, v);
    }
  }
  template <int round>
  static TETRIS_DEVICE void copy(const float (&d)[N / 2], float (&v)[16]) {
    if constexpr (round < N / kStorePixels) {
#pragma unroll
      for (int i = 0; i < 16; ++i) v[i] = d[16 * round + i];
    }
  }

  TETRIS_DEVICE void finish(float (&v)[16], const Tile& tile, int first) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] += bias_[i / 2 % 2];
    if (a_.residual) {
      const T* const residual = static_cast<const T*>(a_.residual);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const Pixel p = pixel(tile, first + i / 4 * 8 + int(threadIdx.x) % 4 * 2 + i % 2);
        const int r = row_ + i / 2 % 2 * 8;
        if (inside(p) && r < a_.w.rows)
          v[i] += Numeric<T>::load(residual[element_of(a_.residual_strides, p.image,
                                                       int64_t(p.y) * a_.x.size + p.x, r)]);
      }
    }
    switch (a_.activation) {  // one branch, then a loop; not one branch in a loop
      case Activation::kNone:
        break;
      case Activation::kRelu:
        activate_all<Activation::kRelu>(v);
        break;
      case Activation::kGelu:
        activate_all<Activation::kGelu>(v);
        break;
      case Activation::kGeluTanh:
        activate_all<Activation::kGeluTanh>(v);
        break;
      case Activation::kSilu:
        activate_all<Activation::kSilu>(v);
        break;
    }
  }
  template <Activation activation>
  static TETRIS_DEVICE void activate_all(float (&v)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = activate(v[i], activation);
  }

  // As [pixel][row], rows of 128 bytes swizzled as TMA does: 16-byte piece c of pixel p is at
  // c xor (p mod 8). Registers hold two pixels of a row, so that stored transposed they are two
  // rows of memory: matrix 2 j + i is pixels 8 j .., rows 16 warp + 8 i ...
  static TETRIS_DEVICE void write(const float (&v)[16], unsigned char* buffer) {
    const int warp = int(threadIdx.x) % kGroup / 32, lane = int(threadIdx.x) % 32;
    const int pixel = lane / 16 * 8 + lane % 8, piece = 2 * warp + lane / 8 % 2;
    unsigned char* const to = buffer + pixel * 128 + (piece ^ (lane % 8)) * 16;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = pack<T>(v[8 * j + 2 * i], v[8 * j + 2 * i + 1]);
      ptx::stmatrix_x4_trans(to + j * 16 * 128, r);
    }
  }

  const Arguments& a_;
  const TensorMap* y_;
  unsigned char* buffers_;
  int barrier_;
  int row_ = 0, which_ = 0;
  float bias_[2];
};

// A warpgroup, the first or the second of the two.
template <class T, int M, int N, bool transposed>
TETRIS_DEVICE void consume(const TensorMap* y, const Arguments& a, Ring ring,
                           unsigned char* buffers, int group) {
  constexpr int kPixels = M == 128 ? N : 2 * N;
  const bool leader = threadIdx.x % 32 == 0;
  const int own_row = M == 128 ? 64 * group : 0, own_pixel = M == 64 ? N * group : 0;
  const uint32_t slabs = ptx::shared_address(ring.slabs);
  const uint64_t slab_a = ptx::wgmma_descriptor(a.a.layout, slabs + group * a.a.group);
  const uint64_t slab_b =
      ptx::wgmma_descriptor(a.b.layout, slabs + M * kSlab * 2 + group * a.b.group);
  const auto multiply = [&](float (&d)[N / 2], int k) {
    const int stage = ring.stage * (M + kPixels) * kSlab * 2;
    wgmma<T, N, !transposed>(d, ptx::wgmma_advance(slab_a, stage + a.a.step[k]),
                             ptx::wgmma_advance(slab_b, stage + a.b.step[k]));
  };

  Epilogue<T, N> epilogue(a, y, buffers, group);
  Tiles<M, kPixels> tiles(a);
  Tile tile, next;
  bool more = tiles.next(&tile);
  while (more) {
    more = tiles.next(&next);
    epilogue.load_bias(tile.row + own_row);
    const int steps = (tile.end - tile.begin) * a.w.width / kStep;
    float d[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0.0f;

    int before = -1;  // the stage of the slab before
    for (int slab = 0; slab < steps / kSteps; ++slab) {
      wait(&ring.full[ring.stage], ring.parity);
      ptx::wgmma_fence(d);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) multiply(d, k);
      ptx::wgmma_commit();
      // The tensor cores have this slab to work on while the one before is handed back.
      ptx::wgmma_wait<1>(d);
      if (leader && before >= 0) ptx::mbarrier_arrive(&ring.empty[before]);
      before = ring.stage;
      ring.advance();
    }
    // A loop of its own for the last slab: with branches between them, each wgmma of the loop above
    // became a group of its own, and wgmma_wait<1> waited for all but the last.
    if (steps % kSteps != 0) {
      wait(&ring.full[ring.stage], ring.parity);
#pragma unroll 1
      for (int k = 0; k < steps % kSteps; ++k) {
        ptx::wgmma_fence(d);
        multiply(d, k);
        ptx::wgmma_commit();
      }
    }
    ptx::wgmma_wait<0>(d);
    if (leader && before >= 0) ptx::mbarrier_arrive(&ring.empty[before]);
    if (steps % kSteps != 0) {
      if (leader) ptx::mbarrier_arrive(&ring.empty[ring.stage]);
      ring.advance();
    }
    epilogue.store(d, tile, tile.row + own_row, own_pixel);
    tile = next;
  }
  epilogue.drain();
}

template <class T, int M, int N, bool transposed>
__global__ void __launch_bounds__(kThreads, 1)
    product(const __grid_constant__ TensorMap values, const __grid_constant__ TensorMap values_edge,
            const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap y,
            const __grid_constant__ Arguments a) {
  constexpr int kPixels = M == 128 ? N : 2 * N;
  unsigned char* const shared = dynamic_shared();
  unsigned char* const buffers = shared + a.stages * (M + kPixels) * kSlab * 2;
  Ring ring;
  ring.slabs = shared;
  ring.full = reinterpret_cast<uint64_t*>(buffers + 2 * kStoreBuffers * kStoreBytes);
  ring.empty = ring.full + a.stages;
  ring.stages = a.stages;

  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&values);
    ptx::prefetch_tensor_map(&values_edge);
    ptx::prefetch_tensor_map(&x);
    ptx::prefetch_tensor_map(&y);
    for (int s = 0; s < a.stages; ++s) {
      ptx::mbarrier_init(&ring.full[s], kGroup / 32);
      ptx::mbarrier_init(&ring.empty[s], 2 * kGroup / 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  // The same for all lanes, which the compiler does not know of threadIdx.
  const int warp = __shfl_sync(0xffffffff, int(threadIdx.x) / 32, 0);
  if (warp < kGroup / 32) {
    ptx::set_max_registers_down<kProducerRegisters>();
    produce<M, kPixels, transposed>(&values, &values_edge, &x, a, ring, warp);
  } else {
    ptx::set_max_registers_up<kConsumerRegisters>();
    const int group = warp / (kGroup / 32) - 1;
    consume<T, M, N, transposed>(&y, a, ring, buffers + group * kStoreBuffers * kStoreBytes, group);
  }
}

constexpr size_t shared_bytes(int rows, int pixels, int stages) {
  return size_t(stages) * ((rows + pixels) * kSlab * 2 + 2 * sizeof(uint64_t)) +
         2 * kStoreBuffers * kStoreBytes;
}

}  // namespace tetris::cuda::hopper
