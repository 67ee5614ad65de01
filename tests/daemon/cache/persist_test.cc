// Sequences over a restart: what Persist has acknowledged is there again after a stop and after a crash at
// any step, bit for bit, and goes on as if nothing had happened; what was closed does not come back; what
// another build stored is never read; errors say what is durable and what is not.
#include <xxhash.h>

#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "daemon/cache/persist/manifest.h"
#include "daemon/cache/stepper.h"
#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

constexpr size_t kBlock = 65536;
constexpr size_t kExtent = kBlock + kDiskPage;

class PersistTest : public CacheTest {
 protected:
  void StartSmall(size_t device = 20, size_t host = 20, size_t disk = 60, int devices = 1) {
    StartWithDisk(device * kBlock, host * kBlock, (disk * kExtent) * 130 / 128 + 20 * kDiskPage, devices);
  }
  // Every stored value of the sequence.
  uint64_t HashOf(SequenceId id) {
    const SequenceInfo info = cache_->GetSequence(id).value();
    const ModelSpec model = cache_->GetModel(info.model).value();
    uint64_t hash = static_cast<uint64_t>(info.tokens);
    for (size_t l = 0; l < model.layers.size() && info.tokens > 0; l++) {
      const LayerGroupSpec& group = model.groups[static_cast<size_t>(model.layers[l].group)];
      const int64_t first = group.window > 0 ? FirstLiveBlock(info.tokens, group.window) * kBlockTokens : 0;
      const auto rows = static_cast<size_t>((info.tokens - first) * group.shape.kv_heads);
      std::vector<float> k(rows * static_cast<size_t>(group.shape.head_dim_k)),
          v(rows * static_cast<size_t>(group.shape.head_dim_v));
      const LayerRead layers[] = {
          {static_cast<int>(l), MutableTensorView(k.data()), MutableTensorView(v.data())}};
      ReadCall call;
      call.sequence = id;
      call.first_token = first;
      call.tokens = info.tokens - first;
      call.layers = layers;
      const absl::Status status = cache_->ReadTokens(call);
      EXPECT_TRUE(status.ok()) << status;
      hash = XXH3_64bits_withSeed(k.data(), k.size() * sizeof(float), hash);
      hash = XXH3_64bits_withSeed(v.data(), v.size() * sizeof(float), hash);
    }
    return hash;
  }
  std::map<SequenceId, uint64_t> in_doubt_;
};

TEST_F(PersistTest, SequencesAreThereAgainAndGoOnAsIfNothingHadHappened) {
  for (const bool crash : {false, true}) {
    for (const char* pair : {"f16", "q8_0/turbo4", "turbo3"}) {
      StartSmall();
      Client client(*cache_, SmallModel(), WithPair(pair, {1, 1}), random_);
      ASSERT_TRUE(client.Append(64 * 5 + 30).ok());
      const absl::StatusOr<PersistReport> report = cache_->Persist({{client.id()}});
      ASSERT_TRUE(report.ok()) << report.status();
      EXPECT_EQ(report->blocks, 6u);
      EXPECT_EQ(report->tokens, 350);
      EXPECT_EQ(client.info().durable_tokens, 350);
      cache_->CheckInvariants();
      const uint64_t hash = HashOf(client.id());
      Restart(crash);
      EXPECT_EQ(cache_->restored().sequences, 1u);
      EXPECT_TRUE(cache_->restored().lost.empty());
      EXPECT_EQ(HashOf(client.id()), hash);
      client.Move(*cache_);
      client.CheckAllLayers();
      ASSERT_TRUE(client.Step(100).ok());
      ASSERT_TRUE(client.Append(150).ok());
      client.CheckAllLayers();
      ASSERT_TRUE(client.Truncate(90).ok());
      client.CheckAllLayers();
      ASSERT_TRUE(client.Close().ok());
      EXPECT_EQ(UsedBytes(cache_->Stats()), 0u);
      Restart(true);
      EXPECT_EQ(cache_->restored().sequences, 0u);
      cache_.reset();
      disk_.reset();
    }
  }
}

