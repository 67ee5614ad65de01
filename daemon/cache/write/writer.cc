#include "daemon/cache/write/writer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/cache/call/tensor_check.h"
#include "daemon/cache/sequence/persist_turn.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

// Whether anybody but the table itself still shows the block's bytes to readers.
bool IsRead(const GroupTable& table, int64_t index, const Block& block) {
  table.blocks->MakeStale(index);
  return block.place->pictures + block.place->pins > 0;
}

const CallContext& ContextOf(const AppendCall& call) {
  static const CallContext kNobody;
  return call.context != nullptr ? *call.context : kNobody;
}

}  // namespace

// Everything that can be said without looking at the tables.
absl::Status Writer::CheckAppend(const AppendCall& call, const ModelSpec& model) const {
  std::vector<bool> seen(model.layers.size());
  for (const LayerKv& kv : call.layers) {
    KVTIDE_RETURN_IF_ERROR(CheckWanted(&ContextOf(call)));
    if (kv.layer < 0 || static_cast<size_t>(kv.layer) >= model.layers.size())
      return absl::InvalidArgumentError(absl::StrCat("layer ", kv.layer, ": model '", model.name,
                                                     "' has layers 0 to ", model.layers.size() - 1));
    if (seen[static_cast<size_t>(kv.layer)])
      return absl::InvalidArgumentError(absl::StrCat("layer ", kv.layer, " is there twice"));
    seen[static_cast<size_t>(kv.layer)] = true;
    const LayerSpec& layer = model.layers[static_cast<size_t>(kv.layer)];
    const GroupShape& shape = model.groups[static_cast<size_t>(layer.group)].shape;
    if (kv.k.data == nullptr || kv.v.data == nullptr)
      return absl::InvalidArgumentError(absl::StrCat("K or V of layer ", kv.layer, " is missing"));
    KVTIDE_RETURN_IF_ERROR(
        CheckElements(kv.k_elements, call.tokens, shape.kv_heads, shape.head_dim_k, "K", kv.layer));
    KVTIDE_RETURN_IF_ERROR(
        CheckElements(kv.v_elements, call.tokens, shape.kv_heads, shape.head_dim_v, "V", kv.layer));
    KVTIDE_RETURN_IF_ERROR(
        CheckValues(kv.k, call.tokens, shape.kv_heads, shape.head_dim_k, "K", kv.layer, call.start_position));
    KVTIDE_RETURN_IF_ERROR(
        CheckValues(kv.v, call.tokens, shape.kv_heads, shape.head_dim_v, "V", kv.layer, call.start_position));
  }
  return absl::OkStatus();
}

absl::Status Writer::CheckWanted(const CallContext* context) const {
  if (context == nullptr) return absl::OkStatus();
  return context->Check(core_.options().clock(), "the append (nothing was written)");
}

absl::Status Writer::Append(const AppendCall& call) {
  const CacheOptions& options = core_.options();
  const CallContext& context = ContextOf(call);
  if (call.tokens < 1 || call.tokens > options.max_tokens_per_append)
    return absl::InvalidArgumentError(absl::StrCat("append of ", call.tokens, " tokens: must be 1 to ",
                                                   options.max_tokens_per_append,
                                                   " (max_tokens_per_append)"));
  if (call.layers.empty()) return absl::InvalidArgumentError("append without layers");
  KVTIDE_RETURN_IF_ERROR(CheckPosition(call.start_position, "start position"));
  SequencePtr sequence;
  {
    CacheLock lock(core_);
    KVTIDE_ASSIGN_OR_RETURN(sequence, lock->sequences.Find(call.sequence, context));
  }
  KVTIDE_RETURN_IF_ERROR(CheckAppend(call, sequence->model->spec));
  WriteBatch batch;
  batch.context = &context;
  batch.AddSequence(sequence);
  batch.writes.reserve(call.layers.size());
  for (const LayerKv& kv : call.layers) {
    LayerWrite& write = batch.AddWrite(kv.layer, call.start_position, call.tokens);
    write.k = kv.k;
    write.v = kv.v;
    write.token_ids = call.token_ids;
    write.hash = HashRows(write);
  }
  KVTIDE_RETURN_IF_ERROR(CheckWanted(batch.context));
  {
    CacheLock lock(core_);
    KVTIDE_RETURN_IF_ERROR(Begin(lock, batch));
  }
  absl::Status status = WriteBytes(batch);
  CacheLock lock(core_);
  if (!status.ok()) {
    Rollback(*lock, batch);
    return status;
  }
  KVTIDE_RETURN_IF_ERROR(Commit(*lock, batch));
  return Finish(lock, batch);
}

