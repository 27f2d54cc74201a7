// Arrays whose surroundings notice any access.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace tetris::test {

// Where an array sits. Masked vector loads are invisible to AddressSanitizer, a page that cannot be
// touched is not; the heap is there for AddressSanitizer, which knows more about the rest.
enum class Place { kBeforeGuard, kAfterGuard, kHeap };

// An emulator may implement masked loads as whole ones: TETRIS_TEST_HEAP=1 puts everything there.
inline Place allowed(Place place) {
  static const bool heap = std::getenv("TETRIS_TEST_HEAP") != nullptr;
  return heap ? Place::kHeap : place;
}

// n elements, the first or the last of them at a page that faults. Bytes left over on the other
// side are checked for writes when the array goes.
template <class T>
class Guarded {
 public:
  Guarded(int64_t n, Place place) : n_(n), place_(allowed(place)) {
    const size_t bytes = static_cast<size_t>(n) * sizeof(T);
    if (place_ == Place::kHeap) {
      data_ = static_cast<T*>(std::malloc(bytes));
      return;
    }
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    inner_ = (bytes + page - 1) / page * page;
    if (inner_ == 0) inner_ = page;
    map_ = static_cast<char*>(
        mmap(nullptr, inner_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED || mprotect(map_ + page, inner_, PROT_READ | PROT_WRITE) != 0) {
      std::perror("mmap");
      std::abort();
    }
    usable_ = map_ + page;
    std::memset(usable_, kCanary, inner_);
    slack_ = inner_ - bytes;
    data_ = reinterpret_cast<T*>(place_ == Place::kBeforeGuard ? usable_ + slack_ : usable_);
  }
  ~Guarded() {
    if (place_ == Place::kHeap) {
      std::free(data_);
      return;
    }
    const char* slack = place_ == Place::kBeforeGuard ? usable_ : usable_ + inner_ - slack_;
    for (size_t i = 0; i < slack_; ++i)
      if (static_cast<unsigned char>(slack[i]) != kCanary) {
        std::fprintf(stderr, "a byte next to a guarded array was written\n");
        std::abort();
      }
    munmap(map_, inner_ + 2 * static_cast<size_t>(sysconf(_SC_PAGESIZE)));
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return n_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + n_; }

 private:
  static constexpr unsigned char kCanary = 0xa5;
  int64_t n_;
  Place place_;
  T* data_ = nullptr;
  char *map_ = nullptr, *usable_ = nullptr;
  size_t inner_ = 0, slack_ = 0;
};

}  // namespace tetris::test
