#include "kernels/cpu/copy_queue.h"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

namespace kvtide {
namespace {

TEST(CopyQueue, CopiesForSeveralThreadsAtOnce) {
  CopyQueue queue(100);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; t++)
    threads.emplace_back([&queue, t] {
      for (int i = 0; i < 100; i++) {
        std::vector<std::byte> target(1000);
        const std::vector<std::byte> source(1000, static_cast<std::byte>(t * 50 + i));
        const CopyPiece piece{target.data(), source.data(), source.size()};
        const auto ticket = queue.Submit({&piece, 1});
        ASSERT_TRUE(ticket.ok()) << ticket.status();
        while (!*queue.Poll(*ticket)) std::this_thread::yield();
        ASSERT_EQ(target, source);
      }
    });
  for (std::thread& thread : threads) thread.join();
}

TEST(CopyQueue, SaysSoWhenTooManyTicketsAreOpen) {
  CopyQueue queue(2);
  const auto first = queue.Submit({});
  ASSERT_TRUE(first.ok());
  ASSERT_TRUE(queue.Submit({}).ok());
  EXPECT_EQ(queue.Submit({}).status().code(), absl::StatusCode::kResourceExhausted);
  while (!*queue.Poll(*first)) std::this_thread::yield();
  EXPECT_TRUE(queue.Submit({}).ok()) << "a ticket polled to its end makes room";
}

TEST(CopyQueue, RefusesPiecesWithoutMemoryAndUnknownTickets) {
  CopyQueue queue(2);
  std::byte byte{};
  const CopyPiece piece{nullptr, &byte, 1};
  EXPECT_EQ(queue.Submit({&piece, 1}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(queue.Poll(17).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvtide
