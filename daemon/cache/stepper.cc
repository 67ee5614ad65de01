#include "daemon/cache/stepper.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/cache/sequence/persist_turn.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

// Rows of a step are never seen here, so no append can repeat one: the hash of no rows.
constexpr uint64_t kUnknownRows = 0x5f3759df9e3779b9;

template <class Call>
const CallContext& ContextOf(const Call& call) {
  static const CallContext kNobody;
  return call.context != nullptr ? *call.context : kNobody;
}

absl::Status Lost() {
  return absl::AbortedError("the step before this one was rolled back, and this one with it");
}

absl::Status CheckModel(const WriteBatch& batch, const Sequence& sequence) {
  if (batch.sequences.front()->model->family == sequence.model->family) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("the sequence is of model ", sequence.model->spec.name,
                                                 ", those before it are of ",
                                                 batch.sequences.front()->model->spec.name));
}

}  // namespace

Step::~Step() {
  if (open_) stepper_->Rollback(*this);
}

std::span<const SnapshotRun> Step::Runs(size_t item, int group) const {
  return items_[item].groups[static_cast<size_t>(group)].table->runs();
}

size_t Step::Find(SequenceId sequence, size_t likely) const {
  if (likely < size() && this->sequence(likely) == sequence) return likely;
  size_t item = 0;
  while (item < size() && this->sequence(item) != sequence) item++;
  return item;
}

std::vector<StepSeal> Step::Seals() const {
  std::vector<StepSeal> seals;
  for (const Sealer::Seal& seal : seals_) {
    const auto item =
        std::find_if(batch_.sequences.begin(), batch_.sequences.end(),
                     [&](const SequencePtr& sequence) { return sequence.get() == seal.sequence; });
    seals.push_back({static_cast<size_t>(item - batch_.sequences.begin()), seal.group, seal.index,
                     stepper_->core_.Data(*seal.source.get()), stepper_->core_.Data(*seal.target->place),
                     seal.table().coded});
  }
  return seals;
}

absl::Status Step::SayTokens(size_t item, std::span<const TokenId> token_ids) {
  Item& of = items_[item];
  const auto where = [&] { return absl::StrCat("items[", item, "]"); };
  if (static_cast<int64_t>(token_ids.size()) != of.end - of.start)
    return absl::InvalidArgumentError(absl::StrCat(where(), ": ", token_ids.size(), " token ids for ",
                                                   of.end - of.start, " tokens; say all of them, or none"));
  if (token_ids.empty()) return absl::OkStatus();  // of a pinned step
  if (!of.token_ids.empty()) {
    const auto [said, now] = std::mismatch(of.token_ids.begin(), of.token_ids.end(), token_ids.begin());
    if (said == of.token_ids.end()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(where(), ": token ",
                                                   of.start + (said - of.token_ids.begin()), " has the id ",
                                                   *now, ", but came with the id ", *said, " before"));
  }
  of.token_ids.assign(token_ids.begin(), token_ids.end());
  // One group says it for all.
  batch_.writes[item * model().groups.size()].token_ids = of.token_ids;
  return absl::OkStatus();
}

int Step::FirstLayerLeft() const {
  const auto left = std::find(written_.begin(), written_.end(), false);
  return left == written_.end() ? -1 : static_cast<int>(left - written_.begin());
}

uint64_t Step::Serial(size_t item, int group) const {
  return items_[item].groups[static_cast<size_t>(group)].table->serial();
}

