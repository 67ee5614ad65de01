// Requests under way: cut results are completed, results belong to their request (also after the queue has
// seen others), errors are named; every kind of queue gives the same answers over a real file.
#include "daemon/disk/io_queue.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <deque>
#include <numeric>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/base/check.h"

namespace kvtide {
namespace {

// Gives the results that a test says, for requests in the order in which they were submitted.
class ScriptedQueue : public IoQueue {
 public:
  struct Call {
    Op op;
    uint64_t offset;
    size_t size;
  };
  std::vector<Call> calls;
  std::deque<std::pair<int, int64_t>> script;  // index into calls (-1: an op that was never begun), result

 private:
  void Submit(Op op, const Request& request) override { calls.push_back({op, request.offset, request.size}); }
  void Reap() override {
    KVTIDE_CHECK(!script.empty(), "nothing more comes");
    const auto [call, result] = script.front();
    script.pop_front();
    Complete(call < 0 ? 999 : calls[static_cast<size_t>(call)].op, result);
  }
};

class NoFile : public File {
  absl::StatusOr<size_t> Read(uint64_t, std::span<std::byte>) override { return size_t{0}; }
  absl::StatusOr<size_t> Write(uint64_t, std::span<const std::byte>) override { return size_t{0}; }
  absl::Status Sync() override { return absl::OkStatus(); }
  absl::Status Reserve(uint64_t) override { return absl::OkStatus(); }
  absl::Status Truncate(uint64_t) override { return absl::OkStatus(); }
  absl::StatusOr<uint64_t> Size() const override { return 0; }
};

TEST(IoQueue, ShortResultsGoOnWhereTheyEnded) {
  NoFile file;
  ScriptedQueue queue;
  std::vector<std::byte> bytes(1000);
  queue.script = {{0, 300}, {1, -EINTR}, {2, 600}, {3, 100}};
  const IoQueue::Op op = queue.Read(file, 5000, bytes);
  EXPECT_TRUE(queue.Wait(op).ok());
  ASSERT_EQ(queue.calls.size(), 4u);
  EXPECT_EQ(queue.calls[1].offset, 5300u);
  EXPECT_EQ(queue.calls[1].size, 700u);
  EXPECT_EQ(queue.calls[2].offset, 5300u);
  EXPECT_EQ(queue.calls[3].offset, 5900u);
  EXPECT_EQ(queue.calls[3].size, 100u);
}

TEST(IoQueue, ResultsBelongToTheRequestThatTheyName) {
  NoFile file;
  ScriptedQueue queue;
  std::vector<std::byte> a(100), b(200);
  const IoQueue::Op first = queue.Write(file, 0, a), second = queue.Write(file, 100, b);
  // The second one first, a result of nobody, and one that comes twice.
  queue.script = {{1, 200}, {-1, 77}, {1, 200}, {0, -EIO}};
  EXPECT_EQ(queue.Wait(first).code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(queue.Wait(second).ok());
  EXPECT_EQ(queue.stale_results(), 2u);
}

TEST(IoQueue, AnEndedFileAndAFullDiskAreTold) {
  NoFile file;
  ScriptedQueue queue;
  std::vector<std::byte> bytes(100);
  queue.script = {{0, 60}, {1, 0}};
  EXPECT_EQ(queue.Wait(queue.Read(file, 0, bytes)).code(), absl::StatusCode::kOutOfRange);
  queue.script = {{2, -ENOSPC}};
  EXPECT_EQ(queue.Wait(queue.Write(file, 0, bytes)).code(), absl::StatusCode::kResourceExhausted);
  queue.script = {{3, 5000}};
  EXPECT_EQ(queue.Wait(queue.Write(file, 0, bytes)).code(), absl::StatusCode::kInternal);
}

class IoQueueKinds : public ::testing::TestWithParam<IoKind> {};

TEST_P(IoQueueKinds, WritesAndReadsManyPiecesOfARealFile) {
  if (GetParam() == IoKind::kUring && !CheckUring().ok()) GTEST_SKIP() << CheckUring().message();
  std::string path = ::testing::TempDir() + "/kvtide_io_queue_XXXXXX";
  const int fd = mkstemp(path.data());
  ASSERT_GE(fd, 0);
  close(fd);
  absl::StatusOr<std::unique_ptr<File>> file = SystemFiles().Open(path, false, false);
  ASSERT_TRUE(file.ok()) << file.status();
  IoQueues queues(GetParam(), 2);
  absl::StatusOr<std::unique_ptr<IoQueue>> queue = queues.Make(4);
  ASSERT_TRUE(queue.ok()) << queue.status();
  constexpr size_t kPieces = 40, kBytes = 10'000;  // more than the queue is deep
  std::vector<std::vector<std::byte>> out(kPieces, std::vector<std::byte>(kBytes));
  std::vector<IoQueue::Op> ops;
  for (size_t p = 0; p < kPieces; p++) {
    for (size_t i = 0; i < kBytes; i++) out[p][i] = static_cast<std::byte>(p * 31 + i * 7);
    ops.push_back((*queue)->Write(**file, p * kBytes, out[p]));
  }
  for (auto op = ops.rbegin(); op != ops.rend(); ++op) EXPECT_TRUE((*queue)->Wait(*op).ok());
  ops.clear();
  std::vector<std::vector<std::byte>> in(kPieces, std::vector<std::byte>(kBytes));
  for (size_t p = 0; p < kPieces; p++) ops.push_back((*queue)->Read(**file, p * kBytes, in[p]));
  for (const IoQueue::Op op : ops) EXPECT_TRUE((*queue)->Wait(op).ok());
  EXPECT_EQ(in, out);
  std::vector<std::byte> beyond(100);
  EXPECT_EQ((*queue)->Wait((*queue)->Read(**file, kPieces * kBytes - 10, beyond)).code(),
            absl::StatusCode::kOutOfRange);
  unlink(path.c_str());
}

// What is registered, what is beside it and what lies across its ends are written and read alike; no memory,
// and a second registration, change nothing.
TEST_P(IoQueueKinds, RegisteredMemoryIsMemoryLikeAnyOther) {
  if (GetParam() == IoKind::kUring && !CheckUring().ok()) GTEST_SKIP() << CheckUring().message();
  std::string path = ::testing::TempDir() + "/kvtide_io_queue_XXXXXX";
  close(mkstemp(path.data()));
  std::unique_ptr<File> file = SystemFiles().Open(path, false, false).value();
  IoQueues queues(GetParam(), 2);
  constexpr size_t kBytes = 64 << 10, kPiece = 10'000;
  std::vector<std::byte> memory(2 * kBytes);  // that is written, that is read into
  const std::span<std::byte> out = std::span(memory).first(kBytes), in = std::span(memory).last(kBytes);
  for (size_t i = 0; i < kBytes; i++) out[i] = static_cast<std::byte>(i * 7 + i / 251);
  std::unique_ptr<IoQueue> queue = queues.Make(4).value();
  queue->Register({});
  queue->Register(std::span(memory).subspan(5000, 2 * kBytes - 10'000));
  queue->Register(memory);
  for (const bool write : {true, false}) {
    std::vector<IoQueue::Op> ops;
    for (size_t at = 0; at < kBytes; at += kPiece) {
      const std::span<std::byte> piece = (write ? out : in).subspan(at, std::min(kPiece, kBytes - at));
      ops.push_back(write ? queue->Write(*file, at, piece) : queue->Read(*file, at, piece));
    }
    for (const IoQueue::Op op : ops) EXPECT_TRUE(queue->Wait(op).ok());
  }
  EXPECT_TRUE(std::equal(in.begin(), in.end(), out.begin()));
  unlink(path.c_str());
}

// A queue that goes while requests run waits for them: the kernel must not write into memory that is freed.
TEST_P(IoQueueKinds, AQueueThatGoesWaitsForItsRequests) {
  if (GetParam() == IoKind::kUring && !CheckUring().ok()) GTEST_SKIP() << CheckUring().message();
  std::string path = ::testing::TempDir() + "/kvtide_io_queue_XXXXXX";
  close(mkstemp(path.data()));
  std::unique_ptr<File> file = SystemFiles().Open(path, false, false).value();
  IoQueues queues(GetParam(), 2);
  std::vector<std::byte> bytes(1 << 20, std::byte{7});
  {
    std::unique_ptr<IoQueue> queue = queues.Make(4).value();
    queue->Write(*file, 0, bytes);
  }
  EXPECT_EQ(file->Size().value(), bytes.size());
  unlink(path.c_str());
}

INSTANTIATE_TEST_SUITE_P(Kinds, IoQueueKinds,
                         ::testing::Values(IoKind::kUring, IoKind::kThreads, IoKind::kInline),
                         [](const auto& test) {
                           return test.param == IoKind::kUring     ? "IoUring"
                                  : test.param == IoKind::kThreads ? "Threads"
                                                                   : "Inline";
                         });

}  // namespace
}  // namespace kvtide
