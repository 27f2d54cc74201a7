// The choice of a kernel: pure, so no GPU and no emulation either.
#include "cuda/config.h"

#include <gtest/gtest.h>

#include "cuda/pack.h"
#include "cuda/run.h"

namespace tetris::cuda {
namespace {

const DeviceInfo kH200{"NVIDIA H200", 9, 0, 132, 227 << 10, 50 << 20};
const DeviceInfo kA100{"NVIDIA A100", 8, 0, 108, 163 << 10, 40 << 20};
const DeviceInfo kT4{"Tesla T4", 7, 5, 40, 64 << 10, 4 << 20};

// tokens x features, contiguous; memory is never read.
Product product(int tokens, int rows, int cols, int height, int width, double density,
                DType dtype = DType::kBFloat16) {
  Product p;
  p.w.rows = rows;
  p.w.cols = cols;
  p.w.height = height;
  p.w.width = width;
  p.w.nnzb = int64_t(density * double(p.w.block_rows() * p.w.col_groups()));
  p.geometry.source_w = p.geometry.result_w = tokens;
  p.x_strides = {0, cols, 1};
  p.y_strides = {0, rows, 1};
  p.dtype = dtype;
  return p;
}

SampledProduct sampled(int tokens, int rows, int cols, int height, int width, double density) {
  const Product p = product(tokens, rows, cols, height, width, density);
  SampledProduct s;
  s.w = p.w;
  s.geometry = p.geometry;
  s.x_strides = p.x_strides;
  s.dy_strides = p.y_strides;
  s.dtype = p.dtype;
  return s;
}

const int32_t kPerm[1] = {0};

TEST(SelectConfig, TensorCoresWhereTheyApply) {
  const Product tall = product(4096, 4096, 4096, 128, 16, 0.1);
  EXPECT_EQ(Family::kHopper, select_config(tall, kH200).family);
  EXPECT_EQ(Family::kMma, select_config(tall, kA100).family);
  EXPECT_EQ(Family::kSimt, select_config(tall, kT4).family);
  EXPECT_EQ(Family::kMma, select_config(product(4096, 4096, 4096, 16, 16, 0.1), kH200).family);
}

TEST(SelectConfig, OrdinaryCoresForTheRest) {
  for (const DeviceInfo& device : {kH200, kA100}) {
    EXPECT_EQ(Family::kSimt, select_config(product(4096, 4096, 4096, 4, 1, 0.1), device).family);
    EXPECT_EQ(
        Family::kSimt,
        select_config(product(4096, 4096, 4096, 64, 16, 0.1, DType::kFloat32), device).family);
    EXPECT_EQ(
        Family::kSimt,
        select_config(product(4096, 4096, 4096, 64, 16, 0.1, DType::kFloat64), device).family);
  }
}

TEST(SelectConfig, Tf32OnlyWhereAllowed) {
  Product p = product(4096, 4096, 4096, 64, 16, 0.1, DType::kFloat32);
  EXPECT_EQ("mma: float32 needs allow_tf32", refusal(Family::kMma, p, kA100));
  p.allow_tf32 = true;
  EXPECT_EQ("", refusal(Family::kMma, p, kA100));
  EXPECT_EQ(Family::kMma, select_config(p, kA100).family);
}

TEST(SelectConfig, FewTokensAreBoundByValues) {
  for (const int tokens : {1, 4}) {
    EXPECT_EQ(Family::kSkinny,
              select_config(product(tokens, 4096, 4096, 16, 16, 0.1), kH200).family)
        << tokens;
    EXPECT_EQ(Family::kSkinny, select_config(product(tokens, 4096, 4096, 4, 1, 0.1), kH200).family)
        << tokens;
  }
  EXPECT_NE(Family::kSkinny, select_config(product(4096, 4096, 4096, 16, 16, 0.1), kH200).family);
}

TEST(SelectConfig, PermutationsArePackedForTensorCoresIfThatPays) {
  Product p = product(4096, 4096, 4096, 128, 16, 0.1);
  p.row_perm = p.col_perm = kPerm;
  EXPECT_EQ(Family::kHopper, select_config(p, kH200).family);
  // Almost nothing stored: two passes over everything would take longer than the product.
  Product little = product(4096, 8192, 8192, 64, 16, 0.0001);
  little.row_perm = little.col_perm = kPerm;
  EXPECT_EQ(Family::kSimt, select_config(little, kH200).family);
}

TEST(SelectConfig, SampledProducts) {
  const SampledProduct p = sampled(4096, 4096, 4096, 64, 16, 0.1);
  EXPECT_EQ(Family::kMma, select_config(p, kH200).family);
  EXPECT_EQ(Family::kSimt, select_config(sampled(4096, 4096, 4096, 4, 1, 0.1), kH200).family);
  // A small layer with many tokens is split, unless the order of sums matters.
  const SampledProduct small = sampled(1 << 20, 128, 128, 64, 16, 1.0);
  EXPECT_GT(select_config(small, kH200).splits, 1);
  EXPECT_EQ(1, select_config(small, kH200, /*deterministic=*/true).splits);
  EXPECT_EQ(1, choose(small, kH200, /*deterministic=*/true).config.splits);
}

TEST(Refusal, SaysWhy) {
  const Product p = product(64, 256, 256, 64, 16, 0.5);
  EXPECT_EQ("", refusal(Family::kHopper, p, kH200));
  EXPECT_NE(std::string::npos, refusal(Family::kHopper, p, kA100).find("9.0"));
  EXPECT_NE(std::string::npos, refusal(Family::kMma, p, kT4).find("8.0"));
  EXPECT_NE("", refusal(Family::kHopper, product(64, 256, 256, 32, 16, 0.5), kH200));
  EXPECT_NE("", refusal(Family::kMma, product(64, 256, 256, 4, 16, 0.5), kH200));
  EXPECT_NE("", refusal(Family::kSkinny, product(1, 8, 8, 4, 1, 0.5, DType::kFloat64), kH200));
  EXPECT_NE("", refusal(Family::kSkinny, sampled(1, 8, 8, 4, 1, 0.5), kH200));
  EXPECT_NE("", refusal(Family::kHopper, sampled(64, 256, 256, 64, 16, 0.5), kH200));
  for (const DeviceInfo& device : {kH200, kA100, kT4})
    EXPECT_EQ("", refusal(Family::kSimt, product(1, 3, 5, 1, 1, 0.5, DType::kFloat64), device));
}

TEST(Choice, GpusWithoutMachineCode) {
  EXPECT_EQ("", choose(product(64, 256, 256, 4, 1, 0.5), kA100).error);
  EXPECT_EQ("CUDA kernels need compute capability 8.0 (this GPU has 7.5)",
            choose(product(64, 256, 256, 4, 1, 0.5), kT4).error);
  EXPECT_NE("", choose(sampled(64, 256, 256, 4, 1, 0.5), kT4, false).error);
}

TEST(Packing, OnlyWhatIsOutOfOrder) {
  Product p = product(64, 256, 256, 64, 16, 0.5);
  EXPECT_FALSE(packing_of(p).x || packing_of(p).y);
  p.col_perm = kPerm;
  EXPECT_TRUE(packing_of(p).x && !packing_of(p).y);
  p = product(64, 250, 256, 64, 16, 0.5);  // rows of y are not whole chunks
  EXPECT_TRUE(packing_of(p).y && !packing_of(p).x);
  p = product(64, 256, 256, 64, 16, 0.5);
  p.x = reinterpret_cast<const void*>(8);  // not at a multiple of 16 bytes
  EXPECT_TRUE(packing_of(p).x);
  p.x = nullptr;
  p.x_strides = {0, 1, 64};  // channels apart: NCHW, or x transposed
  EXPECT_TRUE(packing_of(p).x);
  const Product q = packed(p, packing_of(p));
  EXPECT_EQ(1, q.x_strides.channel);
  EXPECT_EQ(256, q.x_strides.pixel);
  EXPECT_EQ("", refusal(Family::kHopper, p, kH200));
}

TEST(Config, TextsAreParsedBack) {
  for (const DeviceInfo& device : {kH200, kA100}) {
    for (const Product& p :
         {product(4096, 8192, 8192, 128, 16, 0.1), product(1, 64, 64, 4, 1, 0.5),
          product(16, 4096, 4096, 64, 64, 0.2), product(300, 100, 90, 33, 5, 0.2)}) {
      for (const GemmConfig& c : candidates(p, device)) {
        const auto again = parse_config(to_string(c));
        ASSERT_TRUE(again) << to_string(c);
        EXPECT_EQ(c, *again) << to_string(c);
      }
    }
    for (const GemmConfig& c : candidates(sampled(4096, 4096, 4096, 64, 16, 0.1), device))
      EXPECT_EQ(c, *parse_config(to_string(c))) << to_string(c);
  }
  for (const char* text :
       {"", "cublas", "mma 128", "mma 128x", "mma 0x16", "mma -1x16", "mma 4 stage",
        "mma 128x128 four stages", "mma 99999999999 stages", "simt by column"})
    EXPECT_FALSE(parse_config(text)) << text;
}

TEST(Candidates, BeginWithTheChoiceAndNeverRepeat) {
  const Product p = product(4096, 4096, 4096, 128, 16, 0.1);
  const auto all = candidates(p, kH200);
  for (size_t i = 0; i < all.size(); ++i) {
    EXPECT_EQ("", refusal(all[i].family, p, kH200));
    for (size_t j = 0; j < i; ++j) EXPECT_FALSE(all[i] == all[j]);
  }
  EXPECT_NE(all.end(), std::find(all.begin(), all.end(), select_config(p, kH200)));
}

TEST(ProblemKey, TellsWhatMatters) {
  const Product p = product(4000, 4096, 4096, 64, 16, 0.1);
  EXPECT_EQ("product bfloat16 4096x4096 blocks 64x16 pixels 2^12 stored 2^21", problem_key(p));
  EXPECT_EQ(problem_key(p), problem_key(product(4096, 4096, 4096, 64, 16, 0.11)));
  Product other = p;
  other.row_perm = kPerm;
  EXPECT_EQ(problem_key(p) + " packs y", problem_key(other));
  other = p;
  other.w.transposed = true;
  EXPECT_NE(problem_key(p), problem_key(other));
  EXPECT_NE(problem_key(p), problem_key(product(4096, 4096, 4096, 16, 16, 0.1)));
  EXPECT_NE(problem_key(p), problem_key(sampled(4000, 4096, 4096, 64, 16, 0.1)));
}

TEST(Choose, ForcedThenMeasuredThenGuessed) {
  const Product p = product(4096, 4096, 4096, 64, 16, 0.1);
  EXPECT_EQ(select_config(p, kA100), choose(p, kA100).config);

  const GemmConfig measured = *parse_config("mma 64x128 4 stages");
  set_measured(kA100.name, {{problem_key(p), measured}});
  EXPECT_EQ(measured, choose(p, kA100).config);
  EXPECT_EQ(select_config(p, kH200), choose(p, kH200).config);  // another device
  // What cannot run is passed over: a file may come from a build with other kernels.
  set_measured(kA100.name, {{problem_key(p), *parse_config("hopper 64x256 4 stages")}});
  EXPECT_EQ(select_config(p, kA100), choose(p, kA100).config);

  EXPECT_EQ("", force_kernel("simt"));
  EXPECT_EQ("simt", forced_kernel());
  EXPECT_EQ(Family::kSimt, choose(p, kA100).config.family);
  EXPECT_EQ("", force_kernel("mma 64x128 3 stages"));
  EXPECT_EQ(3, choose(p, kA100).config.stages);
  EXPECT_EQ("", force_kernel("hopper"));
  EXPECT_NE(std::string::npos, choose(p, kA100).error.find("TETRIS_CUDA_KERNEL=hopper cannot: "));
  EXPECT_NE("", force_kernel("fastest"));
  EXPECT_EQ("", force_kernel(""));
  set_measured(kA100.name, {});
  EXPECT_EQ(select_config(p, kA100), choose(p, kA100).config);
}

TEST(KernelName, SaysEverything) {
  Product p = product(64, 256, 256, 64, 16, 0.5);
  EXPECT_EQ("bsmm_bf16_64x256__sm80", kernel_name(p, *parse_config("mma 64x256 3 stages")));
  p.geometry.kernel_h = p.geometry.kernel_w = 3;
  p.w.taps = 9;
  EXPECT_EQ("bsconv_bf16_64x256__sm80", kernel_name(p, *parse_config("mma 64x256 3 stages")));
  EXPECT_EQ("bsmm_grad_values_bf16_64x128_split4__sm80",
            kernel_name(sampled(64, 256, 256, 64, 16, 0.5),
                        *parse_config("mma 64x128 4 stages 4 splits")));
}

}  // namespace
}  // namespace tetris::cuda
