#include "planner/render/render.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "absl/strings/str_split.h"
#include "planner/csv.h"
#include "planner/model/catalogue.h"
#include "planner/model/weight_size.h"
#include "planner/render/plot.h"
#include "planner/render/render_flags.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using Json = nlohmann::json;

PlanRequest Request(Engine engine) {
  PlanRequest request;
  request.model = *FindModel("gemma-4-26b-a4b");
  request.device = *ParseDevice("RTX 5080,host=32GiB");
  request.engine.engine = engine;
  request.weights = *EstimateWeights(request.model, "q4_0");
  request.workload.contexts = {8192, 32768};
  return request;
}

Plan Make(const PlanRequest& request) { return *MakePlan(request); }

TEST(Render, JsonFollowsItsSchemaInBytes) {
  const PlanRequest request = Request(Engine::kLlamaCpp);
  const Json json = Json::parse(RenderJson(request, Make(request)));
  EXPECT_EQ(json["schema"], "kvtide.plan/1");
  EXPECT_EQ(json["verdict"], "fits");
  EXPECT_EQ(json["device"]["usable_bytes"], 16303 * kMiB);
  ASSERT_EQ(json["contexts"].size(), 2u);
  const Json& context = json["contexts"][1];
  EXPECT_EQ(context["chosen"], "f16/f16");
  const Json& pair = context["pairs"][0];
  EXPECT_EQ(pair["kv_bytes"], 940 * kMiB);
  int64_t sum = 0;
  for (const Json& item : pair["items"]) sum += item["bytes"].get<int64_t>();
  EXPECT_EQ(sum, pair["total_bytes"]);
  EXPECT_EQ(pair["harm"]["ppl_change_percent"], 0);
  bool unmeasured = false;
  for (const Json& other : context["pairs"])
    unmeasured |= other["harm"].is_null() && other["rejection"] == "unmeasured";
  EXPECT_TRUE(unmeasured || !BuiltInQuality().empty());
}

TEST(Render, CsvHasOneLinePerContextAndPair) {
  const PlanRequest request = Request(Engine::kKvtide);
  const Plan plan = Make(request);
  const auto rows =
      ParseCsv(RenderCsv(request, plan), "out", {"context", "pair", "kv_bytes", "tokens_per_s"});
  ASSERT_TRUE(rows.ok()) << rows.status();
  EXPECT_EQ(rows->size(), 2 * plan.contexts[0].candidates.size());
}

TEST(Render, TableShowsTheChoiceAndColoursOnlyWhenAsked) {
  PlanRequest request = Request(Engine::kLlamaCpp);
  request.engine.build = "auto";  // the forks that others write about too
  const Plan plan = Make(request);
  const std::string plain = RenderTable(request, plan, {false, true});
  EXPECT_THAT(plain, HasSubstr("native, pairquant"));
  EXPECT_THAT(plain, HasSubstr("> f16/f16"));
  EXPECT_THAT(plain, HasSubstr("KV, sliding window"));
  EXPECT_THAT(plain, HasSubstr("calibrated"));
  EXPECT_THAT(plain, HasSubstr("is the only pair that fits"));  // the claim, with its check
  EXPECT_THAT(plain, Not(HasSubstr("\x1b[")));
  EXPECT_THAT(RenderTable(request, plan, {true, true}), HasSubstr("\x1b[32m"));
}

TEST(Render, TheShortTableSumsUpAndHidesWhatCannotBeChosen) {
  const PlanRequest request = Request(Engine::kLlamaCpp);
  const Plan plan = Make(request);
  const std::string brief = RenderTable(request, plan, {false, false});
  EXPECT_THAT(brief, HasSubstr("verdict"));  // the summary of two contexts
  EXPECT_THAT(brief, HasSubstr("> f16/f16"));
  EXPECT_THAT(brief, HasSubstr("--all"));
  EXPECT_THAT(brief, Not(HasSubstr("claim (")));
  EXPECT_LT(brief.size(), RenderTable(request, plan, {false, true}).size() / 2);
}

// A pair that only the tolerant of two models measured does not look better than one that both did.
TEST(Render, WhatAPairIsExpectedToCostIsShownAndDecidesWhatIsWorthARow) {
  PlanRequest request = Request(Engine::kKvtide);
  request.model = *FindModel("llama-3.1-8b");
  request.weights = *EstimateWeights(request.model, "q4_0");
  request.quality = *ParseQualityCsv(
      "model,text,tokens,context,pair_k,pair_v,window_policy,ppl_change_percent,version\n"
      "tidelm-7m,t,1,4096,turbo4,turbo4,default,.1,v\n"
      "tidelm-7m,t,1,4096,turbo3,turbo3,default,.4,v\n"
      "tidelm-7m,t,1,4096,iso4,iso4,default,.2,v\n"
      "smollm2-135m,t,1,4096,turbo4,turbo4,default,.5,v\n"
      "smollm2-135m,t,1,4096,turbo3,turbo3,default,2,v\n",
      "q.csv");
  const Plan plan = Make(request);
  EXPECT_THAT(RenderTable(request, plan, {false, true}), HasSubstr("~+1.00% SmolLM2-135M"));
  const std::string brief = RenderTable(request, plan, {false, false});
  EXPECT_THAT(brief, HasSubstr("turbo4/turbo4"));
  EXPECT_THAT(brief, Not(HasSubstr("iso4/iso4")));  // as large as turbo4/turbo4, and worse
}

