#include "planner/engines/vllm.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status.h"

namespace kvtide::planner {
namespace {

constexpr int kLatentFp8Bytes = 656;  // fp8_ds_mla: 512 fp8 + 4 f32 scales + 64 bf16

struct Dtype {
  const char* k;
  const char* v;
  const char* flag;
  int k_bits;  // per value
  int v_bits;
  int k_head_bytes;  // scales per token and head
  int v_head_bytes;
};

constexpr Dtype kDtypes[] = {
    {"f16", "f16", "auto", 16, 16, 0, 0},
    {"bf16", "bf16", "auto", 16, 16, 0, 0},
    {"fp8", "fp8", "fp8", 8, 8, 0, 0},
    {"int8", "int8", "int8_per_token_head", 8, 8, 4, 4},
    {"fp8", "tq4", "turboquant_k8v4", 8, 4, 0, 4},
    {"tq4", "tq4", "turboquant_4bit_nc", 4, 4, 2, 4},
    {"tq3", "tq4", "turboquant_k3v4_nc", 3, 4, 2, 4},
    {"tq3", "tq3", "turboquant_3bit_nc", 3, 3, 2, 4},
};

const Dtype* FindDtype(const TypePair& pair) {
  for (const Dtype& dtype : kDtypes) {
    if (pair.k == dtype.k && (pair.v == dtype.v || (pair.v == "none" && std::string(dtype.k) == dtype.v)))
      return &dtype;
  }
  return nullptr;
}

int64_t HeadBytes(int bits, int head_dim, int extra) { return CeilDiv(int64_t{bits} * head_dim, 8) + extra; }

// Bytes of one token in one layer, K and V.
struct TokenBytes {
  int64_t k = 0;
  int64_t v = 0;
};

// `sparse`: the model has an indexer, and with it a record of its own for fp8 latents (fp8_ds_mla). Latents
// of dense models are plain: 576 values of one byte with fp8 (vllm/v1/kv_cache_interface.py,
// MLAAttentionSpec: num_kv_heads x head_size x size of the type, 656 bytes for fp8_ds_mla alone).
TokenBytes BytesOfToken(const Dtype& dtype, const LayerGroup& group, bool sparse) {
  if (group.kind == LayerKind::kMla) {
    return {
        sparse && dtype.k_bits == 8 ? int64_t{kLatentFp8Bytes} : HeadBytes(dtype.k_bits, group.head_dim_k, 0),
        0};
  }
  return {Product(group.n_kv_heads, HeadBytes(dtype.k_bits, group.head_dim_k, dtype.k_head_bytes)),
          Product(group.n_kv_heads, HeadBytes(dtype.v_bits, group.head_dim_v, dtype.v_head_bytes))};
}

class VllmSizer : public KvSizer {
 public:
  explicit VllmSizer(const EngineOptions& options) : options_(options) {}

  absl::Status Init(const std::vector<LayerGroup>& groups, const TypePair& pair) {
    const Dtype* dtype = FindDtype(pair);
    if (dtype == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(
          "vllm has no cache dtype for '", pair.Name(),
          "'; known: ", absl::StrJoin(VllmPairs(), ", ", [](std::string* out, const TypePair& p) {
            absl::StrAppend(out, p.Name());
          })));
    }
    effective_ = pair;
    const bool sparse =
        std::any_of(groups.begin(), groups.end(), [](const LayerGroup& group) { return group.index_keys; });
    for (const LayerGroup& group : groups) {
      if (group.index_keys) {
        AddIndexKeys(group, groups);
        continue;
      }
      StoredGroup stored;
      stored.group = group;
      stored.group.layers.clear();
      stored.layers = static_cast<int64_t>(group.layers.size());
      if (group.kind != LayerKind::kRecurrent) {
        const TokenBytes token = BytesOfToken(*dtype, group, sparse);
        stored.k_token_bytes = Product(token.k, stored.layers);
        stored.v_token_bytes = Product(token.v, stored.layers);
      }
      groups_.push_back(stored);
    }
    return UnifyPages();
  }

  const VllmPool& pool() const { return pool_; }

