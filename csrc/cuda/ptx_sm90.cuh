// One function per PTX instruction that came with sm_90a: barriers in shared memory (mbarrier),
// bulk copies (TMA), and matrix products of four warps (wgmma). Section numbers are those of the
// PTX ISA 9.x; where it leaves a question, the comment says who answers it and how.
// tests/cuda_emulator/ptx_sm90.h defines the same functions on the CPU.
//
// Two proxies see shared memory. Ordinary loads and stores, stmatrix and the mbarrier instructions
// go through the generic one, the data of TMA and wgmma through the async one. What a thread
// wrote through the generic proxy is seen by the async one only after fence.proxy.async of that
// thread (9.7.15.4). The completion of TMA's loads (mbarrier) and of wgmma (wait_group) includes
// such a fence, so a ring of tiles that TMA fills and wgmma reads needs none.
#pragma once

#include <cstdint>

#include "cuda/platform.h"
#include "cuda/ptx.cuh"
#include "cuda/tensor_map.h"

namespace tetris::cuda::ptx {

// A matrix in shared memory (9.7.15.5.1.2.2), as rows of `row_bytes` = 32, 64 or 128 bytes, which
// is also the swizzle: the 16-byte pieces of a row are exchanged by address bits, as TMA does with
// a box of this inner size (5.5.7): bits 4.. are xored with bits 7.., one, two or three of them.
// Eight rows, the pattern of the swizzle, start at a multiple of 8 row_bytes; `stride_bytes` lie
// between one eight and the next. So far it is the same for both kinds of matrices:
//
// K-major (not transposed): a row is 8, 16, .. elements along K of one row of a, or column of b.
//   Canonical layout ((8,m),(T,2)):((row,SBO),(1,T)): the stride is the SBO, along M or N; the LBO
//   is not used. The next 16 elements along K within a row of 64 are 32 bytes further on, and the
//   base offset stays 0, as the pattern starts where it did: the xor acts on the address. (The
//   same arithmetic in CUTLASS's DescriptorIterator and DeepGEMM's advance_gmma_desc_lo.)
// MN-major (transposed), 128-byte rows only here: a row is 64 elements along M of one k. Canonical
//   layout ((T,8,m),(8,k)):((1,T,LBO),(8T,SBO)): the stride is the SBO, from eight k to the next;
//   the LBO would lead from 64 rows of M to the next 64, of which a of wgmma has only one. The next
//   16 along K are 16 rows further on.
//
// The LBO is therefore never used; it is written as 1 (K-major: "assumed to be 1").
TETRIS_HOST_DEVICE uint64_t wgmma_layout(int row_bytes, int stride_bytes) {
  const uint64_t swizzle = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  return swizzle << 62 | uint64_t(stride_bytes >> 4) << 32 | uint64_t(1) << 16;
}
// ... and where it starts: 14 bits, the address in units of 16 bytes. All of shared memory is below
// 2^18, so that no carry leaves the field and a descriptor is moved by adding to it.
TETRIS_HOST_DEVICE uint64_t wgmma_descriptor(uint64_t layout, uint32_t address) {
  return layout | ((address & 0x3ffff) >> 4);
}
TETRIS_HOST_DEVICE uint64_t wgmma_advance(uint64_t descriptor, int bytes) {
  return (descriptor & 0xffffffff00000000) | uint32_t(uint32_t(descriptor) + (bytes >> 4));
}

}  // namespace tetris::cuda::ptx

#if defined(TETRIS_CUDA_EMULATOR)
#include "cuda_emulator/ptx_sm90.h"
#else

