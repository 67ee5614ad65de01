// The file that a benchmark leaves (--json FILE): facts, and lists of rows.
#pragma once

#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

namespace kvtide::bench {

using Result = nlohmann::ordered_json;  // names stay in the order in which they were given

inline double Tenth(double value) { return std::round(10 * value) / 10; }

// The exit status of the benchmark. No path: nothing is written.
inline int WriteResult(const Result& result, const std::string& path) {
  if (path.empty()) return 0;
  std::ofstream file(path);
  file << result.dump(1) << "\n";
  if (file.flush()) return 0;
  std::printf("cannot write %s\n", path.c_str());
  return 1;
}

}  // namespace kvtide::bench
