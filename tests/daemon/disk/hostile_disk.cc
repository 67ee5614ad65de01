#include "tests/daemon/disk/hostile_disk.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "daemon/cache/persist/keyed_manifest.h"
#include "daemon/cache/persist/manifest.h"
#include "daemon/disk/encrypted_extent.h"
#include "daemon/disk/extent_header.h"
#include "daemon/disk/folder_key.h"
#include "kernels/base/check.h"

namespace kvtide {
namespace {

bool ReadManifest(const std::string& text) {
  int64_t written = 0;
  IsClosedManifest(text, &written);
  const absl::StatusOr<Manifest> read = DecodeManifest(text);
  if (!read.ok()) return false;
  const std::string again = EncodeManifest(*read);
  const absl::StatusOr<Manifest> second = DecodeManifest(again);
  KVTIDE_CHECK(second.ok(), "what was written is not read: ", second.status().ToString());
  KVTIDE_CHECK(EncodeManifest(*second) == again, "a manifest changes when it is read");
  return true;
}

bool ReadKeyedManifest(const std::string& text) {
  IsKeyedManifest(text);
  WrittenAt(text);
  const absl::StatusOr<KeyedManifest> read = DecodeKeyedManifest(text);
  if (!read.ok()) return false;
  const std::string again = EncodeKeyedManifest(*read);
  const absl::StatusOr<KeyedManifest> second = DecodeKeyedManifest(again);
  KVTIDE_CHECK(second.ok(), "what was written is not read: ", second.status().ToString());
  KVTIDE_CHECK(EncodeKeyedManifest(*second) == again, "a manifest changes when it is read");
  return true;
}

bool ReadHeader(std::span<const uint8_t> bytes) {
  std::vector<std::byte> page(kDiskPage), again(kDiskPage);
  std::copy_n(reinterpret_cast<const std::byte*>(bytes.data()), std::min(bytes.size(), page.size()),
              page.begin());
  const absl::StatusOr<BlockLabel> label = ReadExtentHeader(page);
  if (!label.ok()) return false;
  WriteExtentHeader(*label, again);
  const absl::StatusOr<BlockLabel> second = ReadExtentHeader(again);
  KVTIDE_CHECK(second.ok() && CheckLabel(*second, *label).ok(), "a label changes when it is written");
  return true;
}

// The keys of the golden files (tests/golden/disk).
SecretKey KeyFrom(size_t first) {
  SecretKey key;
  for (size_t i = 0; i < kKeyBytes; i++) key.bytes()[i] = static_cast<std::byte>(first + i);
  return key;
}

bool ReadFolderKey(const std::string& text) {
  const SecretKey operators = KeyFrom(0);
  const absl::StatusOr<SecretKey> key = UnwrapFolderKey(text, operators);
  if (!key.ok()) return false;
  const absl::StatusOr<SecretKey> again = UnwrapFolderKey(WrapFolderKey(*key, operators), operators);
  KVTIDE_CHECK(again.ok() && std::ranges::equal(again->bytes(), key->bytes()),
               "a key changes when it is written");
  return true;
}

// The page of a label and what follows it.
bool ReadEncryptedExtent(std::span<const uint8_t> bytes) {
  std::vector<std::byte> extent(std::max(bytes.size(), kDiskPage));
  std::copy(bytes.begin(), bytes.end(), reinterpret_cast<uint8_t*>(extent.data()));
  const std::span<std::byte> page = std::span(extent).first(kDiskPage);
  const SecretKey key = KeyFrom(64);
  const ExtentPlace place{ExtentPlace::File::kSegments, 40960};
  absl::StatusOr<ExtentDecryptor> opened = ExtentDecryptor::Open(key, place, page);
  if (!opened.ok()) return false;
  const std::span<std::byte> block = std::span(extent).subspan(kDiskPage);
  opened->Add(block);
  if (!opened->Check().ok()) return false;
  ExtentEncryptor encryptor(key, place);
  encryptor.Add(block);
  encryptor.WriteLabel(opened->label(), page);
  const absl::StatusOr<ExtentDecryptor> again = ExtentDecryptor::Open(key, place, page);
  KVTIDE_CHECK(again.ok() && again->label() == opened->label(), "a label changes when it is encrypted");
  return true;
}

}  // namespace

bool PlayHostileDisk(std::span<const uint8_t> bytes) {
  if (bytes.empty()) return false;
  const std::span<const uint8_t> rest = bytes.subspan(1);
  const std::string text(reinterpret_cast<const char*>(rest.data()), rest.size());
  switch (bytes[0] % 5) {
    case 0:
      return ReadManifest(text);
    case 1:
      return ReadKeyedManifest(text);
    case 2:
      return ReadHeader(rest);
    case 3:
      return ReadFolderKey(text);
    default:
      return ReadEncryptedExtent(rest);
  }
}

}  // namespace kvtide
