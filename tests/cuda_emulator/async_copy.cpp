#include "cuda_emulator/async_copy.h"

#include <cstring>

#include "cuda_emulator/asan.h"
#include "cuda_emulator/cta.h"

namespace tetris::cuda::emulator {
namespace {

bool lands_at_once() {
  switch (options().landing) {
    case Landing::kAtOnce:
      return true;
    case Landing::kLatest:
      return false;
    case Landing::kRandom:
      break;
  }
  return this_cta().random.one_in(2);
}

}  // namespace

void AsyncCopies::Copy::land() const {
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
  std::memset(to + bytes, 0, static_cast<size_t>(size - bytes));
}

void AsyncCopies::issue(void* shared, const void* global, int size, int bytes, const char* what,
                        Site site) {
  shared_memory().address(shared, what, site, size, size);
  if (bytes < 0 || bytes > size)
    violate(what, site,
            "copies 0 to " + std::to_string(size) + " bytes (got " + std::to_string(bytes) + ")");
  if (reinterpret_cast<uintptr_t>(global) % size != 0)
    violate(what, site, "the source is not aligned to " + std::to_string(size) + " bytes");
  if (bytes > 0 && (shared_memory().contains(global) || on_a_stack(global)))
    violate(what, site, "the source is not in global memory");
  if (bytes > 0 && !permitted(global, bytes))
    violate(what, site,
            "the source's " + std::to_string(bytes) + " bytes are not all in an allocation");
  const Copy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global),
                  size, bytes};
  if (lands_at_once()) {
    copy.land();
  } else {
    std::memset(shared, kPoison, size);
    open_.push_back(copy);
  }
}

void AsyncCopies::commit() {
  committed_.push_back(std::move(open_));
  open_.clear();
}

void AsyncCopies::wait(int pending) {
  for (; static_cast<int>(committed_.size()) > pending; committed_.pop_front())
    for (const Copy& copy : committed_.front()) copy.land();
}

void AsyncCopies::land_all() {
  wait(0);
  for (const Copy& copy : open_) copy.land();
  open_.clear();
}

}  // namespace tetris::cuda::emulator
