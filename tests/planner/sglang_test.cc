#include "planner/engines/sglang.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "planner/model/catalogue.h"
#include "planner/model/device.h"
#include "planner/plan/verify.h"
#include "planner/render/render.h"
#include "planner/render/render_flags.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;

EngineOptions Options() {
  EngineOptions options;
  options.engine = Engine::kSglang;
  return options;
}

ModelGeometry Layers(int layers, int kv_heads, int head_dim) {
  ModelGeometry model;
  model.name = "model";
  model.layers.assign(static_cast<size_t>(layers), {LayerKind::kFull, kv_heads, head_dim, head_dim});
  return model;
}

std::unique_ptr<KvSizer> Sizer(const ModelGeometry& model, const TypePair& pair,
                               const EngineOptions& options = Options()) {
  auto sizer = MakeKvSizer(options, model, GroupLayers(model), pair);
  EXPECT_TRUE(sizer.ok()) << sizer.status();
  return sizer.ok() ? *std::move(sizer) : nullptr;
}

// Pools that public start-up logs of SGLang print: tokens, and GiB of the cache on one rank.
TEST(Sglang, PoolsOfPublicLogs) {
  struct Log {
    const char* source;
    ModelGeometry rank;  // what one rank holds
    TypePair pair;
    int64_t tokens;
    double gib;
  };
  const Log logs[] = {
      {"vllm #21348: Qwen3-235B-A22B, TP 4",
       ShardHeads(*FindModel("Qwen3-235B-A22B"), 4),
       {"f16", "f16"},
       367404,
       16.46},
      {"sglang #11309: DeepSeek-V3.2, 8 ranks", *FindModel("DeepSeek-V3.2"), {"fp8", "none"}, 975424, 43.67},
      {"sglang #4826: Gemma-3-4B, not known as hybrid then",
       Layers(34, 4, 256),
       {"f16", "f16"},
       834615,
       108.24},
      {"sglang #11830: 28 layers, 4 KV heads", Layers(28, 4, 128), {"f16", "f16"}, 2243474, 119.82},
      {"sglang #11716: 80 layers, TP 8",
       ShardHeads(*FindModel("llama-3.1-70b"), 8),
       {"f16", "f16"},
       2795207,
       106.62},
      {"sglang #27537: 48 layers, TP 2",
       ShardHeads(*FindModel("qwen3-30b-a3b"), 2),
       {"f16", "f16"},
       1106304,
       50.64},
  };
  for (const Log& log : logs) {
    const auto cell = SglangCellBytes(Options(), GroupLayers(log.rank), log.pair);
    ASSERT_TRUE(cell.ok()) << log.source << cell.status();
    EXPECT_NEAR(static_cast<double>(*cell * log.tokens) / kGiB, log.gib, 0.015) << log.source;
  }
}

// sglang #18039: MiMo-V2-Flash, TP 4, --page-size 64: 375360 tokens in full layers and 0.8 times that in the
// 39 sliding ones: K 8.38 and V 5.59 GiB.
TEST(Sglang, SlidingLayersHaveAPoolOfTheirOwn) {
  EngineOptions options = Options();
  options.page_tokens = 64;
  const ModelGeometry rank = ShardHeads(*FindModel("MiMo-V2-Flash"), 4);
  const auto sizer = Sizer(rank, {"f16", "f16"}, options);
  const KvBytes bytes = sizer->Bytes({375360, 1, 0});
  EXPECT_NEAR(static_cast<double>(bytes.sliding) / kGiB, 8.38 + 5.59, 0.02);
  EXPECT_EQ(bytes.sliding, int64_t{300288} * 39 * 2 * (192 + 128) * 2);
  EXPECT_EQ(bytes.full, int64_t{375360} * 9 * 1 * (192 + 128) * 2);
  options.swa_full = true;
  EXPECT_EQ(Sizer(rank, {"f16", "f16"}, options)->Bytes({375360, 1, 0}).sliding,
            int64_t{375360} * 39 * 2 * (192 + 128) * 2);
}

TEST(Sglang, PagesPrefixesAndStates) {
  EngineOptions options = Options();
  const auto tokens = Sizer(*FindModel("llama-3.1-8b"), {"f16", "f16"});
  EXPECT_EQ(tokens->Bytes({1000, 3, 0}).Cache(), 3000 * 128 * kKiB);  // single tokens: nothing is padded
  EXPECT_EQ(tokens->Bytes({1000, 3, 500}).Cache(), 2000 * 128 * kKiB);
  options.page_tokens = 64;
  EXPECT_EQ(Sizer(*FindModel("llama-3.1-8b"), {"f16", "f16"}, options)->Bytes({1000, 3, 500}).Cache(),
            (3 * 1024 - 2 * 448) * 128 * kKiB);
  EXPECT_EQ(Sizer(*FindModel("llama-3.1-8b"), {"fp8", "fp8"})->Bytes({1000, 1, 0}).Cache(), 1000 * 64 * kKiB);
  // Qwen3-Next: 3 slots a request and one more; convolutions in 16 bits, states in f32.
  const auto next = Sizer(*FindModel("qwen3-next-80b"), {"f16", "f16"});
  const int64_t slot = 36 * (2 * 24576 + 4 * 524288);
  EXPECT_EQ(next->Bytes({4096, 2, 0}).recurrent, 7 * slot);
}

