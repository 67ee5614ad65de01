// A tier that lies beyond pointers: its blocks are read and written by I/O and never attended in place. What
// comes back is known for what it is: every block has a label beside its bytes, and a read whose label or
// checksum is not the expected one is DataLoss, never another block's bytes.
//
// Space belongs to the cache (BlockStore hands out extents of the tier); what lies in it to the tier. Calls
// may come from several threads at once.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "kernels/base/cancellation.h"

namespace kvtide {

// What an extent holds. Written beside the bytes, and compared when they are read.
struct BlockLabel {
  enum class Kind : uint32_t { kBlock = 1, kManifest = 2 };
  Kind kind = Kind::kBlock;
  uint64_t write_id = 0;  // names these very bytes: given by NextWriteId, never used again
  uint64_t bytes = 0;     // without the label
  uint64_t checksum = 0;  // XXH3 of them; Run sets it when it writes
  // Whose they are.
  uint64_t model_hash = 0;       // of the model's name and geometry
  uint64_t sequence = 0;         // that wrote them; forks share the block
  uint64_t name_space_hash = 0;  // XXH3 of the namespace
  uint64_t tenant = 0;           // 0 = none
  int32_t group = 0;
  int64_t index = 0;                // block number; version of a manifest
  std::array<uint64_t, 2> chain{};  // prefix identity: chained hash of the token ids; 0 = not known
  // How to read them.
  std::string k_type, v_type;  // names, at most 15 bytes
  int32_t codec_version_k = 0, codec_version_v = 0;
  uint64_t profile_hash = 0;
  uint64_t layout_hash = 0;  // of the order of bytes in the block

  bool operator==(const BlockLabel&) const = default;
};

// Bytes on their way between memory and an extent.
struct IoJob {
  bool write = false;
  size_t offset = 0;  // of the extent
  // Written beside the bytes; Run sets its checksum. For a read: what must be found (checksum 0: any).
  BlockLabel label;
  // Moves bytes [at, at + piece.size()) between the block's memory and `piece`, which is in host memory: into
  // the piece for a write, out of it for a read. Called in order, never for two pieces at a time.
  std::function<absl::Status(size_t at, std::span<std::byte> piece)> copy;
  bool label_only = false;  // a read that looks at the label and no further; `copy` is not called
  const Cancellation* cancellation = nullptr;  // looked at between pieces
  // The end of it. A write: ResourceExhausted when the disk is full. A read: DataLoss when the label, the
  // bytes or the device say that the block is not there any more. Cancelled.
  absl::Status status;
};

struct IoTierStats {
  uint64_t read_bytes = 0, written_bytes = 0, syncs = 0;
  uint64_t reads = 0, writes = 0;  // extents
  uint64_t read_errors = 0, write_errors = 0, sync_errors = 0;
  uint64_t checksum_errors = 0;  // labels or bytes that were not those expected
  // At the start: keys of the index whose newest value could not be read, lost or with an older one that
  // counts.
  uint64_t manifest_errors = 0;
  bool encrypted = false;  // what lies there cannot be read without a key
  bool writable = true;
  std::string problem;  // the last error while it is not writable; empty: none
};

class IoTier {
 public:
  virtual ~IoTier() = default;
  virtual std::string name() const = 0;  // "disk:/var/lib/kvtide"
  virtual size_t capacity_bytes() const = 0;
  // What a block of so many bytes takes, label and rounding included; extents are multiples of it.
  virtual size_t ExtentBytes(size_t bytes) const = 0;
  virtual uint64_t NextWriteId() = 0;
  // All jobs side by side; returns when none runs any more, however some have ended.
  virtual void Run(std::span<IoJob> jobs) = 0;
  // False after a write has failed (a full disk, a broken one), for a while: then it is tried again.
  virtual bool Writable() const = 0;
  virtual IoTierStats Stats() const = 0;
};

// What a tier still knows after a restart: a value for each key, beside the extents that were written. A
// value (a manifest: manifest.h) names the extents that belong to it.
class DurableIndex {
 public:
  virtual ~DurableIndex() = default;
  // What is there; `lost` gets one line for each value that was there and cannot be read any more, whether an
  // older one of its key counts now or none.
  virtual std::map<uint64_t, std::string> Load(std::vector<std::string>* lost) = 0;
  // Everything that Run has written before is durable, then the value of the key, when this returns OK: its
  // former one names nothing any more then. After an error either of them may be there at the next start, and
  // what both name must stay until a later Put or Erase of the key has succeeded.
  // ResourceExhausted when there is no room for the value.
  virtual absl::Status Put(uint64_t key, const std::string& value) = 0;
  // The keys are gone. After an error they may be there at the next start.
  virtual absl::Status Erase(std::span<const uint64_t> keys) = 0;
};

}  // namespace kvtide
