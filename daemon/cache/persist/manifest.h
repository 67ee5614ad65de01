// A manifest: all that has to be known of a sequence to have it again after a restart, beside the bytes of
// its blocks. It names its blocks by where they lie and by their write id, so that a block that was
// overwritten is never taken for them. Plain data with a form in bytes; the tier keeps those (DurableIndex).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/cache/sequence/sequence.h"

namespace kvtide {

// 40 bytes for each block.
struct ManifestBlock {
  uint64_t offset = 0, write_id = 0, checksum = 0;
  uint64_t writer = 0;   // the sequence that wrote it
  int32_t profile = -1;  // index into ManifestGroup::profiles
  // What it is stored as: f16, the pair, or one of ManifestGroup::rungs.
  static constexpr uint32_t kCoded = 0, kExact = 1, kRungs = 2;
  uint32_t form = kCoded;  // kRungs + i: rungs[i]
};

// What blocks may have been recoded as.
struct ManifestRung {
  std::string pair;
  int32_t codec_version_k = 0, codec_version_v = 0;
  uint64_t layout = 0;  // HashLayout
  bool operator==(const ManifestRung&) const = default;
};

struct ManifestGroup {
  std::string pair;
  int32_t codec_version_k = 0, codec_version_v = 0;
  uint64_t exact_layout = 0, coded_layout = 0;  // HashLayout
  int64_t first_block = 0, sealed = 0;
  std::vector<LayerProgress> layers;
  int32_t profile = -1;  // of blocks that are coded from now on
  std::vector<std::shared_ptr<const Profile>> profiles;
  std::vector<ManifestRung> rungs;
  std::vector<ManifestBlock> blocks;
};

struct Manifest {
  SequenceId id = 0, forked_from = 0;
  int64_t created_unix_nanos = 0;
  std::string device;  // where it lived
  ModelSpec model;
  std::string model_tenant;     // who has registered it
  uint64_t model_revision = 0;  // ModelState::revision
  SequenceOptions options;
  std::vector<ManifestGroup> groups;
  // The sequence was closed; its sealed blocks are a cached prefix (PrefixRun of prefix_index.h), and some
  // may have been dropped later.
  bool closed = false;
  int64_t written_unix_nanos = 0;  // closed: of two that name the same place the later one is right
  // What is known of its tokens (token_chain.h); none: nothing.
  uint64_t chain_seed = 0;
  std::vector<BlockKey> chain_keys;
  std::vector<TokenId> chain_rest;
};

// Whether it is of a closed sequence, and when it was written, at a glance.
bool IsClosedManifest(const std::string& bytes, int64_t* written_unix_nanos);
std::string EncodeManifest(const Manifest& manifest);
// DataLoss for anything that EncodeManifest has not written; FailedPrecondition for another version of it,
// and for a type that this build does not know.
absl::StatusOr<Manifest> DecodeManifest(const std::string& bytes);

// A profile by itself. One that has transforms is the model's: only its hash is kept.
std::string EncodeProfile(const Profile& profile);
// DataLoss for anything else than a whole profile of the group's shape.
absl::StatusOr<std::shared_ptr<const Profile>> DecodeProfile(const std::string& bytes,
                                                             const LayerGroupSpec& group);

}  // namespace kvtide
