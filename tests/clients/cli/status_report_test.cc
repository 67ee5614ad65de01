#include "clients/cli/ops/status_report.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

using testing::HasSubstr;
using testing::Not;

const Terminal kPlain(false, false, 200);

std::string MiB(int64_t n) { return planner::FormatBytes(n << 20); }

DaemonSnapshot Sample() {
  DaemonSnapshot snapshot;
  snapshot.address = "unix:/run/kvtide/kvtided.sock";
  snapshot.info.version = "0.1.0";
  snapshot.info.uptime_seconds = 3725;
  snapshot.info.process_id = 4242;
  snapshot.info.max_sequences = 100;
  snapshot.info.models = {"tidelm-7m"};
  client::TierStats device;
  device.name = "device";
  device.backend = "cpu";
  device.capacity_bytes = int64_t{1} << 30;
  device.used_bytes = int64_t{300} << 20;
  device.largest_free_bytes = int64_t{500} << 20;
  device.blocks = 120;
  device.pinned_blocks = 2;
  device.pairs = {{"f16/f16", 20, int64_t{50} << 20}, {"q8_0/turbo4", 100, int64_t{250} << 20}};
  snapshot.stats.tiers = {device};
  snapshot.stats.sequences = 3;
  snapshot.stats.tokens = 7000;
  snapshot.stats.stored_bytes = int64_t{300} << 20;
  snapshot.stats.f16_equivalent_bytes = int64_t{900} << 20;
  snapshot.stats.bits_per_value = 5.33;
  snapshot.stats.attended_blocks = 400;
  snapshot.stats.attended_blocks_below_first_tier = 100;
  snapshot.stats.exhausted = 9;
  snapshot.stats.refused = {{"quota", 12}, {"queue_full", 3}, {"unauthenticated", 2}};
  snapshot.stats.refused_tenants = {{"acme", "quota", 8},         {"b\x1b", "quota", 2},
                                    {"shop", "quota", 1},         {"toys", "quota", 1},
                                    {"default", "queue_full", 3}, {"(nobody)", "unauthenticated", 2}};
  for (const auto& [id, idle] :
       {std::pair<uint64_t, double>{11, 5}, {18446744073709551615u, 500}, {33, 50}}) {
    client::SequenceInfo sequence;
    sequence.id = id;
    sequence.idle_seconds = idle;
    sequence.age_seconds = 1000;
    sequence.model = "tidelm-7m";
    sequence.pair = "q8_0/turbo4";
    sequence.tokens = static_cast<int64_t>(idle) * 10;
    sequence.tiers = {{"device", 4, int64_t{4} << 20}, {"host", 0, 0}};
    snapshot.sequences.push_back(sequence);
  }
  return snapshot;
}

TEST(StatusReport, TellsByWhichWayClientsCome) {
  DaemonSnapshot snapshot = Sample();
  EXPECT_THAT(RenderStatus(snapshot, 10, kPlain), Not(HasSubstr("shared memory")));  // of an older daemon
  snapshot.stats.ways = {{"grpc", 2, 300, 0, 1 << 20, 2 << 20},
                         {"shared_memory", 14, 5000, 2400, 1 << 20, 0}};
  for (int i = 0; i < 12; i++)
    snapshot.stats.clients.push_back({"unix:uid=1000,pid=" + std::to_string(100 + i), "shared_memory",
                                      "ac\x1bme", 400, 200, 1 << 10, 0, 65, 2});
  const std::string text = RenderStatus(snapshot, 10, kPlain);
  EXPECT_THAT(text, testing::ContainsRegex("gRPC +2 +300 +0 +" + MiB(1) + " +" + MiB(2)));
  EXPECT_THAT(text, testing::ContainsRegex("shared memory +14 +5000 +2400"));
  EXPECT_THAT(text, HasSubstr("unix:uid=1000,pid=109"));
  EXPECT_THAT(text, Not(HasSubstr("pid=110")));
  EXPECT_THAT(text, HasSubstr("and 6 more"));
  EXPECT_THAT(text, Not(HasSubstr("\x1b"))) << "names are escaped";
  snapshot.stats.memory = {{"sequences", 3 << 20, 4 << 20}, {"host", 9 << 20, 1 << 20}};
  EXPECT_THAT(RenderStatus(snapshot, 10, kPlain),
              HasSubstr("memory     sequences " + MiB(4) + ", predicted " + MiB(3) + "; host " + MiB(1) +
                        " of at most " + MiB(9)));
  const auto json = nlohmann::json::parse(RenderStatusJson(snapshot));
  EXPECT_EQ(json["memory"][0]["predicted_bytes"], 3 << 20);
  EXPECT_EQ(json["ways"][1]["steps"], 2400);
  EXPECT_EQ(json["clients"].size(), 12u);
  EXPECT_EQ(json["clients"][0]["idle_seconds"], 2);
}

