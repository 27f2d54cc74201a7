// Arbitrary bytes as a convolution layer: the products either name a broken rule or are right, and
// touch nothing outside their arrays. Which of the two it must be is decided here, independently of
// core/check.h.
#include <cstdio>
#include <cstdlib>

#include "bytes.h"
#include "conv_problem.h"
#include "core/cpu_features.h"
#include "cpu/conv_plan.h"
#include "cpu/dispatch.h"

namespace tetris::test {
namespace {

bool valid(const ConvLayerShape& s, const Index& index) {
  const int64_t rows = s.groups * ((s.out / s.groups + s.bo - 1) / s.bo);
  const int64_t cols = s.taps() * ((s.in / s.groups + s.bi - 1) / s.bi);
  return valid_rows(index, rows, cols) && valid_permutation(index.row_perm, s.groups) &&
         valid_permutation(index.col_perm, s.groups);
}

[[noreturn]] void fail(const ConvLayerShape& s, const char* what, const std::string& detail) {
  std::fprintf(stderr, "%s: %s: %s\n", s.name().c_str(), what, detail.c_str());
  std::abort();
}

// A convolution's axis; padding grows until the kernel fits.
cpu::ConvAxis axis(Bytes& in, bool transposed) {
  const int64_t big = in.range(1, 20), kernel = in.range(1, 5), stride = in.range(1, 5);
  const int64_t dilation = in.range(1, 4);
  int64_t pad = in.range(0, 6);
  while (conv_axis(big, kernel, stride, pad, dilation).small < 1) ++pad;
  cpu::ConvAxis a = conv_axis(big, kernel, stride, pad, dilation);
  // An output_padding beyond the stride, which leaves pixels that no input reaches.
  if (transposed && dilation > stride && a.small > 1 && in.next() % 2) --a.small;
  return a;
}

void fuzz(Bytes in) {
  const auto isas = cpu::isas_supported();
  cpu::force_isa(isas[in.next() % isas.size()]);
  // Caches so small that even these maps are cut into strips.
  assume_cache_bytes(1024, in.next() * 256);
  const int flags = in.next(), more = in.next();
  cpu::force_taps(more & 32 ? cpu::Taps::kApart : cpu::Taps::kByCost);
  ConvLayerShape s{};
  s.transposed = flags & 1;
  s.in_channels_last = flags & 2;
  s.out_channels_last = flags & 4;
  s.row_perm = flags & 8;
  s.col_perm = flags & 16;
  s.bias = flags & 32;
  s.residual = flags & 64;
  s.images = in.range(0, 3);
  s.groups = more & 1 ? in.range(1, 5) : 1;
  s.in = s.groups * in.range(1, 20);
  s.out = s.groups * in.range(1, 40);
  s.y = axis(in, s.transposed);
  s.x = axis(in, s.transposed);
  // Small blocks for the most part.
  s.bo = more & 2 ? in.range(1, 128) : in.range(1, 8);
  s.bi = more & 4 ? in.range(1, 128) : in.range(1, 4);
  s.density = in.range(0, 10) / 10.0;
  std::mt19937 rng(in.next());
  Index index = random_index(s, rng);
  edit(index, in);
  const bool good = valid(s, index);
  const Place place = more & 8    ? Place::kHeap
                      : more & 16 ? Place::kAfterGuard
                                  : Place::kBeforeGuard;
  ConvProblem<float> p(s, index, rng, place);
  if (good) p.poison_padding();
  poison_scratch<float>();

  Guarded<float> y(p.dy.size(), place), dx(p.x.size(), place), dvalues(p.values.size(), place);
  for (auto* out : {&y, &dx, &dvalues})
    for (auto& v : *out) v = ConvProblem<float>::kNan;
  // One after the other, but split as for so many threads.
  const cpu::Parallel parallel{1 + in.next() % 20,
                               [](int count, const std::function<void(int)>& fn) {
                                 for (int i = 0; i < count; ++i) fn(i);
                               }};
  const std::string errors[] = {p.forward(y.data(), Activation::kNone, parallel),
                                p.grad_input(dx.data(), parallel),
                                p.grad_values(dvalues.data(), parallel)};
  for (const auto& error : errors)
    if (error.empty() != good)
      fail(s, good ? "a good index was refused" : "a bad index was accepted", error);
  if (!good) return;
  const auto check = [&](const char* what, const Guarded<float>& got, const auto& want,
                         int64_t terms) {
    const int64_t wrong = first_wrong(got.data(), got.size(), 1, got.size(), want, terms);
    if (wrong >= 0) fail(s, what, "element " + std::to_string(wrong) + " is wrong");
  };
  const auto want = p.products();
  check("y", y, want.y, p.out_terms());
  check("dx", dx, want.dx, p.in_terms());
  check("dvalues", dvalues, want.dvalues, p.values_terms());
}

}  // namespace
}  // namespace tetris::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  tetris::test::fuzz(tetris::test::Bytes(data, size));
  return 0;
}
