// The file with a folder's key: golden bytes, every damage told, another key than the operator's refused.
#include "daemon/disk/folder_key.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

#include "gtest/gtest.h"

namespace kvtide {
namespace {

SecretKey KeyFrom(int first) {
  SecretKey key;
  for (size_t i = 0; i < kKeyBytes; i++)
    key.bytes()[i] = static_cast<std::byte>(static_cast<size_t>(first) + i);
  return key;
}

bool Same(const SecretKey& a, const SecretKey& b) {
  return std::equal(a.bytes().begin(), a.bytes().end(), b.bytes().begin());
}

TEST(FolderKey, GoldenBytesAreWrittenAndRead) {
  Salt salt;
  for (size_t i = 0; i < salt.size(); i++) salt[i] = static_cast<std::byte>(100 + i);
  const std::string bytes = WrapFolderKey(KeyFrom(64), KeyFrom(0), salt);
  if (const char* to = std::getenv("KVTIDE_WRITE_GOLDEN_DISK"); to != nullptr)
    std::ofstream(std::string(to) + "/encryption_v1.bin", std::ios::binary) << bytes;
  std::ifstream file(KVTIDE_GOLDEN "/disk/encryption_v1.bin", std::ios::binary);
  const std::string golden((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  EXPECT_TRUE(bytes == golden);
  EXPECT_TRUE(Same(UnwrapFolderKey(golden, KeyFrom(0)).value(), KeyFrom(64)));
}

TEST(FolderKey, DamageIsToldFromAnotherKey) {
  const std::string bytes = WrapFolderKey(KeyFrom(64), KeyFrom(0));
  EXPECT_EQ(UnwrapFolderKey(bytes, KeyFrom(1)).status().code(), absl::StatusCode::kFailedPrecondition);
  for (size_t at = 0; at < bytes.size(); at++) {
    std::string changed = bytes;
    changed[at] = static_cast<char>(changed[at] ^ 1);
    EXPECT_EQ(UnwrapFolderKey(changed, KeyFrom(0)).status().code(), absl::StatusCode::kDataLoss) << at;
    EXPECT_EQ(UnwrapFolderKey(bytes.substr(0, at), KeyFrom(0)).status().code(), absl::StatusCode::kDataLoss)
        << at;
  }
}

TEST(FolderKey, TheKeyIsNotInTheFile) {
  const SecretKey key = SecretKey::Random(), operators = SecretKey::Random();
  const std::string bytes = WrapFolderKey(key, operators);
  for (const SecretKey* one : {&key, &operators})
    EXPECT_EQ(bytes.find(std::string(reinterpret_cast<const char*>(one->bytes().data()), 8)),
              std::string::npos);
}

}  // namespace
}  // namespace kvtide
