// A test fake: a backend that passes everything to another one, except the calls that a test makes fail or
// wait.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>

#include "kernels/backend.h"

namespace kvtide::testing {

class FaultyBackend : public Backend {
 public:
  enum Call { kAllocateSlab, kAppend, kRecode, kAttend, kPlanAttend, kDecode, kStartCopy, kPoll, kCalls };

  explicit FaultyBackend(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

  // The next `times` calls of the kind fail with Internal("planted").
  void Fail(Call call, int times = 1) { fail_[call] = times; }
  int calls(Call call) const { return calls_[call]; }

  // Calls of the kind wait inside until Open. WaitForEntry returns when one has arrived.
  void Close(Call call) {
    std::lock_guard<std::mutex> lock(mu_);
    closed_[call] = true;
    inside_[call] = 0;
  }
  void Open(Call call) {
    std::lock_guard<std::mutex> lock(mu_);
    closed_[call] = false;
    changed_.notify_all();
  }
  void WaitForEntry(Call call) {
    std::unique_lock<std::mutex> lock(mu_);
    changed_.wait(lock, [&] { return inside_[call] > 0; });
  }

  std::string name() const override { return inner_->name(); }
  absl::Status CheckSupport(const BlockLayout& layout) const override { return inner_->CheckSupport(layout); }
  absl::StatusOr<std::unique_ptr<Slab>> AllocateSlab(size_t bytes) override {
    if (absl::Status status = Enter(kAllocateSlab); !status.ok()) return status;
    return inner_->AllocateSlab(bytes);
  }
  absl::Status Append(const AppendArgs& args) override {
    if (absl::Status status = Enter(kAppend); !status.ok()) return status;
    return inner_->Append(args);
  }
  absl::Status Recode(std::span<const RecodePiece> pieces) override {
    if (absl::Status status = Enter(kRecode); !status.ok()) return status;
    return inner_->Recode(pieces);
  }
  absl::Status Attend(const AttendArgs& args) override {
    if (absl::Status status = Enter(kAttend); !status.ok()) return status;
    return inner_->Attend(args);
  }
  absl::StatusOr<std::unique_ptr<AttendPlan>> PlanAttend(const AttendPlanArgs& args,
                                                         std::unique_ptr<AttendPlan> previous) override {
    if (absl::Status status = Enter(kPlanAttend); !status.ok()) return status;
    return inner_->PlanAttend(args, std::move(previous));
  }
  absl::Status AttendLayer(AttendPlan& plan, const AttendLayerArgs& args) override {
    if (absl::Status status = Enter(kAttend); !status.ok()) return status;
    return inner_->AttendLayer(plan, args);
  }
  absl::Status Decode(const DecodeArgs& args) override {
    if (absl::Status status = Enter(kDecode); !status.ok()) return status;
    return inner_->Decode(args);
  }
  absl::StatusOr<CopyTicket> StartCopy(std::span<const CopyPiece> pieces, CopyDirection direction) override {
    if (absl::Status status = Enter(kStartCopy); !status.ok()) return status;
    return inner_->StartCopy(pieces, direction);
  }
  // A planted failure still waits for the copy: nobody may write to the target afterwards.
  absl::StatusOr<bool> Poll(CopyTicket ticket) override {
    const absl::Status status = Enter(kPoll);
    if (status.ok()) return inner_->Poll(ticket);
    while (true) {
      const absl::StatusOr<bool> done = inner_->Poll(ticket);
      if (!done.ok() || *done) return status;
    }
  }

 private:
  absl::Status Enter(Call call) {
    calls_[call]++;
    {
      std::unique_lock<std::mutex> lock(mu_);
      if (closed_[call]) {
        inside_[call]++;
        changed_.notify_all();
        changed_.wait(lock, [&] { return !closed_[call]; });
      }
    }
    int left = fail_[call].load();
    while (left > 0)
      if (fail_[call].compare_exchange_weak(left, left - 1)) return absl::InternalError("planted");
    return absl::OkStatus();
  }

  std::unique_ptr<Backend> inner_;
  std::atomic<int> fail_[kCalls] = {};
  std::atomic<int> calls_[kCalls] = {};
  std::mutex mu_;
  std::condition_variable changed_;
  bool closed_[kCalls] = {};
  int inside_[kCalls] = {};
};

}  // namespace kvtide::testing