namespace tetris::cuda::ptx {

// -- mbarrier (9.7.13.15)
// ---------------------------------------------------------------------------
//
// A barrier is in phase 0, 1, ... and leaves a phase when as many threads arrived as it was
// initialized with and no bytes are outstanding.

TETRIS_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// After mbarrier_init, before other threads (by a barrier of the CTA) and TMA use it.
TETRIS_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
TETRIS_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Expects `bytes` more in this phase, then arrives.
TETRIS_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Whether the newest phase of this parity is complete: asked with the parity of the current phase,
// false; with that of the one before, true. So a fresh barrier passes waits for parity 1. May
// block for a while, may return false for no reason, so ask in a loop.
TETRIS_DEVICE bool mbarrier_try_wait(uint64_t* barrier, int parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// What this thread wrote to shared memory is seen by TMA and wgmma that are issued later (by it,
// or by a thread that meets it at a barrier).
TETRIS_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// -- bulk copies (9.7.9.27)
// -------------------------------------------------------------------------

TETRIS_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The box at these coordinates, the innermost first, to shared memory (128-byte aligned); what lies
// outside the tensor is zero. All bytes of the box count for the barrier, the zeros too.
// (.shared::cluster: a CTA's own addresses are valid there, and .shared::cta as a destination asks
// for PTX 8.6.)
TETRIS_DEVICE void tma_load_4d(void* shared, const TensorMap* map, int at0, int at1, int at2,
                               int at3, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(shared)),
      "l"(map), "r"(at0), "r"(at1), "r"(at2), "r"(at3), "r"(shared_address(barrier))
      : "memory");
}
// The other way; what lies outside is not written. Part of this thread's next bulk group.
TETRIS_DEVICE void tma_store_4d(const TensorMap* map, int at0, int at1, int at2, int at3,
                                const void* shared) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::
          "l"(map),
      "r"(at0), "r"(at1), "r"(at2), "r"(at3), "r"(shared_address(shared))
      : "memory");
}
// Contiguous bytes, a multiple of 16, both addresses too.
TETRIS_DEVICE void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
TETRIS_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but this thread's newest `pending` groups have read their shared memory.
template <int pending>
TETRIS_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// -- warps and registers
// ----------------------------------------------------------------------------

