#include "daemon/ring/read_window.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <utility>

#include "gtest/gtest.h"

namespace kvtide::ring {
namespace {

constexpr uint64_t kBytes = 64 * 1024;

int File(int seals) {
  const int fd = ::memfd_create("window", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  EXPECT_EQ(::ftruncate(fd, kBytes), 0);
  EXPECT_EQ(::pwrite(fd, "end", 3, kBytes - 3), 3);
  EXPECT_EQ(::fcntl(fd, F_ADD_SEALS, seals), 0);
  return fd;
}
constexpr int kFixed = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

TEST(ReadWindow, ShowsTheFileAndTakesItsDescriptor) {
  const int fd = File(kFixed | F_SEAL_FUTURE_WRITE);
  absl::StatusOr<ReadWindow> window = ReadWindow::Map(fd, kBytes);
  ASSERT_TRUE(window.ok()) << window.status();
  EXPECT_EQ(::fcntl(fd, F_GETFD), -1);
  ReadWindow moved = *std::move(window);
  EXPECT_EQ(moved.bytes().size(), kBytes);
  EXPECT_EQ(moved.bytes()[kBytes - 1], std::byte{'d'});
  moved = ReadWindow();
  EXPECT_TRUE(moved.bytes().empty());
}

TEST(ReadWindow, WhatIsNoTierIsRefused) {
  EXPECT_TRUE(absl::IsInvalidArgument(ReadWindow::Map(File(kFixed), kBytes + 1).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(ReadWindow::Map(File(kFixed), 0).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(ReadWindow::Map(File(F_SEAL_GROW), kBytes).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(ReadWindow::Map(-1, kBytes).status()));
}

}  // namespace
}  // namespace kvtide::ring
