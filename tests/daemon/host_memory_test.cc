// What is read of /proc and of control groups, in folders that play them.
#include "daemon/host_memory.h"

#include <filesystem>
#include <fstream>

#include "absl/strings/match.h"
#include "gtest/gtest.h"

namespace kvtide {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;

class HostMemoryTest : public ::testing::Test {
 protected:
  HostMemoryTest() {
    root_ = ::testing::TempDir() + "host_memory_" +
            ::testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(root_);
    Write("/proc/meminfo", "MemTotal:       24000000 kB\nMemFree:  1 kB\nMemAvailable:   20000000 kB\n");
  }
  ~HostMemoryTest() override { std::filesystem::remove_all(root_); }
  void Write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }
  HostMemory Read() const { return ReadHostMemory(root_); }

  std::string root_;
};

// 23 GiB were accepted where 20 were free: the machine's size is not what counts.
TEST_F(HostMemoryTest, CountsWhatIsAvailable) {
  const HostMemory memory = Read();
  EXPECT_EQ(memory.total, 24000000 * int64_t{1024});
  EXPECT_EQ(memory.available, 20000000 * int64_t{1024});
  EXPECT_TRUE(CheckHostMemory(19 * kGiB, memory).ok());
  const absl::Status refused = CheckHostMemory(22 * kGiB, memory);
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(refused.message(), "the tiers want 22528.0 MiB")) << refused;
  EXPECT_TRUE(
      absl::StrContains(refused.message(), "19531.2 MiB of 23437.5 MiB are available (/proc/meminfo)"))
      << refused;
}

TEST_F(HostMemoryTest, TheTightestGroupOfVersion2Counts) {
  Write("/proc/self/cgroup", "0::/system.slice/kvtided.service\n");
  Write("/sys/fs/cgroup/system.slice/kvtided.service/memory.max", "max\n");
  Write("/sys/fs/cgroup/system.slice/memory.max", "8589934592\n");
  Write("/sys/fs/cgroup/system.slice/memory.current", "5368709120\n");
  Write("/sys/fs/cgroup/system.slice/memory.stat", "anon 1\ninactive_file 1073741824\n");
  const HostMemory memory = Read();
  EXPECT_EQ(memory.total, 8 * kGiB);
  EXPECT_EQ(memory.available, 4 * kGiB) << "the page cache goes when it has to";
  EXPECT_EQ(memory.source, "/sys/fs/cgroup/system.slice/memory.max");
  EXPECT_FALSE(CheckHostMemory(4 * kGiB + 1, memory).ok());
}

TEST_F(HostMemoryTest, AContainerSeesItsGroupAtTheRoot) {
  Write("/proc/self/cgroup", "0::/\n");
  Write("/sys/fs/cgroup/memory.max", "1073741824\n");
  EXPECT_EQ(Read().available, kGiB);
}

TEST_F(HostMemoryTest, Version1) {
  Write("/proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n");
  Write("/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(Read().source, "/proc/meminfo") << "that is version 1's word for no limit";
  // A path of the host's that is not mounted here.
  std::filesystem::remove_all(root_ + "/sys/fs/cgroup/memory/docker");
  Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "4294967296\n");
  Write("/sys/fs/cgroup/memory/memory.usage_in_bytes", "2147483648\n");
  Write("/sys/fs/cgroup/memory/memory.stat", "total_inactive_file 0\n");
  EXPECT_EQ(Read().total, 4 * kGiB);
  EXPECT_EQ(Read().available, 2 * kGiB);
}

TEST_F(HostMemoryTest, AGroupThatIsOverItsLimitHasNothing) {
  Write("/proc/self/cgroup", "0::/a\n");
  Write("/sys/fs/cgroup/a/memory.max", "1073741824\n");
  Write("/sys/fs/cgroup/a/memory.current", "2147483648\n");
  EXPECT_EQ(Read().available, 0);
  EXPECT_FALSE(CheckHostMemory(1, Read()).ok());
}

TEST_F(HostMemoryTest, WhereNothingIsKnownNothingIsRefused) {
  std::filesystem::remove_all(root_);
  EXPECT_EQ(Read().total, 0);
  EXPECT_TRUE(CheckHostMemory(kGiB << 20, Read()).ok());
}

TEST_F(HostMemoryTest, ThisMachine) {
  const HostMemory memory = ReadHostMemory();
  EXPECT_GT(memory.total, 0);
  EXPECT_GT(memory.available, 0);
  EXPECT_LE(memory.available, memory.total);
}

}  // namespace
}  // namespace kvtide
