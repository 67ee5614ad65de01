// What clients may do to the memory, the descriptors and the patience of a daemon: by mistake or on purpose,
// over real sockets. Everything beyond the limits is refused with words, the daemon stays within the memory
// that it states, and other clients are served.
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kvtide/v1/kv_cache_service.pb.h"
#include "nlohmann/json.hpp"
#include "tests/base/eventually.h"
#include "tests/e2e/test_daemon.h"
#include "tests/wire/http2_client.h"

namespace kvtide::e2e {
namespace {

using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;
using wire::Answer;
using wire::Http2Client;

constexpr char kService[] = "/kvtide.v1.KvCacheService/";
constexpr int kOk = 0, kInvalidArgument = 3, kResourceExhausted = 8, kUnimplemented = 12, kUnavailable = 14,
              kCancelled = 1;

std::string Method(const std::string& name) { return kService + name; }

// A field of /proc/PID/status in bytes.
int64_t Memory(pid_t pid, const std::string& field) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/status");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, field.size() + 1, field + ":") == 0)
      return std::stoll(line.substr(field.size() + 1)) * 1024;
  }
  return 0;
}

// What an attack has cost at its worst: the peak from here on, above what is there now.
class Peak {
 public:
  explicit Peak(pid_t pid) : pid_(pid) {
    std::ofstream("/proc/" + std::to_string(pid) + "/clear_refs") << 5;
    before_ = Memory(pid, "VmRSS");
  }
  int64_t Bytes() const { return Memory(pid_, "VmHWM") - before_; }

 private:
  const pid_t pid_;
  int64_t before_ = 0;
};

void Fill(v1::Tensor* tensor, int64_t tokens, int heads, v1::DataType type = v1::DATA_TYPE_F32) {
  tensor->set_dtype(type);
  for (const int64_t dimension : {tokens, static_cast<int64_t>(heads), static_cast<int64_t>(kDim)}) {
    tensor->add_shape(dimension);
  }
  tensor->set_data(
      std::string(static_cast<size_t>(tokens * heads * kDim) * (type == v1::DATA_TYPE_F32 ? 4 : 2), '\0'));
}

std::string AttendBytes(client::SequenceId sequence, int64_t queries) {
  v1::AttendRequest request;
  v1::AttendItem* item = request.add_items();
  item->set_sequence_id(sequence);
  item->set_first_query_position(0);
  Fill(item->mutable_q(), queries, kHeads);
  return request.SerializeAsString();
}

std::string AppendBytes(client::SequenceId sequence, int64_t start, int64_t tokens) {
  v1::AppendRequest request;
  request.set_sequence_id(sequence);
  request.set_start_position(start);
  v1::LayerTokens* layer = request.add_layers();
  Fill(layer->mutable_k(), tokens, kKvHeads);
  Fill(layer->mutable_v(), tokens, kKvHeads);
  return request.SerializeAsString();
}

// A daemon with messages of 8 MiB: all limits of memory are an eighth of the defaults'.
class Attack : public ::testing::Test {
 protected:
  void Start(std::vector<std::string> arguments = {}) {
    // Without arenas, whose limit would hide what else grows.
    arguments.insert(arguments.begin(), {"--max-message-bytes", "8388608", "--shared-memory", "0"});
    daemon_ = TestDaemon::Start(arguments);
    client_ = daemon_->Connect();
    ASSERT_NE(client_, nullptr);
    ASSERT_TRUE(client_->RegisterModel(SmallModel()).ok());
    const auto sequence = client_->CreateSequence("small", {.pair = "f16/f16"});
    ASSERT_TRUE(sequence.ok()) << sequence.status();
    sequence_ = *sequence;
    ASSERT_TRUE(client_->Append(sequence_, 0, Tokens(1, 0, 64).layers).ok());
    const auto info = client_->GetServerInfo();
    ASSERT_TRUE(info.ok());
    overhead_ = info->memory_overhead_bytes;
    ASSERT_GT(overhead_, 64 << 20);
  }
  std::unique_ptr<Http2Client> Wire(bool deaf = false) {
    auto wire = Http2Client::Connect(daemon_->socket_path(), {.deaf = deaf});
    EXPECT_NE(wire, nullptr);
    return wire;
  }
  // The daemon lives, another client is served, and the memory has stayed within what is stated.
  void ExpectHealthy(const Peak& peak) {
    ASSERT_TRUE(daemon_->Alive()) << daemon_->Log();
    EXPECT_TRUE(daemon_->Connect()->GetStats().ok());
    EXPECT_LT(peak.Bytes(), overhead_) << "of memory beside the tiers, " << overhead_ << " are stated";
  }

