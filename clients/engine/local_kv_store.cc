#include "clients/engine/local_kv_store.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "clients/engine/panel_matmul.h"
#include "clients/engine/vector_math.h"
#include "kernels/base/check.h"
#include "kernels/base/float16.h"
#include "kernels/base/status.h"

namespace kvtide::engine {
namespace {

constexpr int kPageTokens = 64;
constexpr int kPagesPerTile = 4;  // logits of 256 keys at a time
constexpr int kTileTokens = kPageTokens * kPagesPerTile;
constexpr int kBlockTokens = 32;  // query tokens of one task

}  // namespace

float KvGeometry::scale() const {
  return attention_scale > 0 ? attention_scale : 1.0f / std::sqrt(static_cast<float>(head_dim));
}

LocalKvStore::LocalKvStore(const KvGeometry& geometry, DataType storage, ThreadPool& pool)
    : geometry_(geometry),
      storage_(storage),
      value_panels_((geometry.head_dim + kPanelWidth - 1) / kPanelWidth),
      pool_(pool) {
  KVTIDE_CHECK(storage == DataType::kF16 || storage == DataType::kF32);
}

size_t LocalKvStore::HeadElements() const {
  return static_cast<size_t>(kPageTokens) * (geometry_.head_dim + value_panels_ * kPanelWidth);
}

const std::byte* LocalKvStore::KeyPanel(const Page& page, int kv_head, int panel) const {
  const size_t index =
      kv_head * HeadElements() + static_cast<size_t>(panel) * geometry_.head_dim * kPanelWidth;
  return page.data() + index * DataTypeBytes(storage_);
}

const std::byte* LocalKvStore::ValuePanel(const Page& page, int kv_head, int panel) const {
  const size_t index = kv_head * HeadElements() + static_cast<size_t>(kPageTokens) * geometry_.head_dim +
                       static_cast<size_t>(panel) * kPageTokens * kPanelWidth;
  return page.data() + index * DataTypeBytes(storage_);
}

void LocalKvStore::Store(Page& page, size_t index, float value) const {
  if (storage_ == DataType::kF32) {
    std::memcpy(page.data() + index * 4, &value, 4);
  } else {
    const uint16_t half = F32ToF16(value);
    std::memcpy(page.data() + index * 2, &half, 2);
  }
}

void LocalKvStore::WriteToken(Page& page, int slot, const float* k, const float* v) const {
  const int d = geometry_.head_dim;
  for (int h = 0; h < geometry_.kv_heads; ++h) {
    const size_t keys =
        h * HeadElements() + static_cast<size_t>(slot / kPanelWidth) * d * kPanelWidth + slot % kPanelWidth;
    for (int c = 0; c < d; ++c) Store(page, keys + static_cast<size_t>(c) * kPanelWidth, k[h * d + c]);
    const size_t values = h * HeadElements() + static_cast<size_t>(kPageTokens) * d;
    for (int c = 0; c < d; ++c) {
      const size_t panel = static_cast<size_t>(c / kPanelWidth) * kPageTokens + slot;
      Store(page, values + panel * kPanelWidth + c % kPanelWidth, v[h * d + c]);
    }
  }
}

void LocalKvStore::Append(Layer& layer, int n_tokens, const float* k, const float* v) {
  const size_t page_bytes = HeadElements() * geometry_.kv_heads * DataTypeBytes(storage_);
  const size_t width = geometry_.kv_width();
  for (int i = 0; i < n_tokens; ++i, ++layer.length) {
    const int slot = static_cast<int>(layer.length % kPageTokens);
    if (slot == 0) layer.pages.push_back(std::make_shared<Page>(page_bytes));
    std::shared_ptr<Page>& page = layer.pages.back();
    if (page.use_count() > 1) page = std::make_shared<Page>(*page);  // a fork reads the old one
    WriteToken(*page, slot, k + i * width, v + i * width);
  }
}

void LocalKvStore::AttendBlock(const Layer& layer, int window, int kv_head, int64_t first_position,
                               int n_tokens, const float* q, float* out) const {
  const int d = geometry_.head_dim;
  const int group = geometry_.query_heads / geometry_.kv_heads;
  const int rows = n_tokens * group;
  const int out_width = value_panels_ * kPanelWidth;
  std::vector<float> queries(static_cast<size_t>(rows) * d), logits(static_cast<size_t>(rows) * kTileTokens);
  std::vector<float> sums(static_cast<size_t>(rows) * out_width, 0.0f), weight(rows, 0.0f);
  std::vector<float> most(rows, -std::numeric_limits<float>::infinity());
  const auto head_offset = [&](int row) {
    return (static_cast<size_t>(row / group) * geometry_.query_heads + kv_head * group + row % group) * d;
  };
  for (int r = 0; r < rows; ++r)
    std::memcpy(&queries[static_cast<size_t>(r) * d], q + head_offset(r), d * sizeof(float));
  Scale(queries.data(), queries.size(), geometry_.scale());

  const int64_t end = first_position + n_tokens;
  const auto first_key = [&](int64_t position) {
    return window > 0 ? std::max<int64_t>(0, position - window + 1) : int64_t{0};
  };
  for (int64_t tile = first_key(first_position) / kTileTokens * kTileTokens; tile < end;
       tile += kTileTokens) {
    const int pages =
        static_cast<int>(std::min<int64_t>(kPagesPerTile, (end - tile + kPageTokens - 1) / kPageTokens));
    const Page* page[kPagesPerTile];
    for (int p = 0; p < pages; ++p) page[p] = layer.pages[tile / kPageTokens + p].get();
    for (int p = 0; p < pages; ++p) {
      for (int half = 0; half < kPageTokens / kPanelWidth; ++half) {
        MultiplyPanel(queries.data(), d, rows, KeyPanel(*page[p], kv_head, half), storage_, d,
                      logits.data() + p * kPageTokens + half * kPanelWidth, kTileTokens, false);
      }
    }
    for (int r = 0; r < rows; ++r) {
      const int64_t position = first_position + r / group;
      const int from = static_cast<int>(std::clamp<int64_t>(first_key(position) - tile, 0, kTileTokens));
      const int to = static_cast<int>(std::clamp<int64_t>(position + 1 - tile, from, kTileTokens));
      float* row = logits.data() + static_cast<size_t>(r) * kTileTokens;
      if (to > from) {
        if (geometry_.softcap > 0) SoftCap(row + from, static_cast<size_t>(to - from), geometry_.softcap);
        const float peak = Maximum(row + from, to - from);
        if (peak > most[r]) {
          const float shrink = std::exp(most[r] - peak);
          Scale(sums.data() + static_cast<size_t>(r) * out_width, out_width, shrink);
          weight[r] *= shrink;
          most[r] = peak;
        }
        weight[r] += ExpShifted(row + from, to - from, most[r]);
      }
      std::fill(row, row + from, 0.0f);
      std::fill(row + to, row + kTileTokens, 0.0f);
    }
    for (int p = 0; p < pages; ++p) {
      const int tokens = static_cast<int>(std::min<int64_t>(kPageTokens, end - tile - p * kPageTokens));
      for (int panel = 0; panel < value_panels_; ++panel) {
        MultiplyPanel(logits.data() + p * kPageTokens, kTileTokens, rows,
                      ValuePanel(*page[p], kv_head, panel), storage_, tokens,
                      sums.data() + panel * kPanelWidth, out_width, true);
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    float* to = out + head_offset(r);
    std::memcpy(to, &sums[static_cast<size_t>(r) * out_width], d * sizeof(float));
    Scale(to, d, 1.0f / weight[r]);
  }
}

absl::Status LocalKvStore::AppendAttend(SequenceId sequence, int layer, int64_t start, int n_tokens,
                                        const float* q, const float* k, const float* v, float* out) {
  KVTIDE_ASSIGN_OR_RETURN(Sequence * found, Find(sequence));
  if (layer < 0 || layer >= geometry_.layers || n_tokens <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", layer, " of ", geometry_.layers, ", ", n_tokens, " tokens"));
  }
  Layer& target = found->layers[layer];
  if (start != target.length) {
    return absl::FailedPreconditionError(absl::StrCat("layer ", layer, " of sequence ", sequence, " has ",
                                                      target.length, " tokens, not ", start));
  }
  Append(target, n_tokens, k, v);
  const int blocks = (n_tokens + kBlockTokens - 1) / kBlockTokens;
  const size_t width = geometry_.query_width();
  pool_.ParallelFor(static_cast<int64_t>(blocks) * geometry_.kv_heads, [&](int64_t task) {
    // The last tokens attend over the most keys: they go first, so that no thread starts them at the end.
    const int first = (blocks - 1 - static_cast<int>(task / geometry_.kv_heads)) * kBlockTokens;
    AttendBlock(target, geometry_.window(layer), static_cast<int>(task % geometry_.kv_heads), start + first,
                std::min(kBlockTokens, n_tokens - first), q + first * width, out + first * width);
  });
  return absl::OkStatus();
}

absl::StatusOr<LocalKvStore::Sequence*> LocalKvStore::Find(SequenceId sequence) {
  const auto found = sequences_.find(sequence);
  if (found == sequences_.end()) return absl::NotFoundError(absl::StrCat("no sequence ", sequence));
  return &found->second;
}

absl::StatusOr<SequenceId> LocalKvStore::CreateSequence() {
  sequences_[next_id_].layers.resize(geometry_.layers);
  return next_id_++;
}

absl::StatusOr<SequenceId> LocalKvStore::Fork(SequenceId sequence) {
  KVTIDE_ASSIGN_OR_RETURN(const Sequence* found, Find(sequence));
  Sequence copy = *found;
  sequences_[next_id_] = std::move(copy);
  return next_id_++;
}

absl::Status LocalKvStore::Truncate(SequenceId sequence, int64_t length) {
  KVTIDE_ASSIGN_OR_RETURN(Sequence * found, Find(sequence));
  if (length < 0) return absl::InvalidArgumentError(absl::StrCat("length ", length));
  for (Layer& layer : found->layers) {
    layer.length = std::min(layer.length, length);
    layer.pages.resize((layer.length + kPageTokens - 1) / kPageTokens);
  }
  return absl::OkStatus();
}

absl::Status LocalKvStore::Close(SequenceId sequence) {
  if (sequences_.erase(sequence) == 0) return absl::NotFoundError(absl::StrCat("no sequence ", sequence));
  return absl::OkStatus();
}

}  // namespace kvtide::engine
