#include "planner/engines/kvtide_engine.h"

#include <algorithm>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/format/catalogue.h"
#include "kernels/format/exact_window.h"
#include "kernels/format/tide.h"

namespace kvtide::planner {
namespace {

// Blocks of one sequence whose tokens lie in the shared prefix, at rest.
BlockCounts SharedBlocks(const KvLoad& load, ExactWindow exact, int64_t window) {
  const int64_t full = load.context / kBlockTokens;
  const int64_t end = std::min(load.shared_prefix / kBlockTokens, full);
  BlockCounts shared;
  const int64_t first = FirstLiveBlock(load.context, window);
  const int64_t first_exact_end = std::min<int64_t>(end, exact.first_blocks);
  const int64_t last_exact_begin = std::max<int64_t>(first_exact_end, full - exact.last_blocks);
  shared.exact = std::max<int64_t>(0, first_exact_end - first) +
                 std::max<int64_t>(0, end - std::max(last_exact_begin, first));
  shared.coded = std::max<int64_t>(0, std::min(end, last_exact_begin) - std::max(first_exact_end, first));
  return shared;
}

BlockCounts CountLoad(const KvLoad& load, ExactWindow exact, int64_t window) {
  const BlockCounts one = CountLiveBlocks(load.context, exact, window);
  const BlockCounts shared = SharedBlocks(load, exact, window);
  return {Product(one.exact, load.sequences) - Product(shared.exact, load.sequences - 1),
          Product(one.coded, load.sequences) - Product(shared.coded, load.sequences - 1)};
}

absl::StatusOr<CachePair> ParseTypes(const TypePair& pair) {
  CachePair types;
  KVTIDE_ASSIGN_OR_RETURN(types.k, ParseCacheType(pair.k));
  KVTIDE_ASSIGN_OR_RETURN(types.v, ParseCacheType(pair.v));
  return types;
}

GroupShape ShapeOf(const LayerGroup& group) {
  return {static_cast<int>(group.layers.size()), group.n_kv_heads, group.head_dim_k, group.head_dim_v};
}

class KvtideSizer : public KvSizer {
 public:
  explicit KvtideSizer(const EngineOptions& options) : options_(options), exact_(options.exact_window) {}

  absl::Status Init(const std::vector<LayerGroup>& groups, const TypePair& pair) {
    KVTIDE_ASSIGN_OR_RETURN(const CachePair types, ParseTypes(pair));
    effective_ = pair;
    for (const LayerGroup& group : groups) {
      KVTIDE_RETURN_IF_ERROR(AddGroup(group, types));
    }
    return absl::OkStatus();
  }

  KvBytes Bytes(const KvLoad& load) const override {
    KvBytes bytes;
    for (size_t i = 0; i < groups_.size(); ++i) {
      const LayerGroup& group = groups_[i].group;
      if (group.kind == LayerKind::kRecurrent) {
        bytes.recurrent = Sum(bytes.recurrent, Product(group.state_bytes, groups_[i].layers, load.sequences,
                                                       1 + options_.recurrent_copies));
        continue;
      }
      const BlockCounts counts = CountLoad(load, exact_, group.window);
      bytes.Add(group.kind, Product(counts.coded, coded_bytes_[i]));
      bytes.window_tail = Sum(bytes.window_tail, Product(counts.exact, exact_bytes_[i]));
      const int64_t tail = load.context % kBlockTokens;
      if (tail != 0) {  // the part of the tail block that holds no token yet
        const int64_t unused = Product(exact_bytes_[i] / kBlockTokens, kBlockTokens - tail, load.sequences);
        bytes.window_tail = Sum(bytes.window_tail, -unused);
        bytes.rounding = Sum(bytes.rounding, unused);
      }
    }
    return bytes;
  }

  // A prefill decodes what one layer of one sequence sees to f16, K and V padded to the kernels' head dim,
  // and keeps partial states in a quarter of the scratch memory; what does not fit comes in several rounds.
  int64_t ScratchBytes(const KvLoad& load) const override {
    int64_t largest = 0;
    for (const StoredGroup& stored : groups_) {
      const LayerGroup& group = stored.group;
      if (group.kind == LayerKind::kRecurrent) continue;
      const int64_t dim = (std::max(group.head_dim_k, group.head_dim_v) + 63) / 64 * 64;
      const int64_t pages = (load.context + kBlockTokens - 1) / kBlockTokens;
      largest = std::max(largest, Product(pages, group.n_kv_heads, kBlockTokens, dim, 4));
    }
    return largest == 0 ? 0 : std::min(kKvtideScratchBytes, Sum(largest, kKvtideScratchBytes / 4));
  }

