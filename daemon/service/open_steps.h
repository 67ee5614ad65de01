// The steps that are open on one session, by number, and what its client knows of block tables. Thread-safe:
// a step is taken by one call at a time.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "daemon/cache/stepper.h"
#include "kernels/base/mutex.h"

namespace kvtide::service {

// The blocks of a table, as a client was told.
struct ToldTable {
  struct Entry {
    const BlockLayout* layout = nullptr;
    int tier = 0;
    const std::byte* data = nullptr;
    bool operator==(const Entry&) const = default;
  };
  uint64_t serial = 0;  // Step::Serial; 0 = nothing was told
  int64_t first_block = 0;
  std::vector<Entry> blocks;

  int64_t end_block() const { return first_block + static_cast<int64_t>(blocks.size()); }
  // Becomes the table of an item of a step; returns the first block that is not as it was told.
  int64_t Update(const Step& step, size_t item, int group);
};

class OpenSteps {
 public:
  // More than an engine has under way.
  static constexpr size_t kMost = 64;

  OpenSteps() = default;
  ~OpenSteps() { RollBackAll(); }
  OpenSteps(const OpenSteps&) = delete;
  OpenSteps& operator=(const OpenSteps&) = delete;

  // A step that a call has taken; given back when this goes.
  class Taken {
   public:
    Taken() = default;
    Taken(OpenSteps* steps, uint64_t id, Step* step) : steps_(steps), id_(id), step_(step) {}
    Taken(Taken&& other) noexcept
        : steps_(std::exchange(other.steps_, nullptr)), id_(other.id_), step_(other.step_) {}
    Taken& operator=(Taken&&) = delete;
    ~Taken() {
      if (steps_ != nullptr) steps_->GiveBack(id_);
    }
    Step& operator*() const { return *step_; }
    Step* get() const { return step_; }
    uint64_t id() const { return id_; }
    // The step itself: it is not open any more.
    std::unique_ptr<Step> Remove() && { return std::exchange(steps_, nullptr)->Remove(id_); }

   private:
    OpenSteps* steps_ = nullptr;
    uint64_t id_ = 0;
    Step* step_ = nullptr;
  };
  // NotFound if there is no such step, Aborted if another call has it. `steps` may be null:
  // FailedPrecondition.
  static absl::StatusOr<Taken> TakeFrom(OpenSteps* steps, uint64_t id);
  // ResourceExhausted if there are too many. `after`: the step that it follows, 0 = none.
  absl::StatusOr<uint64_t> Add(std::unique_ptr<Step> step, uint64_t after);
  absl::Status CheckRoom();
  // The open step that this one follows; 0 = none.
  uint64_t Previous(uint64_t id);

  // Calls tell(table) with what the client knows of a table; it is what `tell` leaves.
  template <class Function>
  void Tell(SequenceId sequence, int group, Function tell) {
    const MutexLock lock(mutex_);
    tell(told_[{sequence, group}]);
  }
  // The sequence is closed.
  void Forget(SequenceId sequence);
  // The client knows nothing any more.
  void ForgetAll();
  // The session ends; no call is under way.
  void RollBackAll();

 private:
  struct Open {
    std::unique_ptr<Step> step;
    uint64_t after = 0;
    bool taken = false;
  };
  void GiveBack(uint64_t id);
  std::unique_ptr<Step> Remove(uint64_t id);

  Mutex mutex_;
  uint64_t last_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<uint64_t, Open> open_ ABSL_GUARDED_BY(mutex_);
  std::map<std::pair<SequenceId, int>, ToldTable> told_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvtide::service
