// A randomised simulation: every verb of the cache in random order, with small tiers, planted faults of the
// backends and a clock that jumps. After every step the invariants are checked; every attention is compared
// with a naive model that knows no memory. A failure prints its seed; KVTIDE_SIM_SEEDS=first:count and
// KVTIDE_SIM_STEPS choose others:
//     KVTIDE_SIM_SEEDS=1000:500 kvtide_test_sim
#include <cstdlib>
#include <initializer_list>
#include <map>
#include <string>

#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

int64_t Number(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atoll(text) : otherwise;
}

class CacheSim : public CacheTest {
 protected:
  void Run(uint32_t seed, int64_t steps);

 private:
  int Random(int below) { return static_cast<int>(dice_() % static_cast<uint32_t>(below)); }
  template <class... Names>
  const char* Any(Names... names) {
    const char* list[] = {names...};
    return list[static_cast<size_t>(Random(sizeof...(names)))];
  }
  Client& AnyClient() { return clients_[static_cast<size_t>(Random(static_cast<int>(clients_.size())))]; }

  void Open();
  void Step();
  void Append();
  void Attend();
  void Truncate();
  void Move();
  void PlantFault(std::initializer_list<FaultyBackend::Call> calls);
  void NoFaults();
  // Faults are planted for one step; errors that follow from them are fine, and leave the state as it was.
  bool Excused(const absl::Status& status, const Client& client) const;

  std::mt19937 dice_;
  std::vector<Client> clients_;
  std::map<SequenceId, bool> droppable_;
  bool fault_ = false;
  bool tight_ = false;
};

void CacheSim::Open() {
  SequenceOptions options = WithPair(
      Any("f16", "turbo4", "q8_0/turbo3", "turbo3", "planar4/q4_0", "bf16/turbo2"), {Random(3), Random(3)});
  options.seal_at_once = Random(6) == 0;
  if (tight_ && !options.seal_at_once) options.pair = ExactPair();
  options.allow_drop = Random(5) == 0;
  if (Random(4) == 0) options.centre = Centre::kNone;
  clients_.emplace_back(*cache_, Random(2) == 0 ? SmallModel() : MixedModel(), options, dice_);
  droppable_[clients_.back().id()] = options.allow_drop;
}

bool CacheSim::Excused(const absl::Status& status, const Client& client) const {
  switch (status.code()) {
    case absl::StatusCode::kInternal:
      return fault_ && absl::StrContains(status.message(), "planted");
    case absl::StatusCode::kDataLoss:
      return client.info().dropped_blocks > 0 && droppable_.at(client.id());
    case absl::StatusCode::kResourceExhausted:
      return true;
    default:
      return false;
  }
}

void CacheSim::Append() {
  Client& client = AnyClient();
  const int64_t before = client.length();
  const int64_t tokens = Random(3) == 0 ? 1 : 1 + Random(Random(4) == 0 ? 300 : 90);
  absl::Status status;
  if (Random(2) == 0) {
    status = client.Append(tokens);
    EXPECT_TRUE(status.ok() || client.info().max_layer_tokens == before) << status;
  } else {
    status = client.Step(tokens);  // may stop between two layers: they are brought in line again
    if (!status.ok()) {
      EXPECT_EQ(client.info().tokens, before);
      const absl::Status cut = client.Truncate(before);
      if (!cut.ok() && Excused(cut, client)) {
        EXPECT_TRUE(client.Close().ok());
        clients_.erase(clients_.begin() + (&client - clients_.data()));
        return;
      }
      EXPECT_TRUE(cut.ok()) << cut;
    }
  }
  EXPECT_TRUE(status.ok() || Excused(status, client)) << status;
  EXPECT_EQ(client.info().tokens, client.length());
}

void CacheSim::Attend() {
  Client& client = AnyClient();
  if (client.length() == 0) return;
  const int layer = Random(static_cast<int>(client.model().layers.size()));
  const std::vector<float> sinks(8, 1.5f);
  const absl::Status status =
      client.CheckAttention(layer, 1 + Random(4), Random(3) == 0 ? sinks.data() : nullptr);
  EXPECT_TRUE(status.ok() || Excused(status, client)) << status;
}

void CacheSim::Truncate() {
  Client& client = AnyClient();
  const int64_t length = client.length();
  int64_t cut =
      Random(3) == 0 ? std::max<int64_t>(0, length - 1 - Random(20)) : Random(static_cast<int>(length) + 1);
  if (client.info().options.seal_at_once) cut = cut / kBlockTokens * kBlockTokens;
  const absl::Status status = client.Truncate(cut);
  if (status.code() == absl::StatusCode::kOutOfRange) {
    EXPECT_TRUE(absl::StrContains(status.message(), "sliding window")) << status;
  } else if (!status.ok()) {
    EXPECT_TRUE(Excused(status, client)) << status;
  }
  EXPECT_EQ(client.info().tokens, client.length());
}

