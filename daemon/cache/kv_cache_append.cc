// Append: reserve under the mutex, write without it, publish under it. Shared by Append and AppendAttend.
#include <algorithm>
#include <functional>

#include "absl/strings/str_cat.h"
#include "daemon/cache/kv_cache_impl.h"
#include "daemon/cache/tensor_check.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

bool IsCancelled(const std::atomic<bool>* cancelled) {
  return cancelled != nullptr && cancelled->load(std::memory_order_relaxed);
}

}  // namespace

absl::Status KvCache::Impl::Append(const AppendCall& call) {
  if (call.tokens < 1 || call.tokens > options_.max_tokens_per_append)
    return absl::InvalidArgumentError(absl::StrCat("append of ", call.tokens, " tokens: must be 1 to ",
                                                   options_.max_tokens_per_append,
                                                   " (max_tokens_per_append)"));
  if (call.layers.empty()) return absl::InvalidArgumentError("append without layers");
  WriteBatch batch;
  std::shared_ptr<const ModelState> model;
  {
    MutexLock lock(mu_);
    KVTIDE_ASSIGN_OR_RETURN(SequencePtr sequence, Find(call.sequence));
    model = sequence->model;
    batch.sequences.push_back(std::move(sequence));
  }
  for (const LayerKv& kv : call.layers) {
    if (kv.layer < 0 || static_cast<size_t>(kv.layer) >= model->spec.layers.size())
      return absl::InvalidArgumentError(absl::StrCat("layer ", kv.layer, ": model '", model->spec.name,
                                                     "' has layers 0 to ", model->spec.layers.size() - 1));
    for (const LayerWrite& earlier : batch.writes)
      if (earlier.model_layer == kv.layer)
        return absl::InvalidArgumentError(absl::StrCat("layer ", kv.layer, " is there twice"));
    const LayerSpec& layer = model->spec.layers[static_cast<size_t>(kv.layer)];
    const GroupShape& shape = model->spec.groups[static_cast<size_t>(layer.group)].shape;
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
    LayerWrite& write = batch.writes.emplace_back();
    write.sequence = batch.sequences.front().get();
    write.group = layer.group;
    write.layer = layer.layer_in_group;
    write.model_layer = kv.layer;
    write.start = call.start_position;
    write.tokens = call.tokens;
    write.k = kv.k;
    write.v = kv.v;
  }
  if (IsCancelled(call.cancelled))
    return absl::CancelledError("append was cancelled before anything was written");
  {
    MutexLock lock(mu_);
    KVTIDE_RETURN_IF_ERROR(BeginWrites(batch));
  }
  const absl::Status written = IsCancelled(call.cancelled)
                                   ? absl::CancelledError("append was cancelled; nothing was written")
                                   : WriteBytes(batch);
  MutexLock lock(mu_);
  if (!written.ok()) {
    Rollback(batch);
    return written;
  }
  KVTIDE_RETURN_IF_ERROR(Commit(batch));
  return Finish(batch);
}

absl::Status KvCache::Impl::BeginWrites(WriteBatch& batch) {
  size_t begun = 0;
  absl::Status status;
  for (; begun < batch.sequences.size() && status.ok(); begun++) {
    status = BeginWriter(*batch.sequences[begun]);
    if (!status.ok()) break;
    batch.old_tokens.push_back(batch.sequences[begun]->MinTokens());
  }
  if (!status.ok()) {
    for (size_t i = 0; i < begun; i++) EndWriter(*batch.sequences[i]);
    return status;
  }
  for (LayerWrite& write : batch.writes) {
    status = BeginLayerWrite(batch, write);
    if (!status.ok()) break;
  }
  if (status.ok()) return status;
  if (status.code() == absl::StatusCode::kResourceExhausted) counters_.exhausted++;
  Rollback(batch);
  return status;
}

