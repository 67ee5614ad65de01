#include "tests/daemon/cache/cache_node.h"

#include <atomic>

namespace kvtide::testing {

CacheNode::CacheNode(RemoteTier* remote, size_t device_bytes, size_t host_bytes,
                     const std::function<void(CacheOptions&)>& change) {
  static std::atomic<uint64_t> nodes{100};
  CpuBackendOptions cpu;
  cpu.threads = 1;
  cpu.huge_pages = false;
  device = std::make_unique<FaultyBackend>(MakeCpuBackend(cpu));
  cpu.name = "host";
  host = std::make_unique<FaultyBackend>(MakeCpuBackend(cpu));
  options.background_moves = false;
  options.clock = clock.function();
  options.id_seed = ++nodes;  // ids are never those of another node
  options.move_piece_bytes = 10'000;
  options.tiers.push_back({"device", device.get(), device_bytes, false});
  options.tiers.push_back({"host", host.get(), host_bytes, true});
  options.remote = remote;
  if (change) change(options);
  absl::StatusOr<std::unique_ptr<KvCache>> made = KvCache::Create(options);
  EXPECT_TRUE(made.ok()) << made.status();
  cache = *std::move(made);
}

CacheNode::~CacheNode() { cache->CheckInvariants(); }

}  // namespace kvtide::testing
