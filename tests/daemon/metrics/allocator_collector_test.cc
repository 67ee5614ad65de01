#include "daemon/metrics/allocator_collector.h"

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#include "gtest/gtest.h"

namespace kvtide::metrics {
namespace {

bool epoch_written = false;

int FakeMallctl(const char* name, void* old_value, size_t* old_length, void* new_value, size_t new_length) {
  static const std::map<std::string, size_t> kValues = {{"stats.allocated", 100}, {"stats.active", 200},
                                                        {"stats.metadata", 30},   {"stats.resident", 400},
                                                        {"stats.mapped", 500},    {"stats.retained", 600}};
  if (std::strcmp(name, "epoch") == 0) {
    epoch_written = new_value != nullptr && new_length == sizeof(uint64_t);
    return 0;
  }
  const auto found = kValues.find(name);
  if (found == kValues.end() || *old_length != sizeof(size_t) || new_value != nullptr) return 2;
  std::memcpy(old_value, &found->second, sizeof(size_t));
  return 0;
}

std::map<std::string, double> Values(const AllocatorCollector& collector) {
  std::map<std::string, double> values;
  for (const prometheus::MetricFamily& family : collector.Collect()) {
    EXPECT_EQ(family.metric.size(), 1u);
    values[family.name] = family.metric.at(0).gauge.value;
  }
  return values;
}

TEST(AllocatorCollector, ReadsAFreshEpoch) {
  epoch_written = false;
  const std::map<std::string, double> expected = {
      {"kvtide_allocator_allocated_bytes", 100}, {"kvtide_allocator_active_bytes", 200},
      {"kvtide_allocator_metadata_bytes", 30},   {"kvtide_allocator_resident_bytes", 400},
      {"kvtide_allocator_mapped_bytes", 500},    {"kvtide_allocator_retained_bytes", 600}};
  EXPECT_EQ(Values(AllocatorCollector(FakeMallctl)), expected);
  EXPECT_TRUE(epoch_written);
}

TEST(AllocatorCollector, NothingWithoutJemalloc) {
  EXPECT_TRUE(AllocatorCollector(nullptr).Collect().empty());
}

TEST(AllocatorCollector, LeavesOutWhatTheBuildDoesNotCount) {
  const auto no_statistics = [](const char* name, void*, size_t*, void*, size_t) {
    return std::strcmp(name, "epoch") == 0 ? 0 : 2;
  };
  EXPECT_TRUE(AllocatorCollector(no_statistics).Collect().empty());
}

TEST(AllocatorCollector, OfThisProcess) {
  if (ProcessMallctl() == nullptr) GTEST_SKIP() << "this build does not link jemalloc";
  const AllocatorCollector collector(ProcessMallctl());
  const double before = Values(collector).at("kvtide_allocator_allocated_bytes");
  const std::string ballast(size_t{32} << 20, 'x');
  EXPECT_GE(Values(collector).at("kvtide_allocator_allocated_bytes"),
            before + static_cast<double>(ballast.size()));
}

}  // namespace
}  // namespace kvtide::metrics