absl::Status KvCache::Impl::BeginLayerWrite(WriteBatch& batch, LayerWrite& write) {
  Sequence& sequence = *write.sequence;
  GroupTable& table = sequence.groups[static_cast<size_t>(write.group)];
  LayerProgress& layer = table.layers[static_cast<size_t>(write.layer)];
  const std::string where = absl::StrCat("sequence ", sequence.id, ", layer ", write.model_layer);
  if (write.start == layer.last_start && write.tokens == layer.tokens - layer.last_start) {
    write.repeated = true;
    return absl::OkStatus();
  }
  if (write.start != layer.tokens)
    return absl::OutOfRangeError(absl::StrCat(where, ": start position ", write.start,
                                              " is not the layer's length ", layer.tokens,
                                              "; append there, or truncate first"));
  const int64_t end = write.start + write.tokens;
  if (end > options_.max_tokens_per_sequence)
    return absl::ResourceExhaustedError(absl::StrCat(where, ": ", end, " tokens are more than the limit of ",
                                                     options_.max_tokens_per_sequence,
                                                     " (max_tokens_per_sequence)"));
  write.old_last_start = layer.last_start;
  const int64_t first = write.start / kBlockTokens, last = (end - 1) / kBlockTokens;
  const int64_t old_end = table.end_block();
  KVTIDE_RETURN_IF_ERROR(Annotate(AddBlocks(batch, sequence, write.group, last), where));
  for (int64_t index = first; index <= std::min(last, old_end - 1); index++)
    KVTIDE_RETURN_IF_ERROR(Annotate(MakeWritable(batch, sequence, write.group, index), where));
  for (int64_t index = first; index <= last; index++) {
    Target target;
    target.index = index;
    const auto staged = table.staging.find(index);
    Block* exact = staged != table.staging.end() ? staged->second : table.at(index);
    KVTIDE_CHECK(exact->layout == table.exact && exact->writing && exact->place != nullptr);
    target.tier = exact->place->tier;
    target.exact = exact->place->data;
    if (staged != table.staging.end()) {
      KVTIDE_CHECK(table.at(index)->place->tier == target.tier);
      target.coded = table.at(index)->place->data;
    }
    write.targets.push_back(target);
  }
  return absl::OkStatus();
}

// Extends the table with empty blocks up to last_index.
absl::Status KvCache::Impl::AddBlocks(WriteBatch& batch, Sequence& sequence, int group, int64_t last_index) {
  GroupTable& table = sequence.groups[static_cast<size_t>(group)];
  if (last_index < table.end_block()) return absl::OkStatus();
  batch.table_ends.emplace_back(&table, table.end_block());
  const bool twins = sequence.options.seal_at_once && table.coding();
  const BlockLayout* const layouts[2] = {table.exact, table.coded};
  const size_t count = twins ? 2 : 1;
  const size_t bytes_each = table.exact->block_bytes() + (twins ? table.coded->block_bytes() : 0);
  while (table.end_block() <= last_index) {
    const int64_t index = table.end_block();
    Block* blocks[2] = {};
    KVTIDE_RETURN_IF_ERROR(AllocateTogether(
        sequence.home, {layouts, count}, bytes_each * static_cast<size_t>(last_index - index + 1), blocks));
    for (size_t i = 0; i < count; i++) {
      store_.AddRef(blocks[i], sequence.keeper());
      Stamp(blocks[i], sequence, group, index);
      batch.held.push_back(blocks[i]);
    }
    if (twins) {
      blocks[1]->profile = table.profile;
      table.staging[index] = blocks[0];
      table.blocks.push_back(blocks[1]);
    } else {
      table.blocks.push_back(blocks[0]);
    }
  }
  return absl::OkStatus();
}

