// How the messages of the API reach the handlers that serve them. The client makes the messages; a carrier
// takes one there and brings the answer back. Where both ends see the same memory, tensors lie there and
// messages name their places.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/cpp/host_tier.h"
#include "kvtide/v1/kv_cache_service.pb.h"

namespace kvtide::client {

// Memory that client and daemon both see. Thread-safe.
class SharedMemory {
 public:
  virtual ~SharedMemory() = default;
  // The place of bytes that lie there already; none: they do not.
  virtual std::optional<uint64_t> PlaceOf(const void* data, size_t bytes) const = 0;
  // ResourceExhausted with the numbers when there is no room.
  virtual absl::StatusOr<std::byte*> Allocate(size_t bytes) = 0;
  virtual void Free(std::byte* data) = 0;
};

// Memory of this process. Places are addresses.
std::unique_ptr<SharedMemory> MakeProcessMemory();

// Memory of the pool's first tier on one device, which this process reads and writes itself.
struct PoolSlab {
  std::string tier, device;  // as TierInfo names them
  std::byte* data = nullptr;
  uint64_t bytes = 0;
};

class Carrier {
 public:
  virtual ~Carrier() = default;
  // Thread-safe. An error that the handler reports is returned as a status. `request` may be changed.
  virtual absl::Status Call(v1::SessionRequest* request, v1::SessionResponse* response) = 0;
  // Null: tensors travel in the messages.
  virtual SharedMemory* memory() { return nullptr; }
  // Empty: the pool is not mapped.
  virtual std::span<const PoolSlab> pool() const { return {}; }
  // Empty: this process reads none.
  virtual HostTier host_tier() const { return {}; }
  // From now on it is empty.
  virtual void DropHostTier() {}
  // False: the other end has gone, and every later call is Unavailable. Not known of all ways.
  virtual bool connected() const { return true; }
};

}  // namespace kvtide::client
