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

v1::PinStepRequest& RequestPin(std::span<const SequenceId> sequences, v1::SessionRequest* message) {
  v1::PinStepRequest& request = *message->mutable_pin_step();
  request.mutable_sequence_ids()->Add(sequences.begin(), sequences.end());
  return request;
}

absl::StatusOr<StepView> StepTables::Begin(Carrier* carrier, v1::SessionRequest* message) {
  // What is told in one answer is applied before the next one is asked for.
  const MutexLock lock(mutex_);
  if (message->has_pin_step()) {
    v1::PinStepRequest* const pin = message->mutable_pin_step();
    return Ask(carrier, message, pin, {pin->sequence_ids().begin(), pin->sequence_ids().end()},
               &v1::SessionResponse::pin_step);
  }
  v1::BeginStepRequest* const begin = message->mutable_begin_step();
  std::vector<SequenceId> sequences;
  sequences.reserve(static_cast<size_t>(begin->items_size()));
  for (const v1::StepItem& item : begin->items()) sequences.push_back(item.sequence_id());
  return Ask(carrier, message, begin, sequences, &v1::SessionResponse::begin_step);
}

template <class Request, class Response>
absl::StatusOr<StepView> StepTables::Ask(Carrier* carrier, v1::SessionRequest* message, Request* request,
                                         const std::vector<SequenceId>& sequences,
                                         const Response& (v1::SessionResponse::*response)() const) {
  if (!known_) tables_.clear();
  request->set_tables(known_ ? v1::STEP_TABLES_CHANGES : v1::STEP_TABLES_ALL);
  known_ = false;
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(carrier->Call(message, &answer));
  const Response& told = (answer.*response)();
  StepView step;
  step.id = told.step_id();
  if (told.items_size() != static_cast<int>(sequences.size()))
    return absl::InternalError(
        absl::StrCat("a step of ", sequences.size(), " items, the answer has ", told.items_size()));
  for (size_t i = 0; i < sequences.size(); i++) {
    const v1::StepSequence& item = told.items(static_cast<int>(i));
    step.starts.push_back(item.start_position());
    KVTIDE_RETURN_IF_ERROR(Update(sequences[i], item, &step));
  }
  if constexpr (requires { told.seals(); }) step.seals.assign(told.seals().begin(), told.seals().end());
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
    if (changed == first) table.pair = change.pair();
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