absl::Status Stepper::AddItem(CacheState& state, const StepItem& item, const CallContext& context,
                              const Step* after, Step& step) const {
  if (item.new_tokens < 1 || item.new_tokens > core_.options().max_tokens_per_append) {
    return absl::InvalidArgumentError(absl::StrCat("a step of ", item.new_tokens, " tokens: must be 1 to ",
                                                   core_.options().max_tokens_per_append,
                                                   " (max_tokens_per_append)"));
  }
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, state.sequences.Find(item.sequence, context));
  if (sequence->options.seal_at_once)
    return absl::InvalidArgumentError("the sequence codes at once (evaluation mode); use AppendAttend");
  WriteBatch& batch = step.batch_;
  if (!batch.sequences.empty()) KVTIDE_RETURN_IF_ERROR(CheckModel(batch, *sequence));
  // The last open step that has the sequence.
  const WriteBatch* previous = after != nullptr ? &after->batch_ : nullptr;
  while (previous != nullptr && !previous->Writes(*sequence)) previous = previous->previous();
  const bool follows = previous != nullptr;
  if (!follows && sequence->MinTokens() != sequence->MaxTokens()) {
    return absl::FailedPreconditionError(
        absl::StrCat("layers have ", sequence->MinTokens(), " to ", sequence->MaxTokens(),
                     " tokens; append to those that are behind, or truncate to ", sequence->MinTokens()));
  }
  Step::Item& added = step.items_.emplace_back();
  added.start = follows ? previous->EndOf(*sequence) : sequence->MinTokens();
  added.end = added.start + item.new_tokens;
  batch.AddSequence(sequence, follows);
  for (size_t group = 0; group < sequence->groups.size(); group++)
    batch.AddGroup(static_cast<int>(group), added.start, item.new_tokens).hash = kUnknownRows;
  if (item.token_ids.empty()) return absl::OkStatus();
  return step.SayTokens(step.items_.size() - 1, item.token_ids);
}

absl::Status Stepper::BringIn(CacheLock& lock, const Step& step) {
  // The mutex is free meanwhile, and pressure of others may move blocks out again.
  constexpr int kRounds = 8;
  for (int round = 0; round < kRounds; round++) {
    bool far = false;
    for (const SequencePtr& sequence : step.batch_.sequences) {
      for (const GroupTable& table : sequence->groups) {
        for (int64_t index = table.first_block(); index < table.end_block() && !sequence->closed; index++) {
          Block* const block = table.at(index);
          if (!mover_.IsFar(*block)) continue;
          far = true;
          KVTIDE_RETURN_IF_ERROR(mover_.BringIn(lock, block));
        }
      }
    }
    if (!far) return absl::OkStatus();
  }
  return absl::ResourceExhaustedError(
      "blocks of the step leave memory as fast as they come; steps of fewer sequences, or more memory");
}

absl::Status Stepper::TakeTables(CacheState& state, Step& step) const {
  const WriteBatch& batch = step.batch_;
  const size_t groups = batch.sequences.front()->model->spec.groups.size();
  step.reading_.emplace(state, batch.sequences.size() * groups);
  for (size_t i = 0; i < batch.sequences.size(); i++) {
    for (size_t group = 0; group < groups; group++) {
      auto table = step.reading_->Add(batch.sequences[i], static_cast<int>(group), &batch);
      if (!table.ok()) return Annotate(table.status(), absl::StrCat("items[", i, "]"));
      for (const SnapshotRun& run : (*table)->runs()) {
        if (run.tier != ChunkPicture::kDropped) continue;
        return absl::DataLossError(absl::StrCat("items[", i, "]: tokens ", run.first_block * kBlockTokens,
                                                " to ", run.end_block() * kBlockTokens - 1, " were dropped"));
      }
      const GroupTable& of = batch.sequences[i]->groups[group];
      step.items_[i].groups.push_back({*table, of.profile, of.coded});
    }
  }
  return absl::OkStatus();
}

