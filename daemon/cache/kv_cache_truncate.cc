// Truncation. The only step that can fail is reopening a coded block as an f16 tail; it comes before anything
// is changed.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "daemon/cache/kv_cache_impl.h"
#include "daemon/cache/tensor_check.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {

absl::Status KvCache::Impl::TruncateSequence(SequenceId id, int64_t tokens) {
  MutexLock lock(mu_);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, Find(id));
  const int64_t length = sequence->MinTokens();
  if (tokens < 0 || tokens > length)
    return absl::OutOfRangeError(
        absl::StrCat("sequence ", id, " has ", length, " tokens, it cannot keep ", tokens));
  const int64_t tail_index = tokens / kBlockTokens;
  const bool has_tail = tokens % kBlockTokens != 0;
  for (size_t g = 0; g < sequence->groups.size(); g++) {
    const GroupTable& table = sequence->groups[g];
    if (tokens == 0) break;
    const int64_t needed = FirstLiveBlock(tokens, table.window);
    if (needed < table.first_block)
      return absl::OutOfRangeError(
          absl::StrCat("sequence ", id, ": after a cut at ", tokens, ", layer group ", g,
                       " needs tokens from ", needed * kBlockTokens, " on, but those before ",
                       table.first_block * kBlockTokens, " have left its sliding window of ", table.window));
    if (has_tail && tail_index < table.end_block() && table.at(tail_index)->place == nullptr)
      return absl::DataLossError(absl::StrCat("sequence ", id, ": tokens ", tail_index * kBlockTokens, " to ",
                                              (tail_index + 1) * kBlockTokens - 1, " were dropped; cut at ",
                                              tail_index * kBlockTokens, " or below"));
  }
  KVTIDE_RETURN_IF_ERROR(BeginWriter(*sequence));

  // By group: the f16 block that replaces a coded tail (normal mode), or becomes its twin (seal_at_once).
  std::vector<Block*> reopened(sequence->groups.size(), nullptr);
  absl::Status status;
  for (size_t g = 0; g < sequence->groups.size() && status.ok() && has_tail; g++) {
    const GroupTable& table = sequence->groups[g];
    if (tail_index >= table.end_block() || table.at(tail_index)->layout == table.exact) continue;
    if (table.staging.count(tail_index) != 0) continue;
    status =
        ReopenCodedBlock(*sequence, static_cast<int>(g), tail_index, tokens % kBlockTokens, &reopened[g]);
  }
  if (status.ok() && sequence->closed)
    status = absl::AbortedError(absl::StrCat("sequence ", id, " was closed"));
  if (!status.ok()) {
    if (status.code() == absl::StatusCode::kResourceExhausted) counters_.exhausted++;
    for (Block* block : reopened) {
      if (block == nullptr) continue;
      block->writing = false;
      store_.Unhold(block);
    }
    EndWriter(*sequence);
    return Annotate(status, absl::StrCat("truncating sequence ", id, " to ", tokens));
  }

  const bool keeper = sequence->keeper();
  const int64_t end = tail_index + (has_tail ? 1 : 0);
  for (size_t g = 0; g < sequence->groups.size(); g++) {
    GroupTable& table = sequence->groups[g];
    for (LayerProgress& layer : table.layers) {
      if (layer.tokens > tokens) layer.last_start = -1;
      layer.tokens = std::min(layer.tokens, tokens);
    }
    while (table.end_block() > end && !table.blocks.empty()) {
      store_.Release(table.blocks.back(), keeper);
      table.blocks.pop_back();
    }
    while (!table.staging.empty() && table.staging.rbegin()->first >= end) {
      store_.Release(table.staging.rbegin()->second, keeper);
      table.staging.erase(std::prev(table.staging.end()));
    }
    if (tokens == 0) table.first_block = 0;
    table.sealed = std::min(table.sealed, tail_index);
    if (reopened[g] != nullptr) {
      Block* block = reopened[g];
      block->writing = false;
      store_.AddRef(block, keeper);
      if (sequence->options.seal_at_once) {
        table.staging[tail_index] = block;
      } else {
        store_.Release(table.at(tail_index), keeper);
        table.at(tail_index) = block;
      }
      store_.Unhold(block);
    }
    // A reader, or a fork's reader, may still be at rows that the next append overwrites.
    if (has_tail && tail_index < table.end_block()) {
      const auto staged = table.staging.find(tail_index);
      for (Block* block : {table.at(tail_index), staged != table.staging.end() ? staged->second : nullptr})
        if (block != nullptr && block->place != nullptr && (block->refs > 1 || block->place->pins > 0))
          block->copy_before_write = true;
    }
    // The profile belongs to the coded blocks; without any, the next first block makes a new one.
    const bool coded = std::any_of(table.blocks.begin(), table.blocks.end(), [&](const Block* block) {
      return table.coding() && block->layout == table.coded;
    });
    if (!coded) {
      table.profile.reset();
      std::fill(table.profiled.begin(), table.profiled.end(), false);
    }
  }
  sequence->last_used = options_.clock();
  EndWriter(*sequence);
  changed_.NotifyAll();
  return absl::OkStatus();
}

