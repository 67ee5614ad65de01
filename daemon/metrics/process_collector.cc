#include "daemon/metrics/process_collector.h"

#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>

#include "daemon/metrics/family.h"

namespace kvtide::metrics {
namespace {

std::string ReadAll(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Fields of /proc/PID/stat from the third one on (proc(5) numbers them from 1). The second is the name in
// parentheses, which may hold anything.
std::vector<std::string> StatFields(const std::string& stat) {
  const size_t end = stat.rfind(')');
  if (end == std::string::npos) return {};
  std::istringstream words(stat.substr(end + 1));
  return {std::istream_iterator<std::string>(words), std::istream_iterator<std::string>()};
}

double Number(const std::string& text) {
  double number = 0;
  std::istringstream(text) >> number;
  return number;
}

// The number after `key` in a file of "key number" lines; -1 if there is none.
double ValueAfter(const std::string& text, const std::string& key) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.compare(0, key.size(), key) == 0) return Number(line.substr(key.size()));
  }
  return -1;
}

}  // namespace

std::vector<prometheus::MetricFamily> ProcessCollector::Collect() const {
  std::vector<prometheus::MetricFamily> families;
  FamilyWriter writer(&families);
  const std::string self = proc_ + "/self/";
  const double ticks = static_cast<double>(sysconf(_SC_CLK_TCK));

  // Field numbers of proc(5), less 3.
  constexpr size_t kUserTime = 11, kSystemTime = 12, kThreads = 17, kStartTime = 19, kVirtual = 20,
                   kResident = 21;
  const std::vector<std::string> fields = StatFields(ReadAll(self + "stat"));
  if (fields.size() > kResident) {
    writer.Counter("process_cpu_seconds_total", "Processor time of the process, user and system.")
        .Sample((Number(fields[kUserTime]) + Number(fields[kSystemTime])) / ticks);
    writer.Gauge("process_threads", "Threads of the process.").Sample(Number(fields[kThreads]));
    writer.Gauge("process_virtual_memory_bytes", "Address space of the process.")
        .Sample(Number(fields[kVirtual]));
    writer.Gauge("process_resident_memory_bytes", "Memory of the process, its tiers in host memory included.")
        .Sample(Number(fields[kResident]) * static_cast<double>(sysconf(_SC_PAGESIZE)));
    const double boot = ValueAfter(ReadAll(proc_ + "/stat"), "btime ");
    if (boot >= 0) {
      writer.Gauge("process_start_time_seconds", "Start of the process in Unix time.")
          .Sample(boot + Number(fields[kStartTime]) / ticks);
    }
  }
  std::error_code error;
  std::filesystem::directory_iterator entries(self + "fd", error);
  if (!error) {
    writer.Gauge("process_open_fds", "Open file descriptors.")
        .Sample(static_cast<double>(std::distance(begin(entries), end(entries))));
  }
  const double max_fds = ValueAfter(ReadAll(self + "limits"), "Max open files");
  if (max_fds >= 0) writer.Gauge("process_max_fds", "Most open file descriptors.").Sample(max_fds);
  return families;
}

}  // namespace kvtide::metrics
