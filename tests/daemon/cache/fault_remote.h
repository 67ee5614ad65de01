// A test fake: a remote tier in memory that several caches share, and that is away, full, slow, forgetful or
// wrong as a test says. Thread-safe.
#pragma once

#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "daemon/cache/tier/remote_tier.h"

namespace kvtide::testing {

// What lies in the store; outlives the tiers over it.
struct RemoteStore {
  struct Value {
    BlockLabel label;
    std::vector<std::byte> bytes;
  };
  std::mutex mu;
  std::map<std::pair<std::string, std::string>, Value> values;  // by space and name
};

class FaultRemote : public RemoteTier {
 public:
  explicit FaultRemote(RemoteStore* store) : store_(store) {}

  // Lost and damaged are the third block of a Read, the seventh, and so on. A broken tier, which damages
  // blocks and does not notice, is for proofs that others do.
  enum class Fault { kNone, kAway, kFull, kLosesAfterFind, kDamages, kDamagesUnseen };
  void Plant(Fault fault) { fault_ = fault; }
  // Runs at the entry of every call but Stats, on the calling thread, where the cache has given up its mutex.
  void SetHook(std::function<void(const char* call)> hook) { hook_ = std::move(hook); }
  int calls() const { return calls_; }

  std::string name() const override { return "memory"; }
  std::vector<std::optional<BlockLabel>> Find(const std::string& space, std::span<const RemoteName> names,
                                              const RemoteLimit& limit) override;
  void Read(const std::string& space, std::span<RemoteJob> jobs, const RemoteLimit& limit) override;
  void Write(const std::string& space, std::span<RemoteJob> jobs, const RemoteLimit& limit) override;
  absl::Status Erase(const std::string& space, const RemoteLimit& limit) override;
  bool Writable() const override { return fault_ != Fault::kAway; }
  RemoteStats Stats() const override { return stats_; }

 private:
  void Enter(const char* call);

  RemoteStore* const store_;
  Fault fault_ = Fault::kNone;
  std::function<void(const char*)> hook_;
  int calls_ = 0;
  RemoteStats stats_;
};

}  // namespace kvtide::testing
