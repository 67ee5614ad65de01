#include "clients/cli/ops/config_command.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "clients/cli/terminal/command_status.h"
#include "clients/cli/terminal/table.h"
#include "clients/cli/terminal/terminal.h"
#include "daemon/command_line.h"
#include "daemon/settings.h"
#include "kernels/base/status.h"
#include "nlohmann/json.hpp"
#include "planner/near_names.h"

namespace kvtide::cli {
namespace {

using Json = nlohmann::ordered_json;

// Where the service that the package installs finds its configuration.
constexpr char kInstalledFile[] = "/etc/kvtide/kvtided.json";

struct ConfigFlags {
  std::string file, output = "table";
  std::vector<std::string> daemon_words;  // flags of kvtided
};

absl::StatusOr<v1::KvtidedConfig> ParseDaemonWords(std::vector<std::string> words) {
  CLI::App app(kDaemonDescription, "kvtided");
  v1::KvtidedConfig config;
  AddSettingFlags(&app, &config);
  std::reverse(words.begin(), words.end());
  try {
    app.parse(words);
  } catch (const CLI::ExtrasError&) {
    std::vector<std::string> known;
    for (const Setting& setting : AllSettings()) known.push_back(setting.Flag());
    return absl::InvalidArgumentError(
        absl::StrCat("flags of kvtided: ", planner::UnknownArguments(app.remaining(), known)));
  } catch (const CLI::ParseError& error) {
    return absl::InvalidArgumentError(absl::StrCat("flags of kvtided: ", error.what()));
  }
  return config;
}

absl::StatusOr<ConfigLayers> Gather(const ConfigFlags& flags) {
  KVTIDE_ASSIGN_OR_RETURN(v1::KvtidedConfig words, ParseDaemonWords(flags.daemon_words));
  std::string file = flags.file;
  std::error_code error;
  if (file.empty() && ProcessEnvironment("KVTIDE_CONFIG") == nullptr &&
      std::filesystem::exists(kInstalledFile, error))
    file = kInstalledFile;
  return GatherConfig(std::move(file), std::move(words));
}

std::string NameOfFile(const ConfigLayers& layers) {
  return layers.file_name.empty() ? "no file" : layers.file_name;
}

// What kvtided accepts, and which is probably not what was meant.
std::vector<std::string> Warnings(const ConfigLayers& layers) {
  std::vector<std::string> warnings = UnknownVariables(::environ);
  const v1::KvtidedConfig config = layers.Merged();
  const auto text_over_bytes = [&](const char* text, const char* bytes) {
    warnings.push_back(absl::StrCat(text, " stands beside ", bytes, ", and wins"));
  };
  if (!config.device_memory().empty() && config.device_tier_bytes() != 0)
    text_over_bytes("device_memory", "device_tier_bytes");
  if (!config.host_memory().empty() && config.host_tier_bytes() != 0)
    text_over_bytes("host_memory", "host_tier_bytes");
  for (const Setting& setting : AllSettings())
    if (IsSet(setting, layers.environment) && IsSet(setting, layers.file) &&
        TextOf(setting, layers.environment) != TextOf(setting, layers.file))
      warnings.push_back(
          absl::StrCat(setting.field, " of the file is overridden by ", setting.Environment()));
  if (!config.tokens().empty()) {
    std::error_code error;
    const auto permissions = std::filesystem::status(config.tokens(), error).permissions();
    if (!error && (permissions & std::filesystem::perms::others_write) != std::filesystem::perms::none)
      warnings.push_back(absl::StrCat(config.tokens(), " can be written by everybody: chmod o-w"));
  }
  return warnings;
}

int Check(const ConfigFlags& flags) {
  const absl::StatusOr<ConfigLayers> layers = Gather(flags);
  absl::Status status = layers.status();
  std::vector<std::string> warnings;
  if (layers.ok()) {
    status = ResolveConfig(layers->Merged()).status();
    warnings = Warnings(*layers);
  }
  const std::string file = layers.ok() ? NameOfFile(*layers) : flags.file;
  if (flags.output == "json") {
    Json json = {{"ok", status.ok()}, {"file", file}, {"error", std::string(status.message())}};
    json["warnings"] = warnings;
    std::printf("%s\n", json.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
  } else {
    for (const std::string& warning : warnings)
      std::fprintf(stderr, "warning: %s\n", Printable(warning).c_str());
    if (status.ok()) {
      std::printf("%s: good; kvtided would start with it\n", Printable(file).c_str());
    } else {
      std::fprintf(stderr, "kvtide config: %s\n", std::string(status.message()).c_str());
    }
  }
  return ExitCode(status);
}

absl::Status Show(const ConfigFlags& flags) {
  KVTIDE_ASSIGN_OR_RETURN(const ConfigLayers layers, Gather(flags));
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<EffectiveValue> values, EffectiveValues(layers));
  if (flags.output == "json") {
    Json json = {{"file", layers.file_name.empty() ? Json() : Json(layers.file_name)}};
    json["settings"] = Json::array();
    for (const EffectiveValue& value : values)
      json["settings"].push_back({{"name", value.setting->field},
                                  {"value", value.value},
                                  {"source", NameOf(value.source)},
                                  {"flag", value.setting->Flag()},
                                  {"environment", value.setting->Environment()},
                                  {"live", value.setting->live}});
    std::printf("%s\n", json.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
    return absl::OkStatus();
  }
  Table table({{"setting", Align::kLeft}, {"value", Align::kLeft}, {"from", Align::kLeft}});
  for (const EffectiveValue& value : values) {
    std::string from = NameOf(value.source);
    if (value.source == Source::kFile) from = layers.file_name;
    if (value.source == Source::kEnvironment) from = value.setting->Environment();
    if (value.source == Source::kFlag) from = value.setting->Flag();
    table.AddRow({value.setting->field, value.value.empty() ? "-" : value.value, from},
                 value.source == Source::kDefault ? Paint::kDim : Paint::kPlain);
  }
  std::fputs(table.Render(Terminal::Of(STDOUT_FILENO)).c_str(), stdout);
  return absl::OkStatus();
}

void AddCommon(CLI::App* command, ConfigFlags* flags) {
  command->add_option(
      "--config", flags->file,
      "The configuration file (default: $KVTIDE_CONFIG, else /etc/kvtide/kvtided.json if it is there)");
  command->add_option("--output", flags->output, "table or json")
      ->capture_default_str()
      ->check(CLI::IsMember({"table", "json"}));
  command->add_option("flags", flags->daemon_words, "Flags of kvtided, after --");
}

}  // namespace

void AddConfigCommand(CLI::App& app, int* exit_code) {
  CLI::App* config = app.add_subcommand("config", "What a kvtided would run with: check it, show it");
  config->require_subcommand(1);
  config->footer(
      "Examples:\n"
      "  kvtide config check --config kvtided.json     before the restart, not by it\n"
      "  kvtide config show -- --device cpu            every value, and where it comes from\n"
      "Flags of kvtided win over variables KVTIDE_*, these over the file.");

  auto flags = std::make_shared<ConfigFlags>();
  CLI::App* check = config->add_subcommand("check", "Whether kvtided would take this configuration");
  check->footer(
      "Examples:\n"
      "  kvtide config check --config kvtided.json\n"
      "  kvtide plan --model llama-3.1-8b --device 'RTX 4090' --output kvtided-config > kvtided.json && "
      "kvtide config check --config kvtided.json\n"
      "Exit code 0: good; 2: not, and what is wrong.");
  AddCommon(check, flags.get());
  check->callback([flags, exit_code] { *exit_code = Check(*flags); });

  flags = std::make_shared<ConfigFlags>();
  CLI::App* show = config->add_subcommand("show", "Every setting, its value and where that comes from");
  show->footer(
      "Examples:\n"
      "  kvtide config show\n"
      "  kvtide config show --config kvtided.json --output json -- --host-memory 64GiB");
  AddCommon(show, flags.get());
  show->callback([flags, exit_code] {
    const absl::Status status = Show(*flags);
    if (!status.ok()) std::fprintf(stderr, "kvtide config: %s\n", std::string(status.message()).c_str());
    *exit_code = ExitCode(status);
  });
}

}  // namespace kvtide::cli
