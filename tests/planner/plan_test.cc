// The plan as a whole: what is chosen, why the rest is not, and that nothing is hidden.
#include "planner/plan/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "planner/model/catalogue.h"
#include "planner/model/weight_size.h"
#include "planner/render/explain.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;

QualityRow Row(const char* pair, const char* window, double change) {
  QualityRow row;
  row.model = "tidelm-7m";
  row.pair = *ParsePair(pair);
  row.window_policy = window;
  row.context = 4096;
  row.ppl_change_percent = change;
  return row;
}

PlanRequest Request(const std::string& model, const std::string& device, Engine engine) {
  PlanRequest request;
  request.model = *FindModel(model);
  request.device = *ParseDevice(device);
  request.engine.engine = engine;
  request.workload.contexts = {32768};
  for (const char* window : {"none", "default"}) {
    request.quality.push_back(Row("q8_0/q8_0", window, 0.01));
    request.quality.push_back(Row("q8_0/turbo4", window, 0.1));
    request.quality.push_back(Row("turbo4/turbo4", window, 0.3));
    request.quality.push_back(Row("turbo3/turbo3", window, 0.5));
  }
  return request;
}

Plan Make(const PlanRequest& request) {
  const auto plan = MakePlan(request);
  EXPECT_TRUE(plan.ok()) << plan.status();
  return plan.ok() ? *plan : Plan{};
}

const Candidate& Find(const ContextPlan& context, const std::string& pair) {
  for (const Candidate& candidate : context.candidates) {
    if (candidate.asked.Name() == pair) return candidate;
  }
  ADD_FAILURE() << "no candidate " << pair;
  return context.candidates.front();
}

std::string Chosen(const ContextPlan& context) {
  return context.chosen < 0 ? "" : context.candidates[static_cast<size_t>(context.chosen)].asked.Name();
}

std::string Error(const PlanRequest& request) {
  const auto plan = MakePlan(request);
  return plan.ok() ? "no error" : std::string(plan.status().message());
}

TEST(Plan, SixteenGigabytesHoldGemmaInF16AndKernelsTellThePairsApart) {
  PlanRequest request = Request("gemma-4-26b-a4b", "RTX 5080", Engine::kLlamaCpp);
  request.weights = *EstimateWeights(request.model, "q4_0");
  request.engine.build = "auto";
  const Plan plan = Make(request);
  const ContextPlan& context = plan.contexts[0];
  EXPECT_EQ(context.verdict, Verdict::kFits);
  EXPECT_EQ(Chosen(context), "f16/f16");
  EXPECT_EQ(Find(context, "f16/f16").kv_bytes, 940 * kMiB);
  const Candidate &pq4 = Find(context, "q8_0/pq4"), &turbo4 = Find(context, "q8_0/turbo4");
  EXPECT_TRUE(pq4.fits);
  EXPECT_TRUE(turbo4.fits);
  EXPECT_NEAR(static_cast<double>(turbo4.kv_bytes - pq4.kv_bytes) / kMiB, 3.6, 0.1);
  EXPECT_EQ(pq4.support.level, SupportLevel::kNative);
  EXPECT_EQ(turbo4.support.level, SupportLevel::kDequantise);
  EXPECT_THAT(
      plan.notes,
      Contains(HasSubstr(
          "q8_0/pq4 and q8_0/turbo4 differ by 3.67 MiB at 32768 tokens; kernel support tells them apart")));
  // The caches of full size would turn the claim around: only turbo4/turbo4 and smaller fit.
  request.engine.swa_full = true;
  const ContextPlan full = Make(request).contexts[0];
  EXPECT_FALSE(Find(full, "f16/f16").fits);
  EXPECT_FALSE(Find(full, "q8_0/pq4").fits);
}