// The block, and its twin, become this sequence's own, unmoving, unread beyond the layers' lengths.
absl::Status KvCache::Impl::MakeWritable(WriteBatch& batch, Sequence& sequence, int group, int64_t index) {
  GroupTable& table = sequence.groups[static_cast<size_t>(group)];
  const auto staged = table.staging.find(index);
  Block* const entries[2] = {table.at(index), staged != table.staging.end() ? staged->second : nullptr};
  if (entries[0]->writing) return absl::OkStatus();  // by an earlier layer of this batch
  const size_t count = entries[1] != nullptr ? 2 : 1;
  bool copy = false;
  for (size_t i = 0; i < count; i++) {  // again from the start after a wait: the mutex was free
    if (entries[i]->moving) {
      KVTIDE_RETURN_IF_ERROR(WaitUntilStill(entries[i]));
      i = static_cast<size_t>(-1);
    }
  }
  for (size_t i = 0; i < count; i++) {
    if (entries[i]->place == nullptr)
      return absl::DataLossError(absl::StrCat("tokens ", index * kBlockTokens, " to ",
                                              (index + 1) * kBlockTokens - 1, " were dropped; truncate to ",
                                              index * kBlockTokens, " or below"));
    if (entries[i]->refs > 1 || (entries[i]->copy_before_write && entries[i]->place->pins > 0)) copy = true;
    if (entries[i]->place->tier != entries[0]->place->tier) copy = true;
  }
  if (!copy) {
    for (size_t i = 0; i < count; i++) {
      entries[i]->copy_before_write = false;
      StartWriting(batch, entries[i]);
    }
    return absl::OkStatus();
  }
  const BlockLayout* layouts[2] = {entries[0]->layout, count == 2 ? entries[1]->layout : nullptr};
  Block* copies[2] = {};
  KVTIDE_RETURN_IF_ERROR(AllocateTogether(sequence.home, {layouts, count}, 0, copies));
  absl::Status status;
  for (size_t i = 0; i < count && status.ok(); i++) {
    if (entries[i]->place == nullptr) {  // dropped while room was made
      status = absl::DataLossError(absl::StrCat("tokens from ", index * kBlockTokens, " were dropped"));
      break;
    }
    Place* source = entries[i]->place;
    store_.Pin(source);
    status = CopyOne(
        {source->tier, copies[i]->place->tier, source->data, copies[i]->place->data, source->bytes, {}});
    store_.Unpin(source);
  }
  for (size_t i = 0; i < count; i++) {
    if (!status.ok()) {
      copies[i]->writing = false;
      store_.Unhold(copies[i]);
      continue;
    }
    copies[i]->profile = entries[i]->profile;
    Stamp(copies[i], sequence, group, index);
    store_.AddRef(copies[i], sequence.keeper());
    batch.held.push_back(copies[i]);
    (i == 0 ? table.at(index) : staged->second) = copies[i];
    store_.Release(entries[i], sequence.keeper());
    counters_.copied_on_write_blocks++;
  }
  return status;
}

void KvCache::Impl::StartWriting(WriteBatch& batch, Block* block) {
  KVTIDE_CHECK(!block->writing && !block->moving && block->refs == 1);
  block->writing = true;
  block->has_checksum = false;
  store_.Hold(block);
  batch.held.push_back(block);
}

void KvCache::Impl::Stamp(Block* block, const Sequence& sequence, int group, int64_t index) {
  block->stamp = {sequence.model->id, sequence.id, std::hash<std::string>{}(sequence.options.name_space),
                  group, index};
  block->last_touched = options_.clock();
}

absl::Status KvCache::Impl::WriteBytes(WriteBatch& batch) {
  for (LayerWrite& write : batch.writes) {
    if (write.repeated) continue;
    const GroupTable& table = write.sequence->groups[static_cast<size_t>(write.group)];
    std::vector<std::vector<AppendPiece>> pieces(backends_.size());
    for (const Target& target : write.targets) {
      const int64_t block_start = target.index * kBlockTokens;
      const int64_t begin = std::max(write.start, block_start);
      const int64_t end = std::min(write.start + write.tokens, block_start + kBlockTokens);
      AppendPiece piece;
      piece.layout = table.exact;
      piece.block = target.exact;
      piece.layer = write.layer;
      piece.first_token = static_cast<int>(begin - block_start);
      piece.tokens = static_cast<int>(end - begin);
      piece.source_row = static_cast<size_t>(begin - write.start);
      pieces[static_cast<size_t>(target.tier)].push_back(piece);
    }
    for (size_t t = 0; t < pieces.size(); t++) {
      if (pieces[t].empty()) continue;
      AppendArgs args;
      args.k = write.k;
      args.v = write.v;
      args.pieces = pieces[t];
      KVTIDE_RETURN_IF_ERROR(
          Annotate(backends_[t]->Append(args), absl::StrCat("sequence ", write.sequence->id, ", layer ",
                                                            write.model_layer, ": writing new tokens")));
    }
    if (write.targets.front().coded != nullptr) KVTIDE_RETURN_IF_ERROR(CodeAtOnce(batch, write));
  }
  return absl::OkStatus();
}