bool Writer::IsPlain(const Sequence& sequence, const LayerSpec& layer, int64_t start, int64_t tokens) {
  const GroupTable& table = sequence.groups[static_cast<size_t>(layer.group)];
  if (sequence.writer != nullptr || sequence.options.seal_at_once) return false;
  if (start != table.layer(layer.layer_in_group).tokens || start % kBlockTokens == 0) return false;
  const int64_t index = start / kBlockTokens;
  if (tokens >= (index + 1) * kBlockTokens - start || index >= table.end_block()) return false;
  const Block& block = *table.at(index);
  return block.owned() && !block.moving && !block.copy_before_write && block.place != nullptr;
}

absl::Status Writer::Begin(CacheLock& lock, WriteBatch& batch) {
  KVTIDE_CHECK(batch.phase_ == WriteBatch::Phase::kNew);
  batch.writers_.reserve(batch.sequences.size());
  batch.blocks_.reserve(batch.writes.size());
  batch.pieces_.resize(core_.tiers());
  if (batch.context != nullptr)
    KVTIDE_RETURN_IF_ERROR(AwaitPersisted(lock, batch.sequences, *batch.context, "the append"));
  for (size_t i = 0; i < batch.sequences.size(); i++) {
    const SequencePtr& sequence = batch.sequences[i];
    if (batch.follows_[i]) continue;
    absl::StatusOr<WriterGuard> writer = WriterGuard::Begin(lock->sequences, sequence, &batch);
    if (!writer.ok()) {
      batch.writers_.clear();
      return writer.status();
    }
    batch.writers_.push_back(*std::move(writer));
  }
  batch.phase_ = WriteBatch::Phase::kBegun;
  for (LayerWrite& write : batch.writes) {
    const absl::Status status = BeginLayer(lock, batch, write);
    if (status.ok()) continue;
    if (status.code() == absl::StatusCode::kResourceExhausted) lock->counters.exhausted++;
    Rollback(*lock, batch);
    return status;
  }
  return absl::OkStatus();
}

