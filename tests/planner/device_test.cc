#include "planner/plan/device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "planner/units.h"

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;

TEST(Device, ReadsSizes) {
  EXPECT_EQ(*ParseBytes("16GiB"), 16 * kGiB);
  EXPECT_EQ(*ParseBytes("14.4GB"), 14'400'000'000);
  EXPECT_EQ(*ParseBytes(" 512 MiB "), 512 * kMiB);
  EXPECT_EQ(*ParseBytes("12345"), 12345);
  EXPECT_EQ(*ParseBytes("2k"), 2048);
  for (const char* bad : {"", "GiB", "-1GiB", "1 parsec", "1e9999", "99999999999TiB", "nan", "1.2.3"}) {
    EXPECT_FALSE(ParseBytes(bad).ok()) << bad;
  }
}

TEST(Device, ReadsBandwidths) {
  EXPECT_DOUBLE_EQ(*ParseBandwidth("960GB/s"), 960);
  EXPECT_DOUBLE_EQ(*ParseBandwidth("4.8TB/s"), 4800);
  for (const char* bad : {"", "0", "-3GB/s", "fast", "3 GB"}) EXPECT_FALSE(ParseBandwidth(bad).ok()) << bad;
}

TEST(Device, ReadsNumbersNamesAndChanges) {
  const auto numbers =
      ParseDevice("vram=16GiB,bandwidth=960GB/s,used=1GiB,count=2,host=64GiB,pcie=32,host_bandwidth=80GB/s");
  ASSERT_TRUE(numbers.ok()) << numbers.status();
  EXPECT_EQ(numbers->UsableBytes(), 15 * kGiB);
  EXPECT_EQ(numbers->count, 2);
  EXPECT_EQ(numbers->host_bytes, 64 * kGiB);
  const auto named = ParseDevice("RTX 5080,used=303MiB");
  ASSERT_TRUE(named.ok()) << named.status();
  EXPECT_EQ(named->UsableBytes(), 16000 * kMiB);
  EXPECT_DOUBLE_EQ(named->bandwidth_gb_s, 960);
  EXPECT_DOUBLE_EQ(named->pcie_gb_s, 64);
}

TEST(Device, BadDevicesAreExplained) {
  EXPECT_THAT(std::string(ParseDevice("vram=16GiB,vrm=1").status().message()),
              HasSubstr("unknown key 'vrm'"));
  EXPECT_THAT(std::string(ParseDevice("bandwidth=960").status().message()), HasSubstr("has no memory"));
  EXPECT_THAT(std::string(ParseDevice("vram=16GiB,count=0").status().message()), HasSubstr("count"));
  EXPECT_THAT(std::string(ParseDevice("vram=16GiB,oops").status().message()), HasSubstr("not key=value"));
}

}  // namespace
}  // namespace kvtide::planner
