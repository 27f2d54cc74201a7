// The product for a few pixels (decoding): as fast as the values come from memory.
//
//   values of a block row, front to back         x of all inputs, in shared memory
//   [ k0 r0..  k1 r0..  k2 r0..  ...       ]     [plane][input][pixel]   4 pixels (1) a plane
//     lane 0   lane 1   lane 2
//
// Each number of values is read once, 16 bytes a lane and lanes side by side, and is used for up to
// 16 pixels: nothing but that read should take time. A vector holds HV rows of ITEMS inputs: where
// blocks are at least a vector high, lanes of the same input share its x (a broadcast); where they
// are 1, 2 or 4 rows high, a vector spans several inputs. Other heights go element by element.
//
// Lanes that hold the same rows are summed by shuffles, the warps that share a block row through
// shared memory, both in a fixed order. With PX = 4, up to four groups of lanes take four pixels
// each and load the same vectors, so that the sums of a lane are never more than 32.
//
// Bound: memory up to 8 pixels of 16-bit types (a vector costs 8 conversions, 4 of x and 32
// multiply-adds for 4 pixels: 11 bytes a clock and SM at 16 pixels, 21 at 8, where memory gives
// 21). Narrow 1-row blocks read their column index, too, and x from random banks.
#pragma once

#include "cuda/simt_tile.cuh"
#include "cuda/vector.cuh"

namespace tetris::cuda {

struct SkinnyPlan {
  Extents extents;
  int planes;                  // groups of lanes along pixels: 1, 2 or 4
  int slots;                   // numbers of x of a pixel: taps * slots_of_tap; then one zero
  int slots_of_tap;            // col_groups * width: the columns that a ragged group lacks are zero
  int lanes_of_input;          // that hold the rows of one input
  int parts;                   // of a block row's height
  int split;                   // warps that share a part
  int block_step, input_step;  // from one step of a warp to its next: blocks, and inputs beyond
  int pixel_chunks;
  int inputs_of_last;  // of the last column group: the width, or fewer where it is ragged
  bool index_runs;     // blocks are one input wide and col_idx is aligned
};

template <class T, int HV, int ITEMS, int PX>
struct Skinny {
  using A = typename Numeric<T>::Accumulator;
  static constexpr int kWarps = 8, kVector = HV * ITEMS;
  // Vectors in flight, each lane; with several inputs a vector their indices take registers, too.
  static constexpr int kUnroll = ITEMS >= 4 ? 2 : 4;
  // CTAs an SM, by registers. With 24 warps 48 KiB are in flight, with 16 still 32 KiB; the H200's
  // memory takes 25 KiB an SM to be busy (4.8 TB/s for 700 ns).
  static constexpr int kResident = HV * PX >= 32 || (HV == 4 && ITEMS * PX >= 8) ? 2 : 3;

  static TETRIS_HOST_DEVICE int rows(const SkinnyPlan& plan) { return plan.lanes_of_input * HV; }
  static TETRIS_HOST_DEVICE int inputs_of_step(const SkinnyPlan& plan) {
    return 32 / plan.planes / plan.lanes_of_input * ITEMS;
  }
  static TETRIS_HOST_DEVICE size_t x_bytes(const SkinnyPlan& plan) {
    return (sizeof(T) * (plan.slots + 1) * plan.planes * PX + 15) / 16 * 16;
  }
  static TETRIS_HOST_DEVICE size_t shared_bytes(const SkinnyPlan& plan, int taps) {
    return x_bytes(plan) + sizeof(A) * kWarps * rows(plan) * plan.planes * PX +
           sizeof(int64_t) * taps * plan.planes * PX;
  }
};

// N elements to shared memory as one, like load_shared reads them.
template <class T, int N>
TETRIS_DEVICE void store_pixels(T* to, const T (&v)[N]) {
  if constexpr (N == 1) {
    to[0] = v[0];
  } else if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
  } else {
    *reinterpret_cast<uint2*>(to) = make_uint2(uint32_t(v[0].bits) | uint32_t(v[1].bits) << 16,
                                               uint32_t(v[2].bits) | uint32_t(v[3].bits) << 16);
  }
}

