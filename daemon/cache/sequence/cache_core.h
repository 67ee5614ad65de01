// What the parts of the cache share: limits, backends, one mutex, and the state that it guards. The state is
// reachable through a CacheLock only, so that a signature says what a function does with the mutex:
//
//   CacheState&   runs under the mutex and keeps it
//   CacheLock&    runs under the mutex and may give it up for a while (Unlocked, waits)
//   neither       runs without it
//
// What a caller relies on while the mutex is free is an object: a HeldBlock (the record stays), a
// WritingBlock (nobody else writes, moves or drops it), a PinnedPlace (the bytes stay), a WriterGuard
// (sequences.h; nobody else changes the tables). All of them are made and destroyed under the mutex.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "daemon/cache/block/block_store.h"
#include "daemon/cache/block/keyed_index.h"
#include "daemon/cache/block/unsent_blocks.h"
#include "daemon/cache/call/cache_options.h"
#include "daemon/cache/sequence/prefix_index.h"
#include "daemon/cache/sequence/sequences.h"
#include "daemon/cache/tier/measured_rates.h"
#include "kernels/base/lock_waits.h"
#include "kernels/base/mutex.h"

namespace kvtide {

// Counters of CacheStats that no part below counts itself.
struct Counters {
  uint64_t appended_tokens = 0, sealed_blocks = 0, failed_seals = 0, deferred_seals = 0;
  uint64_t copied_on_write_blocks = 0, window_freed_blocks = 0, evict_calls = 0, prefetch_calls = 0;
  uint64_t moves = 0, failed_moves = 0, moved_bytes = 0, dropped_blocks = 0;
  uint64_t compacted_blocks = 0, compacted_bytes = 0;
  std::vector<uint64_t> attended_bytes;                     // by tier
  std::vector<uint64_t> attended_in_place, promoted_first;  // by tier
  uint64_t attended_blocks = 0, attended_blocks_below_tier0 = 0, checksum_failures = 0, exhausted = 0;
  uint64_t keyed_hits = 0, keyed_misses = 0, keyed_stored = 0, keyed_present = 0, keyed_left_out = 0;
  uint64_t prefix_lookups = 0, prefix_miss_tokens = 0, prefix_reused_tokens = 0;
  uint64_t keyed_loaded = 0, keyed_loaded_bytes = 0, leases_granted = 0;
  uint64_t keyed_in_place = 0, keyed_in_place_bytes = 0;
  uint64_t keyed_held = 0, keyed_held_bytes = 0;  // gauges
  uint64_t remote_hits = 0, remote_misses = 0, remote_present = 0;
  uint64_t lost_blocks = 0, persist_calls = 0, persisted = 0, failed_persists = 0, persisted_bytes = 0;
  std::string persist_problem;  // of the last that failed

  // Something did not become durable, or would come back although it was given up. By whatever caller: those
  // in the background have nobody to tell.
  void FailPersist(const std::string& what, const absl::Status& status) {
    failed_persists++;
    persist_problem = absl::StrCat(what, ": ", status.message());
  }
};

struct CacheState {
  explicit CacheState(const CacheOptions& options)
      : limits(LiveLimitsOf(options)),
        tenants(&limits.quotas, options.tiers.size()),
        sequences(options, &limits, &store, &tenants) {}

  LiveLimits limits;
  TenantTable tenants;  // before those who count in it
  BlockStore store;
  Sequences sequences;
  KeyedIndex keyed{&store};
  PrefixIndex prefixes{&store};
  UnsentBlocks unsent;
  Counters counters;
  uint64_t durable_sequences = 0;
  int attends_running = 0;
  int moves_running = 0;  // rounds of copies
  CondVar changed;        // a move or an attend ended, blocks were freed, a sequence was closed
};

class CacheCore {
 public:
  explicit CacheCore(CacheOptions options);
  // Takes the memory of all tiers.
  absl::Status Start();

  const CacheOptions& options() const { return options_; }
  // The tier attends in place: it has a backend; else it has I/O.
  bool attends(int tier) const { return media_[static_cast<size_t>(tier)].backend != nullptr; }
  Backend& backend(int tier) const { return *media_[static_cast<size_t>(tier)].backend; }
  IoTier& io(int tier) const { return *media_[static_cast<size_t>(tier)].io; }
  // Where the place's bytes are; null in a tier of I/O. The place is pinned, or the mutex is held.
  std::byte* Data(const Place& place) const { return state_.store.Data(place); }
  size_t tiers() const { return media_.size(); }
  int homes() const { return homes_; }
  MeasuredRates& rates() const { return *rates_; }
  // How long calls have waited for the mutex.
  LockWaitStats lock_waits() const { return waits_.Stats(); }

 private:
  friend class CacheLock;
  friend class Unlocked;

  const CacheOptions options_;
  struct Medium {
    Backend* backend = nullptr;
    IoTier* io = nullptr;
  };
  std::vector<Medium> media_;  // by tier; fixed after Start
  int homes_ = 0;
  std::unique_ptr<MeasuredRates> rates_;
  Mutex mu_;
  LockWaits waits_;
  CacheState state_;
};

// Holds the mutex from construction to destruction, but for the Unlocked in between.
class CacheLock {
 public:
  explicit CacheLock(CacheCore& core) ABSL_NO_THREAD_SAFETY_ANALYSIS : core_(core) {
    core_.waits_.Lock(core_.mu_);
  }
  ~CacheLock() ABSL_NO_THREAD_SAFETY_ANALYSIS { core_.mu_.Unlock(); }
  CacheLock(const CacheLock&) = delete;
  CacheLock& operator=(const CacheLock&) = delete;

  CacheState& operator*() const { return core_.state_; }
  CacheState* operator->() const { return &core_.state_; }
  CacheCore& core() const { return core_; }

  // The mutex is free while these wait for CacheState::changed. They may return without a reason.
  void WaitForChange() ABSL_NO_THREAD_SAFETY_ANALYSIS { core_.state_.changed.Wait(core_.mu_); }
  void WaitForChange(absl::Duration time) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    core_.state_.changed.WaitFor(core_.mu_, absl::ToChronoNanoseconds(time));
  }
  // The same for a condition of the caller's own.
  void Wait(CondVar& condition, absl::Duration time) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    condition.WaitFor(core_.mu_, absl::ToChronoNanoseconds(time));
  }

 private:
  friend class Unlocked;
  CacheCore& core_;
};

// The mutex is free from construction to destruction, however the scope is left.
class Unlocked {
 public:
  explicit Unlocked(CacheLock& lock) ABSL_NO_THREAD_SAFETY_ANALYSIS : core_(lock.core_) {
    core_.mu_.Unlock();
  }
  ~Unlocked() ABSL_NO_THREAD_SAFETY_ANALYSIS { core_.waits_.Lock(core_.mu_); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  CacheCore& core_;
};

// Which memory the calls of a backend work on, for messages: "tier 'device' on cuda:1".
std::string TierText(const CacheOptions& options, size_t tier);

}  // namespace kvtide
