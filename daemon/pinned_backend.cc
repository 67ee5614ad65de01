#include "daemon/pinned_backend.h"

#include <spdlog/spdlog.h>

#include <string>
#include <utility>

#include "kernels/base/status.h"
#include "kernels/cuda/cuda_backend.h"

namespace kvtide {
namespace {

class PinnedSlab : public Slab {
 public:
  PinnedSlab(std::unique_ptr<Slab> inner, std::unique_ptr<PinnedRange> range)
      : inner_(std::move(inner)), range_(std::move(range)) {}
  std::byte* data() const override { return inner_->data(); }
  size_t bytes() const override { return inner_->bytes(); }
  absl::StatusOr<SlabHandle> Share() const override { return inner_->Share(); }

 private:
  const std::unique_ptr<Slab> inner_;
  const std::unique_ptr<PinnedRange> range_;  // goes before the memory
};

class PinnedBackend : public Backend {
 public:
  explicit PinnedBackend(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

  absl::StatusOr<std::unique_ptr<Slab>> AllocateSlab(size_t bytes) override {
    KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<Slab> slab, inner_->AllocateSlab(bytes));
    auto range = PinnedRange::Make(slab->data(), slab->bytes());
    if (!range.ok()) {
      spdlog::warn("host tier is not pinned, copies are slower: {}", std::string(range.status().message()));
      return slab;
    }
    return std::unique_ptr<Slab>(new PinnedSlab(std::move(slab), std::move(range).value()));
  }

  std::string name() const override { return inner_->name(); }
  absl::Status CheckSupport(const BlockLayout& layout) const override { return inner_->CheckSupport(layout); }
  absl::Status Append(const AppendArgs& args) override { return inner_->Append(args); }
  absl::Status Recode(std::span<const RecodePiece> pieces) override { return inner_->Recode(pieces); }
  absl::Status Attend(const AttendArgs& args) override { return inner_->Attend(args); }
  absl::StatusOr<std::unique_ptr<AttendPlan>> PlanAttend(const AttendPlanArgs& args,
                                                         std::unique_ptr<AttendPlan> previous) override {
    return inner_->PlanAttend(args, std::move(previous));
  }
  absl::Status AttendLayer(AttendPlan& plan, const AttendLayerArgs& args) override {
    return inner_->AttendLayer(plan, args);
  }
  absl::Status Decode(const DecodeArgs& args) override { return inner_->Decode(args); }
  absl::Status DecodeTokens(std::span<const DecodePiece> pieces, const Cancellation* cancellation) override {
    return inner_->DecodeTokens(pieces, cancellation);
  }
  absl::StatusOr<CopyTicket> StartCopy(std::span<const CopyPiece> pieces, CopyDirection direction) override {
    return inner_->StartCopy(pieces, direction);
  }
  absl::StatusOr<bool> Poll(CopyTicket ticket) override { return inner_->Poll(ticket); }
  absl::Status CopyNow(const CopyPiece& piece, CopyDirection direction) override {
    return inner_->CopyNow(piece, direction);
  }

 private:
  const std::unique_ptr<Backend> inner_;
};

}  // namespace

std::unique_ptr<Backend> MakePinnedBackend(std::unique_ptr<Backend> inner) {
  return std::make_unique<PinnedBackend>(std::move(inner));
}

}  // namespace kvtide
