// Two GPUs of one machine: the same blocks give the same bits on both, calls of two threads run side by side,
// and one pinned slab of host memory serves the copies of both. Skipped, and said so, where there is one GPU.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "kernels/cuda/cuda_backend.h"
#include "tests/gpu/cuda_ipc_case.h"

namespace kvtide::testing {
namespace {

class TwoDevices : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto count = CountCudaDevices();
    ASSERT_TRUE(count.ok()) << count.status();
    if (*count < 2) GTEST_SKIP() << "SKIPPED: two GPUs are needed, this machine has " << *count;
    for (int i = 0; i < 2; i++) {
      CudaBackendOptions options;
      options.device = std::to_string(i);
      auto backend = MakeCudaBackend(options);
      ASSERT_TRUE(backend.ok()) << backend.status();
      backends_.push_back(std::move(backend).value());
      auto slab = backends_.back()->AllocateSlab(IpcLayout().block_bytes() * kIpcBlocks);
      ASSERT_TRUE(slab.ok()) << slab.status();
      slabs_.push_back(std::move(slab).value());
    }
  }
  absl::Status Copy(size_t device, std::byte* target, const std::byte* source, size_t bytes,
                    CopyDirection direction) {
    const CopyPiece piece{target, source, bytes};
    const auto ticket = backends_[device]->StartCopy({&piece, 1}, direction);
    if (!ticket.ok()) return ticket.status();
    for (;;) {
      const auto done = backends_[device]->Poll(*ticket);
      if (!done.ok()) return done.status();
      if (*done) return absl::OkStatus();
    }
  }
  std::vector<std::unique_ptr<Backend>> backends_;
  std::vector<std::unique_ptr<Slab>> slabs_;
};

TEST_F(TwoDevices, EqualBlocksGiveEqualBitsSideBySide) {
  EXPECT_NE(backends_[0]->name(), backends_[1]->name());
  std::vector<float> first[2];
  for (size_t d = 0; d < 2; d++) ASSERT_TRUE(FillIpcBlocks(*backends_[d], slabs_[d]->data()).ok());
  std::vector<std::thread> threads;
  bool same[2] = {true, true};
  for (size_t d = 0; d < 2; d++) {
    threads.emplace_back([&, d] {
      first[d] = AttendIpcBlocks(*backends_[d], slabs_[d]->data());
      for (int i = 0; i < 200; i++)
        same[d] = same[d] && AttendIpcBlocks(*backends_[d], slabs_[d]->data()) == first[d];
    });
  }
  for (std::thread& thread : threads) thread.join();
  ASSERT_FALSE(first[0].empty());
  EXPECT_EQ(first[0], first[1]);
  EXPECT_TRUE(same[0] && same[1]);
}

// As blocks of sequences on both devices lie in one host tier.
TEST_F(TwoDevices, OnePinnedSlabServesBoth) {
  const size_t bytes = slabs_[0]->bytes();
  std::vector<std::byte> host(2 * bytes);
  const auto pinned = PinnedRange::Make(host.data(), host.size());
  ASSERT_TRUE(pinned.ok()) << pinned.status();
  ASSERT_TRUE(FillIpcBlocks(*backends_[0], slabs_[0]->data()).ok());
  const std::vector<float> expected = AttendIpcBlocks(*backends_[0], slabs_[0]->data());
  ASSERT_TRUE(Copy(0, host.data(), slabs_[0]->data(), bytes, CopyDirection::kToHost).ok());
  ASSERT_TRUE(Copy(1, slabs_[1]->data(), host.data(), bytes, CopyDirection::kFromHost).ok());
  EXPECT_EQ(AttendIpcBlocks(*backends_[1], slabs_[1]->data()), expected);
  ASSERT_TRUE(Copy(1, host.data() + bytes, slabs_[1]->data(), bytes, CopyDirection::kToHost).ok());
  EXPECT_EQ(std::memcmp(host.data(), host.data() + bytes, bytes), 0);
}

}  // namespace
}  // namespace kvtide::testing
