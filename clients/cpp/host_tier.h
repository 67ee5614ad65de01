// The tier of host memory of a pool, as a client reads it itself: that of an embedded pool, or that of a
// daemon which shares it (kvtided --host-sharing). It stays mapped for as long as an object names it. That
// keeps its memory taken, too, when the daemon has ended: whoever waits with one looks whether the daemon is
// still there (Pool::connected) and lets go.
#pragma once

#include <cstddef>
#include <memory>
#include <span>

namespace kvtide::client {

struct HostTier {
  std::span<const std::byte> bytes;     // empty: this client reads none
  std::shared_ptr<const void> mapping;  // null: the pool's own memory
  bool empty() const { return bytes.empty(); }
};

}  // namespace kvtide::client