  int64_t Blocks(int64_t context) const {
    int64_t blocks = 0;
    for (size_t i = 0; i < groups_.size(); ++i)
      blocks = Sum(blocks, Product(BlocksOfKind(i, context), GroupsOfKind(groups_[i])));
    return blocks;
  }

  KvBytes Bytes(const KvLoad& load) const override {
    KvBytes bytes;
    for (size_t i = 0; i < groups_.size(); ++i) {
      const StoredGroup& stored = groups_[i];
      int64_t blocks = Product(BlocksOfKind(i, load.context), load.sequences);
      if (stored.group.kind == LayerKind::kFull || stored.group.kind == LayerKind::kMla) {
        blocks -= Product(load.sequences - 1, load.shared_prefix / block_tokens_[i]);
      }
      const int64_t all = Product(blocks, GroupsOfKind(stored), pool_.BlockBytes());
      const int64_t layers =
          Product(blocks, stored.layers, pool_.page_bytes);  // without padding of the last group
      bytes.Add(stored.group.kind, layers);
      bytes.rounding = Sum(bytes.rounding, all - layers);
    }
    bytes.latent = Sum(bytes.latent, IndexBytes(load));
    return bytes;
  }

  std::vector<std::string> Explain(const KvLoad& load) const override {
    std::vector<std::string> lines;
    lines.push_back(absl::StrCat("pool block = ", pool_.group_layers, " layers x page of ", pool_.page_bytes,
                                 " B = ", pool_.BlockBytes(), " B"));
    for (size_t i = 0; i < groups_.size(); ++i) {
      const StoredGroup& stored = groups_[i];
      const int64_t blocks = BlocksOfKind(i, load.context), groups = GroupsOfKind(stored);
      lines.push_back(absl::StrCat(LayerKindName(stored.group.kind), ", ", stored.layers,
                                   " layers = ", groups, " groups: ", blocks, " blocks of ", block_tokens_[i],
                                   " tokens each per request = ", blocks * groups,
                                   " pool blocks = ", Product(blocks, groups, pool_.BlockBytes()), " B"));
    }
    if (index_token_bytes_ > 0) {
      lines.push_back(absl::StrCat("indexer keys: ", index_token_bytes_, " B per token over all layers, for ",
                                   load.sequences, " requests ", IndexBytes(load), " B"));
    }
    lines.push_back(absl::StrCat(
        "one request: ", Blocks(load.context), " blocks x ", pool_.BlockBytes(),
        " B = ", Product(Blocks(load.context), pool_.BlockBytes()), " B; ", load.sequences, " requests",
        load.shared_prefix > 0 ? absl::StrCat(", a prefix of ", load.shared_prefix, " tokens once") : ""));
    return lines;
  }

 private:
  // Keys of an indexer have blocks of their own beside those of the pool: fp8 and an f32 scale per 128 values
  // beside latents, otherwise in the type of the model.
  void AddIndexKeys(const LayerGroup& group, const std::vector<LayerGroup>& groups) {
    const bool latent = std::any_of(groups.begin(), groups.end(), [](const LayerGroup& other) {
      return other.kind == LayerKind::kMla && !other.index_keys;
    });
    const int64_t key = latent ? group.head_dim_k + CeilDiv(group.head_dim_k, 128) * 4 : 2 * group.head_dim_k;
    index_token_bytes_ = Sum(index_token_bytes_, Product(static_cast<int64_t>(group.layers.size()), key));
  }

  int64_t IndexBytes(const KvLoad& load) const {
    const int64_t block = options_.block_tokens;
    const int64_t blocks = Sum(Product(load.sequences, CeilDiv(load.context, block)),
                               -Product(load.sequences - 1, load.shared_prefix / block));
    return Product(blocks, block, index_token_bytes_);
  }

