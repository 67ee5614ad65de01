#include "planner/model/catalogue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "planner/model/weight_size.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;

TEST(Catalogue, HasAllModelsAndCards) {
  EXPECT_EQ(CatalogueModels().size(), 141u);
  EXPECT_EQ(CatalogueGpus().size(), 96u);
  for (const ModelGeometry& model : CatalogueModels()) {
    EXPECT_TRUE(ValidateGeometry(model).ok()) << model.name;
    EXPECT_TRUE(FindModel(model.name).ok());
  }
}

TEST(Catalogue, NamesForgiveCaseAndSeparators) {
  EXPECT_EQ(FindModel("gemma-4-26b-a4b")->name, "Gemma4-26B-A4B");
  EXPECT_EQ(FindModel("llama_3.1 8B")->name, "Llama3.1-8B");
  EXPECT_EQ(FindGpu("rtx5080")->name, "RTX 5080");
  EXPECT_EQ(FindGpu("4090")->name, "RTX 4090");
  EXPECT_EQ(FindGpu("h100-sxm")->name, "H100 SXM");
}

TEST(Catalogue, UnknownNamesListNearOnes) {
  EXPECT_THAT(std::string(FindModel("gemma-4-27b").status().message()), HasSubstr("Gemma4-26B-A4B"));
  EXPECT_THAT(std::string(FindGpu("RTX 5085").status().message()), HasSubstr("vram=16GiB"));
  EXPECT_THAT(std::string(FindGpu("RTX 5085").status().message()), HasSubstr("RTX 5080"));
  // A few, even when nothing is like it.
  const std::string message(FindModel("nosuch").status().message());
  EXPECT_EQ(std::count(message.begin(), message.end(), ','), 6) << message;
}

TEST(Catalogue, CardsKnowWhatTheDriverReports) {
  EXPECT_EQ(FindGpu("RTX 5080")->UsableBytes(), 16303 * kMiB);
  EXPECT_FALSE(FindGpu("RTX 5080")->driver_reserve_is_guess);
  EXPECT_TRUE(FindGpu("RTX 4090")->driver_reserve_is_guess);
}

// As drivers, CUDA, rocm-smi and ggml report them; the sources stand in gpus.csv.
TEST(Catalogue, MemoryAsDriversReportIt) {
  const std::pair<const char*, double> table[] = {
      {"L4", 22.5},      {"A10", 22.5},      {"T4", 15.0},          {"A40", 45.0},
      {"L40S", 45.0},    {"GB10", 119.7},    {"H100 SXM", 79.6},    {"H200", 140.4},
      {"B200", 178.3},   {"B300", 268.6},    {"GB300", 277.5},      {"GB200", 185.0},
      {"MI300X", 192.0}, {"RTX 5090", 31.8}, {"RX 7900 XTX", 24.0}, {"A100 80GB SXM", 80.0}};
  for (const auto& [name, gib] : table) {
    const auto device = FindGpu(name);
    ASSERT_TRUE(device.ok()) << device.status();
    EXPECT_NEAR(static_cast<double>(device->UsableBytes()) / kGiB, gib, 0.06) << name;
    EXPECT_FALSE(device->driver_reserve_is_guess) << name;
  }
}