TEST_F(PersistTest, AModelWithSlidingWindowsComesBack) {
  StartSmall();
  Client client(*cache_, MixedModel(), WithPair("q8_0/turbo4", {1, 1}), random_);
  ASSERT_TRUE(client.Append(500).ok());
  ASSERT_TRUE(cache_->Persist({{client.id()}}).ok());
  const uint64_t hash = HashOf(client.id());
  Restart(true);
  client.Move(*cache_);
  EXPECT_EQ(HashOf(client.id()), hash);
  client.CheckAllLayers();
  for (int i = 0; i < 5; i++) ASSERT_TRUE(client.Step(40).ok());
  client.CheckAllLayers();
}

TEST_F(PersistTest, CalibratedMeansComeBackWithTheirModel) {
  StartSmall();
  SequenceOptions options = WithPair("turbo4", {1, 1});
  options.centre = Centre::kCalibrated;
  Client client(*cache_, WithMeans(SmallModel()), options, random_);
  ASSERT_TRUE(client.Append(64 * 5).ok());
  ASSERT_TRUE(cache_->Persist({{client.id()}}).ok());
  const uint64_t hash = HashOf(client.id());
  Restart(true);
  ASSERT_EQ(cache_->restored().sequences, 1u);
  client.Move(*cache_);
  EXPECT_EQ(HashOf(client.id()), hash);
  ASSERT_TRUE(client.Step(200).ok());
  client.CheckAllLayers();
  ASSERT_TRUE(client.Truncate(0).ok());
  ASSERT_TRUE(client.Step(300).ok());
  client.CheckAllLayers();
}

TEST_F(PersistTest, TransformsComeBackWithTheirModel) {
  StartSmall(20, 20, 600);  // manifests hold the model's transforms
  Client client(*cache_, WithTransforms(SmallModel()), WithPair("tide3/turbo3", {1, 1}), random_);
  ASSERT_TRUE(client.Append(64 * 5).ok());
  Client fork = client.Fork();
  for (const SequenceId id : {client.id(), fork.id()}) {
    const absl::StatusOr<PersistReport> report = cache_->Persist({{id}});
    ASSERT_TRUE(report.ok()) << report.status();
  }
  const uint64_t hash = HashOf(client.id());
  Restart(true);
  ASSERT_EQ(cache_->restored().sequences, 2u);
  for (Client* one : {&client, &fork}) {
    one->Move(*cache_);
    EXPECT_EQ(HashOf(one->id()), hash);
    ASSERT_TRUE(one->Step(200).ok());
    one->CheckAllLayers();
  }
}

TEST_F(PersistTest, WhatCameAfterTheLastPersistIsGoneAndNothingElse) {
  StartSmall();
  Client client(*cache_, SmallModel(), WithPair("q8_0", {1, 1}), random_);
  ASSERT_TRUE(client.Append(100).ok());
  ASSERT_TRUE(cache_->Persist({{client.id()}}).ok());
  const uint64_t hash = HashOf(client.id());
  ASSERT_TRUE(client.Append(300).ok());  // the tail changes, blocks are sealed
  ASSERT_TRUE(client.Truncate(20).ok());
  ASSERT_TRUE(client.Append(10).ok());
  EXPECT_EQ(client.info().durable_tokens, 100);
  Restart(true);
  EXPECT_EQ(cache_->Length(client.id()).value(), 100);
  EXPECT_EQ(HashOf(client.id()), hash);
}

TEST_F(PersistTest, TheSecondPersistWritesWhatIsNew) {
  StartSmall();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(client.Append(64 * 6).ok());
  EXPECT_EQ(cache_->Persist({{client.id()}})->blocks, 6u);
  EXPECT_EQ(cache_->Persist({{client.id()}})->blocks, 0u);
  ASSERT_TRUE(client.Append(10).ok());
  EXPECT_EQ(cache_->Persist({{client.id()}})->blocks, 1u);
  ASSERT_TRUE(client.Append(10).ok());
  EXPECT_EQ(cache_->Persist({{client.id()}})->blocks, 1u);  // the tail again
  EXPECT_EQ(cache_->Stats().tiers[2].used_bytes, 7 * kExtent);
  // Parked on the disk, where all of it lies: nothing is written.
  const uint64_t written = disk_->Stats().written_bytes;
  ASSERT_TRUE(cache_->Evict({{client.id()}}, 2).ok());
  EXPECT_EQ(disk_->Stats().written_bytes, written);
  EXPECT_EQ(client.info().blocks_by_tier[2], 7u);
  client.CheckAllLayers();
  EXPECT_EQ(cache_->Persist({{client.id()}})->blocks, 0u);
  cache_->CheckInvariants();
}

