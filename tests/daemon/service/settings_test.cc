#include "daemon/settings.h"

#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>

#include "daemon/command_line.h"
#include "daemon/running_config.h"
#include "gmock/gmock.h"
#include "google/protobuf/util/message_differencer.h"
#include "gtest/gtest.h"
#include "tests/source_path.h"

namespace kvtide {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;

// An environment of these variables only.
Environment Of(std::map<std::string, std::string> variables) {
  return [variables = std::move(variables)](const char* name) -> const char* {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  };
}

std::map<std::string, EffectiveValue> ByName(const ConfigLayers& layers) {
  std::map<std::string, EffectiveValue> values;
  const auto all = EffectiveValues(layers);
  EXPECT_TRUE(all.ok()) << all.status();
  for (const EffectiveValue& value : *all) values.emplace(value.setting->field, value);
  return values;
}

TEST(Settings, AreAllFieldsOfTheConfigurationOnce) {
  std::set<std::string> missing, seen;
  const auto* const message = v1::KvtidedConfig::descriptor();
  for (int i = 0; i < message->field_count(); i++) missing.insert(message->field(i)->name());
  for (const Setting& setting : AllSettings()) {
    EXPECT_TRUE(seen.insert(setting.field).second) << setting.field;
    EXPECT_EQ(missing.erase(setting.field), 1u) << setting.field;
    EXPECT_EQ(FindSetting(setting.field), &setting);
  }
  // Other ways to write device_memory and host_memory, in files.
  EXPECT_THAT(missing, UnorderedElementsAre("device_tier_bytes", "host_tier_bytes"));
  EXPECT_EQ(FindSetting("devise"), nullptr);
  EXPECT_EQ(FindSetting("device_memory")->Flag(), "--device-memory");
  EXPECT_EQ(FindSetting("device_memory")->Environment(), "KVTIDE_DEVICE_MEMORY");
}

TEST(Settings, EveryOneIsAFlag) {
  CLI::App app;
  CommandLine flags;
  AddCommandLine(&app, &flags);
  for (const Setting& setting : AllSettings()) {
    const CLI::Option* const option = app.get_option_no_throw(setting.Flag());
    ASSERT_NE(option, nullptr) << setting.field;
    EXPECT_THAT(option->get_description(), HasSubstr(setting.Environment()));
  }
}

TEST(Settings, ASwitchMayBeGivenAValue) {
  for (const Setting& setting : AllSettings()) {
    if (!setting.is_switch()) continue;
    const auto parse = [&](const std::string& word) {
      CLI::App app;
      CommandLine flags;
      AddCommandLine(&app, &flags);
      app.parse(word);
      return TextOf(setting, flags.config);
    };
    EXPECT_EQ(parse(setting.Flag()), "true");
    EXPECT_EQ(parse(setting.Flag() + "=true"), "true");
    EXPECT_EQ(parse(setting.Flag() + "=false"), "false");
    EXPECT_THROW(parse(setting.Flag() + "=maybe"), CLI::ParseError) << setting.field;
  }
}

TEST(Settings, WhatTextSaysComesBack) {
  const std::map<std::string, std::string> kTexts = {{"device", "cpu"},
                                                     {"idle_seconds", "7"},
                                                     {"slow_call_ms", "-1"},
                                                     {"max_message_bytes", "5000000000"},
                                                     {"allow_insecure_tcp", "true"},
                                                     {"exact_window", "3,4"}};
  for (const auto& [field, text] : kTexts) {
    v1::KvtidedConfig config;
    const Setting& setting = *FindSetting(field);
    EXPECT_FALSE(IsSet(setting, config)) << field;
    ASSERT_TRUE(SetFromText(setting, text, &config).ok()) << field;
    EXPECT_TRUE(IsSet(setting, config)) << field;
    EXPECT_EQ(TextOf(setting, config), text);
  }
  for (const auto& [field, text] : std::map<std::string, std::string>{{"idle_seconds", "7s"},
                                                                      {"idle_seconds", ""},
                                                                      {"slow_call_ms", "9999999999"},
                                                                      {"allow_insecure_tcp", "perhaps"},
                                                                      {"exact_window", "1"},
                                                                      {"exact_window", "1,2,3"}}) {
    v1::KvtidedConfig config;
    EXPECT_EQ(SetFromText(*FindSetting(field), text, &config).code(), absl::StatusCode::kInvalidArgument)
        << field << " " << text;
  }
}

TEST(Settings, FlagsWinOverTheEnvironmentAndThatOverTheFile) {
  const std::string file = ::testing::TempDir() + "/kvtide_settings_test.json";
  std::ofstream(file)
      << R"({"device": "cpu", "listen": ["unix:/a"], "log_level": "error", "host_tier_bytes": 1048576,
                             "exact_window": {"first_blocks": 1, "last_blocks": 5}, "idle_seconds": 9})";
  v1::KvtidedConfig flags;
  flags.set_log_level("debug");
  const auto layers = GatherConfig("", flags,
                                   Of({{"KVTIDE_CONFIG", file},
                                       {"KVTIDE_LISTEN", "unix:/b  unix:/c"},
                                       {"KVTIDE_LOG_LEVEL", "trace"},
                                       {"KVTIDE_IDLE_SECONDS", "11"},
                                       {"KVTIDE_EXACT_WINDOW", "4,0"},
                                       {"KVTIDE_DISK", ""}}));
  ASSERT_TRUE(layers.ok()) << layers.status();
  EXPECT_EQ(layers->file_name, file);
  EXPECT_THAT(layers->Merged().listen(), ElementsAre("unix:/b", "unix:/c"));
  const auto values = ByName(*layers);
  const auto expect = [&](const char* name, const char* value, Source source) {
    EXPECT_EQ(values.at(name).value, value) << name;
    EXPECT_EQ(NameOf(values.at(name).source), std::string(NameOf(source))) << name;
  };
  expect("device", "cpu", Source::kFile);
  expect("listen", "unix:/b unix:/c", Source::kEnvironment);
  expect("log_level", "debug", Source::kFlag);
  expect("host_memory", "1MiB", Source::kFile);
  expect("idle_seconds", "11", Source::kEnvironment);
  expect("exact_window", "4,0", Source::kEnvironment);
  expect("disk", "off", Source::kDefault);
  expect("device_memory", "1GiB", Source::kDefault);
}

