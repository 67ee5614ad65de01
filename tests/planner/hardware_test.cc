#include "planner/plan/hardware.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "planner/model/catalogue.h"
#include "planner/model/weight_size.h"

namespace kvtide::planner {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

PlanRequest Request(const char* device, Engine engine, const char* weights = "bf16") {
  PlanRequest request;
  request.model = *FindModel("llama-3.1-8b");
  request.device = *ParseDevice(device);
  request.engine.engine = engine;
  request.weights = *EstimateWeights(request.model, weights, WeightFiles::kSafetensors);
  request.workload.contexts = {8192};
  return request;
}

// Refused for what the engine cannot do there, not for size; every refusal says what does.
TEST(Hardware, EnginesThatDoNotRunOnADeviceAreRefused) {
  const struct {
    const char* device;
    Engine engine;
    const char* weights;
    const char* words;
  } table[] = {{"M4 Max 64GB", Engine::kVllm, "bf16", "--engine llama.cpp"},
               {"M4 Max 64GB", Engine::kSglang, "bf16", "--engine llama.cpp"},
               {"M4 Max 64GB", Engine::kKvtide, "bf16", "--engine llama.cpp"},
               {"cpu,ram=64GiB", Engine::kSglang, "bf16", "SGLang sizes its pool on a CPU"},
               {"MI300X", Engine::kKvtide, "bf16", "no backend for MI300X"},
               {"T4", Engine::kKvtide, "bf16", "needs compute capability 8.0"},
               {"RTX 4090", Engine::kLlamaCpp, "awq", "q4_k_m"},
               {"RTX 4090", Engine::kLlamaCpp, "fp8", "q8_0"},
               {"MI300X", Engine::kVllm, "nvfp4", "no kernels for nvfp4"},
               {"MI210", Engine::kVllm, "fp8", "no fp8 arithmetic"},
               {"T4", Engine::kVllm, "mxfp4", "needs compute capability 8.0"}};
  for (const auto& row : table) {
    const absl::Status status = CheckHardware(Request(row.device, row.engine, row.weights));
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << row.device << row.weights;
    EXPECT_THAT(std::string(status.message()), HasSubstr(row.words)) << row.device;
  }
}

TEST(Hardware, WhatRunsIsLetThrough) {
  for (const char* device : {"RTX 3090", "L4", "H100", "B200", "MI300X"}) {
    for (const char* weights : {"bf16", "awq", "fp8"})
      EXPECT_TRUE(CheckHardware(Request(device, Engine::kVllm, weights)).ok()) << device << weights;
  }
  EXPECT_TRUE(CheckHardware(Request("M4 Max 64GB", Engine::kLlamaCpp, "q4_k_m")).ok());
  EXPECT_TRUE(CheckHardware(Request("T4", Engine::kLlamaCpp, "q4_k_m")).ok());
  EXPECT_TRUE(CheckHardware(Request("vram=24GiB", Engine::kVllm, "nvfp4")).ok());  // of unknown make
}

TEST(Hardware, NotesSayWhatFormatsDoNotDoThere) {
  EXPECT_THAT(HardwareNotes(Request("RTX 3090", Engine::kVllm, "fp8")),
              Contains(HasSubstr("computed with in 16 bits")));
  EXPECT_THAT(HardwareNotes(Request("RTX 4090", Engine::kVllm, "nvfp4")),
              Contains(HasSubstr("begins at 10.0")));
  EXPECT_THAT(HardwareNotes(Request("RTX 4090", Engine::kVllm, "fp8")), IsEmpty());
  EXPECT_THAT(HardwareNotes(Request("RTX 4090", Engine::kVllm, "q4_k_m")),
              Contains(HasSubstr("experimentally")));
  PlanRequest request = Request("RTX 4090", Engine::kVllm);
  request.weights = {1'000'000, Provenance::kExact, "given as 0.001GB"};
  EXPECT_THAT(HardwareNotes(request), Contains(HasSubstr("is that the size that you mean?")));
}

}  // namespace
}  // namespace kvtide::planner
