#include "daemon/metrics/gpu_collector.h"

#include "gtest/gtest.h"
#include "prometheus/text_serializer.h"
#include "tests/daemon/metrics/exposition.h"

namespace kvtide::metrics {
namespace {

TEST(GpuCollector, TellsWhatTheLibraryTells) {
  const GpuCollector collector(KVTIDE_NVML_STANDIN);
  const Exposition exposition = ParseExposition(prometheus::TextSerializer().Serialize(collector.Collect()));
  EXPECT_EQ(exposition.samples.at("kvtide_gpu_memory_bytes{gpu=\"0\"}"), 1 << 30);
  EXPECT_EQ(exposition.samples.at("kvtide_gpu_memory_used_bytes{gpu=\"1\"}"), 2000);
  EXPECT_EQ(exposition.samples.at("kvtide_gpu_utilization_ratio{gpu=\"0\"}"), 0.37);
  EXPECT_EQ(exposition.samples.count("kvtide_gpu_utilization_ratio{gpu=\"1\"}"), 0u) << "it does not tell";
  EXPECT_EQ(exposition.types.at("kvtide_gpu_memory_bytes"), "gauge");
}

TEST(GpuCollector, WhatThisProcessHoldsOfAllGpus) {
  EXPECT_EQ(GpuCollector(KVTIDE_NVML_STANDIN).BytesOfThisProcess(), 300);
  EXPECT_EQ(GpuCollector("libkvtide-none.so.1").BytesOfThisProcess(), std::nullopt);
}

TEST(GpuCollector, NothingWithoutTheLibraryOrItsFunctions) {
  EXPECT_TRUE(GpuCollector("libkvtide-none.so.1").Collect().empty());
  EXPECT_TRUE(GpuCollector("libc.so.6").Collect().empty());
}

}  // namespace
}  // namespace kvtide::metrics