// `threads` threads, whole warps, meet at barrier `id` (0 is that of __syncthreads).
TETRIS_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// All four warps of a warpgroup give registers back, or ask for more and wait until they are there
// (9.7.19.5: 24 to 256, a multiple of 8; the kernel must be compiled for a fixed number).
template <int registers>
TETRIS_DEVICE void set_max_registers_down() {
  static_assert(registers % 8 == 0 && 24 <= registers && registers <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
TETRIS_DEVICE void set_max_registers_up() {
  static_assert(registers % 8 == 0 && 24 <= registers && registers <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
// Four 8x8 matrices of 16-bit elements; lane 8 i + j gives the address of row j of matrix i. Lane
// l's register i holds elements 2 (l % 4) and the next of column l / 4: the mirror image of
// ldmatrix_x4_trans.
TETRIS_DEVICE void stmatrix_x4_trans(void* shared_row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(shared_row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// -- wgmma (9.7.15)
// ---------------------------------------------------------------------------------
//
// Four warps (a warpgroup, threads 128 i ..) compute d += a b, d 64xN in registers, a 64x16 and b
// 16xN in shared memory. In d, lane l of warp w holds rows 16 w + l / 4 and 8 below, columns
// 8 j + 2 (l % 4) and the next: d[4 j + 2 i + c] is row 16 w + l / 4 + 8 i, column
// 8 j + 2 (l % 4) + c (figure 149).
//
// The instructions run behind the thread's back: d and the operands belong to them until
// wgmma_wait.

// What was done to registers of d before is done before the wgmma that follow (9.7.15.7.1). d says
// so to the compiler, which could otherwise write them later.
template <int n>
TETRIS_DEVICE void wgmma_fence(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
TETRIS_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the newest `pending` groups of this warp are complete. d says so to the compiler, which
// would otherwise read it earlier.
template <int pending, int n>
TETRIS_DEVICE void wgmma_wait(float (&d)[n]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Operands %0 .. %9, %10 .. %19, ...: as text, and as values.
#define TETRIS_TEXT_10(t)                                                                          \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9, "
#define TETRIS_FLOATS_10(t)                                                                 \
  "+f"(d[t##0]), "+f"(d[t##1]), "+f"(d[t##2]), "+f"(d[t##3]), "+f"(d[t##4]), "+f"(d[t##5]), \
      "+f"(d[t##6]), "+f"(d[t##7]), "+f"(d[t##8]), "+f"(d[t##9])
#define TETRIS_TEXT_30 TETRIS_TEXT_10() TETRIS_TEXT_10(1) TETRIS_TEXT_10(2)
#define TETRIS_TEXT_60 TETRIS_TEXT_30 TETRIS_TEXT_10(3) TETRIS_TEXT_10(4) TETRIS_TEXT_10(5)
#define TETRIS_TEXT_90 TETRIS_TEXT_60 TETRIS_TEXT_10(6) TETRIS_TEXT_10(7) TETRIS_TEXT_10(8)
#define TETRIS_TEXT_120 TETRIS_TEXT_90 TETRIS_TEXT_10(9) TETRIS_TEXT_10(10) TETRIS_TEXT_10(11)
#define TETRIS_FLOATS_30 TETRIS_FLOATS_10(), TETRIS_FLOATS_10(1), TETRIS_FLOATS_10(2)
#define TETRIS_FLOATS_60 \
  TETRIS_FLOATS_30, TETRIS_FLOATS_10(3), TETRIS_FLOATS_10(4), TETRIS_FLOATS_10(5)
#define TETRIS_FLOATS_90 \
  TETRIS_FLOATS_60, TETRIS_FLOATS_10(6), TETRIS_FLOATS_10(7), TETRIS_FLOATS_10(8)
#define TETRIS_FLOATS_120 \
  TETRIS_FLOATS_90, TETRIS_FLOATS_10(9), TETRIS_FLOATS_10(10), TETRIS_FLOATS_10(11)

// The last operands: add to d (a predicate), signs of a and b, a transposed or not, b not.
#define TETRIS_WGMMA(name, n, type, text, a_desc, b_desc, a_transposed, ...)                   \
  template <bool transposed>                                                                   \
  TETRIS_DEVICE void name(float (&d)[n / 2], uint64_t a, uint64_t b) {                         \
    asm volatile(                                                                              \
        "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                             \
        "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" text "}, " a_desc \
        ", " b_desc ", p, 1, 1, " a_transposed ", 0;\n}"                                       \
        : __VA_ARGS__                                                                          \
        : "l"(a), "l"(b), "n"(int(transposed)));                                               \
  }

#define TETRIS_WGMMA_64(name, type)                                                              \
  TETRIS_WGMMA(name, 64, type, TETRIS_TEXT_30 "%30, %31", "%32", "%33", "%34", TETRIS_FLOATS_30, \
               "+f"(d[30]), "+f"(d[31]))
#define TETRIS_WGMMA_128(name, type)                                                      \
  TETRIS_WGMMA(name, 128, type, TETRIS_TEXT_60 "%60, %61, %62, %63", "%64", "%65", "%66", \
               TETRIS_FLOATS_60, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]))
#define TETRIS_WGMMA_256(name, type)                                                              \
  TETRIS_WGMMA(name, 256, type, TETRIS_TEXT_120 "%120, %121, %122, %123, %124, %125, %126, %127", \
               "%128", "%129", "%130", TETRIS_FLOATS_120, "+f"(d[120]), "+f"(d[121]),             \
               "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127]))

TETRIS_WGMMA_64(wgmma_m64n64k16_half, "f16")
TETRIS_WGMMA_64(wgmma_m64n64k16_bfloat16, "bf16")
TETRIS_WGMMA_128(wgmma_m64n128k16_half, "f16")
TETRIS_WGMMA_128(wgmma_m64n128k16_bfloat16, "bf16")
TETRIS_WGMMA_256(wgmma_m64n256k16_half, "f16")
TETRIS_WGMMA_256(wgmma_m64n256k16_bfloat16, "bf16")

#undef TETRIS_WGMMA_256
#undef TETRIS_WGMMA_128
#undef TETRIS_WGMMA_64
#undef TETRIS_WGMMA
#undef TETRIS_FLOATS_120
#undef TETRIS_FLOATS_90
#undef TETRIS_FLOATS_60
#undef TETRIS_FLOATS_30
#undef TETRIS_FLOATS_10
#undef TETRIS_TEXT_120
#undef TETRIS_TEXT_90
#undef TETRIS_TEXT_60
#undef TETRIS_TEXT_30
#undef TETRIS_TEXT_10

}  // namespace tetris::cuda::ptx

#endif
