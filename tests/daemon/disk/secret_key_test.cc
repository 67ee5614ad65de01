// Files with keys: the three forms give the same bytes; what is no key, and a file that others may read, is
// refused with words that never repeat it; the page of a key is left out of core dumps.
#include "daemon/disk/secret_key.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace kvtide {
namespace {

std::string Raw() {
  std::string raw;
  for (int i = 0; i < 32; i++) raw.push_back(static_cast<char>(7 * i + 3));
  return raw;
}

std::string BytesOf(const SecretKey& key) {
  return std::string(reinterpret_cast<const char*>(key.bytes().data()), key.bytes().size());
}

TEST(SecretKey, ThreeFormsOfOneKey) {
  const std::string hex = absl::BytesToHexString(Raw()), base64 = absl::Base64Escape(Raw());
  ASSERT_EQ(base64.size(), 44u);
  for (const std::string& text :
       {Raw(), hex, hex + "\n", absl::AsciiStrToUpper(hex), base64, base64 + " \r\n"}) {
    const absl::StatusOr<SecretKey> key = ParseKey(text);
    ASSERT_TRUE(key.ok()) << key.status();
    EXPECT_EQ(BytesOf(*key), Raw());
  }
}

TEST(SecretKey, WhatIsNoKeyIsRefusedAndNotRepeated) {
  const std::string hex = absl::BytesToHexString(Raw());
  for (const std::string& text :
       {std::string(), std::string("correct horse battery staple"), hex.substr(1), hex + "0",
        hex.substr(0, 32), std::string(32, '\0'), std::string(64, '0'), Raw() + "\n",
        absl::Base64Escape(Raw()).substr(0, 40), std::string(5000, 'a')}) {
    const absl::Status status = ParseKey(text).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text.size();
    if (text.size() > 3) {
      EXPECT_EQ(status.message().find(text), std::string::npos);
    }
  }
}

TEST(SecretKey, RandomOnesDiffer) { EXPECT_NE(BytesOf(SecretKey::Random()), BytesOf(SecretKey::Random())); }

class KeyFile : public ::testing::Test {
 protected:
  KeyFile() {
    std::string folder = ::testing::TempDir() + "/kvtide_key_XXXXXX";
    EXPECT_NE(mkdtemp(folder.data()), nullptr);
    path_ = folder + "/key";
    std::ofstream(path_) << absl::BytesToHexString(Raw()) << "\n";
  }
  ~KeyFile() override { std::filesystem::remove_all(std::filesystem::path(path_).parent_path()); }
  absl::StatusCode Code() { return ReadKeyFile(path_).status().code(); }
  std::string path_;
};

TEST_F(KeyFile, OnlyItsOwnerMayReadIt) {
  for (const mode_t mode : {0400u, 0600u}) {
    ASSERT_EQ(chmod(path_.c_str(), mode), 0);
    EXPECT_EQ(BytesOf(ReadKeyFile(path_).value()), Raw());
  }
  for (const mode_t mode : {0404u, 0644u, 0602u, 0620u, 0660u, 0601u}) {
    ASSERT_EQ(chmod(path_.c_str(), mode), 0);
    const absl::Status status = ReadKeyFile(path_).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << mode;
    EXPECT_NE(status.message().find("chmod 0400"), std::string::npos) << status;
  }
}

// As secrets are mounted: root's, for a group to read.
TEST_F(KeyFile, AGroupMayReadWhatIsRoots) {
  ASSERT_EQ(chmod(path_.c_str(), 0440), 0);
  if (geteuid() == 0) {
    EXPECT_EQ(Code(), absl::StatusCode::kOk);
    ASSERT_EQ(chown(path_.c_str(), 12345, static_cast<gid_t>(-1)), 0);
  }
  EXPECT_EQ(Code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(KeyFile, WhatIsNoFileIsSaid) {
  ASSERT_EQ(unlink(path_.c_str()), 0);
  EXPECT_EQ(Code(), absl::StatusCode::kNotFound);
  ASSERT_EQ(mkdir(path_.c_str(), 0700), 0);
  EXPECT_EQ(Code(), absl::StatusCode::kInvalidArgument);
}

// The flags of the mapping that holds the key, as the kernel tells them: "dd" is MADV_DONTDUMP.
TEST(SecretKey, ItsPageIsNotDumped) {
  const SecretKey key = SecretKey::Random();
  const auto at = reinterpret_cast<uintptr_t>(key.bytes().data());
  std::ifstream maps("/proc/self/smaps");
  if (!maps) GTEST_SKIP() << "no /proc/self/smaps";
  bool here = false;
  std::string line, flags;
  while (std::getline(maps, line)) {
    uintptr_t begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " ", &begin, &end) == 2)
      here = begin <= at && at < end;
    if (here && line.rfind("VmFlags:", 0) == 0) flags = line + " ";
  }
  EXPECT_NE(flags.find(" dd "), std::string::npos) << flags;
}

}  // namespace
}  // namespace kvtide
