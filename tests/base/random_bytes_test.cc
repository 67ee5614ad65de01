#include "kernels/base/random_bytes.h"

#include <algorithm>
#include <vector>

#include "gtest/gtest.h"

namespace kvtide {
namespace {

TEST(RandomBytes, FillsAllOfThemAndNothingElse) {
  FillRandom({});
  // 1,000 bytes come in pieces.
  for (const size_t size : {size_t{16}, size_t{256}, size_t{1000}}) {
    std::vector<std::byte> bytes(size + 2), other(size);
    FillRandom(std::span(bytes).subspan(1, size));
    FillRandom(other);
    EXPECT_EQ(bytes.front(), std::byte{0});
    EXPECT_EQ(bytes.back(), std::byte{0});
    EXPECT_FALSE(std::equal(other.begin(), other.end(), bytes.begin() + 1));
    // No stretch of 16 bytes was left out.
    const std::vector<std::byte> none(16);
    EXPECT_EQ(std::search(bytes.begin(), bytes.end(), none.begin(), none.end()), bytes.end());
  }
}

}  // namespace
}  // namespace kvtide
