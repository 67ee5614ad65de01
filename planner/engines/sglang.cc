#include "planner/engines/sglang.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

constexpr int64_t kSparseLatentBytes = 656;  // fp8 beside an indexer: 512 fp8, 4 f32 scales, 64 bf16
constexpr int kIndexGroup = 128;             // values of an indexer key that share an f32 scale
constexpr int64_t kStateSlots = 3;           // per request, with the prefix cache on
constexpr int kLargeGraphs = 48;

struct Dtype {
  const char* type;
  const char* flag;
  int bytes;  // per value
};
constexpr Dtype kDtypes[] = {
    {"f16", "auto", 2}, {"bf16", "bf16", 2}, {"fp8", "fp8_e4m3", 1}, {"fp8_e5m2", "fp8_e5m2", 1}};

const Dtype* FindDtype(const TypePair& pair) {
  for (const Dtype& dtype : kDtypes) {
    if (pair.k == dtype.type && (pair.v == dtype.type || pair.v == "none")) return &dtype;
  }
  return nullptr;
}

class SglangSizer : public KvSizer {
 public:
  explicit SglangSizer(const EngineOptions& options) : options_(options) {}

  absl::Status Init(const std::vector<LayerGroup>& groups, const TypePair& pair) {
    const Dtype* dtype = FindDtype(pair);
    if (dtype == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(
          "sglang has no cache dtype for '", pair.Name(),
          "'; known: ", absl::StrJoin(SglangPairs(), ", ", [](std::string* out, const TypePair& p) {
            absl::StrAppend(out, p.Name());
          })));
    }
    effective_ = pair;
    const bool sparse =
        std::any_of(groups.begin(), groups.end(), [](const LayerGroup& g) { return g.index_keys; });
    const bool latent = std::any_of(groups.begin(), groups.end(), [](const LayerGroup& g) {
      return g.kind == LayerKind::kMla && !g.index_keys;
    });
    for (const LayerGroup& group : groups) {
      StoredGroup stored;
      stored.group = group;
      stored.layers = static_cast<int64_t>(group.layers.size());
      stored.group.layers.clear();
      if (group.index_keys) {
        // Beside latents uint8 codes and f32 scales, whatever the cache is; otherwise 16 bits.
        const int64_t key = latent ? group.head_dim_k + CeilDiv(group.head_dim_k, kIndexGroup) * 4
                                   : int64_t{group.head_dim_k} * 2;
        stored.k_token_bytes = stored.layers * key;
      } else if (group.kind == LayerKind::kMla) {
        const bool packed = sparse && dtype->bytes == 1;
        stored.k_token_bytes =
            stored.layers * (packed ? kSparseLatentBytes : int64_t{group.head_dim_k} * dtype->bytes);
      } else if (group.kind != LayerKind::kRecurrent) {
        stored.k_token_bytes = stored.layers * group.n_kv_heads * group.head_dim_k * dtype->bytes;
        stored.v_token_bytes = stored.layers * group.n_kv_heads * group.head_dim_v * dtype->bytes;
      }
      groups_.push_back(stored);
    }
    return absl::OkStatus();
  }

  KvBytes Bytes(const KvLoad& load) const override {
    KvBytes bytes;
    const int64_t tokens = Tokens(load);
    for (const StoredGroup& stored : groups_) {
      if (stored.group.kind == LayerKind::kRecurrent) {
        bytes.recurrent = Sum(bytes.recurrent, Product(SlotBytes(stored), Slots(load)));
        continue;
      }
      bytes.Add(stored.group.kind, Product(PoolTokens(stored, tokens), stored.token_bytes()));
    }
    return bytes;
  }

  std::vector<std::string> Explain(const KvLoad& load) const override {
    std::vector<std::string> lines;
    const int64_t tokens = Tokens(load);
    lines.push_back(absl::StrCat(
        "tokens of the pool = ", load.sequences, " x ", load.context,
        load.shared_prefix > 0 ? absl::StrCat(", a prefix of ", load.shared_prefix, " tokens once") : "",
        ", rounded up to pages of ", Page(), " = ", tokens));
    for (const StoredGroup& stored : groups_) {
      if (stored.group.kind == LayerKind::kRecurrent) {
        lines.push_back(absl::StrCat("recurrent, ", stored.layers, " layers: slot of ", SlotBytes(stored),
                                     " B x (", kStateSlots, " x ", load.sequences,
                                     " + 1) = ", Product(SlotBytes(stored), Slots(load)), " B"));
        continue;
      }
      const int64_t kept = PoolTokens(stored, tokens);
      lines.push_back(
          absl::StrCat(stored.group.index_keys ? "indexer keys" : LayerKindName(stored.group.kind), ", ",
                       stored.layers, " layers: ", kept, " tokens x ", stored.token_bytes(),
                       " B = ", Product(kept, stored.token_bytes()), " B"));
    }
    return lines;
  }

  int64_t CellBytes() const {
    int64_t bytes = 0;
    for (const StoredGroup& stored : groups_) {
      if (stored.group.window == 0) bytes += stored.token_bytes();
    }
    return bytes;
  }

 private:
  int64_t Page() const { return std::max(1, options_.page_tokens); }

  int64_t Tokens(const KvLoad& load) const {
    const int64_t shared = load.shared_prefix / Page() * Page();
    return Sum(Product(load.sequences, RoundUp(load.context, Page())), -Product(load.sequences - 1, shared));
  }

  // The pool of sliding layers is a share of the other, and never smaller than a window and a page.
  int64_t PoolTokens(const StoredGroup& stored, int64_t tokens) const {
    if (stored.group.window == 0 || options_.swa_full) return tokens;
    const auto share = static_cast<int64_t>(options_.swa_full_tokens_ratio * static_cast<double>(tokens));
    return std::max(share / Page() * Page(), RoundUp(stored.group.window + Page(), Page()));
  }

  // Convolutions in the type of the model (16 bits), the state proper in f32.
  static int64_t SlotBytes(const StoredGroup& stored) {
    return Product(stored.group.state_bytes - stored.group.conv_bytes / 2, stored.layers);
  }

  static int64_t Slots(const KvLoad& load) { return Sum(Product(kStateSlots, load.sequences), 1); }

  const EngineOptions options_;
};

