// Extents that are encrypted: golden bytes, which a program without kvtide's code opens too; nothing of
// another place, file, key or version opens; neither does a label with another one's bytes.
//
//   KVTIDE_WRITE_GOLDEN_DISK=tests/golden/disk kvtide_test_disk --gtest_filter='*Golden*'   writes the files
#include "daemon/disk/encrypted_extent.h"

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace kvtide {
namespace {

using Bytes = std::vector<std::byte>;
constexpr ExtentPlace kPlace{ExtentPlace::File::kSegments, 40960};
constexpr size_t kBlock = 5000, kExtent = 3 * kDiskPage;

SecretKey KeyFrom(int first) {
  SecretKey key;
  for (size_t i = 0; i < kKeyBytes; i++)
    key.bytes()[i] = static_cast<std::byte>(static_cast<size_t>(first) + i);
  return key;
}
Salt CountingSalt() {
  Salt salt;
  for (size_t i = 0; i < salt.size(); i++) salt[i] = static_cast<std::byte>(100 + i);
  return salt;
}
BlockLabel Label() {
  BlockLabel label;
  label.write_id = 0x1122334455667788;
  label.bytes = kBlock;
  label.checksum = 0x99aabbccddeeff00;
  label.sequence = 2;
  label.tenant = 4;
  label.k_type = "q8_0";
  label.v_type = "turbo4";
  return label;
}
Bytes Block() {
  Bytes block(kExtent - kDiskPage);
  for (size_t i = 0; i < kBlock; i++) block[i] = static_cast<std::byte>(i % 251);
  return block;
}
Bytes Encrypted(const SecretKey& key, const ExtentPlace& place, const Salt& salt) {
  Bytes extent(kDiskPage);
  const Bytes block = Block();
  extent.insert(extent.end(), block.begin(), block.end());
  ExtentEncryptor encryptor(key, place, salt);
  encryptor.Add(std::span(extent).subspan(kDiskPage, 1000));
  encryptor.Add(std::span(extent).subspan(kDiskPage + 1000));
  encryptor.WriteLabel(Label(), std::span(extent).first(kDiskPage));
  return extent;
}
// What an extent holds; what keeps it shut.
absl::StatusOr<Bytes> Opened(const SecretKey& key, const ExtentPlace& place, Bytes extent) {
  absl::StatusOr<ExtentDecryptor> decryptor =
      ExtentDecryptor::Open(key, place, std::span(extent).first(kDiskPage));
  if (!decryptor.ok()) return decryptor.status();
  EXPECT_EQ(decryptor->label(), Label());
  Bytes block(extent.begin() + kDiskPage, extent.end());
  decryptor->Add(block);
  if (absl::Status status = decryptor->Check(); !status.ok()) return status;
  return block;
}

TEST(EncryptedExtent, GoldenBytesAreWrittenAndRead) {
  const Bytes extent = Encrypted(KeyFrom(64), kPlace, CountingSalt());
  if (const char* to = std::getenv("KVTIDE_WRITE_GOLDEN_DISK"); to != nullptr)
    std::ofstream(std::string(to) + "/encrypted_extent_v1.bin", std::ios::binary)
        .write(reinterpret_cast<const char*>(extent.data()), static_cast<std::streamsize>(extent.size()));
  std::ifstream file(KVTIDE_GOLDEN "/disk/encrypted_extent_v1.bin", std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const Bytes golden(reinterpret_cast<const std::byte*>(text.data()),
                     reinterpret_cast<const std::byte*>(text.data()) + text.size());
  EXPECT_TRUE(extent == golden);
  EXPECT_TRUE(Opened(KeyFrom(64), kPlace, golden).value() == Block());
}

TEST(EncryptedExtent, OpensWithItsKeyInItsPlaceOnly) {
  const SecretKey key = KeyFrom(64);
  const Bytes extent = Encrypted(key, kPlace, NewSalt());
  EXPECT_TRUE(Opened(key, kPlace, extent).ok());
  const auto shut = [&](const SecretKey& with, const ExtentPlace& place) {
    EXPECT_EQ(Opened(with, place, extent).status().code(), absl::StatusCode::kDataLoss);
  };
  shut(KeyFrom(65), kPlace);
  shut(key, {ExtentPlace::File::kManifests, kPlace.offset});
  shut(key, {ExtentPlace::File::kSegments, kPlace.offset + kDiskPage});
}

TEST(EncryptedExtent, EveryChangedByteKeepsItShut) {
  const SecretKey key = KeyFrom(64);
  const Bytes extent = Encrypted(key, kPlace, NewSalt());
  for (size_t at = 0; at < extent.size(); at += at < 200 ? 1 : 101) {
    Bytes changed = extent;
    changed[at] ^= std::byte{16};
    const absl::StatusCode code = Opened(key, kPlace, changed).status().code();
    EXPECT_EQ(code, at < 8 ? absl::StatusCode::kNotFound : absl::StatusCode::kDataLoss) << at;
  }
}

TEST(EncryptedExtent, BytesOfAnotherOneDoNotFitItsLabel) {
  const SecretKey key = KeyFrom(64);
  const Bytes first = Encrypted(key, kPlace, NewSalt()), second = Encrypted(key, kPlace, NewSalt());
  EXPECT_NE(first, second);
  Bytes mixed = first;
  std::copy(second.begin() + kDiskPage, second.end(), mixed.begin() + kDiskPage);
  EXPECT_EQ(Opened(key, kPlace, mixed).status().code(), absl::StatusCode::kDataLoss);
  // Nor with the tag of theirs.
  std::copy(second.begin() + 48, second.begin() + 64, mixed.begin() + 48);
  EXPECT_EQ(Opened(key, kPlace, mixed).status().code(), absl::StatusCode::kDataLoss);
}

TEST(EncryptedExtent, NoneBeginsWhereAnEmptyPageIs) {
  const Bytes page(kDiskPage);
  EXPECT_EQ(ExtentDecryptor::Open(KeyFrom(0), kPlace, page).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace kvtide