absl::Status Stepper::CheckHome(const Step& step) const {
  for (size_t i = 0; i < step.size(); i++) {
    if (!step.batch_.sequences[i]->options.degrade.empty())
      return absl::FailedPreconditionError(absl::StrCat(
          "items[", i, "]: blocks of sequence ", step.batch_.sequences[i]->id,
          " may be recoded to fewer bits (degrade), and an engine that attends by itself reads one "
          "pair: use AppendAttend, or a sequence without degrade"));
    const int home = step.batch_.sequences[i]->home;
    for (const Step::Seen& seen : step.items_[i].groups)
      for (const SnapshotRun& run : seen.table->runs())
        if (run.tier != home)
          return absl::UnavailableError(absl::StrCat(
              "items[", i, "]: tokens from ", run.first_block * kBlockTokens, " on lie in ",
              TierText(core_.options(), static_cast<size_t>(run.tier)),
              ", and there is no room for them in the memory that the engine reads; fewer or shorter "
              "sequences at a time, or more of that memory"));
    for (const Step::Seen& seen : step.items_[i].groups) {
      for (const SnapshotRun& run : seen.table->runs())
        if (run.profile != nullptr && (seen.profile == nullptr || run.profile->hash != seen.profile->hash))
          return absl::FailedPreconditionError(absl::StrCat(
              "items[", i, "]: blocks from token ", run.first_block * kBlockTokens,
              " on were coded with another profile than those that follow; an engine that attends by itself "
              "reads a sequence with one: use AppendAttend"));
    }
  }
  for (const Sealer::Seal& seal : step.seals_)
    if (seal.source->tier != seal.sequence->home)
      return absl::UnavailableError(
          "a block that is to be coded lies below the memory that the engine reads");
  return absl::OkStatus();
}

void Stepper::Abandon(CacheState& state, Step& step) {
  step.reading_.reset();
  for (Sealer::Seal& seal : step.seals_) Sealer::TakeBack(seal);
  step.seals_.clear();
  if (step.batch_.open()) writer_.Rollback(state, step.batch_);
}

absl::Status Stepper::AddItems(CacheState& state, const StepCall& call, Step& step) const {
  step.items_.reserve(call.items.size());
  absl::flat_hash_set<SequenceId> seen;
  for (size_t i = 0; i < call.items.size(); i++) {
    const auto where = [i] { return absl::StrCat("items[", i, "]"); };
    if (!seen.insert(call.items[i].sequence).second)
      return absl::InvalidArgumentError(
          absl::StrCat(where(), ": sequence ", call.items[i].sequence, " is there twice"));
    if (absl::Status added = AddItem(state, call.items[i], ContextOf(call), call.after, step); !added.ok())
      return AnnotateRefused(added, where());
    if (i == 0) step.batch_.writes.reserve(call.items.size() * step.model().groups.size());
  }
  step.written_.assign(step.model().layers.size(), false);
  return absl::OkStatus();
}

template <class Attempt>
absl::StatusOr<std::unique_ptr<Step>> Stepper::WithAllBroughtUp(bool mapped,
                                                                std::span<const SequenceId> sequences,
                                                                const CallContext& context, Attempt attempt) {
  absl::StatusOr<std::unique_ptr<Step>> step = attempt();
  if (!mapped || step.status().code() != absl::StatusCode::kUnavailable) return step;
  KVTIDE_RETURN_IF_ERROR(mover_.Prefetch(sequences, context).status());
  step = attempt();
  if (step.status().code() == absl::StatusCode::kUnavailable)
    return absl::ResourceExhaustedError(step.status().message());
  return step;
}

absl::StatusOr<std::unique_ptr<Step>> Stepper::Begin(const StepCall& call) {
  std::vector<SequenceId> sequences;
  for (const StepItem& item : call.items) sequences.push_back(item.sequence);
  return WithAllBroughtUp(call.mapped, sequences, ContextOf(call), [&] { return TryBegin(call); });
}

absl::StatusOr<std::unique_ptr<Step>> Stepper::Pin(const PinCall& call) {
  return WithAllBroughtUp(call.mapped, call.sequences, ContextOf(call), [&] { return TryPin(call); });
}

