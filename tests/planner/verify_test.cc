#include "planner/plan/verify.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "planner/model/catalogue.h"
#include "planner/model/weight_size.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;

// Lines as llama.cpp prints them at start.
const char* const kLlamaLog = R"(load_tensors:   CPU_Mapped model buffer size =   577.50 MiB
load_tensors:        CUDA0 model buffer size = 13155.00 MiB
llama_kv_cache:      CUDA0 KV buffer size =   640.00 MiB
llama_kv_cache: size =  640.00 MiB ( 32768 cells,   5 layers,  1/1 seqs), K (f16):  320.00 MiB, V (f16):  320.00 MiB
llama_kv_cache:      CUDA0 KV buffer size =   300.00 MiB
llama_context:      CUDA0 compute buffer size =   533.00 MiB
llama_context:  CUDA_Host compute buffer size =    73.51 MiB
)";

TEST(Verify, ReadsLlamaLogsPerDevice) {
  const auto measured = ParseLlamaLog(kLlamaLog);
  ASSERT_TRUE(measured.ok()) << measured.status();
  EXPECT_EQ(measured->bytes.at("weights"), 13155 * kMiB);
  EXPECT_EQ(measured->bytes.at("kv"), 940 * kMiB);
  EXPECT_EQ(measured->bytes.at("compute"), 533 * kMiB);
}

TEST(Verify, TheFullestOfSeveralDevicesCounts) {
  const auto measured =
      ParseLlamaLog("x: CUDA0 KV buffer size = 100.00 MiB\nx: CUDA1 KV buffer size = 120.00 MiB\n");
  EXPECT_EQ(measured->bytes.at("kv"), 120 * kMiB);
}

// The CPU backend: everything lies in host memory, some weights are repacked.
const char* const kCpuLog = R"(load_tensors:   CPU_Mapped model buffer size =   235.16 MiB
load_tensors:   CPU_REPACK model buffer size =    12.66 MiB
llama_context: constructing llama_context
llama_context:        CPU  output buffer size =     1.00 MiB
llama_kv_cache:        CPU KV buffer size =    24.00 MiB
llama_kv_cache:        CPU KV buffer size =    15.00 MiB
llama_context:        CPU compute buffer size =    27.28 MiB
)";

TEST(Verify, ReadsLogsOfTheCpuBackend) {
  const auto measured = ParseLlamaLog(kCpuLog);
  ASSERT_TRUE(measured.ok()) << measured.status();
  EXPECT_TRUE(measured->on_cpu);
  EXPECT_EQ(measured->bytes.at("kv"), 39 * kMiB);
  EXPECT_NEAR(static_cast<double>(measured->bytes.at("weights")) / kMiB, 235.16, 0.01);
  EXPECT_NEAR(static_cast<double>(measured->bytes.at("compute")) / kMiB, 27.28, 0.01);
  EXPECT_THAT(measured->notes, ::testing::ElementsAre(HasSubstr("repacked")));
}

TEST(Verify, TellsTheDraftModelFromTheModel) {
  const auto measured = ParseLlamaLog(
      "load_tensors: CUDA0 model buffer size = 4000.00 MiB\nllama_kv_cache: CUDA0 KV buffer size = 1024.00 "
      "MiB\n"
      "llama_context: CUDA0 compute buffer size = 100.00 MiB\nllama_context: CUDA_Host compute buffer size = "
      "20.00 MiB\n"
      "load_tensors: CUDA0 model buffer size = 500.00 MiB\nllama_kv_cache: CUDA0 KV buffer size = 128.00 "
      "MiB\n"
      "llama_context: CUDA0 compute buffer size = 50.00 MiB\n");
  ASSERT_TRUE(measured.ok()) << measured.status();
  EXPECT_EQ(measured->bytes.at("kv"), 1024 * kMiB);
  EXPECT_EQ(measured->bytes.at("draft_kv"), 128 * kMiB);
  EXPECT_EQ(measured->bytes.at("draft_weights"), 500 * kMiB);
  EXPECT_EQ(measured->bytes.at("compute"), 100 * kMiB);
}

