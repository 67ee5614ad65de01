#include "daemon/timed_backend.h"

#include <chrono>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "kernels/base/mutex.h"

namespace kvtide {
namespace {

using Clock = std::chrono::steady_clock;

class TimedBackend : public Backend {
 public:
  TimedBackend(std::unique_ptr<Backend> inner, WorkTimer timer)
      : inner_(std::move(inner)), timer_(std::move(timer)) {}

  std::string name() const override { return inner_->name(); }
  absl::Status CheckSupport(const BlockLayout& layout) const override { return inner_->CheckSupport(layout); }
  absl::StatusOr<std::unique_ptr<Slab>> AllocateSlab(size_t bytes) override {
    return inner_->AllocateSlab(bytes);
  }
  absl::Status Append(const AppendArgs& args) override {
    return Timed(Work::kAppend, [&] { return inner_->Append(args); });
  }
  absl::Status Recode(std::span<const RecodePiece> pieces) override {
    return Timed(Work::kSeal, [&] { return inner_->Recode(pieces); });
  }
  absl::Status Attend(const AttendArgs& args) override {
    return Timed(Work::kAttend, [&] { return inner_->Attend(args); });
  }
  absl::StatusOr<std::unique_ptr<AttendPlan>> PlanAttend(const AttendPlanArgs& args,
                                                         std::unique_ptr<AttendPlan> previous) override {
    return inner_->PlanAttend(args, std::move(previous));
  }
  absl::Status AttendLayer(AttendPlan& plan, const AttendLayerArgs& args) override {
    return Timed(Work::kAttend, [&] { return inner_->AttendLayer(plan, args); });
  }
  absl::Status Decode(const DecodeArgs& args) override {
    return Timed(Work::kRead, [&] { return inner_->Decode(args); });
  }
  absl::Status DecodeTokens(std::span<const DecodePiece> pieces, const Cancellation* cancellation) override {
    return Timed(Work::kRead, [&] { return inner_->DecodeTokens(pieces, cancellation); });
  }
  absl::StatusOr<CopyTicket> StartCopy(std::span<const CopyPiece> pieces, CopyDirection direction) override {
    const auto start = Clock::now();
    absl::StatusOr<CopyTicket> ticket = inner_->StartCopy(pieces, direction);
    if (ticket.ok()) {
      const MutexLock lock(mutex_);
      started_[*ticket] = start;
    }
    return ticket;
  }
  absl::StatusOr<bool> Poll(CopyTicket ticket) override {
    absl::StatusOr<bool> done = inner_->Poll(ticket);
    if (done.ok() && !*done) return done;
    const auto end = Clock::now();
    Clock::time_point start = end;
    {
      const MutexLock lock(mutex_);
      const auto found = started_.find(ticket);
      if (found == started_.end()) return done;
      start = found->second;
      started_.erase(found);
    }
    timer_(Work::kCopy, absl::FromChrono(end - start));
    return done;
  }
  absl::Status CopyNow(const CopyPiece& piece, CopyDirection direction) override {
    return Timed(Work::kCopy, [&] { return inner_->CopyNow(piece, direction); });
  }

 private:
  template <class Call>
  absl::Status Timed(Work work, Call&& call) {
    const auto start = Clock::now();
    absl::Status status = call();
    timer_(work, absl::FromChrono(Clock::now() - start));
    return status;
  }

  const std::unique_ptr<Backend> inner_;
  const WorkTimer timer_;
  Mutex mutex_;
  absl::flat_hash_map<CopyTicket, Clock::time_point> started_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

std::unique_ptr<Backend> MakeTimedBackend(std::unique_ptr<Backend> inner, WorkTimer timer) {
  return std::make_unique<TimedBackend>(std::move(inner), std::move(timer));
}

}  // namespace kvtide