absl::StatusOr<std::unique_ptr<Step>> Stepper::TryPin(const PinCall& call) {
  if (call.sequences.empty()) return absl::InvalidArgumentError("a step without sequences");
  if (call.sequences.size() > core_.options().max_batch_items)
    return absl::InvalidArgumentError(absl::StrCat("a step of ", call.sequences.size(),
                                                   " sequences, at most ", core_.options().max_batch_items,
                                                   " are allowed"));
  KVTIDE_RETURN_IF_ERROR(ContextOf(call).Check(core_.options().clock(), "the step (nothing is pinned)"));
  std::unique_ptr<Step> step(new Step(this));
  step->pinned_ = true;
  step->mapped_ = call.mapped;
  WriteBatch& batch = step->batch_;  // of which only the sequences are used
  const auto where = [](size_t i) { return absl::StrCat("items[", i, "]"); };
  absl::flat_hash_set<SequenceId> seen;
  CacheLock lock(core_);
  for (size_t i = 0; i < call.sequences.size(); i++) {
    if (!seen.insert(call.sequences[i]).second)
      return absl::InvalidArgumentError(
          absl::StrCat(where(i), ": sequence ", call.sequences[i], " is there twice"));
    absl::StatusOr<SequencePtr> sequence = lock->sequences.Find(call.sequences[i], ContextOf(call));
    if (!sequence.ok()) return AnnotateRefused(sequence.status(), where(i));
    if (i > 0) KVTIDE_RETURN_IF_ERROR(Annotate(CheckModel(batch, **sequence), where(i)));
    batch.AddSequence(*std::move(sequence));
  }
  KVTIDE_RETURN_IF_ERROR(BringIn(lock, *step));
  // The mutex was free meanwhile: what is pinned is looked at now.
  for (size_t i = 0; i < batch.sequences.size(); i++) {
    const int64_t tokens = batch.sequences[i]->MinTokens();
    if (tokens == 0)
      return absl::InvalidArgumentError(
          absl::StrCat(where(i), ": sequence ", call.sequences[i], " has no tokens in some of its layers"));
    Step::Item& item = step->items_.emplace_back();
    item.start = item.end = tokens;
  }
  absl::Status status = TakeTables(*lock, *step);
  if (call.mapped && status.ok()) status = CheckHome(*step);
  if (!status.ok()) {
    Abandon(*lock, *step);
    return status;
  }
  step->open_ = true;
  return step;
}

absl::Status Stepper::AttendPinned(const Step& step, const AttendCall& call) {
  if (!step.pinned_)
    return absl::FailedPreconditionError(
        "the step takes new tokens: give it their rows (AppendAttend), or pin one (PinStep) to only read");
  if (call.items.empty()) return absl::InvalidArgumentError("attention without items");
  KVTIDE_RETURN_IF_ERROR(reader_.CheckCall(call, step.model(), false));
  KVTIDE_RETURN_IF_ERROR(ContextOf(call).Check(core_.options().clock(), "the attention"));
  const auto group = static_cast<size_t>(step.model().layers[static_cast<size_t>(call.layer)].group);
  std::vector<SequencePtr> sequences;
  std::vector<Reader::Held> held;
  for (size_t i = 0; i < call.items.size(); i++) {
    const SequenceId id = call.items[i].sequence;
    const size_t item = step.Find(id, i);
    if (item == step.size())
      return absl::InvalidArgumentError(
          absl::StrCat("items[", i, "]: sequence ", id, " is not one of those that the step has pinned"));
    sequences.push_back(step.batch_.sequences[item]);
    held.push_back({step.items_[item].groups[group].table, step.end(item)});
  }
  CacheLock lock(core_);
  return reader_.Attend(lock, call, sequences, nullptr, held);
}

absl::StatusOr<std::unique_ptr<Step>> Stepper::TryBegin(const StepCall& call) {
  if (call.items.empty()) return absl::InvalidArgumentError("a step without items");
  if (call.items.size() > core_.options().max_batch_items) {
    return absl::InvalidArgumentError(absl::StrCat("a step of ", call.items.size(), " items, at most ",
                                                   core_.options().max_batch_items, " are allowed"));
  }
  KVTIDE_RETURN_IF_ERROR(ContextOf(call).Check(core_.options().clock(), "the step (nothing has begun)"));
  std::unique_ptr<Step> step;
  CacheLock lock(core_);
  for (bool waited = false;; waited = true) {
    step.reset(new Step(this));
    if (call.after != nullptr) {
      if (call.after->pinned_)
        return absl::InvalidArgumentError(
            "the step that this one is to follow is pinned: nothing follows it");
      if (!call.after->batch_.open())
        return absl::AbortedError(
            "the step that this one is to follow was rolled back with the one before it");
      if (call.after->batch_.followed())
        return absl::InvalidArgumentError(
            "another step follows that one already; steps follow each other in a row");
      step->batch_.Follow(call.after->batch_);
    }
    KVTIDE_RETURN_IF_ERROR(AddItems(*lock, call, *step));
    if (waited || !BeingPersisted(step->batch_.sequences)) break;
    // Lengths may change meanwhile: all is looked at anew.
    const std::vector<SequencePtr> sequences = step->batch_.sequences;
    step.reset();
    KVTIDE_RETURN_IF_ERROR(AwaitPersisted(lock, sequences, ContextOf(call), "the step (nothing has begun)"));
  }
  KVTIDE_RETURN_IF_ERROR(writer_.Begin(lock, step->batch_));
  // The mutex was free while room was made: what is read is looked at now.
  step->mapped_ = call.mapped;
  step->batch_.settles = !call.mapped;
  absl::Status status = BringIn(lock, *step);
  if (call.mapped && status.ok()) step->seals_ = sealer_.Start(lock, step->batch_.sequences, call.most_seals);
  if (status.ok()) status = TakeTables(*lock, *step);
  if (call.mapped && status.ok()) status = CheckHome(*step);
  if (!status.ok()) {
    Abandon(*lock, *step);
    return status;
  }
  step->open_ = true;
  return step;
}

