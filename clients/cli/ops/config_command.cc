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
#include "absl/strings/str_join.h"
#include "clients/cli/ops/daemon_flags.h"
#include "clients/cli/terminal/command_status.h"
#include "clients/cli/terminal/json_text.h"
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
  DaemonFlags daemon;
  bool running = false;  // ask the daemon
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
    Say(JsonText(json));
  } else {
    for (const std::string& warning : warnings)
      std::fprintf(stderr, "warning: %s\n", Printable(warning).c_str());
    if (status.ok()) {
      Say(Printable(file) + ": good; kvtided would start with it\n");
    } else {
      SayFailed("kvtide config", status);
    }
  }
  return ExitCode(status);
}

// Settings as one daemon has them: as it would start here, or as it runs.
void Print(const client::RunningConfig& config, const std::string& output) {
  if (output == "json") {
    Json json = {{"file", config.file.empty() ? Json() : Json(config.file)}};
    json["settings"] = Json::array();
    for (const client::ConfigValue& value : config.values) {
      json["settings"].push_back(
          {{"name", value.name}, {"value", value.value}, {"source", value.source}, {"live", value.live}});
      if (const Setting* const setting = FindSetting(value.name); setting != nullptr) {
        json["settings"].back()["flag"] = setting->Flag();
        json["settings"].back()["environment"] = setting->Environment();
      }
    }
    Say(JsonText(json));
    return;
  }
  Table table({{"setting", Align::kLeft}, {"value", Align::kLeft}, {"from", Align::kLeft}});
  for (const client::ConfigValue& value : config.values) {
    std::string from = value.source;
    if (from == NameOf(Source::kFile)) from = config.file;
    if (const Setting* const setting = FindSetting(value.name); setting != nullptr) {
      if (from == NameOf(Source::kEnvironment)) from = setting->Environment();
      if (from == NameOf(Source::kFlag)) from = setting->Flag();
    }
    table.AddRow({value.name, value.value.empty() ? "-" : value.value, from},
                 value.source == NameOf(Source::kDefault) ? Paint::kDim : Paint::kPlain);
  }
  Say(table.Render(Terminal::Of(STDOUT_FILENO)));
}

absl::Status Show(const ConfigFlags& flags) {
  if (flags.running) {
    if (!flags.file.empty() || !flags.daemon_words.empty())
      return absl::InvalidArgumentError("--running asks the daemon: leave --config and flags of kvtided out");
    KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<client::Client> client, flags.daemon.Connect());
    KVTIDE_ASSIGN_OR_RETURN(const client::RunningConfig config, client->GetConfig());
    Print(config, flags.output);
    return absl::OkStatus();
  }
  KVTIDE_ASSIGN_OR_RETURN(const ConfigLayers layers, Gather(flags));
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<EffectiveValue> values, EffectiveValues(layers));
  client::RunningConfig config;
  config.file = layers.file_name;
  for (const EffectiveValue& value : values)
    config.values.push_back({value.setting->field, value.value, NameOf(value.source), value.setting->live});
  Print(config, flags.output);
  return absl::OkStatus();
}

absl::Status Reload(const ConfigFlags& flags) {
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<client::Client> client, flags.daemon.Connect());
  KVTIDE_ASSIGN_OR_RETURN(const client::ConfigChanges changes, client->ReloadConfig());
  if (flags.output == "json") {
    const Json json = {{"changed", changes.changed}, {"needs_restart", changes.needs_restart}};
    Say(JsonText(json));
    return absl::OkStatus();
  }
  Say(absl::StrCat("changed: ", changes.changed.empty() ? "nothing" : absl::StrJoin(changes.changed, ", "),
                   "\n"));
  if (!changes.needs_restart.empty())
    Say(absl::StrCat("waits for a restart: ", absl::StrJoin(changes.needs_restart, ", "), "\n"));
  return absl::OkStatus();
}

// Its exit code.
int Tell(const absl::Status& status) {
  SayFailed("kvtide config", status);
  return ExitCode(status);
}

void AddOutput(CLI::App* command, ConfigFlags* flags) {
  command->add_option("--output", flags->output, "table or json")
      ->capture_default_str()
      ->check(CLI::IsMember({"table", "json"}));
}

void AddCommon(CLI::App* command, ConfigFlags* flags) {
  command->add_option(
      "--config", flags->file,
      "The configuration file (default: $KVTIDE_CONFIG, else /etc/kvtide/kvtided.json if it is there)");
  AddOutput(command, flags);
  command->add_option("flags", flags->daemon_words, "Flags of kvtided, after --");
}

}  // namespace

void AddConfigCommand(CLI::App& app, int* exit_code) {
  CLI::App* config =
      app.add_subcommand("config", "What a kvtided would run with, or does: check it, show it, reload it");
  config->require_subcommand(1);
  config->footer(
      "Examples:\n"
      "  kvtide config check --config kvtided.json     before the restart, not by it\n"
      "  kvtide config show -- --device cpu            every value, and where it comes from\n"
      "  kvtide config show --running                  of the daemon that runs\n"
      "  kvtide config reload                          limits, log level, watermarks, tokens: without a "
      "restart\n"
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
  show->add_flag("--running", flags->running, "Ask the daemon that runs, as one of its admins");
  flags->daemon.AddTo(show);
  show->callback([flags, exit_code] { *exit_code = Tell(Show(*flags)); });

  flags = std::make_shared<ConfigFlags>();
  CLI::App* reload =
      config->add_subcommand("reload", "Have a kvtided read its configuration and tokens again");
  reload->footer(
      "Examples:\n"
      "  kvtide config reload\n"
      "As SIGHUP does (systemctl reload kvtided), but it says what has changed and what waits for a restart. "
      "For admins.");
  AddOutput(reload, flags.get());
  flags->daemon.AddTo(reload);
  reload->callback([flags, exit_code] { *exit_code = Tell(Reload(*flags)); });
}

}  // namespace kvtide::cli
