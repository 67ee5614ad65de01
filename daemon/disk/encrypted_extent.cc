#include "daemon/disk/encrypted_extent.h"

#include <array>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/disk/extent_header.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

constexpr uint64_t kMagic = 0x31786565'6469746b;  // "ktideex1"
constexpr char kBytesPurpose[] = "kvtide disk extent bytes", kLabelPurpose[] = "kvtide disk extent label";

// The bytes in clear as they lie on disk.
struct Cleartext {
  uint64_t magic = kMagic;
  uint32_t version = kEncryptedExtentVersion;
  uint32_t file = 0;
  Salt salt{};
  Tag bytes_tag{}, label_tag{};
};
static_assert(sizeof(Cleartext) == 80);
constexpr size_t kEncryptedLabel = kDiskPage - sizeof(Cleartext);

// What the messages are bound to. The label also to the tag of the bytes.
struct Bound {
  uint64_t magic = kMagic;
  uint32_t version = kEncryptedExtentVersion;
  uint32_t file = 0;
  uint64_t offset = 0;
};
static_assert(sizeof(Bound) == 24);

using BytesBound = std::array<std::byte, sizeof(Bound)>;
using LabelBound = std::array<std::byte, sizeof(Bound) + sizeof(Tag)>;

BytesBound BoundOfBytes(const ExtentPlace& place) {
  Bound bound;
  bound.file = static_cast<uint32_t>(place.file);
  bound.offset = place.offset;
  BytesBound bytes;
  std::memcpy(bytes.data(), &bound, sizeof bound);
  return bytes;
}

LabelBound BoundOfLabel(const ExtentPlace& place, const Tag& bytes_tag) {
  LabelBound bytes;
  const BytesBound where = BoundOfBytes(place);
  std::memcpy(bytes.data(), where.data(), where.size());
  std::memcpy(bytes.data() + where.size(), bytes_tag.data(), bytes_tag.size());
  return bytes;
}

}  // namespace

ExtentEncryptor::ExtentEncryptor(const SecretKey& key, const ExtentPlace& place, const Salt& salt)
    : key_(key),
      place_(place),
      salt_(salt),
      stream_(EncryptedStream::Way::kEncrypt, key, kBytesPurpose, salt, BoundOfBytes(place)) {}

void ExtentEncryptor::WriteLabel(const BlockLabel& label, std::span<std::byte> page) {
  KVTIDE_CHECK(page.size() == kDiskPage);
  Cleartext clear;
  clear.file = static_cast<uint32_t>(place_.file);
  clear.salt = salt_;
  clear.bytes_tag = stream_.Finish();
  std::array<std::byte, kDiskPage> plain;
  WriteExtentHeader(label, plain);
  const std::span<std::byte> encrypted = page.subspan(sizeof clear);
  std::memcpy(encrypted.data(), plain.data(), kEncryptedLabel);
  clear.label_tag = Encrypt(key_, kLabelPurpose, salt_, BoundOfLabel(place_, clear.bytes_tag), encrypted);
  std::memcpy(page.data(), &clear, sizeof clear);
}

absl::StatusOr<ExtentDecryptor> ExtentDecryptor::Open(const SecretKey& key, const ExtentPlace& place,
                                                      std::span<const std::byte> page) {
  KVTIDE_CHECK(page.size() == kDiskPage);
  Cleartext clear;
  std::memcpy(&clear, page.data(), sizeof clear);
  if (clear.magic != kMagic) return absl::NotFoundError("no encrypted block begins here");
  if (clear.version != kEncryptedExtentVersion)
    return absl::DataLossError(absl::StrCat("the encrypted block has format ", clear.version,
                                            ", this program reads ", kEncryptedExtentVersion));
  std::array<std::byte, kDiskPage> plain{};  // zeros behind what is encrypted
  std::memcpy(plain.data(), page.data() + sizeof clear, kEncryptedLabel);
  if (clear.file != static_cast<uint32_t>(place.file) ||
      !Decrypt(key, kLabelPurpose, clear.salt, BoundOfLabel(place, clear.bytes_tag), clear.label_tag,
               std::span(plain).first(kEncryptedLabel)))
    return absl::DataLossError("the label of the encrypted block is damaged, or of another place or key");
  KVTIDE_ASSIGN_OR_RETURN(BlockLabel label, ReadExtentHeader(plain));
  return ExtentDecryptor(
      std::move(label), clear.bytes_tag,
      EncryptedStream(EncryptedStream::Way::kDecrypt, key, kBytesPurpose, clear.salt, BoundOfBytes(place)));
}

absl::Status ExtentDecryptor::Check() {
  if (stream_.Matches(tag_)) return absl::OkStatus();
  return absl::DataLossError("the bytes of the encrypted block are not those that were encrypted");
}

}  // namespace kvtide