TEST(StatusReport, TellsWhatThereIs) {
  const std::string text = RenderStatus(Sample(), 10, kPlain);
  EXPECT_THAT(text,
              HasSubstr("kvtided 0.1.0 at unix:/run/kvtide/kvtided.sock, up 1:02:05, process 4242, serving"));
  EXPECT_THAT(text, HasSubstr(MiB(300)));
  EXPECT_THAT(text, HasSubstr("29 %"));
  EXPECT_THAT(text, HasSubstr("f16/f16 " + MiB(50) + ", q8_0/turbo4 " + MiB(250)));
  EXPECT_THAT(text, HasSubstr("3 of 100 with 7000 tokens; models: tidelm-7m"));
  EXPECT_THAT(text, HasSubstr("in f16 " + MiB(900) + ": 5.33 bits per value"));
  EXPECT_THAT(text, HasSubstr("25 % of them below the first tier"));
  EXPECT_THAT(text, HasSubstr("9 calls"));
  EXPECT_THAT(text, Not(HasSubstr("\x1b")));
}

TEST(StatusReport, LongestIdleFirstAndTheRestCounted) {
  const std::string text = RenderStatus(Sample(), 2, kPlain);
  const size_t oldest = text.find("18446744073709551615"), next = text.find("\n33 ");
  ASSERT_NE(oldest, std::string::npos);
  ASSERT_NE(next, std::string::npos);
  EXPECT_LT(oldest, next);
  EXPECT_EQ(text.find("\n11 "), std::string::npos);
  EXPECT_THAT(text, HasSubstr("and 1 more"));
  EXPECT_THAT(RenderStatus(Sample(), 0, kPlain), Not(HasSubstr("18446744073709551615")));
}

TEST(StatusReport, HottestAndLargestFirst) {
  DaemonSnapshot snapshot = Sample();
  for (size_t i = 0; i < 3; i++) {
    snapshot.sequences[i].idle_seconds = 10.0 * static_cast<double>(i + 1);
    snapshot.sequences[i].tiers = {{.tier = "host", .bytes = int64_t{1} << (20 + i)}};
  }
  const auto first = [&](SequenceOrder order) {
    const std::string text = RenderSequences(snapshot.sequences, 1, kPlain, order);
    return text.substr(text.find("\n", 2) + 1, 2);
  };
  const auto digits = [&](size_t i) { return std::to_string(snapshot.sequences[i].id).substr(0, 2); };
  EXPECT_EQ(first(SequenceOrder::kColdest), digits(2));
  EXPECT_EQ(first(SequenceOrder::kHottest), digits(0));
  EXPECT_EQ(first(SequenceOrder::kLargest), digits(2));
  EXPECT_THAT(RenderSequences(snapshot.sequences, 1, kPlain, SequenceOrder::kLargest),
              HasSubstr("2 more, smaller"));
}

TEST(StatusReport, TenantsWhereThereAreSeveral) {
  DaemonSnapshot snapshot = Sample();
  for (client::SequenceInfo& sequence : snapshot.sequences) {
    sequence.tenant = "acme";
    sequence.tokens = 100;
    sequence.idle_seconds = 50;
    sequence.tiers = {{.tier = "host", .bytes = 1 << 20}};
  }
  EXPECT_THAT(RenderStatus(snapshot, 0, kPlain), Not(HasSubstr("acme"))) << "one has all";
  snapshot.sequences[1].tenant = "shop\x1b[2J";
  snapshot.sequences[2].idle_seconds = 7;
  snapshot.sequences[2].tiers[0].bytes = 5 << 20;
  const std::vector<TenantTotal> totals = TotalsOfTenants(snapshot.sequences);
  ASSERT_EQ(totals.size(), 2u);
  EXPECT_EQ(totals[0].tenant, "acme");
  EXPECT_EQ(totals[0].sequences, 2);
  EXPECT_EQ(totals[0].tokens, 200);
  EXPECT_EQ(totals[0].bytes, 6 << 20);
  EXPECT_EQ(totals[0].idle_seconds, 7);
  const std::string text = RenderStatus(snapshot, 0, kPlain);
  EXPECT_THAT(text, HasSubstr("acme"));
  EXPECT_THAT(text, HasSubstr("shop\\x1b[2J"));
  EXPECT_THAT(text, Not(HasSubstr("\x1b")));
  EXPECT_EQ(nlohmann::json::parse(RenderStatusJson(snapshot))["tenants"][1]["bytes"], 1 << 20);
}

