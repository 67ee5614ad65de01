#include "daemon/trace/weightless_tiers.h"

#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

class AddressSlab : public Slab {
 public:
  explicit AddressSlab(std::unique_ptr<AddressRange> range) : range_(std::move(range)) {}
  std::byte* data() const override { return range_->data(); }
  size_t bytes() const override { return range_->bytes(); }

 private:
  const std::unique_ptr<AddressRange> range_;
};

absl::Status NoBytes() { return absl::UnimplementedError("a tier without memory holds opaque blocks only"); }

}  // namespace

absl::StatusOr<std::unique_ptr<AddressRange>> AddressRange::Take(size_t bytes) {
  bytes = std::max<size_t>(bytes, 1);
  void* const data = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED)
    return absl::ResourceExhaustedError(absl::StrCat(
        bytes, " bytes of addresses are more than this process may have (ulimit -v); play a smaller tier"));
  return std::unique_ptr<AddressRange>(new AddressRange(static_cast<std::byte*>(data), bytes));
}

AddressRange::~AddressRange() { munmap(data_, bytes_); }

absl::Status WeightlessMemory::CheckSupport(const BlockLayout&) const { return NoBytes(); }
absl::StatusOr<std::unique_ptr<Slab>> WeightlessMemory::AllocateSlab(size_t bytes) {
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<AddressRange> range, AddressRange::Take(bytes));
  return std::make_unique<AddressSlab>(std::move(range));
}
absl::Status WeightlessMemory::Append(const AppendArgs&) { return NoBytes(); }
absl::Status WeightlessMemory::Recode(std::span<const RecodePiece>) { return NoBytes(); }
absl::Status WeightlessMemory::Attend(const AttendArgs&) { return NoBytes(); }
absl::Status WeightlessMemory::Decode(const DecodeArgs&) { return NoBytes(); }

size_t WeightlessDisk::ExtentBytes(size_t bytes) const {
  constexpr size_t kPage = 4096;  // one more has the label, as on a real disk
  return (bytes + 2 * kPage - 1) / kPage * kPage;
}

void WeightlessDisk::Run(std::span<IoJob> jobs) {
  for (IoJob& job : jobs) {
    if (job.write) {
      written_bytes_ += job.label.bytes;
      writes_++;
    } else if (!job.label_only) {
      read_bytes_ += job.label.bytes;
      reads_++;
    }
    job.status = absl::OkStatus();
  }
}

IoTierStats WeightlessDisk::Stats() const {
  IoTierStats stats;
  stats.read_bytes = read_bytes_;
  stats.written_bytes = written_bytes_;
  stats.reads = reads_;
  stats.writes = writes_;
  return stats;
}

}  // namespace kvtide
