// Block tables as the daemon has told them: it tells what has changed since the last step, this keeps the
// rest. Thread-safe.
#pragma once

#include <map>
#include <span>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "clients/cpp/carrier.h"
#include "clients/cpp/client.h"
#include "kernels/base/mutex.h"

namespace kvtide::client {

// A step whose tables are borrowed: each until the next step of its sequence, or its close.
struct StepView {
  uint64_t id = 0;
  std::vector<int64_t> starts;
  std::vector<const StepTable*> tables;  // [items][groups]
  std::vector<v1::StepSeal> seals;
};

// A BeginStepRequest for the items, behind the open step `after` (0 = none).
v1::BeginStepRequest& RequestStep(std::span<const StepItem> items, uint64_t after,
                                  v1::SessionRequest* message);

// A PinStepRequest for the sequences.
v1::PinStepRequest& RequestPin(std::span<const SequenceId> sequences, v1::SessionRequest* message);

class StepTables {
 public:
  // Sends a BeginStepRequest or a PinStepRequest for these sequences, and brings the tables up to date. After
  // a failed call everything is asked for again.
  absl::StatusOr<StepView> Begin(Carrier* carrier, v1::SessionRequest* message);
  // What StepBlock::kind means.
  std::vector<BlockKind> kinds();
  // The sequence is closed.
  void Forget(SequenceId sequence);

 private:
  // Sends the request and takes the answer, both of one verb of steps.
  template <class Request, class Response>
  absl::StatusOr<StepView> Ask(Carrier* carrier, v1::SessionRequest* message, Request* request,
                               const std::vector<SequenceId>& sequences,
                               const Response& (v1::SessionResponse::*response)() const)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status Update(SequenceId sequence, const v1::StepSequence& told, StepView* step)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  int KindOf(const v1::StepBlocks& blocks) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Mutex mutex_;
  bool known_ ABSL_GUARDED_BY(mutex_) = false;  // tables_ is what the daemon thinks that we know
  std::map<std::pair<SequenceId, int>, StepTable> tables_ ABSL_GUARDED_BY(mutex_);
  std::vector<BlockKind> kinds_ ABSL_GUARDED_BY(mutex_);
  uint64_t last_version_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace kvtide::client