TEST(StatusReport, ErrorsByCodeLatencyAndNamesThatWouldPlayWithTheTerminal) {
  DaemonSnapshot snapshot = Sample();
  snapshot.stats.methods = {{"Append", 1000, {{"RESOURCE_EXHAUSTED", 7}, {"DATA_LOSS", 2}}, 85e-6, 2.4e-3}};
  snapshot.info.models = {"evil\x1b[2J"};
  snapshot.sequences[0].model = "two\nlines\xc2\x9b";
  snapshot.sequences[0].tenant = "acme";
  const std::string text = RenderStatus(snapshot, 10, kPlain);
  EXPECT_THAT(text, HasSubstr("RESOURCE_EXHAUSTED 7, DATA_LOSS 2"));
  EXPECT_THAT(
      text, HasSubstr("refused: quota 12 (acme 8, b\\x1b 2, shop 1, ...), queue_full 3, unauthenticated 2"));
  EXPECT_THAT(text, HasSubstr("85 us"));
  EXPECT_THAT(text, HasSubstr("2.4 ms"));
  EXPECT_THAT(text, HasSubstr("models: evil\\x1b[2J"));
  EXPECT_THAT(text, HasSubstr("two\\nlines\\x9b"));
  EXPECT_THAT(text, HasSubstr("acme"));
  EXPECT_THAT(text, Not(HasSubstr("\x1b")));
  const nlohmann::json json = nlohmann::json::parse(RenderStatusJson(snapshot));
  EXPECT_EQ(json["methods"][0]["failed"]["DATA_LOSS"], 2);
  EXPECT_EQ(json["counters"]["lost_blocks"], 0);
}

TEST(StatusReport, WhatIsWrongStandsAtTheTop) {
  DaemonSnapshot snapshot = Sample();
  snapshot.serving = false;
  snapshot.stats.troubles = {{"device", "CUDA device 0 is lost\x1b[2J", 125, true}, {"tokens", "", 5, false}};
  const std::string text = RenderStatus(snapshot, 10, kPlain);
  EXPECT_THAT(text, HasSubstr("not serving until it is restarted (device)"));
  EXPECT_THAT(
      text,
      HasSubstr("\ntrouble: device for 2:05: CUDA device 0 is lost\\x1b[2J\ntrouble: tokens for 5 s\n"));
  const nlohmann::json json = nlohmann::json::parse(RenderStatusJson(snapshot));
  EXPECT_EQ(json["troubles"][0]["what"], "device");
  EXPECT_EQ(json["troubles"][0]["ends_service"], true);
}

TEST(StatusReport, AnEmptyDaemon) {
  DaemonSnapshot snapshot;
  snapshot.serving = false;
  const std::string text = RenderStatus(snapshot, 10, kPlain);
  EXPECT_THAT(text, HasSubstr("not serving"));
  EXPECT_THAT(text, HasSubstr("models: none"));
  EXPECT_THAT(text, Not(HasSubstr("bits per value")));
  EXPECT_THAT(text, HasSubstr("attended   0 blocks, - of them"));
}

TEST(StatusReport, CalibrationsAndInstalledProfiles) {
  DaemonSnapshot snapshot = Sample();
  EXPECT_THAT(RenderStatus(snapshot, 10, kPlain), Not(HasSubstr("keys ")));
  client::Calibration gathering;
  gathering.model = "tidelm-7m";
  gathering.tenant = "default";
  gathering.state = client::CalibrationState::kGathering;
  gathering.tokens = 1200;
  gathering.wanted_tokens = 16384;
  client::Calibration ready = gathering, refused = gathering;
  ready.tenant = "acme";
  ready.state = client::CalibrationState::kReady;
  refused.state = client::CalibrationState::kRefused;
  refused.problem = "tide3 is worse than turbo3";
  snapshot.profiles.calibrations = {gathering, ready, refused};
  snapshot.profiles.installed = {{"tidelm-7m", "default", 2, false, 3}, {"other", "acme", 1, true, 0}};
  const std::string text = RenderStatus(snapshot, 10, kPlain);
  EXPECT_THAT(
      text, HasSubstr("\nkeys       tidelm-7m: gathering, 1200 of 16384 tokens\n"
                      "keys       tidelm-7m of tenant acme: ready, not installed\n"
                      "keys       tidelm-7m: refused, tide3 is worse than turbo3\n"
                      "keys       tidelm-7m: profile 2 is installed, before RoPE; 3 open sequences have it\n"
                      "keys       other of tenant acme: profile 1 is installed, after RoPE; 0 open"));
  const nlohmann::json json = nlohmann::json::parse(RenderStatusJson(snapshot));
  EXPECT_EQ(json["calibrations"][0]["state"], "gathering");
  EXPECT_EQ(json["calibrations"][1]["tenant"], "acme");
  EXPECT_EQ(json["installed_profiles"][0]["revision"], 2);
  EXPECT_EQ(json["installed_profiles"][1]["after_rope"], true);
}