// All of x that the CTA's pixels see, through all taps.
template <class T, int HV, int ITEMS, int PX>
TETRIS_DEVICE void stage_x(const Product& p, const SkinnyPlan& plan, int group,
                           unsigned first_pixel, T* x_tile, int64_t* sources) {
  const Extents& e = plan.extents;
  const int pixels = plan.planes * PX, threads = blockDim.x, of_tap = plan.slots_of_tap;
  for (int i = threadIdx.x; i < p.w.taps * pixels; i += threads) {
    const int tap = i / pixels;
    sources[i] = source_element(p.geometry, p.x_strides,
                                pixel_at(p.geometry, first_pixel + i % pixels, e.pixels),
                                tap / p.geometry.kernel_w, tap % p.geometry.kernel_w);
  }
  __syncthreads();
  const T* const x = static_cast<const T*>(p.x);
#pragma unroll 2
  for (int i = threadIdx.x; i < (plan.slots + 1) * plan.planes; i += threads) {
    const int plane = i / (plan.slots + 1), slot = i - plane * (plan.slots + 1);
    const int tap = slot / of_tap, column = slot - tap * of_tap;
    T v[PX] = {};
    if (tap < p.w.taps && column < e.group_cols) {
      const int packed = group * e.group_cols + column;
      const int64_t channel =
          (p.col_perm ? __ldg(p.col_perm + packed) : packed) * p.x_strides.channel;
#pragma unroll
      for (int n = 0; n < PX; ++n) {
        const int64_t at = sources[tap * pixels + plane * PX + n];
        if (at >= 0) v[n] = x[at + channel];
      }
    }
    store_pixels(x_tile + int64_t(i) * PX, v);
  }
}

// Which input a lane's vector begins with: of which stored block (counted from the block row's
// first), and which of the block's.
struct InputCursor {
  int block, input;
  TETRIS_DEVICE void move(int blocks, int inputs, int width) {
    block += blocks;
    input += inputs;
    if (input >= width) {
      input -= width;
      ++block;
    }
  }
};

