// What the cache does with a remote tier (remote_tier.h): blocks that others can find are written there as
// soon as they are found here, or when they are about to be dropped (RemoteWrites), by a thread of its own;
// lookups that miss fetch what is there into the tiers, before they answer. Neither holds the mutex, or a
// place, while the network is asked.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "daemon/cache/call/call_context.h"
#include "daemon/cache/move/room_maker.h"
#include "daemon/cache/sequence/cache_core.h"
#include "kernels/base/cancellation.h"

namespace kvtide {

class RemoteExchange {
 public:
  explicit RemoteExchange(CacheCore& core) : core_(core), room_(core) {}

  // From now on blocks are queued to be written; with background_moves a thread writes them.
  void Start();
  void Stop();
  // One batch of the queue. False if there is nothing to do now.
  bool WriteOnce();

  // Blocks that were fetched: they are not dropped while this lives. Made and destroyed under the mutex.
  class Fetched {
   public:
    Fetched() = default;
    Fetched(Fetched&&) = default;
    Fetched& operator=(Fetched&&) = default;
    ~Fetched();
    void Add(BlockStore& store, Block* block);

   private:
    std::vector<HeldBlock> blocks_;
  };
  // Blocks of the prefix that are not on this device are brought in, as far as they make it longer. `like` is
  // of no sequence.
  Fetched FetchPrefix(CacheLock& lock, Sequence& like, std::span<const BlockKey> keys,
                      const CallContext& context);
  // The same for a namespace: blocks from the first key on.
  Fetched FetchKeyed(CacheLock& lock, const NamespacePtr& space, std::span<const BlockKey> keys,
                     const CallContext& context);
  // The namespace is deleted under the mutex: nobody here asks the tier for blocks of that name, or writes
  // some, before Erase, which the caller owes, has ended: one of the same name may be open again by then.
  void BeginErase(CacheLock& lock, const KeyedNamespace& space);
  // Nothing of the namespace is found there any more. A write of it that is under way is erased when it has
  // ended; until then, and while that fails, nobody here asks the tier for blocks of that name.
  absl::Status Erase(const KeyedNamespace& space, const CallContext& context);

  RemoteStats Stats(const CacheState& state) const;

 private:
  struct Want;
  struct Outgoing;

  RemoteTier* tier() const { return core_.options().remote; }
  RemoteWrites writes() const { return core_.options().remote_writes; }
  void Offer(CacheState& state) const;
  // Spaces that a write came to after their deletion: again, until the tier has done it.
  void EraseLeftovers();
  bool IsBeingErased(const std::string& space) const {
    return erasing_.contains(space) || unerased_.contains(space);
  }
  void Run();
  WritingBlock Allocate(CacheLock& lock, const Want& want, size_t want_bytes);
  absl::Duration TimeLeft(const CallContext& context, absl::Time end) const;
  // Brings in what is wanted, in its order, until one is missing. `enter` gives a block that came its name;
  // false: not wanted any more.
  template <class Enter>
  void Fetch(CacheLock& lock, const std::string& space, std::span<Want> wants, const CallContext& context,
             absl::Time end, Fetched* fetched, const Enter& enter);

  CacheCore& core_;
  RoomMaker room_;
  std::thread thread_;
  // Under the mutex, by name: blocks of namespaces in a write that runs, deletions that run, and spaces that
  // are to be erased because a write came too late, with the number of the note that says so.
  std::map<std::string, int> writing_, erasing_;
  std::map<std::string, uint64_t> unerased_;
  uint64_t notes_ = 0;
  Cancellation stopping_;  // ends a write that runs
};

}  // namespace kvtide
