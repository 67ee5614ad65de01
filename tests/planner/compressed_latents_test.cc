#include "planner/engines/compressed_latents.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "planner/model/catalogue.h"
#include "planner/plan/plan.h"
#include "planner/render/render_flags.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;

std::unique_ptr<KvSizer> Sizer(Engine engine, const char* model, int batched = 8192) {
  EngineOptions options;
  options.engine = engine;
  options.max_batched_tokens = batched;
  auto sizer = MakeCompressedLatentSizer(options, GroupLayers(*FindModel(model)), CompressedLatentPair());
  EXPECT_TRUE(sizer.ok()) << sizer.status();
  return *std::move(sizer);
}

int64_t All(const KvBytes& bytes) { return bytes.Cache() + bytes.recurrent; }

// vLLM 0.22 said of DeepSeek-V4-Flash with steps of 16384 tokens (vllm-project/vllm #44376): 30000 tokens
// need 6.66 GiB, and 5.44 GiB hold 13528 tokens. Its blocks were of 22 x (37440 + 8640 + 1728) = 1,051,776
// bytes, the largest group padded to 22 repeats; both sentences then mean 6800 and 5554 blocks. Since 0.33
// that group is not padded: 21 x (37440 + 8640) + 20 x 1728 = 1,002,240.
TEST(CompressedLatents, VllmBlocksOfARequestAreThoseOfItsLog) {
  const auto sizer = Sizer(Engine::kVllm, "deepseek-v4-flash", 16384);
  constexpr int64_t kBlock = 1'002'240, kOldBlock = 1'051'776;
  EXPECT_EQ(All(sizer->Bytes({30000, 1, 0})), 6800 * kBlock);
  EXPECT_NEAR(6800.0 * kOldBlock / kGiB, 6.66, 0.005);
  EXPECT_EQ(All(sizer->Bytes({13528, 1, 0})), 5554 * kBlock);
  EXPECT_NEAR(5554.0 * kOldBlock / kGiB, 5.44, 0.005);
}

// vllm-project/vllm #51454: 8 x B200, version 0.25, 1M tokens, steps of 8192: 20.43 at once under tensor
// parallelism. 7450 blocks are 7.30 GiB there; 95 % of 178.35 GiB less an eighth of the weights hold 20.
TEST(CompressedLatents, VllmAtAMillionTokens) {
  const KvBytes bytes = Sizer(Engine::kVllm, "deepseek-v4-flash")->Bytes({1048576, 1, 0});
  EXPECT_EQ(All(bytes), int64_t{7450} * 1'002'240);
  // Requests are independent, a common prefix is kept once in what keeps all tokens.
  const auto sizer = Sizer(Engine::kVllm, "deepseek-v4-flash");
  EXPECT_EQ(All(sizer->Bytes({65536, 3, 0})), 3 * All(sizer->Bytes({65536, 1, 0})));
  EXPECT_EQ(All(sizer->Bytes({65536, 3, 0})) - All(sizer->Bytes({65536, 3, 1024})), 2 * 4 * 1'002'240);
}

// SGLang 0.5.23, model_executor/pool_configurator.py (DSV4PoolConfigurator), by hand: a page of 256 tokens
// takes 37440 + 64 x 132 bytes in each of 21 layers and 1728 in each of 20.
TEST(CompressedLatents, SglangPagesByHand) {
  const auto sizer = Sizer(Engine::kSglang, "deepseek-v4-flash");
  const KvBytes one = sizer->Bytes({1048576, 1, 0});
  EXPECT_EQ(one.latent, int64_t{4096} * (21 * (37440 + 64 * 132) + 20 * 1728));
  // Windows: 1 x (128 + 128 + 512) + 2 x 8192 + 256 + 4 x (128 + 256), up to pages; a page is 149760 bytes.
  const int64_t window_tokens = 18944;
  EXPECT_EQ(one.sliding, window_tokens / 256 * 149760 * 43);
  // States: 8 rows a page of 4 x (512 + 128) f32 in 21 layers; (1 + 1) x 128 + 129 rows, up to 128, of 2 x
  // 512 f32 in 20.
  EXPECT_EQ(one.recurrent, window_tokens / 256 * 8 * 4 * 640 * 4 * 21 + int64_t{512} * 1024 * 4 * 20);
}

TEST(CompressedLatents, OtherFormatsAndEnginesAreRefusedByName) {
  const std::vector<LayerGroup> groups = GroupLayers(*FindModel("deepseek-v4-pro"));
  EXPECT_TRUE(HasCompressedLatents(groups));
  EXPECT_FALSE(HasCompressedLatents(GroupLayers(*FindModel("deepseek-v3"))));
  EngineOptions options;
  options.engine = Engine::kVllm;
  EXPECT_THAT(std::string(MakeCompressedLatentSizer(options, groups, {"f16", "none"}).status().message()),
              HasSubstr("only fp8/none"));
  options.engine = Engine::kKvtide;
  EXPECT_THAT(std::string(MakeCompressedLatentSizer(options, groups, {"fp8", "none"}).status().message()),
              HasSubstr("llama.cpp, vllm, sglang"));
}

// The engine leaves no choice: its format is chosen, and the answer says why.
TEST(CompressedLatents, APlanTakesTheOnlyFormat) {
  for (const Engine engine : {Engine::kVllm, Engine::kSglang}) {
    PlanRequest request;
    request.model = *FindModel("deepseek-v4-flash");
    request.weights = {150 * kGiB, Provenance::kExact, "test"};
    request.device = *ParseDevice("8xB200");
    request.engine.engine = engine;
    request.engine.max_batched_tokens = 8192;
    request.workload.contexts = {1048576};
    request.workload.concurrency = 4;
    const auto plan = MakePlan(request);
    ASSERT_TRUE(plan.ok()) << plan.status();
    const ContextPlan& context = plan->contexts[0];
    ASSERT_EQ(context.candidates.size(), 1u);
    EXPECT_EQ(context.chosen, 0) << context.reason;
    EXPECT_TRUE(context.candidates[0].harm.own_format);
    EXPECT_THAT(context.reason, HasSubstr("the only format"));
    EXPECT_THAT(plan->notes, Contains(HasSubstr("584 bytes")));
    EXPECT_THAT(engine == Engine::kVllm ? *RenderVllmArgs(request, *plan) : *RenderSglangArgs(request, *plan),
                HasSubstr(engine == Engine::kVllm ? "--block-size 256" : "--page-size 256"));
    EXPECT_GE(context.candidates[0].max_concurrency, engine == Engine::kVllm ? 19 : 25);
    EXPECT_LE(context.candidates[0].max_concurrency, engine == Engine::kVllm ? 22 : 40);
  }
}

}  // namespace
}  // namespace kvtide::planner
