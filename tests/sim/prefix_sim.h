// A randomised simulation of prefixes: sequences of known tokens that begin with what others have left, grow,
// are cut, forked, parked, made durable and closed, of two tenants, over a disk, with copies and writes that
// fail, stops, crashes and deaths in the middle of a verb, a clock that jumps, and verbs that run inside of
// others wherever the cache has given up its mutex. In one thread, so that a seed repeats all of it.
//
// The naive model knows no memory: rows follow from the tokens before them, so a list of tokens says what a
// sequence has to hold, whoever has computed it. A lookup may only find what was computed by its tenant; what
// it finds has to be these rows; what a lease holds has to stay; what was durable when its sequence was
// closed has to be found after a restart.
#pragma once

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "tests/daemon/cache/fault_remote.h"
#include "tests/daemon/cache/token_client.h"

namespace kvtide::testing {

class PrefixSim : public CacheTest {
 protected:
  // One seed. False at the first thing that is wrong; then a test failure says what, where and how to repeat.
  // `lie`: rows are compared with those of other tokens, to prove that a difference is seen.
  // `remote`: with a remote tier, which outlives restarts, and is at times away, slow, full, forgetful and
  // wrong.
  bool Run(uint32_t seed, int64_t steps, bool lie = false, bool remote = false);

 private:
  struct Tenant {
    Identity identity;
    CallContext context;
    ModelId model = 0;
    std::set<Tokens> computed;  // full blocks from the first token on that some sequence has had
  };
  struct Client {
    size_t said = 0, durable_said = 0;  // first tokens whose ids the cache knows, at least; of `durable`
    SequenceId id = 0;
    size_t tenant = 0;
    Tokens tokens;
    std::optional<Tokens> durable;  // with these it is there after a restart; unset: not known, or not at all
    bool closed = false;
    bool may_lose = false;  // it began with blocks that may lie in the disk from before a restart
    int running = 0;        // calls on it
  };
  using ClientPtr = std::shared_ptr<Client>;
  struct Lease {
    LeaseId id = 0;
    size_t tenant = 0;
    Tokens tokens;  // that it holds
    absl::Time end;
  };

  int Random(int below) { return static_cast<int>(dice_() % static_cast<uint32_t>(below)); }
  void Expect(bool good, const std::string& text);
  void Step(bool nested);
  void Inside();
  // Tokens of `blocks` blocks; few ways to go on from each, so that sequences meet.
  Tokens Prompt(size_t tokens);
  std::vector<float> Rows(int layer, bool keys, const Tokens& tokens, size_t from) const;
  void Note(const Client& client);

  void Lookup(size_t tenant, const Tokens& tokens);
  void Create(size_t tenant, size_t lease);
  void Append(ClientPtr client, const Tokens& next, bool say);
  void Read(ClientPtr client);
  bool AreRows(const std::vector<float>& rows, const std::vector<float>& read, size_t row) const;
  void Truncate(ClientPtr client, int64_t tokens);
  void Fork(ClientPtr client);
  void Close(ClientPtr client);
  void Persist(ClientPtr client);
  void RestartNow();
  void Begin();
  bool Excused(const absl::Status& status, const Client* client) const;
  // A block of a prefix may have turned out to be another's since the cache was started.
  bool MayHaveLost() const { return restarted_ && cache_->Stats().lost_blocks > 0; }

  uint32_t seed_ = 0;
  int64_t step_ = 0;
  bool failed_ = false, lie_ = false, fault_ = false, lost_ = false, restarted_ = false;
  int depth_ = 0, budget_ = 0;
  std::unique_ptr<RemoteStore> store_;
  std::unique_ptr<FaultRemote> remote_;  // null: none
  std::mt19937 dice_;
  std::thread::id thread_;
  ModelSpec model_;
  SequenceOptions sequence_;
  std::vector<Tenant> tenants_;
  std::vector<ClientPtr> clients_;
  std::vector<Lease> leases_;
  std::set<SequenceId> gone_;  // closed ones

 protected:
  uint64_t nested_ = 0, reused_ = 0, restarts_ = 0, deaths_ = 0, fetched_ = 0, degraded_ = 0;
  // What became of the last seed: equal runs have equal ones.
  std::string trail_;
};

}  // namespace kvtide::testing
