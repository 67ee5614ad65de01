#include "tests/daemon/cache/shadow.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/format/page_codec.h"
#include "kernels/format/profile_maker.h"
#include "kernels/format/tide_maker.h"

namespace kvtide::testing {
namespace {

// Rows of f16, one after another.
void RoundTo(SharedRows& rows, int64_t first, const float* from, size_t row, int64_t tokens) {
  for (int64_t begin = first, end; begin < first + tokens; begin = end) {
    end = SharedRows::BlockEnd(begin, first + tokens);
    float* const to = rows.Change(begin);
    const size_t count = static_cast<size_t>(end - begin) * row;
    for (size_t i = 0; i < count; i++) to[i] = F16ToF32(F32ToF16(from[i]));
    from += count;
  }
}

}  // namespace

ShadowSequence::ShadowSequence(const ModelSpec& model, const SequenceOptions& options)
    : model_(std::make_shared<const ModelSpec>(model)), options_(options) {
  for (const LayerGroupSpec& group : model.groups) {
    const auto heads = static_cast<size_t>(group.shape.kv_heads);
    Group& to = groups_.emplace_back();
    to.layers.resize(static_cast<size_t>(group.shape.layers),
                     {SharedRows(heads * static_cast<size_t>(group.shape.head_dim_k)),
                      SharedRows(heads * static_cast<size_t>(group.shape.head_dim_v))});
    to.profiled.resize(to.layers.size());
    const CacheTypeInfo& keys = Info(options.PairOfGroup(static_cast<int>(groups_.size()) - 1).k);
    if (keys.calibrated || (options.centre == Centre::kCalibrated && keys.storage != Storage::kHalf))
      to.profile = to.calibrated = std::make_shared<const Profile>(
          group.key_transforms.empty()
              ? MakeMeanProfile(group.shape, group.key_means)
              : *MakeCalibratedProfile(group.shape, group.key_means, group.key_transforms));
  }
}

void ShadowSequence::Append(int layer, const std::vector<float>& k, const std::vector<float>& v,
                            int64_t tokens) {
  const LayerSpec& spec = model_->layers[static_cast<size_t>(layer)];
  Group& group = groups_[static_cast<size_t>(spec.group)];
  Layer& to = group.layers[static_cast<size_t>(spec.layer_in_group)];
  const int64_t start = to.tokens();
  to.k.Grow(tokens);
  to.v.Grow(tokens);
  if (tokens > 0) {
    RoundTo(to.k, start, k.data(), k.size() / static_cast<size_t>(tokens), tokens);
    RoundTo(to.v, start, v.data(), v.size() / static_cast<size_t>(tokens), tokens);
  }
  const CachePair pair = options_.PairOfGroup(spec.group);
  if (!options_.seal_at_once || pair == ExactPair()) return;
  const ProfileOptions wanted = ProfileOptionsFor(options_, pair.k);
  if (start == 0 && (wanted.mean || wanted.equalise != Equalise::kNone) &&
      !group.profiled[static_cast<size_t>(spec.layer_in_group)]) {
    const GroupShape& shape = model_->groups[static_cast<size_t>(spec.group)].shape;
    const auto heads = static_cast<size_t>(shape.kv_heads), dim = static_cast<size_t>(shape.head_dim_k);
    auto profile =
        group.profile != nullptr ? std::make_shared<Profile>(*group.profile) : std::make_shared<Profile>();
    profile->shape = shape;
    profile->k.resize(group.layers.size() * heads);
    for (size_t h = 0; h < heads; h++)
      profile->k[static_cast<size_t>(spec.layer_in_group) * heads + h] =
          MakeKeyProfile(k.data() + h * dim, static_cast<int>(std::min<int64_t>(tokens, kBlockTokens)),
                         heads * dim, shape.head_dim_k, wanted);
    group.profile = profile;
    group.profiled[static_cast<size_t>(spec.layer_in_group)] = true;
  }
  for (int64_t begin = start, end; begin < to.tokens(); begin = end) {
    end = SharedRows::BlockEnd(begin, to.tokens());
    CodeRows(static_cast<size_t>(spec.group), static_cast<size_t>(spec.layer_in_group), pair, begin,
             end - begin);
  }
}

void ShadowSequence::CodeRows(size_t g, size_t l, CachePair pair, int64_t first_token, int64_t tokens,
                              const CachePair* from) {
  Group& group = groups_[g];
  const GroupShape& shape = model_->groups[g].shape;
  const auto heads = static_cast<size_t>(shape.kv_heads);
  for (size_t h = 0; h < heads; h++)
    for (const Side side : {Side::kKey, Side::kValue}) {
      const bool key = side == Side::kKey;
      const CacheType type = key ? pair.k : pair.v;
      if (from != nullptr && type == (key ? from->k : from->v)) continue;
      const auto dim = static_cast<size_t>(key ? shape.head_dim_k : shape.head_dim_v);
      SharedRows& values = key ? group.layers[l].k : group.layers[l].v;
      const HeadProfile* profile = key && group.profile != nullptr
                                       ? &group.profile->key(static_cast<int>(l), static_cast<int>(h))
                                       : nullptr;
      const HalfLayout layout = MakeHalfLayout(type, static_cast<int>(dim));
      std::vector<float> rows(static_cast<size_t>(kBlockTokens) * dim);
      float* const head = values.Change(first_token) + h * dim;
      for (size_t t = 0; t < static_cast<size_t>(tokens); t++)
        std::copy_n(head + t * heads * dim, dim, rows.begin() + static_cast<std::ptrdiff_t>(t * dim));
      std::vector<std::byte> half(layout.bytes);
      EncodeHalf(type, side, layout, profile, first_token, rows.data(), static_cast<int>(tokens),
                 half.data());
      DecodeHalf(type, side, layout, profile, first_token, half.data(), rows.data());
      for (size_t t = 0; t < static_cast<size_t>(tokens); t++)
        std::copy_n(rows.begin() + static_cast<std::ptrdiff_t>(t * dim), dim, head + t * heads * dim);
    }
}

void ShadowSequence::Settle(std::span<const DeferredBlocks> deferred, bool lost) {
  const ExactWindow exact = options_.EffectiveWindow();
  for (size_t g = 0; g < groups_.size(); g++) {
    Group& group = groups_[g];
    int64_t tokens = group.layers.front().tokens(), most = 0;
    for (const Layer& layer : group.layers) {
      tokens = std::min(tokens, layer.tokens());
      most = std::max(most, layer.tokens());
    }
    group.coded.resize(static_cast<size_t>((most + kBlockTokens - 1) / kBlockTokens), false);
    const int64_t full = tokens / kBlockTokens;
    const CachePair pair = options_.PairOfGroup(static_cast<int>(g));
    const ProfileOptions profile = ProfileOptionsFor(options_, pair.k);
    if (!options_.seal_at_once && pair != ExactPair() && full > 0 && group.profile == nullptr &&
        (profile.mean || profile.equalise != Equalise::kNone)) {
      std::vector<const float*> keys;
      for (const Layer& layer : group.layers) keys.push_back(layer.k.At(group.first_block * kBlockTokens));
      group.profile =
          std::make_shared<const Profile>(MakeProfile(model_->groups[g].shape, keys, kBlockTokens, profile));
      group.other_profile = lost;
    }
    group.first_block = std::max(group.first_block, FirstLiveBlock(tokens, model_->groups[g].window));
    if (pair == ExactPair()) continue;
    for (int64_t block = group.first_block; block < full; block++) {
      if (IsExactBlock(block, full, exact) || group.coded[static_cast<size_t>(block)]) continue;
      if (std::any_of(deferred.begin(), deferred.end(), [&](const DeferredBlocks& blocks) {
            return static_cast<size_t>(blocks.group) == g && block >= blocks.first && block < blocks.end;
          }))
        continue;
      group.coded[static_cast<size_t>(block)] = true;
      for (size_t l = 0; !options_.seal_at_once && l < group.layers.size(); l++)
        CodeRows(g, l, pair, block * kBlockTokens, kBlockTokens);
    }
  }
}

void ShadowSequence::Degrade(std::span<const DegradedBlocks> degraded) {
  for (const DegradedBlocks& blocks : degraded) {
    const auto g = static_cast<size_t>(blocks.group);
    const GroupShape& shape = model_->groups[g].shape;
    Group& group = groups_[g];
    std::vector<CachePair> ladder;  // that the blocks have gone down
    size_t bytes = BlockLayout(shape, options_.PairOfGroup(blocks.group)).block_bytes();
    for (const CachePair& rung : options_.degrade) {
      const size_t of_rung = BlockLayout(shape, rung).block_bytes();
      if (of_rung >= bytes) continue;
      bytes = of_rung;
      ladder.push_back(rung);
      if (rung == blocks.pair) break;
    }
    KVTIDE_CHECK(!ladder.empty() && ladder.back() == blocks.pair);
    for (int64_t block = blocks.first; block < blocks.end; block++) {
      KVTIDE_CHECK(group.coded[static_cast<size_t>(block)], "block ", block, " is exact and was recoded");
      std::vector<CachePair>& became = group.degraded[block];
      for (size_t rung = became.size(); rung < ladder.size(); rung++) {
        const CachePair from = rung == 0 ? options_.PairOfGroup(blocks.group) : ladder[rung - 1];
        for (size_t l = 0; l < group.layers.size(); l++)
          CodeRows(g, l, ladder[rung], block * kBlockTokens, kBlockTokens, &from);
        became.push_back(ladder[rung]);
      }
    }
  }
}

void ShadowSequence::Truncate(int64_t tokens) {
  for (size_t g = 0; g < groups_.size(); g++) {
    Group& group = groups_[g];
    for (Layer& layer : group.layers) {
      layer.k.Truncate(tokens);
      layer.v.Truncate(tokens);
    }
    const int64_t tail = tokens / kBlockTokens;
    group.coded.resize(static_cast<size_t>((tokens + kBlockTokens - 1) / kBlockTokens), false);
    group.degraded.erase(group.degraded.lower_bound(tail), group.degraded.end());
    if (tokens % kBlockTokens != 0 && group.coded[static_cast<size_t>(tail)]) {
      group.coded[static_cast<size_t>(tail)] = false;  // decoded values become f16 rows
      const GroupShape& shape = model_->groups[g].shape;
      for (Layer& layer : group.layers)
        for (const auto& [rows, dim] :
             {std::pair{&layer.k, shape.head_dim_k}, std::pair{&layer.v, shape.head_dim_v}}) {
          const int64_t first = tail * kBlockTokens;
          if (rows->tokens() <= first) continue;
          float* const values = rows->Change(first);
          const auto count =
              static_cast<size_t>((rows->tokens() - first) * int64_t{shape.kv_heads} * int64_t{dim});
          for (size_t i = 0; i < count; i++) values[i] = F16ToF32(F32ToF16(values[i]));
        }
    }
    if (tokens == 0) group.first_block = 0;
    bool any = false;
    for (size_t b = static_cast<size_t>(group.first_block); b < group.coded.size(); b++)
      any = any || group.coded[b];
    if (any) continue;
    group.profile = group.calibrated;
    group.other_profile = false;
    std::fill(group.profiled.begin(), group.profiled.end(), false);
  }
}

std::vector<float> ShadowSequence::Keys(int layer, int64_t first, int64_t tokens) const {
  return RowsOf(layer).k.Read(first, tokens);
}

std::vector<float> ShadowSequence::Values(int layer, int64_t first, int64_t tokens) const {
  return RowsOf(layer).v.Read(first, tokens);
}

const ShadowSequence::Layer& ShadowSequence::RowsOf(int layer) const {
  const LayerSpec& spec = model_->layers[static_cast<size_t>(layer)];
  return groups_[static_cast<size_t>(spec.group)].layers[static_cast<size_t>(spec.layer_in_group)];
}

bool ShadowSequence::KnowsKeys(int layer) const {
  return !groups_[static_cast<size_t>(model_->layers[static_cast<size_t>(layer)].group)].other_profile;
}

int64_t ShadowSequence::LayerLength(int layer) const { return RowsOf(layer).tokens(); }

int64_t ShadowSequence::Length() const {
  int64_t tokens = std::numeric_limits<int64_t>::max();
  for (size_t l = 0; l < model_->layers.size(); l++)
    tokens = std::min(tokens, LayerLength(static_cast<int>(l)));
  return tokens;
}

int64_t ShadowSequence::FirstLiveToken(int layer) const {
  return groups_[static_cast<size_t>(model_->layers[static_cast<size_t>(layer)].group)].first_block *
         kBlockTokens;
}

uint64_t ShadowSequence::BytesAtRest() const {
  uint64_t bytes = 0;
  for (size_t g = 0; g < groups_.size(); g++) {
    const BlockLayout exact(model_->groups[g].shape, ExactPair());
    const CachePair pair = options_.PairOfGroup(static_cast<int>(g));
    const BlockLayout coded(model_->groups[g].shape, pair);
    const bool twins =
        options_.seal_at_once && pair != ExactPair();  // a coded block that is not full keeps its f16 twin
    for (size_t b = static_cast<size_t>(groups_[g].first_block); b < groups_[g].coded.size(); b++)
      if (const auto found = groups_[g].degraded.find(static_cast<int64_t>(b));
          found != groups_[g].degraded.end())
        bytes += BlockLayout(model_->groups[g].shape, found->second.back()).block_bytes();
      else
        bytes += groups_[g].coded[b] ? coded.block_bytes()
                                     : exact.block_bytes() + (twins ? coded.block_bytes() : 0);
  }
  return bytes;
}

uint64_t ShadowSequence::coded_blocks() const {
  uint64_t blocks = 0;
  for (const Group& group : groups_)
    for (size_t b = static_cast<size_t>(group.first_block); b < group.coded.size(); b++)
      blocks += group.coded[b] ? 1 : 0;
  return blocks;
}

AttentionResult ShadowSequence::Attend(int layer, const std::vector<float>& q, int64_t queries,
                                       int64_t first_position, bool causal, int64_t window,
                                       const float* sinks) const {
  const LayerGroupSpec& group =
      model_->groups[static_cast<size_t>(model_->layers[static_cast<size_t>(layer)].group)];
  const Layer& rows = RowsOf(layer);
  DenseAttention attention;
  attention.heads = group.heads;
  attention.kv_heads = group.shape.kv_heads;
  attention.dim_k = group.shape.head_dim_k;
  attention.dim_v = group.shape.head_dim_v;
  attention.scale = group.scale > 0 ? static_cast<double>(group.scale)
                                    : 1.0 / std::sqrt(static_cast<double>(group.shape.head_dim_k));
  attention.softcap = static_cast<double>(group.softcap);
  attention.window = window == 0 ? group.window : window;
  attention.causal = causal;
  attention.sinks = sinks;
  return AttendDense(attention, rows.k.Blocks(), rows.v.Blocks(), rows.tokens(), q.data(), queries,
                     first_position);
}

std::string Difference(const AttentionResult& expected, const std::vector<float>& out,
                       const std::vector<float>& lse, double tolerance) {
  if (expected.out.size() != out.size() || expected.lse.size() != lse.size()) return "sizes differ";
  double error = 0, norm = 0;
  for (size_t i = 0; i < out.size(); i++) {
    const double difference = static_cast<double>(out[i]) - static_cast<double>(expected.out[i]);
    error += difference * difference;
    norm += static_cast<double>(expected.out[i]) * static_cast<double>(expected.out[i]);
  }
  if (!(std::sqrt(error) <= tolerance * std::sqrt(norm) + 1e-6))
    return absl::StrCat("outputs of size ", std::sqrt(norm), " differ by ", std::sqrt(error));
  for (size_t i = 0; i < lse.size(); i++)
    if (std::isinf(expected.lse[i]) ? lse[i] != expected.lse[i]
                                    : !(std::fabs(lse[i] - expected.lse[i]) <= static_cast<float>(tolerance)))
      return absl::StrCat("the log-sum-exp of row ", i, " is ", lse[i], ", expected ", expected.lse[i]);
  return "";
}

}  // namespace kvtide::testing
