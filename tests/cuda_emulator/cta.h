// The CTA that runs: its threads, who of them may run, and what they share.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <typeindex>
#include <unordered_map>
#include <vector>

#include "cuda_emulator/actions.h"
#include "cuda_emulator/async_copy.h"
#include "cuda_emulator/barrier.h"
#include "cuda_emulator/fiber.h"
#include "cuda_emulator/meeting.h"
#include "cuda_emulator/options.h"
#include "cuda_emulator/shared_memory.h"
#include "cuda_emulator/vector_types.h"
#include "cuda_emulator/violation.h"

namespace tetris::cuda::emulator {

constexpr int kWarp = 32;

struct Thread {
  int number = 0;  // within the CTA
  uint3 index = {};
  Fiber* fiber = nullptr;
  AsyncCopies copies;

  enum class State { kReady, kAsleep, kWaiting, kEnded };
  State state = State::kReady;
  const char* what = "";  // it sleeps or waits for, and where
  Site site;
  std::function<bool()> condition;  // kWaiting
};

// What further instruction sets keep for each CTA; see Cta::extension().
struct Extension {
  virtual ~Extension() = default;
  virtual void end_of_cta() {}  // all threads and actions have ended; may throw a Violation
};

class Cta {
 public:
  Cta(dim3 grid, uint3 index, int threads, size_t shared_bytes, uint64_t seed);
  ~Cta();

  // Runs the kernel in every thread until all have ended. Throws a Violation.
  void run(const std::function<void()>& kernel);

  // -- what runs
  // ------------------------------------------------------------------------------------

  const uint3 index;
  int threads() const { return static_cast<int>(threads_.size()); }
  int alive() const { return alive_; }  // threads that have not ended
  Thread& thread(int number) { return threads_[number]; }
  Thread* running() const {
    return running_;
  }  // nullptr: no thread, an action that nobody waited for

  // -- for instructions, called by a thread
  // -----------------------------------------------------------

  // Lets others run until wake(); `what` waits is reported when nobody can run any more.
  void sleep(const char* what, Site site);
  void wake(int thread);
  // Lets others run until the condition holds. It is asked often, and must change nothing.
  void wait_until(std::function<bool()> condition, const char* what, Site site);
  // Lets others run first: for loops that poll.
  void yield();

  Meeting& warp();        // of the running thread
  Meeting& warp_group();  // four warps, the first a multiple of four
  Barrier& barrier(int number, const char* what, Site site);
  Actions actions;
  Random random;

  // The one object of this type that the CTA has, made when first asked for.
  template <class T>
  T& extension() {
    std::unique_ptr<Extension>& e = extensions_[std::type_index(typeid(T))];
    if (!e) e = std::make_unique<T>();
    return static_cast<T&>(*e);
  }

 private:
  static void enter(void* thread);
  int choose();             // a thread that can run, or -1
  int choose_of(int warp);  // the same of a warp
  void shuffle_order();
  void thread_ended(Thread& thread);
  [[noreturn]] void report_deadlock();

  std::vector<Thread> threads_;
  int alive_ = 0;
  Thread* running_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  std::exception_ptr failure_;  // of a thread
  struct Warp {
    uint32_t ready = 0, waiting = 0;  // bits of lanes
  };
  Warp& warp_of(int thread) { return warp_states_[thread / kWarp]; }
  std::vector<Warp> warp_states_;
  std::vector<int> order_;               // of warps: the first that can run, runs
  uint32_t change_one_in_, act_one_in_;  // steps, on average
  std::vector<Meeting> warps_, warp_groups_;
  Barrier barriers_[Barrier::kCount];
  std::unordered_map<std::type_index, std::unique_ptr<Extension>> extensions_;
};

// Of the thread that calls; an error that names the call where no kernel runs.
Cta& this_cta();
Thread& this_thread();
SharedMemory& shared_memory();
bool on_a_stack(const void* address);  // of the thread that runs: its local variables

}  // namespace tetris::cuda::emulator
