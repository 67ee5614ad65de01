// A Pool keeps keys and values of sequences in compressed blocks. The verbs are those of kvtide.v1 with the
// plain structs of client.h; how a pool is reached is its way:
//
//   embedded       the pool lives in this process; tensors are read and written where the caller has them
//   direct         as shared memory, and the daemon's first tier is mapped into this process: engines attend
//   over it with
//                  kernels of their own (direct_attention.h)
//   shared memory  a kvtided on this host: requests through a ring, tensors in an arena that both ends map
//   gRPC           a kvtided anywhere: tensors travel in messages
//
// All ways check the same things and say the same of what is wrong, and equal calls give equal bits on equal
// devices, so a caller changes the way by changing an address. Calls block and may come from any number of
// threads; tensors are borrowed for the call. On a way with a session (shared memory always, gRPC with
// ClientOptions::session) calls of several threads go one after the other, and the sequences that were made
// on it are closed when the Pool is destroyed or its process dies.
//
// Errors are those that client.h and kv_cache_service.proto name. UNAVAILABLE besides: the daemon is gone, or
// was restarted; sequences have gone with it, and a new Pool has to be connected.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "clients/cpp/client.h"
#include "clients/cpp/host_tier.h"

namespace kvtide::client {

class SharedMemory;

enum class Way : uint8_t { kEmbedded, kSharedMemory, kGrpc, kDirect };
// "embedded", "shared memory", "gRPC", "direct".
const char* WayName(Way way);

struct PoolOptions {
  // Of the ways to a daemon.
  ClientOptions client{.session = true};
  // Of the embedded way: a configuration of kvtided as JSON (kvtide/v1/kvtided_config.proto); fields about
  // serving have no effect. Empty = kvtided's defaults. With `disk`, sequences that are durable (Persist) are
  // there again in the next pool over that folder.
  std::string embedded_config;
  // Of the shared-memory way: the size of the arena, which holds the tensors of one call and all that
  // Allocate gave. Pages that were never used cost nothing.
  int64_t arena_bytes = int64_t{64} << 20;
  // How long a caller looks for its answer before it sleeps.
  absl::Duration poll = absl::Microseconds(50);
  // Where the engine computes by itself, with DirectAttention: "cuda:0", "cuda:GPU-...", "cpu". Empty: it
  // does not, and "auto" leaves the direct way out.
  std::string direct_device;
  int direct_threads = 0;  // of "cpu"; 0 = one for each processor
  // Of the shared-memory way: maps the daemon's tier of host memory, for reading, where it is allowed
  // (kvtided --host-sharing), so that blocks may be loaded from where they lie (host_tier.h, page_load.h).
  bool host_tier = false;
};

// Memory for tensors, at a multiple of 64. It must not outlive its Pool.
class TensorBuffer {
 public:
  TensorBuffer() = default;
  // Takes what `memory`, which is borrowed, has allocated.
  TensorBuffer(SharedMemory* memory, std::byte* data, size_t bytes)
      : memory_(memory), data_(data), bytes_(bytes) {}
  TensorBuffer(TensorBuffer&& other) noexcept;
  TensorBuffer& operator=(TensorBuffer&& other) noexcept;
  ~TensorBuffer();

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // As elements; T is float or uint16_t.
  template <class T>
  std::span<T> As() const {
    return {reinterpret_cast<T*>(data_), bytes_ / sizeof(T)};
  }

 private:
  SharedMemory* memory_ = nullptr;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

class Pool : public Client {
 public:
  // `address` is one of
  //   auto                  the daemon of $KVTIDE_ADDRESS, else the one at the default socket
  //   (DefaultAddress),
  //                         by the best way that works; embedded where neither is
  //   auto:ADDRESS          the daemon at ADDRESS, by the best way that works
  //   embedded              a pool of this process
  //   direct:unix:/path     a daemon of this host, whose first tier is mapped (direct_device)
  //   shm:unix:/path        a daemon of this host, through shared memory (shm:auto: the one that "auto" asks)
  //   unix:/path, host:port a daemon, over gRPC
  // InvalidArgument for anything else; else why the way does not work.
  static absl::StatusOr<std::unique_ptr<Pool>> Connect(const std::string& address,
                                                       const PoolOptions& options = {});
  ~Pool();

  Way way() const { return way_; }
  // Why this way: "asked for", or what "auto" found.
  const std::string& why() const { return why_; }

  // Empty: none is mapped. DropHostTier gives it up for good, once nothing is loaded from it any more.
  HostTier host_tier() const;
  void DropHostTier();
  // False: the daemon has gone, and a new Pool has to be connected. Known by shared memory without a call; by
  // gRPC a call says so.
  bool connected() const;

  // Memory that tensors are taken from and written to without a copy; what lies elsewhere is copied once on
  // the shared-memory way. ResourceExhausted when the arena is full.
  absl::StatusOr<TensorBuffer> Allocate(size_t bytes);

 private:
  friend class DirectAttention;
  Pool(std::unique_ptr<Impl> impl, Way way, std::string why);

  const Way way_;
  const std::string why_;
  const std::unique_ptr<SharedMemory> own_memory_;  // of a way that shares none
};

}  // namespace kvtide::client

namespace kvtide {
using client::Pool;
}  // namespace kvtide
