#include "daemon/config.h"

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "planner/engines/kvtide_engine.h"

namespace kvtide {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::StatusOr<DaemonOptions> Resolve(const std::string& json) {
  auto config = ParseConfig(json, "test.json");
  if (!config.ok()) return config.status();
  return ResolveConfig(*config);
}

TEST(Config, DefaultsAreComplete) {
  const auto options = Resolve("{}");
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_THAT(options->devices, ElementsAre("auto"));
  EXPECT_EQ(options->device_bytes, int64_t{1} << 30);
  EXPECT_EQ(options->host_bytes, int64_t{2} << 30);
  EXPECT_EQ(options->service.listen.size(), 1u);
  EXPECT_EQ(options->service.max_message_bytes, int64_t{64} << 20);
  EXPECT_EQ(PairName(options->service.defaults.pair), "q8_0/turbo4");
  EXPECT_EQ(options->service.defaults.exact_window, ExactWindow{});
  EXPECT_EQ(options->metrics_address, "127.0.0.1:9464");
  EXPECT_EQ(static_cast<int64_t>(options->cache.max_plan_bytes), planner::kKvtidePlanBytes) << "in the bill";
}

TEST(Config, TakesSizesAsTextOrBytes) {
  EXPECT_EQ(Resolve("{\"device_memory\": \"3MiB\"}")->device_bytes, 3 << 20);
  EXPECT_EQ(Resolve("{\"device_tier_bytes\": 4194304, \"host_tier_bytes\": \"5242880\"}")->host_bytes,
            5 << 20);
  EXPECT_EQ(Resolve("{\"device_memory\": \"3MiB\", \"device_tier_bytes\": 4194304}")->device_bytes, 3 << 20);
  EXPECT_EQ(Resolve("{\"host_memory\": \"0\"}")->host_bytes, 0);
  EXPECT_FALSE(Resolve("{\"device_memory\": \"0\"}").ok());
  EXPECT_FALSE(Resolve("{\"host_memory\": \"100KiB\"}").ok());
  EXPECT_FALSE(Resolve("{\"device_tier_bytes\": -1}").ok());
}

TEST(Config, TheRemoteTierIsNamedAndBounded) {
  EXPECT_FALSE(Resolve("{}")->remote.has_value());
  EXPECT_FALSE(Resolve("{\"remote\": \"off\"}")->remote.has_value());
  EXPECT_FALSE(Resolve("{}")->service.waits_for_lookups);
  const auto options = Resolve(
      "{\"remote\": \"rediss://cache:7000/2\", \"remote_prefix\": \"prod\", \"remote_auth_file\": \"/a\", "
      "\"remote_ca\": \"/ca\", \"remote_write\": \"none\", \"remote_ttl_seconds\": -1, "
      "\"remote_timeout_ms\": 70, \"remote_read_ms\": 80}");
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->remote->address.Text(), "rediss://cache:7000/2");
  EXPECT_EQ(options->remote->prefix, "prod");
  EXPECT_EQ(options->remote->auth_file, "/a");
  EXPECT_EQ(options->remote->ca_file, "/ca");
  EXPECT_EQ(options->remote->writes, RemoteWrites::kNone);
  EXPECT_EQ(Resolve("{\"remote\": \"cache\", \"remote_write\": \"on-demote\"}")->remote->writes,
            RemoteWrites::kOnDemote);
  EXPECT_EQ(options->remote->ttl, absl::InfiniteDuration());
  EXPECT_EQ(options->remote->timeout, absl::Milliseconds(70));
  EXPECT_EQ(options->remote->read_time, absl::Milliseconds(80));
  EXPECT_TRUE(options->service.waits_for_lookups) << "they may take long";
  EXPECT_EQ(Resolve("{\"remote\": \"cache\"}")->remote->ttl, absl::Hours(24));
  const auto wrong = [](const std::string& json, const char* part) {
    EXPECT_THAT(std::string(Resolve(json).status().message()), HasSubstr(part)) << json;
  };
  wrong("{\"remote\": \"cache:x\"}", "is no port");
  wrong("{\"remote\": \"cache\", \"remote_write\": \"some\"}", "use all, on-demote or none");
  wrong("{\"remote\": \"cache\", \"remote_prefix\": \"a:b\"}", "remote_prefix");
  wrong("{\"remote\": \"cache\", \"remote_ca\": \"/ca\"}", "rediss://");
  wrong("{\"remote_ttl_seconds\": -2}", "remote_ttl_seconds");
  wrong("{\"remote_timeout_ms\": 1000000}", "remote_timeout_ms");
}