TEST_F(PersistTest, ForksShareTheirBlocksAgain) {
  StartSmall();
  Client a(*cache_, SmallModel(), WithPair("turbo4", {1, 1}), random_);
  ASSERT_TRUE(a.Append(64 * 5 + 10).ok());
  Client b = a.Fork();
  ASSERT_TRUE(b.Append(70).ok());
  const SequenceId both[] = {a.id(), b.id()};
  ASSERT_TRUE(cache_->Persist(both).ok());
  const uint64_t shared = cache_->Stats().shared_blocks, stored = cache_->Stats().stored_bytes;
  const uint64_t hash_a = HashOf(a.id()), hash_b = HashOf(b.id());
  Restart(true);
  EXPECT_EQ(cache_->Stats().shared_blocks, shared);
  EXPECT_EQ(cache_->Stats().stored_bytes, stored);
  a.Move(*cache_);
  b.Move(*cache_);
  EXPECT_EQ(HashOf(a.id()), hash_a);
  EXPECT_EQ(HashOf(b.id()), hash_b);
  ASSERT_TRUE(a.Close().ok());
  b.CheckAllLayers();
  ASSERT_TRUE(b.Step(20).ok());
  b.CheckAllLayers();
}

// Mooncake #2676: RemoveAll left the disk tier; #3160: a removed key came back.
TEST_F(PersistTest, WhatWasClosedIsNotThereAfterARestart) {
  StartSmall();
  std::vector<std::unique_ptr<Client>> clients;
  std::vector<SequenceId> ids;
  for (int i = 0; i < 4; i++) {
    clients.push_back(std::make_unique<Client>(*cache_, SmallModel(), WithPair("q8_0"), random_));
    ASSERT_TRUE(clients.back()->Append(100 + 10 * i).ok());
    ids.push_back(clients.back()->id());
  }
  ASSERT_TRUE(cache_->Persist(ids).ok());
  ASSERT_TRUE(clients[1]->Close().ok());
  ASSERT_TRUE(clients[3]->Close().ok());
  EXPECT_EQ(cache_->Stats().durable_sequences, 2u);
  Restart(true);
  EXPECT_EQ(cache_->restored().sequences, 2u);
  EXPECT_TRUE(cache_->GetSequence(ids[0]).ok());
  EXPECT_FALSE(cache_->GetSequence(ids[1]).ok());
  EXPECT_TRUE(cache_->GetSequence(ids[2]).ok());
  EXPECT_FALSE(cache_->GetSequence(ids[3]).ok());
}

// The same for one that is closed while its blocks are written.
TEST_F(PersistTest, ASequenceThatIsClosedDuringPersistDoesNotComeBack) {
  constexpr int kWrites = 18;  // of the three blocks, in pieces of three pages
  for (int at = 0; at < kWrites; at++) {
    StartSmall();
    Client client(*cache_, SmallModel(), WithPair("f16"), random_);
    ASSERT_TRUE(client.Append(130).ok());
    int writes = 0;
    files_->SetHook([&](FaultFileSystem::Call call) {
      if (call != FaultFileSystem::kWrite || writes++ != at) return;
      EXPECT_TRUE(client.Close().ok());
    });
    cache_->Persist({{client.id()}}).status().IgnoreError();
    files_->SetHook(nullptr);
    EXPECT_GT(writes, at);
    EXPECT_EQ(UsedBytes(cache_->Stats()), 0u) << at;
    Restart(false);
    EXPECT_EQ(cache_->restored().sequences, 0u) << at;
    cache_.reset();
    disk_.reset();
  }
}

