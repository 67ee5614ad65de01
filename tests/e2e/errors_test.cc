// Every mistake of a client has an error that says what to do, changes nothing, and leaves the daemon alive.
#include <cmath>
#include <limits>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_daemon.h"

namespace kvtide::e2e {
namespace {

using client::TensorRef;
using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;

// A daemon with one sequence of 10 tokens; every test ends with the proof that both are as they were.
class Errors : public ::testing::Test {
 protected:
  void SetUp() override {
    daemon_ = TestDaemon::Start(
        {"--max-message-bytes", "8388608", "--device-memory", "1MiB", "--host-memory", "1MiB"});
    client_ = daemon_->Connect();
    ASSERT_NE(client_, nullptr);
    ASSERT_TRUE(client_->RegisterModel(SmallModel()).ok());
    auto sequence = client_->CreateSequence("small", {.pair = "f16/f16"});
    ASSERT_TRUE(sequence.ok()) << sequence.status();
    sequence_ = *sequence;
    ASSERT_TRUE(client_->Append(sequence_, 0, Tokens(1, 0, 10).layers).ok());
  }

  void TearDown() override {
    ASSERT_TRUE(daemon_->Alive()) << daemon_->Log();
    const auto list = client_->ListSequences();
    ASSERT_TRUE(list.ok()) << list.status();
    ASSERT_EQ(list->size(), 1u);
    EXPECT_EQ(list->front().tokens, 10);
    EXPECT_EQ(list->front().max_layer_tokens, 10);
    const auto length = client_->Append(sequence_, 10, Tokens(1, 10, 1).layers);
    EXPECT_TRUE(length.ok()) << length.status();
  }

  // Tries to append; the error's message.
  std::string AppendFails(const Tokens& tokens, absl::StatusCode code, int64_t start = 10) {
    const auto length = client_->Append(sequence_, start, tokens.layers);
    EXPECT_EQ(length.status().code(), code) << length.status();
    return std::string(length.status().message());
  }
  std::string AttendFails(const TensorRef& q, absl::StatusCode code,
                          const client::AttentionOptions& options = {}, int layer = 0) {
    std::vector<float> output(kHeads * kDim);
    client::AttendItem item;
    item.sequence = sequence_;
    item.q = q;
    item.output = output;
    const absl::Status status = client_->Attend(layer, std::span(&item, 1), options);
    EXPECT_EQ(status.code(), code) << status;
    return std::string(status.message());
  }