TEST(Config, EvictionHasANameThatIsKnown) {
  EXPECT_EQ(Resolve("{}")->cache.eviction, CacheOptions().eviction);
  EXPECT_EQ(Resolve("{\"eviction\": \"lru\"}")->cache.eviction, EvictionKind::kLru);
  EXPECT_EQ(Resolve("{\"eviction\": \"s3-fifo\"}")->cache.eviction, EvictionKind::kS3Fifo);
  EXPECT_THAT(std::string(Resolve("{\"eviction\": \"arc\"}").status().message()),
              HasSubstr("eviction \"arc\" is unknown; use lru or s3-fifo"));
}

TEST(Config, LowerTiersAreAttendedByCostUnlessItIsForced) {
  EXPECT_EQ(Resolve("{}")->cache.attend_lower_tiers, AttendLowerTiers::kCost);
  EXPECT_EQ(Resolve("{\"attend_lower_tiers\": \"in-place\"}")->cache.attend_lower_tiers,
            AttendLowerTiers::kInPlace);
  EXPECT_EQ(Resolve("{\"attend_lower_tiers\": \"promote-first\"}")->cache.attend_lower_tiers,
            AttendLowerTiers::kPromoteFirst);
  EXPECT_THAT(std::string(Resolve("{\"attend_lower_tiers\": \"never\"}").status().message()),
              HasSubstr("attend_lower_tiers \"never\" is unknown; use cost, in-place or promote-first"));
}

TEST(Config, ARecordingHasAFileAndASize) {
  EXPECT_EQ(Resolve("{}")->trace_file, "");
  EXPECT_EQ(Resolve("{\"record_trace\": \"off\"}")->trace_file, "");
  EXPECT_EQ(Resolve("{\"record_trace\": \"/a/b\"}")->trace_file, "/a/b");
  EXPECT_EQ(Resolve("{\"record_trace\": \"/a/b\"}")->trace_bytes, 256 << 20);
  EXPECT_EQ(Resolve("{\"record_trace\": \"/a:b:2MiB\"}")->trace_file, "/a:b");
  EXPECT_EQ(Resolve("{\"record_trace\": \"/a:b:2MiB\"}")->trace_bytes, 2 << 20);
  for (const char* bad : {":1GiB", "/a:", "/a:b", "/a/", "/a:1KiB", "/a:-1"})
    EXPECT_THAT(std::string(Resolve(absl::StrCat("{\"record_trace\": \"", bad, "\"}")).status().message()),
                HasSubstr("record_trace"))
        << bad;
}

TEST(Config, ModelsAreCalibratedFromTrafficWhereAskedUnlessItSaysOtherwise) {
  using Models = CalibratorOptions::Models;
  EXPECT_EQ(Resolve("{}")->calibrate.models, Models::kAsked);
  EXPECT_EQ(Resolve("{}")->calibrate.memory_bytes, 64 << 20);
  EXPECT_EQ(Resolve("{\"calibrate\": \"asked\"}")->calibrate.models, Models::kAsked);
  EXPECT_EQ(Resolve("{\"calibrate\": \"all\"}")->calibrate.models, Models::kAll);
  for (const char* none : {"never", "off"})
    EXPECT_EQ(Resolve(absl::StrCat("{\"calibrate\": \"", none, "\"}"))->calibrate.models, Models::kNever);
  EXPECT_EQ(Resolve("{\"calibrate_memory\": \"1MiB\"}")->calibrate.memory_bytes, 1 << 20);
  EXPECT_THAT(std::string(Resolve("{\"calibrate\": \"sometimes\"}").status().message()),
              HasSubstr("\"asked\", \"all\" and \"never\""));
  EXPECT_THAT(std::string(Resolve("{\"calibrate_memory\": \"much\"}").status().message()),
              HasSubstr("calibrate_memory"));
}

TEST(Config, AFileThatCannotBeReadSaysWhy) {
  const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / "kvtide_config_test";
  std::filesystem::create_directories(folder);
  const std::string empty = folder / "empty.json";
  std::ofstream(empty).close();
  EXPECT_THAT(std::string(ReadConfigFile(folder).status().message()), HasSubstr("is a folder"));
  EXPECT_THAT(std::string(ReadConfigFile(folder / "none.json").status().message()),
              HasSubstr("No such file or directory"));
  EXPECT_THAT(std::string(ReadConfigFile(empty).status().message()), HasSubstr("is empty"));
  std::filesystem::remove_all(folder);
}