// seal_at_once: codes what the layer's blocks hold now. The first tokens of the layer give its profile.
absl::Status KvCache::Impl::CodeAtOnce(WriteBatch& batch, LayerWrite& write) {
  GroupTable& table = write.sequence->groups[static_cast<size_t>(write.group)];
  const GroupShape& shape = table.coded->shape();
  auto& profile = batch.profiles.try_emplace(&table, table.profile).first->second;
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
  std::vector<std::vector<RecodePiece>> pieces(backends_.size());
  for (const Target& target : write.targets) {
    RecodePiece piece;
    piece.from = table.exact;
    piece.source = target.exact;
    piece.to = table.coded;
    piece.target = target.coded;
    piece.to_profile = profile.get();
    piece.first_layer = write.layer;
    piece.layers = 1;
    piece.tokens = static_cast<int>(
        std::min<int64_t>(kBlockTokens, write.start + write.tokens - target.index * kBlockTokens));
    pieces[static_cast<size_t>(target.tier)].push_back(piece);
  }
  for (size_t t = 0; t < pieces.size(); t++)
    if (!pieces[t].empty())
      KVTIDE_RETURN_IF_ERROR(
          Annotate(backends_[t]->Recode(pieces[t]), absl::StrCat("sequence ", write.sequence->id, ", layer ",
                                                                 write.model_layer, ": coding new tokens")));
  return absl::OkStatus();
}

absl::Status KvCache::Impl::Commit(WriteBatch& batch) {
  for (const SequencePtr& sequence : batch.sequences) {
    if (!sequence->closed) continue;
    const SequenceId id = sequence->id;
    Rollback(batch);
    return absl::AbortedError(absl::StrCat("sequence ", id, " was closed during the append"));
  }
  batch.committed = true;
  const absl::Time now = options_.clock();
  for (LayerWrite& write : batch.writes) {
    if (write.repeated) continue;
    GroupTable& table = write.sequence->groups[static_cast<size_t>(write.group)];
    LayerProgress& layer = table.layers[static_cast<size_t>(write.layer)];
    layer.tokens = write.start + write.tokens;
    layer.last_start = write.start;
    NotEmptyAnyMore(*write.sequence);
    if (write.start == 0) table.profiled[static_cast<size_t>(write.layer)] = true;
  }
  for (auto& [table, profile] : batch.profiles) {
    if (profile == table->profile) continue;
    table->profile = profile;
    // Blocks that are this sequence's own; shared ones hold no layer that the former profile lacks.
    for (Block* block : table->blocks)
      if (block->refs == 1 && block->layout == table->coded) block->profile = profile;
  }
  for (Block* block : batch.held) store_.Touch(block, now);
  for (const SequencePtr& sequence : batch.sequences) sequence->last_used = now;
  return absl::OkStatus();
}

// Takes back what the batch has done, in lengths and in blocks, and ends its writers.
void KvCache::Impl::Rollback(WriteBatch& batch) {
  for (LayerWrite& write : batch.writes) {
    if (!batch.committed || write.repeated) continue;
    LayerProgress& layer =
        write.sequence->groups[static_cast<size_t>(write.group)].layers[static_cast<size_t>(write.layer)];
    layer.tokens = write.start;
    layer.last_start = write.old_last_start;
  }
  for (Block* block : batch.held) {
    block->writing = false;
    if (block->place->pins > 0) block->copy_before_write = true;
  }
  for (const SequencePtr& sequence : batch.sequences)
    for (GroupTable& table : sequence->groups)
      for (const auto& [changed, end] : batch.table_ends) {
        if (changed != &table) continue;
        while (table.end_block() > end) {
          const auto staged = table.staging.find(table.end_block() - 1);
          if (staged != table.staging.end()) {
            store_.Release(staged->second, sequence->keeper());
            table.staging.erase(staged);
          }
          store_.Release(table.blocks.back(), sequence->keeper());
          table.blocks.pop_back();
        }
      }
  for (Block* block : batch.held) store_.Unhold(block);
  batch.held.clear();
  for (const SequencePtr& sequence : batch.sequences) EndWriter(*sequence);
  changed_.NotifyAll();
}

absl::Status KvCache::Impl::Finish(WriteBatch& batch) {
  for (Block* block : batch.held) {
    block->writing = false;
    store_.Unhold(block);
  }
  batch.held.clear();
  changed_.NotifyAll();
  absl::Status status;
  for (size_t i = 0; i < batch.sequences.size(); i++) {
    Sequence& sequence = *batch.sequences[i];
    counters_.appended_tokens += static_cast<uint64_t>(sequence.MinTokens() - batch.old_tokens[i]);
    if (!sequence.closed) Settle(sequence);
    if (sequence.closed && status.ok())
      status = absl::AbortedError(absl::StrCat("sequence ", sequence.id, " was closed"));
    EndWriter(sequence);
  }
  return status;
}

}  // namespace kvtide