TEST(Verify, ADryRunIsNotADraft) {
  const std::string once =
      "load_tensors: CUDA0 model buffer size = 4000.00 MiB\nllama_kv_cache: CUDA0 KV buffer size = 1024.00 "
      "MiB\n"
      "llama_context: CUDA0 compute buffer size = 100.00 MiB\n";
  const auto measured = ParseLlamaLog(once + once);
  ASSERT_TRUE(measured.ok());
  EXPECT_EQ(measured->bytes.count("draft_kv"), 0u);
  EXPECT_EQ(measured->bytes.at("kv"), 1024 * kMiB);
}

TEST(Verify, ACacheInHostMemoryBesideAGpu) {
  const auto measured = ParseLlamaLog(
      "x: CUDA0 model buffer size = 4000.00 MiB\nx: CPU KV buffer size = 1024.00 MiB\nx: CUDA0 compute "
      "buffer size = 9.00 "
      "MiB\n");
  ASSERT_TRUE(measured.ok());
  EXPECT_EQ(measured->bytes.at("kv_host"), 1024 * kMiB);
  EXPECT_EQ(measured->bytes.count("kv"), 0u);
}

TEST(Verify, ToleranceIsAShareOrFourMiB) {
  EXPECT_TRUE(WithinTolerance({{"kv", 100 * kMiB, 103 * kMiB}}, 0));
  EXPECT_TRUE(WithinTolerance({{"kv", 1000 * kMiB, 1090 * kMiB}}, 10));
  EXPECT_FALSE(WithinTolerance({{"kv", 1000 * kMiB, 1090 * kMiB}}, 5));
}

TEST(Verify, ReadsVllmLogs) {
  const auto measured = ParseVllmLog(
      "INFO Model loading took 14.9889 GiB and 5.1 seconds\nINFO Available KV cache memory: 52.01 GiB\n"
      "INFO GPU KV cache size: 425,984 tokens\nINFO Maximum concurrency for 32,768 tokens per request: "
      "13.00x\n"
      "INFO Graph capturing finished in 21 secs, took 0.62 GiB\n");
  ASSERT_TRUE(measured.ok()) << measured.status();
  EXPECT_EQ(measured->bytes.at("weights"), static_cast<int64_t>(14.9889 * kGiB + 0.5));
  EXPECT_NEAR(static_cast<double>(measured->bytes.at("kv_per_request")), 52.01 / 13 * kGiB, 2);
  EXPECT_NEAR(static_cast<double>(measured->bytes.at("graphs")), 0.62 * kGiB, 2);
}

TEST(Verify, ReadsKvtidedMetrics) {
  const auto measured = ParseKvtidedMetrics(
      "# HELP kvtide_pool_used_bytes Bytes\n# TYPE kvtide_pool_used_bytes gauge\n"
      "kvtide_pool_used_bytes{tier=\"device\"} 1048576\nkvtide_pool_used_bytes{tier=\"host\"} "
      "2.097152e+06\n");
  ASSERT_TRUE(measured.ok()) << measured.status();
  EXPECT_EQ(measured->bytes.at("kv"), 3 * kMiB);
}

TEST(Verify, PutsPredictionBesideReality) {
  PlanRequest request;
  request.model = *FindModel("gemma-4-26b-a4b");
  request.device = *ParseDevice("RTX 5080");
  request.engine.engine = Engine::kLlamaCpp;
  request.workload.contexts = {32768};
  request.weights = *EstimateWeights(request.model, "q4_0");
  request.pairs = {{"f16", "f16"}};
  const auto plan = MakePlan(request);
  ASSERT_TRUE(plan.ok());
  const auto lines = Compare(plan->contexts[0].candidates[0], std::nullopt, 1, *ParseAnyLog(kLlamaLog));
  ASSERT_EQ(lines.size(), 4u);  // compute, kv, weights, sum
  EXPECT_EQ(lines[1].item, "kv");
  EXPECT_EQ(lines[1].ErrorPercent(), 0);
  EXPECT_EQ(lines[3].actual, (13155 + 940 + 533) * kMiB);
  EXPECT_THAT(RenderVerify(lines, *ParseAnyLog(kLlamaLog)), HasSubstr("llama.cpp log"));
}

TEST(Verify, ForeignTextIsAnError) {
  EXPECT_THAT(std::string(ParseAnyLog("hello\n").status().message()),
              HasSubstr("neither a llama.cpp start-up log"));
  EXPECT_FALSE(ParseLlamaLog("x: CUDA0 KV buffer size = lots MiB\n").ok());
}

}  // namespace
}  // namespace kvtide::planner
