#include "planner/engines/llama_cpp.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "planner/saturating.h"

namespace kvtide::planner {
namespace {

constexpr int64_t kCellPad = 256;
constexpr int kHeadPad = 128;            // types with groups of 128 pad every head to it
constexpr int kAutoAsymmetricRatio = 6;  // query heads per KV head from which K becomes q8_0
constexpr int kBoundaryMinLayers = 8;
constexpr int kBoundaryLayers = 2;  // at either end

const char* const kTrees[] = {"upstream", "turboquant", "pairquant", "planarquant"};
constexpr int kLastOldKernelRule = 10819;  // the newest build that is known to fall back to the CPU

// The number of "b10819", 0 for anything else.
int BuildNumber(const std::string& build) {
  int number = 0;
  return absl::StartsWith(build, "b") && absl::SimpleAtoi(build.substr(1), &number) && number > 0 ? number
                                                                                                  : 0;
}
bool AnyTree(const std::string& build) { return build == "newest" || build == "auto"; }

bool TreeHas(const std::string& tree, const GgmlType& type) {
  const std::string home = type.tree;
  if (home == "upstream" || home == tree) return true;
  // pairquant is built on the turboquant tree; planarquant carries its types too.
  return home == "turboquant" && (tree == "pairquant" || tree == "planarquant");
}

bool IsTurbo(const GgmlType* type) { return type != nullptr && std::string(type->tree) == "turboquant"; }
bool KeepsHalfCopyOfK(const GgmlType* type) {
  return type != nullptr && std::string(type->tree) == "planarquant";
}

// Width of one head as stored.
int64_t StoredWidth(const GgmlType& type, int head_dim) {
  return type.group == kHeadPad ? RoundUp(head_dim, kHeadPad) : head_dim;
}

absl::StatusOr<int64_t> RowBytes(const GgmlType& type, int n_kv_heads, int head_dim) {
  const int64_t width = n_kv_heads * StoredWidth(type, head_dim);
  if (width % type.group != 0) {
    return absl::InvalidArgumentError(absl::StrCat("a row of ", width, " values is not a multiple of the ",
                                                   type.group, " values of a ", type.name, " group"));
  }
  return width / type.group * type.bytes;
}

class LlamaCppSizer : public KvSizer {
 public:
  explicit LlamaCppSizer(const EngineOptions& options) : options_(options) {}