// Its only client has done nothing that it could be told to leave.
TEST_F(PersistTest, ItsClientWaitsWhileASequenceIsMadeDurable) {
  StartSmall();
  for (const int what : {0, 1, 2, 3, 4}) {
    Client client(*cache_, SmallModel(), WithPair("f16"), random_);
    ASSERT_TRUE(client.Append(30).ok());  // one block, written by the sequence's writer
    absl::Mutex mutex;
    bool writing = false, called = false;
    files_->SetHook([&](FaultFileSystem::Call call) {
      if (call != FaultFileSystem::kWrite) return;
      const absl::MutexLock lock(&mutex);
      if (writing) return;
      writing = true;
      mutex.AwaitWithTimeout(absl::Condition(&called), absl::Milliseconds(50));  // as a disk is slow
    });
    std::thread persister([&] { EXPECT_TRUE(cache_->Persist({{client.id()}}).ok()); });
    {
      const absl::MutexLock lock(&mutex);
      mutex.Await(absl::Condition(&writing));
    }
    absl::Status status;
    if (what == 0) status = client.Append(10);
    if (what == 1) status = client.Truncate(20);
    if (what == 2) status = client.Step(5);
    if (what == 3) status = cache_->ForkSequence(client.id()).status();
    if (what == 4) {
      const StepItem item{client.id(), 1, {}};
      StepCall step;
      step.items = {&item, 1};
      status = cache_->BeginStep(step).status();
    }
    EXPECT_TRUE(status.ok()) << what << ": " << status;
    {
      const absl::MutexLock lock(&mutex);
      called = true;
    }
    persister.join();
    files_->SetHook(nullptr);
    client.CheckAllLayers();
  }
  cache_->CheckInvariants();
}

TEST_F(PersistTest, PoliciesPersistOnParkAndAlways) {
  StartSmall();
  SequenceOptions on_park = WithPair("q8_0", {1, 1}), always = on_park;
  on_park.persistence = Persistence::kOnPark;
  always.persistence = Persistence::kAll;
  Client a(*cache_, SmallModel(), on_park, random_), b(*cache_, SmallModel(), always, random_),
      c(*cache_, SmallModel(), WithPair("q8_0"), random_);
  for (Client* client : {&a, &b, &c}) ASSERT_TRUE(client->Append(200).ok());
  cache_->RunMovesOnce();
  EXPECT_FALSE(a.info().durable);
  EXPECT_EQ(b.info().durable_tokens, 200);
  const SequenceId all[] = {a.id(), b.id(), c.id()};
  ASSERT_TRUE(cache_->Evict(all, 1).ok());
  EXPECT_EQ(a.info().durable_tokens, 200);
  EXPECT_FALSE(c.info().durable);
  const uint64_t persisted = cache_->Stats().persisted;
  cache_->RunMovesOnce();
  EXPECT_EQ(cache_->Stats().persisted, persisted);  // nothing has changed
  ASSERT_TRUE(b.Append(7).ok());
  cache_->RunMovesOnce();
  EXPECT_EQ(b.info().durable_tokens, 207);
  Restart(true);
  EXPECT_EQ(cache_->GetSequence(b.id())->options.persistence, Persistence::kAll);
  EXPECT_EQ(cache_->Length(b.id()).value(), 207);
  EXPECT_FALSE(cache_->GetSequence(c.id()).ok());
}

// What the background could not make durable is counted and has its words, as that of a call; what is not for
// keeping is neither.
TEST_F(PersistTest, WhatFailsInTheBackgroundIsTold) {
  StartSmall();
  SequenceOptions always = WithPair("q8_0", {1, 1}), evaluation = WithPair("q8_0");
  always.persistence = evaluation.persistence = Persistence::kAll;
  evaluation.seal_at_once = true;
  Client kept(*cache_, SmallModel(), always, random_), coded(*cache_, SmallModel(), evaluation, random_);
  ASSERT_TRUE(kept.Append(200).ok());
  ASSERT_TRUE(coded.Append(64).ok());
  cache_->RunMovesOnce();
  EXPECT_EQ(cache_->Stats().persisted, 1u);
  EXPECT_EQ(cache_->Stats().failed_persists, 0u);
  EXPECT_EQ(cache_->Stats().persist_problem, "");
  files_->Fail(FaultFileSystem::kSync);
  ASSERT_TRUE(kept.Append(5).ok());
  cache_->PersistChanged();
  EXPECT_EQ(cache_->Stats().failed_persists, 1u);
  const std::string problem = cache_->Stats().persist_problem;
  EXPECT_EQ(problem.rfind(absl::StrCat("sequence ", kept.id(), ": "), 0), 0u) << problem;
  EXPECT_NE(problem.find("restart the daemon"), std::string::npos) << problem;
  // What cannot be forgotten is told too: it may come back.
  ASSERT_FALSE(cache_->CloseSequence(kept.id()).ok());
  EXPECT_EQ(cache_->Stats().failed_persists, 2u);
  EXPECT_NE(cache_->Stats().persist_problem.find("which was closed"), std::string::npos)
      << cache_->Stats().persist_problem;
  files_->ClearFaults();
  Restart(true);
}

