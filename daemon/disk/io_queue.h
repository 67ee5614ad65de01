// Reads and writes that are under way, several at a time: what one thread has started and not yet waited for.
// A request is done when all of its bytes are, however the system cuts them; results belong to the request
// that they name and to no other. Used by one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/disk/file.h"

namespace kvtide {

class IoQueue {
 public:
  using Op = uint64_t;  // never 0, never used again

  virtual ~IoQueue() = default;
  // Memory that many requests will use, and that outlives the queue. Where the system can, it looks at its
  // pages once, here, and not again for every request.
  virtual void Register(std::span<std::byte> /*memory*/) {}
  // The file and the bytes are the caller's until Wait has returned.
  Op Read(File& file, uint64_t offset, std::span<std::byte> bytes);
  Op Write(File& file, uint64_t offset, std::span<const std::byte> bytes);
  // Once for each op. OutOfRange when the file ends before the request does.
  absl::Status Wait(Op op);
  // Results that named no request under way.
  uint64_t stale_results() const { return stale_results_; }

 protected:
  struct Request {
    File* file = nullptr;
    uint64_t offset = 0;
    std::byte* bytes = nullptr;
    size_t size = 0;
    bool write = false;
    bool done = false;
    absl::Status status;
  };

  // Starts (the rest of) a request; its result comes by Complete, perhaps before this returns.
  virtual void Submit(Op op, const Request& request) = 0;
  // Waits for at least one result.
  virtual void Reap() = 0;
  // Bytes read or written, or -errno.
  void Complete(Op op, int64_t result);
  void CompleteCall(Op op, const absl::StatusOr<size_t>& result);

 private:
  Op Start(Request request);

  absl::flat_hash_map<Op, Request> requests_;
  Op last_op_ = 0;
  uint64_t stale_results_ = 0;
};

// Threads that read and write for queues where io_uring is not allowed.
class IoThreads;
enum class IoKind : uint8_t {
  kUring,
  kThreads,  // pread and pwrite on threads
  kInline,   // on the calling thread, at once: the same in every run
};

// OK if this process may use io_uring; else why not (containers often forbid it).
absl::Status CheckUring();

// Makes queues of one kind.
class IoQueues {
 public:
  IoQueues(IoKind kind, int threads);
  ~IoQueues();
  // `depth`: the most requests under way.
  absl::StatusOr<std::unique_ptr<IoQueue>> Make(unsigned depth);
  IoKind kind() const { return kind_; }

 private:
  const IoKind kind_;
  std::unique_ptr<IoThreads> threads_;
};

}  // namespace kvtide
