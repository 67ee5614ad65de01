// A client of the shared-memory way beside others whose calls are held in the backend.
#include "daemon/service/ring_session.h"

#include <chrono>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "daemon/service/kv_cache_service.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kvtide/v1/kv_cache_service.pb.h"
#include "tests/base/eventually.h"
#include "tests/daemon/cache/faulty_backend.h"

namespace kvtide::service {
namespace {

using testing::FaultyBackend;

constexpr int kDim = 64, kThreads = 2;

void FillTensor(v1::Tensor* tensor, int64_t tokens) {
  tensor->set_dtype(v1::DATA_TYPE_F32);
  for (const int64_t dimension : {tokens, int64_t{1}, int64_t{kDim}}) tensor->add_shape(dimension);
  tensor->set_data(std::string(static_cast<size_t>(tokens) * kDim * sizeof(float), '\0'));
}

class RingSessionTest : public ::testing::Test {
 protected:
  RingSessionTest() {
    CacheOptions options;
    options.tiers = {{"device", &device_, size_t{64} << 20, false, {}}};
    options.background_moves = false;
    cache_ = KvCache::Create(options).value();
    model_ = cache_->RegisterModel(UniformModel("m", {1, 1, kDim, kDim}, 1)).value();
    ServiceOptions service;
    service.threads = kThreads;
    service.gauges = gauges_;
    service.call_memory_bytes = int64_t{64} << 20;
    service.report = [this](const CallReport& call) {
      const MutexLock lock(mutex_);
      told_.push_back({call.method, call.code, std::string(call.request_id), std::string(call.trace),
                       std::string(call.tenant), call.refusal});
    };
    service_ = std::make_unique<KvCacheService>(cache_.get(), &connections_, service);
  }
  SequenceId NewSequence() {
    SequenceOptions options;
    options.pair = ExactPair();
    return cache_->CreateSequence(model_, options).value();
  }
  std::unique_ptr<RingSession> Connect(int64_t max_answer_bytes = int64_t{1} << 20) {
    auto connection = std::make_shared<Connection>();
    connection->number = ++clients_;
    connection->identity = std::make_shared<const Identity>(Identity::OfThisProcess());
    return std::make_unique<RingSession>(service_.get(), connection, TensorMemory(nullptr, 0),
                                         max_answer_bytes, false, -1);
  }
  static std::string AppendBytes(SequenceId sequence, int64_t tokens) {
    v1::SessionRequest request;
    request.mutable_append()->set_sequence_id(sequence);
    v1::LayerTokens* const layer = request.mutable_append()->add_layers();
    FillTensor(layer->mutable_k(), tokens);
    FillTensor(layer->mutable_v(), tokens);
    return request.SerializeAsString();
  }
  static std::string AttendBytes(SequenceId sequence) {
    v1::SessionRequest request;
    v1::AttendItem* const item = request.mutable_attend()->add_items();
    item->set_sequence_id(sequence);
    FillTensor(item->mutable_q(), 1);
    return request.SerializeAsString();
  }
  static int Serve(RingSession& session, const std::string& bytes) {
    v1::SessionResponse answer;
    session.Serve(bytes, absl::InfiniteDuration(), &answer);
    return answer.error().code();
  }

  // A call as its report has it, with its texts.
  struct Told {
    std::string method;
    int code = 0;
    std::string request_id, trace, tenant;
    std::optional<Refusal> refusal;
  };
  std::vector<Told> told() {
    const MutexLock lock(mutex_);
    return told_;
  }

  Mutex mutex_;
  std::vector<Told> told_ ABSL_GUARDED_BY(mutex_);
  FaultyBackend device_{MakeCpuBackend({.threads = 1})};
  std::unique_ptr<KvCache> cache_;
  ModelId model_ = 0;
  Connections connections_;
  std::shared_ptr<ServiceGauges> gauges_ = std::make_shared<ServiceGauges>();
  uint64_t clients_ = 0;
  std::unique_ptr<KvCacheService> service_;
};

// Other clients' calls hold their own threads and those of the service, and more wait: a small attention
// takes no longer than handing it over would, and passes them all.
TEST_F(RingSessionTest, ASmallAttentionWaitsForNobody) {
  const SequenceId small = NewSequence();
  const auto bystander = Connect();
  ASSERT_EQ(Serve(*bystander, AppendBytes(small, 10)), 0);
  // More than the pool's threads and as many guests can hold.
  constexpr int kOthers = 2 * kThreads + 2;
  device_.Close(FaultyBackend::kAppend);
  std::vector<std::thread> others;
  for (int i = 0; i < kOthers; i++)
    others.emplace_back([this, session = std::shared_ptr<RingSession>(Connect()),
                         bytes = AppendBytes(NewSequence(), 10)] { EXPECT_EQ(Serve(*session, bytes), 0); });
  EXPECT_TRUE(Eventually([&] {
    return gauges_->calls_under_way == kOthers && device_.held(FaultyBackend::kAppend) >= kThreads;
  }));
  std::future<int> attend =
      std::async(std::launch::async, [&] { return Serve(*bystander, AttendBytes(small)); });
  EXPECT_EQ(attend.wait_for(std::chrono::seconds(30)), std::future_status::ready);
  EXPECT_GE(device_.held(FaultyBackend::kAppend), kThreads);
  device_.Open(FaultyBackend::kAppend);
  EXPECT_EQ(attend.get(), 0);
  for (std::thread& other : others) other.join();
}

// The texts of a call over shared memory are those of the metadata over gRPC, by the same rules.
TEST_F(RingSessionTest, CallsCarryTheirRequestAndTrace) {
  const auto session = Connect();
  v1::SessionRequest request;
  request.mutable_close_sequence()->set_sequence_id(4711);
  request.set_x_request_id("chat-17/3");
  request.set_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
  v1::SessionResponse answer;
  session->Serve(request.SerializeAsString(), absl::InfiniteDuration(), &answer);
  EXPECT_EQ(answer.error().x_request_id(), "chat-17/3");
  request.set_x_request_id("two\nlines request=forged");
  request.set_traceparent("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01");
  answer.Clear();
  session->Serve(request.SerializeAsString(), absl::InfiniteDuration(), &answer);
  EXPECT_EQ(answer.error().x_request_id(), "ring/1/2");
  const std::vector<Told> told = this->told();
  ASSERT_EQ(told.size(), 2u);
  EXPECT_EQ(told[0].method, "CloseSequence");
  EXPECT_EQ(told[0].request_id, "chat-17/3");
  EXPECT_EQ(told[0].trace, "0af7651916cd43dd8448eb211c80319c");
  EXPECT_EQ(told[0].tenant, kDefaultTenant);
  EXPECT_EQ(told[0].refusal, Refusal::kNotFound);
  EXPECT_EQ(told[1].request_id, "ring/1/2");
  EXPECT_EQ(told[1].trace, "");
}

// What the client hears is what the log and the counts say.
TEST_F(RingSessionTest, AnAnswerLargerThanTheRingIsARefusal) {
  const auto session = Connect(10);
  v1::SessionRequest request;
  request.mutable_get_server_info();
  EXPECT_EQ(Serve(*session, request.SerializeAsString()),
            static_cast<int>(absl::StatusCode::kResourceExhausted));
  ASSERT_EQ(told().size(), 1u);
  EXPECT_EQ(told()[0].code, static_cast<int>(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(told()[0].refusal, Refusal::kTooLarge);
}

}  // namespace
}  // namespace kvtide::service
