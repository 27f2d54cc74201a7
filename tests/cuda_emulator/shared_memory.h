// The dynamic shared memory of the running CTA: exactly the bytes of the launch.
//
//     page that faults | the CTA's bytes | poisoned up to the end of the map | page that faults
//
// Every byte is 0xff before a CTA begins: NaN in every floating-point type, -1 in integers. What
// lies behind the end is AddressSanitizer's to report; without it, a changed byte there is found
// when the CTA ends.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_emulator/violation.h"

namespace tetris::cuda::emulator {

class SharedMemory {
 public:
  static constexpr size_t kMaxBytes = 227 * 1024;  // sm_90; sm_80 has 163 KiB
  // 32-bit addresses of the shared window. The system keeps the first KiB (CUDA C++ Programming
  // Guide, compute capability 8.x and newer), so that 0 is no address of ours.
  static constexpr uint32_t kBase = 1024;

  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void begin(size_t bytes);  // of a CTA
  void end();                // throws a Violation where bytes behind the end were written

  unsigned char* data() { return data_; }
  size_t size() const { return size_; }
  bool contains(const void* pointer) const {  // the end included: addresses are computed there
    const auto* const p = static_cast<const unsigned char*>(pointer);
    return p >= data_ && p <= data_ + size_;
  }

  // Between pointers and addresses; violations where bytes [address, address + bytes) are not the
  // CTA's or the address is no multiple of `alignment`.
  uint32_t address(const void* pointer, const char* what, Site site, size_t bytes = 0,
                   size_t alignment = 1) const;
  unsigned char* pointer(uint32_t address, const char* what, Site site, size_t bytes,
                         size_t alignment) const;

 private:
  size_t room() const;  // bytes of the map between its guards

  unsigned char* map_ = nullptr;
  unsigned char* data_ = nullptr;
  size_t size_ = 0;
};

constexpr unsigned char kPoison = 0xff;

}  // namespace tetris::cuda::emulator
