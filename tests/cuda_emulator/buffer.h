// Memory as a device allocation is: aligned for any access, exactly as long as asked for, so that
// AddressSanitizer reports whatever touches a byte more.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "cuda/problem.h"
#include "cuda_emulator/asan.h"
#include "cuda_emulator/numbers.h"

namespace tetris::cuda::test {

class Buffer {
 public:
  static constexpr size_t kAlignment = 256;  // cudaMalloc's; a view into a tensor may have less

  // `shift` bytes of the alignment are missing.
  explicit Buffer(size_t bytes, size_t shift = 0) : bytes_(bytes), shift_(shift) {
    if (posix_memalign(&memory_, kAlignment, shift + bytes) != 0) throw std::bad_alloc();
    emulator::forbid(memory_, shift);
  }
  Buffer(Buffer&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)),
        bytes_(other.bytes_),
        shift_(other.shift_) {}
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() {
    if (memory_ != nullptr) emulator::permit(memory_, shift_);
    std::free(memory_);
  }

  void* data() const { return static_cast<char*>(memory_) + shift_; }
  size_t bytes() const { return bytes_; }

 private:
  void* memory_ = nullptr;
  size_t bytes_, shift_;
};

// Integers of an index; nullptr for "none".
class Indices {
 public:
  explicit Indices(const std::vector<int32_t>& v) : buffer_(v.size() * sizeof(int32_t)) {
    if (!v.empty()) std::memcpy(buffer_.data(), v.data(), buffer_.bytes());
  }
  const int32_t* data() const { return static_cast<const int32_t*>(buffer_.data()); }

 private:
  Buffer buffer_;
};

// Numbers of a dtype, seen as double.
class Numbers {
 public:
  static constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

  Numbers(DType dtype, int64_t count, int64_t shift = 0)
      : dtype_(dtype),
        count_(count),
        buffer_(static_cast<size_t>(count * size_of(dtype)),
                static_cast<size_t>(shift * size_of(dtype))) {
    fill(kNan);
  }

  int64_t size() const { return count_; }
  DType dtype() const { return dtype_; }
  void* data() const { return buffer_.data(); }
  size_t bytes() const { return buffer_.bytes(); }

  double get(int64_t i) const {
    switch (dtype_) {
      case DType::kFloat16:
        return emulator::half_to_float(at<uint16_t>(i));
      case DType::kBFloat16:
        return emulator::bfloat16_to_float(at<uint16_t>(i));
      case DType::kFloat32:
        return at<float>(i);
      case DType::kFloat64:
        return at<double>(i);
    }
    std::abort();
  }
  void set(int64_t i, double v) {
    switch (dtype_) {
      case DType::kFloat16:
        at<uint16_t>(i) = emulator::float_to_half(float(v));
        return;
      case DType::kBFloat16:
        at<uint16_t>(i) = emulator::float_to_bfloat16(float(v));
        return;
      case DType::kFloat32:
        at<float>(i) = float(v);
        return;
      case DType::kFloat64:
        at<double>(i) = v;
        return;
    }
    std::abort();
  }
  void fill(double v) {
    for (int64_t i = 0; i < count_; ++i) set(i, v);
  }
  std::vector<double> all() const {
    std::vector<double> v(static_cast<size_t>(count_));
    for (int64_t i = 0; i < count_; ++i) v[i] = get(i);
    return v;
  }

 private:
  template <class T>
  T& at(int64_t i) const {
    return static_cast<T*>(buffer_.data())[i];
  }
  DType dtype_;
  int64_t count_;
  Buffer buffer_;
};

}  // namespace tetris::cuda::test