TEST(Render, LlamaArgsAreUsableAsTheyStand) {
  PlanRequest request = Request(Engine::kLlamaCpp);
  EXPECT_EQ(*RenderLlamaArgs(request, Make(request)),
            "-c 32768 -np 1 -ngl 999 -ctk f16 -ctv f16 -fa on -ub 512 -fit off\n");
  request.workload.concurrency = 2;
  EXPECT_THAT(*RenderLlamaArgs(request, Make(request)), HasSubstr("-c 65536 -np 2"));
  request.workload.contexts = {262144};
  const Plan split = Make(request);
  ASSERT_EQ(split.verdict, Verdict::kFitsWithTiers) << split.contexts[0].reason;
  EXPECT_THAT(*RenderLlamaArgs(request, split),
              Not(HasSubstr("-ngl 999 -ctk f16 -ctv f16 -fa on -ub 512 -fit")));
}

TEST(Render, VllmArgs) {
  PlanRequest request = Request(Engine::kVllm);
  request.device = *ParseDevice("RTX 4090,count=2");
  const auto args = RenderVllmArgs(request, Make(request));
  ASSERT_TRUE(args.ok()) << args.status();
  EXPECT_THAT(*args, HasSubstr("--max-model-len 32768"));
  EXPECT_THAT(*args, HasSubstr("--kv-cache-dtype auto --tensor-parallel-size 2"));
}

TEST(Render, KvtidedConfigGivesTheTierAllThatIsLeft) {
  PlanRequest request = Request(Engine::kKvtide);
  request.device = *ParseDevice("RTX 4090,host=32GiB");
  const Plan plan = Make(request);
  const auto config = RenderKvtidedConfig(request, plan);
  ASSERT_TRUE(config.ok()) << config.status();
  const Json json = Json::parse(*config);
  const ContextPlan& context = plan.contexts[1];
  const Candidate& chosen = context.candidates[static_cast<size_t>(context.chosen)];
  const int64_t room = chosen.kv_bytes + chosen.free_bytes;
  EXPECT_EQ(json["device_tier_bytes"], room / kMiB * kMiB);
  EXPECT_EQ(json["host_tier_bytes"], 32 * kGiB);
  EXPECT_EQ(json["default_pair"], chosen.asked.Name());
  EXPECT_EQ(json["exact_window"]["last_blocks"], 2);
  // Without a host tier it says so: 0 bytes would be kvtided's default size.
  request.device.host_bytes = 0;
  const Json without = Json::parse(RenderKvtidedConfig(request, Make(request)).value());
  EXPECT_EQ(without["host_memory"], "0");
  EXPECT_FALSE(without.contains("host_tier_bytes"));
}

// The daemon's default pair is for models without a profile too.
TEST(Render, KvtidedConfigHasNoCalibratedPair) {
  PlanRequest request = Request(Engine::kKvtide);
  request.model = *FindModel("smollm2-135m");
  request.device = *ParseDevice("CPU EPYC 9654,ram=64GiB");
  request.pairs = {{"turbo4", "turbo4"}};
  request.quality = BuiltInQuality();
  EXPECT_TRUE(RenderKvtidedConfig(request, Make(request)).ok());
  request.engine.calibrated_keys = CalibratedKeys{"m.profile", "b.txt", 16384, false};
  const auto config = RenderKvtidedConfig(request, Make(request));
  EXPECT_TRUE(absl::IsInvalidArgument(config.status()));
  EXPECT_THAT(std::string(config.status().message()), HasSubstr("plan without --profile"));
}

TEST(Render, SettingsAreRefusedForPlansThatDoNotFitAndForOtherEngines) {
  PlanRequest request = Request(Engine::kLlamaCpp);
  EXPECT_TRUE(absl::IsInvalidArgument(RenderVllmArgs(request, Make(request)).status()));
  request.device = *ParseDevice("vram=2GiB");
  EXPECT_TRUE(absl::IsFailedPrecondition(RenderLlamaArgs(request, Make(request)).status()));
}

TEST(Render, PlotIsSvgWithTheLineOfTheDevice) {
  const auto svg = RenderSvg(Request(Engine::kLlamaCpp));
  ASSERT_TRUE(svg.ok()) << svg.status();
  EXPECT_THAT(*svg, HasSubstr("<svg xmlns"));
  EXPECT_THAT(*svg, HasSubstr("device 15.9 GiB"));
  EXPECT_THAT(*svg, HasSubstr("q8_0/q8_0"));
  EXPECT_THAT(*svg, Not(HasSubstr("nan")));
  EXPECT_THAT(*svg, Not(HasSubstr("inf")));
  EXPECT_EQ(std::vector<std::string>(absl::StrSplit(*svg, "</svg>")).size(), 2u);
}

TEST(Render, PlotShowsTheAskedRangeWithRoundTicksAndF16OnTop) {
  const std::string svg = *RenderSvg(Request(Engine::kLlamaCpp));  // 8192 and 32768 tokens on 16 GB
  for (const char* there : {">8K<", ">16K<", ">32K<", ">0 GiB<", ">5 GiB<", ">15 GiB<", ">f16/f16<"}) {
    EXPECT_THAT(svg, HasSubstr(there));
  }
  for (const char* not_asked : {">4K<", ">64K<", ">128K<"}) EXPECT_THAT(svg, Not(HasSubstr(not_asked)));
  EXPECT_THAT(svg, Not(HasSubstr(">bf16/bf16<"))) << "it lies on f16";
  // The first colour is that of f16, and its curve comes last.
  const size_t f16 = svg.find("stroke=\"#1b6ca8\" stroke-width"),
               next = svg.find("stroke=\"#d1495b\" stroke-width");
  EXPECT_GT(f16, next);
}

}  // namespace
}  // namespace kvtide::planner