TEST_F(PersistTest, ErrorsSayWhyAndHarmNothing) {
  StartSmall(20, 20, 4);
  Client small(*cache_, SmallModel(), WithPair("f16"), random_),
      large(*cache_, SmallModel(), WithPair("f16"), random_);
  ASSERT_TRUE(small.Append(64).ok());
  ASSERT_TRUE(large.Append(64 * 6).ok());
  ASSERT_TRUE(cache_->Persist({{small.id()}}).ok());
  EXPECT_TRUE(IsError(cache_->Persist({{large.id()}}).status(), absl::StatusCode::kResourceExhausted,
                      "tier 'disk' has"));
  EXPECT_EQ(cache_->Stats().failed_persists, 1u);
  EXPECT_EQ(cache_->Stats().tiers[2].used_bytes, kExtent);  // what was written for it is given back
  SequenceOptions evaluation = WithPair("q8_0");
  evaluation.seal_at_once = true;
  Client coded(*cache_, SmallModel(), evaluation, random_);
  EXPECT_TRUE(IsError(cache_->Persist({{coded.id()}}).status(), absl::StatusCode::kFailedPrecondition,
                      "evaluation mode"));
  files_->Fail(FaultFileSystem::kSync);
  ASSERT_TRUE(small.Append(5).ok());
  EXPECT_TRUE(IsError(cache_->Persist({{small.id()}}).status(), absl::StatusCode::kUnavailable,
                      "restart the daemon"));
  EXPECT_EQ(small.info().durable_tokens, 64);
  small.CheckAllLayers();
  large.CheckAllLayers();
  cache_->CheckInvariants();
  Restart(true);
  EXPECT_TRUE(cache_->Length(small.id()).value() == 64 || cache_->Length(small.id()).value() == 69);
}

TEST_F(PersistTest, WithoutADurableTierItIsRefused) {
  Start();
  Client client(*cache_, SmallModel(), WithPair("f16"), random_);
  EXPECT_TRUE(
      IsError(cache_->Persist({{client.id()}}).status(), absl::StatusCode::kFailedPrecondition, "--disk"));
}

// What another build has stored in another way is told and not read.
TEST_F(PersistTest, ChangedCodecsAndGeometryAreDetected) {
  StartSmall();
  Client client(*cache_, SmallModel(), WithPair("q8_0/turbo4", {0, 0}), random_);
  ASSERT_TRUE(client.Append(200).ok());
  ASSERT_TRUE(cache_->Persist({{client.id()}}).ok());
  std::vector<std::string> lost;
  const std::string good = disk_->Load(&lost).at(client.id());
  const Manifest manifest = DecodeManifest(good).value();
  const std::vector<std::function<void(Manifest&)>> changes = {
      [](Manifest& m) { m.groups[0].codec_version_k++; },
      [](Manifest& m) { m.groups[0].codec_version_v++; },
      [](Manifest& m) { m.groups[0].coded_layout++; },
      [](Manifest& m) { m.groups[0].exact_layout++; },
      [](Manifest& m) { m.groups[0].blocks[1].offset += 1'000'000'000'000; },
      [](Manifest& m) { m.groups[0].blocks[1].offset = m.groups[0].blocks[0].offset; },
  };
  for (size_t i = 0; i < changes.size(); i++) {
    Manifest changed = manifest;
    changes[i](changed);
    ASSERT_TRUE(disk_->Put(client.id(), EncodeManifest(changed)).ok());
    Restart(false);
    EXPECT_EQ(cache_->restored().sequences, 0u) << i;
    ASSERT_EQ(cache_->restored().lost.size(), 1u) << i;
    EXPECT_FALSE(cache_->GetSequence(client.id()).ok()) << i;
    EXPECT_EQ(UsedBytes(cache_->Stats()), 0u) << i;
  }
  // Another write id: the block is not the one that the manifest means.
  Manifest changed = manifest;
  changed.groups[0].blocks[1].write_id++;
  ASSERT_TRUE(disk_->Put(client.id(), EncodeManifest(changed)).ok());
  Restart(false);
  EXPECT_EQ(cache_->restored().sequences, 1u);
  client.Move(*cache_);
  EXPECT_TRUE(IsError(client.CheckAttention(0), absl::StatusCode::kDataLoss, "tokens 64 to 127"));
}

