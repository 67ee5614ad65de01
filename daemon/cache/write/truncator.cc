#include "daemon/cache/write/truncator.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/cache/call/tensor_check.h"
#include "daemon/cache/move/room_text.h"
#include "daemon/cache/sequence/persist_turn.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {

struct Truncator::Cut {
  int64_t tokens = 0;  // that each layer keeps at most
  // The block that the cut goes through.
  int64_t tail_index() const { return tokens / kBlockTokens; }
  bool has_tail() const { return tokens % kBlockTokens != 0; }
  int64_t end_block() const { return tail_index() + (has_tail() ? 1 : 0); }
  // By group: the f16 block that replaces a coded tail (normal mode), or becomes its twin (seal_at_once).
  std::vector<WritingBlock> reopened;
};

absl::Status Truncator::Truncate(SequenceId id, int64_t tokens, const CallContext& context) {
  KVTIDE_RETURN_IF_ERROR(context.Check(core_.options().clock(), "the truncation"));
  CacheLock lock(core_);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, lock->sequences.Find(id, context));
  KVTIDE_RETURN_IF_ERROR(AwaitPersisted(lock, {&sequence, 1}, context, "the truncation"));
  Cut cut;
  cut.tokens = tokens;
  cut.reopened.resize(sequence->groups.size());
  KVTIDE_RETURN_IF_ERROR(CheckCut(*sequence, cut));
  KVTIDE_ASSIGN_OR_RETURN(const WriterGuard writer, WriterGuard::Begin(lock->sequences, sequence, &cut));
  absl::Status status = ReopenTails(lock, *sequence, cut);
  if (status.ok() && sequence->closed)
    status = absl::AbortedError(absl::StrCat("sequence ", id, " was closed"));
  if (status.code() == absl::StatusCode::kResourceExhausted) lock->counters.exhausted++;
  KVTIDE_RETURN_IF_ERROR(AnnotateRefused(status, absl::StrCat("truncating sequence ", id, " to ", tokens)));
  for (size_t g = 0; g < sequence->groups.size(); g++) CutTable(*lock, *sequence, static_cast<int>(g), cut);
  if (sequence->chain.has_value()) {
    const int64_t blocks = std::min(tokens, sequence->chain->tokens()) / kBlockTokens;
    sequence->chain->Cut(tokens, blocks > 0 ? PrefixIndex::KeyOf(*sequence, blocks - 1) : BlockKey{});
  }
  sequence->found_blocks = std::min(sequence->found_blocks, cut.tail_index());
  sequence->changes++;
  lock->sequences.CountHeld(*sequence);
  sequence->last_used = core_.options().clock();
  lock->changed.NotifyAll();
  return absl::OkStatus();
}

absl::Status Truncator::CheckCut(const Sequence& sequence, const Cut& cut) const {
  const int64_t length = sequence.MinTokens();
  KVTIDE_RETURN_IF_ERROR(CheckPosition(cut.tokens, "the length to cut to"));
  if (cut.tokens > length)
    return absl::OutOfRangeError(
        absl::StrCat("sequence ", sequence.id, " has ", length, " tokens, it cannot keep ", cut.tokens));
  if (cut.tokens == 0) return absl::OkStatus();
  const int64_t tail = cut.tail_index();
  for (size_t g = 0; g < sequence.groups.size(); g++) {
    const GroupTable& table = sequence.groups[g];
    const int64_t needed = FirstLiveBlock(cut.tokens, table.window);
    if (needed < table.first_block())
      return absl::OutOfRangeError(absl::StrCat(
          "sequence ", sequence.id, ": after a cut at ", cut.tokens, ", layer group ", g,
          " needs tokens from ", needed * kBlockTokens, " on, but those before ",
          table.first_block() * kBlockTokens, " have left its sliding window of ", table.window));
    if (cut.has_tail() && tail < table.end_block() && table.at(tail)->place == nullptr)
      return absl::DataLossError(absl::StrCat("sequence ", sequence.id, ": tokens ", tail * kBlockTokens,
                                              " to ", (tail + 1) * kBlockTokens - 1, " were dropped; cut at ",
                                              tail * kBlockTokens, " or below"));
  }
  return absl::OkStatus();
}

absl::Status Truncator::ReopenTails(CacheLock& lock, Sequence& sequence, Cut& cut) {
  const int64_t tail = cut.tail_index();
  for (size_t g = 0; g < sequence.groups.size() && cut.has_tail(); g++) {
    const GroupTable& table = sequence.groups[g];
    if (tail >= table.end_block() || table.at(tail)->layout() == table.exact) continue;
    if (table.staging.count(tail) != 0) continue;
    KVTIDE_ASSIGN_OR_RETURN(cut.reopened[g], ReopenCodedBlock(lock, sequence, static_cast<int>(g), tail,
                                                              cut.tokens % kBlockTokens));
  }
  return absl::OkStatus();
}

