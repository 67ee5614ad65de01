#include "planner/engines/compressed_latents.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::planner {
namespace {

constexpr int64_t kRecordBytes = 584;
constexpr int64_t kPageAlignment = 576;  // of FlashMLA's pages
constexpr int kShort = 4, kLong = 128;   // tokens per latent

int64_t PageBytes(int64_t bytes) { return RoundUp(bytes, kPageAlignment); }

// What the groups of such a model come to.
struct Shape {
  int64_t layers = 0;  // all of them keep a window
  int64_t shorts = 0;  // one latent per 4 tokens, with an indexer
  int64_t longs = 0;   // one per 128
  int64_t window = 0;
  int64_t width = 0;      // of a latent
  int64_t index_dim = 0;  // of an indexer's key
};

absl::StatusOr<Shape> ShapeOf(const std::vector<LayerGroup>& groups) {
  Shape shape;
  for (const LayerGroup& group : groups) {
    const auto layers = static_cast<int64_t>(group.layers.size());
    if (group.kind == LayerKind::kRecurrent) continue;  // their sizes follow from the widths
    if (group.kind != LayerKind::kMla ||
        (group.compress != 1 && group.compress != kShort && group.compress != kLong)) {
      return absl::UnimplementedError(absl::StrCat("compressed latents beside ", LayerKindName(group.kind),
                                                   " layers, or one for ", group.compress,
                                                   " tokens: how servers size such a cache is not known"));
    }
    if (group.index_keys) {
      shape.index_dim = group.head_dim_k;
    } else if (group.window > 0) {
      shape.layers += layers;
      shape.window = group.window;
      shape.width = group.head_dim_k;
    } else {
      (group.compress == kShort ? shape.shorts : shape.longs) += layers;
    }
  }
  return shape;
}

// One key of an indexer: FP8 and an f32 scale per 128 values.
int64_t IndexKeyBytes(const Shape& shape) { return shape.index_dim + CeilDiv(shape.index_dim, 128) * 4; }

// What both engines store per entry, for the bytes that a step reads.
class Latents : public KvSizer {
 protected:
  Latents(const EngineOptions& options, const Shape& shape, const std::vector<LayerGroup>& groups)
      : options_(options), shape_(shape) {
    effective_ = CompressedLatentPair();
    for (const LayerGroup& group : groups) {
      StoredGroup stored;
      stored.group = group;
      stored.group.layers.clear();
      stored.layers = static_cast<int64_t>(group.layers.size());
      if (group.kind != LayerKind::kRecurrent)
        stored.k_token_bytes = stored.layers * (group.index_keys ? IndexKeyBytes(shape) : kRecordBytes);
      groups_.push_back(stored);
    }
  }

  const EngineOptions options_;
  const Shape shape_;
};

// vLLM packs kinds of layers into groups that share one pool of blocks; a block is as large as the largest
// group. Its planner, for this model: full latents and indexer keys whole, windows and states of the short
// latents split into as many repeats as cost the least padding.
class VllmLatents : public Latents {
 public:
  VllmLatents(const EngineOptions& options, const Shape& shape, const std::vector<LayerGroup>& groups)
      : Latents(options, shape, groups) {
    const int64_t latents = PageBytes(kBlock / kShort * kRecordBytes);
    const int64_t keys = PageBytes(kBlock / kShort * IndexKeyBytes(shape));
    const int64_t longs = PageBytes(CeilDiv(kBlock, kLong) * kRecordBytes);
    const int64_t windows = PageBytes(kWindowBlock * kRecordBytes);
    const int64_t short_state = PageBytes(kShortStateBlock * 2 * 2 * shape.width * 4);
    const int64_t key_state = PageBytes(kShortStateBlock * 2 * 2 * shape.index_dim * 4);
    const int64_t long_state = PageBytes(kLongStateBlock * 2 * shape.width * 4);
    const int64_t repeats = Repeats();
    window_groups_ = CeilDiv(shape.layers, repeats);
    block_bytes_ = std::max({shape.shorts * (latents + keys) + shape.longs * longs,
                             CeilDiv(shape.layers, window_groups_) * windows,
                             shape.shorts * (short_state + key_state), shape.longs * long_state});
    rewrites_.push_back("vLLM keeps these latents as fp8 records of 584 bytes in blocks of 256 tokens");
  }

