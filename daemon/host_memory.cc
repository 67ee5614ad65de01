#include "daemon/host_memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace kvtide {
namespace {

// The number in a file; "max" and what version 1 writes for it (near 2^63) are no limit.
std::optional<int64_t> ReadBytes(const std::string& path) {
  std::ifstream file(path);
  int64_t bytes = 0;
  if (!(file >> bytes) || bytes < 0 || bytes > std::numeric_limits<int64_t>::max() / 2) return std::nullopt;
  return bytes;
}

// The number behind a name: "MemAvailable: 123 kB", "inactive_file 123".
int64_t ReadField(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string word;
    int64_t value = 0;
    if (words >> word >> value && word == name) return value;
  }
  return 0;
}

// How version 1 and 2 name the same things.
struct Names {
  const char *mount, *limit, *usage, *cache;
};
constexpr Names kVersion2 = {"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"};
constexpr Names kVersion1 = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                             "total_inactive_file"};

// A limit holds for all groups below: the group, its parents, and what is mounted (in a container the path
// may be one of the host's).
void Narrow(const std::string& root, const Names& names, std::string group, HostMemory* memory) {
  while (true) {
    while (!group.empty() && group.back() == '/') group.pop_back();
    const std::string folder = absl::StrCat(root, names.mount, group, "/");
    const std::optional<int64_t> limit = ReadBytes(folder + names.limit);
    if (limit.has_value()) {
      const int64_t used =
          ReadBytes(folder + names.usage).value_or(0) - ReadField(folder + "memory.stat", names.cache);
      const int64_t left = std::clamp<int64_t>(*limit - used, 0, *limit);
      if (memory->total == 0 || left < memory->available)
        memory->source = absl::StrCat(names.mount, group, "/", names.limit);
      memory->available = memory->total == 0 ? left : std::min(memory->available, left);
      memory->total = memory->total == 0 ? *limit : std::min(memory->total, *limit);
    }
    if (group.empty()) return;
    group.erase(group.find_last_of('/'));
  }
}

std::string Text(int64_t bytes) {
  return absl::StrCat(bytes >> 20, ".", ((bytes >> 10) % 1024) * 10 / 1024, " MiB");
}

}  // namespace

HostMemory ReadHostMemory(const std::string& root) {
  HostMemory memory;
  const std::string meminfo = root + "/proc/meminfo";
  memory.total = ReadField(meminfo, "MemTotal:") * 1024;
  memory.available = ReadField(meminfo, "MemAvailable:") * 1024;
  if (memory.available == 0) memory.available = memory.total;  // a kernel that does not say
  memory.source = "/proc/meminfo";
  // Lines of hierarchy:controllers:path; version 2 is hierarchy 0 without controllers.
  std::ifstream file(root + "/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {
    const std::vector<std::string> parts = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (parts.size() != 3) continue;
    const std::vector<std::string> controllers = absl::StrSplit(parts[1], ',');
    if (parts[1].empty()) {
      Narrow(root, kVersion2, parts[2], &memory);
    } else if (std::find(controllers.begin(), controllers.end(), "memory") != controllers.end()) {
      Narrow(root, kVersion1, parts[2], &memory);
    }
  }
  return memory;
}

absl::Status CheckHostMemory(int64_t wanted, const HostMemory& memory) {
  if (memory.total == 0 || wanted <= memory.available) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "the tiers want ", Text(wanted), " of host memory; ", Text(memory.available), " of ",
      Text(memory.total), " are available (", memory.source, "): lower --device-memory or --host-memory, or free some"));
}

}  // namespace kvtide