// What is shown is what it would be: written into a file, it gives the same daemon.
TEST(Settings, TheEffectiveConfigurationIsAConfiguration) {
  v1::KvtidedConfig asked;
  asked.set_device("cpu");
  asked.set_device_tier_bytes((1 << 20) + 512);
  asked.set_host_memory("0");
  asked.set_disk("/tmp/kvtide-nowhere:3MiB");
  asked.set_persist("all");
  asked.set_remote("cache");
  asked.set_remote_ttl_seconds(-1);
  asked.set_calibrate("all");
  asked.set_calibrate_memory("256MiB");
  asked.set_record_trace("/tmp/kvtide-nowhere.trace:2MiB");
  asked.add_quota("acme:sequences=3,device=1MiB");
  asked.set_slow_call_ms(-1);
  for (const v1::KvtidedConfig& config : {v1::KvtidedConfig(), asked}) {
    const auto options = ResolveConfig(config);
    ASSERT_TRUE(options.ok()) << options.status();
    const v1::KvtidedConfig full = WithDefaults(config, *options);
    const auto again = ResolveConfig(full);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(full, WithDefaults(full, *again)))
        << full.DebugString();
    EXPECT_EQ(options->device_bytes, again->device_bytes);
    EXPECT_EQ(options->host_bytes, again->host_bytes);
    EXPECT_EQ(options->disk_bytes, again->disk_bytes);
    EXPECT_EQ(options->slow_call, again->slow_call);
    // Nothing is left to a default that only the code knows, but what has none.
    const std::set<std::string> kNone = {
        "allow",        "quota",         "server_cert",  "server_key",         "remote_auth_file",
        "remote_ca",    "client_ca",     "tokens",       "allow_insecure_tcp", "share_pool",
        "host_sharing", "disk_key_file"};
    for (const Setting& setting : AllSettings())
      EXPECT_TRUE(IsSet(setting, full) || kNone.contains(setting.field)) << setting.field;
  }
}