  KvBytes Bytes(const KvLoad& load) const override {
    const Blocks blocks = BlocksOf(load.context);
    KvBytes bytes;
    const int64_t full =
        Sum(Product(load.sequences, blocks.full), -Product(load.sequences - 1, load.shared_prefix / kBlock));
    bytes.latent = Product(Sum(full, Product(load.sequences, blocks.windows)), block_bytes_);
    bytes.recurrent = Product(load.sequences, blocks.states, block_bytes_);
    return bytes;
  }

  std::vector<std::string> Explain(const KvLoad& load) const override {
    const Blocks blocks = BlocksOf(load.context);
    return {absl::StrCat("pool block = ", block_bytes_, " B, the largest group: ", shape_.shorts,
                         " layers with one latent per 4 tokens and an indexer, ", shape_.longs,
                         " with one per 128, ", shape_.layers, " windows in ", window_groups_, " groups"),
            absl::StrCat("one request: ", blocks.full, " blocks of ", kBlock, " tokens + ", blocks.windows,
                         " of windows + ", blocks.states,
                         " of compressor states = ", blocks.full + blocks.windows + blocks.states,
                         " blocks = ", Product(blocks.full + blocks.windows + blocks.states, block_bytes_),
                         " B; ", load.sequences, " requests")};
  }

 private:
  static constexpr int64_t kBlock = 256, kWindowBlock = 64, kShortStateBlock = 4, kLongStateBlock = 8;

  struct Blocks {
    int64_t full = 0, windows = 0, states = 0;
  };

  Blocks BlocksOf(int64_t context) const {
    const auto window = [&](int64_t tokens, int64_t block) {
      return CeilDiv(std::min<int64_t>(tokens - 1 + options_.max_batched_tokens, context), block) + 1;
    };
    Blocks blocks;
    blocks.full = CeilDiv(context, kBlock);
    blocks.windows = window_groups_ * window(shape_.window, kWindowBlock);
    blocks.states = (shape_.shorts > 0 ? window(2 * kShort, kShortStateBlock) : 0) +
                    (shape_.longs > 0 ? window(kLong, kLongStateBlock) : 0);
    return blocks;
  }

  // The number of layers per group that pads the counts of windows and states least; not below that of the
  // short latents' states, which stay together. Of equals the largest.
  int64_t Repeats() const {
    const int64_t least = std::max<int64_t>(1, shape_.shorts);
    int64_t best = least, best_pad = INT64_MAX;
    for (int64_t d = least; d <= std::max(least, shape_.layers); ++d) {
      int64_t pad = 0;
      for (const int64_t count : {shape_.layers, shape_.shorts, shape_.longs})
        pad += count > 0 ? RoundUp(count, d) - count : 0;
      if (pad <= best_pad) best = d, best_pad = pad;
    }
    return best;
  }

  int64_t window_groups_ = 1;
  int64_t block_bytes_ = 0;
};

// SGLang: a pool of compressed latents by tokens, one of windows by requests with room for cached prefixes,
// and rings of states.
class SglangLatents : public Latents {
 public:
  SglangLatents(const EngineOptions& options, const Shape& shape, const std::vector<LayerGroup>& groups)
      : Latents(options, shape, groups) {
    rewrites_.push_back("SGLang keeps these latents as fp8 records of 584 bytes in pages of 256 tokens");
  }

  KvBytes Bytes(const KvLoad& load) const override {
    KvBytes bytes;
    bytes.latent = TokenBytes(Tokens(load));
    bytes.sliding = Product(WindowTokens(load), PageOf(kPage) * shape_.layers) / kPage;
    bytes.recurrent = StateBytes(load);
    return bytes;
  }

