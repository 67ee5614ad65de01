#include "daemon/disk/folder_size.h"

#include <xxhash.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

constexpr uint64_t kMagic = 0x657a6973'6469746b;  // "ktidsize"
constexpr char kName[] = "size";

// The bytes as they lie on disk.
struct Stored {
  uint64_t magic = kMagic;
  uint64_t bytes = 0;
  uint64_t checksum = 0;  // of everything before it
};
static_assert(sizeof(Stored) == 24);

uint64_t ChecksumOf(const Stored& stored) { return XXH3_64bits(&stored, offsetof(Stored, checksum)); }

}  // namespace

absl::StatusOr<size_t> ReadFolderSize(FileSystem& files, const std::string& folder) {
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<std::string> names, files.List(folder));
  const std::string path = absl::StrCat(folder, "/", kName);
  if (std::find(names.begin(), names.end(), kName) == names.end())
    return absl::NotFoundError(absl::StrCat("no ", path));
  Stored stored;
  KVTIDE_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(files, path, sizeof stored + 1));
  if (bytes.size() != sizeof stored) return absl::DataLossError(absl::StrCat(path, " is damaged"));
  std::memcpy(&stored, bytes.data(), sizeof stored);
  if (stored.magic != kMagic || stored.checksum != ChecksumOf(stored))
    return absl::DataLossError(absl::StrCat(path, " is damaged"));
  return stored.bytes;
}

absl::Status WriteFolderSize(FileSystem& files, const std::string& folder, size_t bytes) {
  Stored stored;
  stored.bytes = bytes;
  stored.checksum = ChecksumOf(stored);
  return ReplaceFile(files, folder, kName,
                     std::string(reinterpret_cast<const char*>(&stored), sizeof stored));
}

}  // namespace kvtide
