// What has to be known of blocks that are found by key to find them again after a restart: their namespace,
// and for each its key, where it lies and by which write id. Blocks of a namespace are divided into shards,
// each a value of the durable index, so that a change costs one of them.
//
// A shard may name blocks that were dropped after it was written, and whose place others have: a label with
// another write id tells (CheckLabels of keyed_store.cc).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/cache/block/keyed_index.h"
#include "daemon/cache/tier/block_id.h"

namespace kvtide {

constexpr size_t kMostShardBlocks = 1024;

// 41 bytes for each block, 40 in version 1.
struct KeyedManifestBlock {
  BlockKey key;
  uint64_t offset = 0, write_id = 0, checksum = 0;
  // What it is coded as: 0 = the namespace's pair, else the degrade[rung - 1] of its spec.
  uint8_t rung = 0;
};

struct KeyedManifest {
  int64_t written_at = 0;  // nanoseconds, for the order
  NamespaceId id = 0;
  NamespaceSpec spec;
  Persistence persistence = Persistence::kNone;
  std::vector<KeyedManifestBlock> blocks;
};

std::string EncodeKeyedManifest(const KeyedManifest& manifest);
// DataLoss for anything that EncodeKeyedManifest has not written; FailedPrecondition for another version of
// it, and for what this build stores in another way.
absl::StatusOr<KeyedManifest> DecodeKeyedManifest(const std::string& bytes);
// Not a sequence's.
bool IsKeyedManifest(const std::string& bytes);
int64_t WrittenAt(const std::string& bytes);

}  // namespace kvtide