  std::unique_ptr<TestDaemon> daemon_;
  std::unique_ptr<Client> client_;
  client::SequenceId sequence_ = 0;
  int64_t overhead_ = 0;
};

TEST_F(Attack, ACompressedMessageIsRefusedBeforeItInflates) {
  Start();
  const Peak peak(daemon_->pid());
  const std::string bomb = wire::GzipOfZeros(int64_t{1} << 30);
  ASSERT_LT(bomb.size(), 2u << 20);
  const auto wire = Wire();
  for (int i = 0; i < 3; i++) {
    const int32_t call = wire->Call(Method("Attend"), {.bytes = bomb, .compressed = true});
    ASSERT_TRUE(wire->Until([&] { return wire->answer(call).ended; }, 60));
    EXPECT_EQ(wire->answer(call).code, kUnimplemented) << wire->answer(call).text;
    EXPECT_THAT(wire->answer(call).text, HasSubstr("gzip"));
  }
  // A message that says it is compressed while the call says nothing.
  const int32_t liar = wire->Call(Method("GetStats"), {.bytes = bomb});
  ASSERT_TRUE(wire->Until([&] { return wire->answer(liar).ended; }, 60));
  EXPECT_NE(wire->answer(liar).code, kOk);
  ExpectHealthy(peak);
  EXPECT_LT(peak.Bytes(), 32 << 20);
}

TEST_F(Attack, AClientThatNeverReadsItsAnswersHoldsNoMoreThanItsShare) {
  Start();
  const Peak peak(daemon_->pid());
  const auto deaf = Wire(/*deaf=*/true);
  const std::string attend = AttendBytes(sequence_, 4000);  // 4 MiB there and 4 MiB back
  std::vector<int32_t> calls;
  for (int i = 0; i < 60; i++) {  // one after the other: each of them arrives whole
    calls.push_back(deaf->Call(Method("Attend"), {.bytes = attend}));
    deaf->Until([&] { return deaf->unsent_bytes() == 0; }, 60);
  }
  const auto ended = [&](int code) {
    int count = 0;
    for (const int32_t call : calls) {
      if (deaf->answer(call).ended && deaf->answer(call).code == code) count++;
    }
    return count;
  };
  // What does not fit its share is refused, in words, while the rest waits to be read.
  deaf->Until([&] { return ended(kResourceExhausted) >= 40; }, 60);
  EXPECT_GE(ended(kResourceExhausted), 40);
  EXPECT_EQ(ended(kOk), 0);
  bool told = false;
  for (const int32_t call : calls)
    told = told || deaf->answer(call).text.find("read the answers") != std::string::npos;
  EXPECT_TRUE(told);
  ExpectHealthy(peak);
}

TEST_F(Attack, ManyLargeRequestsAtOnceStayWithinTheBudget) {
  Start({"--device-memory", "64MiB"});
  const Peak peak(daemon_->pid());
  const std::string append = AppendBytes(sequence_, 64, 7000);  // 7 MiB
  std::vector<std::unique_ptr<Http2Client>> wires;
  std::vector<std::vector<int32_t>> calls(4);
  for (size_t i = 0; i < calls.size(); i++) {
    wires.push_back(Wire());
    for (int j = 0; j < 60; j++) calls[i].push_back(wires[i]->Call(Method("Append"), {.bytes = append}));
  }
  int answered = 0, refused = 0;
  for (size_t i = 0; i < calls.size(); i++) {
    for (const int32_t call : calls[i]) {
      EXPECT_TRUE(wires[i]->Until(
          [&] {
            for (auto& other : wires) other->Move();
            return wires[i]->answer(call).ended;
          },
          120));
      answered++;
      if (wires[i]->answer(call).code == kResourceExhausted) refused++;
    }
  }
  EXPECT_EQ(answered, 240);
  ExpectHealthy(peak);
}

