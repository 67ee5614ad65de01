#include "daemon/disk/io_queue.h"

#include <liburing.h>

#include <algorithm>
#include <cerrno>
#include <deque>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/mutex.h"
#include "kernels/base/status.h"

namespace kvtide {

// Threads that take work in the order in which it comes.
class IoThreads {
 public:
  explicit IoThreads(int threads) {
    for (int t = 0; t < threads; t++) threads_.emplace_back([this] { Run(); });
  }
  ~IoThreads() {
    {
      MutexLock lock(mu_);
      stopping_ = true;
      changed_.NotifyAll();
    }
    for (std::thread& thread : threads_) thread.join();
  }
  void Do(std::function<void()> work) {
    MutexLock lock(mu_);
    work_.push_back(std::move(work));
    changed_.NotifyOne();
  }

 private:
  void Run() {
    while (true) {
      std::function<void()> work;
      {
        MutexLock lock(mu_);
        while (work_.empty() && !stopping_) changed_.Wait(mu_);
        if (work_.empty()) return;
        work = std::move(work_.front());
        work_.pop_front();
      }
      work();
    }
  }

  Mutex mu_;
  CondVar changed_;
  std::deque<std::function<void()>> work_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<std::thread> threads_;
};

IoQueue::Op IoQueue::Start(Request request) {
  const Op op = ++last_op_;
  if (request.size == 0) request.done = true;
  const bool done = request.done;
  requests_[op] = request;
  if (!done) Submit(op, request);
  return op;
}

IoQueue::Op IoQueue::Read(File& file, uint64_t offset, std::span<std::byte> bytes) {
  return Start({&file, offset, bytes.data(), bytes.size(), false});
}

IoQueue::Op IoQueue::Write(File& file, uint64_t offset, std::span<const std::byte> bytes) {
  return Start({&file, offset, const_cast<std::byte*>(bytes.data()), bytes.size(), true});
}

absl::Status IoQueue::Wait(Op op) {
  while (true) {
    const auto found = requests_.find(op);
    KVTIDE_CHECK(found != requests_.end(), "op ", op, " is not under way");
    if (found->second.done) {
      const absl::Status status = found->second.status;
      requests_.erase(found);
      return status;
    }
    Reap();
  }
}

void IoQueue::Complete(Op op, int64_t result) {
  if (result >= 0) return CompleteCall(op, static_cast<size_t>(result));
  const auto found = requests_.find(op);
  if (found == requests_.end() || found->second.done) {
    stale_results_++;
    return;
  }
  if (result == -EINTR || result == -EAGAIN) {
    const Request rest = found->second;
    return Submit(op, rest);
  }
  Request& request = found->second;
  request.status = IoError(
      static_cast<int>(-result),
      absl::StrCat(request.write ? "writing" : "reading", " ", request.size, " bytes at ", request.offset));
  request.done = true;
}

void IoQueue::CompleteCall(Op op, const absl::StatusOr<size_t>& result) {
  const auto found = requests_.find(op);
  if (found == requests_.end() || found->second.done) {
    stale_results_++;
    return;
  }
  Request& request = found->second;
  if (!result.ok()) {
    request.status = result.status();
  } else if (*result > request.size) {
    request.status =
        absl::InternalError(absl::StrCat("a request of ", request.size, " bytes came back with ", *result));
  } else if (*result == 0) {
    request.status = absl::OutOfRangeError(absl::StrCat("the file ends ", request.size, " bytes too early"));
  } else {
    request.offset += *result;
    request.bytes += *result;
    request.size -= *result;
    if (request.size > 0) {
      const Request rest = request;
      return Submit(op, rest);
    }
  }
  request.done = true;
}

namespace {

absl::StatusOr<size_t> Perform(File& file, uint64_t offset, std::byte* bytes, size_t size, bool write) {
  return write ? file.Write(offset, {bytes, size}) : file.Read(offset, {bytes, size});
}

class InlineQueue : public IoQueue {
  void Submit(Op op, const Request& request) override {
    CompleteCall(op, Perform(*request.file, request.offset, request.bytes, request.size, request.write));
  }
  void Reap() override { KVTIDE_CHECK(false, "nothing is under way"); }
};

class ThreadQueue : public IoQueue {
 public:
  explicit ThreadQueue(IoThreads& threads) : threads_(threads) {}
  ~ThreadQueue() override {
    MutexLock lock(mu_);
    while (running_ > 0) changed_.Wait(mu_);
  }

