// An extent on disk that only who has the folder's key can read: its bytes and the padding behind them are
// one message, its label another one, whose page has beside it in clear what is needed to open both. Sizes
// and alignment are those of an extent that is not encrypted. Both messages are bound to the place where they
// lie, the label to its bytes: whatever is moved, exchanged or changed does not open.
//
// The page of the label, little-endian, frozen by tests/daemon/disk:
//   0 magic "ktideex1" | 8 version u32 | 12 kind of file u32 | 16 salt | 48 tag of the bytes | 64 tag of the
//   label | 80 the first 4,016 bytes of the page of extent_header.h, encrypted
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/cache/tier/io_tier.h"
#include "daemon/disk/encryption.h"
#include "daemon/disk/file.h"

namespace kvtide {

constexpr uint32_t kEncryptedExtentVersion = 1;

// Where an extent lies.
struct ExtentPlace {
  enum class File : uint32_t { kSegments = 1, kManifests = 2 };
  File file = File::kSegments;
  uint64_t offset = 0;  // of the label, in the tier's bytes or in the file of manifests
};

class ExtentEncryptor {
 public:
  ExtentEncryptor(const SecretKey& key, const ExtentPlace& place, const Salt& salt = NewSalt());
  // The bytes behind the label, to their last page's end, in place and in order.
  void Add(std::span<std::byte> piece) { stream_.Add(piece); }
  // The end: `page` has kDiskPage bytes.
  void WriteLabel(const BlockLabel& label, std::span<std::byte> page);

 private:
  const SecretKey& key_;
  const ExtentPlace place_;
  const Salt salt_;
  EncryptedStream stream_;
};

class ExtentDecryptor {
 public:
  // Looks at the page of a label. NotFound where no encrypted extent begins, DataLoss where one does that is
  // damaged, of another version, of another place or of another key.
  static absl::StatusOr<ExtentDecryptor> Open(const SecretKey& key, const ExtentPlace& place,
                                              std::span<const std::byte> page);
  const BlockLabel& label() const { return label_; }
  void Add(std::span<std::byte> piece) { stream_.Add(piece); }
  // The end: DataLoss if the bytes are not those that were encrypted.
  absl::Status Check();

 private:
  ExtentDecryptor(BlockLabel label, const Tag& tag, EncryptedStream stream)
      : label_(std::move(label)), tag_(tag), stream_(std::move(stream)) {}
  BlockLabel label_;
  Tag tag_;
  EncryptedStream stream_;
};

}  // namespace kvtide
