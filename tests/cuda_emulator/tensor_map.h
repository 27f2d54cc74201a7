// Tensor maps on the CPU: what csrc/cuda/tensor_map.h takes from here. The requirements are those
// of cuTensorMapEncodeTiled (CUDA Driver API).
#pragma once

#include <cstring>
#include <string>
#include <type_traits>

namespace tetris::cuda {
namespace emulator {

// What lies in a TensorMap's bytes.
struct DecodedMap {
  static constexpr uint64_t kMagic = 0x74656e736f726d70;
  uint64_t magic;
  TensorBox box;

  int64_t box_bytes() const {
    int64_t bytes = 2;
    for (int i = 0; i < box.rank; ++i) bytes *= box.box[i];
    return bytes;
  }
};
static_assert(sizeof(DecodedMap) <= sizeof(TensorMap) && std::is_trivially_copyable_v<DecodedMap>);

}  // namespace emulator

inline std::string encode_tensor_map(const TensorBox& box, TensorMap* map) {
  const auto refuse = [](const std::string& what) { return "tensor map: " + what; };
  if (box.rank < 1 || box.rank > TensorBox::kMaxRank) return refuse("rank");
  if (reinterpret_cast<uintptr_t>(box.base) % 16 != 0 || box.base == nullptr)
    return refuse("base must be aligned to 16 bytes");
  for (int i = 0; i < box.rank; ++i) {
    const std::string which = " of dimension " + std::to_string(i);
    if (box.extent[i] < 1 || box.extent[i] > int64_t{1} << 32)
      return refuse("extent" + which + " must be in [1, 2^32]");
    if (box.step[i] < 1 || box.step[i] > 8) return refuse("step" + which + " must be in [1, 8]");
    if (box.box[i] < 1 || box.box[i] * box.step[i] > 256)
      return refuse("box" + which + " must be in [1, 256]");
    if (i > 0 &&
        (box.stride[i] * 2 % 16 != 0 || box.stride[i] < 1 || box.stride[i] * 2 >= int64_t{1} << 40))
      return refuse("stride" + which + " must be a multiple of 16 bytes below 2^40");
  }
  if (box.stride[0] != 1 || box.step[0] != 1)
    return refuse("the innermost dimension has stride 1 and step 1");
  if (box.box[0] != 16 && box.box[0] != 32 && box.box[0] != 64)
    return refuse("the box's rows must fill their swizzle of 32, 64 or 128 bytes");
  const emulator::DecodedMap decoded{emulator::DecodedMap::kMagic, box};
  std::memcpy(map->opaque, &decoded, sizeof decoded);
  return {};
}

}  // namespace tetris::cuda
