// Arbitrary bytes as a layer: the products either name a broken rule or are right, and touch
// nothing outside their arrays. Which of the two it must be is decided here, independently of
// core/check.h.
#include <cstdio>
#include <cstdlib>

#include "bytes.h"
#include "core/cpu_features.h"
#include "cpu/bsmm.h"
#include "cpu/dispatch.h"

namespace tetris::test {
namespace {

bool valid(const Shape& s, const Index& index) {
  return valid_rows(index, (s.n + s.bo - 1) / s.bo, (s.k + s.bi - 1) / s.bi) &&
         valid_permutation(index.row_perm) && valid_permutation(index.col_perm);
}

[[noreturn]] void fail(const Shape& s, const char* what, const std::string& detail) {
  std::fprintf(stderr, "%s: %s: %s\n", s.name().c_str(), what, detail.c_str());
  std::abort();
}

void fuzz(Bytes in) {
  const auto isas = cpu::isas_supported();
  cpu::force_isa(isas[in.next() % isas.size()]);
  // Caches so small that slabs of inputs are cut.
  const long caches = in.next();
  assume_cache_bytes((caches & 15) * 256, (caches >> 4) * 2048);
  Shape s{};
  s.m = in.range(0, 40);
  s.n = in.range(1, 70);
  s.k = in.range(1, 70);
  // Small blocks for the most part.
  const int flags = in.next();
  s.bo = flags & 1 ? in.range(1, 128) : in.range(1, 8);
  s.bi = flags & 2 ? in.range(1, 128) : in.range(1, 4);
  s.row_perm = flags & 4;
  s.col_perm = flags & 8;
  s.bias = flags & 16;
  s.density = in.range(0, 10) / 10.0;
  std::mt19937 rng(in.next());
  Index index = random_index(s, rng);
  edit(index, in);
  const bool good = valid(s, index);
  const Place place = flags & 32   ? Place::kHeap
                      : flags & 64 ? Place::kAfterGuard
                                   : Place::kBeforeGuard;
  const int64_t gap = in.range(0, 2);
  Problem<float> p(s, index, rng, place, gap);
  if (good) p.poison_padding();

  constexpr float kNan = Problem<float>::kNan;
  Guarded<float> y(p.x.size() ? Problem<float>::matrix_size(s.m, s.n, s.n + gap) : 0, place);
  Guarded<float> dx(Problem<float>::matrix_size(s.m, s.k, s.k + gap), place),
      dv(p.values.size(), place);
  for (auto* out : {&y, &dx, &dv})
    for (auto& v : *out) v = kNan;
  // One after the other, but split as for so many threads.
  const cpu::Parallel parallel{1 + in.next() % 20,
                               [](int count, const std::function<void(int)>& fn) {
                                 for (int i = 0; i < count; ++i) fn(i);
                               }};
  const std::string errors[] = {
      cpu::bsmm_forward<float>(p.view, p.values.data(), {p.x.data(), p.ldx}, s.m,
                               s.bias ? p.bias.data() : nullptr, Activation::kNone,
                               {y.data(), s.n + gap}, parallel),
      cpu::bsmm_grad_input<float>(p.view, p.values.data(), {p.dy.data(), p.ldg}, s.m,
                                  {dx.data(), s.k + gap}, parallel),
      cpu::bsmm_grad_values<float>(p.view, {p.x.data(), p.ldx}, {p.dy.data(), p.ldg}, s.m,
                                   dv.data(), parallel)};
  for (const auto& error : errors)
    if (error.empty() != good)
      fail(s, good ? "a good index was refused" : "a bad index was accepted", error);
  if (!good) return;
  const auto check = [&](const char* what, int64_t wrong) {
    if (wrong >= 0) fail(s, what, "element " + std::to_string(wrong) + " is wrong");
  };
  check("y", first_wrong(y.data(), s.n + gap, s.m, s.n, p.forward(), s.k));
  check("dx", first_wrong(dx.data(), s.k + gap, s.m, s.k, p.grad_input(), s.n));
  check("dvalues", first_wrong(dv.data(), dv.size(), 1, dv.size(), p.grad_values(), s.m));
}

}  // namespace
}  // namespace tetris::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  tetris::test::fuzz(tetris::test::Bytes(data, size));
  return 0;
}
