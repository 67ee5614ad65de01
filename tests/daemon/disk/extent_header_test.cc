// The label of an extent on disk: frozen bytes, every field comes back, every damaged byte is noticed, and a
// label that differs in any field is another block's.
#include "daemon/disk/extent_header.h"

#include <xxhash.h>

#include <functional>
#include <vector>

#include "gtest/gtest.h"

namespace kvtide {
namespace {

constexpr uint64_t kFrozen = 463108118270412989u;

BlockLabel Example() {
  BlockLabel label;
  label.kind = BlockLabel::Kind::kBlock;
  label.write_id = 0x1122334455667788;
  label.bytes = 186'880;
  label.checksum = 0x99aabbccddeeff00;
  label.model_hash = 1;
  label.sequence = 2;
  label.name_space_hash = 3;
  label.tenant = 4;
  label.group = 5;
  label.index = 6;
  label.chain = {7, 8};
  label.k_type = "q8_0";
  label.v_type = "turbo4";
  label.codec_version_k = 9;
  label.codec_version_v = 10;
  label.profile_hash = 11;
  label.layout_hash = 12;
  return label;
}

TEST(ExtentHeader, EveryFieldComesBack) {
  std::vector<std::byte> page(kDiskPage);
  WriteExtentHeader(Example(), page);
  const absl::StatusOr<BlockLabel> read = ReadExtentHeader(page);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(*read, Example());
}

TEST(ExtentHeader, BytesAreFrozen) {
  std::vector<std::byte> page(kDiskPage, std::byte{0xff});
  WriteExtentHeader(Example(), page);
  EXPECT_EQ(XXH3_64bits(page.data(), page.size()), kFrozen);
}

TEST(ExtentHeader, EveryDamagedByteIsNoticed) {
  std::vector<std::byte> page(kDiskPage);
  WriteExtentHeader(Example(), page);
  for (size_t i = 0; i < 168; i++) {
    page[i] ^= std::byte{1};
    EXPECT_FALSE(ReadExtentHeader(page).ok()) << i;
    page[i] ^= std::byte{1};
  }
  EXPECT_TRUE(ReadExtentHeader(page).ok());
  EXPECT_EQ(ReadExtentHeader(std::vector<std::byte>(kDiskPage)).status().code(), absl::StatusCode::kNotFound);
}

TEST(ExtentHeader, ANameWithoutAnEndIsDamage) {
  std::vector<std::byte> page(kDiskPage);
  WriteExtentHeader(Example(), page);
  for (const size_t field : {128, 144}) {  // of keys, of values
    std::vector<std::byte> other = page;
    std::fill_n(other.begin() + static_cast<std::ptrdiff_t>(field), 16, std::byte{'x'});
    const uint64_t checksum = XXH3_64bits(other.data(), 160);
    std::memcpy(other.data() + 160, &checksum, sizeof checksum);
    EXPECT_TRUE(absl::IsDataLoss(ReadExtentHeader(other).status())) << field;
    std::fill_n(other.begin() + static_cast<std::ptrdiff_t>(field) + 15, 1, std::byte{0});
    const uint64_t again = XXH3_64bits(other.data(), 160);
    std::memcpy(other.data() + 160, &again, sizeof again);
    EXPECT_TRUE(ReadExtentHeader(other).ok()) << field;
  }
}

// Two blocks that differ in one of these never pass for each other.
TEST(ExtentHeader, ADifferenceInAnyFieldIsAnotherBlock) {
  const std::vector<std::function<void(BlockLabel&)>> changes = {
      [](BlockLabel& l) { l.kind = BlockLabel::Kind::kManifest; },
      [](BlockLabel& l) { l.write_id++; },
      [](BlockLabel& l) { l.bytes++; },
      [](BlockLabel& l) { l.checksum++; },
      [](BlockLabel& l) { l.model_hash++; },
      [](BlockLabel& l) { l.sequence++; },
      [](BlockLabel& l) { l.name_space_hash++; },
      [](BlockLabel& l) { l.tenant++; },
      [](BlockLabel& l) { l.group++; },
      [](BlockLabel& l) { l.index++; },
      [](BlockLabel& l) { l.chain[1]++; },
      [](BlockLabel& l) { l.k_type = "q5_0"; },
      [](BlockLabel& l) { l.v_type = "turbo3"; },
      [](BlockLabel& l) { l.codec_version_k++; },
      [](BlockLabel& l) { l.codec_version_v++; },
      [](BlockLabel& l) { l.profile_hash++; },
      [](BlockLabel& l) { l.layout_hash++; },
  };
  EXPECT_TRUE(CheckLabel(Example(), Example()).ok());
  for (size_t i = 0; i < changes.size(); i++) {
    BlockLabel other = Example();
    changes[i](other);
    EXPECT_EQ(CheckLabel(other, Example()).code(), absl::StatusCode::kDataLoss) << i;
  }
  BlockLabel any_checksum = Example();
  any_checksum.checksum = 0;
  EXPECT_TRUE(CheckLabel(Example(), any_checksum).ok());
}

}  // namespace
}  // namespace kvtide
