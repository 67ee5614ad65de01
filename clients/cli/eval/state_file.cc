#include "clients/cli/eval/state_file.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace kvtide::cli {

using nlohmann::json;

absl::StatusOr<json> ReadStateFile(const std::string& path, const std::string& key, const std::string& name) {
  std::ifstream in(path);
  if (path.empty() || !in) return json();
  try {
    const json file = json::parse(in);
    if (file.at("run") != key) {
      return absl::FailedPreconditionError(absl::StrCat(path, " belongs to another run (",
                                                        std::string(file.at("run")), "); this one is ", key,
                                                        ". Remove it or name another file."));
    }
    return file.at(name);
  } catch (const json::exception& error) {
    return NotAState(path, error.what());
  }
}

absl::Status WriteStateFile(const std::string& path, const std::string& key, const std::string& name,
                            const json& results) {
  if (path.empty()) return absl::OkStatus();
  const std::string part = path + ".part";
  std::ofstream out(part);
  out << json{{"run", key}, {name, results}}.dump() << "\n";
  out.close();
  if (!out || std::rename(part.c_str(), path.c_str()) != 0) {
    return absl::InternalError(absl::StrCat("cannot write ", path, ": ", std::strerror(errno)));
  }
  return absl::OkStatus();
}

absl::Status NotAState(const std::string& path, const std::string& why) {
  return absl::InvalidArgumentError(absl::StrCat(path, " is not a state of kvtide eval: ", why));
}

}  // namespace kvtide::cli