  // The price of calibrated keys, as pages of f16 that were written and read beside the coded ones. Before
  // RoPE they are rebuilt for every step: attention takes 0.7 to 0.9 times as long as over f16 pages with up
  // to 8 query heads on a KV head (an H200, tests/bench/results/gpu_attend.json), on CPUs seven times
  // (cpu_attend_tide_1_thread.json). After RoPE queries are turned and bit planes read: 193, 144 and 126 us
  // for 4, 3 and 2 bits where turbo takes 143, 112 and 97 and f16 490, and no more on CPUs.
  int64_t StepScratchBytes(int64_t context) const override {
    const absl::StatusOr<CacheType> k = ParseCacheType(effective_.k);
    if (!k.ok() || !Info(*k).calibrated) return 0;
    int64_t bytes = 0;
    for (size_t i = 0; i < groups_.size(); ++i) {
      if (groups_[i].group.kind == LayerKind::kRecurrent) continue;
      bytes = Sum(bytes,
                  Product(CountLiveBlocks(context, exact_, groups_[i].group.window).coded, exact_bytes_[i]));
    }
    if (options_.calibrated_keys.has_value() && options_.calibrated_keys->after_rope)
      return bytes / 128 * 3 * Info(*k).bits;
    return options_.backend == LlamaBackend::kCpu ? Product(bytes, 3) : bytes / 10 * 3;
  }

  // Means, and transforms in both directions with the bits of their coefficients, means of coded keys and
  // RoPE's frequencies.
  int64_t KeyProfileBytes() const override {
    if (!options_.calibrated_keys.has_value()) return 0;
    int64_t bytes = 0;
    for (const StoredGroup& stored : groups_) {
      if (stored.group.kind == LayerKind::kRecurrent) continue;
      const int64_t dim = stored.group.head_dim_k;
      int64_t head = dim * static_cast<int64_t>(sizeof(float));
      if (options_.calibrated_keys->transforms)
        head = Sum(head, Product(2, dim, dim, sizeof(float)), Product(dim + dim / 2, sizeof(float)),
                   kTideTypes * (StoredDim(stored.group.head_dim_k) / kTideGroup));
      bytes = Sum(bytes, Product(stored.layers, stored.group.n_kv_heads, head));
    }
    return bytes;
  }

  std::vector<std::string> Explain(const KvLoad& load) const override {
    std::vector<std::string> lines;
    for (size_t i = 0; i < groups_.size(); ++i) {
      const LayerGroup& group = groups_[i].group;
      if (group.kind == LayerKind::kRecurrent) {
        lines.push_back(absl::StrCat("recurrent, ", groups_[i].layers, " layers: ", group.state_bytes,
                                     " B x ", groups_[i].layers, " x ", load.sequences,
                                     " sequences, kept by the engine"));
        continue;
      }
      const BlockCounts one = CountLiveBlocks(load.context, exact_, group.window);
      const BlockCounts all = CountLoad(load, exact_, group.window);
      lines.push_back(absl::StrCat(LayerKindName(group.kind), ", ", groups_[i].layers, " layers x ",
                                   group.n_kv_heads, " KV heads, ", kBlockTokens,
                                   " tokens per block: one sequence of ", load.context, " tokens holds ",
                                   one.coded, " coded and ", one.exact, " exact blocks"));
      lines.push_back(absl::StrCat("  coded block = ", groups_[i].layers, " x ", group.n_kv_heads,
                                   " records of ", coded_bytes_[i] / (groups_[i].layers * group.n_kv_heads),
                                   " B = ", coded_bytes_[i], " B; exact block = ", exact_bytes_[i], " B"));
      lines.push_back(
          absl::StrCat("  ", all.coded, " x ", coded_bytes_[i], " + ", all.exact, " x ", exact_bytes_[i],
                       " = ", Sum(Product(all.coded, coded_bytes_[i]), Product(all.exact, exact_bytes_[i])),
                       " B for ", load.sequences, load.sequences == 1 ? " sequence" : " sequences"));
    }
    return lines;
  }