absl::Status Stepper::AttendLayer(Step& step, const AttendCall& call) {
  KVTIDE_CHECK(step.open_, "a step ends once");
  if (step.pinned_)
    return absl::InvalidArgumentError("the step is pinned: it takes no rows, use Attend with its id");
  if (call.items.size() != step.size()) {
    return absl::InvalidArgumentError(absl::StrCat(call.items.size(), " items, the step has ", step.size(),
                                                   "; a layer has rows for all of them"));
  }
  for (size_t i = 0; i < step.size(); i++) {
    const AttendRequest& item = call.items[i];
    const int64_t tokens = step.end(i) - step.start(i);
    if (item.sequence == step.sequence(i) && item.start_position == step.start(i) &&
        item.new_tokens == tokens)
      continue;
    return absl::InvalidArgumentError(
        absl::StrCat("items[", i, "] has ", item.new_tokens, " tokens of sequence ", item.sequence, " from ",
                     item.start_position, " on, the step has ", tokens, " of sequence ", step.sequence(i),
                     " from ", step.start(i), " on"));
  }
  KVTIDE_RETURN_IF_ERROR(reader_.CheckCall(call, step.model(), true));
  for (size_t i = 0; i < step.size(); i++)
    if (!call.items[i].token_ids.empty()) KVTIDE_RETURN_IF_ERROR(step.SayTokens(i, call.items[i].token_ids));
  WriteBatch layer;
  CacheLock lock(core_);
  if (!step.batch_.open()) return Lost();
  writer_.TakeLayer(*lock, step.batch_, call.layer, call.items, layer);
  KVTIDE_RETURN_IF_ERROR(reader_.Attend(lock, call, step.batch_.sequences, &layer));
  step.written_[static_cast<size_t>(call.layer)] = true;
  return absl::OkStatus();
}

absl::Status Stepper::Commit(Step& step) {
  KVTIDE_CHECK(step.open_, "a step ends once");
  step.open_ = false;
  CacheLock lock(core_);
  if (step.pinned_) {
    Abandon(*lock, step);
    return absl::OkStatus();
  }
  const bool lost = !step.batch_.open();
  if (lost || step.batch_.waits()) {
    Abandon(*lock, step);
    if (lost) return Lost();
    return absl::FailedPreconditionError("the step that this one follows is still open; end that one first");
  }
  step.reading_.reset();
  const absl::Status committed = writer_.Commit(*lock, step.batch_);
  for (Sealer::Seal& seal : step.seals_) {
    if (committed.ok()) {
      sealer_.Publish(*lock, seal);
    } else {
      Sealer::TakeBack(seal);
    }
  }
  step.seals_.clear();
  KVTIDE_RETURN_IF_ERROR(committed);
  return writer_.Finish(lock, step.batch_);
}

void Stepper::Rollback(Step& step) {
  KVTIDE_CHECK(step.open_, "a step ends once");
  step.open_ = false;
  CacheLock lock(core_);
  Abandon(*lock, step);
}

}  // namespace kvtide
