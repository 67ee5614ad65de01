#include "daemon/ring/arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "gtest/gtest.h"

namespace kvtide::ring {
namespace {

ArenaLayout Small() { return {4096, 8192, 16384}; }

TEST(Arena, BothEndsSeeTheSameMemory) {
  auto made = Arena::Make(Small());
  ASSERT_TRUE(made.ok()) << made.status();
  auto mapped = Arena::Map(::dup(made->fd()), Small());
  ASSERT_TRUE(mapped.ok()) << mapped.status();
  EXPECT_NE(made->tensors(), mapped->tensors());
  std::memset(made->tensors(), 7, 16384);
  EXPECT_EQ(mapped->tensors()[16383], std::byte{7});
  EXPECT_EQ(mapped->answers()[8191], std::byte{0});
  made->answer_head()->written = 3;
  EXPECT_EQ(mapped->answer_head()->written, 3u);
  EXPECT_EQ(mapped->request_head()->written, 0u);
}

TEST(Arena, ItsSizeCanNeverChange) {
  auto made = Arena::Make(Small());
  ASSERT_TRUE(made.ok()) << made.status();
  EXPECT_NE(::ftruncate(made->fd(), 4096), 0);
  EXPECT_NE(::ftruncate(made->fd(), 1 << 20), 0);
  EXPECT_NE(::fcntl(made->fd(), F_ADD_SEALS, F_SEAL_WRITE), 0);
}

TEST(Arena, AFileThatCouldShrinkOrHasAnotherSizeIsRefused) {
  const int open = ::memfd_create("open", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  ASSERT_EQ(::ftruncate(open, static_cast<off_t>(Small().total())), 0);
  EXPECT_EQ(Arena::Map(open, Small()).status().code(), absl::StatusCode::kInvalidArgument);
  auto made = Arena::Make(Small());
  ArenaLayout other = Small();
  other.tensor_bytes *= 2;
  EXPECT_EQ(Arena::Map(::dup(made->fd()), other).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Arena::Map(::open("/dev/null", O_RDWR), Small()).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(Arena, SizesAreWholePagesWithinBounds) {
  for (const uint64_t bytes : {uint64_t{0}, uint64_t{100}, uint64_t{4097}, ~uint64_t{0}, uint64_t{1} << 63}) {
    EXPECT_EQ(CheckLayout({bytes, 4096, 4096}).code(), absl::StatusCode::kInvalidArgument) << bytes;
    EXPECT_EQ(CheckLayout({4096, bytes, 4096}).code(), absl::StatusCode::kInvalidArgument) << bytes;
    EXPECT_EQ(CheckLayout({4096, 4096, bytes}).code(), absl::StatusCode::kInvalidArgument) << bytes;
  }
}

}  // namespace
}  // namespace kvtide::ring