  // Raises the block of small-page layers until all pages are equal; groups have equal numbers of layers.
  absl::Status UnifyPages() {
    if (groups_.empty())
      return absl::InvalidArgumentError("vllm: the model has no layer that caches anything");
    int64_t fewest = groups_[0].layers, most = groups_[0].layers;
    bool attention = false;
    for (const StoredGroup& stored : groups_) {
      fewest = std::min(fewest, stored.layers);
      most = std::max(most, stored.layers);
      if (stored.group.kind == LayerKind::kRecurrent) continue;
      attention = true;
      const int64_t token = stored.token_bytes() / stored.layers;
      pool_.page_bytes = std::max(pool_.page_bytes, Product(token, options_.block_tokens));
    }
    if (!attention) pool_.page_bytes = groups_[0].group.state_bytes;
    pool_.group_layers = 2 * most < 3 * fewest ? most : fewest;
    CoverStates();
    for (const StoredGroup& stored : groups_) {
      if (stored.group.kind == LayerKind::kRecurrent) {
        block_tokens_.push_back(1);
        continue;
      }
      const int64_t token = stored.token_bytes() / stored.layers;
      if (pool_.page_bytes % token != 0) {
        return absl::InvalidArgumentError(absl::StrCat("vllm cannot unify pages: ", pool_.page_bytes,
                                                       " bytes are not a multiple of ", token,
                                                       " bytes per token"));
      }
      block_tokens_.push_back(pool_.page_bytes / token);
      if (block_tokens_.back() != options_.block_tokens) {
        rewrites_.push_back(absl::StrCat("block of the ", LayerKindName(stored.group.kind),
                                         " layers raised from ", options_.block_tokens, " to ",
                                         block_tokens_.back(), " tokens"));
      }
    }
    return absl::OkStatus();
  }

  // A page must hold a recurrent state; the attention block grows in steps of block_tokens until it does.
  void CoverStates() {
    int64_t state = 0;
    for (const StoredGroup& stored : groups_) state = std::max(state, stored.group.state_bytes);
    if (state > pool_.page_bytes && pool_.page_bytes > 0) pool_.page_bytes = RoundUp(state, pool_.page_bytes);
  }

  int64_t GroupsOfKind(const StoredGroup& stored) const { return CeilDiv(stored.layers, pool_.group_layers); }

  int64_t BlocksOfKind(size_t i, int64_t context) const {
    const LayerGroup& group = groups_[i].group;
    const int64_t block = block_tokens_[i], batched = options_.max_batched_tokens;
    switch (group.kind) {
      case LayerKind::kRecurrent:
        return 1 + options_.recurrent_copies;
      case LayerKind::kSliding:
        return CeilDiv(std::min(group.window - 1 + batched, context), block) + 1;
      case LayerKind::kChunked:
        return CeilDiv(std::min(group.window + batched, context), block);
      default:
        return CeilDiv(context, block);
    }
  }

  const EngineOptions options_;
  VllmPool pool_;
  std::vector<int64_t> block_tokens_;  // per group
  int64_t index_token_bytes_ = 0;      // keys of indexers, one token, all layers
};

absl::StatusOr<std::unique_ptr<VllmSizer>> Make(const EngineOptions& options,
                                                const std::vector<LayerGroup>& groups, const TypePair& pair) {
  auto sizer = std::make_unique<VllmSizer>(options);
  KVTIDE_RETURN_IF_ERROR(sizer->Init(groups, pair));
  return sizer;
}

}  // namespace

absl::StatusOr<std::unique_ptr<KvSizer>> MakeVllmSizer(const EngineOptions& options,
                                                       const std::vector<LayerGroup>& groups,
                                                       const TypePair& pair) {
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<VllmSizer> sizer, Make(options, groups, pair));
  return std::unique_ptr<KvSizer>(std::move(sizer));
}

absl::StatusOr<VllmPool> MakeVllmPool(const EngineOptions& options, const std::vector<LayerGroup>& groups,
                                      const TypePair& pair) {
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<VllmSizer> sizer, Make(options, groups, pair));
  return sizer->pool();
}

absl::StatusOr<int64_t> VllmBlocksPerRequest(const EngineOptions& options,
                                             const std::vector<LayerGroup>& groups, const TypePair& pair,
                                             int64_t context) {
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<VllmSizer> sizer, Make(options, groups, pair));
  return sizer->Blocks(context);
}

std::vector<TypePair> VllmPairs() {
  std::vector<TypePair> pairs;
  for (const Dtype& dtype : kDtypes) pairs.push_back({dtype.k, dtype.v});
  return pairs;
}

std::string VllmCacheDtype(const TypePair& pair) {
  const Dtype* dtype = FindDtype(pair);
  return dtype == nullptr ? "" : dtype->flag;
}

}  // namespace kvtide::planner