void CacheSim::Move() {
  if (cache_->options().tiers.size() == 1) return;
  Client& client = AnyClient();
  const SequenceId id = client.id();
  switch (Random(5)) {
    case 0:
      EXPECT_TRUE(cache_->Evict({&id, 1}, static_cast<int>(cache_->options().tiers.size()) - 1).ok());
      break;
    case 1:
      EXPECT_TRUE(cache_->Prefetch({&id, 1}).ok());
      break;
    case 2:
      if (Random(4) != 0) break;
      EXPECT_EQ(cache_->Evict({&id, 1}, kDropTier).ok(), droppable_.at(id));
      break;
    case 3:
      if (Random(4) != 0) break;
      EXPECT_TRUE(cache_->EvictAll(1).ok());
      break;
    default:
      clock_.Advance(absl::Seconds(Random(10)));
      cache_->RunMovesOnce();
  }
}

void CacheSim::NoFaults() {
  fault_ = false;
  for (FaultyBackend* backend : {device_.get(), host_.get()})
    for (int call = 0; call < FaultyBackend::kCalls; call++)
      backend->Fail(static_cast<FaultyBackend::Call>(call), 0);
}

void CacheSim::PlantFault(std::initializer_list<FaultyBackend::Call> calls) {
  if (Random(12) != 0) return;
  fault_ = true;
  (Random(2) == 0 ? device_ : host_)
      ->Fail(std::data(calls)[Random(static_cast<int>(calls.size()))], 1 + Random(2));
}

void CacheSim::Step() {
  if (clients_.empty() || (clients_.size() < 6 && Random(12) == 0)) Open();
  const int dice = Random(100);
  if (dice < 40) {
    // A copy that fails while room is made defers sealing, which the naive model does not know.
    if (tight_) {
      PlantFault(
          {FaultyBackend::kAppend, FaultyBackend::kAttend, FaultyBackend::kStartCopy, FaultyBackend::kPoll});
    } else {
      PlantFault({FaultyBackend::kAppend, FaultyBackend::kAttend});
    }
    Append();
  } else if (dice < 65) {
    PlantFault({FaultyBackend::kAttend});
    Attend();
  } else if (dice < 73) {
    PlantFault({FaultyBackend::kDecode, FaultyBackend::kAppend, FaultyBackend::kStartCopy});
    Truncate();
  } else if (dice < 90) {
    PlantFault({FaultyBackend::kStartCopy, FaultyBackend::kPoll});
    Move();
  } else if (dice < 95 && clients_.size() < 8) {
    Client fork = AnyClient().Fork();
    droppable_[fork.id()] = fork.info().options.allow_drop;
    clients_.push_back(fork);
  } else if (clients_.size() > 1) {
    const int victim = Random(static_cast<int>(clients_.size()));
    EXPECT_TRUE(clients_[static_cast<size_t>(victim)].Close().ok());
    clients_.erase(clients_.begin() + victim);
  }
  NoFaults();
  cache_->CheckInvariants();
  for (Client& client : clients_) {
    const SequenceInfo info = client.info();
    EXPECT_TRUE(info.dropped_blocks > 0 || TotalBytes(info) == client.shadow().BytesAtRest())
        << TotalBytes(info) << " bytes, the model has " << client.shadow().BytesAtRest();
  }
}

void CacheSim::Run(uint32_t seed, int64_t steps) {
  dice_.seed(seed);
  clients_.clear();
  droppable_.clear();
  options_.id_seed = seed + 1;
  options_.limits.high_watermark = 0.8;
  options_.limits.low_watermark = 0.5;
  options_.max_moves_in_flight = static_cast<size_t>(1 + Random(16));
  options_.move_piece_bytes = static_cast<size_t>(4096 + Random(100000));
  // Tight tiers run dry; there everything is f16 or coded at once, because a seal without room is deferred.
  tight_ = Random(3) == 0;
  const size_t device = (6 + static_cast<size_t>(Random(30))) * 65536;
  const size_t host = tight_ ? static_cast<size_t>(Random(20)) * 65536 : 64 * kMiB;
  StartOn(1 + Random(2), device, host);
  for (int64_t step = 0; step < steps && !HasFailure(); step++) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed << ", step " << step);
    Step();
  }
  for (Client& client : clients_)
    if (client.length() > 0 && client.info().dropped_blocks == 0) client.CheckAllLayers();
  for (Client& client : clients_) EXPECT_TRUE(client.Close().ok());
  cache_->CheckInvariants();
  EXPECT_EQ(UsedBytes(cache_->Stats()), 0u) << "seed " << seed;
  cache_.reset();
}

TEST_F(CacheSim, RandomCallsAgreeWithTheNaiveModel) {
  uint32_t first = 1;
  int64_t count = 8;
  if (const char* text = std::getenv("KVTIDE_SIM_SEEDS"); text != nullptr) {
    const std::string seeds = text;
    const size_t colon = seeds.find(':');
    first = static_cast<uint32_t>(std::stoul(seeds.substr(0, colon)));
    count = colon == std::string::npos ? 1 : std::stoll(seeds.substr(colon + 1));
  }
  const int64_t steps = Number("KVTIDE_SIM_STEPS", 150);
  std::printf("seeds %u to %lld, %lld steps each\n", first, static_cast<long long>(first + count - 1),
              static_cast<long long>(steps));
  for (int64_t i = 0; i < count && !HasFailure(); i++) Run(first + static_cast<uint32_t>(i), steps);
}

}  // namespace
}  // namespace kvtide::testing