absl::StatusOr<std::unique_ptr<SglangSizer>> Make(const EngineOptions& options,
                                                  const std::vector<LayerGroup>& groups,
                                                  const TypePair& pair) {
  auto sizer = std::make_unique<SglangSizer>(options);
  KVTIDE_RETURN_IF_ERROR(sizer->Init(groups, pair));
  return sizer;
}

}  // namespace

absl::StatusOr<std::unique_ptr<KvSizer>> MakeSglangSizer(const EngineOptions& options,
                                                         const std::vector<LayerGroup>& groups,
                                                         const TypePair& pair) {
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<SglangSizer> sizer, Make(options, groups, pair));
  return std::unique_ptr<KvSizer>(std::move(sizer));
}

absl::StatusOr<int64_t> SglangCellBytes(const EngineOptions& options, const std::vector<LayerGroup>& groups,
                                        const TypePair& pair) {
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<SglangSizer> sizer, Make(options, groups, pair));
  return sizer->CellBytes();
}

std::vector<TypePair> SglangPairs() {
  std::vector<TypePair> pairs;
  for (const Dtype& dtype : kDtypes) pairs.push_back({dtype.type, dtype.type});
  return pairs;
}

std::string SglangCacheDtype(const TypePair& pair) {
  const Dtype* dtype = FindDtype(pair);
  return dtype == nullptr ? "" : dtype->flag;
}

SglangDefaults DefaultsOfSglang(const EngineOptions& options, int64_t device_bytes, int devices,
                                bool latent) {
  // Classes of memory: below so many GiB, tokens of a chunk, largest batch of a graph with few GPUs and with
  // 4 or more.
  struct Class {
    int64_t below_gib;
    int chunk, graphs, graphs_of_many;
  };
  static constexpr Class classes[] = {{20, 2048, 8, 8},
                                      {35, 4096, kLargeGraphs, 160},
                                      {60, 4096, 32, 160},
                                      {160, 8192, 256, 512},
                                      {INT64_MAX / kGiB, 16384, 512, 512}};
  const Class* found = classes;
  while (device_bytes >= found->below_gib * kGiB) ++found;
  SglangDefaults defaults;
  defaults.chunked_prefill = options.chunked_prefill > 0 ? options.chunked_prefill : found->chunk;
  defaults.graph_batch = !options.cuda_graphs ? 0 : devices >= 4 ? found->graphs_of_many : found->graphs;
  if (options.mem_fraction_static > 0) {
    defaults.mem_fraction_static = options.mem_fraction_static;
    return defaults;
  }
  double reserved_mib = 512 + 1.5 * std::max(defaults.chunked_prefill, 2048) + devices / 8.0 * 1024 +
                        2.0 * defaults.graph_batch + (latent && options.cuda_graphs ? 1536 : 0);
  if (device_bytes > 60 * kGiB) reserved_mib = std::max(reserved_mib, 10240.0);
  const double mib = static_cast<double>(device_bytes) / kMiB;
  defaults.mem_fraction_static = std::clamp(std::round((mib - reserved_mib) / mib * 1000) / 1000, 0.1, 0.95);
  return defaults;
}

}  // namespace kvtide::planner