 private:
  void Submit(Op op, const Request& request) override {
    {
      MutexLock lock(mu_);
      running_++;
    }
    threads_.Do([this, op, request] {
      absl::StatusOr<size_t> result =
          Perform(*request.file, request.offset, request.bytes, request.size, request.write);
      MutexLock lock(mu_);
      running_--;
      results_.emplace_back(op, std::move(result));
      changed_.NotifyAll();
    });
  }
  void Reap() override {
    std::vector<std::pair<Op, absl::StatusOr<size_t>>> results;
    {
      MutexLock lock(mu_);
      while (results_.empty()) changed_.Wait(mu_);
      results.swap(results_);
    }
    for (const auto& [op, result] : results) CompleteCall(op, result);
  }

  IoThreads& threads_;
  Mutex mu_;
  CondVar changed_;
  int running_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<std::pair<Op, absl::StatusOr<size_t>>> results_ ABSL_GUARDED_BY(mu_);
};

class UringQueue : public IoQueue {
 public:
  static absl::StatusOr<std::unique_ptr<IoQueue>> Make(unsigned depth) {
    auto queue = std::make_unique<UringQueue>();
    const int error = io_uring_queue_init(depth, &queue->ring_, 0);
    if (error < 0) return IoError(-error, "io_uring");
    queue->ready_ = true;
    return std::unique_ptr<IoQueue>(std::move(queue));
  }
  // The kernel may still write into what was asked for.
  ~UringQueue() override {
    while (running_ > 0) Reap();
    if (ready_) io_uring_queue_exit(&ring_);
  }
  // The system may refuse (RLIMIT_MEMLOCK, memory of a device): requests name their memory themselves then.
  void Register(std::span<std::byte> memory) override {
    if (!registered_.empty() || memory.empty()) return;
    const iovec buffer{memory.data(), memory.size()};
    if (io_uring_register_buffers(&ring_, &buffer, 1) == 0) registered_ = memory;
  }

 private:
  // Where the kernel's ring has no place left, results are taken until it has.
  void Submit(Op op, const Request& request) override {
    if (request.file->descriptor() < 0)
      return CompleteCall(op,
                          Perform(*request.file, request.offset, request.bytes, request.size, request.write));
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    while (entry == nullptr) {
      Enter();
      entry = io_uring_get_sqe(&ring_);
    }
    const int file = request.file->descriptor();
    const auto size = static_cast<unsigned>(std::min<size_t>(request.size, size_t{1} << 30));
    const bool registered = IsRegistered(request);
    if (request.write && registered) {
      io_uring_prep_write_fixed(entry, file, request.bytes, size, request.offset, 0);
    } else if (request.write) {
      io_uring_prep_write(entry, file, request.bytes, size, request.offset);
    } else if (registered) {
      io_uring_prep_read_fixed(entry, file, request.bytes, size, request.offset, 0);
    } else {
      io_uring_prep_read(entry, file, request.bytes, size, request.offset);
    }
    entry->user_data = op;
    running_++;
    Enter();
  }
  bool IsRegistered(const Request& request) const {
    const std::byte* const begin = registered_.data();
    return request.bytes >= begin && request.bytes + request.size <= begin + registered_.size();
  }
  void Enter() {
    while (true) {
      const int submitted = io_uring_submit(&ring_);
      if (submitted >= 0) return;
      KVTIDE_CHECK(submitted == -EINTR || submitted == -EAGAIN || submitted == -EBUSY,
                   "io_uring_submit: ", -submitted);
      if (submitted != -EINTR) Reap();
    }
  }
  void Reap() override {
    io_uring_cqe* result = nullptr;
    int error = -EINTR;
    while (error == -EINTR) error = io_uring_wait_cqe(&ring_, &result);
    KVTIDE_CHECK(error == 0, "io_uring_wait_cqe: ", -error);
    std::vector<std::pair<Op, int64_t>> results;
    while (result != nullptr) {
      results.emplace_back(result->user_data, result->res);
      io_uring_cqe_seen(&ring_, result);
      running_--;
      if (io_uring_peek_cqe(&ring_, &result) != 0) result = nullptr;
    }
    for (const auto& [op, bytes] : results) Complete(op, bytes);
  }

  io_uring ring_{};
  bool ready_ = false;
  std::span<std::byte> registered_;
  int running_ = 0;
};

}  // namespace

absl::Status CheckUring() { return UringQueue::Make(2).status(); }

IoQueues::IoQueues(IoKind kind, int threads) : kind_(kind) {
  if (kind == IoKind::kThreads) threads_ = std::make_unique<IoThreads>(threads);
}
IoQueues::~IoQueues() = default;

absl::StatusOr<std::unique_ptr<IoQueue>> IoQueues::Make(unsigned depth) {
  switch (kind_) {
    case IoKind::kUring:
      return UringQueue::Make(depth);
    case IoKind::kThreads:
      return std::unique_ptr<IoQueue>(std::make_unique<ThreadQueue>(*threads_));
    case IoKind::kInline:
      break;
  }
  return std::unique_ptr<IoQueue>(std::make_unique<InlineQueue>());
}

}  // namespace kvtide
