// The beginning of every value in the remote tier: a label (io_tier.h), how the bytes are cut into values,
// and a checksum of its own. Little-endian, frozen by tests/daemon/remote: a change is a new version, and
// other versions are not read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "daemon/cache/tier/io_tier.h"

namespace kvtide {

constexpr uint32_t kValueVersion = 1;
constexpr size_t kValueHeaderBytes = 176;

// `piece_bytes`: of the block in the first value, behind the header, and in each further one but the last.
struct ValueHeader {
  BlockLabel label;
  uint64_t piece_bytes = 0;
  size_t pieces() const;
};

std::string EncodeValueHeader(const ValueHeader& header);
// DataLoss for anything that is no header of this version, or is a damaged one.
absl::StatusOr<ValueHeader> DecodeValueHeader(std::span<const std::byte> bytes);

// OK if what lies there is what is wanted: all of the label but write id, sequence and profile; checksum 0
// and size 0: any. Else DataLoss that names the first difference.
absl::Status CheckValueLabel(const BlockLabel& found, const BlockLabel& wanted);

}  // namespace kvtide