TEST(Catalogue, DeviceNamesAsPeopleWriteThem) {
  const std::pair<const char*, const char*> table[] = {{"NVIDIA GeForce RTX 4090", "RTX 4090"},
                                                       {"NVIDIA H100 80GB HBM3", "H100 SXM"},
                                                       {"H100", "H100 SXM"},
                                                       {"Tesla T4", "T4"},
                                                       {"AMD Instinct MI300X", "MI300X"},
                                                       {"7900 XTX", "RX 7900 XTX"},
                                                       {"AMD Radeon RX 7900 XTX", "RX 7900 XTX"},
                                                       {"DGX Spark", "GB10 DGX Spark"},
                                                       {"RTX 3090 24GB", "RTX 3090"},
                                                       {"Apple M4 Max 128GB", "Apple M4 Max 128GB"},
                                                       {"m3 ultra 512gb", "Apple M3 Ultra 512GB"},
                                                       {"M2 Max 96 GB", "Apple M2 Max 96GB"},
                                                       {"Jetson AGX Thor", "Jetson AGX Thor"},
                                                       {"Jetson AGX Orin 64GB", "Jetson AGX Orin 64GB"},
                                                       {"Ryzen AI Max+ 395 128GB", "Strix Halo 128GB"},
                                                       {"A6000", "RTX A6000"},
                                                       {"RTX PRO 6000", "RTX PRO 6000 Blackwell"},
                                                       {"A100-SXM4-80GB", "A100 80GB SXM"}};
  for (const auto& [text, name] : table) {
    const auto device = FindGpu(text);
    ASSERT_TRUE(device.ok()) << text << ": " << device.status();
    EXPECT_EQ(device->name, name) << text;
  }
  EXPECT_THAT(FindGpu("H100")->assumption, HasSubstr("H100 PCIe"));
  EXPECT_TRUE(FindGpu("H100 SXM")->assumption.empty());
  EXPECT_TRUE(FindGpu("RTX 4090")->assumption.empty());
}

TEST(Catalogue, BareNamesListTheirVariantsByMemory) {
  const std::string a100(FindGpu("A100").status().message());
  EXPECT_LT(a100.find("A100 40GB"), a100.find("A100 80GB PCIe"));
  EXPECT_LT(a100.find("A100 80GB PCIe"), a100.find("A100 80GB SXM"));
  EXPECT_THAT(std::string(FindGpu("RTX 4060 Ti").status().message()), HasSubstr("RTX 4060 Ti 16GB"));
  const std::string max(FindGpu("M4 Max").status().message());
  EXPECT_LT(max.find("36GB"), max.find("64GB"));
  EXPECT_LT(max.find("64GB"), max.find("128GB"));
  EXPECT_THAT(std::string(FindGpu("M4 Max 96GB").status().message()), HasSubstr("sizes are"));
  EXPECT_THAT(std::string(FindGpu("RTX 3090 48GB").status().message()), HasSubstr("24.0 GiB"));
}

TEST(Catalogue, MacsGiveTheGpuAShare) {
  EXPECT_EQ(FindGpu("M1 16GB")->UsableBytes(), 16 * kGiB - 16 * kGiB / 3);
  EXPECT_EQ(FindGpu("M2 Max 96GB")->UsableBytes(), 72 * kGiB);
  EXPECT_EQ(FindGpu("M4 Max 128GB")->memory, DeviceMemory::kUnified);
  EXPECT_TRUE(FindGpu("M4 Max 128GB")->driver_reserve_is_guess);
}

TEST(Catalogue, WeightsArePublishedOrParametersTimesBits) {
  const auto published = EstimateWeights(*FindModel("gemma-4-26b-a4b"), "Q4_0");
  EXPECT_EQ(published->bytes, 14'400'000'000);
  EXPECT_EQ(published->provenance, Provenance::kCalibrated);
  const auto computed = EstimateWeights(*FindModel("llama-3.1-8b"), "q8_0");
  EXPECT_EQ(computed->bytes, 8'030'000'000 * 17 / 16);
  EXPECT_EQ(computed->provenance, Provenance::kFormula);
  EXPECT_THAT(std::string(EstimateWeights(*FindModel("gemma-3-4b"), "q4_0").status().message()),
              HasSubstr("unknown"));
  EXPECT_THAT(std::string(EstimateWeights(*FindModel("llama-3.1-8b"), "q9").status().message()),
              HasSubstr("q4_k_m"));
}

TEST(Catalogue, RecurrentStatesSumToTheTable) {
  int64_t state = 0;
  const auto model = FindModel("qwen3.5-27b");
  for (const LayerGeometry& layer : model->layers) state += layer.state_bytes;
  EXPECT_EQ(state, 156893184);
}

TEST(Catalogue, LowConfidenceIsSaid) {
  EXPECT_THAT(FindModel("gemma-4-e2b")->assumptions, ::testing::Contains(HasSubstr("confidence medium")));
  EXPECT_TRUE(FindModel("llama-3.1-8b")->assumptions.empty());
}

}  // namespace
}  // namespace kvtide::planner
