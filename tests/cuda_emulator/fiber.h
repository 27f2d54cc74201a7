// Threads of a kernel as fibers: each has a stack of its own, one runs at a time, and it runs until
// it pauses. Switches are a few instructions (fiber.cpp), so that a CTA of 1024 threads that meet
// at every matrix instruction is still quick; AddressSanitizer is told of each.
#pragma once

#include <cstddef>

namespace tetris::cuda::emulator {

class Fiber {
 public:
  using Entry = void (*)(void*);

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next resume() begin with entry(argument). A fiber that was paused is abandoned: what
  // lies on its stack is not destroyed.
  void start(Entry entry, void* argument);
  // Runs the fiber until it pauses or `entry` returns, which must not throw. Not from a fiber.
  void resume();
  bool finished() const { return finished_; }
  // From within the running fiber: back to resume().
  static void pause();
  // Whether an address lies on this fiber's stack.
  bool owns(const void* address) const;

 private:
  static void run();

  char* stack_ = nullptr;  // above a page that faults
  void* context_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  bool finished_ = true;
};

}  // namespace tetris::cuda::emulator