TEST(Plan, TwentyFourAndTwelveGigabytes) {
  PlanRequest request = Request("gemma-4-26b-a4b", "RTX 4090", Engine::kLlamaCpp);
  request.weights = *EstimateWeights(request.model, "q4_0");
  request.workload.contexts = {131072};
  EXPECT_EQ(Chosen(Make(request).contexts[0]), "f16/f16");
  request.device = *ParseDevice("RTX 4070,host=64GiB");
  const Plan small = Make(request);
  EXPECT_EQ(small.verdict, Verdict::kFitsWithTiers);  // the weights alone are too large: layers go to the CPU
  EXPECT_THAT(small.contexts[0].split->how, HasSubstr("--n-cpu-moe 14"));
}

// Experts on the CPU with an exact cache come before a coded cache, also where one would fit, and before
// whole layers.
TEST(Plan, ExpertsGoToTheCpuBeforeTheCacheIsCoded) {
  PlanRequest request = Request("qwen3-30b-a3b", "RTX 3090,host=64GiB", Engine::kLlamaCpp);
  request.weights = *EstimateWeights(request.model, "q4_k_m");
  request.workload.contexts = {40960};
  request.workload.concurrency = 2;
  const Plan plan = Make(request);
  const ContextPlan& context = plan.contexts[0];
  ASSERT_FALSE(Find(context, "f16/f16").fits);
  ASSERT_TRUE(Find(context, "q8_0/q8_0").fits);
  ASSERT_TRUE(context.split.has_value());
  EXPECT_EQ(context.split->pair.Name(), "f16/f16");
  EXPECT_GT(context.split->cpu_expert_layers, 0);
  EXPECT_EQ(context.split->host_kv_bytes, 0);
  EXPECT_EQ(context.verdict, Verdict::kFitsWithTiers);
  EXPECT_EQ(Find(context, "q8_0/q8_0").rejection, Rejection::kMoreHarm);
  EXPECT_THAT(context.reason, AllOf(HasSubstr("--n-cpu-moe"), HasSubstr("q8_0/q8_0 would fit without")));
  // Asked by name, or without host memory, the coded cache is the answer.
  request.pairs = {{"q8_0", "q8_0"}};
  EXPECT_EQ(Chosen(Make(request).contexts[0]), "q8_0/q8_0");
  request.pairs.clear();
  request.device = *ParseDevice("RTX 3090");
  EXPECT_EQ(Chosen(Make(request).contexts[0]), "q8_0/q8_0");
  // A dense model has no experts to move.
  request = Request("llama-3.1-8b", "vram=9GiB,bandwidth=448,host=64GiB", Engine::kLlamaCpp);
  request.weights.bytes = 4800 * kMiB;
  request.workload.contexts = {32768};
  EXPECT_EQ(Make(request).contexts[0].verdict, Verdict::kFits);
}

TEST(Plan, WeightsThatPassTheBudgetAloneAreTheReason) {
  PlanRequest request = Request("deepseek-v3.1", "8xH100", Engine::kVllm);
  request.weights = *EstimateWeights(request.model, "fp8", WeightFiles::kSafetensors);
  EXPECT_THAT(Make(request).contexts[0].reason, HasSubstr("the weights alone"));
}

TEST(Plan, LeastHarmThenFewestBytes) {
  PlanRequest request = Request("llama-3.1-8b", "vram=9GiB", Engine::kKvtide);
  request.weights.bytes = 4800 * kMiB;
  request.margin_bytes = 0;
  const ContextPlan context = Make(request).contexts[0];
  EXPECT_EQ(Find(context, "f16/f16").rejection, Rejection::kTooLarge);
  EXPECT_EQ(Chosen(context), "q8_0/q8_0");
  EXPECT_EQ(Find(context, "turbo4/turbo4").rejection, Rejection::kMoreHarm);
  EXPECT_EQ(Find(context, "q4_0/q4_0").rejection, Rejection::kUnmeasured);
  EXPECT_TRUE(Find(context, "q4_0/q4_0").fits);
  request.quality.push_back(Row("q4_0/q4_0", "default", 0.01));
  EXPECT_EQ(Chosen(Make(request).contexts[0]), "q4_0/q4_0");  // as little harm, fewer bytes
}