TEST_F(Attack, MessagesThatNeverEndAreHeldWithinTheBudget) {
  Start();
  const Peak peak(daemon_->pid());
  const std::string part(7 << 20, 'x');
  std::vector<std::unique_ptr<Http2Client>> wires;
  for (int i = 0; i < 4; i++) {
    wires.push_back(Wire());
    for (int j = 0; j < 64; j++) wires.back()->Call(Method("Append"), {.bytes = part, .missing = 1000});
  }
  // 1.75 GiB want to come in.
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  while (std::chrono::steady_clock::now() < end) {
    for (auto& wire : wires) wire->Until([] { return false; }, 0.01);
  }
  EXPECT_LT(peak.Bytes(), overhead_);
  wires.clear();
  ExpectHealthy(peak);
}

TEST_F(Attack, MalformedMessagesAndTextsSaySo) {
  Start();
  const auto wire = Wire();
  Answer answer = wire->CallAndWait(Method("Append"), "\xff\xff\xff\xff");
  EXPECT_EQ(answer.code, kInvalidArgument) << answer.text;
  EXPECT_THAT(answer.text, AllOf(HasSubstr("kvtide.v1.AppendRequest"), HasSubstr("malformed")));
  v1::CreateSequenceRequest request;
  request.set_model("sma\xff\xfell");
  answer = wire->CallAndWait(Method("CreateSequence"), request.SerializePartialAsString());
  EXPECT_EQ(answer.code, kInvalidArgument) << answer.text;
  EXPECT_THAT(answer.text, HasSubstr("UTF-8"));
  EXPECT_EQ(wire->CallAndWait(Method("Nonsense"), "").code, kUnimplemented);
  EXPECT_EQ(wire->CallAndWait("/other.Service/Method", "").code, kUnimplemented);
  // On a session the stream goes on.
  const int32_t session =
      wire->Call(Method("Session"), {.bytes = "\x08\x07\x3a\x03\xff\xff\xff", .more = true});
  ASSERT_TRUE(wire->Until([&] { return wire->answer(session).bytes.size() > 5; }, 60));
  v1::SessionResponse response;
  ASSERT_TRUE(response.ParseFromString(wire->answer(session).bytes.substr(5)));
  EXPECT_EQ(response.request_id(), 7u);
  EXPECT_EQ(response.error().code(), kInvalidArgument);
  EXPECT_FALSE(wire->answer(session).ended);
}

TEST_F(Attack, FailuresLeaveALineWithTheRequestThatMadeThem) {
  Start();
  const auto wire = Wire();
  v1::CreateSequenceRequest request;
  request.set_model("no\nsuch\x1b[31mmodel");
  const int32_t call = wire->Call(Method("CreateSequence"), {.bytes = request.SerializeAsString()},
                                  {{"x-request-id", "chat-17/3"}});
  ASSERT_TRUE(wire->Until([&] { return wire->answer(call).ended; }, 60));
  Answer answer = wire->answer(call);
  EXPECT_EQ(answer.headers["x-request-id"], "chat-17/3");
  v1::CloseSequenceRequest close;
  close.set_sequence_id(4711);
  const int32_t evil = wire->Call(Method("CloseSequence"), {.bytes = close.SerializeAsString()},
                                  {{"x-request-id", "bad id with spaces"}});
  ASSERT_TRUE(wire->Until([&] { return wire->answer(evil).ended; }, 60));
  answer = wire->answer(evil);
  EXPECT_THAT(answer.headers["x-request-id"], ContainsRegex("^[0-9a-f]{16}$"));
  for (int i = 0; i < 100; i++) wire->CallAndWait(Method("CloseSequence"), close.SerializeAsString());
  const std::string log = daemon_->Log();
  EXPECT_THAT(
      log, HasSubstr("call failed method=CreateSequence code=NOT_FOUND request=chat-17/3 caller=unix:uid=" +
                     std::to_string(::getuid()) + ",pid=" + std::to_string(::getpid())));
  EXPECT_THAT(log, HasSubstr("no\\nsuch\\x1b[31mmodel"));
  EXPECT_THAT(log, HasSubstr("method=CloseSequence code=NOT_FOUND sequence=4711 request=" +
                             answer.headers["x-request-id"]));
  size_t lines = 0;
  for (size_t at = 0; (at = log.find("method=CloseSequence", at)) != std::string::npos; at++) lines++;
  EXPECT_LT(lines, 40u) << "a flood of failures is a flood of lines";
}