TEST_F(PersistTest, ManifestsSurviveEveryCutAndEveryChangedByte) {
  StartSmall();
  Client client(*cache_, MixedModel(), WithPair("q8_0/turbo4", {0, 0}), random_);
  ASSERT_TRUE(client.Append(200).ok());
  ASSERT_TRUE(cache_->Persist({{client.id()}}).ok());
  std::vector<std::string> lost;
  const std::string good = disk_->Load(&lost).at(client.id());
  ASSERT_EQ(EncodeManifest(DecodeManifest(good).value()), good);
  for (size_t cut = 0; cut < good.size(); cut += 1 + cut / 50)
    EXPECT_FALSE(DecodeManifest(good.substr(0, cut)).ok()) << cut;
  EXPECT_FALSE(DecodeManifest(good + "x").ok());
  for (size_t at = 0; at < good.size(); at += 1 + at / 100) {
    std::string changed = good;
    changed[at] = static_cast<char>(changed[at] ^ 0x81);
    DecodeManifest(changed).status().IgnoreError();  // an error or another manifest, and nothing worse
  }
}

TEST_F(PersistTest, SequencesOfTwoDevicesComeBackWhereTheyLived) {
  StartSmall(20, 20, 60, 2);
  SequenceOptions on_second = WithPair("q8_0", {1, 1});
  on_second.device = "second";
  Client client(*cache_, SmallModel(), on_second, random_);
  ASSERT_TRUE(client.Append(200).ok());
  ASSERT_TRUE(cache_->Persist({{client.id()}}).ok());
  Restart(true);
  EXPECT_EQ(cache_->GetSequence(client.id())->device, "second");
  client.Move(*cache_);
  client.CheckAllLayers();
}

// Random verbs, deaths at any step of the disk, against a naive model of what was acknowledged.
TEST_F(PersistTest, WhatWasAcknowledgedIsThereAfterADeathAtAnyStep) {
  std::mt19937 dice(11);
  std::map<SequenceId, uint64_t> durable;  // hash of what was acknowledged
  for (int life = 0; life < 60; life++) {
    if (life == 0) {
      StartSmall(8, 8, 60);
    } else {
      Restart(true);
    }
    ASSERT_TRUE(cache_->restored().lost.empty()) << cache_->restored().lost[0];
    for (const auto& [id, hash] : durable) {
      ASSERT_TRUE(cache_->GetSequence(id).ok()) << "life " << life << ": a durable sequence is gone";
      ASSERT_EQ(HashOf(id), hash) << "life " << life;
    }
    for (const SequenceInfo& info : cache_->ListSequences())
      ASSERT_EQ(durable.count(info.id), 1u) << "life " << life << ": a closed sequence is back";
    files_->DieAfter(static_cast<int>(dice() % 150));
    std::vector<std::unique_ptr<Client>> clients;
    for (int step = 0; step < 12 && !files_->dead(); step++) {
      switch (dice() % 4) {
        case 0:
        case 1: {
          clients.push_back(std::make_unique<Client>(
              *cache_, SmallModel(), WithPair(dice() % 2 == 0 ? "f16" : "q8_0/turbo4", {1, 1}), random_));
          const absl::Status status = clients.back()->Append(1 + static_cast<int64_t>(dice() % 250));
          const SequenceId id = clients.back()->id();
          const uint64_t hash = status.ok() ? HashOf(id) : 0;
          if (!status.ok() || !cache_->Persist({{id}}).ok()) {
            in_doubt_.insert({id, hash});
          } else {
            durable[id] = hash;
          }
          break;
        }
        case 2: {
          if (durable.empty()) break;
          const auto it = std::next(durable.begin(), static_cast<int64_t>(dice() % durable.size()));
          const SequenceId id = it->first;
          const uint64_t hash = it->second;
          durable.erase(it);
          if (!cache_->CloseSequence(id).ok()) in_doubt_.insert({id, hash});
          break;
        }
        default:
          cache_->EvictAll(static_cast<int>(1 + dice() % 2)).status().IgnoreError();
      }
    }
    cache_->CheckInvariants();
    // Whether what was under way has happened is settled by the next life.
    Restart(true);
    for (const auto& [id, hash] : in_doubt_)
      if (cache_->GetSequence(id).ok()) {
        EXPECT_EQ(HashOf(id), hash) << "life " << life;
        durable[id] = hash;
      }
    in_doubt_.clear();
  }
}

}  // namespace
}  // namespace kvtide::testing