absl::Status Writer::BeginLayer(CacheLock& lock, WriteBatch& batch, LayerWrite& write) {
  Sequence& sequence = *write.sequence;
  GroupTable& table = sequence.groups[static_cast<size_t>(write.group)];
  const LayerProgress& layer = table.layer(write.layer);
  const auto where = [&] { return absl::StrCat("sequence ", sequence.id, ", layer ", write.model_layer); };
  if (!write.token_ids.empty()) {
    if (static_cast<int64_t>(write.token_ids.size()) != write.tokens)
      return absl::InvalidArgumentError(
          absl::StrCat(where(), ": ", write.token_ids.size(), " token ids for ", write.tokens, " tokens"));
    if (sequence.chain.has_value())
      KVTIDE_RETURN_IF_ERROR(Annotate(sequence.chain->Check(write.start, write.token_ids), where()));
  }
  if (!write.follows && write.start == layer.last_start && write.tokens == layer.tokens - layer.last_start) {
    {
      const Unlocked unlocked(lock);  // this call is the writer: the layer stays as it is
      write.hash = HashRows(write);
    }
    if (write.hash != layer.last_hash)
      return absl::AbortedError(absl::StrCat(where(), ": tokens ", write.start, " to ", layer.tokens - 1,
                                             " are there already with other values; another call has "
                                             "appended them: read the length and go on from there"));
    write.repeated = true;
    return absl::OkStatus();
  }
  if (!write.follows && write.start != layer.tokens)
    return absl::OutOfRangeError(absl::StrCat(where(), ": start position ", write.start,
                                              " is not the layer's length ", layer.tokens,
                                              "; append there, or truncate first"));
  const int64_t end = write.start + write.tokens;
  if (end > core_.options().max_tokens_per_sequence)
    return Refused(Refusal::kLimit,
                   absl::ResourceExhaustedError(
                       absl::StrCat(where(), ": ", end, " tokens are more than the limit of ",
                                    core_.options().max_tokens_per_sequence, " (max_tokens_per_sequence)")));
  const int64_t first = write.start / kBlockTokens, last = (end - 1) / kBlockTokens;
  const int64_t old_end = table.end_block();
  if (const absl::Status status = AddBlocks(lock, batch, sequence, write.group, last); !status.ok())
    return AnnotateRefused(status, where());
  for (int64_t index = first; index <= std::min(last, old_end - 1); index++)
    if (const absl::Status status = MakeWritable(lock, batch, sequence, write.group, index); !status.ok())
      return AnnotateRefused(status, where());
  for (int64_t index = first; index <= last && !write.whole_group; index++) AddPiece(batch, write, index);
  return absl::OkStatus();
}

void Writer::TakeLayer(CacheState&, const WriteBatch& batch, int model_layer,
                       std::span<const AttendRequest> items, WriteBatch& layer) const {
  KVTIDE_CHECK(batch.open() && items.size() == batch.sequences.size());
  layer.sequences.reserve(items.size());
  layer.writes.reserve(items.size());
  layer.pieces_.resize(core_.tiers());
  for (size_t i = 0; i < items.size(); i++) {
    layer.AddSequence(batch.sequences[i]);
    LayerWrite& write = layer.AddWrite(model_layer, items[i].start_position, items[i].new_tokens);
    write.k = items[i].k;
    write.v = items[i].v;
    for (int64_t index = write.start / kBlockTokens; index <= (write.end() - 1) / kBlockTokens; index++)
      AddPiece(layer, write, index);
  }
}

// What is to be written into one block.
void Writer::AddPiece(WriteBatch& batch, LayerWrite& write, int64_t index) const {
  const GroupTable& table = write.sequence->groups[static_cast<size_t>(write.group)];
  const auto staged = table.staging.find(index);
  Block* const exact = staged != table.staging.end() ? staged->second : table.at(index);
  KVTIDE_CHECK(exact->layout() == table.exact && exact->writing && exact->place != nullptr);
  const int tier = exact->place->tier;
  if (staged != table.staging.end()) {
    const Place* const coded = table.at(index)->place;
    KVTIDE_CHECK(coded->tier == tier);
    write.twins.push_back({index, tier, core_.Data(*exact->place), core_.Data(*coded)});
  }
  const int64_t block_start = index * kBlockTokens;
  const int64_t begin = std::max(write.start, block_start);
  const int64_t end = std::min(write.start + write.tokens, block_start + kBlockTokens);
  std::vector<AppendPiece>& pieces = batch.pieces_[static_cast<size_t>(tier)];
  if (pieces.empty()) pieces.reserve(batch.writes.size());
  AppendPiece& piece = pieces.emplace_back();
  piece.layout = table.exact;
  piece.block = core_.Data(*exact->place);
  piece.layer = write.layer;
  piece.first_token = static_cast<int>(begin - block_start);
  piece.tokens = static_cast<int>(end - begin);
  piece.source_row = static_cast<size_t>(begin - write.start);
  piece.k = write.k;
  piece.v = write.v;
}