  std::unique_ptr<TestDaemon> daemon_;
  std::unique_ptr<Client> client_;
  client::SequenceId sequence_ = 0;
};

TEST_F(Errors, WrongShapesAreNamed) {
  Tokens tokens(2, 10, 4);
  tokens.layers[1].v.shape = {4, kKvHeads, kDim / 2};
  EXPECT_THAT(AppendFails(tokens, absl::StatusCode::kInvalidArgument),
              AllOf(HasSubstr("layers[1]"), HasSubstr("v:"), HasSubstr("[4, 2, 32]"), HasSubstr("2, 64")));
  tokens = Tokens(2, 10, 4);
  tokens.layers[0].k.shape = {3, kKvHeads, kDim};
  EXPECT_THAT(AppendFails(tokens, absl::StatusCode::kInvalidArgument), HasSubstr("k has 3 tokens, v has 4"));
  tokens = Tokens(2, 10, 4);
  tokens.layers[1].layer = 0;
  EXPECT_THAT(AppendFails(tokens, absl::StatusCode::kInvalidArgument), HasSubstr("occurs twice"));
  tokens.layers[1].layer = 5;
  EXPECT_THAT(AppendFails(tokens, absl::StatusCode::kInvalidArgument), HasSubstr("has layers 0 to 1"));
  const std::vector<float> q = Rows(1, 0, 1, kHeads);
  EXPECT_THAT(AttendFails(TensorRef::F32(q, {1, kHeads * 2, kDim / 2}), absl::StatusCode::kInvalidArgument),
              AllOf(HasSubstr("items[0]"), HasSubstr("[1, 8, 32]"), HasSubstr("4, 64")));
  EXPECT_THAT(AttendFails(TensorRef::F32(q, {1, kHeads, kDim}), absl::StatusCode::kInvalidArgument, {}, 2),
              HasSubstr("has layers 0 to 1"));
  client::AttentionOptions options;
  options.sinks = {1, 2, 3};
  EXPECT_THAT(AttendFails(TensorRef::F32(q, {1, kHeads, kDim}), absl::StatusCode::kInvalidArgument, options),
              HasSubstr("sinks has 3 values, the layer has 4 query heads"));
}

TEST_F(Errors, NotANumberIsNamedByItsPlace) {
  for (const float bad : {std::nanf(""), INFINITY, -INFINITY, 70000.0f}) {
    Tokens tokens(2, 10, 4);
    tokens.v[1][(2 * kKvHeads + 1) * kDim + 5] = bad;
    EXPECT_THAT(AppendFails(tokens, absl::StatusCode::kInvalidArgument),
                AllOf(HasSubstr("V"), HasSubstr("layer 1"), ContainsRegex("(token|position) (2|12)"),
                      HasSubstr("head 1"), HasSubstr("5")))
        << bad;
  }
  std::vector<float> q = Rows(1, 0, 1, kHeads);
  q[3 * kDim + 7] = std::nanf("");
  EXPECT_THAT(AttendFails(TensorRef::F32(q, {1, kHeads, kDim}), absl::StatusCode::kInvalidArgument),
              HasSubstr("q: NaN at token 0, head 3, index 7"));
}

TEST_F(Errors, UnknownTypesAndPairsListTheKnown) {
  for (const std::string pair : {"q9_9", "q8_0/nonsense", "q8_0/"}) {
    const auto sequence = client_->CreateSequence("small", {.pair = pair});
    EXPECT_EQ(sequence.status().code(), absl::StatusCode::kInvalidArgument) << pair;
    EXPECT_THAT(std::string(sequence.status().message()),
                AllOf(HasSubstr("f16"), HasSubstr("turbo4"), HasSubstr("q8_0")));
  }
}

TEST_F(Errors, UnknownModelsAndSequences) {
  EXPECT_EQ(client_->CreateSequence("nobody").status().code(), absl::StatusCode::kNotFound);
  const client::SequenceId unknown = 12345;
  EXPECT_EQ(client_->Append(unknown, 0, Tokens(1, 0, 1).layers).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(client_->CloseSequence(unknown).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(client_->ForkSequence(unknown).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(client_->EvictSequences(std::span(&unknown, 1)).status().code(), absl::StatusCode::kNotFound);
  const auto closed = client_->CreateSequence("small");
  ASSERT_TRUE(closed.ok());
  ASSERT_TRUE(client_->CloseSequence(*closed).ok());
  const absl::Status status = client_->Append(*closed, 0, Tokens(1, 0, 1).layers).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("closed"));
}

TEST_F(Errors, AModelIsRegisteredOnceWithOneShape) {
  EXPECT_TRUE(client_->RegisterModel(SmallModel()).ok());
  client::Model other = SmallModel();
  other.layers.pop_back();
  EXPECT_EQ(client_->RegisterModel(other).code(), absl::StatusCode::kFailedPrecondition);
  other = SmallModel("odd");
  other.layers[1].head_dim_k = 65;
  const absl::Status status = client_->RegisterModel(other);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("layers[1]"));
  EXPECT_EQ(client_->RegisterModel({"", {}}).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(Errors, AModelInUseStaysAndOneThatIsNotMayGo) {
  ASSERT_TRUE(client_->RegisterModel(SmallModel("passing")).ok());
  const auto sequence = client_->CreateSequence("passing");
  ASSERT_TRUE(sequence.ok());
  EXPECT_EQ(client_->UnregisterModel("passing").code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(client_->CloseSequence(*sequence).ok());
  EXPECT_TRUE(client_->UnregisterModel("passing").ok());
  EXPECT_EQ(client_->UnregisterModel("passing").code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(client_->CreateSequence("passing").status().code(), absl::StatusCode::kNotFound);
  client::Model other = SmallModel("passing");
  other.layers.pop_back();
  EXPECT_TRUE(client_->RegisterModel(other).ok()) << "the name is free";
}

TEST_F(Errors, PositionsThatDoNotFollow) {
  for (const int64_t start : {int64_t{9}, int64_t{11}, int64_t{1} << 40}) {
    EXPECT_THAT(AppendFails(Tokens(2, 10, 4), absl::StatusCode::kOutOfRange, start), HasSubstr("10"))
        << start;
  }
  EXPECT_THAT(AppendFails(Tokens(2, 10, 4), absl::StatusCode::kInvalidArgument, -1), HasSubstr("negative"));
  const auto beyond =
      client_->Append(sequence_, std::numeric_limits<int64_t>::max(), Tokens(2, 10, 4).layers);
  EXPECT_TRUE(absl::IsInvalidArgument(beyond.status()) || absl::IsOutOfRange(beyond.status()))
      << beyond.status();
  EXPECT_EQ(client_->TruncateSequence(sequence_, 11).code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(client_->TruncateSequence(sequence_, -1).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(Errors, ARepeatedAppendIsRecognised) {
  const auto length = client_->Append(sequence_, 0, Tokens(1, 0, 10).layers);
  EXPECT_TRUE(length.ok()) << length.status();
  EXPECT_EQ(length.value_or(0), 10);
}

TEST_F(Errors, TokensThatFitNowhere) {
  // Two tiers of 16 blocks of 64 KiB. Fill them with other sequences.
  std::vector<client::SequenceId> others;
  absl::Status full;
  for (int i = 0; i < 100 && full.ok(); i++) {
    others.push_back(client_->CreateSequence("small", {.pair = "f16/f16"}).value());
    full = client_->Append(others.back(), 0, Tokens(3, 0, 128).layers).status();
  }
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted) << full;
  EXPECT_THAT(std::string(full.message()),
              AllOf(ContainsRegex("[0-9]+"), HasSubstr("device"), HasSubstr("host")));
  // More than both tiers hold.
  EXPECT_THAT(AppendFails(Tokens(4, 10, 3000), absl::StatusCode::kResourceExhausted), HasSubstr("device"));
  const auto stats = client_->GetStats();
  ASSERT_TRUE(stats.ok());
  EXPECT_GE(stats->exhausted, 2);
  for (const client::SequenceId other : others) ASSERT_TRUE(client_->CloseSequence(other).ok());
  // What failed has left nothing behind.
  EXPECT_EQ(client_->GetStats()->tiers.at(0).used_bytes + client_->GetStats()->tiers.at(1).used_bytes, 65536);
}

TEST_F(Errors, MessagesBeyondTheLimit) {
  client::ClientOptions options;
  options.max_message_bytes = 64 << 20;
  const auto generous = daemon_->Connect(options);
  const absl::Status status = generous->Append(sequence_, 10, Tokens(2, 10, 5000).layers).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("8388608"));
  // The answer would not fit either: 4 x 64 values and their log-sum-exps are larger than what was asked
  // with.
  std::vector<float> q = Rows(1, 0, 8190, kHeads), output(q.size());
  client::AttendItem item;
  item.sequence = sequence_;
  item.first_query_position = 0;
  item.q = TensorRef::F32(q, {8190, kHeads, kDim});
  item.output = output;
  EXPECT_EQ(generous->Attend(0, std::span(&item, 1)).code(), absl::StatusCode::kResourceExhausted);
  // gRPC has refused the first, which the daemon has never seen whole, the handler the second.
  EXPECT_THAT(client_->GetStats()->refused,
              testing::UnorderedElementsAre(testing::Pair("not_received", 1), testing::Pair("too_large", 1)));
}

TEST_F(Errors, DroppingNeedsPermissionAndIsNeverSilent) {
  client::EvictOptions drop;
  drop.drop = true;
  EXPECT_EQ(client_->EvictSequences(std::span(&sequence_, 1), drop).status().code(),
            absl::StatusCode::kFailedPrecondition);
  const auto loose = client_->CreateSequence("small", {.pair = "f16/f16", .allow_drop = true});
  ASSERT_TRUE(loose.ok());
  ASSERT_TRUE(client_->Append(*loose, 0, Tokens(5, 0, 128).layers).ok());
  const auto dropped = client_->EvictSequences(std::span(&*loose, 1), drop);
  ASSERT_TRUE(dropped.ok()) << dropped.status();
  EXPECT_EQ(dropped->dropped_blocks, 2);
  std::vector<float> q = Rows(1, 0, 1, kHeads), output(q.size());
  client::AttendItem item;
  item.sequence = *loose;
  item.q = TensorRef::F32(q, {1, kHeads, kDim});
  item.output = output;
  const absl::Status status = client_->Attend(0, std::span(&item, 1));
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("0"), ContainsRegex("12[78]")));
  ASSERT_TRUE(client_->CloseSequence(*loose).ok());
}

TEST_F(Errors, UnknownTiers) {
  client::EvictOptions options;
  options.tier = "attic";
  const absl::Status status = client_->EvictSequences(std::span(&sequence_, 1), options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("device, host"));
}

}  // namespace
}  // namespace kvtide::e2e