// Decodes the first `tokens` tokens of a coded block into a new f16 block; with seal_at_once in the same
// tier.
absl::StatusOr<WritingBlock> Truncator::ReopenCodedBlock(CacheLock& lock, Sequence& sequence, int group,
                                                         int64_t index, int64_t tokens) {
  GroupTable& table = sequence.groups[static_cast<size_t>(group)];
  const HeldBlock source(lock->store, table.at(index));
  do {
    KVTIDE_RETURN_IF_ERROR(mover_.BringIn(lock, source.get()));
    KVTIDE_RETURN_IF_ERROR(mover_.WaitUntilStill(lock, *source.get()));
  } while (mover_.IsFar(*source.get()));
  if (source->place == nullptr)
    return absl::DataLossError(absl::StrCat("tokens ", index * kBlockTokens, " to ",
                                            (index + 1) * kBlockTokens - 1, " were dropped"));
  const PinnedPlace place(lock->store, source->place);
  const std::shared_ptr<const Profile> profile = source->profile();
  const BlockLayout* const layout = source->layout();
  WritingBlock target;
  if (sequence.options.seal_at_once) {
    target = mover_.AllocateIn(lock, place->tier, sequence.home, table.exact, 0);
    if (!target)
      return absl::ResourceExhaustedError(
          NoRoomText(*lock, table.exact->block_bytes(), sequence.account.get(), core_.options().clock()));
  } else {
    const BlockLayout* const layouts[1] = {table.exact};
    KVTIDE_ASSIGN_OR_RETURN(std::vector<WritingBlock> blocks,
                            mover_.Allocate(lock, sequence.home, layouts, 0, sequence.account.get()));
    target = std::move(blocks.front());
  }
  Stamp(lock->store, target.get(), sequence, group, index);
  absl::Status status;
  {
    const Unlocked unlocked(lock);
    status =
        DecodeInto(*place.get(), *layout, table, profile.get(), index * kBlockTokens, *target->place, tokens);
  }
  lock->changed.NotifyAll();
  if (!status.ok()) return status;
  return target;
}

absl::Status Truncator::DecodeInto(const Place& source, const BlockLayout& layout, const GroupTable& table,
                                   const Profile* profile, int64_t position, const Place& target,
                                   int64_t tokens) const {
  const GroupShape& shape = table.exact->shape();
  const size_t rows = static_cast<size_t>(kBlockTokens) * static_cast<size_t>(shape.kv_heads);
  std::vector<float> k(rows * static_cast<size_t>(shape.head_dim_k)),
      v(rows * static_cast<size_t>(shape.head_dim_v));
  for (int layer = 0; layer < shape.layers; layer++) {
    DecodeArgs decode;
    decode.layout = &layout;
    decode.profile = profile;
    decode.block = core_.Data(source);
    decode.position = position;
    decode.layer = layer;
    decode.k = k.data();
    decode.v = v.data();
    KVTIDE_RETURN_IF_ERROR(core_.backend(source.tier).Decode(decode));
    for (std::vector<float>* values : {&k, &v})
      for (float& x : *values) x = std::clamp(x, -kMaxF16, kMaxF16);
    AppendPiece piece;
    piece.layout = table.exact;
    piece.block = core_.Data(target);
    piece.layer = layer;
    piece.tokens = static_cast<int>(tokens);
    AppendArgs append;
    append.k = {k.data(), DataType::kF32};
    append.v = {v.data(), DataType::kF32};
    append.pieces = std::span<const AppendPiece>(&piece, 1);
    KVTIDE_RETURN_IF_ERROR(core_.backend(target.tier).Append(append));
  }
  return absl::OkStatus();
}

void Truncator::CutTable(CacheState& state, Sequence& sequence, int group, Cut& cut) {
  BlockStore& store = state.store;
  GroupTable& table = sequence.groups[static_cast<size_t>(group)];
  const bool keeper = sequence.keeper();
  const int64_t tail = cut.tail_index(), end = cut.end_block();
  for (int l = 0; l < static_cast<int>(table.layers()); l++)
    if (table.layer(l).tokens > cut.tokens) table.SetLayer(l, {cut.tokens, -1, 0});
  while (table.end_block() > end && !table.blocks->empty()) table.blocks->PopBack();
  while (!table.staging.empty() && table.staging.rbegin()->first >= end) {
    store.RemoveDirect(table.staging.rbegin()->second, keeper);
    table.staging.erase(std::prev(table.staging.end()));
  }
  if (cut.tokens == 0) table.blocks->Clear();
  table.sealed = std::min(table.sealed, tail);
  table.deferred = std::min(table.deferred, tail);
  if (WritingBlock& reopened = cut.reopened[static_cast<size_t>(group)]; reopened) {
    if (sequence.options.seal_at_once) {
      store.AddDirect(reopened.get(), keeper);
      store.Join(reopened.get(), sequence.recency.own);
      table.staging[tail] = reopened.get();
    } else {
      table.blocks->Replace(tail, reopened.get(), sequence.recency.own);
    }
    reopened = {};
  }
  // A reader, or a fork's reader, may still be at rows that the next append overwrites.
  if (cut.has_tail() && tail < table.end_block()) {
    const auto staged = table.staging.find(tail);
    for (Block* block : {table.at(tail), staged != table.staging.end() ? staged->second : nullptr})
      if (block != nullptr && block->place != nullptr) block->copy_before_write = true;
  }
  // A profile of the first block belongs to the coded blocks; without any, the next first block makes a new
  // one.
  bool coded = false;
  for (int64_t index = table.first_block(); index < table.end_block() && !coded; index++)
    coded = table.coding() && table.IsCoded(*table.at(index));
  if (!coded) {
    table.profile = table.calibrated;
    std::fill(table.profiled.begin(), table.profiled.end(), false);
  }
}

}  // namespace kvtide