// A change that a text did not show is no reason to code a cache that fits as it is.
TEST(Plan, AnExactCacheThatFitsIsNeverCoded) {
  PlanRequest request = Request("llama-3.1-8b", "vram=24GiB", Engine::kKvtide);
  request.weights.bytes = 4800 * kMiB;
  request.quality = {Row("q8_0/q8_0", "default", -0.002)};
  const ContextPlan context = Make(request).contexts[0];
  EXPECT_EQ(Find(context, "q8_0/q8_0").harm.compared_percent(), 0);
  EXPECT_EQ(Chosen(context), "f16/f16");
  EXPECT_EQ(Find(context, "q8_0/q8_0").rejection, Rejection::kMoreHarm);
}

TEST(Plan, QualityBudgetRejects) {
  PlanRequest request = Request("llama-3.1-8b", "vram=7GiB", Engine::kKvtide);
  request.weights.bytes = 4800 * kMiB;
  request.margin_bytes = 0;
  EXPECT_EQ(Chosen(Make(request).contexts[0]), "turbo4/turbo4");
  request.max_ppl_increase_percent = 0.2;
  const ContextPlan context = Make(request).contexts[0];
  EXPECT_EQ(Chosen(context), "");
  EXPECT_EQ(Find(context, "turbo4/turbo4").rejection, Rejection::kOverBudget);
  EXPECT_EQ(context.verdict, Verdict::kDoesNotFit);
  EXPECT_THAT(context.reason, HasSubstr("no host memory was given"));
}

TEST(Plan, UnmeasuredPairsAreShownButNeverChosen) {
  PlanRequest request = Request("llama-3.1-8b", "vram=8GiB", Engine::kKvtide);
  request.weights.bytes = 4800 * kMiB;
  request.margin_bytes = 0;
  request.quality.clear();
  const ContextPlan context = Make(request).contexts[0];
  EXPECT_EQ(context.chosen, -1);
  EXPECT_TRUE(Find(context, "turbo4/turbo4").fits);
  EXPECT_THAT(context.reason, HasSubstr("would fit, but its harm is not measured"));
}

QualityRow Calibrated(const char* pair, double change) {
  QualityRow row = Row(pair, "default", change);
  row.text = "a.txt";
  row.tokens = 16384;
  row.key_profile = "b.txt";
  return row;
}

