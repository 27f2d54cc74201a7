// Builds the kernel table of one instruction set from its vector type.
#pragma once

#include "cpu/line_kernels.h"
#include "cpu/panel_kernels.h"

namespace tetris::cpu {

// Compile-time text, for names like bsmm_f32_8x48__avx512.
struct Text {
  char data[40] = {};
  int size = 0;
  constexpr Text& operator<<(const char* s) {
    while (*s) data[size++] = *s++;
    return *this;
  }
  constexpr Text& operator<<(int n) {
    if (n >= 10) *this << n / 10;
    data[size++] = static_cast<char>('0' + n % 10);
    return *this;
  }
};

template <class V, class Isa>
struct TableBuilder {
  using T = typename V::T;
  static constexpr const char* kType = sizeof(T) == 4 ? "_f32_" : "_f64_";

  template <int R, int NV>
  static constexpr Text kTileName =
      Text() << "bsmm" << kType << R << "x" << NV * V::W << "__" << Isa::kName;
  template <int R, int NV>
  static constexpr Text kConvName =
      Text() << "bsconv" << kType << R << "x" << NV * V::W << "__" << Isa::kName;
  static constexpr Text kMatvecName = Text() << "bsmm" << kType << V::W << "x1__" << Isa::kName;
  template <int R, int U>
  static constexpr Text kSampleName =
      Text() << "sample" << kType << R << "x" << U << "__" << Isa::kName;

  // Every R x NV that fits the registers: R * NV accumulators, NV operands, one weight.
  template <int R, int NV>
  static constexpr void add(KernelTable<T>& table) {
    constexpr bool kRows = R <= 8 || NV == 1;
    constexpr bool kVecs = NV <= 4 || NV == 6 || NV == 8;
    if constexpr (kRows && kVecs && R * NV + NV + 1 <= V::kRegisters + 1)
      table.tiles[R][NV] = {kTileName<R, NV>.data, forward_tile<V, R, NV, PanelRows<V, NV>>,
                            grad_input_tile<V, R, NV>, forward_tile<V, R, NV, ShiftedPlanes<V>>,
                            kConvName<R, NV>.data};
    if constexpr (NV < kMaxTileVecs)
      add<R, NV + 1>(table);
    else if constexpr (R < kMaxTileRows)
      add<R + 1, 1>(table);
  }

  static constexpr KernelTable<T> build() {
    KernelTable<T> table{};
    table.isa = Isa::kName;
    table.needs = Isa::kNeeds;
    table.width = V::W;
    add<1, 1>(table);
    for (int r = 1; r <= kMaxTileRows; ++r) {
      table.preferred_vecs[r] = Isa::preferred_vecs(r);
      table.conv_vecs[r] = Isa::conv_vecs(r);
    }
    table.max_rows = Isa::kMaxRows;
    table.pack = pack<V>;
    table.unpack = unpack<V>;
    table.epilogue = epilogue<V>;
    table.matvec = matvec<V>;
    table.matvec_name = kMatvecName.data;
    table.samplers[0] = {sample<V>, kSampleName<4, V::W / 4>.data};
    table.samplers[1] = {sample_tall<V>, kSampleName<V::W, kSampleInputs<V, 1>>.data};
    table.samplers[2] = {sample_tall<V>, kSampleName<2 * V::W, kSampleInputs<V, 2>>.data};
    table.pack_lines = pack_lines<V>;
    table.store_lines = store_lines<V>;
    table.ascending = ascending<V>;
    table.fma_chain = fma_chain<V>;
    return table;
  }
};

}  // namespace tetris::cpu