TEST(RunningConfig, ChangesWhatIsLiveAndTellsWhatWaits) {
  const std::string file = ::testing::TempDir() + "/kvtide_running_config.json";
  std::ofstream(file) << R"({"device": "cpu", "log_level": "info", "host_memory": "2MiB"})";
  v1::KvtidedConfig flags;
  flags.set_slow_call_ms(5);
  const auto layers = GatherConfig(file, flags, Of({}));
  RunningConfig config(*layers, *ResolveConfig(layers->Merged()));
  const auto value = [&](const std::string& name) {
    const v1::GetConfigResponse all = config.Describe();
    for (const v1::ConfigValue& one : all.values())
      if (one.name() == name) return one.value() + " " + one.source();
    return std::string();
  };
  std::ofstream(file) << R"({"device": "cpu", "log_level": "debug", "host_memory": "3MiB", "slow_call_ms": 9,
                             "quota": ["a:calls=1"], "low_watermark": 0.5})";
  int applied = 0;
  const auto apply = [&](const DaemonOptions& now) {
    applied++;
    EXPECT_EQ(now.log_level, "debug");
    EXPECT_EQ(now.slow_call, absl::Milliseconds(5)) << "the flag wins";
    EXPECT_EQ(now.cache.limits.low_watermark, 0.5);
    EXPECT_EQ(now.service.quotas->CallsOf("a"), 1u);
    return absl::OkStatus();
  };
  const auto changes = config.Reload(apply, Of({}));
  ASSERT_TRUE(changes.ok()) << changes.status();
  EXPECT_THAT(changes->changed(), UnorderedElementsAre("log_level", "quota", "low_watermark"));
  EXPECT_THAT(changes->needs_restart(), ElementsAre("host_memory"));
  EXPECT_EQ(value("log_level"), "debug file");
  EXPECT_EQ(value("host_memory"), "2MiB file") << "as it runs";
  // Again: nothing new, but what waits.
  EXPECT_THAT(config.Reload(apply, Of({}))->changed(), ElementsAre());
  EXPECT_THAT(config.Reload(apply, Of({}))->needs_restart(), ElementsAre("host_memory"));
  EXPECT_EQ(applied, 3);
  // A bad file, or one that cannot be applied, changes nothing.
  std::ofstream(file) << R"({"log_level": "error", "low_watermark": 2})";
  EXPECT_THAT(std::string(config.Reload(apply, Of({})).status().message()), HasSubstr("low_watermark is 2"));
  std::ofstream(file) << R"({"log_level": "error"})";
  EXPECT_FALSE(config.Reload([](const DaemonOptions&) { return absl::InternalError("no"); }, Of({})).ok());
  EXPECT_EQ(applied, 3);
  EXPECT_EQ(value("log_level"), "debug file");
}

// A text that sets a field of its kind to something, and one that sets it to what a field has that is not
// set.
std::pair<std::string, std::string> SomethingAndNothing(const Setting& setting) {
  using google::protobuf::FieldDescriptor;
  switch (v1::KvtidedConfig::descriptor()->FindFieldByName(setting.field)->cpp_type()) {
    case FieldDescriptor::CPPTYPE_STRING:
      return {"something", ""};
    case FieldDescriptor::CPPTYPE_BOOL:
      return {"true", "false"};
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return {"3,4", "0,0"};
    default:
      return {"7", "0"};
  }
}

// Of every kind of field: what is said above wins, whatever it says.
TEST(Settings, FalseZeroAndEmptyWinOverTheFileToo) {
  for (const Setting& setting : AllSettings()) {
    const auto [something, nothing] = SomethingAndNothing(setting);
    ConfigLayers layers;
    ASSERT_TRUE(SetFromText(setting, something, &layers.file).ok()) << setting.field;
    EXPECT_EQ(TextOf(setting, layers.Merged()), something) << setting.field;
    ConfigLayers by_flag = layers, by_variable = layers;
    ASSERT_TRUE(SetFromText(setting, nothing, &by_flag.flags).ok()) << setting.field;
    ASSERT_TRUE(SetFromText(setting, nothing, &by_variable.environment).ok()) << setting.field;
    EXPECT_EQ(TextOf(setting, by_flag.Merged()), nothing) << setting.field;
    EXPECT_EQ(by_flag.SourceOf(setting), Source::kFlag) << setting.field;
    EXPECT_EQ(TextOf(setting, by_variable.Merged()), nothing) << setting.field;
    EXPECT_EQ(by_variable.SourceOf(setting), Source::kEnvironment) << setting.field;
    // And the flag over the variable.
    ASSERT_TRUE(SetFromText(setting, something, &by_flag.environment).ok());
    EXPECT_EQ(TextOf(setting, by_flag.Merged()), nothing) << setting.field;
  }
}