TEST(Sglang, LatentsAndIndexKeys) {
  const KvLoad load{65536, 1, 0};
  EXPECT_EQ(Sizer(*FindModel("deepseek-v3"), {"bf16", "none"})->Bytes(load).Cache(),
            int64_t{65536} * 61 * 1152);
  EXPECT_EQ(Sizer(*FindModel("deepseek-v3"), {"fp8", "none"})->Bytes(load).Cache(),
            int64_t{65536} * 61 * 576);
  EXPECT_EQ(Sizer(*FindModel("deepseek-v3.2"), {"fp8", "none"})->Bytes(load).Cache(),
            int64_t{65536} * 61 * (656 + 132));
  EXPECT_EQ(Sizer(*FindModel("glm-5.2"), {"bf16", "none"})->Bytes(load).Cache(),
            int64_t{65536} * (78 * 1152 + 21 * 132));
  EXPECT_EQ(ShardHeads(*FindModel("deepseek-v3"), 8).layers, FindModel("deepseek-v3")->layers);
  const auto v4 = MakeKvSizer(Options(), *FindModel("deepseek-v4-flash"),
                              GroupLayers(*FindModel("deepseek-v4-flash")), {"f16", "none"});
  EXPECT_EQ(v4.status().code(), absl::StatusCode::kInvalidArgument);  // compressed_latents_test.cc
}

// The reserve in MiB: 512 + 1.5 x chunk + 1024 x devices / 8 + 2 x graph batch (+ 1536 with latents), at
// least 10240 above 60 GiB.
TEST(Sglang, DefaultsFollowTheMemory) {
  const auto at = [&](int64_t mib, int devices, bool latent = false) {
    return DefaultsOfSglang(Options(), mib * kMiB, devices, latent);
  };
  EXPECT_EQ(at(15360, 1).chunked_prefill, 2048);
  EXPECT_EQ(at(24564, 1).chunked_prefill, 4096);
  EXPECT_EQ(at(24564, 4).graph_batch, 160);
  EXPECT_EQ(at(81559, 8).chunked_prefill, 8192);
  EXPECT_EQ(at(183000, 8).chunked_prefill, 16384);
  EXPECT_DOUBLE_EQ(at(24564, 1).mem_fraction_static, 0.72);   // 24564 - 6880
  EXPECT_DOUBLE_EQ(at(81559, 8).mem_fraction_static, 0.818);  // 81559 - 14848
  EXPECT_LT(at(81559, 8, true).mem_fraction_static, at(81559, 8).mem_fraction_static);
  EngineOptions options = Options();
  options.mem_fraction_static = 0.9;
  EXPECT_DOUBLE_EQ(DefaultsOfSglang(options, 80 * kGiB, 8, false).mem_fraction_static, 0.9);
}

PlanRequest Request() {
  PlanRequest request;
  request.model = *FindModel("llama-3.1-8b");
  request.weights = {16'060'000'000, Provenance::kFormula, "bf16"};
  request.device = *ParseDevice("H100");
  request.engine = Options();
  request.quality = BuiltInQuality();
  request.workload.contexts = {32768};
  request.workload.concurrency = 8;
  return request;
}

TEST(Sglang, PlansAndPrintsItsArguments) {
  const PlanRequest request = Request();
  const auto plan = MakePlan(request);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->verdict, Verdict::kFits);
  const auto args = RenderSglangArgs(request, *plan);
  ASSERT_TRUE(args.ok()) << args.status();
  for (const char* part :
       {"--context-length 32768", "--max-running-requests 8", "--kv-cache-dtype auto", "--tp-size 1",
        "--mem-fraction-static 0.8", "--page-size 1", "--chunked-prefill-size 8192"}) {
    EXPECT_THAT(*args, HasSubstr(part));
  }
  EXPECT_FALSE(RenderVllmArgs(request, *plan).ok());
}

TEST(Sglang, WhatDoesNotFitIsSaid) {
  PlanRequest request = Request();
  request.device = *ParseDevice("T4");
  const auto plan = MakePlan(request);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->verdict, Verdict::kDoesNotFit);
}

