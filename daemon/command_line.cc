#include "daemon/command_line.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "daemon/settings.h"

namespace kvtide {
namespace {

void Set(const Setting& setting, const std::string& text, v1::KvtidedConfig* config) {
  if (const absl::Status status = SetFromText(setting, text, config); !status.ok())
    throw CLI::ValidationError(setting.Flag(), std::string(status.message()));
}

}  // namespace

void AddSettingFlags(CLI::App* app, v1::KvtidedConfig* config) {
  for (const Setting& setting : AllSettings()) {
    const std::string help = absl::StrCat(setting.help, " [", setting.Environment(), "]");
    if (setting.is_switch()) {
      // "true" without a value. What is wrong with one gets the name of the flag from the library.
      app->add_flag(setting.Flag(), help)->each([&setting, config](const std::string& text) {
        if (const absl::Status status = SetFromText(setting, text, config); !status.ok())
          throw CLI::ValidationError(std::string(status.message()));
      });
    } else if (setting.repeated()) {
      app->add_option_function<std::vector<std::string>>(
             setting.Flag(),
             [&setting, config](const std::vector<std::string>& all) {
               for (const std::string& text : all) Set(setting, text, config);
             },
             help)
          ->allow_extra_args(false);
    } else {
      app->add_option_function<std::string>(
          setting.Flag(), [&setting, config](const std::string& text) { Set(setting, text, config); }, help);
    }
  }
}

void AddCommandLine(CLI::App* app, CommandLine* flags) {
  app->add_option("--config", flags->config_file,
                  "JSON file; kvtide/v1/kvtided_config.proto lists its fields [KVTIDE_CONFIG]");
  AddSettingFlags(app, &flags->config);
  app->add_option(
      "--rekey-disk", flags->rekey_disk,
      "file with a new key for the disk tier instead of that in disk_key_file: change it and stop");
  app->add_flag("--print-config", flags->print_config, "print the configuration as JSON and stop");
  app->add_flag("--version", flags->version, "print the version and stop");
  app->footer(
      "Every option is a field of the configuration file and a variable of the environment too: "
      "--host-memory, "
      "\"host_memory\", KVTIDE_HOST_MEMORY.\n"
      "Flags win over the environment, that over the file. `kvtide config show` says what comes from where.\n"
      "Examples:\n"
      "  kvtided                                                   a Unix socket, 1 GiB of device memory\n"
      "  kvtided --device cpu --device-memory 256MiB --listen unix:/tmp/kv/kvtided.sock\n"
      "  kvtided --config /etc/kvtide/kvtided.json                 as `kvtide plan --output kvtided-config` "
      "writes it\n"
      "  kvtided --listen unix:/run/kvtide/kvtided.sock --listen 127.0.0.1:7600\n"
      "Stop it with SIGTERM or Ctrl-C: it finishes the calls under way.");
}

}  // namespace kvtide
