// Tiers without memory: places are given, taken and moved as in real ones, bytes are not. A cache over them
// decides what it would decide, in microseconds a block, whatever size it plays.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "daemon/cache/tier/io_tier.h"
#include "kernels/backend.h"

namespace kvtide {

// Opaque blocks only: nothing is written, attended or decoded.
class WeightlessMemory : public Backend {
 public:
  std::string name() const override { return "weightless"; }
  absl::Status CheckSupport(const BlockLayout& layout) const override;
  // Addresses that nobody may read or write.
  absl::StatusOr<std::unique_ptr<Slab>> AllocateSlab(size_t bytes) override;
  absl::Status Append(const AppendArgs& args) override;
  absl::Status Recode(std::span<const RecodePiece> pieces) override;
  absl::Status Attend(const AttendArgs& args) override;
  absl::Status Decode(const DecodeArgs& args) override;
  absl::StatusOr<CopyTicket> StartCopy(std::span<const CopyPiece>, CopyDirection) override { return 1; }
  absl::StatusOr<bool> Poll(CopyTicket) override { return true; }
  absl::Status CopyNow(const CopyPiece&, CopyDirection) override { return absl::OkStatus(); }
};

// Counts what would be read and written.
class WeightlessDisk : public IoTier {
 public:
  explicit WeightlessDisk(size_t capacity_bytes) : capacity_(capacity_bytes) {}
  std::string name() const override { return "weightless"; }
  size_t capacity_bytes() const override { return capacity_; }
  size_t ExtentBytes(size_t bytes) const override;
  uint64_t NextWriteId() override { return ++write_ids_; }
  void Run(std::span<IoJob> jobs) override;
  bool Writable() const override { return true; }
  IoTierStats Stats() const override;

 private:
  const size_t capacity_;
  std::atomic<uint64_t> write_ids_ = 0, read_bytes_ = 0, written_bytes_ = 0, reads_ = 0, writes_ = 0;
};

// A range of so many addresses, none of which may be read or written: a payload for what copies nothing.
class AddressRange {
 public:
  // ResourceExhausted where the process may not have so many.
  static absl::StatusOr<std::unique_ptr<AddressRange>> Take(size_t bytes);
  ~AddressRange();
  AddressRange(const AddressRange&) = delete;
  AddressRange& operator=(const AddressRange&) = delete;
  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  AddressRange(std::byte* data, size_t bytes) : data_(data), bytes_(bytes) {}
  std::byte* const data_;
  const size_t bytes_;
};

}  // namespace kvtide
