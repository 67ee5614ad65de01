#include "planner/model/device.h"

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
  EXPECT_EQ(*ParseBytes("12345678"), 12345678);
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

TEST(Device, SeveralEqualOnes) {
  struct Row {
    const char* text;
    const char* name;
    int count;
  };
  const Row table[] = {{"8xH100", "H100 SXM", 8},
                       {"8 x H100", "H100 SXM", 8},
                       {"2x RTX 3090", "RTX 3090", 2},
                       {"H100 x8", "H100 SXM", 8},
                       {"H100x8", "H100 SXM", 8},
                       {"4*H200", "H200", 4},
                       {"2\xC3\x97 4090", "RTX 4090", 2},
                       {"RTX 3090 x 2", "RTX 3090", 2},
                       {"1xL4", "L4", 1},
                       {"8xMI300X", "MI300X", 8},
                       {"MI300X", "MI300X", 1},
                       {"2x MI300X,used=1GiB", "MI300X", 2}};
  for (const Row& row : table) {
    const auto device = ParseDevice(row.text);
    ASSERT_TRUE(device.ok()) << row.text << ": " << device.status();
    EXPECT_EQ(device->name, row.name) << row.text;
    EXPECT_EQ(device->count, row.count) << row.text;
  }
  EXPECT_FALSE(ParseDevice("0xH100").ok());
  EXPECT_FALSE(ParseDevice("9999xH100").ok());
  EXPECT_FALSE(ParseDevice("8x").ok());
  EXPECT_FALSE(ParseDevice("x8").ok());
}

TEST(Device, CpuAndUnifiedMemory) {
  EXPECT_THAT(std::string(ParseDevice("cpu").status().message()), ::testing::HasSubstr("cpu,ram=64GiB"));
  const auto cpu = ParseDevice("cpu,ram=64GiB,bandwidth=90GB/s");
  ASSERT_TRUE(cpu.ok()) << cpu.status();
  EXPECT_EQ(cpu->memory, DeviceMemory::kHost);
  EXPECT_EQ(cpu->UsableBytes(), 64 * kGiB);
  EXPECT_EQ(cpu->bandwidth_gb_s, 90);
  EXPECT_THAT(std::string(ParseDevice("GB10,host=64GiB").status().message()),
              ::testing::HasSubstr("no host memory"));
  EXPECT_EQ(ParseDevice("M3 Ultra 512GB")->memory, DeviceMemory::kUnified);
}

}  // namespace
}  // namespace kvtide::planner
