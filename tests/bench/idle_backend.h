// A backend whose calls return at once and whose memory nobody touches: what is left of a call's time is the
// cache's own.
#pragma once

#include <algorithm>
#include <memory>
#include <string>

#include "kernels/backend.h"

namespace kvtide::bench {

class IdleSlab : public Slab {
 public:
  explicit IdleSlab(size_t bytes) : bytes_(bytes) {}
  std::byte* data() const override {
    return reinterpret_cast<std::byte*>(uintptr_t{1} << 40);
  }  // never dereferenced
  size_t bytes() const override { return bytes_; }

 private:
  size_t bytes_;
};

// Does nothing.
class IdleBackend : public Backend {
 public:
  std::string name() const override { return "idle"; }
  absl::Status CheckSupport(const BlockLayout&) const override { return absl::OkStatus(); }
  absl::StatusOr<std::unique_ptr<Slab>> AllocateSlab(size_t bytes) override {
    return std::make_unique<IdleSlab>(bytes);
  }
  absl::Status Append(const AppendArgs&) override { return absl::OkStatus(); }
  absl::Status Recode(std::span<const RecodePiece>) override { return absl::OkStatus(); }
  absl::Status Attend(const AttendArgs&) override { return absl::OkStatus(); }
  absl::Status Decode(const DecodeArgs& args) override {
    const GroupShape& shape = args.layout->shape();
    std::fill_n(args.k, static_cast<size_t>(kBlockTokens * shape.kv_heads * shape.head_dim_k), 1.0f);
    return absl::OkStatus();
  }
  absl::StatusOr<CopyTicket> StartCopy(std::span<const CopyPiece>, CopyDirection) override { return 1; }
  absl::StatusOr<bool> Poll(CopyTicket) override { return true; }
};

}  // namespace kvtide::bench