// Extends the table with empty blocks up to last_index.
absl::Status Writer::AddBlocks(CacheLock& lock, WriteBatch& batch, Sequence& sequence, int group,
                               int64_t last_index) {
  BlockStore& store = lock->store;
  GroupTable& table = sequence.groups[static_cast<size_t>(group)];
  if (last_index < table.end_block()) return absl::OkStatus();
  batch.table_ends_.emplace_back(&table, table.end_block());
  const bool twins = sequence.options.seal_at_once && table.coding();
  const BlockLayout* const layouts[2] = {table.exact, table.coded};
  const size_t count = twins ? 2 : 1;
  const size_t bytes_each = table.exact->block_bytes() + (twins ? table.coded->block_bytes() : 0);
  while (table.end_block() <= last_index) {
    const int64_t index = table.end_block();
    KVTIDE_ASSIGN_OR_RETURN(
        std::vector<WritingBlock> blocks,
        mover_.Allocate(lock, sequence.home, {layouts, count},
                        bytes_each * static_cast<size_t>(last_index - index + 1), sequence.account.get()));
    for (size_t i = 0; i < blocks.size(); i++)
      Stamp(store, blocks[i].get(), sequence, group, index, twins && i == 1 ? table.profile : nullptr);
    if (twins) {
      store.AddDirect(blocks[0].get(), sequence.keeper());
      store.Join(blocks[0].get(), sequence.recency.own);
      table.staging[index] = blocks[0].get();
    }
    table.blocks->PushBack(blocks.back().get(), sequence.recency.own);
    for (WritingBlock& block : blocks) batch.blocks_.push_back(std::move(block));
  }
  return absl::OkStatus();
}

// The block, and its twin, become this sequence's own, unmoving, unread beyond the layers' lengths.
absl::Status Writer::MakeWritable(CacheLock& lock, WriteBatch& batch, Sequence& sequence, int group,
                                  int64_t index) {
  GroupTable& table = sequence.groups[static_cast<size_t>(group)];
  const auto staged = table.staging.find(index);
  Block* const both[2] = {table.at(index), staged != table.staging.end() ? staged->second : nullptr};
  const std::span<Block* const> entries(both, both[1] != nullptr ? 2 : 1);
  if (entries[0]->writing) {  // by an earlier layer of this batch, or by the one that it follows
    if (batch.previous_ != nullptr && (batch.inherited_.empty() || batch.inherited_.back() != entries[0]))
      batch.inherited_.push_back(entries[0]);
    return absl::OkStatus();
  }
  for (size_t still = 0; still < entries.size(); still++) {
    if (mover_.IsFar(*entries[still])) {
      KVTIDE_RETURN_IF_ERROR(mover_.BringIn(lock, entries[still]));
    } else if (entries[still]->moving) {
      KVTIDE_RETURN_IF_ERROR(mover_.WaitUntilStill(lock, *entries[still]));
    } else {
      continue;
    }
    still = static_cast<size_t>(-1);  // all again: the mutex was free
  }
  bool copy = false;
  for (Block* block : entries) {
    if (block->place == nullptr)
      return absl::DataLossError(absl::StrCat("tokens ", index * kBlockTokens, " to ",
                                              (index + 1) * kBlockTokens - 1, " were dropped; truncate to ",
                                              index * kBlockTokens, " or below"));
    if (!block->owned() || (block->copy_before_write && IsRead(table, index, *block))) copy = true;
    if (block->place->tier != entries[0]->place->tier) copy = true;
  }
  if (copy) return CopyBeforeWrite(lock, batch, sequence, group, index, entries);
  for (Block* block : entries) {
    KVTIDE_CHECK(block->owned());
    block->copy_before_write = false;
    block->has_checksum = false;
    lock->store.ForgetBackup(block);
    batch.blocks_.emplace_back(lock->store, block);
  }
  return absl::OkStatus();
}