// Decodes the first `tokens` tokens of a coded block into a new f16 block; with seal_at_once in the same
// tier. The new block has a hold and is marked as being written.
absl::Status KvCache::Impl::ReopenCodedBlock(Sequence& sequence, int group, int64_t index, int64_t tokens,
                                             Block** reopened) {
  GroupTable& table = sequence.groups[static_cast<size_t>(group)];
  Block* source = table.at(index);
  KVTIDE_RETURN_IF_ERROR(WaitUntilStill(source));
  const auto lost = [&] {
    return absl::DataLossError(absl::StrCat("tokens ", index * kBlockTokens, " to ",
                                            (index + 1) * kBlockTokens - 1, " were dropped"));
  };
  if (source->place == nullptr) return lost();
  Place* place = source->place;
  const std::shared_ptr<const Profile> profile = source->profile;
  store_.Pin(place);
  Block* target = nullptr;
  absl::Status status;
  const BlockLayout* const layouts[1] = {table.exact};
  if (sequence.options.seal_at_once) {
    target = AllocateIn(place->tier, sequence.home, table.exact, 0);
    if (target == nullptr) status = absl::ResourceExhaustedError(RoomText(table.exact->block_bytes()));
  } else {
    status = AllocateTogether(sequence.home, layouts, 0, &target);
  }
  if (!status.ok()) {
    store_.Unpin(place);
    return status;
  }
  Stamp(target, sequence, group, index);
  const int target_tier = target->place->tier;
  std::byte* target_data = target->place->data;
  mu_.Unlock();
  const GroupShape& shape = table.exact->shape();
  const size_t rows = static_cast<size_t>(kBlockTokens) * static_cast<size_t>(shape.kv_heads);
  std::vector<float> k(rows * static_cast<size_t>(shape.head_dim_k)),
      v(rows * static_cast<size_t>(shape.head_dim_v));
  const auto clamp = [](std::vector<float>& values) {
    for (float& x : values) x = std::clamp(x, -kMaxF16, kMaxF16);
  };
  for (int layer = 0; layer < shape.layers && status.ok(); layer++) {
    DecodeArgs decode;
    decode.layout = table.coded;
    decode.profile = profile.get();
    decode.block = place->data;
    decode.layer = layer;
    decode.k = k.data();
    decode.v = v.data();
    status = backends_[static_cast<size_t>(place->tier)]->Decode(decode);
    if (!status.ok()) break;
    clamp(k);
    clamp(v);
    AppendPiece piece;
    piece.layout = table.exact;
    piece.block = target_data;
    piece.layer = layer;
    piece.tokens = static_cast<int>(tokens);
    AppendArgs append;
    append.k = {k.data(), DataType::kF32};
    append.v = {v.data(), DataType::kF32};
    append.pieces = std::span<const AppendPiece>(&piece, 1);
    status = backends_[static_cast<size_t>(target_tier)]->Append(append);
  }
  mu_.Lock();
  store_.Unpin(place);
  changed_.NotifyAll();
  *reopened = target;
  return status;
}

}  // namespace kvtide