  std::vector<std::string> Explain(const KvLoad& load) const override {
    const KvBytes bytes = Bytes(load);
    return {absl::StrCat("pool of ", Tokens(load), " tokens: latents per 4 tokens with indexer keys in ",
                         shape_.shorts, " layers, per 128 in ", shape_.longs, " = ", bytes.latent, " B"),
            absl::StrCat("windows of ", shape_.layers, " layers: ", WindowTokens(load),
                         " tokens for requests, chunks and cached prefixes = ", bytes.sliding, " B"),
            absl::StrCat("compressor states = ", bytes.recurrent, " B")};
  }

 private:
  static constexpr int64_t kPage = 256;
  static constexpr int64_t kEvictionInterval = 128, kPrefixTails = 4, kShortRing = 8, kLongRing = 128;
  static constexpr int64_t kDefaultChunk = 8192;

  static int64_t PageOf(int64_t records) { return PageBytes(records * kRecordBytes); }

  static int64_t Tokens(const KvLoad& load) {
    return Sum(Product(load.sequences, RoundUp(load.context, kPage)),
               -Product(load.sequences - 1, load.shared_prefix / kPage * kPage));
  }

  int64_t TokenBytes(int64_t tokens) const {
    const int64_t pages = CeilDiv(tokens, kPage);
    const int64_t shorts = PageOf(kPage / kShort) + kPage / kShort * IndexKeyBytes(shape_);
    return Product(pages, Sum(Product(shape_.shorts, shorts), Product(shape_.longs, PageOf(kPage / kLong))));
  }

  int64_t WindowTokens(const KvLoad& load) const {
    const int64_t chunk = options_.chunked_prefill > 0 ? options_.chunked_prefill : kDefaultChunk;
    const int64_t request = shape_.window + kEvictionInterval + 2 * kPage;
    const int64_t tails = Product(kPrefixTails, load.sequences, shape_.window + kPage);
    return RoundUp(Sum(Product(request, load.sequences), 2 * chunk + kPage, tails), kPage);
  }

  // Pairs of key and score in f32: of short latents a ring per page of the windows, of long ones per request.
  int64_t StateBytes(const KvLoad& load) const {
    const int64_t shorts = Product(WindowTokens(load) / kPage * kShortRing,
                                   2 * 2 * (shape_.width + shape_.index_dim) * 4, shape_.shorts);
    const int64_t rows = RoundUp(Sum(Product(load.sequences + 1, kLongRing), kLongRing + 1), kLong);
    return Sum(shorts, shape_.longs > 0 ? Product(rows, 2 * shape_.width * 4, shape_.longs) : 0);
  }
};

}  // namespace

bool HasCompressedLatents(const std::vector<LayerGroup>& groups) {
  return std::any_of(groups.begin(), groups.end(),
                     [](const LayerGroup& group) { return group.compress > 1; });
}

absl::StatusOr<std::unique_ptr<KvSizer>> MakeCompressedLatentSizer(const EngineOptions& options,
                                                                   const std::vector<LayerGroup>& groups,
                                                                   const TypePair& pair) {
  if (options.engine != Engine::kVllm && options.engine != Engine::kSglang) {
    return absl::UnimplementedError(absl::StrCat(
        EngineName(options.engine),
        " has no cache for compressed latents (DeepSeek V4); engines that have: llama.cpp, vllm, sglang"));
  }
  if (!(pair == CompressedLatentPair())) {
    return absl::InvalidArgumentError(
        absl::StrCat(EngineName(options.engine), " keeps the latents of DeepSeek V4 as fp8 records; ",
                     pair.Name(), " is no choice, only ", CompressedLatentPair().Name()));
  }
  KVTIDE_ASSIGN_OR_RETURN(const Shape shape, ShapeOf(groups));
  if (options.engine == Engine::kVllm) return std::make_unique<VllmLatents>(options, shape, groups);
  return std::make_unique<SglangLatents>(options, shape, groups);
}

}  // namespace kvtide::planner