// Others read the block or have it in their tables: the sequence gets a copy, of its twin too.
absl::Status Writer::CopyBeforeWrite(CacheLock& lock, WriteBatch& batch, Sequence& sequence, int group,
                                     int64_t index, std::span<Block* const> entries) {
  BlockStore& store = lock->store;
  GroupTable& table = sequence.groups[static_cast<size_t>(group)];
  const BlockLayout* layouts[2] = {};
  for (size_t i = 0; i < entries.size(); i++) layouts[i] = entries[i]->layout();
  KVTIDE_ASSIGN_OR_RETURN(
      std::vector<WritingBlock> copies,
      mover_.Allocate(lock, sequence.home, {layouts, entries.size()}, 0, sequence.account.get()));
  for (size_t i = 0; i < entries.size(); i++) {
    if (entries[i]->place == nullptr)  // dropped while room was made
      return absl::DataLossError(absl::StrCat("tokens from ", index * kBlockTokens, " were dropped"));
    const PinnedPlace source(store, entries[i]->place);
    KVTIDE_RETURN_IF_ERROR(mover_.Copy(lock, *entries[i], *source.get(), *copies[i]->place));
  }
  for (size_t i = 0; i < entries.size(); i++) {
    Stamp(store, copies[i].get(), sequence, group, index, entries[i]->profile());
    if (i == 0) {
      table.blocks->Replace(index, copies[i].get(), sequence.recency.own);
    } else {
      store.AddDirect(copies[i].get(), sequence.keeper());
      store.Join(copies[i].get(), sequence.recency.own);
      store.RemoveDirect(std::exchange(table.staging.at(index), copies[i].get()), sequence.keeper());
    }
    batch.blocks_.push_back(std::move(copies[i]));
    lock->counters.copied_on_write_blocks++;
  }
  return absl::OkStatus();
}

absl::Status Writer::WriteBytes(WriteBatch& batch) {
  constexpr size_t kAtOnce = 256;  // pieces, 64 tokens of a layer each: 128 MiB of f32 for 8 heads of 128
  for (size_t t = 0; t < batch.pieces_.size(); t++)
    for (std::span<const AppendPiece> rest = batch.pieces_[t]; !rest.empty();) {
      KVTIDE_RETURN_IF_ERROR(CheckWanted(batch.context));
      AppendArgs args;
      args.pieces = rest.first(std::min(kAtOnce, rest.size()));
      rest = rest.subspan(args.pieces.size());
      KVTIDE_RETURN_IF_ERROR(Annotate(core_.backend(static_cast<int>(t)).Append(args),
                                      absl::StrCat(TierText(core_.options(), t), ": writing new tokens")));
    }
  batch.pieces_.clear();
  for (LayerWrite& write : batch.writes) {
    if (write.twins.empty()) continue;
    KVTIDE_RETURN_IF_ERROR(CheckWanted(batch.context));
    KVTIDE_RETURN_IF_ERROR(CodeAtOnce(batch, write));
  }
  return absl::OkStatus();
}

