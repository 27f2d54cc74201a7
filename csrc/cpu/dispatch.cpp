#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "core/cpu_features.h"

namespace tetris::cpu {

namespace avx512 {
extern const KernelTable<float> kTableF32;
}
namespace avx2 {
extern const KernelTable<float> kTableF32;
}
namespace scalar {
extern const KernelTable<float> kTableF32;
extern const KernelTable<double> kTableF64;
}  // namespace scalar

namespace {

const KernelTable<float>* const kTables[] = {
// best first; the last runs anywhere
#ifdef TETRIS_WITH_AVX512
    &avx512::kTableF32,
#endif
#ifdef TETRIS_WITH_AVX2
    &avx2::kTableF32,
#endif
    &scalar::kTableF32,
};

bool supported(const KernelTable<float>& table) {
  static const unsigned have = cpu_features();
  return (table.needs & ~have) == 0;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const KernelTable<float>* select(const std::string& forced) {
  for (const auto* table : kTables) {
    if (forced.empty() ? supported(*table) : forced == table->isa) {
      if (supported(*table)) return table;
      throw std::runtime_error("TETRIS_CPU_ISA=" + forced +
                               ": this CPU does not support it (it runs " + join(isas_supported()) +
                               ")");
    }
  }
  throw std::runtime_error("TETRIS_CPU_ISA=" + forced +
                           ": no such instruction set in this build (it has " + join(isas_built()) +
                           ")");
}

std::atomic<const KernelTable<float>*> selected{nullptr};
thread_local const char* last = "";

}  // namespace

template <>
const KernelTable<float>& kernels<float>() {
  const auto* table = selected.load(std::memory_order_acquire);
  if (!table) {
    const char* env = std::getenv("TETRIS_CPU_ISA");
    const auto* choice = select(env ? env : "");
    // A force_isa on another thread meanwhile wins.
    if (selected.compare_exchange_strong(table, choice, std::memory_order_acq_rel)) table = choice;
  }
  return *table;
}

// Double precision serves gradient checks: one path, everywhere.
template <>
const KernelTable<double>& kernels<double>() {
  kernels<float>();  // a wrong TETRIS_CPU_ISA is an error here too
  return scalar::kTableF64;
}

void force_isa(const std::string& name) {
  selected.store(name.empty() ? nullptr : select(name), std::memory_order_release);
}

std::string isa_in_use() { return kernels<float>().isa; }

std::vector<std::string> isas_built() {
  std::vector<std::string> names;
  for (const auto* table : kTables) names.push_back(table->isa);
  return names;
}

std::vector<std::string> isas_supported() {
  std::vector<std::string> names;
  for (const auto* table : kTables)
    if (supported(*table)) names.push_back(table->isa);
  return names;
}

void set_last_kernel(const char* name) { last = name; }
const char* last_kernel() { return last; }

}  // namespace tetris::cpu