  absl::Status Init(const ModelGeometry& model, const std::vector<LayerGroup>& groups, const TypePair& pair) {
    tree_ = ResolveTree(options_.build, pair);
    k_ = FindGgmlType(pair.k);
    v_ = FindGgmlType(pair.v);
    if (k_ == nullptr || (v_ == nullptr && pair.v != "none")) {
      return absl::InvalidArgumentError(absl::StrCat(
          "llama.cpp has no cache type '", k_ == nullptr ? pair.k : pair.v, "'; known: ", KnownTypes()));
    }
    if (tree_.empty()) {
      return absl::InvalidArgumentError(absl::StrCat(
          AnyTree(options_.build) ? std::string("no tree of llama.cpp") : "the " + options_.build + " tree",
          " has both ", pair.k, " and ", pair.v, ForkAdvice(pair)));
    }
    Rewrite(model, pair);
    for (const LayerGroup& group : groups)
      widest_v_ = std::max(widest_v_, int64_t{group.n_kv_heads} * group.head_dim_v);
    for (const LayerGroup& group : groups) {
      absl::Status status = AddGroup(group, static_cast<int>(model.layers.size()));
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  KvBytes Bytes(const KvLoad& load) const override {
    KvBytes bytes;
    const int64_t streams = options_.unified ? 1 : load.sequences;
    for (size_t i = 0; i < groups_.size(); ++i) {
      const StoredGroup& stored = groups_[i];
      if (stored.group.kind == LayerKind::kRecurrent) {
        bytes.recurrent =
            Sum(bytes.recurrent, Product(stored.group.state_bytes, stored.layers, States(load)));
        continue;
      }
      bytes.Add(stored.group.kind, Product(Cells(stored.group, load), streams, stored.token_bytes()));
    }
    return bytes;
  }

  std::vector<std::string> Explain(const KvLoad& load) const override {
    std::vector<std::string> lines;
    for (const StoredGroup& stored : groups_) {
      const LayerGroup& group = stored.group;
      if (group.kind == LayerKind::kRecurrent) {
        lines.push_back(absl::StrCat("recurrent, ", stored.layers, " layers: ", group.state_bytes, " B x ",
                                     stored.layers, " x ", load.sequences, " sequences",
                                     options_.recurrent_copies > 0
                                         ? absl::StrCat(" x (1 + ", options_.recurrent_copies, " copies)")
                                         : "",
                                     " = ", Product(group.state_bytes, stored.layers, States(load)), " B"));
        continue;
      }
      const int64_t cells = Cells(group, load), streams = options_.unified ? 1 : load.sequences;
      lines.push_back(absl::StrCat(LayerKindName(group.kind), ", ", stored.layers,
                                   " layers: cells = ", CellRule(group, load), " = ", cells,
                                   streams > 1 ? absl::StrCat(" in each of ", streams, " streams") : ""));
      lines.push_back(absl::StrCat("  K ", group.n_kv_heads, " heads x ", StoredWidth(*k_, group.head_dim_k),
                                   " / ", k_->group, " x ", k_->bytes, " B x ", stored.layers,
                                   " layers = ", stored.k_token_bytes, " B per cell"));
      if (stored.v_token_bytes > 0) {
        lines.push_back(absl::StrCat(
            "  V ", group.n_kv_heads, " heads x ", StoredWidth(*v_, group.head_dim_v), " / ", v_->group,
            " x ", v_->bytes, " B x ", stored.layers, " layers = ", stored.v_token_bytes, " B per cell",
            boundary_v_ ? " (4 layers in q8_0)" : "",
            PaddedV(group) ? absl::StrCat(" (without flash attention V is as wide as "
                                          "the widest layer's ",
                                          widest_v_, " values)")
                           : ""));
      }
      lines.push_back(absl::StrCat("  ", cells * streams, " cells x ", stored.token_bytes(),
                                   " B = ", Product(cells, streams, stored.token_bytes()), " B"));
    }
    return lines;
  }

  int64_t ScratchBytes(const KvLoad& load) const override {
    if (options_.backend != LlamaBackend::kCuda) return 0;  // read as they are stored
    int64_t largest = 0, permanent = 0;
    for (const StoredGroup& stored : groups_) {
      if (stored.group.kind == LayerKind::kRecurrent) continue;
      const int64_t cells = Product(Cells(stored.group, load), options_.unified ? 1 : load.sequences);
      largest = std::max(largest, Product(cells, HalfCopyPerToken(stored.group)));
      if (KeepsHalfCopyOfK(k_)) {
        permanent = Sum(permanent,
                        Product(cells, 2, stored.group.n_kv_heads, stored.group.head_dim_k, stored.layers));
      }
    }
    return Sum(largest, permanent);
  }

  int64_t StepScratchBytes(int64_t context) const override {
    int64_t bytes = 0;
    for (const StoredGroup& stored : groups_) {
      if (stored.group.kind == LayerKind::kRecurrent) continue;
      const int64_t cells = Cells(stored.group, {context, 1, 0});
      bytes = Sum(bytes, Product(cells, HalfCopyPerToken(stored.group), stored.layers));
    }
    return bytes;
  }

 private:
  static std::string KnownTypes() {
    std::vector<std::string> names;
    for (const GgmlType& type : GgmlTypes()) names.push_back(type.name);
    return absl::StrJoin(names, ", ");
  }

  static std::string ForkAdvice(const TypePair& pair) {
    const std::string tree = ResolveTree("auto", pair);
    return tree.empty() ? "" : absl::StrCat("; the ", tree, " fork has them (--build ", tree, ")");
  }

  // Recurrent states: one per sequence and those that speculation may have to go back to.
  int64_t States(const KvLoad& load) const { return Product(load.sequences, 1 + options_.recurrent_copies); }

  // Without flash attention V is stored transposed, every layer as wide as the widest.
  bool PaddedV(const LayerGroup& group) const {
    return !options_.flash_attention && group.head_dim_v > 0 &&
           int64_t{group.n_kv_heads} * group.head_dim_v < widest_v_;
  }

  void Rewrite(const ModelGeometry& model, const TypePair& pair) {
    effective_ = pair;
    if (!options_.rewrites || tree_ == "upstream") return;
    const int ratio = GroupedQueryRatio(model);
    if (IsTurbo(k_) && k_ == v_ && ratio >= kAutoAsymmetricRatio) {
      rewrites_.push_back(absl::StrCat("K ", k_->name, " becomes q8_0: ", ratio,
                                       " query heads per KV head (TURBO_AUTO_ASYMMETRIC=0 turns this off)"));
      k_ = FindGgmlType("q8_0");
      effective_.k = "q8_0";
    }
    if (v_ != nullptr && std::string(v_->name) == "turbo2" && model.layers.size() >= kBoundaryMinLayers) {
      boundary_v_ = true;
      rewrites_.push_back(
          "V of the first 2 and last 2 layers becomes q8_0 (TURBO_LAYER_ADAPTIVE=0 turns this off)");
    }
  }

  absl::Status AddGroup(const LayerGroup& group, int n_layers) {
    StoredGroup stored;
    stored.group = group;
    stored.layers = static_cast<int64_t>(group.layers.size());
    stored.group.layers.clear();
    if (group.kind != LayerKind::kRecurrent) {
      absl::StatusOr<int64_t> k = RowBytes(*k_, group.n_kv_heads, group.head_dim_k);
      if (!k.ok()) return k.status();
      stored.k_token_bytes = *k * stored.layers;
      if (v_ != nullptr && group.kind != LayerKind::kMla) {
        absl::StatusOr<int64_t> v = PaddedV(group) ? RowBytes(*v_, 1, static_cast<int>(widest_v_))
                                                   : RowBytes(*v_, group.n_kv_heads, group.head_dim_v);
        if (!v.ok()) return v.status();
        stored.v_token_bytes = *v * stored.layers;
        if (boundary_v_) {
          absl::StatusOr<int64_t> q8 = RowBytes(*FindGgmlType("q8_0"), group.n_kv_heads, group.head_dim_v);
          if (!q8.ok()) return q8.status();
          for (int layer : group.layers) {
            if (layer < kBoundaryLayers || layer >= n_layers - kBoundaryLayers)
              stored.v_token_bytes += *q8 - *v;
          }
        }
      }
      NotePadding(group);
    }
    groups_.push_back(stored);
    return absl::OkStatus();
  }

  void NotePadding(const LayerGroup& group) {
    if (k_->group == kHeadPad && group.head_dim_k % kHeadPad != 0) {
      rewrites_.push_back(absl::StrCat("K heads of ", group.head_dim_k, " are padded to ",
                                       RoundUp(group.head_dim_k, kHeadPad), " for ", k_->name));
    }
    if (v_ != nullptr && v_->group == kHeadPad && group.head_dim_v > 0 && group.head_dim_v % kHeadPad != 0) {
      rewrites_.push_back(absl::StrCat("V heads of ", group.head_dim_v, " are padded to ",
                                       RoundUp(group.head_dim_v, kHeadPad), " for ", v_->name));
    }
  }

  int64_t Cells(const LayerGroup& group, const KvLoad& load) const {
    return LlamaCppCells(options_, group.window, group.compress, load);
  }

  std::string CellRule(const LayerGroup& group, const KvLoad& load) const {
    const std::string tokens =
        options_.total_context && !options_.unified && load.sequences > 1
            ? absl::StrCat("pad(", load.context, ", 256) / ", load.sequences)
        : options_.total_context || !options_.unified || load.sequences == 1
            ? absl::StrCat(load.context)
            : absl::StrCat(load.shared_prefix > 0 ? absl::StrCat(load.shared_prefix, " + ") : "",
                           load.sequences, " x ", load.context - load.shared_prefix);
    if (group.window == 0 || options_.swa_full) return absl::StrCat("pad(", tokens, ", 256)");
    return absl::StrCat("pad(min(pad(", tokens, ", 256), ", group.window,
                        options_.unified && load.sequences > 1 ? absl::StrCat(" x ", load.sequences) : "",
                        " + ", options_.ubatch, "), 256)");
  }

  // Bytes per token of an f16 copy of one layer's coded sides.
  int64_t HalfCopyPerToken(const LayerGroup& group) const {
    int64_t values = 0;
    if (!k_->half()) values += StoredWidth(*k_, group.head_dim_k);
    if (v_ != nullptr && !v_->half()) values += StoredWidth(*v_, group.head_dim_v);
    return 2 * values * group.n_kv_heads;
  }

  const EngineOptions options_;
  std::string tree_;
  int64_t widest_v_ = 0;  // values of V of one token, over all layers
  const GgmlType* k_ = nullptr;
  const GgmlType* v_ = nullptr;
  bool boundary_v_ = false;
};

}  // namespace

const std::vector<GgmlType>& GgmlTypes() {
  static const std::vector<GgmlType> types = {
      {"f16", 1, 2, "upstream"},           {"bf16", 1, 2, "upstream"},
      {"f32", 1, 4, "upstream"},           {"q8_0", 32, 34, "upstream"},
      {"q5_1", 32, 24, "upstream"},        {"q5_0", 32, 22, "upstream"},
      {"q4_1", 32, 20, "upstream"},        {"q4_0", 32, 18, "upstream"},
      {"iq4_nl", 32, 18, "upstream"},      {"turbo4", 128, 68, "turboquant"},
      {"turbo3", 128, 50, "turboquant"},   {"turbo2", 128, 34, "turboquant"},
      {"pq4", 128, 66, "pairquant"},       {"planar3", 128, 50, "planarquant"},
      {"planar4", 128, 68, "planarquant"}, {"iso3", 128, 50, "planarquant"},
      {"iso4", 128, 68, "planarquant"},
  };
  return types;
}

const GgmlType* FindGgmlType(const std::string& name) {
  for (const GgmlType& type : GgmlTypes()) {
    if (name == type.name) return &type;
  }
  return nullptr;
}

std::string ResolveTree(const std::string& build, const TypePair& pair) {
  const GgmlType* k = FindGgmlType(pair.k);
  const GgmlType* v = FindGgmlType(pair.v);
  if (k == nullptr || (v == nullptr && pair.v != "none")) return "";
  for (const char* tree : kTrees) {
    if (!AnyTree(build) && build != tree && !(BuildNumber(build) > 0 && std::string(tree) == "upstream"))
      continue;
    if (TreeHas(tree, *k) && (v == nullptr || TreeHas(tree, *v))) return tree;
  }
  return "";
}

absl::StatusOr<std::unique_ptr<KvSizer>> MakeLlamaCppSizer(const EngineOptions& options,
                                                           const ModelGeometry& model,
                                                           const std::vector<LayerGroup>& groups,
                                                           const TypePair& pair) {
  auto sizer = std::make_unique<LlamaCppSizer>(options);
  absl::Status status = sizer->Init(model, groups, pair);
  if (!status.ok()) return status;
  return std::unique_ptr<KvSizer>(std::move(sizer));
}

absl::Status CheckLlamaBuild(const std::string& build) {
  if (AnyTree(build) || BuildNumber(build) > 0) return absl::OkStatus();
  for (const char* tree : kTrees) {
    if (build == tree) return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("unknown build '", build,
                                                 "'; known: newest, auto, b10819 (any number), ",
                                                 absl::StrJoin(kTrees, ", ")));
}

bool FallsBackToCpu(const std::string& build, const std::string& tree) {
  if (tree != "upstream") return true;
  const int number = BuildNumber(build);
  return number > 0 && number <= kLastOldKernelRule;
}

int64_t LlamaCppCells(const EngineOptions& options, int window, int compress, const KvLoad& load) {
  int64_t tokens = load.context;
  if (options.total_context) {
    if (!options.unified) tokens = RoundUp(tokens, kCellPad) / load.sequences;
  } else if (options.unified) {
    tokens = load.shared_prefix + Product(load.sequences, load.context - load.shared_prefix);
  }
  const int64_t cells = RoundUp(CeilDiv(tokens, compress), kCellPad);
  if (window == 0 || options.swa_full) return cells;
  const int64_t windows = Product(window, options.unified ? load.sequences : 1);
  return RoundUp(std::min(cells, windows + options.ubatch), kCellPad);
}

std::vector<TypePair> LlamaCppPairs(bool forks) {
  std::vector<TypePair> pairs = {{"f16", "f16"},   {"bf16", "bf16"}, {"q8_0", "q8_0"}, {"q5_1", "q5_1"},
                                 {"q5_0", "q5_0"}, {"q4_1", "q4_1"}, {"q4_0", "q4_0"}, {"q8_0", "q4_0"}};
  if (!forks) return pairs;
  for (const TypePair& pair : std::vector<TypePair>{{"q8_0", "turbo4"},
                                                    {"q8_0", "pq4"},
                                                    {"q8_0", "turbo3"},
                                                    {"turbo4", "turbo4"},
                                                    {"turbo3", "turbo3"},
                                                    {"turbo2", "turbo2"},
                                                    {"planar3", "f16"},
                                                    {"planar3", "planar3"}})
    pairs.push_back(pair);
  return pairs;
}

}  // namespace kvtide::planner