// A profile of the model's keys: its means serve the pairs that were measured with one, its transforms bring
// K types of their own, it takes memory, and the answer says what it rests on.
TEST(Plan, AProfileOfTheKeysOffersWhatWasMeasuredWithOne) {
  PlanRequest request = Request("llama-3.1-8b", "CPU EPYC 9654,ram=7GiB", Engine::kKvtide);
  request.device.vram_bytes = 7 * kGiB;
  request.weights.bytes = 4800 * kMiB;
  request.margin_bytes = 0;
  request.quality.push_back(Calibrated("turbo4/turbo4", 0.2));
  request.quality.push_back(Calibrated("tide3/turbo3", 0.15));
  const ContextPlan plain = Make(request).contexts[0];
  EXPECT_EQ(Chosen(plain), "turbo4/turbo4");
  EXPECT_EQ(Find(plain, "turbo4/turbo4").harm.ppl_change_percent, 0.3);
  for (const Candidate& candidate : plain.candidates) EXPECT_NE(candidate.asked.k, "tide3");
  request.pairs = {{"tide3", "turbo3"}, {"turbo4", "turbo4"}};
  const Candidate refused = Find(Make(request).contexts[0], "tide3/turbo3");
  EXPECT_EQ(refused.rejection, Rejection::kRefused);
  EXPECT_THAT(refused.support.reason, HasSubstr("--profile"));
  request.pairs.clear();

  request.engine.calibrated_keys = CalibratedKeys{"m.profile", "b.txt", 16384, true};
  const Plan plan = Make(request);
  const ContextPlan& context = plan.contexts[0];
  EXPECT_EQ(Chosen(context), "tide3/turbo3");
  const Candidate &tide = Find(context, "tide3/turbo3"), &turbo4 = Find(context, "turbo4/turbo4");
  EXPECT_TRUE(tide.harm.calibrated);
  EXPECT_EQ(turbo4.harm.ppl_change_percent, 0.2);
  EXPECT_FALSE(Find(context, "q8_0/q8_0").harm.calibrated);
  // The same block bytes as turbo3, and the profile: 32 layers of 8 heads with two means, RoPE, two 128 x 128
  // matrices and four types' widths of 16 groups.
  EXPECT_EQ(tide.kv_bytes, Find(context, "turbo3/turbo3").kv_bytes);
  int64_t profile = 0;
  for (const Item& item : tide.items)
    if (item.kind == ItemKind::kKeyProfile) profile += item.bytes;
  EXPECT_EQ(profile, 32 * 8 * (128 * 4 + 2 * 128 * 128 * 4 + (128 + 64) * 4 + 4 * 16));
  EXPECT_THAT(plan.assumptions, Contains(HasSubstr("m.profile (16384 tokens of b.txt)")));
  EXPECT_THAT(plan.assumptions, Contains(HasSubstr("harm: tide3/turbo3 on tidelm-7m, 16384 tokens of a.txt, "
                                                   "with a profile of b.txt")));

  // Means alone.
  request.engine.calibrated_keys->transforms = false;
  const ContextPlan means = Make(request).contexts[0];
  EXPECT_EQ(Chosen(means), "turbo4/turbo4");
  for (const Candidate& candidate : means.candidates) EXPECT_NE(candidate.asked.k, "tide3");
  EXPECT_THAT(Error([&] {
                PlanRequest other = request;
                other.engine.engine = Engine::kVllm;
                return other;
              }()),
              HasSubstr("codes no keys by a profile"));
}

// GPUs rebuild calibrated keys in every step: chosen for what they save, with a price in speed.
TEST(Plan, CalibratedTypesAreChosenOnGpusWithAPrice) {
  PlanRequest request = Request("llama-3.1-8b", "vram=7300MiB", Engine::kKvtide);
  request.weights.bytes = 4800 * kMiB;
  request.margin_bytes = 0;
  request.quality.push_back(Calibrated("tide3/turbo3", 0.15));
  request.engine.calibrated_keys = CalibratedKeys{"m.profile", "b.txt", 16384, true};
  const ContextPlan context = Make(request).contexts[0];
  EXPECT_EQ(Chosen(context), "tide3/turbo3");
  EXPECT_EQ(Find(context, "tide3/turbo3").support.level, SupportLevel::kDequantise);
}

// Keys after RoPE cost little more time than turbo's, and are known up to the positions of their text.
TEST(Plan, CalibratedTypesAfterRopeHaveASmallerPrice) {
  PlanRequest request = Request("llama-3.1-8b", "RTX 3060", Engine::kKvtide);
  request.weights.bytes = 4800 * kMiB;
  request.quality.push_back(Calibrated("turbo3/turbo3", 0.5));
  request.quality.push_back(Calibrated("tide3/turbo3", 0.15));
  request.quality.push_back(Calibrated("tide3/turbo3", 0.25));
  request.quality.back().after_rope = true;
  request.engine.calibrated_keys = CalibratedKeys{"m.profile", "b.txt", 16384, true};
  const Plan before = Make(request);
  request.engine.calibrated_keys->after_rope = true;
  request.engine.calibrated_keys->context = 2048;
  const Plan after = Make(request);
  const auto tide = [](const Plan& plan) { return Find(plan.contexts[0], "tide3/turbo3"); };
  EXPECT_EQ(tide(before).harm.ppl_change_percent, 0.15);
  EXPECT_EQ(tide(after).harm.ppl_change_percent, 0.25);
  EXPECT_GT(tide(after).speed.tokens_per_s, tide(before).speed.tokens_per_s);
  const double turbo = Find(after.contexts[0], "turbo3/turbo3").speed.tokens_per_s;
  EXPECT_LT(tide(after).speed.tokens_per_s, turbo);
  EXPECT_GT(tide(after).speed.tokens_per_s, (tide(before).speed.tokens_per_s + turbo) / 2);
  EXPECT_THAT(after.assumptions, Contains(HasSubstr("tide types code them after RoPE")));
  EXPECT_THAT(after.assumptions, Contains(HasSubstr("has seen positions up to 2048")));
  EXPECT_THAT(before.assumptions, Contains(HasSubstr("tide types code them before RoPE")));
}

