#include "cuda_emulator/cta.h"

#include <algorithm>
#include <stdexcept>

#include "cuda_emulator/builtins.h"

namespace tetris::cuda::emulator {
namespace {

Cta* active = nullptr;

// Stacks are kept for the next CTA.
Fiber* fiber(size_t number) {
  static std::vector<std::unique_ptr<Fiber>> pool;
  while (pool.size() <= number) pool.push_back(std::make_unique<Fiber>());
  return pool[number].get();
}

std::vector<Meeting> groups_of(int size, int threads) {
  std::vector<Meeting> groups;
  for (int first = 0; first < threads; first += size) groups.emplace_back(first, size);
  if (threads % size != 0) groups.back().thread_ended(threads);  // the group lacks this one
  return groups;
}

// "threads 0-31, 64"
std::string ranges(const std::vector<int>& ascending) {
  std::string text = ascending.size() == 1 ? "thread " : "threads ";
  for (size_t i = 0; i < ascending.size();) {
    size_t last = i;
    while (last + 1 < ascending.size() && ascending[last + 1] == ascending[last] + 1) ++last;
    if (i > 0) text += ", ";
    text += std::to_string(ascending[i]);
    if (last > i) text += "-" + std::to_string(ascending[last]);
    i = last + 1;
  }
  return text;
}

constexpr uint32_t kNever = ~uint32_t{0};

}  // namespace

Cta& this_cta() {
  if (active == nullptr)
    throw std::logic_error("CUDA emulator: a device function was called outside a kernel");
  return *active;
}

Thread& this_thread() {
  Thread* const thread = this_cta().running();
  if (thread == nullptr)
    throw std::logic_error("CUDA emulator: a device function was called outside a thread");
  return *thread;
}

SharedMemory& shared_memory() {
  static SharedMemory memory;
  return memory;
}

bool on_a_stack(const void* address) {
  const Thread* const thread = this_cta().running();
  return thread != nullptr && thread->fiber->owns(address);
}

Cta::Cta(dim3 grid, uint3 index, int threads, size_t shared_bytes, uint64_t seed)
    : index(index),
      random(seed),
      threads_(threads),
      alive_(threads),
      ready_of_warp_((threads + kWarp - 1) / kWarp),
      waiting_of_warp_(ready_of_warp_.size()),
      priority_(ready_of_warp_.size()),
      warps_(groups_of(kWarp, threads)),
      warp_groups_(groups_of(4 * kWarp, threads)) {
  active = this;
  shared_memory().begin(shared_bytes);
  ::gridDim = grid;
  ::blockDim = dim3(threads);
  ::blockIdx = index;
  for (int i = 0; i < threads; ++i) {
    threads_[i].number = i;
    threads_[i].index = {static_cast<unsigned>(i), 0, 0};
    threads_[i].fiber = fiber(i);
    threads_[i].fiber->start(&Cta::enter, &threads_[i]);
    ++ready_of_warp_[i / kWarp];
  }
  // Warps that all advance at one pace hide a missing barrier before a buffer is filled again, so
  // that some must run ahead: priorities change at each step, now and then, or never.
  constexpr uint32_t kPaces[] = {1, 100, 1000, kNever, kNever};
  change_one_in_ = kPaces[random.below(5)];
  constexpr uint32_t kActionPaces[] = {1, 8, 64, kNever};
  act_one_in_ = options().landing == Landing::kAtOnce   ? 1
                : options().landing == Landing::kLatest ? kNever
                                                        : kActionPaces[random.below(4)];
  shuffle_priorities();
}

Cta::~Cta() { active = nullptr; }

void Cta::enter(void* argument) {
  Cta& cta = *active;
  try {
    (*cta.kernel_)();
    cta.thread_ended(*static_cast<Thread*>(argument));
  } catch (...) {
    cta.failure_ = std::current_exception();
  }
}

void Cta::run(const std::function<void()>& kernel) {
  kernel_ = &kernel;
  while (alive_ > 0) {
    if (act_one_in_ != kNever && random.one_in(act_one_in_)) actions.run_some(random);
    const int next = choose();
    if (next < 0) {
      if (!actions.run_some(random)) report_deadlock();
      continue;
    }
    running_ = &threads_[next];
    ::threadIdx = running_->index;
    running_->fiber->resume();
    if (failure_) std::rethrow_exception(failure_);
    running_ = nullptr;
  }
  while (actions.run_some(random)) {
  }
  for (Thread& thread : threads_) thread.copies.land_all();
  for (auto& extension : extensions_) extension.second->end_of_cta();
  shared_memory().end();
}

void Cta::thread_ended(Thread& thread) {
  thread.state = Thread::State::kEnded;
  --ready_of_warp_[thread.number / kWarp];
  --alive_;
  warps_[thread.number / kWarp].thread_ended(thread.number);
  warp_groups_[thread.number / (4 * kWarp)].thread_ended(thread.number);
  for (Barrier& barrier : barriers_) barrier.thread_ended(alive_);
}

// -- who runs next --------------------------------------------------------------------------------

void Cta::shuffle_priorities() {
  for (uint32_t& p : priority_) p = 1 + random.below(1u << 20);
}

int Cta::choose() {
  if (change_one_in_ != kNever && random.one_in(change_one_in_)) shuffle_priorities();
  for (uint64_t tried = 0;;) {
    int best = -1;
    for (int w = 0; w < static_cast<int>(priority_.size()); ++w)
      if (!(tried >> w & 1) && ready_of_warp_[w] + waiting_of_warp_[w] > 0 &&
          (best < 0 || priority_[w] > priority_[best]))
        best = w;
    if (best < 0) return -1;
    const int thread = choose_of(best);
    if (thread >= 0) return thread;
    tried |= uint64_t{1} << best;
  }
}

int Cta::choose_of(int warp) {
  const int first = warp * kWarp, count = std::min(kWarp, threads() - first);
  const int start = static_cast<int>(random.below(count));
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads_[first + (start + i) % count];
    if (thread.state == Thread::State::kReady) return thread.number;
    if (thread.state == Thread::State::kWaiting && thread.condition()) {
      --waiting_of_warp_[warp];
      ++ready_of_warp_[warp];
      thread.state = Thread::State::kReady;
      return thread.number;
    }
  }
  return -1;
}

