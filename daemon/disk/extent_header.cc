#include "daemon/disk/extent_header.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "daemon/cache/tier/label_fields.h"
#include "kernels/base/check.h"

namespace kvtide {
namespace {

static_assert(std::endian::native == std::endian::little);
constexpr uint64_t kMagic = 0x31747865'6469746b;  // "ktidext1"

// The bytes as they lie on disk.
struct Header {
  uint64_t magic;
  uint32_t version;
  uint32_t kind;
  uint64_t write_id, bytes, checksum;
  uint64_t model_hash, sequence, name_space_hash, tenant;
  uint64_t chain[2];
  int64_t index;
  int32_t group;
  int32_t codec_version_k, codec_version_v;
  uint32_t reserved;
  uint64_t profile_hash, layout_hash;
  char k_type[16], v_type[16];
  uint64_t header_checksum;  // XXH3 of everything before it
};
static_assert(sizeof(Header) == 168 && std::is_trivially_copyable_v<Header>);

uint64_t ChecksumOf(const Header& header) { return XXH3_64bits(&header, offsetof(Header, header_checksum)); }

}  // namespace

void WriteExtentHeader(const BlockLabel& label, std::span<std::byte> page) {
  KVTIDE_CHECK(page.size() == kDiskPage);
  Header header{};
  header.magic = kMagic;
  header.version = kExtentVersion;
  StoreLabel(label, &header);
  header.header_checksum = ChecksumOf(header);
  std::memset(page.data(), 0, page.size());
  std::memcpy(page.data(), &header, sizeof header);
}

absl::StatusOr<BlockLabel> ReadExtentHeader(std::span<const std::byte> page) {
  KVTIDE_CHECK(page.size() == kDiskPage);
  Header header;
  std::memcpy(&header, page.data(), sizeof header);
  if (header.magic != kMagic) return absl::NotFoundError("no block begins here");
  if (header.version != kExtentVersion)
    return absl::DataLossError(
        absl::StrCat("the block has format ", header.version, ", this program reads ", kExtentVersion));
  if (header.header_checksum != ChecksumOf(header))
    return absl::DataLossError("the label of the block is damaged");
  return LoadLabel(header);
}

absl::Status CheckLabel(const BlockLabel& found, const BlockLabel& wanted) {
  const auto differ = [](const char* what, const auto& a, const auto& b) {
    return absl::DataLossError(absl::StrCat("another block lies there: its ", what, " is ", a, ", not ", b));
  };
  if (found.write_id != wanted.write_id) return differ("write id", found.write_id, wanted.write_id);
  if (found.bytes != wanted.bytes) return differ("size", found.bytes, wanted.bytes);
  if (found.sequence != wanted.sequence) return differ("sequence", found.sequence, wanted.sequence);
  if (found.index != wanted.index) return differ("block number", found.index, wanted.index);
  if (wanted.checksum != 0 && found.checksum != wanted.checksum)
    return differ("checksum", found.checksum, wanted.checksum);
  BlockLabel same = wanted;
  same.checksum = found.checksum;
  if (found != same)
    return absl::DataLossError(
        "the block was stored with another model, layout, profile, codec or namespace");
  return absl::OkStatus();
}

}  // namespace kvtide
