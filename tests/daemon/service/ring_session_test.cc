// A client of the shared-memory way beside others whose calls are held in the backend.
#include "daemon/service/ring_session.h"

#include <chrono>
#include <future>
#include <memory>
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
    service_ = std::make_unique<KvCacheService>(cache_.get(), &connections_, service);
  }
  SequenceId NewSequence() {
    SequenceOptions options;
    options.pair = ExactPair();
    return cache_->CreateSequence(model_, options).value();
  }
  std::unique_ptr<RingSession> Connect() {
    auto connection = std::make_shared<Connection>();
    connection->number = ++clients_;
    connection->identity = std::make_shared<const Identity>(Identity::OfThisProcess());
    return std::make_unique<RingSession>(service_.get(), connection, TensorMemory(nullptr, 0),
                                         int64_t{1} << 20, false, -1);
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

}  // namespace
}  // namespace kvtide::service
