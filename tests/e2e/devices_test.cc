// A daemon whose first tier lies on two devices, over the wire: where sequences live, one batch over both,
// what the lists, statistics and metrics say.
#include <filesystem>
#include <map>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_daemon.h"

namespace kvtide::e2e {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class Devices : public ::testing::Test {
 protected:
  Devices() : daemon_(TestDaemon::Start({"--device", TestDevices(), "--metrics-address", "127.0.0.1:0"})) {
    client_ = daemon_->Connect();
    EXPECT_TRUE(client_->RegisterModel(SmallModel()).ok());
    const client::ServerInfo info = client_->GetServerInfo().value();
    for (const client::TierInfo& tier : info.tiers)
      if (tier.name == "device") names_.push_back(tier.device);
  }
  client::SequenceInfo Info(client::SequenceId id) const {
    const std::vector<client::SequenceInfo> all = client_->ListSequences().value();
    for (const client::SequenceInfo& info : all)
      if (info.id == id) return info;
    ADD_FAILURE() << "sequence " << id << " is not listed";
    return {};
  }

  const std::unique_ptr<TestDaemon> daemon_;
  std::unique_ptr<Client> client_;
  std::vector<std::string> names_;
};

TEST_F(Devices, OneBatchOverSequencesOfBoth) {
  ASSERT_EQ(names_.size(), 2u);
  EXPECT_NE(names_[0], names_[1]);
  EXPECT_THAT(daemon_->ready_line(), AllOf(HasSubstr("device tier 4.0 MiB on " + names_[0]),
                                           HasSubstr("device tier 4.0 MiB on " + names_[1])));
  constexpr int kSequences = 4;
  constexpr int64_t kTokens = 300;
  std::vector<client::SequenceId> ids;
  std::map<std::string, int> on;
  std::vector<std::vector<float>> q, out, expected;
  for (int i = 0; i < kSequences; i++) {
    const auto id = client_->CreateSequence("small", {.pair = "f16/f16"});
    ASSERT_TRUE(id.ok()) << id.status();
    ids.push_back(*id);
    const Tokens tokens(30 + i, 0, kTokens);
    ASSERT_TRUE(client_->Append(*id, 0, tokens.layers).ok());
    on[Info(*id).device]++;
    q.push_back(Rows(60 + i, 0, 1, kHeads));
    out.emplace_back(q.back().size());
    expected.push_back(ReferenceAttention(q.back(), tokens.k[1], tokens.v[1], kTokens, 1));
  }
  EXPECT_EQ(on, (std::map<std::string, int>{{names_[0], 2}, {names_[1], 2}}));
  const auto attend = [&] {
    std::vector<client::AttendItem> items;
    for (size_t i = 0; i < ids.size(); i++) {
      client::AttendItem& item = items.emplace_back();
      item.sequence = ids[i];
      item.q = client::TensorRef::F32(q[i], {1, kHeads, kDim});
      item.first_query_position = kTokens - 1;
      item.output = out[i];
    }
    const absl::Status status = client_->Attend(1, items);
    ASSERT_TRUE(status.ok()) << status;
    for (size_t i = 0; i < ids.size(); i++) EXPECT_LT(LargestDifference(out[i], expected[i]), 2e-3) << i;
  };
  attend();
  // Parked in the host tier that both share, then back home.
  ASSERT_TRUE(client_->EvictSequences(std::vector<client::SequenceId>{ids[0], ids[1]}).ok());
  attend();
  const auto back = client_->PrefetchSequences(ids);
  ASSERT_TRUE(back.ok());
  EXPECT_GT(back->blocks, 0);
  attend();
  for (const client::SequenceId id : ids) {
    const client::SequenceInfo info = Info(id);
    for (const client::TierShare& share : info.tiers)
      EXPECT_EQ(share.blocks, share.tier == "device" && share.device == info.device ? 5 : 0) << share.device;
  }
  const client::ServerStats stats = client_->GetStats().value();
  for (const client::TierStats& tier : stats.tiers)
    EXPECT_EQ(tier.used_bytes, tier.name == "device" ? 10 * 65536 : 0) << tier.device;
}

TEST_F(Devices, AnEngineNamesItsDeviceAndForksStayThere) {
  for (const std::string& name : names_) {
    const auto id = client_->CreateSequence("small", {.device = name});
    ASSERT_TRUE(id.ok()) << id.status();
    EXPECT_EQ(Info(*id).device, name);
    const auto fork = client_->ForkSequence(*id);
    ASSERT_TRUE(fork.ok());
    EXPECT_EQ(Info(*fork).device, name);
  }
  const absl::Status status = client_->CreateSequence("small", {.device = "cuda:99"}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("cuda:99"), HasSubstr(names_[0]), HasSubstr(names_[1])));
}

TEST_F(Devices, StatusAndMetricsNameThem) {
  const auto id = client_->CreateSequence("small", {.pair = "f16/f16", .device = names_[1]});
  ASSERT_TRUE(client_->Append(*id, 0, Tokens(1, 0, 100).layers).ok());
  const std::string folder = MakeFolder();
  const auto text_of = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {Program("kvtide")});
    EXPECT_EQ(WaitForExit(StartProgram(arguments, folder + "/log"), 60), 0);
    const std::string text = ReadWhole(folder + "/log");
    std::filesystem::remove(folder + "/log");
    return text;
  };
  const std::string table = text_of({"status", "--address", daemon_->address()});
  EXPECT_THAT(table, AllOf(HasSubstr(names_[0]), HasSubstr("device " + names_[1] + " 128.0 KiB")));
  EXPECT_THAT(text_of({"status", "--address", daemon_->address(), "--output", "json"}),
              HasSubstr("\"device\": \"" + names_[1] + "\""));
  const std::string verify = text_of(
      {"plan", "verify", "--metrics", "http://" + daemon_->metrics_address() + "/metrics", "--model",
       "Llama3.2-1B", "--device", "vram=4GiB,bandwidth=100GB/s", "--pairs", "f16", "--context", "100"});
  EXPECT_THAT(verify, HasSubstr("kvtided metrics"));
  client::PlanQuestion question;
  question.model = "small";
  question.contexts = {1024};
  question.concurrency = 5;
  const auto plan = client_->Plan(question);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->device_budget_bytes, 4 << 20);
  EXPECT_THAT(plan->notes, ::testing::Contains(HasSubstr("one of 2 devices: 3 of the sequences")));
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace kvtide::e2e
