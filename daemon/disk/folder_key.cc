#include "daemon/disk/folder_key.h"

#include <xxhash.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

constexpr uint64_t kMagic = 0x79656b65'6469746b;  // "ktidekey"
constexpr uint32_t kVersion = 1;
constexpr char kPurpose[] = "kvtide disk folder key", kName[] = "encryption";

// The bytes as they lie on disk.
struct Wrapped {
  uint64_t magic = kMagic;
  uint32_t version = kVersion;
  uint32_t reserved = 0;
  Salt salt{};
  Tag tag{};
  std::byte key[kKeyBytes]{};
  uint64_t checksum = 0;  // of everything before it
};
static_assert(sizeof(Wrapped) == 104);
constexpr size_t kBound = offsetof(Wrapped, salt);

uint64_t ChecksumOf(const Wrapped& wrapped) { return XXH3_64bits(&wrapped, offsetof(Wrapped, checksum)); }

std::span<const std::byte> BoundOf(const Wrapped& wrapped) {
  return std::as_bytes(std::span(&wrapped, 1)).first(kBound);
}

std::string PathOf(const std::string& folder) { return absl::StrCat(folder, "/", kName); }

absl::StatusOr<SecretKey> ReadFolderKey(FileSystem& files, const std::string& folder,
                                        const SecretKey& operators) {
  KVTIDE_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(files, PathOf(folder), 2 * sizeof(Wrapped)));
  absl::StatusOr<SecretKey> key = UnwrapFolderKey(bytes, operators);
  if (!key.ok()) return Annotate(key.status(), PathOf(folder));
  return key;
}

}  // namespace

std::string WrapFolderKey(const SecretKey& key, const SecretKey& operators, const Salt& salt) {
  Wrapped wrapped;
  wrapped.salt = salt;
  std::copy(key.bytes().begin(), key.bytes().end(), wrapped.key);
  wrapped.tag = Encrypt(operators, kPurpose, salt, BoundOf(wrapped), wrapped.key);
  wrapped.checksum = ChecksumOf(wrapped);
  return std::string(reinterpret_cast<const char*>(&wrapped), sizeof wrapped);
}

absl::StatusOr<SecretKey> UnwrapFolderKey(const std::string& bytes, const SecretKey& operators) {
  Wrapped wrapped;
  const char* const kWhat =
      "without it nothing in the folder can be read; put a copy of it back, or remove the folder";
  if (bytes.size() != sizeof wrapped)
    return absl::DataLossError(absl::StrCat("it has ", bytes.size(), " bytes, not ", sizeof wrapped,
                                            ": it is "
                                            "damaged, and ",
                                            kWhat));
  std::memcpy(&wrapped, bytes.data(), sizeof wrapped);
  if (wrapped.magic != kMagic || wrapped.checksum != ChecksumOf(wrapped))
    return absl::DataLossError(absl::StrCat("it is damaged, and ", kWhat));
  if (wrapped.version != kVersion)
    return absl::FailedPreconditionError(absl::StrCat("it has format ", wrapped.version,
                                                      ", this program reads ", kVersion,
                                                      "; use the program that has made it"));
  SecretKey key;
  std::copy(std::begin(wrapped.key), std::end(wrapped.key), key.bytes().begin());
  if (!Decrypt(operators, kPurpose, wrapped.salt, BoundOf(wrapped), wrapped.tag, key.bytes()))
    return absl::FailedPreconditionError(
        "the folder was encrypted with another key than that of disk_key_file; give its own one, or another "
        "folder. Nothing was changed");
  return key;
}

absl::StatusOr<std::shared_ptr<const SecretKey>> OpenFolderKey(FileSystem& files, const std::string& folder,
                                                               const SecretKey* operators) {
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<std::string> names, files.List(folder));
  const bool encrypted = std::find(names.begin(), names.end(), kName) != names.end();
  const bool used = std::any_of(names.begin(), names.end(), [](const std::string& name) {
    return name == "manifests" || absl::StartsWith(name, "segment-") || absl::StartsWith(name, "index-");
  });
  if (operators == nullptr) {
    if (!encrypted) return nullptr;
    return absl::FailedPreconditionError(
        absl::StrCat(folder,
                     " is encrypted: give the file with its key (disk_key_file), or another folder. "
                     "Nothing was changed"));
  }
  if (!encrypted && used)
    return absl::FailedPreconditionError(
        absl::StrCat(folder, " holds blocks that are not encrypted (or its file \"", kName,
                     "\" is lost: put it back): give another folder, or start without disk_key_file. What "
                     "lies in clear is "
                     "not encrypted afterwards. Nothing was changed"));
  if (!encrypted) {
    auto key = std::make_shared<SecretKey>(SecretKey::Random());
    KVTIDE_RETURN_IF_ERROR(ReplaceFile(files, folder, kName, WrapFolderKey(*key, *operators)));
    return key;
  }
  KVTIDE_ASSIGN_OR_RETURN(SecretKey key, ReadFolderKey(files, folder, *operators));
  return std::make_shared<SecretKey>(std::move(key));
}

absl::Status ChangeOperatorsKey(FileSystem& files, const std::string& folder, const SecretKey& from,
                                const SecretKey& to) {
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<FolderLock> lock, files.Lock(folder));
  const absl::StatusOr<SecretKey> key = ReadFolderKey(files, folder, from);
  if (absl::IsNotFound(key.status()))
    return absl::FailedPreconditionError(absl::StrCat(folder, " is not encrypted: it has no key to change"));
  KVTIDE_RETURN_IF_ERROR(key.status());
  return ReplaceFile(files, folder, kName, WrapFolderKey(*key, to));
}

}  // namespace kvtide