// The slots of x that a vector's inputs read. Inputs that are not the block row's (outside [0,
// inputs)) or that a ragged column group lacks read the slot of zeros; their values, which may be
// anything, must not be multiplied and are zeroed by the caller.
template <int ITEMS>
TETRIS_DEVICE void find_slots(const SkinnyPlan& plan, const int32_t* col_idx, int width,
                              InputCursor at, int input, int inputs, int (&slots)[ITEMS]) {
  const bool whole = input >= 0 && input + ITEMS <= inputs;
  if constexpr (ITEMS > 1) {
    if (plan.index_runs && whole) {
      if constexpr (ITEMS == 2) {
        const int2 run = __ldg(reinterpret_cast<const int2*>(col_idx + at.block));
        slots[0] = run.x, slots[1] = run.y;
      } else {
#pragma unroll
        for (int i = 0; i < ITEMS; i += 4) {
          const int4 run = __ldg(reinterpret_cast<const int4*>(col_idx + at.block + i));
          slots[i] = run.x, slots[i + 1] = run.y, slots[i + 2] = run.z, slots[i + 3] = run.w;
        }
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    slots[i] = plan.slots;
    if (input + i >= 0 && input + i < inputs) {
      const int col = __ldg(col_idx + at.block);
      if (at.input < plan.inputs_of_last || (col + 1) % plan.extents.col_groups != 0)
        slots[i] = col * width + at.input;
    }
    at.move(0, 1, width);
  }
}

// A vector of values. What lies outside the array is zero, what is another block row's is read.
template <class T, int HV, int ITEMS>
TETRIS_DEVICE Run<T, HV * ITEMS> read_vector(const T* values, int input, int inputs,
                                             int64_t inputs_to_end) {
  Run<T, HV * ITEMS> run = {};
  if (input < inputs) {
    if (ITEMS == 1 || input + ITEMS <= inputs_to_end)
      run = read_global<T, HV * ITEMS>(values);
    else
      run.template load_some<detail::ReadGlobal>(values, int(inputs_to_end - input) * HV);
  }
  return run;
}

template <class T, int HV, int ITEMS, int PX>
__global__ void __launch_bounds__(256, (Skinny<T, HV, ITEMS, PX>::kResident))
    skinny_vectors(const Product p, const SkinnyPlan plan) {
  using S = Skinny<T, HV, ITEMS, PX>;
  using A = typename S::A;
  constexpr int kVector = S::kVector, kUnroll = S::kUnroll;
  const Extents& e = plan.extents;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int height = p.w.height, width = p.w.width;
  const int rows = S::rows(plan), pixels = plan.planes * PX;

  T* const x_tile = reinterpret_cast<T*>(dynamic_shared());
  A* const sums = reinterpret_cast<A*>(dynamic_shared() + S::x_bytes(plan));
  int64_t* const sources = reinterpret_cast<int64_t*>(sums + S::kWarps * rows * pixels);

  // CTAs that share values and differ in pixels are neighbours: all but one find them in L2.
  const unsigned chunk = blockIdx.x % plan.pixel_chunks, rest = blockIdx.x / plan.pixel_chunks;
  const int group = rest % p.w.groups, cta = rest / p.w.groups;
  const int ctas = gridDim.x / (plan.pixel_chunks * p.w.groups);
  const unsigned first_pixel = chunk * pixels;
  stage_x<T, HV, ITEMS, PX>(p, plan, group, first_pixel, x_tile, sources);
  __syncthreads();

  // A lane's place: its pixels, its input of a step and its rows of that. Lanes left over repeat
  // what the first do, and are not summed.
  const int along = 32 / plan.planes, plane = lane / along;
  const int at_once = along / plan.lanes_of_input;
  const int place = lane % along / plan.lanes_of_input;
  const int lane_input = place < at_once ? place : 0;
  const int lane_row = lane % along % plan.lanes_of_input * HV;
  const int step_inputs = at_once * ITEMS;
  const T* const x = x_tile + plane * (plan.slots + 1) * PX;

  const int units = e.block_rows * plan.parts, units_at_once = S::kWarps / plan.split;
  const auto row_of = [&](int unit) {
    const int row = group * e.block_rows + unit / plan.parts;
    return p.w.order && p.w.groups == 1 ? __ldg(p.w.order + row) : row;
  };
  for (int first_unit = cta * units_at_once; first_unit < units;
       first_unit += ctas * units_at_once) {
    A acc[HV][PX] = {};
    const int unit = first_unit + warp / plan.split;
    if (unit < units) {
      const int row = row_of(unit), begin = __ldg(p.w.row_ptr + row);
      const int inputs = (__ldg(p.w.row_ptr + row + 1) - begin) * width;
      const int32_t* const col_idx = p.w.col_idx + begin;
      // Vectors of several inputs are aligned, wherever the block row begins.
      const int before = ITEMS > 1 ? int(int64_t(begin) * width % ITEMS) : 0;
      const int64_t to_end = p.w.nnzb * width - int64_t(begin) * width;
      const int first_row = unit % plan.parts * rows + lane_row;

      int input = warp % plan.split * step_inputs + lane_input * ITEMS - before;
      InputCursor at = {(input + ITEMS * width) / width - ITEMS, 0};
      at.input = input - at.block * width;
      const int stride = plan.split * step_inputs;
      const T* values = static_cast<const T*>(p.values) +
                        (int64_t(begin) * width + input) * height +
                        (first_row < height ? first_row : 0);

      // All of a warp's lanes, as many times.
      for (int left = inputs + before - warp % plan.split * step_inputs; left > 0;
           left -= kUnroll * stride) {
        Run<T, kVector> runs[kUnroll];
        int slots[kUnroll][ITEMS];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          runs[u] = read_vector<T, HV, ITEMS>(values, input + u * stride, inputs, to_end);
          values += int64_t(stride) * height;
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          find_slots(plan, col_idx, width, at, input, inputs, slots[u]);
          at.move(plan.block_step, plan.input_step, width);
          input += stride;
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          A v[kVector];
          runs[u].numbers(v);
#pragma unroll
          for (int i = 0; i < ITEMS; ++i) {
            A xv[PX];
            load_shared(x + slots[u][i] * PX, xv);
#pragma unroll
            for (int r = 0; r < HV; ++r) {
              const A value = slots[u][i] == plan.slots ? A(0) : v[i * HV + r];
#pragma unroll
              for (int n = 0; n < PX; ++n) acc[r][n] = multiply_add(value, xv[n], acc[r][n]);
            }
          }
        }
      }
    }

    for (int left = at_once; left > 1;) {
      const int half = (left + 1) / 2;
#pragma unroll
      for (int r = 0; r < HV; ++r)
#pragma unroll
        for (int n = 0; n < PX; ++n) {
          const A other = __shfl_down_sync(0xffffffff, acc[r][n], half * plan.lanes_of_input);
          if (place + half < left) acc[r][n] += other;
        }
      left = half;
    }
    if (place == 0)
#pragma unroll
      for (int r = 0; r < HV; ++r)
#pragma unroll
        for (int n = 0; n < PX; ++n)
          sums[(warp * rows + lane_row + r) * pixels + plane * PX + n] = acc[r][n];
    __syncthreads();

    for (int i = threadIdx.x; i < units_at_once * rows * pixels; i += blockDim.x) {
      const int row = i % rows, pixel = i / rows % pixels, of = i / rows / pixels;
      if (first_unit + of >= units) break;
      const int in_block = (first_unit + of) % plan.parts * rows + row;
      if (in_block >= height) continue;
      const int block_row = row_of(first_unit + of) - group * e.block_rows;
      const int channel = channel_of_row(p, e, group, block_row * height + in_block);
      const Pixel to = pixel_at(p.geometry, first_pixel + pixel, e.pixels);
      if (channel < 0 || to.image < 0) continue;
      A sum = 0;
      for (int s = 0; s < plan.split; ++s)
        sum += sums[((of * plan.split + s) * rows + row) * pixels + pixel];
      const int64_t residual_at =
          result_element(p.geometry, p.residual_strides, to) + channel * p.residual_strides.channel;
      static_cast<T*>(
          p.y)[result_element(p.geometry, p.y_strides, to) + channel * p.y_strides.channel] =
          finish<T>(sum, load_or_zero<T>(p.bias, channel), load_or_zero<T>(p.residual, residual_at),
                    p.activation);
    }
    __syncthreads();
  }
}

}  // namespace tetris::cuda
