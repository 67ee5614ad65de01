#include "clients/cli/ops/doctor_engine.h"

#include <sys/wait.h>

#include <cstdio>

#include "absl/strings/str_cat.h"
#include "clients/cli/terminal/shell_words.h"
#include "nlohmann/json.hpp"

namespace kvtide::cli {
namespace {

std::string Text(const nlohmann::json& finding, const char* field) {
  const auto at = finding.find(field);
  return at != finding.end() && at->is_string() ? at->get<std::string>() : "";
}

}  // namespace

std::vector<Finding> EngineFindings(const std::string& engine, const std::string& python,
                                    const std::string& output, int exit_code) {
  const nlohmann::json answer = nlohmann::json::parse(output, nullptr, false);
  if (!answer.is_array() || answer.empty()) {
    constexpr int kNotFound = 127;
    const bool missing = exit_code == kNotFound || exit_code < 0;
    return {{Verdict::kFail, engine,
             missing ? absl::StrCat("there is no ", python)
                     : absl::StrCat("kvtide is not installed for ", python, " (exit code ", exit_code, ")"),
             absl::StrCat(missing ? "" : "pip install kvtide in the environment of the engine, or ",
                          "name the engine's interpreter with --python")}};
  }
  std::vector<Finding> findings;
  for (const nlohmann::json& one : answer) {
    if (!one.is_object()) continue;
    const std::string verdict = Text(one, "verdict");
    findings.push_back({verdict == "ok"     ? Verdict::kOk
                        : verdict == "warn" ? Verdict::kWarn
                                            : Verdict::kFail,
                        Text(one, "subject"), Text(one, "text"), Text(one, "advice")});
  }
  return findings;
}

std::vector<Finding> ExamineEngine(const std::string& engine, const std::string& python,
                                   const std::string& address) {
  const std::string line = absl::StrCat(ShellQuoted(python), " -m kvtide.doctor ", ShellQuoted(engine),
                                        " --address ", ShellQuoted(address), " 2>/dev/null");
  std::string output;
  int exit_code = -1;
  if (FILE* pipe = popen(line.c_str(), "r")) {
    char part[4096];
    constexpr size_t kMost = 1 << 20;
    for (size_t n = 0; output.size() < kMost && (n = std::fread(part, 1, sizeof(part), pipe)) > 0;)
      output.append(part, n);
    const int status = pclose(pipe);
    if (WIFEXITED(status)) exit_code = WEXITSTATUS(status);
  }
  return EngineFindings(engine, python, output, exit_code);
}

}  // namespace kvtide::cli