TEST(Settings, WhatIsAboveWinsAsItIsRead) {
  const std::string file = ::testing::TempDir() + "precedence.json";
  std::ofstream(file) << R"({"host_sharing": true, "share_pool": true, "max_sequences": 5, "disk": "/d:1GiB",
                             "quota": ["acme:sequences=1"], "host_tier_bytes": 4194304})";
  CLI::App app;
  CommandLine flags;
  AddCommandLine(&app, &flags);
  const char* const words[] = {
      "kvtided", "--share-pool=false", "--quota", "", "--disk", "", "--max-sequences",
      "0",       "--host-memory",      ""};
  app.parse(static_cast<int>(std::size(words)), words);
  const auto layers =
      GatherConfig(file, flags.config, Of({{"KVTIDE_HOST_SHARING", "false"}, {"KVTIDE_DEVICE", ""}}));
  ASSERT_TRUE(layers.ok()) << layers.status();
  std::map<std::string, EffectiveValue> values = ByName(*layers);
  EXPECT_EQ(values.at("host_sharing").value, "false");
  EXPECT_EQ(values.at("host_sharing").source, Source::kEnvironment);
  EXPECT_EQ(values.at("share_pool").value, "false");
  EXPECT_EQ(values.at("quota").value, "");
  EXPECT_EQ(values.at("disk").value, "off");
  EXPECT_EQ(values.at("max_sequences").value, "16384");
  EXPECT_EQ(values.at("host_memory").value, "2GiB") << "not the bytes of the file";
  EXPECT_EQ(values.at("device").source, Source::kDefault) << "a variable that is empty is none";
}

TEST(Settings, ErrorsOfTheEnvironmentNameTheVariable) {
  const auto status = GatherConfig("", {}, Of({{"KVTIDE_IDLE_SECONDS", "soon"}})).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("KVTIDE_IDLE_SECONDS: 'soon' is not a whole number"));
  EXPECT_THAT(std::string(GatherConfig("/none.json", {}, Of({})).status().message()),
              HasSubstr("/none.json"));
}

TEST(Settings, VariablesThatNobodyReadsAreTold) {
  const char* const variables[] = {"HOME=/", "KVTIDE_DEVICE=cpu", "KVTIDE_ADDRESS=x", "KVTIDE_DEVISE=1",
                                   nullptr};
  EXPECT_THAT(UnknownVariables(variables),
              ElementsAre("no setting reads KVTIDE_DEVISE; did you mean KVTIDE_DEVICE?"));
  // What Kubernetes says of Services that are called kvtide and kvtide-metrics.
  const char* const services[] = {"KVTIDE_SERVICE_HOST=10.0.0.7",
                                  "KVTIDE_SERVICE_PORT=7600",
                                  "KVTIDE_SERVICE_PORT_GRPC=7600",
                                  "KVTIDE_PORT=tcp://10.0.0.7:7600",
                                  "KVTIDE_PORT_7600_TCP=tcp://10.0.0.7:7600",
                                  "KVTIDE_PORT_7600_TCP_PROTO=tcp",
                                  "KVTIDE_PORT_7600_TCP_PORT=7600",
                                  "KVTIDE_PORT_7600_TCP_ADDR=10.0.0.7",
                                  "KVTIDE_METRICS_SERVICE_HOST=10.0.0.8",
                                  nullptr};
  EXPECT_THAT(UnknownVariables(services), ElementsAre());
}

// What clients of this tree read is known.
TEST(Settings, VariablesOfClientsAreKnown) {
  std::set<std::string> names;
  const std::regex quoted("[\"'](KVTIDE_[A-Z_]*[A-Z])[\"']");
  for (const auto& entry : std::filesystem::recursive_directory_iterator(testing::SourcePath("clients"))) {
    const std::string end = entry.path().extension();
    if (end != ".cc" && end != ".h" && end != ".py") continue;
    std::ifstream file(entry.path());
    for (std::string line; std::getline(file, line);)
      for (std::sregex_iterator at(line.begin(), line.end(), quoted), last; at != last; ++at)
        names.insert((*at)[1].str() + "=1");
  }
  EXPECT_GT(names.size(), 8u);
  std::vector<const char*> variables;
  for (const std::string& name : names) variables.push_back(name.c_str());
  variables.push_back(nullptr);
  EXPECT_THAT(UnknownVariables(variables.data()), ElementsAre());
}

}  // namespace
}  // namespace kvtide