TEST(Plan, ProxiesCanBeRefused) {
  PlanRequest request = Request("llama-3.1-8b", "vram=8GiB", Engine::kKvtide);
  request.weights.bytes = 4800 * kMiB;
  EXPECT_TRUE(Find(Make(request).contexts[0], "turbo4/turbo4").harm.proxy);
  request.accept_proxy_quality = false;
  EXPECT_FALSE(Find(Make(request).contexts[0], "turbo4/turbo4").harm.measured);
}

TEST(Plan, SplitsOverHostMemoryWithAPrice) {
  PlanRequest request =
      Request("llama-3.1-8b", "vram=8GiB,bandwidth=448GB/s,pcie=32GB/s,host=64GiB", Engine::kKvtide);
  request.weights.bytes = 4800 * kMiB;
  request.workload.contexts = {131072};
  const ContextPlan context = Make(request).contexts[0];
  ASSERT_EQ(context.verdict, Verdict::kFitsWithTiers);
  ASSERT_TRUE(context.split.has_value());
  const Candidate& pair = Find(context, context.split->pair.Name());
  EXPECT_EQ(context.split->device_kv_bytes + context.split->host_kv_bytes, pair.kv_bytes);
  EXPECT_EQ(context.split->host_kv_bytes, -pair.free_bytes);
  EXPECT_TRUE(context.split->speed.known);
  EXPECT_LT(context.split->speed.tokens_per_s, pair.speed.tokens_per_s);
  request.device.host_bytes = kMiB;
  EXPECT_EQ(Make(request).verdict, Verdict::kDoesNotFit);
}

TEST(Plan, LargestContextAndConcurrencyAreExact) {
  for (Engine engine : {Engine::kLlamaCpp, Engine::kVllm, Engine::kKvtide}) {
    for (const char* model : {"llama-3.1-8b", "gemma-4-26b-a4b", "qwen3.5-27b"}) {
      PlanRequest request = Request(model, "vram=32GiB", engine);
      request.weights.bytes = 14 * kGiB;
      request.workload.concurrency = 2;
      const Plan plan = Make(request);
      for (const Candidate& candidate : plan.contexts[0].candidates) {
        if (candidate.total_bytes == 0) continue;
        SCOPED_TRACE(std::string(EngineName(engine)) + " " + model + " " + candidate.asked.Name());
        PlanRequest probe = request;
        probe.pairs = {candidate.asked};
        const auto fits = [&](int64_t context, int concurrency) {
          probe.workload.contexts = {context};
          probe.workload.concurrency = concurrency;
          return Make(probe).contexts[0].candidates[0].fits;
        };
        if (candidate.max_context > 0) {
          EXPECT_TRUE(fits(candidate.max_context, 2));
        }
        if (candidate.max_context < request.model.max_context) {
          EXPECT_FALSE(fits(candidate.max_context + 1, 2));
        }
        if (candidate.max_concurrency > 0) {
          EXPECT_TRUE(fits(32768, static_cast<int>(candidate.max_concurrency)));
        }
        EXPECT_FALSE(fits(32768, static_cast<int>(candidate.max_concurrency) + 1));
      }
    }
  }
}