// seal_at_once: codes what the layer's blocks hold now. The first tokens of the layer give its profile.
absl::Status Writer::CodeAtOnce(WriteBatch& batch, LayerWrite& write) {
  GroupTable& table = write.sequence->groups[static_cast<size_t>(write.group)];
  const GroupShape& shape = table.coded->shape();
  auto& profile = batch.profiles_.try_emplace(&table, table.profile).first->second;
  const bool wants_profile = table.profile_options.mean || table.profile_options.equalise != Equalise::kNone;
  if (wants_profile && write.start == 0 && !table.profiled[static_cast<size_t>(write.layer)]) {
    auto next = profile != nullptr ? std::make_shared<Profile>(*profile) : std::make_shared<Profile>();
    next->shape = shape;
    next->k.resize(static_cast<size_t>(shape.layers) * static_cast<size_t>(shape.kv_heads));
    next->v.resize(next->k.size());
    const int rows = static_cast<int>(std::min<int64_t>(write.tokens, kBlockTokens));
    const size_t stride = static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(shape.head_dim_k);
    std::vector<float> keys(static_cast<size_t>(rows) * stride);
    for (size_t i = 0; i < keys.size(); i++) keys[i] = write.k.At(i);
    for (int head = 0; head < shape.kv_heads; head++)
      next->k[static_cast<size_t>(write.layer) * static_cast<size_t>(shape.kv_heads) +
              static_cast<size_t>(head)] =
          MakeKeyProfile(keys.data() + static_cast<size_t>(head) * static_cast<size_t>(shape.head_dim_k),
                         rows, stride, shape.head_dim_k, table.profile_options);
    next->hash = HashProfile(*next);
    profile = std::move(next);
  }
  std::vector<std::vector<RecodePiece>> pieces(core_.tiers());
  for (const TwinBlock& target : write.twins) {
    RecodePiece piece;
    piece.from = table.exact;
    piece.source = target.exact;
    piece.to = table.coded;
    piece.target = target.coded;
    piece.to_profile = profile.get();
    piece.position = target.index * kBlockTokens;
    piece.first_layer = write.layer;
    piece.layers = 1;
    piece.tokens = static_cast<int>(
        std::min<int64_t>(kBlockTokens, write.start + write.tokens - target.index * kBlockTokens));
    pieces[static_cast<size_t>(target.tier)].push_back(piece);
  }
  for (size_t t = 0; t < pieces.size(); t++)
    if (!pieces[t].empty())
      KVTIDE_RETURN_IF_ERROR(Annotate(core_.backend(static_cast<int>(t)).Recode(pieces[t]),
                                      absl::StrCat("sequence ", write.sequence->id, ", layer ",
                                                   write.model_layer, ": coding new tokens")));
  return absl::OkStatus();
}

void Writer::PublishProfiles(BlockStore& store, WriteBatch& batch) {
  for (auto& [table, profile] : batch.profiles_) {
    if (profile == table->profile) continue;
    table->profile = profile;
    // Blocks that are this sequence's own; shared ones hold no layer that the former profile lacks.
    for (int64_t index = table->first_block(); index < table->end_block(); index++) {
      Block* block = table->at(index);
      if (block->references() > 1 || block->layout() != table->coded) continue;
      store.SetProfile(block, profile);
      table->blocks->MakeStale(index);
    }
  }
}

absl::Status Writer::Commit(CacheState& state, WriteBatch& batch) {
  KVTIDE_CHECK(batch.phase_ == WriteBatch::Phase::kBegun && batch.previous_ == nullptr);
  for (const SequencePtr& sequence : batch.sequences) {
    if (!sequence->closed) continue;
    const SequenceId id = sequence->id;
    Rollback(state, batch);
    return absl::AbortedError(absl::StrCat("sequence ", id, " was closed during the append"));
  }
  batch.phase_ = WriteBatch::Phase::kCommitted;
  for (const SequencePtr& sequence : batch.sequences) batch.old_tokens_.push_back(sequence->MinTokens());
  const absl::Time now = core_.options().clock();
  for (LayerWrite& write : batch.writes) {
    if (write.repeated) continue;
    GroupTable& table = write.sequence->groups[static_cast<size_t>(write.group)];
    const LayerProgress progress{write.start + write.tokens, write.start, write.hash};
    if (write.whole_group) {
      table.SetAllLayers(progress);
    } else {
      table.SetLayer(write.layer, progress);
    }
    state.sequences.NotEmptyAnyMore(*write.sequence);
    if (write.start == 0) table.profiled[static_cast<size_t>(write.layer)] = true;
    LearnTokens(state, write);
  }
  PublishProfiles(state.store, batch);
  for (const SequencePtr& sequence : batch.sequences) {
    sequence->changes++;
    state.store.Touch(sequence->recency, now);
    state.sequences.CountHeld(*sequence);
    sequence->last_used = now;
  }
  return absl::OkStatus();
}