TEST(StatusReport, TellsOfBlocksThatWereNotCoded) {
  DaemonSnapshot snapshot = Sample();
  EXPECT_THAT(RenderStatus(snapshot, 10, kPlain), Not(HasSubstr("left f16")));
  snapshot.stats.deferred_seals = 12;
  snapshot.stats.failed_seals = 3;
  EXPECT_THAT(RenderStatus(snapshot, 10, kPlain),
              HasSubstr("left f16   until the next append: 12 times for want of room, 3 blocks by errors"));
  const nlohmann::json json = nlohmann::json::parse(RenderStatusJson(snapshot));
  EXPECT_EQ(json["counters"]["deferred_seals"], 12);
  EXPECT_EQ(json["counters"]["failed_seals"], 3);
}

TEST(StatusReport, TellsOfBlocksThatWereRecodedToFewerBits) {
  DaemonSnapshot snapshot = Sample();
  EXPECT_THAT(RenderStatus(snapshot, 10, kPlain), Not(HasSubstr("degraded")));
  snapshot.stats.tiers[0].degraded_blocks = 12;
  snapshot.stats.tiers[0].degraded_bytes = 3 << 20;
  EXPECT_THAT(RenderStatus(snapshot, 10, kPlain), HasSubstr("degraded   12 times"));
  client::SequenceInfo& sequence = snapshot.sequences[0];
  EXPECT_THAT(RenderSequence(sequence), Not(HasSubstr("degraded")));
  sequence.degrade = {"turbo3/turbo3", "turbo2/turbo2"};
  sequence.degraded_blocks = 7;
  EXPECT_THAT(RenderSequence(sequence),
              HasSubstr("degraded   7 blocks; cold ones may become turbo3/turbo3, then turbo2/turbo2 when"));
  sequence.degraded = {{0, 64, 448, "turbo3/turbo3"}};
  EXPECT_THAT(RenderSequence(sequence), HasSubstr("tokens 64 to 511 of layer group 0 are turbo3/turbo3\n"));
  const nlohmann::json json = nlohmann::json::parse(RenderStatusJson(snapshot));
  EXPECT_EQ(json["tiers"][0]["degraded_blocks"], 12);
  EXPECT_EQ(json["tiers"][0]["degraded_bytes"], 3 << 20);
  const nlohmann::json sequences = nlohmann::json::parse(RenderSequencesJson(snapshot.sequences));
  EXPECT_EQ(sequences[0]["degraded_blocks"], 7);
  EXPECT_EQ(sequences[0]["degrade"][1], "turbo2/turbo2");
  EXPECT_EQ(sequences[0]["degraded"][0]["first_token"], 64);
  EXPECT_EQ(sequences[0]["degraded"][0]["pair"], "turbo3/turbo3");
}

TEST(StatusReport, Json) {
  const nlohmann::json json = nlohmann::json::parse(RenderStatusJson(Sample()));
  EXPECT_EQ(json["version"], "0.1.0");
  EXPECT_EQ(json["bits_per_value"], 5.33);
  EXPECT_EQ(json["tiers"][0]["pairs"][1]["bytes"], int64_t{250} << 20);
  EXPECT_EQ(json["counters"]["exhausted"], 9);
  EXPECT_EQ(json["refused"]["quota"], 12);
  EXPECT_EQ(json["refused_tenants"][0]["tenant"], "acme");
  EXPECT_EQ(json["refused_tenants"][0]["reason"], "quota");
  EXPECT_EQ(json["refused_tenants"][0]["calls"], 8);
  ASSERT_EQ(json["sequence_list"].size(), 3u);
  // As text: a double would round it.
  EXPECT_EQ(json["sequence_list"][1]["id"], "18446744073709551615");
  EXPECT_TRUE(json["sequence_list"][0]["forked_from"].is_null());
}

TEST(StatusReport, Colours) {
  EXPECT_EQ(ShareColour(0.5, 0.9, 0.97), Paint::kGreen);
  EXPECT_EQ(ShareColour(0.9, 0.9, 0.97), Paint::kYellow);
  EXPECT_EQ(ShareColour(0.97, 0.9, 0.97), Paint::kRed);
  EXPECT_EQ(PercentText(1, 4), "25 %");
  EXPECT_EQ(PercentText(1, 0), "-");
}

}  // namespace
}  // namespace kvtide::cli
