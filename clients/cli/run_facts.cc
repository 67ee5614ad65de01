#include "clients/cli/run_facts.h"

#include <ctime>
#include <fstream>

#include "absl/strings/str_cat.h"

namespace kvtide::cli {

std::string Today() {
  const std::time_t now = std::time(nullptr);
  char text[16];
  std::tm parts{};
  gmtime_r(&now, &parts);
  std::strftime(text, sizeof(text), "%Y-%m-%d", &parts);
  return text;
}

std::string Machine() {
  std::ifstream in("/proc/cpuinfo");
  std::string line, name = "unknown CPU";
  int cores = 0;
  while (std::getline(in, line)) {
    if (line.rfind("processor", 0) == 0) ++cores;
    if (line.rfind("model name", 0) == 0) name = line.substr(line.find(':') + 2);
  }
  return absl::StrCat(name, ", ", cores, " cores");
}

}  // namespace kvtide::cli
