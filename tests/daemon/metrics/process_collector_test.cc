#include "daemon/metrics/process_collector.h"

#include <unistd.h>

#include <ctime>
#include <filesystem>
#include <fstream>
#include <map>

#include "gtest/gtest.h"

namespace kvtide::metrics {
namespace {

std::map<std::string, double> Values(const ProcessCollector& collector) {
  std::map<std::string, double> values;
  for (const prometheus::MetricFamily& family : collector.Collect()) {
    const prometheus::ClientMetric& metric = family.metric.at(0);
    values[family.name] =
        family.type == prometheus::MetricType::Counter ? metric.counter.value : metric.gauge.value;
  }
  return values;
}

class ProcFolder {
 public:
  ProcFolder()
      : path_(std::filesystem::path(testing::TempDir()) / ("kvtide_proc_" + std::to_string(getpid()))) {
    std::filesystem::create_directories(path_ / "self");
  }
  ~ProcFolder() { std::filesystem::remove_all(path_); }
  void Write(const std::string& name, const std::string& text) { std::ofstream(path_ / name) << text; }
  std::string path() const { return path_.string(); }

 private:
  const std::filesystem::path path_;
};

TEST(ProcessCollector, ReadsTheFields) {
  ProcFolder proc;
  // The name may hold spaces and parentheses. utime 500, stime 250, 7 threads, started 12300 ticks after
  // boot.
  proc.Write(
      "self/stat",
      "42 (a ) (b) S 1 1 1 0 -1 0 10 0 20 0 500 250 0 0 20 0 7 0 12300 1048576 256 18446744073709551615\n");
  proc.Write("stat", "cpu 1 2 3\nbtime 1700000000\nprocesses 5\n");
  proc.Write("self/limits",
             "Limit                     Soft Limit           Hard Limit           Units     \n"
             "Max open files            1024                 4096                 files     \n");
  std::filesystem::create_directories(proc.path() + "/self/fd");
  proc.Write("self/fd/0", "");
  proc.Write("self/fd/1", "");
  const double ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
  const std::map<std::string, double> expected = {
      {"process_cpu_seconds_total", 750 / ticks},
      {"process_threads", 7},
      {"process_virtual_memory_bytes", 1048576},
      {"process_resident_memory_bytes", 256.0 * static_cast<double>(sysconf(_SC_PAGESIZE))},
      {"process_start_time_seconds", 1700000000 + 12300 / ticks},
      {"process_open_fds", 2},
      {"process_max_fds", 1024}};
  EXPECT_EQ(Values(ProcessCollector(proc.path())), expected);
}

TEST(ProcessCollector, LeavesOutWhatCannotBeRead) {
  EXPECT_TRUE(ProcessCollector("/nonexistent").Collect().empty());
  ProcFolder proc;
  proc.Write("self/stat", "42 (truncated) S 1 1");
  EXPECT_TRUE(ProcessCollector(proc.path()).Collect().empty());
}

TEST(ProcessCollector, OfThisProcess) {
  const std::map<std::string, double> values = Values(ProcessCollector());
  EXPECT_EQ(values.size(), 7u);
  EXPECT_GT(values.at("process_resident_memory_bytes"), 1e5);
  EXPECT_GE(values.at("process_open_fds"), 3);
  const double now = static_cast<double>(std::time(nullptr));
  EXPECT_GT(values.at("process_start_time_seconds"), now - 86400);
  EXPECT_LT(values.at("process_start_time_seconds"), now + 60);
}

}  // namespace
}  // namespace kvtide::metrics
