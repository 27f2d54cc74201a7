#include "cuda_emulator/shared_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda_emulator/asan.h"

namespace tetris::cuda::emulator {
namespace {

constexpr unsigned char kCanary = 0xa5;
constexpr size_t kCanaryBytes = 1024;  // looked at behind the end

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

std::string hex(uint64_t v) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

}  // namespace

size_t SharedMemory::room() const {
  return (kMaxBytes + kCanaryBytes + page_bytes() - 1) / page_bytes() * page_bytes();
}

SharedMemory::SharedMemory() {
  const size_t page = page_bytes();
  void* const map = mmap(nullptr, room() + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED ||
      mprotect(static_cast<char*>(map) + page, room(), PROT_READ | PROT_WRITE) != 0) {
    std::perror("CUDA emulator: shared memory");
    std::abort();
  }
  map_ = static_cast<unsigned char*>(map);
  data_ = map_ + page;
}

SharedMemory::~SharedMemory() {
  permit(data_, room());
  munmap(map_, room() + 2 * page_bytes());
}

void SharedMemory::begin(size_t bytes) {
  permit(data_, room());
  std::memset(data_ + bytes, kCanary, kCanaryBytes);
  size_ = bytes;
  std::memset(data_, kPoison, bytes);
  forbid(data_ + bytes, room() - bytes);
}

void SharedMemory::end() {
  permit(data_, room());
  for (size_t i = size_; i < size_ + kCanaryBytes; ++i)
    if (data_[i] != kCanary)
      throw Violation{"shared memory was written " + std::to_string(i - size_) +
                      " bytes behind its end (" + std::to_string(size_) + " bytes were launched)"};
}

uint32_t SharedMemory::address(const void* pointer, const char* what, Site site, size_t bytes,
                               size_t alignment) const {
  const auto* const p = static_cast<const unsigned char*>(pointer);
  if (p < data_ || p + bytes > data_ + size_)
    violate(what, site,
            "not " + std::to_string(bytes) + " bytes of shared memory (its offset is " +
                std::to_string(p - data_) + " of " + std::to_string(size_) + ")");
  const uint32_t address = kBase + static_cast<uint32_t>(p - data_);
  if (address % alignment != 0)
    violate(
        what, site,
        "shared address " + hex(address) + " is not a multiple of " + std::to_string(alignment));
  return address;
}

unsigned char* SharedMemory::pointer(uint32_t address, const char* what, Site site, size_t bytes,
                                     size_t alignment) const {
  unsigned char* const p = data_ + (int64_t{address} - int64_t{kBase});
  this->address(p, what, site, bytes, alignment);
  return p;
}

}  // namespace tetris::cuda::emulator
