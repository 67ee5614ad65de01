// The first page of every extent on disk: a label and its own checksum. Little-endian, 4,096 bytes, frozen by
// tests/daemon/disk: a change of the layout is a new version, and other versions are not read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/statusor.h"
#include "daemon/cache/tier/io_tier.h"
#include "daemon/disk/file.h"

namespace kvtide {

constexpr uint32_t kExtentVersion = 1;

// `page` has kDiskPage bytes.
void WriteExtentHeader(const BlockLabel& label, std::span<std::byte> page);
// NotFound where no header is, DataLoss where a damaged one or one of another version is.
absl::StatusOr<BlockLabel> ReadExtentHeader(std::span<const std::byte> page);

// OK if what was found is what is wanted (checksum 0: any); else DataLoss that names the first difference.
absl::Status CheckLabel(const BlockLabel& found, const BlockLabel& wanted);

}  // namespace kvtide
