// How many bytes a folder was given when it was last opened with success: what is durable there lies within
// them. The sizes of its files say less, as a start that found no room for a larger tier may have left some
// of them long, and a file that was cut short by somebody else is short.
#pragma once

#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/disk/file.h"

namespace kvtide {

// NotFound in a folder that has none: it is new, or of a build that wrote none. DataLoss where it is damaged.
absl::StatusOr<size_t> ReadFolderSize(FileSystem& files, const std::string& folder);
// Durable when this returns OK; over a crash the former one or this one.
absl::Status WriteFolderSize(FileSystem& files, const std::string& folder, size_t bytes);

}  // namespace kvtide
