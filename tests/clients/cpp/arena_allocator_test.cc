#include "clients/cpp/arena_allocator.h"

#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace kvtide::client {
namespace {

TEST(ArenaAllocator, PiecesAreApartAndComeBack) {
  constexpr uint64_t kBytes = 1 << 16;
  ArenaAllocator arena(kBytes);
  std::mt19937 random(20260101);
  struct Piece {
    uint64_t offset, bytes;
  };
  std::vector<Piece> pieces;
  std::vector<int> owner(kBytes, -1);
  int serial = 0;
  for (int step = 0; step < 5000; step++) {
    if (random() % 2 == 0) {
      const uint64_t bytes = random() % 3000;
      const auto offset = arena.Allocate(bytes);
      if (!offset.ok()) {
        EXPECT_EQ(offset.status().code(), absl::StatusCode::kResourceExhausted);
        continue;
      }
      ASSERT_EQ(*offset % 64, 0u);
      ASSERT_LE(*offset + bytes, kBytes);
      serial++;
      for (uint64_t i = 0; i < bytes; i++) {
        ASSERT_EQ(owner[*offset + i], -1) << "two pieces share a byte";
        owner[*offset + i] = serial;
      }
      pieces.push_back({*offset, bytes});
    } else if (!pieces.empty()) {
      std::swap(pieces[random() % pieces.size()], pieces.back());
      arena.Free(pieces.back().offset);
      for (uint64_t i = 0; i < pieces.back().bytes; i++) owner[pieces.back().offset + i] = -1;
      pieces.pop_back();
    }
  }
  for (const Piece& piece : pieces) arena.Free(piece.offset);
  EXPECT_EQ(arena.free_bytes(), kBytes);
  EXPECT_TRUE(arena.Allocate(kBytes).ok()) << "all of it is one piece again";
}

TEST(ArenaAllocator, SizesThatOverflowAreRefused) {
  ArenaAllocator arena(4096);
  EXPECT_FALSE(arena.Allocate(~uint64_t{0}).ok());
  EXPECT_FALSE(arena.Allocate(4097).ok());
  EXPECT_TRUE(arena.Allocate(4096).ok());
  EXPECT_FALSE(arena.Allocate(0).ok()) << "nothing is a piece too";
}

TEST(ArenaAllocatorDeathTest, AStrangePieceIsAFault) {
  ArenaAllocator arena(4096);
  EXPECT_DEATH(arena.Free(64), "did not give");
}

}  // namespace
}  // namespace kvtide::client
