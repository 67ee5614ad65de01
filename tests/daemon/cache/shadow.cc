#include "tests/daemon/cache/shadow.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/format/page_codec.h"
#include "kernels/format/profile_maker.h"
#include "kernels/format/tide_maker.h"

namespace kvtide::testing {
namespace {

// Eight sums at a time: one alone waits for each addition, and half of a simulation's time went there.
double Dot(const float* a, const float* b, size_t count) {
  std::array<double, 8> sums{};
  size_t d = 0;
  for (; d + sums.size() <= count; d += sums.size())
    for (size_t i = 0; i < sums.size(); i++)
      sums[i] += static_cast<double>(a[d + i]) * static_cast<double>(b[d + i]);
  for (; d < count; d++) sums[0] += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace

ShadowSequence::ShadowSequence(const ModelSpec& model, const SequenceOptions& options)
    : model_(model), options_(options) {
  for (const LayerGroupSpec& group : model.groups) {
    Group& to = groups_.emplace_back();
    to.layers.resize(static_cast<size_t>(group.shape.layers));
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
  const LayerSpec& spec = model_.layers[static_cast<size_t>(layer)];
  Group& group = groups_[static_cast<size_t>(spec.group)];
  Layer& to = group.layers[static_cast<size_t>(spec.layer_in_group)];
  const int64_t start = to.tokens;
  for (const float x : k) to.k.push_back(F16ToF32(F32ToF16(x)));
  for (const float x : v) to.v.push_back(F16ToF32(F32ToF16(x)));
  to.tokens += tokens;
  const CachePair pair = options_.PairOfGroup(spec.group);
  if (!options_.seal_at_once || pair == ExactPair()) return;
  const ProfileOptions wanted = ProfileOptionsFor(options_, pair.k);
  if (start == 0 && (wanted.mean || wanted.equalise != Equalise::kNone) &&
      !group.profiled[static_cast<size_t>(spec.layer_in_group)]) {
    const GroupShape& shape = model_.groups[static_cast<size_t>(spec.group)].shape;
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
  for (int64_t begin = start; begin < to.tokens; begin += kBlockTokens)
    CodeRows(static_cast<size_t>(spec.group), static_cast<size_t>(spec.layer_in_group), begin,
             std::min<int64_t>(kBlockTokens, to.tokens - begin));
}

void ShadowSequence::CodeRows(size_t g, size_t l, int64_t first_token, int64_t tokens) {
  Group& group = groups_[g];
  const GroupShape& shape = model_.groups[g].shape;
  const CachePair pair = options_.PairOfGroup(static_cast<int>(g));
  const auto heads = static_cast<size_t>(shape.kv_heads);
  for (size_t h = 0; h < heads; h++)
    for (const Side side : {Side::kKey, Side::kValue}) {
      const bool key = side == Side::kKey;
      const CacheType type = key ? pair.k : pair.v;
      const auto dim = static_cast<size_t>(key ? shape.head_dim_k : shape.head_dim_v);
      std::vector<float>& values = key ? group.layers[l].k : group.layers[l].v;
      const HeadProfile* profile = key && group.profile != nullptr
                                       ? &group.profile->key(static_cast<int>(l), static_cast<int>(h))
                                       : nullptr;
      const HalfLayout layout = MakeHalfLayout(type, static_cast<int>(dim));
      std::vector<float> rows(static_cast<size_t>(kBlockTokens) * dim);
      const auto at = [&](size_t token) {
        return values.begin() +
               static_cast<std::ptrdiff_t>(((static_cast<size_t>(first_token) + token) * heads + h) * dim);
      };
      for (size_t t = 0; t < static_cast<size_t>(tokens); t++)
        std::copy_n(at(t), dim, rows.begin() + static_cast<std::ptrdiff_t>(t * dim));
      std::vector<std::byte> half(layout.bytes);
      EncodeHalf(type, side, layout, profile, first_token, rows.data(), static_cast<int>(tokens),
                 half.data());
      DecodeHalf(type, side, layout, profile, first_token, half.data(), rows.data());
      for (size_t t = 0; t < static_cast<size_t>(tokens); t++)
        std::copy_n(rows.begin() + static_cast<std::ptrdiff_t>(t * dim), dim, at(t));
    }
}

void ShadowSequence::Settle(std::span<const DeferredBlocks> deferred, bool lost) {
  const ExactWindow exact = options_.EffectiveWindow();
  for (size_t g = 0; g < groups_.size(); g++) {
    Group& group = groups_[g];
    int64_t tokens = group.layers.front().tokens, most = 0;
    for (const Layer& layer : group.layers) {
      tokens = std::min(tokens, layer.tokens);
      most = std::max(most, layer.tokens);
    }
    group.coded.resize(static_cast<size_t>((most + kBlockTokens - 1) / kBlockTokens), false);
    const int64_t full = tokens / kBlockTokens;
    const CachePair pair = options_.PairOfGroup(static_cast<int>(g));
    const ProfileOptions profile = ProfileOptionsFor(options_, pair.k);
    if (!options_.seal_at_once && pair != ExactPair() && full > 0 && group.profile == nullptr &&
        (profile.mean || profile.equalise != Equalise::kNone)) {
      std::vector<const float*> keys;
      const GroupShape& shape = model_.groups[g].shape;
      const auto row = static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(shape.head_dim_k);
      for (const Layer& layer : group.layers)
        keys.push_back(layer.k.data() + static_cast<size_t>(group.first_block * kBlockTokens) * row);
      group.profile = std::make_shared<const Profile>(MakeProfile(shape, keys, kBlockTokens, profile));
      group.other_profile = lost;
    }
    group.first_block = std::max(group.first_block, FirstLiveBlock(tokens, model_.groups[g].window));
    if (pair == ExactPair()) continue;
    for (int64_t block = group.first_block; block < full; block++) {
      if (IsExactBlock(block, full, exact) || group.coded[static_cast<size_t>(block)]) continue;
      if (std::any_of(deferred.begin(), deferred.end(), [&](const DeferredBlocks& blocks) {
            return static_cast<size_t>(blocks.group) == g && block >= blocks.first && block < blocks.end;
          }))
        continue;
      group.coded[static_cast<size_t>(block)] = true;
      for (size_t l = 0; !options_.seal_at_once && l < group.layers.size(); l++)
        CodeRows(g, l, block * kBlockTokens, kBlockTokens);
    }
  }
}

void ShadowSequence::Truncate(int64_t tokens) {
  for (size_t g = 0; g < groups_.size(); g++) {
    Group& group = groups_[g];
    const GroupShape& shape = model_.groups[g].shape;
    for (Layer& layer : group.layers) {
      layer.tokens = std::min(layer.tokens, tokens);
      layer.k.resize(static_cast<size_t>(layer.tokens * shape.kv_heads * shape.head_dim_k));
      layer.v.resize(static_cast<size_t>(layer.tokens * shape.kv_heads * shape.head_dim_v));
    }
    const int64_t tail = tokens / kBlockTokens;
    group.coded.resize(static_cast<size_t>((tokens + kBlockTokens - 1) / kBlockTokens), false);
    if (tokens % kBlockTokens != 0 && group.coded[static_cast<size_t>(tail)]) {
      group.coded[static_cast<size_t>(tail)] = false;  // decoded values become f16 rows
      for (Layer& layer : group.layers) {
        const auto from_k = static_cast<size_t>(tail * kBlockTokens * shape.kv_heads * shape.head_dim_k);
        const auto from_v = static_cast<size_t>(tail * kBlockTokens * shape.kv_heads * shape.head_dim_v);
        for (size_t i = from_k; i < layer.k.size(); i++) layer.k[i] = F16ToF32(F32ToF16(layer.k[i]));
        for (size_t i = from_v; i < layer.v.size(); i++) layer.v[i] = F16ToF32(F32ToF16(layer.v[i]));
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
  const LayerSpec& spec = model_.layers[static_cast<size_t>(layer)];
  const GroupShape& shape = model_.groups[static_cast<size_t>(spec.group)].shape;
  const int64_t row = int64_t{shape.kv_heads} * shape.head_dim_k;
  const std::vector<float>& k =
      groups_[static_cast<size_t>(spec.group)].layers[static_cast<size_t>(spec.layer_in_group)].k;
  return {k.begin() + first * row, k.begin() + (first + tokens) * row};
}

std::vector<float> ShadowSequence::Values(int layer, int64_t first, int64_t tokens) const {
  const LayerSpec& spec = model_.layers[static_cast<size_t>(layer)];
  const GroupShape& shape = model_.groups[static_cast<size_t>(spec.group)].shape;
  const int64_t row = int64_t{shape.kv_heads} * shape.head_dim_v;
  const std::vector<float>& v =
      groups_[static_cast<size_t>(spec.group)].layers[static_cast<size_t>(spec.layer_in_group)].v;
  return {v.begin() + first * row, v.begin() + (first + tokens) * row};
}

bool ShadowSequence::KnowsKeys(int layer) const {
  return !groups_[static_cast<size_t>(model_.layers[static_cast<size_t>(layer)].group)].other_profile;
}

int64_t ShadowSequence::LayerLength(int layer) const {
  const LayerSpec& spec = model_.layers[static_cast<size_t>(layer)];
  return groups_[static_cast<size_t>(spec.group)].layers[static_cast<size_t>(spec.layer_in_group)].tokens;
}

int64_t ShadowSequence::Length() const {
  int64_t tokens = std::numeric_limits<int64_t>::max();
  for (size_t l = 0; l < model_.layers.size(); l++)
    tokens = std::min(tokens, LayerLength(static_cast<int>(l)));
  return tokens;
}

int64_t ShadowSequence::FirstLiveToken(int layer) const {
  return groups_[static_cast<size_t>(model_.layers[static_cast<size_t>(layer)].group)].first_block *
         kBlockTokens;
}

uint64_t ShadowSequence::BytesAtRest() const {
  uint64_t bytes = 0;
  for (size_t g = 0; g < groups_.size(); g++) {
    const BlockLayout exact(model_.groups[g].shape, ExactPair());
    const CachePair pair = options_.PairOfGroup(static_cast<int>(g));
    const BlockLayout coded(model_.groups[g].shape, pair);
    const bool twins =
        options_.seal_at_once && pair != ExactPair();  // a coded block that is not full keeps its f16 twin
    for (size_t b = static_cast<size_t>(groups_[g].first_block); b < groups_[g].coded.size(); b++)
      bytes +=
          groups_[g].coded[b] ? coded.block_bytes() : exact.block_bytes() + (twins ? coded.block_bytes() : 0);
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
  const LayerSpec& spec = model_.layers[static_cast<size_t>(layer)];
  const LayerGroupSpec& group = model_.groups[static_cast<size_t>(spec.group)];
  const Layer& rows =
      groups_[static_cast<size_t>(spec.group)].layers[static_cast<size_t>(spec.layer_in_group)];
  const GroupShape& shape = group.shape;
  const auto heads = static_cast<size_t>(group.heads), kv_heads = static_cast<size_t>(shape.kv_heads),
             dim_k = static_cast<size_t>(shape.head_dim_k), dim_v = static_cast<size_t>(shape.head_dim_v);
  if (window == 0) window = group.window;
  const double scale = group.scale > 0 ? group.scale : 1.0 / std::sqrt(static_cast<double>(dim_k));
  AttentionResult result;
  result.out.resize(static_cast<size_t>(queries) * heads * dim_v);
  result.lse.resize(static_cast<size_t>(queries) * heads);
  for (size_t i = 0; i < static_cast<size_t>(queries); i++)
    for (size_t h = 0; h < heads; h++) {
      const int64_t position = first_position + static_cast<int64_t>(i);
      const int64_t end = causal ? std::min(rows.tokens, position + 1) : rows.tokens;
      const int64_t begin = window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
      const size_t kv_head = h / (heads / kv_heads);
      std::vector<double> logits;
      double largest = sinks != nullptr ? sinks[h] : -std::numeric_limits<double>::infinity();
      for (int64_t t = begin; t < end; t++) {
        const float* key = rows.k.data() + (static_cast<size_t>(t) * kv_heads + kv_head) * dim_k;
        double dot = Dot(q.data() + (i * heads + h) * dim_k, key, dim_k) * scale;
        if (group.softcap > 0) dot = group.softcap * std::tanh(dot / group.softcap);
        logits.push_back(dot);
        largest = std::max(largest, dot);
      }
      if (largest == -std::numeric_limits<double>::infinity()) {
        result.lse[i * heads + h] = -std::numeric_limits<float>::infinity();
        continue;
      }
      double sum = sinks != nullptr ? std::exp(sinks[h] - largest) : 0;
      std::vector<double> out(dim_v);
      for (size_t j = 0; j < logits.size(); j++) {
        const double weight = std::exp(logits[j] - largest);
        sum += weight;
        const float* value = rows.v.data() + ((static_cast<size_t>(begin) + j) * kv_heads + kv_head) * dim_v;
        for (size_t d = 0; d < dim_v; d++) out[d] += weight * static_cast<double>(value[d]);
      }
      for (size_t d = 0; d < dim_v; d++)
        result.out[(i * heads + h) * dim_v + d] = static_cast<float>(out[d] / sum);
      result.lse[i * heads + h] = static_cast<float>(largest + std::log(sum));
    }
  return result;
}

std::string Difference(const AttentionResult& expected, const std::vector<float>& out,
                       const std::vector<float>& lse) {
  if (expected.out.size() != out.size() || expected.lse.size() != lse.size()) return "sizes differ";
  double error = 0, norm = 0;
  for (size_t i = 0; i < out.size(); i++) {
    const double difference = static_cast<double>(out[i]) - static_cast<double>(expected.out[i]);
    error += difference * difference;
    norm += static_cast<double>(expected.out[i]) * static_cast<double>(expected.out[i]);
  }
  if (!(std::sqrt(error) <= 3e-3 * std::sqrt(norm) + 1e-6))
    return absl::StrCat("outputs of size ", std::sqrt(norm), " differ by ", std::sqrt(error));
  for (size_t i = 0; i < lse.size(); i++)
    if (std::isinf(expected.lse[i]) ? lse[i] != expected.lse[i]
                                    : !(std::fabs(lse[i] - expected.lse[i]) <= 3e-3f))
      return absl::StrCat("the log-sum-exp of row ", i, " is ", lse[i], ", expected ", expected.lse[i]);
  return "";
}

}  // namespace kvtide::testing
