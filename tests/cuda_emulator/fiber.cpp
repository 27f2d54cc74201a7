#include "cuda_emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "cuda_emulator/asan.h"

// Saves what a callee must preserve on the running stack, its pointer in *save, and continues what
// was saved at `to`. NOTE: ucontext's swapcontext does the same with a system call each time.
extern "C" void tetris_switch_context(void** save, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl tetris_switch_context
.hidden tetris_switch_context
.type tetris_switch_context, @function
tetris_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tetris_switch_context, . - tetris_switch_context
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl tetris_switch_context
.hidden tetris_switch_context
.type tetris_switch_context, %function
tetris_switch_context:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size tetris_switch_context, . - tetris_switch_context
)");
#else
#error "the CUDA emulator switches stacks on x86-64 and aarch64 only"
#endif

namespace tetris::cuda::emulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

Fiber* running = nullptr;
void* resumer = nullptr;  // the context that resume() saved
#if defined(TETRIS_ASAN)
const void* resumer_stack = nullptr;
size_t resumer_stack_bytes = 0;
#endif

// The context of a function that is about to be entered, on an empty stack.
void* context_of(void (*function)(), char* stack_end) {
  auto** top = reinterpret_cast<void**>(stack_end);
  void* const address = reinterpret_cast<void*>(function);
#if defined(__x86_64__)
  *--top = nullptr;  // where a caller's return address would be
  *--top = address;
  for (int i = 0; i < 6; ++i) *--top = nullptr;
#else
  for (int i = 0; i < 20; ++i) *--top = nullptr;
  top[11] = address;  // x30
#endif
  return top;
}

}  // namespace

Fiber::Fiber() {
  const size_t guard = page_bytes();
  void* const map = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED || mprotect(map, guard, PROT_NONE) != 0) {
    std::perror("CUDA emulator: a fiber's stack");
    std::abort();
  }
  stack_ = static_cast<char*>(map) + guard;
}

Fiber::~Fiber() { munmap(stack_ - page_bytes(), page_bytes() + kStackBytes); }

void Fiber::start(Entry entry, void* argument) {
  if (!finished_) permit(stack_, kStackBytes);
  entry_ = entry;
  argument_ = argument;
  finished_ = false;
  fake_stack_ = nullptr;
  context_ = context_of(&Fiber::run, stack_ + kStackBytes);
}

void Fiber::run() {
#if defined(TETRIS_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &resumer_stack, &resumer_stack_bytes);
#endif
  Fiber* const self = running;
  self->entry_(self->argument_);
  self->finished_ = true;
#if defined(TETRIS_ASAN)
  __sanitizer_start_switch_fiber(nullptr, resumer_stack, resumer_stack_bytes);
#endif
  tetris_switch_context(&self->context_, resumer);
  std::abort();  // a finished fiber was resumed
}

void Fiber::resume() {
  running = this;
#if defined(TETRIS_ASAN)
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, stack_, kStackBytes);
#endif
  tetris_switch_context(&resumer, context_);
#if defined(TETRIS_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  running = nullptr;
}

void Fiber::pause() {
  Fiber* const self = running;
#if defined(TETRIS_ASAN)
  __sanitizer_start_switch_fiber(&self->fake_stack_, resumer_stack, resumer_stack_bytes);
#endif
  tetris_switch_context(&self->context_, resumer);
#if defined(TETRIS_ASAN)
  __sanitizer_finish_switch_fiber(self->fake_stack_, &resumer_stack, &resumer_stack_bytes);
#endif
}

bool Fiber::owns(const void* address) const {
  const char* const a = static_cast<const char*>(address);
  return a >= stack_ && a < stack_ + kStackBytes;
}

}  // namespace tetris::cuda::emulator
