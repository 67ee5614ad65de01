#include "kernels/cpu/stream_copy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "kernels/cpu/cpu_backend.h"

namespace kvtide {
namespace {

std::vector<std::byte> Noise(size_t bytes, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> out(bytes);
  for (std::byte& byte : out) byte = static_cast<std::byte>(random());
  return out;
}

TEST(StreamCopy, CopiesAnyPieceAndNothingBesideIt) {
  const std::vector<std::byte> from = Noise(1000, 1), before = Noise(1000, 2);
  std::mt19937 random(3);
  for (int i = 0; i < 3000; i++) {
    const size_t source = random() % 130, target = random() % 130, bytes = random() % 800;
    std::vector<std::byte> to = before, wanted = before;
    StreamCopy(to.data() + target, from.data() + source, bytes);
    std::copy_n(from.begin() + static_cast<ptrdiff_t>(source), bytes,
                wanted.begin() + static_cast<ptrdiff_t>(target));
    ASSERT_EQ(to, wanted) << source << " " << target << " " << bytes;
  }
}

TEST(StreamCopy, ServesTheBackendsOwnCopies) {
  const std::unique_ptr<Backend> backend = MakeCpuBackend({.threads = 1});
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{65535}, size_t{65536}, size_t{300001}}) {
    const std::vector<std::byte> from = Noise(bytes, 4);
    for (const CopyDirection direction : {CopyDirection::kFromHost, CopyDirection::kToHost}) {
      std::vector<std::byte> to(bytes);
      EXPECT_TRUE(backend->CopyNow({to.data(), from.data(), bytes}, direction).ok());
      EXPECT_EQ(to, from);
    }
  }
  std::byte byte{};
  EXPECT_TRUE(absl::IsInvalidArgument(backend->CopyNow({nullptr, &byte, 1}, CopyDirection::kFromHost)));
}

}  // namespace
}  // namespace kvtide
