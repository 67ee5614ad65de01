#include "clients/cpp/step_tables.h"

#include <cstdint>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::client {

v1::BeginStepRequest& RequestStep(std::span<const StepItem> items, uint64_t after,
                                  v1::SessionRequest* message) {
  v1::BeginStepRequest& request = *message->mutable_begin_step();
  for (const StepItem& item : items) {
    v1::StepItem* const out = request.add_items();
    out->set_sequence_id(item.sequence);
    out->set_new_tokens(item.new_tokens);
    out->mutable_token_ids()->Add(item.token_ids.begin(), item.token_ids.end());
  }
  request.set_after_step_id(after);
  return request;
}

absl::StatusOr<StepView> StepTables::Begin(Carrier* carrier, std::span<const StepItem> items,
                                           v1::SessionRequest* message) {
  // What is told in one answer is applied before the next one is asked for.
  const MutexLock lock(mutex_);
  if (!known_) tables_.clear();
  message->mutable_begin_step()->set_tables(known_ ? v1::STEP_TABLES_CHANGES : v1::STEP_TABLES_ALL);
  known_ = false;
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(carrier->Call(message, &answer));
  const v1::BeginStepResponse& response = answer.begin_step();
  StepView step;
  step.id = response.step_id();
  if (response.items_size() != static_cast<int>(items.size()))
    return absl::InternalError(
        absl::StrCat("a step of ", items.size(), " items, the answer has ", response.items_size()));
  for (size_t i = 0; i < items.size(); i++) {
    const v1::StepSequence& told = response.items(static_cast<int>(i));
    step.starts.push_back(told.start_position());
    KVTIDE_RETURN_IF_ERROR(Update(items[i].sequence, told, &step));
  }
  step.seals.assign(response.seals().begin(), response.seals().end());
  known_ = true;
  return step;
}

absl::Status StepTables::Update(SequenceId sequence, const v1::StepSequence& told, StepView* step) {
  for (int group = 0; group < told.tables_size(); group++) {
    const v1::StepTable& change = told.tables(group);
    StepTable& table = tables_[{sequence, group}];
    const auto end = table.first_block + static_cast<int64_t>(table.blocks.size());
    const int64_t first = change.first_block(), changed = change.first_changed();
    if (first < 0 || changed < first || (changed > first && (first < table.first_block || changed > end)))
      return absl::InternalError(absl::StrCat("blocks ", first, " to ", changed, " were never told"));
    if (changed > first) {
      table.blocks.erase(table.blocks.begin(), table.blocks.begin() + (first - table.first_block));
      table.blocks.resize(static_cast<size_t>(changed - first));
    } else {
      table.blocks.clear();
    }
    if (table.version == 0 || changed < end || first != table.first_block || change.blocks_size() > 0)
      table.version = ++last_version_;
    table.first_block = first;
    table.first_changed = changed;
    table.profile = change.profile();
    for (const v1::StepBlocks& blocks : change.blocks()) {
      const int kind = KindOf(blocks);
      for (const uint64_t offset : blocks.offsets()) table.blocks.push_back({offset, kind});
    }
    step->tables.push_back(&table);
  }
  return absl::OkStatus();
}

int StepTables::KindOf(const v1::StepBlocks& blocks) {
  for (size_t i = 0; i < kinds_.size(); i++)
    if (kinds_[i].pair == blocks.pair() && kinds_[i].tier == blocks.tier() &&
        kinds_[i].device == blocks.device())
      return static_cast<int>(i);
  kinds_.push_back({blocks.pair(), blocks.tier(), blocks.device()});
  return static_cast<int>(kinds_.size()) - 1;
}

std::vector<BlockKind> StepTables::kinds() {
  const MutexLock lock(mutex_);
  return kinds_;
}

void StepTables::Forget(SequenceId sequence) {
  const MutexLock lock(mutex_);
  tables_.erase(tables_.lower_bound({sequence, 0}),
                tables_.upper_bound({sequence, std::numeric_limits<int>::max()}));
}

}  // namespace kvtide::client