TEST(Config, ReadsDevices) {
  EXPECT_THAT(ParseDevices("cpu").value(), ElementsAre("cpu"));
  EXPECT_THAT(ParseDevices("cuda:0, cuda:1").value(), ElementsAre("cuda:0", "cuda:1"));
  EXPECT_THAT(ParseDevices("GPU-12ab,cuda:GPU-34cd").value(), ElementsAre("cuda:GPU-12ab", "cuda:GPU-34cd"));
  EXPECT_THAT(ParseDevices("cpu,cpu").value(), ElementsAre("cpu", "cpu"));
  EXPECT_THAT(ParseDevices("cuda:all").value(), ElementsAre("cuda:all"));
  for (const char* bad : {"", "gpu", "cuda:", "cuda:0,", "auto,cpu", "cuda:all,cpu", "cuda:0,cuda:0"})
    EXPECT_FALSE(ParseDevices(bad).ok()) << bad;
}

TEST(Config, AnUnknownFieldIsAnErrorThatListsTheKnown) {
  const auto status = Resolve("{\"devise\": \"cpu\"}").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("test.json"), HasSubstr("devise"), HasSubstr("listen, device, device_memory")));
}

TEST(Config, AKeyHasOneSpellingAndOnePlace) {
  const auto message = [](const char* json) { return std::string(Resolve(json).status().message()); };
  EXPECT_THAT(message("{\"deviceMemory\": \"1GiB\"}"),
              AllOf(HasSubstr("no field \"deviceMemory\""), HasSubstr("did you mean \"device_memory\"?")));
  EXPECT_THAT(message("{\"device\": \"cpu\", \"device\": \"cpu\"}"), HasSubstr("\"device\" is there twice"));
  EXPECT_THAT(message("{\"exact_window\": {\"firstBlocks\": 1}}"),
              HasSubstr("did you mean \"first_blocks\"?"));
  EXPECT_THAT(message("{\"exact_window\": {\"first_blocks\": 1, \"first_blocks\": 2}}"),
              HasSubstr("\"first_blocks\" is there twice"));
  EXPECT_TRUE(
      Resolve("{\"device\": \"cpu\", \"exact_window\": {\"first_blocks\": 1, \"last_blocks\": 2}}").ok());
}

TEST(Config, MalformedTextIsToldInOneLine) {
  for (const char* json : {"{\"device\" \"cpu\"}", "{\"device\": ", "[1", "{\"device\": cpu}"}) {
    const std::string message(ParseConfig(json, "test.json").status().message());
    EXPECT_THAT(message, HasSubstr("test.json: "));
    EXPECT_EQ(message.find('^'), std::string::npos) << message;
    EXPECT_EQ(std::count(message.begin(), message.end(), '\n'), 1) << message;  // before the known fields
  }
  EXPECT_THAT(std::string(ParseConfig("{\"device\" \"cpu\"}", "test.json").status().message()),
              HasSubstr("at '\"cpu\"}'"));
}

TEST(Config, LimitsOfWork) {
  v1::KvtidedConfig config;
  EXPECT_EQ(ResolveConfig(config)->cache.max_attend_work, CacheOptions().max_attend_work);
  config.set_max_attend_work(1234);
  EXPECT_EQ(ResolveConfig(config)->cache.max_attend_work, 1234);
  config.set_max_attend_work(-1);
  EXPECT_THAT(std::string(ResolveConfig(config).status().message()), HasSubstr("max_attend_work"));
}

TEST(Config, HowMemoryOfGpusIsShared) {
  v1::KvtidedConfig config;
  EXPECT_EQ(ResolveConfig(config)->gpu_sharing, "ipc");
  config.set_gpu_sharing("descriptors");
  EXPECT_EQ(ResolveConfig(config)->gpu_sharing, "descriptors");
  config.set_gpu_sharing("files");
  EXPECT_THAT(std::string(ResolveConfig(config).status().message()),
              HasSubstr("use ipc, descriptors or auto"));
}

TEST(Config, FlagsWinOverTheFile) {
  auto config = ParseConfig("{\"device\": \"cpu\", \"listen\": [\"a:1\", \"b:2\"]}", "test.json").value();
  v1::KvtidedConfig flags;
  MergeConfig(flags, &config);
  EXPECT_THAT(config.listen(), ElementsAre("a:1", "b:2"));
  flags.add_listen("c:3");
  flags.set_log_level("debug");
  MergeConfig(flags, &config);
  EXPECT_THAT(config.listen(), ElementsAre("c:3"));
  EXPECT_EQ(config.device(), "cpu");
  EXPECT_EQ(config.log_level(), "debug");
}

}  // namespace
}  // namespace kvtide
