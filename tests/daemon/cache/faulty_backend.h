// A test fake: a backend that passes everything to another one, except what a test makes fail, wait, come
// late or go wrong.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/attend_args.h"
#include "kernels/backend.h"

namespace kvtide::testing {

class FaultyBackend : public Backend {
 public:
  enum Call { kAllocateSlab, kAppend, kRecode, kAttend, kPlanAttend, kDecode, kStartCopy, kPoll, kCalls };

  explicit FaultyBackend(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

  // The next `times` calls of the kind fail with Internal("planted").
  void Fail(Call call, int times = 1) { fail_[call] = times; }
  // The call of the kind after the next `calls` ones fails.
  void FailAfter(Call call, int calls) {
    skip_[call] = calls;
    fail_[call] = 1;
  }
  // How many of the next calls of the kind will fail.
  int failing(Call call) const { return fail_[call]; }
  int calls(Call call) const { return calls_[call]; }

  // Runs at the entry of every call but AllocateSlab, on the calling thread: the cache has given up its mutex
  // there, so the hook may call the cache. Set while no call runs.
  void SetHook(std::function<void(Call)> hook) { hook_ = std::move(hook); }

  // Copies that are late, and the same in every run: `polls` says for each StartCopy how often it is polled
  // in vain; the bytes are read and written in the poll after these. 0: already in StartCopy. Set while no
  // copy runs.
  void DelayCopies(std::function<int()> polls) { delay_ = std::move(polls); }

  // Late copies that have not ended.
  size_t copies_running() {
    std::lock_guard<std::mutex> lock(mu_);
    return late_.size();
  }

  // Errors that a correct test must notice; see tests/sim.
  enum class Defect { kNone, kCopyElsewhere, kCopyAfterDone, kLoseRows, kSealNothing };
  void Plant(Defect defect) {
    defect_ = defect;
    overdue_.clear();
  }

  // Calls of the kind wait inside until Open; an attention that is cancelled leaves, as backends look at that
  // between tiles. WaitForEntry returns when one has arrived.
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
  // How many wait there now.
  int held(Call call) {
    std::lock_guard<std::mutex> lock(mu_);
    return held_[call];
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
    if (defect_ != Defect::kLoseRows || args.pieces.size() < 2) return inner_->Append(args);
    AppendArgs fewer = args;
    fewer.pieces = args.pieces.first(args.pieces.size() - 1);
    return inner_->Append(fewer);
  }
  absl::Status Recode(std::span<const RecodePiece> pieces) override {
    if (absl::Status status = Enter(kRecode); !status.ok()) return status;
    if (defect_ == Defect::kSealNothing) return absl::InternalError("a defect");
    return inner_->Recode(pieces);
  }
  absl::Status Attend(const AttendArgs& args) override {
    if (absl::Status status = Enter(kAttend, args.cancellation); !status.ok()) return status;
    return inner_->Attend(args);
  }
  absl::StatusOr<std::unique_ptr<AttendPlan>> PlanAttend(const AttendPlanArgs& args,
                                                         std::unique_ptr<AttendPlan> previous) override {
    if (absl::Status status = Enter(kPlanAttend); !status.ok()) return status;
    return inner_->PlanAttend(args, std::move(previous));
  }
  absl::Status AttendLayer(AttendPlan& plan, const AttendLayerArgs& args) override {
    AttendLayerArgs attend = args;
    if (!args.append.empty()) {
      if (absl::Status status = AppendFirst(*this, args); !status.ok()) return status;
      attend.append = {};
    }
    if (absl::Status status = Enter(kAttend, args.cancellation); !status.ok()) return status;
    return inner_->AttendLayer(plan, attend);
  }
  absl::Status Decode(const DecodeArgs& args) override {
    if (absl::Status status = Enter(kDecode); !status.ok()) return status;
    return inner_->Decode(args);
  }
  absl::StatusOr<CopyTicket> StartCopy(std::span<const CopyPiece> pieces, CopyDirection direction) override {
    if (absl::Status status = Enter(kStartCopy); !status.ok()) return status;
    if (delay_ == nullptr && defect_ == Defect::kNone) return inner_->StartCopy(pieces, direction);
    Late late{{pieces.begin(), pieces.end()}, direction, delay_ != nullptr ? delay_() : 0};
    if (defect_ == Defect::kCopyElsewhere && late.pieces.size() > 1)
      std::swap(late.pieces.front().source, late.pieces[1].source);
    late.copied = late.polls == 0 && defect_ != Defect::kCopyAfterDone;
    if (late.copied)
      if (absl::Status status = Copy(late); !status.ok()) return status;
    std::lock_guard<std::mutex> lock(mu_);
    late_[++last_ticket_] = std::move(late);
    return last_ticket_;
  }
  // A planted failure still waits for the copy: nobody may write to the target afterwards.
  absl::StatusOr<bool> Poll(CopyTicket ticket) override {
    const absl::Status status = Enter(kPoll);
    if (delay_ != nullptr || defect_ != Defect::kNone) {
      const absl::StatusOr<bool> done = PollLate(ticket, !status.ok());
      return status.ok() ? done : absl::StatusOr<bool>(status);
    }
    if (status.ok()) return inner_->Poll(ticket);
    while (true) {
      const absl::StatusOr<bool> done = inner_->Poll(ticket);
      if (!done.ok() || *done) return status;
      std::this_thread::yield();  // to the thread that copies, where processors are few
    }
  }

 private:
  struct Late {
    std::vector<CopyPiece> pieces;
    CopyDirection direction;
    int polls = 0;
    bool copied = false;
  };

  absl::Status Enter(Call call, const Cancellation* cancellation = nullptr) {
    calls_[call]++;
    if (hook_ != nullptr && call != kAllocateSlab) hook_(call);
    {
      std::unique_lock<std::mutex> lock(mu_);
      if (closed_[call]) {
        inside_[call]++;
        held_[call]++;
        changed_.notify_all();
        while (closed_[call] && !IsCancelled(cancellation))
          changed_.wait_for(lock, std::chrono::milliseconds(1));
        held_[call]--;
      }
    }
    if (fail_[call].load() == 0) return absl::OkStatus();
    if (skip_[call].load() > 0) {
      skip_[call]--;
      return absl::OkStatus();
    }
    int left = fail_[call].load();
    while (left > 0)
      if (fail_[call].compare_exchange_weak(left, left - 1)) return absl::InternalError("planted");
    return absl::OkStatus();
  }

  // In the calling thread, which would wait for another one.
  absl::Status Copy(const Late& late) {
    for (const CopyPiece& piece : late.pieces)
      if (absl::Status status = inner_->CopyNow(piece, late.direction); !status.ok()) return status;
    return absl::OkStatus();
  }

  absl::StatusOr<bool> PollLate(CopyTicket ticket, bool now) {
    Late late;
    std::vector<Late> overdue;
    {
      std::lock_guard<std::mutex> lock(mu_);
      Late& found = late_.at(ticket);
      if (!now && found.polls-- > 0) return false;
      late = std::move(found);
      late_.erase(ticket);
      if (late.copied) return true;
      if (defect_ == Defect::kCopyAfterDone) {
        overdue_.push_back(std::move(late));
        if (overdue_.size() < 3) return true;
        overdue.swap(overdue_);
      } else {
        overdue.push_back(std::move(late));
      }
    }
    for (const Late& copy : overdue)
      if (absl::Status status = Copy(copy); !status.ok()) return status;
    return true;
  }

  std::unique_ptr<Backend> inner_;
  std::atomic<int> fail_[kCalls] = {};
  std::atomic<int> skip_[kCalls] = {};
  std::atomic<int> calls_[kCalls] = {};
  std::function<void(Call)> hook_;
  std::function<int()> delay_;
  Defect defect_ = Defect::kNone;
  std::mutex mu_;
  std::condition_variable changed_;
  bool closed_[kCalls] = {};
  int inside_[kCalls] = {}, held_[kCalls] = {};
  CopyTicket last_ticket_ = 0;
  std::map<CopyTicket, Late> late_;
  std::vector<Late> overdue_;  // said to be done, not yet copied
};

}  // namespace kvtide::testing