// Each line is an object; a failed call and a slow one carry the client's trace, and where the time went.
TEST_F(Attack, LogsAreJsonWithTracesAndSlowCalls) {
  Start({"--log-format", "json", "--slow-call-ms", "1"});
  const auto wire = Wire();
  v1::PlanRequest plan;
  plan.set_model_name("small");
  for (int i = 1; i <= 64; i++) plan.add_contexts(i * 1024);
  const int32_t slow =
      wire->Call(Method("Plan"), {.bytes = plan.SerializeAsString()},
                 {{"traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}});
  v1::CreateSequenceRequest create;
  create.set_model("no\nsuch\"model");
  const int32_t failed =
      wire->Call(Method("CreateSequence"), {.bytes = create.SerializeAsString()},
                 {{"traceparent", "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01"}});
  ASSERT_TRUE(wire->Until([&] { return wire->answer(slow).ended && wire->answer(failed).ended; }, 60));
  EXPECT_EQ(wire->answer(slow).code, kOk) << wire->answer(slow).text;
  bool saw_slow = false, saw_failed = false;
  std::istringstream log(daemon_->Log());
  for (std::string line; std::getline(log, line);) {
    if (line.compare(0, 8, "kvtided ") == 0) continue;  // what it prints when it serves
    const auto json = nlohmann::json::parse(line, nullptr, false);
    ASSERT_TRUE(json.is_object()) << line;
    if (json["message"] == "slow call" && json["method"] == "Plan") {
      saw_slow = true;
      EXPECT_EQ(json["trace"], "0af7651916cd43dd8448eb211c80319c");
      EXPECT_EQ(json["tenant"], "default");
      const int64_t parts = json["received_us"].get<int64_t>() + json["waited_us"].get<int64_t>() +
                            json["served_us"].get<int64_t>();
      EXPECT_NEAR(static_cast<double>(parts), json["us"].get<double>(), 3);
      EXPECT_GT(json["served_us"], 0);
    }
    if (json["message"] == "call failed" && json["method"] == "CreateSequence") {
      saw_failed = true;
      EXPECT_THAT(json["text"].get<std::string>(), HasSubstr("no\nsuch\"model"));
      EXPECT_FALSE(json.contains("trace")) << "not as the standard writes it";
    }
  }
  EXPECT_TRUE(saw_slow && saw_failed) << daemon_->Log();
}

// On a session every request may say its own; the stream's metadata count for those that say nothing.
TEST_F(Attack, RequestsOfASessionHaveNamesOfTheirOwn) {
  Start();
  const auto wire = Wire();
  v1::SessionRequest request;
  request.mutable_close_sequence()->set_sequence_id(4711);
  const std::string plain = request.SerializeAsString();
  request.set_x_request_id("chat-17/3");
  request.set_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
  const std::string named = request.SerializeAsString();
  request.set_x_request_id("two\nlines");
  request.set_traceparent("00-nonsense");
  const std::string evil = request.SerializeAsString();
  const int32_t session =
      wire->Call(Method("Session"), {.bytes = named, .more = true},
                 {{"x-request-id", "stream-1"},
                  {"traceparent", "00-11111111111111111111111111111111-b7ad6b7169203331-01"}});
  wire->Send(session, {.bytes = plain, .more = true});
  wire->Send(session, {.bytes = evil, .more = true});
  std::vector<v1::SessionError> errors;
  ASSERT_TRUE(wire->Until(
      [&] {
        errors.clear();
        const std::string& bytes = wire->answer(session).bytes;
        for (size_t at = 0; at + 5 <= bytes.size();) {
          const auto size = static_cast<size_t>(static_cast<unsigned char>(bytes[at + 3])) << 8 |
                            static_cast<unsigned char>(bytes[at + 4]);
          if (at + 5 + size > bytes.size()) break;
          v1::SessionResponse answer;
          EXPECT_TRUE(answer.ParseFromString(bytes.substr(at + 5, size)));
          errors.push_back(answer.error());
          at += 5 + size;
        }
        return errors.size() == 3;
      },
      60));
  EXPECT_EQ(errors[0].x_request_id(), "chat-17/3");
  EXPECT_EQ(errors[1].x_request_id(), "stream-1/2");
  EXPECT_EQ(errors[2].x_request_id(), "stream-1/3");
  const std::string log = daemon_->Log();
  EXPECT_THAT(log, ContainsRegex("sequence=4711 request=chat-17/3 .*trace=0af7651916cd43dd8448eb211c80319c"));
  EXPECT_THAT(log, ContainsRegex("request=stream-1/2 .*trace=11111111111111111111111111111111"));
  EXPECT_THAT(log, ContainsRegex("request=stream-1/3 .*trace=11111111111111111111111111111111"));
}

// A request that never came: of each it is known why, as far as gRPC tells.
TEST_F(Attack, RequestsThatNeverCameAreToldApart) {
  Start();
  const auto refused = [&] {
    std::map<std::string, int64_t> counts;
    const auto stats = client_->GetStats().value();
    for (const auto& [reason, calls] : stats.refused) counts[reason] = calls;
    return counts;
  };
  using Counts = std::map<std::string, int64_t>;
  const std::string bytes = AppendBytes(sequence_, 64, 1);
  // Larger than a message may be.
  const auto wire = Wire();
  const int32_t huge = wire->Call(Method("Append"), {.bytes = std::string(9 << 20, 'x')});
  ASSERT_TRUE(wire->Until([&] { return wire->answer(huge).ended; }, 60));
  EXPECT_TRUE(Eventually([&] { return refused() == Counts{{"not_received", 1}}; }));
  // Without a message at all: a mistake.
  const int32_t empty = wire->Call(Method("Append"), {.nothing = true});
  ASSERT_TRUE(wire->Until([&] { return wire->answer(empty).ended; }, 60));
  EXPECT_EQ(wire->answer(empty).code, kInvalidArgument) << wire->answer(empty).text;
  EXPECT_TRUE(Eventually([&] { return refused() == Counts{{"not_received", 1}, {"invalid_argument", 1}}; }));
  // Its deadline passes while it comes.
  wire->Call(Method("Append"), {.bytes = bytes, .missing = 1000}, {{"grpc-timeout", "200m"}});
  EXPECT_TRUE(Eventually([&] {
    wire->Move();
    return refused() == Counts{{"not_received", 1}, {"invalid_argument", 1}, {"deadline", 1}};
  }));
  // Its client dies: nobody was refused anything.
  {
    const auto dying = Wire();
    dying->Call(Method("Append"), {.bytes = bytes, .missing = 1000});
    EXPECT_EQ(dying->CallAndWait(Method("GetStats"), "").code, kOk);  // by then the other has begun
  }
  EXPECT_TRUE(Eventually(
      [&] { return daemon_->Log().find("the connection has ended before") != std::string::npos; }));
  EXPECT_EQ(refused(), (Counts{{"not_received", 1}, {"invalid_argument", 1}, {"deadline", 1}}));
}

// A request whose bytes stop coming, and a connection that says nothing: neither is waited for without end.
TEST_F(Attack, IdleConnectionsAreLetGoAndClientsComeBack) {
  Start({"--idle-seconds", "1"});
  const auto silent = Http2Client::Connect(daemon_->socket_path());
  ASSERT_NE(silent, nullptr);
  EXPECT_TRUE(silent->Until([&] { return !silent->open(); }, 60)) << "still there";
  // A client of ours that was let go connects again by itself. (One that calls in the very moment hears it
  // once.)
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  for (int i = 0; i < 100 && !client_->GetStats().ok(); i++)
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_EQ(client_->ListSequences()->size(), 1u);
}

// Descriptors that a daemon has open before anybody connects: some ten, with a GPU some fifty.
size_t OpenDescriptors() {
  const auto daemon = TestDaemon::Start();
  const std::filesystem::directory_iterator entries("/proc/" + std::to_string(daemon->pid()) + "/fd");
  return static_cast<size_t>(std::distance(begin(entries), end(entries)));
}

// A table with room for a dozen clients, 100 connections: when they have left, others get in.
TEST_F(Attack, AnEmptyDescriptorTableIsSurvived) {
  const auto daemon = TestDaemon::Start({}, 2, "-n " + std::to_string(OpenDescriptors() + 40));
  const auto first = daemon->Connect();
  EXPECT_THAT(daemon->Log(), HasSubstr("LimitNOFILE"));
  {
    std::vector<std::unique_ptr<Http2Client>> idle;
    for (int i = 0; i < 100; i++) idle.push_back(Http2Client::Connect(daemon->socket_path()));
    // Those that were there before are served; the last is told why it is not.
    EXPECT_TRUE(first->GetStats().ok());
    ASSERT_NE(idle.back(), nullptr);
    idle.back()->Until([&] { return !idle.back()->goodbye().empty(); }, 60);
    EXPECT_THAT(idle.back()->goodbye(), HasSubstr("max_connections"));
  }
  EXPECT_TRUE(first->GetStats().ok());
  const auto later = daemon->Connect();
  ASSERT_NE(later, nullptr);
  EXPECT_TRUE(later->GetStats().ok());
}

// A daemon that could serve nobody, or one client alone, does not start; a soft limit is raised.
TEST_F(Attack, ATableWithoutRoomForClientsIsSaidAtTheStart) {
  const size_t open = OpenDescriptors();
  const std::string folder = MakeFolder();
  const std::vector<std::string> arguments = {"--listen",          "unix:" + folder + "/kvtided.sock",
                                              "--device",          TestDevice(),
                                              "--device-memory",   "4MiB",
                                              "--metrics-address", "off"};
  const auto result = TestDaemon::RunToEnd(arguments, "-n " + std::to_string(open + 12));
  EXPECT_FALSE(result.started);
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_THAT(result.output, HasSubstr("LimitNOFILE"));
  std::filesystem::remove_all(folder);
  const auto daemon = TestDaemon::Start({}, 2, "-Sn " + std::to_string(open + 12));
  EXPECT_THAT(daemon->Log(), Not(HasSubstr("LimitNOFILE")));
  EXPECT_NE(daemon->Connect(), nullptr);
}

TEST_F(Attack, AClientBeyondTheConnectionsHearsWhy) {
  Start({"--max-connections", "2"});
  const auto second = daemon_->Connect();
  const auto third = Http2Client::Connect(daemon_->socket_path());
  ASSERT_NE(third, nullptr);
  const Answer answer = third->CallAndWait(Method("GetStats"), "");
  EXPECT_EQ(answer.code, kUnavailable);
  EXPECT_THAT(third->goodbye(), HasSubstr("max_connections"));
  // A client of ours hears what may be wrong, and the log says what is.
  const auto fourth =
      Client::Connect(daemon_->address(), {.connect_timeout = absl::Seconds(3), .wait_for_daemon = false});
  EXPECT_EQ(fourth.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(fourth.status().message()), HasSubstr("max_connections"));
  const auto logged = [&] { return daemon_->Log().find("connections refused=") != std::string::npos; };
  for (int i = 0; i < 600 && !logged(); i++) std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_TRUE(logged()) << daemon_->Log();
}

// Moves, plans and reads have threads of their own.
TEST_F(Attack, BulkCallsDoNotKeepEnginesWaiting) {
  Start({"--device-memory", "64MiB", "--host-memory", "64MiB"});
  v1::PlanRequest plan;
  plan.set_model_name("small");
  for (int i = 0; i < 200; i++) plan.add_contexts(1000 + i);
  const auto wire = Wire();
  std::vector<int32_t> plans;
  for (int i = 0; i < 40; i++)
    plans.push_back(wire->Call(Method("Plan"), {.bytes = plan.SerializeAsString()}));
  wire->Until([&] { return wire->unsent_bytes() == 0; }, 60);
  const std::string attend = AttendBytes(sequence_, 1);
  const auto other = Wire();
  for (int i = 0; i < 20; i++) EXPECT_EQ(other->CallAndWait(Method("Attend"), attend).code, kOk);
  wire->Move();
  int waiting = 0;
  for (const int32_t call : plans) waiting += wire->answer(call).ended ? 0 : 1;
  EXPECT_GT(waiting, 20) << "the attends had to wait for the plans";
}

TEST_F(Attack, APlanThatWouldTakeMinutesIsRefused) {
  Start();
  v1::PlanRequest plan;
  for (int i = 0; i < 500; i++) {
    v1::Layer* layer = plan.mutable_model()->add_layers();
    layer->set_kv_heads(1);
    layer->set_query_heads(1 + i % 60);
    layer->set_head_dim_k(64);
    layer->set_head_dim_v(64);
    layer->set_window(i);
  }
  plan.mutable_model()->set_name("odd");
  const auto wire = Wire();
  Answer answer = wire->CallAndWait(Method("Plan"), plan.SerializeAsString());
  EXPECT_EQ(answer.code, kInvalidArgument);
  EXPECT_THAT(answer.text, HasSubstr("64 different shapes"));
  plan.mutable_model()->mutable_layers()->DeleteSubrange(60, 440);
  for (int i = 0; i < 256; i++) plan.add_contexts(1000 + i);
  for (int i = 0; i < 1024; i++) plan.add_pairs("q8_0/turbo4");
  answer = wire->CallAndWait(Method("Plan"), plan.SerializeAsString());
  EXPECT_EQ(answer.code, kInvalidArgument);
  EXPECT_THAT(answer.text, AllOf(HasSubstr("256 contexts x 1024 pairs x 60"), HasSubstr("1048576")));
  // A window beyond int, and a model with more layers than any.
  plan.mutable_model()->mutable_layers(0)->set_window(int64_t{1} << 40);
  answer = wire->CallAndWait(Method("Plan"), plan.SerializeAsString());
  EXPECT_EQ(answer.code, kInvalidArgument);
  EXPECT_THAT(answer.text, HasSubstr("2147483647"));
  v1::RegisterModelRequest model;
  model.mutable_model()->set_name("tall");
  for (int i = 0; i < 80000; i++) *model.mutable_model()->add_layers() = plan.model().layers(1);
  answer = wire->CallAndWait(Method("RegisterModel"), model.SerializeAsString());
  EXPECT_EQ(answer.code, kInvalidArgument);
  EXPECT_THAT(answer.text, HasSubstr("65536"));
}

// A daemon with a long sequence, and attends over it that take some seconds: as many items as that needs on
// this machine. Where a whole message of them is not enough the tests are left out; server_test.cc holds such
// calls at a gate.
class LongAttends : public Attack {
 protected:
  static constexpr int64_t kTokens = 131072;

  void StartLong(const std::vector<std::string>& arguments) {
    std::vector<std::string> all = {"--device-memory", "160MiB", "--host-memory", "0"};
    all.insert(all.end(), arguments.begin(), arguments.end());
    Start(all);
    const Tokens rows(1, 0, 2048);
    for (int64_t tokens = 64; tokens < kTokens; tokens += 2048)
      ASSERT_TRUE(client_->Append(sequence_, tokens, rows.layers).ok());
    const auto wire = Wire();
    for (items_ = 1; items_ <= kMostItems; items_ *= 2) {
      const auto start = std::chrono::steady_clock::now();
      const Answer answer = wire->CallAndWait(Method("Attend"), LongAttend());
      ASSERT_EQ(answer.code, kOk) << answer.text;
      if (std::chrono::steady_clock::now() - start > std::chrono::seconds(3)) return;
    }
    GTEST_SKIP() << kMostItems << " long attends in one message take less than 3 seconds here";
  }
  // 5 * 10^8 products of queries, tokens and heads for each item.
  std::string LongAttend() const {
    v1::AttendRequest request;
    for (int i = 0; i < items_; i++) {
      v1::AttendItem* item = request.add_items();
      item->set_sequence_id(sequence_);
      item->set_first_query_position(kTokens - 1000);
      Fill(item->mutable_q(), 1000, kHeads, v1::DATA_TYPE_F16);
    }
    return request.SerializeAsString();
  }

 private:
  static constexpr int kMostItems = 8;
  int items_ = 1;
};

// A client that gives up frees what its call computes with: others are served at once, not a minute later.
TEST_F(LongAttends, AnAbandonedOneStopsWithinASecond) {
  ASSERT_NO_FATAL_FAILURE(StartLong({}));
  if (IsSkipped()) return;
  const std::string small = AttendBytes(sequence_, 1);
  const auto bystander = Wire();
  ASSERT_EQ(bystander->CallAndWait(Method("Attend"), small).code, kOk);
  for (int round = 0; round < 2; round++) {
    auto wire = Wire();
    const int32_t call = wire->Call(Method("Attend"), {.bytes = LongAttend()});
    wire->Until([&] { return wire->unsent_bytes() == 0; }, 60);
    wire->Until([&] { return wire->answer(call).ended; }, 0.5);
    ASSERT_FALSE(wire->answer(call).ended) << "the attend is too short for this test";
    wire.reset();  // the client is gone
    const auto start = std::chrono::steady_clock::now();
    const Answer answer = bystander->CallAndWait(Method("Attend"), small);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    EXPECT_EQ(answer.code, kOk) << answer.text;
    EXPECT_LT(took.count(), 5) << "an attend that nobody waits for goes on";  // a second, on a busy machine
  }
  // Nothing of them is left, which would have to be waited for.
  const auto start = std::chrono::steady_clock::now();
  daemon_->Stop();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  EXPECT_LT(took.count(), 5);
}

// SIGTERM: what has not begun is answered, what runs is cancelled when the grace ends, and then the daemon
// ends. Those that run hold both threads for much longer than the grace, so all others wait.
TEST_F(LongAttends, AShutdownAnswersWhatWaitsAndEndsInTime) {
  constexpr int kCalls = 6, kThreads = 2;
  const std::string config = MakeFolder() + "/kvtided.json";
  std::ofstream(config) << "{\"service_threads\": " << kThreads << "}";
  ASSERT_NO_FATAL_FAILURE(StartLong({"--config", config, "--shutdown-seconds", "1"}));
  if (IsSkipped()) return;
  // A connection for each: a quick machine's attends are larger than one may hold.
  struct Sent {
    std::unique_ptr<Http2Client> wire;
    int32_t call;
    const Answer& answer() const { return wire->answer(call); }
  };
  std::vector<Sent> sent;
  const std::string attend = LongAttend();
  for (int i = 0; i < kCalls; i++) {
    auto wire = Wire();
    const int32_t call = wire->Call(Method("Attend"), {.bytes = attend});
    ASSERT_TRUE(wire->Until([&] { return wire->unsent_bytes() == 0; }, 60));
    sent.push_back({std::move(wire), call});
  }
  sent.back().wire->Until([] { return false; }, 0.3);
  const auto start = std::chrono::steady_clock::now();
  kill(daemon_->pid(), SIGTERM);
  for (const Sent& one : sent) one.wire->Until([&] { return one.answer().ended; }, 60);
  const auto ended = [&](int code, const char* text) {
    return std::count_if(sent.begin(), sent.end(), [&](const Sent& one) {
      return one.answer().ended && one.answer().code == code &&
             one.answer().text.find(text) != std::string::npos;
    });
  };
  EXPECT_GE(ended(kUnavailable, "shutting down"), kCalls - kThreads) << "calls that waited were not told";
  EXPECT_EQ(ended(kUnavailable, "") + ended(kCancelled, ""), kCalls) << "those that ran are cancelled";
  const int code = daemon_->Wait();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  EXPECT_TRUE(code == 0 || code == 3) << code << daemon_->Log();
  EXPECT_LT(took.count(), 20) << daemon_->Log();
}

}  // namespace
}  // namespace kvtide::e2e