TEST(Plan, ItemsSumToTheTotal) {
  PlanRequest request = Request("gemma-4-26b-a4b", "RTX 4090", Engine::kLlamaCpp);
  request.weights = *EstimateWeights(request.model, "q4_0");
  request.workload.mmproj_bytes = 1'190'000'000;
  request.workload.draft_bytes = 500'000'000;
  const Plan plan = Make(request);
  for (const Candidate& candidate : plan.contexts[0].candidates) {
    EXPECT_EQ(TotalBytes(candidate.items), candidate.total_bytes);
    EXPECT_EQ(candidate.fits, candidate.free_bytes >= 0);
  }
}

TEST(Plan, DraftsHaveACacheAndBuffersOfTheirOwn) {
  PlanRequest request = Request("qwen3-32b", "RTX 5090", Engine::kLlamaCpp);
  request.weights.bytes = 19 * kGiB;
  request.workload.contexts = {8192};
  request.pairs = {{"f16", "f16"}};
  const int64_t without = Make(request).contexts[0].candidates[0].total_bytes;
  request.workload.draft =
      DraftModel{*FindModel("qwen3-8b"), {kGiB, Provenance::kExact, "test"}, {"q8_0", "q8_0"}};
  const Candidate with = Make(request).contexts[0].candidates[0];
  int64_t draft_kv = 0, draft_compute = 0, draft = 0;
  for (const Item& item : with.items) {
    if (item.kind == ItemKind::kDraftKv) draft_kv += item.bytes;
    if (item.kind == ItemKind::kDraftCompute) draft_compute += item.bytes;
    if (item.kind == ItemKind::kDraft) draft += item.bytes;
  }
  EXPECT_EQ(draft_kv, 8192 * 144 * kKiB * 17 / 32);  // 36 layers x 8 x 128, q8_0
  EXPECT_EQ(draft, kGiB);
  EXPECT_GT(draft_compute, 0);
  EXPECT_EQ(with.total_bytes, without + draft + draft_kv + draft_compute);
}

// Bytes of one kind of item of the first candidate.
int64_t BytesOf(const Plan& plan, ItemKind kind) {
  int64_t bytes = 0;
  for (const Item& item : plan.contexts[0].candidates[0].items) bytes += item.kind == kind ? item.bytes : 0;
  return bytes;
}

TEST(Plan, PredictionLayersHaveTheCacheOfALayer) {
  PlanRequest request = Request("qwen3.5-27b", "RTX 5090", Engine::kLlamaCpp);
  request.workload.mtp_layers = 1;
  request.workload.contexts = {8192};
  request.pairs = {{"q8_0", "q8_0"}};
  EXPECT_EQ(BytesOf(Make(request), ItemKind::kDraftKv), 8192 * 4 * 256 * 2 * 2);  // f16, one full layer
}

TEST(Plan, APartIsNeverCalledExact) {
  PlanRequest request = Request("llama-3.1-8b", "RTX 4090", Engine::kLlamaCpp);
  request.model.uncounted = {"the keys of an indexer"};
  const Plan plan = Make(request);
  EXPECT_THAT(plan.notes, Contains(HasSubstr("the keys of an indexer")));
  for (const Item& item : plan.contexts[0].candidates[0].items) {
    const bool cache = item.kind == ItemKind::kKvFull;
    EXPECT_TRUE(!cache || item.provenance == Provenance::kGuess);
  }
}

TEST(Plan, TensorParallelNeedsHeadsThatDivide) {
  PlanRequest request = Request("llama-3.1-8b", "RTX 4090,count=3", Engine::kVllm);
  EXPECT_THAT(Error(request),
              HasSubstr("vllm refuses 3 GPUs: 32 query heads do not divide by 3; use 2 or 4"));
  request.engine.engine = Engine::kLlamaCpp;  // layers may be split in any way
  EXPECT_TRUE(MakePlan(request).ok());
  request.engine.split_tensors = true;
  EXPECT_THAT(Error(request), HasSubstr("or split layers"));
}

