// Calls that are held at a gate, or that would take long, beside a shutdown, a client that leaves and others
// that wait: who is told what, whose turn it is, and that nobody waits for what nobody needs. Server, cache
// and sockets are real; the backend is one that can be held.
#include "daemon/service/server.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <mutex>
#include <semaphore>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kvtide/v1/kv_cache_service.pb.h"
#include "tests/daemon/cache/faulty_backend.h"
#include "tests/wire/http2_client.h"

namespace kvtide::service {
namespace {

using testing::FaultyBackend;
using ::testing::HasSubstr;
using wire::Answer;
using wire::Http2Client;

constexpr int kOk = 0, kCancelled = 1, kUnavailable = 14;
constexpr int kDim = 64;

std::string Method(const std::string& name) { return "/kvtide.v1.KvCacheService/" + name; }

class ServerTest : public ::testing::Test {
 protected:
  ServerTest() {
    std::string folder = std::filesystem::temp_directory_path() / "kvtide_shutdown_XXXXXX";
    folder_ = ::mkdtemp(folder.data());
    CacheOptions options;
    options.tiers = {{"device", &device_, size_t{64} << 20, false, {}},
                     {"host", &host_, size_t{64} << 20, false, {}}};
    options.background_moves = false;
    cache_ = KvCache::Create(options).value();
    model_ = cache_->RegisterModel(UniformModel("m", {1, 1, kDim, kDim}, 1)).value();
    ServiceOptions service;
    service.listen = {"unix:" + folder_ + "/run/kvtided.sock"};
    service.threads = kThreads;
    service.gauges = gauges_;
    ServerWatch watch;
    watch.troubles = troubles_;
    server_ = Server::Start(cache_.get(), service, watch).value();
    wire_ = Http2Client::Connect(folder_ + "/run/kvtided.sock");
  }
  ~ServerTest() override {
    server_.reset();
    std::filesystem::remove_all(folder_);
  }

  SequenceId Fill(int64_t tokens) {
    SequenceOptions options;
    options.pair = ExactPair();
    const SequenceId sequence = cache_->CreateSequence(model_, options).value();
    const std::vector<float> rows(static_cast<size_t>(tokens) * kDim, 0.5f);
    const LayerKv layer{0, {rows.data(), DataType::kF32}, {rows.data(), DataType::kF32}, 0, 0};
    AppendCall call;
    call.sequence = sequence;
    call.tokens = tokens;
    call.layers = {&layer, 1};
    EXPECT_TRUE(cache_->Append(call).ok());
    return sequence;
  }
  static void FillTensor(v1::Tensor* tensor, int64_t tokens) {
    tensor->set_dtype(v1::DATA_TYPE_F32);
    for (const int64_t dimension : {tokens, int64_t{1}, int64_t{kDim}}) tensor->add_shape(dimension);
    tensor->set_data(std::string(static_cast<size_t>(tokens) * kDim * sizeof(float), '\0'));
  }
  static std::string AttendBytes(SequenceId sequence, int64_t queries = 1) {
    v1::AttendRequest request;
    v1::AttendItem* item = request.add_items();
    item->set_sequence_id(sequence);
    FillTensor(item->mutable_q(), queries);
    return request.SerializeAsString();
  }
  static std::string AppendAttendBytes(SequenceId sequence, int64_t start) {
    v1::AppendAttendRequest request;
    v1::AppendAttendItem* item = request.add_items();
    item->set_sequence_id(sequence);
    item->set_start_position(start);
    for (v1::Tensor* tensor : {item->mutable_q(), item->mutable_k(), item->mutable_v()})
      FillTensor(tensor, 1);
    return request.SerializeAsString();
  }
  int64_t Ended(const std::vector<int32_t>& calls, int code) {
    return std::count_if(calls.begin(), calls.end(), [&](int32_t call) {
      return wire_->answer(call).ended && wire_->answer(call).code == code;
    });
  }

