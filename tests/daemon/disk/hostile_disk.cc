#include "tests/daemon/disk/hostile_disk.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "daemon/cache/keyed_manifest.h"
#include "daemon/cache/manifest.h"
#include "daemon/disk/extent_header.h"
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

}  // namespace

bool PlayHostileDisk(std::span<const uint8_t> bytes) {
  if (bytes.empty()) return false;
  const std::span<const uint8_t> rest = bytes.subspan(1);
  const std::string text(reinterpret_cast<const char*>(rest.data()), rest.size());
  switch (bytes[0] % 3) {
    case 0:
      return ReadManifest(text);
    case 1:
      return ReadKeyedManifest(text);
    default:
      return ReadHeader(rest);
  }
}

}  // namespace kvtide