// Ids count from the first token on.
void Writer::LearnTokens(CacheState& state, const LayerWrite& write) const {
  Sequence& sequence = *write.sequence;
  if (write.token_ids.empty() || sequence.options.seal_at_once || core_.options().max_prefix_blocks == 0)
    return;
  if (!sequence.chain.has_value()) {
    if (write.start != 0) return;
    sequence.prefixes = state.prefixes.Open(sequence);
    sequence.chain.emplace(sequence.prefixes->seed);
  }
  sequence.chain->Add(write.start, write.token_ids);
}

void Writer::Rollback(CacheState& state, WriteBatch& batch) {
  KVTIDE_CHECK(batch.phase_ == WriteBatch::Phase::kBegun);
  if (batch.next_ != nullptr) Rollback(state, *batch.next_);
  BlockStore& store = state.store;
  // Readers may be at rows that the next append overwrites.
  for (const WritingBlock& block : batch.blocks_) block->copy_before_write = true;
  for (Block* const block : batch.inherited_) block->copy_before_write = true;
  for (const SequencePtr& sequence : batch.sequences)
    for (GroupTable& table : sequence->groups)
      for (const auto& [changed, end] : batch.table_ends_) {
        if (changed != &table) continue;
        while (table.end_block() > end) {
          const auto staged = table.staging.find(table.end_block() - 1);
          if (staged != table.staging.end()) {
            store.RemoveDirect(staged->second, sequence->keeper());
            table.staging.erase(staged);
          }
          table.blocks->PopBack();
        }
      }
  for (const SequencePtr& sequence : batch.sequences) state.sequences.CountHeld(*sequence);
  if (batch.previous_ != nullptr) std::exchange(batch.previous_, nullptr)->next_ = nullptr;
  ReleaseBlocks(batch);
  ReleaseSequences(batch);
  state.changed.NotifyAll();
}

void Writer::ReleaseBlocks(WriteBatch& batch) {
  for (WriteBatch* next = batch.next_; next != nullptr; next = next->next_) {
    std::sort(next->inherited_.begin(), next->inherited_.end());
    for (WritingBlock& block : batch.blocks_)
      if (block && std::binary_search(next->inherited_.begin(), next->inherited_.end(), block.get()))
        next->blocks_.push_back(std::move(block));
  }
  batch.blocks_.clear();
  batch.inherited_.clear();
}

void Writer::ReleaseSequences(WriteBatch& batch) {
  for (WriterGuard& writer : batch.writers_) {
    WriteBatch* next = batch.next_;
    while (next != nullptr && !next->Follows(writer.sequence())) next = next->next_;
    if (next == nullptr) continue;
    writer.sequence().writer = next;
    next->writers_.push_back(std::move(writer));
  }
  if (batch.next_ != nullptr) std::exchange(batch.next_, nullptr)->previous_ = nullptr;
  batch.writers_.clear();
  batch.phase_ = WriteBatch::Phase::kEnded;
}

absl::Status Writer::Finish(CacheLock& lock, WriteBatch& batch) {
  KVTIDE_CHECK(batch.phase_ == WriteBatch::Phase::kCommitted);
  ReleaseBlocks(batch);
  lock->changed.NotifyAll();
  for (size_t i = 0; i < batch.sequences.size(); i++)
    lock->counters.appended_tokens +=
        static_cast<uint64_t>(batch.sequences[i]->MinTokens() - batch.old_tokens_[i]);
  if (batch.settles) {
    sealer_.Settle(lock, batch.sequences, batch.context);
  } else {
    sealer_.Register(*lock, batch.sequences);
  }
  // The tokens were published: who is closed after that takes nothing from the others.
  bool left = false;
  for (const SequencePtr& sequence : batch.sequences) {
    lock->sequences.CountHeld(*sequence);
    left = left || !sequence->closed;
  }
  absl::Status status;
  if (!left)
    status = absl::AbortedError(absl::StrCat("sequence ", batch.sequences.front()->id, " was closed"));
  ReleaseSequences(batch);
  lock->changed.NotifyAll();
  return status;
}

}  // namespace kvtide
