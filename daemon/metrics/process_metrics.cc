#include "daemon/metrics/process_metrics.h"

#include <sys/resource.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <system_error>

#include "daemon/metrics/metric_families.h"
#ifdef KVTIDE_JEMALLOC
#include <jemalloc/jemalloc.h>
#endif

namespace kvtide::metrics {
namespace {

// Fields of /proc/self/stat after the command, which may hold any character but ends with ')'. Field 3 is the
// first.
std::vector<std::string> StatFields() {
  std::ifstream file("/proc/self/stat");
  std::string text;
  std::getline(file, text);
  std::vector<std::string> fields;
  const size_t end = text.rfind(')');
  if (end == std::string::npos) return fields;
  std::istringstream rest(text.substr(end + 1));
  for (std::string field; rest >> field;) fields.push_back(field);
  return fields;
}

double BootTime() {
  std::ifstream file("/proc/stat");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 6, "btime ") == 0) return std::stod(line.substr(6));
  }
  return 0;
}

void AddProcess(FamilyList* list) {
  const std::vector<std::string> fields = StatFields();
  constexpr size_t kUser = 11, kSystem = 12, kThreads = 17, kStart = 19, kVirtual = 20, kResident = 21;
  if (fields.size() <= kResident) return;
  const double tick = static_cast<double>(::sysconf(_SC_CLK_TCK)),
               page = static_cast<double>(::sysconf(_SC_PAGESIZE));
  list->Counter("process_cpu_seconds_total", "Processor time, user and system.")
      .Value((std::stod(fields[kUser]) + std::stod(fields[kSystem])) / tick);
  list->Gauge("process_resident_memory_bytes", "Resident memory.").Value(std::stod(fields[kResident]) * page);
  list->Gauge("process_virtual_memory_bytes", "Virtual memory.").Value(std::stod(fields[kVirtual]));
  list->Gauge("process_threads", "Threads.").Value(std::stod(fields[kThreads]));
  list->Gauge("process_start_time_seconds", "Start, since the epoch.")
      .Value(BootTime() + std::stod(fields[kStart]) / tick);
  std::error_code error;
  uint64_t files = 0;
  for (auto entry = std::filesystem::directory_iterator("/proc/self/fd", error);
       !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    files++;
  }
  list->Gauge("process_open_fds", "Open files.").Value(files);
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    list->Gauge("process_max_fds", "Most files that may be open.")
        .Value(static_cast<uint64_t>(limit.rlim_cur));
  }
}

#ifdef KVTIDE_JEMALLOC
void AddAllocator(FamilyList* list) {
  uint64_t epoch = 1;
  size_t size = sizeof(epoch);
  // The statistics are those of the last epoch.
  mallctl("epoch", &epoch, &size, &epoch, size);
  const struct {
    const char* key;
    const char* name;
    const char* help;
  } kStatistics[] = {
      {"stats.allocated", "kvtide_malloc_allocated_bytes",
       "Bytes that the program has allocated (jemalloc)."},
      {"stats.active", "kvtide_malloc_active_bytes", "Bytes in pages with allocations."},
      {"stats.metadata", "kvtide_malloc_metadata_bytes", "Bytes of the allocator itself."},
      {"stats.resident", "kvtide_malloc_resident_bytes", "Bytes that the allocator has in memory."},
      {"stats.mapped", "kvtide_malloc_mapped_bytes", "Bytes that the allocator has mapped."},
      {"stats.retained", "kvtide_malloc_retained_bytes",
       "Bytes kept in address space but returned to the kernel."},
  };
  for (const auto& statistic : kStatistics) {
    size_t value = 0;
    size_t value_size = sizeof(value);
    if (mallctl(statistic.key, &value, &value_size, nullptr, 0) != 0) continue;
    list->Gauge(statistic.name, statistic.help).Value(static_cast<uint64_t>(value));
  }
}
#else
void AddAllocator(FamilyList*) {}
#endif

}  // namespace

std::vector<prometheus::MetricFamily> ProcessMetrics::Collect() const {
  FamilyList list;
  AddProcess(&list);
  AddAllocator(&list);
  return list.Take();
}

}  // namespace kvtide::metrics