  static constexpr int kThreads = 2;
  std::string folder_;
  FaultyBackend device_{MakeCpuBackend({.threads = 1})}, host_{MakeCpuBackend({.threads = 1})};
  std::unique_ptr<KvCache> cache_;
  ModelId model_ = 0;
  std::shared_ptr<ServiceGauges> gauges_ = std::make_shared<ServiceGauges>();
  std::shared_ptr<Troubles> troubles_ = std::make_shared<Troubles>();
  std::unique_ptr<Server> server_;
  std::unique_ptr<Http2Client> wire_;
};

// Two calls run and are held, ten wait: exactly these are told, at once, and the two end well.
TEST_F(ServerTest, CallsThatWaitAreToldAndThoseThatRunEndWell) {
  constexpr int kCalls = 12;
  const std::string attend = AttendBytes(Fill(100));
  device_.Close(FaultyBackend::kAttend);
  std::vector<int32_t> calls;
  for (int i = 0; i < kCalls; i++) calls.push_back(wire_->Call(Method("Attend"), {.bytes = attend}));
  ASSERT_TRUE(wire_->Until(
      [&] { return gauges_->calls_under_way == kCalls && device_.calls(FaultyBackend::kAttend) == kThreads; },
      60));
  bool in_time = false;
  std::thread shutdown([&] { in_time = server_->Shutdown(absl::Seconds(60), absl::Seconds(60)); });
  EXPECT_TRUE(wire_->Until([&] { return Ended(calls, kUnavailable) == kCalls - kThreads; }, 60));
  for (const int32_t call : calls)
    EXPECT_TRUE(!wire_->answer(call).ended ||
                wire_->answer(call).text.find("shutting down") != std::string::npos)
        << wire_->answer(call).text;
  EXPECT_EQ(Ended(calls, kOk), 0);
  device_.Open(FaultyBackend::kAttend);
  EXPECT_TRUE(wire_->Until([&] { return Ended(calls, kOk) == kThreads; }, 60));
  shutdown.join();
  EXPECT_TRUE(in_time);
}

// What runs when the grace is over is cancelled and comes back; what waited was told before.
TEST_F(ServerTest, ThoseThatRunBeyondTheGraceAreCancelled) {
  constexpr int kCalls = 6;
  const std::string attend = AttendBytes(Fill(100));
  device_.Close(FaultyBackend::kAttend);
  std::vector<int32_t> calls;
  for (int i = 0; i < kCalls; i++) calls.push_back(wire_->Call(Method("Attend"), {.bytes = attend}));
  ASSERT_TRUE(wire_->Until(
      [&] { return gauges_->calls_under_way == kCalls && device_.held(FaultyBackend::kAttend) == kThreads; },
      60));
  bool in_time = false;
  std::thread shutdown([&] { in_time = server_->Shutdown(absl::Milliseconds(20), absl::Seconds(60)); });
  EXPECT_TRUE(
      wire_->Until([&] { return Ended(calls, kUnavailable) + Ended(calls, kCancelled) == kCalls; }, 60));
  shutdown.join();
  EXPECT_TRUE(in_time) << "a call that was cancelled did not come back";
  EXPECT_EQ(device_.held(FaultyBackend::kAttend), 0);
  EXPECT_EQ(device_.calls(FaultyBackend::kAttend), kThreads) << "what waited has begun after all";
  EXPECT_GE(Ended(calls, kUnavailable), kCalls - kThreads);
  device_.Open(FaultyBackend::kAttend);
}

// A client that is gone frees the threads that its calls hold: others are served.
TEST_F(ServerTest, AnAbandonedCallStops) {
  const std::string attend = AttendBytes(Fill(20000));
  device_.Close(FaultyBackend::kAttend);
  for (int i = 0; i < kThreads + 2; i++) wire_->Call(Method("Attend"), {.bytes = attend});
  ASSERT_TRUE(wire_->Until(
      [&] {
        return gauges_->calls_under_way == kThreads + 2 && device_.held(FaultyBackend::kAttend) == kThreads;
      },
      60));
  wire_.reset();
  const auto other = Http2Client::Connect(folder_ + "/run/kvtided.sock");
  EXPECT_TRUE(other->Until(
      [&] { return gauges_->calls_under_way == 0 && device_.held(FaultyBackend::kAttend) == 0; }, 60));
  device_.Open(FaultyBackend::kAttend);
  EXPECT_EQ(other->CallAndWait(Method("Attend"), attend).code, kOk);
}

// A client has 64 calls waiting when another one sends its only one. Two more may begin: the other's is among
// them.
TEST_F(ServerTest, AClientWithManyCallsInFlightDoesNotStarveAnother) {
  constexpr int kMany = 64;
  const std::string attend = AttendBytes(Fill(20000));
  std::counting_semaphore<> may_begin(0);
  device_.SetHook([&](FaultyBackend::Call call) {
    if (call == FaultyBackend::kAttend) may_begin.acquire();
  });
  std::vector<int32_t> calls;
  for (int i = 0; i < kMany; i++) calls.push_back(wire_->Call(Method("Attend"), {.bytes = attend}));
  ASSERT_TRUE(wire_->Until(
      [&] { return gauges_->calls_under_way == kMany && device_.calls(FaultyBackend::kAttend) == kThreads; },
      60));
  const auto bystander = Http2Client::Connect(folder_ + "/run/kvtided.sock");
  const int32_t call = bystander->Call(Method("Attend"), {.bytes = attend});
  ASSERT_TRUE(bystander->Until([&] { return gauges_->calls_under_way == kMany + 1; }, 60));
  // Those that run, and two that waited.
  may_begin.release(kThreads + 2);
  EXPECT_TRUE(bystander->Until([&] { return bystander->answer(call).ended; }, 60)) << "it waits behind many";
  EXPECT_EQ(bystander->answer(call).code, kOk) << bystander->answer(call).text;
  may_begin.release(kMany);
  EXPECT_TRUE(wire_->Until([&] { return Ended(calls, kOk) == kMany; }, 60));
  device_.SetHook(nullptr);
}

// An eviction of a thousand blocks is cancelled after some of them, whatever the grace.
TEST_F(ServerTest, ARunningEvictionEnds) {
  constexpr int kBlocks = 1000;
  const SequenceId sequence = Fill(kBlocks * 64);
  std::atomic<bool> draining{false};
  // The first copy is held until the shutdown has begun; each further one is a step that it could have taken.
  const auto hold = [&](FaultyBackend::Call call) {
    if (call == FaultyBackend::kStartCopy)
      while (!draining) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  device_.SetHook(hold);
  host_.SetHook(hold);
  v1::EvictSequencesRequest request;
  request.add_sequence_ids(sequence);
  const int32_t call = wire_->Call(Method("EvictSequences"), {.bytes = request.SerializeAsString()});
  const auto copies = [&] {
    return device_.calls(FaultyBackend::kStartCopy) + host_.calls(FaultyBackend::kStartCopy);
  };
  ASSERT_TRUE(wire_->Until([&] { return copies() > 0; }, 60));
  bool in_time = false;
  std::thread shutdown([&] { in_time = server_->Shutdown(absl::Minutes(10), absl::Minutes(10)); });
  // Draining cancels bulk calls before it answers new ones: once this is refused the eviction is cancelled.
  wire_->Until([&] { return wire_->CallAndWait(Method("GetStats"), "").code == kUnavailable; }, 60);
  draining = true;
  EXPECT_TRUE(wire_->Until([&] { return wire_->answer(call).ended; }, 60));
  EXPECT_EQ(wire_->answer(call).code, kCancelled) << wire_->answer(call).text;
  EXPECT_THAT(wire_->answer(call).text, HasSubstr("by then it had moved"));
  shutdown.join();
  EXPECT_TRUE(in_time);
  EXPECT_LT(cache_->GetSequence(sequence)->blocks_by_tier[1], 100u) << "of " << kBlocks;
  device_.SetHook(nullptr);
  host_.SetHook(nullptr);
}

// A small attention that is alone is served by the thread that has read it; whatever may take longer is not.
TEST_F(ServerTest, SmallCallsAreServedWhereTheyArrive) {
  const SequenceId small = Fill(100), large = Fill(20000), full = Fill(64 + 63);
  std::vector<std::thread::id> threads;
  std::mutex mutex;
  device_.SetHook([&](FaultyBackend::Call call) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (call == FaultyBackend::kAttend) threads.push_back(std::this_thread::get_id());
  });
  const auto call = [&](const std::string& method, const std::string& bytes) {
    EXPECT_EQ(wire_->CallAndWait(Method(method), bytes).code, kOk);
    return threads.back();
  };
  std::set<std::thread::id> sockets, workers;
  for (int i = 0; i < 20; i++) {
    sockets.insert(call("Attend", AttendBytes(small)));
    sockets.insert(call("AppendAttend", AppendAttendBytes(small, 100 + i)));
    workers.insert(call("Attend", AttendBytes(large)));
    workers.insert(call("Attend", AttendBytes(small, 100)));
  }
  // The token after which a block is full, and the first of the next one.
  workers.insert(call("AppendAttend", AppendAttendBytes(full, 127)));
  workers.insert(call("AppendAttend", AppendAttendBytes(full, 128)));
  sockets.insert(call("AppendAttend", AppendAttendBytes(full, 129)));
  for (const std::thread::id& thread : sockets) EXPECT_EQ(workers.count(thread), 0u);
  EXPECT_EQ(*cache_->Length(small), 120);
  EXPECT_EQ(*cache_->Length(full), 130);
  EXPECT_EQ(threads.size(), 83u) << "a call that was declined has reached the backend";
  // Calls beside others of the same connection wait for their turn.
  threads.clear();
  device_.Close(FaultyBackend::kAttend);
  std::vector<int32_t> calls;
  for (int i = 0; i < 6; i++) calls.push_back(wire_->Call(Method("Attend"), {.bytes = AttendBytes(large)}));
  ASSERT_TRUE(wire_->Until([&] { return device_.calls(FaultyBackend::kAttend) == 83 + kThreads; }, 60));
  calls.push_back(wire_->Call(Method("Attend"), {.bytes = AttendBytes(small)}));
  ASSERT_TRUE(wire_->Until([&] { return gauges_->calls_under_way == 7; }, 60));
  // While the workers are held, sockets are looked after.
  const auto other = Http2Client::Connect(folder_ + "/run/kvtided.sock");
  EXPECT_EQ(other->CallAndWait("/grpc.health.v1.Health/Check", "").code, kOk);
  device_.Open(FaultyBackend::kAttend);
  EXPECT_TRUE(wire_->Until([&] { return Ended(calls, kOk) == 7; }, 60));
  for (const std::thread::id& thread : threads) EXPECT_EQ(sockets.count(thread), 0u);
  device_.SetHook(nullptr);
}

TEST_F(ServerTest, HealthIsToldToWhoAsksAndWhoWatches) {
  const std::string check = "/grpc.health.v1.Health/Check", watch = "/grpc.health.v1.Health/Watch";
  const std::string serving = "\x08\x01", not_serving = "\x08\x02", unknown = "\x08\x03";
  const auto framed = [](const std::string& message) { return std::string("\0\0\0\0\2", 5) + message; };
  const std::string ours = "\x0a\x18kvtide.v1.KvCacheService", other = "\x0a\x05other";
  EXPECT_EQ(wire_->CallAndWait(check, "").bytes, framed(serving));
  EXPECT_EQ(wire_->CallAndWait(check, ours).bytes, framed(serving));
  EXPECT_EQ(wire_->CallAndWait(check, other).code, 5);
  EXPECT_EQ(wire_->CallAndWait(check, "\x0a\x7fshort").code, 3);
  const int32_t all = wire_->Call(watch, {.bytes = ""}), one = wire_->Call(watch, {.bytes = ours}),
                none = wire_->Call(watch, {.bytes = other}), gone = wire_->Call(watch, {.bytes = ""});
  EXPECT_TRUE(wire_->Until(
      [&] {
        return wire_->answer(all).bytes == framed(serving) && wire_->answer(one).bytes == framed(serving) &&
               wire_->answer(none).bytes == framed(unknown) && wire_->answer(gone).bytes == framed(serving);
      },
      60));
  wire_->Cancel(gone);
  device_.Close(FaultyBackend::kAttend);
  const int32_t held = wire_->Call(Method("Attend"), {.bytes = AttendBytes(Fill(20000))});
  ASSERT_TRUE(wire_->Until([&] { return device_.calls(FaultyBackend::kAttend) > 0; }, 60));
  std::thread shutdown([&] { server_->Shutdown(absl::Seconds(60), absl::Seconds(60)); });
  EXPECT_TRUE(wire_->Until(
      [&] {
        return wire_->answer(all).bytes == framed(serving) + framed(not_serving) &&
               wire_->answer(one).bytes == framed(serving) + framed(not_serving);
      },
      60));
  device_.Open(FaultyBackend::kAttend);
  EXPECT_TRUE(wire_->Until([&] { return wire_->answer(held).ended && wire_->answer(all).ended; }, 60));
  shutdown.join();
}

// A probe restarts who can serve nobody any more.
TEST_F(ServerTest, HealthEndsWithATroubleThatOnlyARestartMends) {
  const std::string check = "/grpc.health.v1.Health/Check";
  const auto becomes = [&](char status) {
    for (int i = 0; i < 600; i++) {
      if (wire_->CallAndWait(check, "").bytes == std::string("\0\0\0\0\2\x08", 6) + status) return true;
      absl::SleepFor(absl::Milliseconds(50));
    }
    return false;
  };
  EXPECT_TRUE(becomes(1));
  troubles_->Set(Trouble::kRemote, "away");
  troubles_->Set(Trouble::kDevice, "lost", true);
  EXPECT_TRUE(becomes(2));
  v1::GetStatsResponse stats;  // is answered meanwhile
  ASSERT_TRUE(stats.ParseFromString(wire_->CallAndWait(Method("GetStats"), "").bytes.substr(5)));
  ASSERT_EQ(stats.troubles_size(), 2);
  EXPECT_EQ(stats.troubles(0).what(), "device");
  EXPECT_EQ(stats.troubles(0).text(), "lost");
  EXPECT_TRUE(stats.troubles(0).ends_service());
  EXPECT_EQ(stats.troubles(1).what(), "remote");
  troubles_->Set(Trouble::kDevice, "");
  EXPECT_TRUE(becomes(1));
}

}  // namespace
}  // namespace kvtide::service
