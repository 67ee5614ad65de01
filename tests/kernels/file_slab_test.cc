// Memory files that processes share: what may be written by whom, and sizes that never change.
#include "kernels/cpu/file_slab.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "gtest/gtest.h"

namespace kvtide {
namespace {

constexpr size_t kBytes = size_t{1} << 20;

TEST(FileSlab, TheOtherEndWritesToo) {
  const auto slab = MakeFileSlab(kBytes);
  ASSERT_TRUE(slab.ok()) << slab.status();
  SlabHandle handle = *(*slab)->Share();
  handle.fd = ::dup(handle.fd);
  const auto other = MapFileSlab(handle);
  ASSERT_TRUE(other.ok()) << other.status();
  std::memset((*other)->data(), 5, kBytes);
  EXPECT_EQ((*slab)->data()[kBytes - 1], std::byte{5});
}

TEST(ReadableSlab, NobodyElseWrites) {
  const auto slab = MakeReadableSlab(kBytes);
  ASSERT_TRUE(slab.ok()) << slab.status();
  const int fd = (*slab)->Share()->fd;
  EXPECT_EQ(::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
  EXPECT_EQ(::pwrite(fd, "x", 1, 0), -1);
  EXPECT_EQ(::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), -1);
  EXPECT_EQ(::ftruncate(fd, 0), -1);
  EXPECT_EQ(::fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
  void* const read = ::mmap(nullptr, kBytes, PROT_READ, MAP_SHARED, fd, 0);
  ASSERT_NE(read, MAP_FAILED);
  EXPECT_EQ(::mprotect(read, kBytes, PROT_READ | PROT_WRITE), -1);
  // Its maker does, and the others see it.
  std::memset((*slab)->data(), 7, kBytes);
  EXPECT_EQ(static_cast<const std::byte*>(read)[kBytes - 1], std::byte{7});
  ::munmap(read, kBytes);
}

TEST(FileSlab, WhatMayChangeItsSizeIsRefused) {
  SlabHandle handle;
  handle.kind = SlabHandle::Kind::kFile;
  handle.bytes = kBytes;
  handle.fd = ::memfd_create("open", MFD_CLOEXEC);
  ASSERT_EQ(::ftruncate(handle.fd, kBytes), 0);
  EXPECT_TRUE(absl::IsInvalidArgument(MapFileSlab(handle).status()));
  EXPECT_EQ(::fcntl(handle.fd, F_GETFD), -1) << "the descriptor was taken";
}

}  // namespace
}  // namespace kvtide
