#include "daemon/cache/stepper.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

// Rows of a step are never seen here, so no append can repeat one: the hash of no rows.
constexpr uint64_t kUnknownRows = 0x5f3759df9e3779b9;

const CallContext& ContextOf(const StepCall& call) {
  static const CallContext kNobody;
  return call.context != nullptr ? *call.context : kNobody;
}

}  // namespace

Step::~Step() {
  if (open_) stepper_->Rollback(*this);
}

std::span<const SnapshotRun> Step::Runs(size_t item, int group) const {
  return items_[item].tables[static_cast<size_t>(group)]->runs();
}

uint64_t Step::Serial(size_t item, int group) const {
  return items_[item].tables[static_cast<size_t>(group)]->serial();
}

absl::Status Stepper::AddItem(CacheState& state, const StepItem& item, const CallContext& context,
                              Step& step) const {
  if (item.new_tokens < 1 || item.new_tokens > core_.options().max_tokens_per_append) {
    return absl::InvalidArgumentError(absl::StrCat("a step of ", item.new_tokens, " tokens: must be 1 to ",
                                                   core_.options().max_tokens_per_append,
                                                   " (max_tokens_per_append)"));
  }
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, state.sequences.Find(item.sequence, context));
  if (sequence->options.seal_at_once)
    return absl::InvalidArgumentError("the sequence codes at once (evaluation mode); use AppendAttend");
  WriteBatch& batch = step.batch_;
  if (!batch.sequences.empty() && batch.sequences.front()->model != sequence->model) {
    return absl::InvalidArgumentError(absl::StrCat("the sequence is of model ", sequence->model->spec.name,
                                                   ", those before it are of ",
                                                   batch.sequences.front()->model->spec.name));
  }
  if (sequence->MinTokens() != sequence->MaxTokens()) {
    return absl::FailedPreconditionError(
        absl::StrCat("layers have ", sequence->MinTokens(), " to ", sequence->MaxTokens(),
                     " tokens; append to those that are behind, or truncate to ", sequence->MinTokens()));
  }
  Step::Item& added = step.items_.emplace_back();
  added.start = sequence->MinTokens();
  added.end = added.start + item.new_tokens;
  batch.AddSequence(sequence);
  for (size_t layer = 0; layer < sequence->model->spec.layers.size(); layer++)
    batch.AddWrite(static_cast<int>(layer), added.start, item.new_tokens).hash = kUnknownRows;
  return absl::OkStatus();
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
      step.items_[i].tables.push_back(*table);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Step>> Stepper::Begin(const StepCall& call) {
  if (call.items.empty()) return absl::InvalidArgumentError("a step without items");
  if (call.items.size() > core_.options().max_batch_items) {
    return absl::InvalidArgumentError(absl::StrCat("a step of ", call.items.size(), " items, at most ",
                                                   core_.options().max_batch_items, " are allowed"));
  }
  KVTIDE_RETURN_IF_ERROR(ContextOf(call).Check(core_.options().clock(), "the step (nothing has begun)"));
  std::unique_ptr<Step> step(new Step(this));
  CacheLock lock(core_);
  step->items_.reserve(call.items.size());
  for (size_t i = 0; i < call.items.size(); i++) {
    if (absl::Status added = AddItem(*lock, call.items[i], ContextOf(call), *step); !added.ok())
      return Annotate(added, absl::StrCat("items[", i, "]"));
  }
  // A sequence that is there twice is refused as its own writer.
  KVTIDE_RETURN_IF_ERROR(writer_.Begin(lock, step->batch_));
  // The mutex was free while room was made: what is read is looked at now.
  absl::Status status = BringIn(lock, *step);
  if (status.ok()) status = TakeTables(*lock, *step);
  if (!status.ok()) {
    step->reading_.reset();
    writer_.Rollback(*lock, step->batch_);
    return status;
  }
  step->open_ = true;
  return step;
}

absl::Status Stepper::Commit(Step& step) {
  KVTIDE_CHECK(step.open_, "a step ends once");
  step.open_ = false;
  CacheLock lock(core_);
  step.reading_.reset();
  KVTIDE_RETURN_IF_ERROR(writer_.Commit(*lock, step.batch_));
  return writer_.Finish(lock, step.batch_);
}

void Stepper::Rollback(Step& step) {
  KVTIDE_CHECK(step.open_, "a step ends once");
  step.open_ = false;
  CacheLock lock(core_);
  step.reading_.reset();
  writer_.Rollback(*lock, step.batch_);
}

}  // namespace kvtide
