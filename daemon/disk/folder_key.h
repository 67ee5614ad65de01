// The key of a disk tier's folder: random bytes that encrypt all that lies there, and lie beside it
// themselves, encrypted with the operator's key, in the file "encryption". So the operator's key changes
// without a block being written again, one key may serve many folders, and a copy of a folder opens with the
// key of its time.
//
//   magic "ktidekey" | version u32 | 0 u32 | salt 32 | tag 16 | the key, encrypted, 32 | XXH3 of all that
//
// 104 bytes, little-endian, frozen by tests/daemon/disk.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/disk/encryption.h"
#include "daemon/disk/file.h"

namespace kvtide {

// What the blocks of a folder that the caller has locked are encrypted with; null: they are not. `operators`
// is null where the operator has given no key. FailedPrecondition, which says what to do, for another key
// than the folder's, for a key to a folder that holds blocks in clear and for none to one that is encrypted;
// DataLoss for a damaged file. A folder that holds nothing yet is encrypted from now on if there is a key.
absl::StatusOr<std::shared_ptr<const SecretKey>> OpenFolderKey(FileSystem& files, const std::string& folder,
                                                               const SecretKey* operators);

// The folder opens with `to` and no more with `from` when this returns OK: all or nothing of that over a
// crash. Errors as above, and AlreadyExists while a daemon has the folder.
absl::Status ChangeOperatorsKey(FileSystem& files, const std::string& folder, const SecretKey& from,
                                const SecretKey& to);

// The bytes of such a file.
std::string WrapFolderKey(const SecretKey& key, const SecretKey& operators, const Salt& salt = NewSalt());
absl::StatusOr<SecretKey> UnwrapFolderKey(const std::string& bytes, const SecretKey& operators);

}  // namespace kvtide
