#include "cuda_emulator/cta.h"

#include <algorithm>
#include <numeric>
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

uint32_t lane(int thread) { return uint32_t{1} << thread % kWarp; }

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
      warp_states_((threads + kWarp - 1) / kWarp),
      order_(warp_states_.size()),
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
    wake(i);
  }
  std::iota(order_.begin(), order_.end(), 0);
  // Warps that all advance at one pace hide a missing barrier before a buffer is filled again, so
  // that some must run ahead: the order of warps changes at each step, now and then, or never.
  constexpr uint32_t kPaces[] = {1, 100, 1000, kNever, kNever};
  change_one_in_ = kPaces[random.below(5)];
  constexpr uint32_t kActionPaces[] = {1, 8, 64, kNever};
  act_one_in_ = options().landing == Landing::kAtOnce   ? 1
                : options().landing == Landing::kLatest ? kNever
                                                        : kActionPaces[random.below(4)];
  shuffle_order();
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
  warp_of(thread.number).ready &= ~lane(thread.number);
  --alive_;
  warps_[thread.number / kWarp].thread_ended(thread.number);
  warp_groups_[thread.number / (4 * kWarp)].thread_ended(thread.number);
  for (Barrier& barrier : barriers_) barrier.thread_ended(alive_);
}

// -- who runs next --------------------------------------------------------------------------------

void Cta::shuffle_order() {
  for (size_t i = order_.size(); i-- > 1;)
    std::swap(order_[i], order_[random.below(static_cast<uint32_t>(i + 1))]);
}

// NOTE: this runs at each switch of threads, and was a third of all time while it searched lists.
int Cta::choose() {
  if (change_one_in_ != kNever && random.one_in(change_one_in_)) shuffle_order();
  for (int warp : order_) {
    const Warp& w = warp_states_[warp];
    if ((w.ready | w.waiting) == 0) continue;
    const int thread = choose_of(warp);
    if (thread >= 0) return thread;
  }
  return -1;
}

int Cta::choose_of(int warp) {
  Warp& w = warp_states_[warp];
  const uint32_t start = random.below(kWarp);
  const auto rotated = [&](uint32_t bits) {
    return bits >> start | static_cast<uint32_t>(uint64_t{bits} << (kWarp - start));
  };
  for (uint32_t left = rotated(w.ready | w.waiting); left != 0; left &= left - 1) {
    const int lane_number = static_cast<int>((start + __builtin_ctz(left)) % kWarp);
    Thread& thread = threads_[warp * kWarp + lane_number];
    if (thread.state == Thread::State::kReady) return thread.number;
    if (thread.condition()) {
      w.waiting &= ~lane(lane_number);
      wake(thread.number);
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
  warp_of(thread.number).ready &= ~lane(thread.number);
  Fiber::pause();
}

void Cta::wake(int number) {
  threads_[number].state = Thread::State::kReady;
  warp_of(number).ready |= lane(number);
}

void Cta::wait_until(std::function<bool()> condition, const char* what, Site site) {
  if (condition()) return;
  Thread& thread = this_thread();
  thread.state = Thread::State::kWaiting;
  thread.what = what;
  thread.site = site;
  thread.condition = std::move(condition);
  warp_of(thread.number).ready &= ~lane(thread.number);
  warp_of(thread.number).waiting |= lane(thread.number);
  Fiber::pause();  // until choose_of() found it to hold
  thread.condition = nullptr;
}

void Cta::yield() {
  shuffle_order();
  const int warp = this_thread().number / kWarp;
  std::swap(*std::find(order_.begin(), order_.end(), warp), order_.back());
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
