#include "daemon/remote/value_header.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "daemon/cache/tier/label_fields.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

static_assert(std::endian::native == std::endian::little);
constexpr uint64_t kMagic = 0x316c6176'6469746b;  // "ktidval1"

// The bytes as they lie.
struct Header {
  uint64_t magic;
  uint32_t version;
  uint32_t kind;
  uint64_t write_id, bytes, checksum, piece_bytes;
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
static_assert(sizeof(Header) == kValueHeaderBytes && std::is_trivially_copyable_v<Header>);

uint64_t ChecksumOf(const Header& header) { return XXH3_64bits(&header, offsetof(Header, header_checksum)); }

}  // namespace

size_t ValueHeader::pieces() const {
  if (piece_bytes == 0 || label.bytes == 0) return 1;
  return static_cast<size_t>((label.bytes + piece_bytes - 1) / piece_bytes);
}

std::string EncodeValueHeader(const ValueHeader& value) {
  Header header{};
  header.magic = kMagic;
  header.version = kValueVersion;
  StoreLabel(value.label, &header);
  header.piece_bytes = value.piece_bytes;
  header.header_checksum = ChecksumOf(header);
  return {reinterpret_cast<const char*>(&header), sizeof header};
}

absl::StatusOr<ValueHeader> DecodeValueHeader(std::span<const std::byte> bytes) {
  Header header;
  if (bytes.size() < sizeof header)
    return absl::DataLossError(absl::StrCat("the value has ", bytes.size(), " bytes, less than its label"));
  std::memcpy(&header, bytes.data(), sizeof header);
  if (header.magic != kMagic) return absl::DataLossError("the value is none of kvtide's");
  if (header.version != kValueVersion)
    return absl::DataLossError(
        absl::StrCat("the value has format ", header.version, ", this program reads ", kValueVersion));
  if (header.header_checksum != ChecksumOf(header))
    return absl::DataLossError("the label of the value is damaged");
  ValueHeader value;
  value.piece_bytes = header.piece_bytes;
  constexpr uint64_t kMostBytes = uint64_t{1} << 36, kMostPieces = 1 << 16;
  if (header.bytes > kMostBytes || header.bytes / kMostPieces > header.piece_bytes)
    return absl::DataLossError(absl::StrCat("the value says that it has ", header.bytes,
                                            " bytes in pieces of ", header.piece_bytes));
  KVTIDE_ASSIGN_OR_RETURN(value.label, LoadLabel(header));
  return value;
}

absl::Status CheckValueLabel(const BlockLabel& found, const BlockLabel& wanted) {
  const auto differ = [](const char* what, const auto& a, const auto& b) {
    return absl::DataLossError(absl::StrCat("another value lies there: its ", what, " is ", a, ", not ", b));
  };
  if (wanted.bytes != 0 && found.bytes != wanted.bytes) return differ("size", found.bytes, wanted.bytes);
  if (found.index != wanted.index) return differ("block number", found.index, wanted.index);
  if (found.k_type != wanted.k_type) return differ("type of keys", found.k_type, wanted.k_type);
  if (found.v_type != wanted.v_type) return differ("type of values", found.v_type, wanted.v_type);
  if (found.codec_version_k != wanted.codec_version_k)
    return differ("codec version of keys", found.codec_version_k, wanted.codec_version_k);
  if (found.codec_version_v != wanted.codec_version_v)
    return differ("codec version of values", found.codec_version_v, wanted.codec_version_v);
  if (wanted.checksum != 0 && found.checksum != wanted.checksum)
    return differ("checksum", found.checksum, wanted.checksum);
  BlockLabel same = wanted;
  same.bytes = found.bytes;
  same.write_id = found.write_id;
  same.sequence = found.sequence;
  same.profile_hash = found.profile_hash;
  same.checksum = found.checksum;
  if (found != same)
    return absl::DataLossError("the value was stored for another model, layout, key or namespace");
  return absl::OkStatus();
}

}  // namespace kvtide
