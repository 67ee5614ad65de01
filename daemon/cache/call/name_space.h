// A namespace of the block store: what its blocks are, and what their keys are unique in. Namespaces that
// differ in any field share nothing.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "daemon/cache/call/page_layout.h"
#include "kernels/format/block_layout.h"

namespace kvtide {

using NamespaceId = uint64_t;  // a hash of all of it, never 0: the same after a restart
using LeaseId = uint64_t;      // of blocks that will be loaded: random, never 0

// Rows of K and V, stored in a pair. Rows (layer 0 token 0, layer 0 token 1, ...) are cut into pages of 64,
// so that blocks of any number of tokens lie in a BlockLayout whose layers are pages; with 64 tokens in a
// block a page is a layer.
struct TensorContent {
  int layers = 0;
  int kv_heads = 0;
  int head_dim_k = 0, head_dim_v = 0;
  CachePair pair;
  bool operator==(const TensorContent&) const = default;
};

struct OpaqueContent {
  uint64_t block_bytes = 0;
  std::string encoding;  // what the bytes are: any text up to 256 bytes
  bool operator==(const OpaqueContent&) const = default;
};

struct NamespaceSpec {
  std::string model;     // fingerprint of what computes the blocks, 1 to 256 bytes
  int block_tokens = 0;  // 1 to 4096
  // One of both.
  std::optional<TensorContent> tensors;
  std::optional<OpaqueContent> opaque;
  std::string salt;    // up to 256 bytes
  std::string tenant;  // of the caller
  // What blocks of tensors may be recoded as when their tier needs room, as SequenceOptions::degrade says;
  // f16 ones, too. Part of the identity: whoever opens the namespace knows what loads may give. Empty: never.
  std::vector<CachePair> degrade;
  bool operator==(const NamespaceSpec&) const = default;

  PageShape pages() const {
    return {tensors->layers, block_tokens, tensors->kv_heads, tensors->head_dim_k, tensors->head_dim_v};
  }
  // Rows of one head of a block, and the shape of the pages that they fill.
  int rows() const { return tensors->layers * block_tokens; }
  GroupShape stored_shape() const {
    return {(rows() + kBlockTokens - 1) / kBlockTokens, tensors->kv_heads, tensors->head_dim_k,
            tensors->head_dim_v};
  }
};

// InvalidArgument that names the field and the limit.
absl::Status CheckNamespaceSpec(const NamespaceSpec& spec);

// Codec versions and the order of bytes belong to it: what another build stored in another way is another
// namespace.
NamespaceId HashNamespaceSpec(const NamespaceSpec& spec);

}  // namespace kvtide