 private:
  absl::Status AddGroup(const LayerGroup& group, CachePair types) {
    if (group.kind == LayerKind::kMla) {
      return absl::InvalidArgumentError("kvtide has no kernels for latent (MLA) caches yet");
    }
    if (group.kind == LayerKind::kChunked) {
      return absl::InvalidArgumentError("kvtide has no kernels for chunked attention yet");
    }
    StoredGroup stored;
    stored.group = group;
    stored.layers = static_cast<int64_t>(group.layers.size());
    stored.group.layers.clear();
    int64_t coded = 0, exact = 0;
    if (group.kind != LayerKind::kRecurrent) {
      const GroupShape shape = ShapeOf(group);
      KVTIDE_RETURN_IF_ERROR(CheckGroupShape(shape));
      const BlockLayout layout(shape, types);
      coded = static_cast<int64_t>(layout.block_bytes());
      exact = static_cast<int64_t>(BlockLayout(shape, ExactPair()).block_bytes());
      const int64_t heads = stored.layers * group.n_kv_heads;
      stored.k_token_bytes = static_cast<int64_t>(layout.k().bytes) * heads / kBlockTokens;
      stored.v_token_bytes = static_cast<int64_t>(layout.v().bytes) * heads / kBlockTokens;
      NotePadding(group, layout);
    }
    groups_.push_back(stored);
    coded_bytes_.push_back(coded);
    exact_bytes_.push_back(exact);
    return absl::OkStatus();
  }

  void NotePadding(const LayerGroup& group, const BlockLayout& layout) {
    if (layout.k().stored_dim == group.head_dim_k && layout.v().stored_dim == group.head_dim_v) return;
    rewrites_.push_back(absl::StrCat("head dims ", group.head_dim_k, "/", group.head_dim_v, " are stored as ",
                                     layout.k().stored_dim, "/", layout.v().stored_dim));
  }

  const EngineOptions options_;
  const ExactWindow exact_;
  std::vector<int64_t> coded_bytes_;  // per group, one block
  std::vector<int64_t> exact_bytes_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<KvSizer>> MakeKvtideSizer(const EngineOptions& options,
                                                         const std::vector<LayerGroup>& groups,
                                                         const TypePair& pair) {
  auto sizer = std::make_unique<KvtideSizer>(options);
  KVTIDE_RETURN_IF_ERROR(sizer->Init(groups, pair));
  return std::unique_ptr<KvSizer>(std::move(sizer));
}

std::vector<TypePair> KvtidePairs(const EngineOptions& options) {
  std::vector<TypePair> pairs;
  const std::vector<CacheType> types = AllCacheTypes();
  for (CacheType type : types) pairs.push_back({Name(type), Name(type)});
  // Keys are the sensitive side: K in q8_0 with every smaller V.
  for (CacheType type : types) {
    const CacheTypeInfo& info = Info(type);
    if (info.storage == Storage::kCodes && info.bits < 8) pairs.push_back({"q8_0", info.name});
  }
  if (!options.calibrated_keys.has_value() || !options.calibrated_keys->transforms) return pairs;
  // Values have no calibrated type: turbo of the same bits and of fewer, or the least.
  for (CacheType k : CalibratedTypes()) {
    if (Info(k).bits == 1 && !options.calibrated_keys->lowest) continue;
    for (const char* v : {"turbo4", "turbo3", "turbo2"}) {
      if (Info(*ParseCacheType(v)).bits <= std::max(2, Info(k).bits)) pairs.push_back({Name(k), v});
    }
  }
  return pairs;
}

absl::StatusOr<std::vector<PoolNeed>> KvtidePools(const EngineOptions& options,
                                                  const std::vector<LayerGroup>& groups, const TypePair& pair,
                                                  const KvLoad& load) {
  KVTIDE_ASSIGN_OR_RETURN(const CachePair types, ParseTypes(pair));
  std::vector<PoolNeed> pools;
  for (const LayerGroup& group : groups) {
    if (group.kind == LayerKind::kRecurrent) continue;
    PoolNeed need;
    need.shape = ShapeOf(group);
    KVTIDE_RETURN_IF_ERROR(CheckGroupShape(need.shape));
    need.window = group.window;
    const BlockCounts counts = CountLoad(load, options.exact_window, group.window);
    need.exact_blocks = counts.exact;
    need.coded_blocks = counts.coded;
    need.exact_block_bytes = static_cast<int64_t>(BlockLayout(need.shape, ExactPair()).block_bytes());
    need.coded_block_bytes = static_cast<int64_t>(BlockLayout(need.shape, types).block_bytes());
    pools.push_back(need);
  }
  return pools;
}

}  // namespace kvtide::planner
