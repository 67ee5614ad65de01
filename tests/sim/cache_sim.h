// A randomised simulation of the cache: every verb in random order, with small tiers, planted faults of the
// backends, copies that come late and a clock that jumps. Verbs also run from inside other verbs: wherever a
// call has given up the cache's mutex (the entry of every backend call) the simulation may execute others, up
// to kDepth deep, in one thread and so the same way for the same seed.
//
// Every attention is compared with a naive model that knows no memory; every error must be one that the
// situation explains (Excused); the invariants are checked after every step and inside of calls. A block may
// be exact that the model has coded if the cache says that its last append found no room to code it, where
// room can be short, and then until the next append (Settle). Blocks that the cache has recoded for room are
// recoded in the model between calls; what a call sees that recodes on its way is compared coarsely
// (Tolerance).
#pragma once

#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/daemon/cache/cache_fixture.h"
#include "tests/daemon/cache/step_layer.h"
#include "tests/sim/sim_client.h"

namespace kvtide::testing {

class CacheSim : public CacheTest {
 protected:
  enum class World {
    kPressure,  // small device, all pairs; verbs one after another
    kTight,     // both tiers small, verbs inside others
    kRoomy,     // room for all, low watermarks: moves by policy and on request, all pairs
    kDisk,  // small memories over a disk that fails to write now and then, calls that persist; f16 or coded
            // at once
  };

  // One seed. False at the first thing that is wrong; then a test failure says what, where and how to repeat.
  bool Run(World world, uint32_t seed, int64_t steps, FaultyBackend::Defect defect = {});

 private:
  using ClientPtr = std::shared_ptr<SimClient>;
  static constexpr size_t kDepth = 3;

  // A running call.
  struct Frame {
    const char* verb = "";
    ClientPtr client;         // the one that it works on; null: several
    bool moves_only = false;  // its plan is older than what is appended while it runs
    bool evicts = false;
    uint64_t first_new = 0;  // clients from this serial on were opened while it ran
    // At its start:
    bool written = false, read = false, copying = false;
    uint64_t deferred_seals = 0;
    uint64_t drops = 0;     // of the whole cache
    bool lost = false;      // the client has dropped blocks
    uint64_t degraded = 0;  // blocks of the whole cache that were recoded
    Cancellation cancellation;
    CallContext context;
  };
  class Scope;

  int Random(int below) { return static_cast<int>(dice_() % static_cast<uint32_t>(below)); }
  template <class First, class... Others>
  First Any(First first, Others... others) {
    const First list[] = {first, others...};
    return list[static_cast<size_t>(Random(1 + sizeof...(others)))];
  }
  const ClientPtr& AnyClient() {
    return clients_[static_cast<size_t>(Random(static_cast<int>(clients_.size())))];
  }
  std::vector<FaultyBackend*> Backends() const;
  std::vector<FaultyBackend*> TierBackends() const;
  SequenceInfo Info(const SimClient& client) const { return cache_->GetSequence(client.id).value(); }

  void Step();
  void Inside(FaultyBackend::Call call);
  void Nested();

  void Open();
  void Append(ClientPtr client, int64_t tokens);
  bool AppendAttend(ClientPtr client, int layer, int64_t tokens);
  void DecodeStep(ClientPtr client, int64_t tokens);
  void StepOf(ClientPtr client, int64_t tokens);
  void EngineStep(const std::vector<ClientPtr>& clients, int64_t tokens);
  bool RunLayer(const kvtide::Step& step, size_t item, SimClient& client, const NewRows& rows,
                double tolerance);
  void Attend(ClientPtr client);
  void AttendLayer(ClientPtr client, int layer, int64_t queries, bool sinks);
  void Read(ClientPtr client);
  void Truncate(ClientPtr client, int64_t tokens);
  void Fork(ClientPtr client);
  void Close(ClientPtr client);
  void Evict(ClientPtr client, int tier);
  void EvictAll(int tier);
  void Prefetch(ClientPtr client);
  void RunMoves();
  void SetPriority(ClientPtr client);
  void Persist(ClientPtr client);
  void Cancel();

  int64_t RandomCut(const SimClient& client);
  void PlantFault(std::initializer_list<FaultyBackend::Call> calls);
  void ClearFaults();
  bool MayHaveLost(const Frame& frame) const;
  uint64_t Degraded() const;
  void Degrade(SimClient& client) const;
  double Tolerance(const SimClient& client, const Frame& frame) const;
  bool Excused(const absl::Status& status, const Frame& frame) const;
  void Judge(const absl::Status& status, const Frame& frame);
  void JudgeLength(const SimClient& client);
  void JudgeFresh(const Frame& frame);
  void JudgeBytes();
  void Settle(SimClient& client, const Frame& frame);
  void Expect(bool good, const std::function<std::string()>& text);
  std::string Where() const;

  World world_ = World::kPressure;
  uint32_t seed_ = 0;
  int64_t step_ = 0;
  bool failed_ = false;
  bool fault_ = false;  // planted in the call that runs
  std::mt19937 dice_;
  std::thread::id thread_;
  std::vector<ClientPtr> clients_;
  std::vector<Frame*> frames_;  // running calls, the outermost first
  uint64_t opened_ = 0;
  int copying_ = 0;  // hooks of copies that we are in: blocks may be moving
  int budget_ = 0;   // of nested verbs in this step
  std::shared_ptr<const ModelSpec> small_ = std::make_shared<const ModelSpec>(WithMeans(SmallModel()));
  std::shared_ptr<const ModelSpec> mixed_ = std::make_shared<const ModelSpec>(WithMeans(MixedModel()));

 protected:
  uint64_t nested_ = 0;                   // verbs that ran inside others
  uint64_t deferred_ = 0;                 // seals
  uint64_t degraded_ = 0;                 // blocks
  uint64_t in_place_ = 0, promoted_ = 0;  // attentions over blocks of lower tiers
  // What became of the last seed: equal runs have equal ones.
  std::string trail_;
};

}  // namespace kvtide::testing