TEST(Sglang, StartUpLogsAreRead) {
  const std::string log =
      "[2026-05-01 10:00:00 TP0] Load weight begin. avail mem=78.90 GB\n"
      "[2026-05-01 10:00:09 TP0] Load weight end. elapsed=9.1 s, type=LlamaForCausalLM, avail mem=63.90 GB, "
      "mem usage=15.00 GB.\n"
      "[2026-05-01 10:00:09 TP1] Load weight end. elapsed=9.1 s, type=LlamaForCausalLM, avail mem=63.90 GB, "
      "mem usage=99.00 GB.\n"
      "[2026-05-01 10:00:10 TP0] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 400000, K size: "
      "24.41 GB, V size: 24.41 GB\n"
      "[2026-05-01 10:00:10 TP1] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 400000, K size: "
      "24.41 GB, V size: 24.41 GB\n"
      "[2026-05-01 10:00:30 TP0] Capture cuda graph end. Time elapsed: 20.1 s. mem usage=1.44 GB. avail "
      "mem=11.20 GB.\n"
      "[2026-05-01 10:00:30 TP0] max_total_num_tokens=400000, chunked_prefill_size=8192, "
      "max_prefill_tokens=16384\n";
  auto measured = ParseAnyLog(log);
  ASSERT_TRUE(measured.ok()) << measured.status();
  EXPECT_EQ(measured->kind, "sglang log");
  EXPECT_EQ(measured->bytes["weights"], 15 * kGiB);
  EXPECT_EQ(measured->pool_tokens, 400000);
  PerRequest(32768, &*measured);
  EXPECT_NEAR(static_cast<double>(measured->bytes["kv_per_request"]), 4.0 * kGiB, 0.001 * kGiB);
  const auto plan = MakePlan(Request());
  const std::vector<VerifyLine> lines = Compare(plan->contexts[0].candidates[0], std::nullopt, 8, *measured);
  EXPECT_TRUE(WithinTolerance(lines, 1)) << RenderVerify(lines, *measured);
  EXPECT_THAT(measured->notes, ::testing::Contains(HasSubstr("graphs")));
}

TEST(Sglang, UnknownTypesListTheKnown) {
  const ModelGeometry model = *FindModel("llama-3.1-8b");
  EXPECT_THAT(
      std::string(MakeKvSizer(Options(), model, GroupLayers(model), {"q8_0", "q8_0"}).status().message()),
      HasSubstr("fp8/fp8"));
}

// --max-total-tokens is the pool: what does not fit into it waits, and a sequence beyond it never runs.
TEST(Sglang, MaxTotalTokensLimitsThePool) {
  PlanRequest request = Request();
  request.workload.contexts = {32768};
  request.workload.concurrency = 8;
  request.engine.max_total_tokens = 100000;
  const auto plan = MakePlan(request);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const ContextPlan& context = plan->contexts[0];
  ASSERT_GE(context.chosen, 0);
  const Candidate& chosen = context.candidates[static_cast<size_t>(context.chosen)];
  EXPECT_FALSE(chosen.fits);
  EXPECT_EQ(context.running, 3);
  EXPECT_EQ(chosen.max_concurrency, 3);
  EXPECT_NEAR(static_cast<double>(chosen.pool_tokens), 100000, 1);
  EXPECT_NEAR(chosen.pool_concurrency, 3.05, 0.01);
  EXPECT_EQ(chosen.max_context, 12500);  // of 8 sequences
  EXPECT_EQ(chosen.pool_bytes, chosen.kv_bytes / 8 * 100000 / 32768);
  request.engine.max_total_tokens = 20000;
  const auto small = MakePlan(request);
  EXPECT_EQ(small->contexts[0].verdict, Verdict::kDoesNotFit);
  EXPECT_THAT(small->contexts[0].reason, HasSubstr("--max-total-tokens 20000 is smaller than one sequence"));
  EXPECT_THAT(RenderTable(request, *small, {}), HasSubstr("more than --max-total-tokens"));
}

TEST(Sglang, WhatTheEngineDoesIsNoted) {
  PlanRequest request = Request();
  request.model = *FindModel("gpt-oss-20b");
  const auto windows = MakePlan(request);
  EXPECT_THAT(windows->notes, ::testing::Contains(HasSubstr("--swa-full-tokens-ratio")));
  request = Request();
  request.model = *FindModel("deepseek-v3");
  request.device = *ParseDevice("8xH200");
  request.engine.max_total_tokens = 65536;
  const auto latent = MakePlan(request);
  EXPECT_THAT(latent->notes, ::testing::Contains(HasSubstr("--enable-dp-attention --dp-size 8")));
  EXPECT_THAT(latent->notes, ::testing::Contains(HasSubstr("lets 2 of 8 sequences")));
  request.engine.engine = Engine::kVllm;
  EXPECT_THAT(MakePlan(request)->notes, ::testing::Contains(HasSubstr("--data-parallel-size 8")));
  request.engine.dp_attention = true;
  EXPECT_THAT(MakePlan(request)->notes, ::testing::Not(::testing::Contains(HasSubstr("whole latent cache"))));
}

}  // namespace
}  // namespace kvtide::planner
