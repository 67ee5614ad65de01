#include "daemon/disk/folder_size.h"

#include "gtest/gtest.h"
#include "tests/daemon/disk/fault_file_system.h"

namespace kvtide {
namespace {

using testing::FaultFileSystem;

TEST(FolderSize, ComesBackAndIsTheFormerOrTheNewOneAfterACrashAtAnyStep) {
  for (int step = 0;; step++) {
    FaultFileSystem files(static_cast<uint32_t>(step + 1));
    ASSERT_TRUE(files.MakeFolder("/disk").ok());
    EXPECT_TRUE(absl::IsNotFound(ReadFolderSize(files, "/disk").status()));
    ASSERT_TRUE(WriteFolderSize(files, "/disk", 1'000).ok());
    files.DieAfter(step);
    const absl::Status status = WriteFolderSize(files, "/disk", size_t{1} << 40);
    const bool dead = files.dead();
    files.Crash();
    const absl::StatusOr<size_t> found = ReadFolderSize(files, "/disk");
    ASSERT_TRUE(found.ok()) << step << ": " << found.status();
    EXPECT_TRUE(*found == size_t{1} << 40 || (*found == 1'000 && !status.ok())) << step << ": " << *found;
    if (!dead) break;
  }
}

TEST(FolderSize, DamageIsTold) {
  for (uint64_t at = 0; at < 24; at++) {
    FaultFileSystem files;
    ASSERT_TRUE(files.MakeFolder("/disk").ok());
    ASSERT_TRUE(WriteFolderSize(files, "/disk", 12'345).ok());
    ASSERT_TRUE(files.Damage("/disk/size", at));
    EXPECT_TRUE(absl::IsDataLoss(ReadFolderSize(files, "/disk").status())) << at;
  }
}

}  // namespace
}  // namespace kvtide
