// A cache of its own beside others that share a remote tier: a device and a host tier over CPU backends, a
// clock that stands still.
#pragma once

#include <memory>

#include "absl/time/time.h"
#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {

struct CacheNode {
  explicit CacheNode(RemoteTier* remote, size_t device_bytes = 64 * 65536, size_t host_bytes = 64 * 65536,
                     const std::function<void(CacheOptions&)>& change = {});
  ~CacheNode();
  // Every block that waits is offered to the remote tier.
  void WriteAll() { cache->RunMovesOnce(); }
  RemoteStats remote_stats() const { return cache->Stats().remote.value(); }

  FakeClock clock;
  std::unique_ptr<FaultyBackend> device, host;
  CacheOptions options;
  std::unique_ptr<KvCache> cache;
};

}  // namespace kvtide::testing