TEST(Plan, ServersQueueWhatDoesNotFitAtOnce) {
  PlanRequest request = Request("llama-3.1-8b", "RTX 4090", Engine::kVllm);
  request.weights.bytes = 15 * kGiB;
  request.workload.contexts = {8192};
  request.workload.concurrency = 64;
  request.pairs = {{"f16", "f16"}};
  const ContextPlan context = Make(request).contexts[0];
  ASSERT_EQ(context.chosen, 0);
  EXPECT_EQ(context.verdict, Verdict::kFits);
  EXPECT_FALSE(context.candidates[0].fits);
  EXPECT_EQ(context.running, context.candidates[0].max_concurrency);
  EXPECT_GT(context.running, 0);
  EXPECT_THAT(context.reason, HasSubstr("wait in the queue"));
  EXPECT_NEAR(context.candidates[0].pool_concurrency, static_cast<double>(context.running), 1);
  // llama.cpp allocates all slots at its start: there is nothing to wait for.
  request.engine.engine = Engine::kLlamaCpp;
  EXPECT_EQ(Make(request).verdict, Verdict::kDoesNotFit);
}

// vLLM replicates latents under tensor parallelism; each rank of data-parallel attention has a pool of its
// own (vllm-project/vllm #51454: 7.7 times the concurrency on 8 GPUs with a small model).
TEST(Plan, DataParallelAttentionDividesSequencesNotHeads) {
  PlanRequest request = Request("deepseek-v3", "H200,count=8", Engine::kVllm);
  request.weights.bytes = 671'000'000'000;
  request.workload.contexts = {32768};
  request.workload.concurrency = 64;
  request.pairs = {{"bf16", "bf16"}};
  const Plan tensor = Make(request);
  EXPECT_THAT(tensor.notes, Contains(HasSubstr("--dp-attention")));
  request.engine.dp_attention = true;
  const Plan data = Make(request);
  const Candidate &one = tensor.contexts[0].candidates[0], &other = data.contexts[0].candidates[0];
  EXPECT_EQ(one.kv_bytes, 8 * other.kv_bytes);
  EXPECT_GT(other.max_concurrency, 4 * one.max_concurrency);
  EXPECT_LT(other.max_concurrency, 8 * one.max_concurrency);  // attention weights are copied
  request.device.count = 3;                                   // heads need not divide
  EXPECT_TRUE(MakePlan(request).ok());
}

TEST(Plan, UnmeasuredPairsAreChosenOnlyWhenAllowed) {
  PlanRequest request = Request("llama-3.1-8b", "RTX 4090", Engine::kVllm);
  request.weights.bytes = 15 * kGiB;
  request.workload.contexts = {32768};
  request.pairs = {{"int8", "int8"}};
  EXPECT_EQ(Make(request).contexts[0].chosen, -1);
  request.allow_unmeasured = true;
  const ContextPlan context = Make(request).contexts[0];
  EXPECT_EQ(context.chosen, 0);
  EXPECT_THAT(context.reason, HasSubstr("not measured"));
}

TEST(Plan, CacheTierHoldsNothingButCache) {
  PlanRequest request = Request("llama-3.1-8b", "vram=4GiB", Engine::kKvtide);
  request.cache_tier_only = true;
  request.margin_bytes = 0;
  const Candidate candidate = Find(Make(request).contexts[0], "q8_0/turbo4");
  EXPECT_EQ(candidate.total_bytes, candidate.kv_bytes);
}

TEST(Plan, SeveralDevicesDivideHeadsAndWeights) {
  PlanRequest request = Request("llama-3.1-70b", "RTX 4090,count=2", Engine::kVllm);
  request.weights.bytes = 40 * kGiB;
  const Plan plan = Make(request);
  EXPECT_EQ(plan.weights_bytes, 20 * kGiB);
  EXPECT_EQ(Find(plan.contexts[0], "f16/f16").kv_bytes, 32768 * 160 * kKiB);
  // llama.cpp splits layers instead; both halves of 80 layers are equal.
  request.engine.engine = Engine::kLlamaCpp;
  EXPECT_EQ(Find(Make(request).contexts[0], "f16/f16").kv_bytes, 32768 * 160 * kKiB);
}