void Cta::sleep(const char* what, Site site) {
  Thread& thread = this_thread();
  thread.state = Thread::State::kAsleep;
  thread.what = what;
  thread.site = site;
  --ready_of_warp_[thread.number / kWarp];
  Fiber::pause();
}

void Cta::wake(int number) {
  threads_[number].state = Thread::State::kReady;
  ++ready_of_warp_[number / kWarp];
}

void Cta::wait_until(std::function<bool()> condition, const char* what, Site site) {
  if (condition()) return;
  Thread& thread = this_thread();
  thread.state = Thread::State::kWaiting;
  thread.what = what;
  thread.site = site;
  thread.condition = std::move(condition);
  --ready_of_warp_[thread.number / kWarp];
  ++waiting_of_warp_[thread.number / kWarp];
  Fiber::pause();  // until choose_of() found it to hold
  thread.condition = nullptr;
}

void Cta::yield() {
  shuffle_priorities();
  priority_[this_thread().number / kWarp] = 0;
  Fiber::pause();
}

void Cta::report_deadlock() {
  std::string message = "deadlock:";
  std::vector<bool> told(threads_.size());
  const char* separator = " ";
  for (const Thread& first : threads_) {
    if (told[first.number]) continue;
    const bool ended = first.state == Thread::State::kEnded;
    std::vector<int> same;
    for (const Thread& t : threads_)
      if (t.state == first.state &&
          (ended || (t.site == first.site && std::strcmp(t.what, first.what) == 0))) {
        same.push_back(t.number);
        told[t.number] = true;
      }
    message +=
        separator + ranges(same) +
        (ended ? " ended" : std::string(" at ") + first.what + " (" + first.site.str() + ")");
    separator = "; ";
  }
  throw Violation{message};
}

// -- where threads meet ---------------------------------------------------------------------------

Meeting& Cta::warp() { return warps_[this_thread().number / kWarp]; }

Meeting& Cta::warp_group() { return warp_groups_[this_thread().number / (4 * kWarp)]; }

Barrier& Cta::barrier(int number, const char* what, Site site) {
  if (number < 0 || number >= Barrier::kCount)
    violate(what, site, "a CTA has barriers 0 to 15 (got " + std::to_string(number) + ")");
  return barriers_[number];
}

}  // namespace tetris::cuda::emulator
