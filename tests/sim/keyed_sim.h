// A randomised simulation of the block store: its verbs in random order beside sequences that want the same
// room, over a disk, with copies and writes that fail, stops and crashes, reads that fail while it starts, a
// clock that jumps, and verbs that run inside of others wherever the cache has given up its mutex. In one
// thread, so that a seed repeats all of it.
//
// The naive model knows what was stored under each key. What a lookup counts must have been stored since the
// namespace was last deleted, and must load as these very bytes; what a lease holds must stay, and what is
// read where it lies must keep its bytes until it is given back, whatever becomes of its block; what was made
// durable must be there after a restart, if it was there before it and all could be read. What was in a
// remote tier when a namespace was deleted that could not be asked may be found again, and so may, after a
// restart, what a disk had that did not take the deletion; nothing else.
//
// In a world with ladders blocks of rows may lose bits where room is short: what loads is the stored rows,
// coded as the first, second, ... of the pairs, one after another, by the definition of the bytes. It never
// has more bits than the last time, unless it was stored or fetched once more, or came back from before a
// restart; none goes while a lease is held; and lookups and loads say which have fewer.
#pragma once

#include <map>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/daemon/cache/cache_fixture.h"
#include "tests/daemon/cache/fault_remote.h"

namespace kvtide::testing {

class KeyedSim : public CacheTest {
 protected:
  // One seed. False at the first thing that is wrong; then a test failure says what, where and how to repeat.
  struct World {
    bool remote = false;  // with a remote tier, which outlives restarts and is at times away, full, slow,
                          // forgetful and damaged
    bool read_faults = false;  // while it starts
    bool ladders = false;      // blocks of rows may be recoded for room
    // To prove that they are seen:
    bool lie = false;            // loads are compared with other bytes
    bool skips_rungs = false;    // the model codes rows as their last pair at once
    bool unseen_damage = false;  // the remote tier hands damaged bytes out as whole ones
  };
  bool Run(uint32_t seed, int64_t steps, World world);

 private:
  struct Space {
    NamespaceSpec spec;
    NamespaceId id = 0;
    bool open = false;
    std::set<int> stored;         // keys since it was last deleted everywhere
    std::map<int, size_t> rungs;  // of its keys, that they had when they were last seen; 0: the spec's pair
    int running = 0;              // stores
    uint64_t deletes = 0;
    bool on_disk = false;  // a deletion said that the disk may bring it again
  };
  struct Lease {
    LeaseId id = 0;
    size_t space = 0;
    uint64_t deletes = 0;
    int first = 0;
    uint64_t blocks = 0;
    absl::Time end;
    std::set<uint64_t> degraded;  // as the lookup said
  };
  // Blocks that are read where they lie.
  struct Held {
    PlacesId id = 0;
    std::vector<std::pair<int64_t, std::vector<std::byte>>> blocks;  // offset in the host tier, bytes
  };

  int Random(int below) { return static_cast<int>(dice_() % static_cast<uint32_t>(below)); }
  // What is stored under a key: the same bytes every time.
  std::vector<std::byte> Payload(size_t space, int first, uint64_t count) const;
  // What a key of rows loads as after so many rungs.
  const std::vector<std::byte>& AfterRung(size_t space, int key, size_t rung);
  // What was loaded is what may have become of the blocks by now.
  void CheckRows(const Lease& lease, uint64_t from, const LoadReport& report,
                 const std::vector<std::byte>& payload, bool remember);
  void ForgetRungs(size_t space, int first, int count);
  bool Holds(const Lease& lease) const;
  void Expect(bool good, const std::string& text);
  void Step(bool nested);
  void Inside();
  void Open(size_t space);
  void Store(size_t space, int first, int count);
  void Lookup(size_t space, int first, int count);
  void Load(size_t lease);
  // False: the load went well.
  bool LoadFailed(const Lease& lease, const absl::Status& status);
  void LoadInPlace(const Lease& lease, uint64_t from, uint64_t count, const std::vector<std::byte>& expected);
  // The bytes are still those; gives them back.
  void GiveBack(size_t held);
  void Release(size_t lease);
  void Delete(size_t space);
  void Persist(size_t space);
  // `exact`: the lists of durable blocks name no other ones.
  void RestartNow(bool read_faults, bool exact);
  void StartOverABadDisk(bool crash);
  void Crowd();
  uint64_t Hits(size_t space, int first, int count);

  uint32_t seed_ = 0;
  int64_t step_ = 0;
  bool failed_ = false, fault_ = false, lost_ = false;
  World world_;
  int depth_ = 0, budget_ = 0;
  std::mt19937 dice_;
  std::thread::id thread_;
  std::vector<Space> spaces_;
  std::vector<Lease> leases_;
  std::vector<Held> held_;
  std::map<std::pair<int, size_t>, std::vector<std::byte>> after_;  // by key and rung, of the space of rows
  std::vector<std::unique_ptr<Client>> sequences_;
  std::unique_ptr<RemoteStore> store_;
  std::unique_ptr<FaultRemote> remote_;  // null: none

 protected:
  uint64_t nested_ = 0, loaded_ = 0, in_place_ = 0, restarts_ = 0, fetched_ = 0, refused_starts_ = 0,
           degraded_ = 0;
  // What became of the last seed: equal runs have equal ones.
  std::string trail_;
};

}  // namespace kvtide::testing