TEST(Plan, NothingAssumedIsHidden) {
  PlanRequest request = Request("gemma-4-e2b", "RTX 4090,host=8GiB", Engine::kKvtide);
  const Plan plan = Make(request);
  for (const char* what : {"confidence medium", "no weights were given", "driver keeps", "80 GB/s",
                           "prefill is not predicted"}) {
    EXPECT_THAT(plan.assumptions, Contains(HasSubstr(what)));
  }
  request.workload.contexts = {1 << 20};
  EXPECT_THAT(Make(request).notes, Contains(HasSubstr("beyond the 131072")));
}

TEST(Plan, LatentModelsTakeKOnly) {
  PlanRequest request = Request("deepseek-v3", "H200,count=8", Engine::kLlamaCpp);
  request.pairs = {{"q8_0", "q8_0"}};
  const Candidate candidate = Make(request).contexts[0].candidates[0];
  EXPECT_EQ(candidate.asked.Name(), "q8_0/none");
  EXPECT_EQ(candidate.support.level, SupportLevel::kDequantise);
}

TEST(Plan, BadRequestsNameTheField) {
  PlanRequest request = Request("llama-3.1-8b", "RTX 4090", Engine::kKvtide);
  PlanRequest bad = request;
  bad.workload.contexts = {};
  EXPECT_THAT(Error(bad), HasSubstr("context"));
  bad.workload.contexts = {0};
  EXPECT_THAT(Error(bad), HasSubstr("context: 0 tokens"));
  bad = request;
  bad.workload.concurrency = 0;
  EXPECT_THAT(Error(bad), HasSubstr("concurrency"));
  bad = request;
  bad.workload.shared_prefix_tokens = 32768;
  EXPECT_THAT(Error(bad), HasSubstr("shared prefix"));
  bad = request;
  bad.device.in_use_bytes = bad.device.vram_bytes;
  EXPECT_THAT(Error(bad), HasSubstr("nothing of its"));
  bad = request;
  bad.pairs = {{"q9", "f16"}};
  EXPECT_THAT(Error(bad), HasSubstr("unknown cache type 'q9'"));
  bad = request;
  bad.model.layers[3].n_kv_heads = 0;
  EXPECT_THAT(Error(bad), HasSubstr("layer 3"));
}

TEST(Plan, TheContextIsNeverLowered) {
  PlanRequest request = Request("llama-3.1-8b", "RTX 3060", Engine::kKvtide);
  request.weights.bytes = 8 * kGiB;
  request.workload.contexts = {8192, 131072};
  const Plan plan = Make(request);
  EXPECT_EQ(plan.contexts[0].context, 8192);
  EXPECT_EQ(plan.contexts[1].context, 131072);
  EXPECT_EQ(plan.verdict, std::max(plan.contexts[0].verdict, plan.contexts[1].verdict));
}

TEST(Explain, ShowsTheArithmeticOfEveryEngine) {
  PlanRequest request = Request("gemma-4-26b-a4b", "RTX 5080", Engine::kLlamaCpp);
  request.weights = *EstimateWeights(request.model, "q4_0");
  const auto llama = ExplainPair(request, {"q8_0", "pq4"}, 32768);
  ASSERT_TRUE(llama.ok()) << llama.status();
  EXPECT_THAT(*llama, HasSubstr("K 2 heads x 512 / 32 x 34 B x 5 layers = 5440 B per cell"));
  EXPECT_THAT(*llama, HasSubstr("pad(min(pad(32768, 256), 1024 + 512), 256) = 1536"));
  EXPECT_THAT(*llama, HasSubstr("370.9 MiB"));
  request.engine.engine = Engine::kVllm;
  EXPECT_THAT(*ExplainPair(request, {"bf16", "bf16"}, 32768),
              HasSubstr("one request: 1989 blocks x 655360 B"));
  request.engine.engine = Engine::kKvtide;
  EXPECT_THAT(*ExplainPair(request, {"q8_0", "turbo4"}, 32768), HasSubstr("509 coded and 3 exact blocks"));
}

}  // namespace
}  // namespace kvtide::planner
