#include "daemon/ring/ring.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace kvtide::ring {
namespace {

// Places of messages are multiples of it.
constexpr size_t kStep = 64;

// How long a reader looks before it offers its processor to others between two looks.
constexpr std::chrono::microseconds kAlone{10};

// Futexes of memory that processes share.
void FutexWait(std::atomic<uint32_t>* word, uint32_t value, absl::Duration time) {
  const timespec timeout = absl::ToTimespec(time);
  ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, value, &timeout, nullptr, 0);
}
void FutexWake(std::atomic<uint32_t>* word) {
  ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

absl::StatusOr<std::byte*> RingWriter::Reserve(size_t bytes) {
  if (bytes > area_bytes_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("a message of ", bytes, " bytes; the ring holds ", area_bytes_));
  }
  const uint32_t waiting = written_ - head_->read.load(std::memory_order_acquire);
  if (waiting > kEntries)
    return absl::InternalError("the other end of the ring has read what was not written");
  if (waiting == 0) next_ = 0;  // the same lines of the cache again
  if (waiting == kEntries || bytes > area_bytes_ - next_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no room in the ring: ", waiting, " messages wait to be read"));
  }
  reserved_offset_ = next_;
  reserved_bytes_ = bytes;
  return area_ + next_;
}

void RingWriter::Publish(uint64_t id, absl::Duration timeout) {
  next_ = std::min(area_bytes_, (reserved_offset_ + reserved_bytes_ + kStep - 1) / kStep * kStep);
  RingHead::Entry& entry = head_->entries[written_ % kEntries];
  entry.id = id;
  entry.timeout_ns =
      timeout == absl::InfiniteDuration() ? 0 : std::max<int64_t>(1, absl::ToInt64Nanoseconds(timeout));
  entry.offset = static_cast<uint32_t>(reserved_offset_);
  entry.bytes = static_cast<uint32_t>(reserved_bytes_);
  // Either the reader sees the count before it sleeps, or this sees that it is about to.
  head_->written.store(++written_, std::memory_order_seq_cst);
  if (head_->sleeping.load(std::memory_order_seq_cst) != 0) FutexWake(&head_->written);
}

absl::StatusOr<bool> RingReader::Read(RingMessage* message) {
  const uint32_t waiting = head_->written.load(std::memory_order_acquire) - read_;
  if (waiting == 0) return false;
  if (waiting > kEntries) {
    return absl::InternalError(
        absl::StrCat("the ring says that ", waiting, " messages wait, it holds ", kEntries));
  }
  // The writer may change it meanwhile: what is checked is the copy.
  RingHead::Entry entry;
  std::memcpy(&entry, &head_->entries[read_ % kEntries], sizeof(entry));
  if (entry.offset > area_bytes_ || entry.bytes > area_bytes_ - entry.offset) {
    return absl::InternalError(absl::StrCat("a message of ", entry.bytes, " bytes at ", entry.offset,
                                            " is not inside the ring of ", area_bytes_));
  }
  message->id = entry.id;
  message->timeout = entry.timeout_ns > 0 ? absl::Nanoseconds(entry.timeout_ns) : absl::InfiniteDuration();
  message->bytes.assign(reinterpret_cast<const char*>(area_) + entry.offset, entry.bytes);
  head_->read.store(++read_, std::memory_order_release);
  return true;
}

void RingReader::Wait(absl::Duration poll, absl::Duration sleep) {
  using Clock = std::chrono::steady_clock;
  if (!empty()) return;
  if (poll > absl::ZeroDuration()) {
    const auto start = Clock::now(), end = start + absl::ToChronoNanoseconds(poll);
    for (auto now = start; now < end; now = Clock::now()) {
      for (int i = 0; i < 64; i++) {
        if (!empty()) return;
        Pause();
      }
      // The other end may wait for this very processor: a wake-up puts it beside who woke it.
      if (now - start > kAlone) ::sched_yield();
    }
  }
  if (sleep <= absl::ZeroDuration()) return;
  head_->sleeping.store(1, std::memory_order_seq_cst);
  if (head_->written.load(std::memory_order_seq_cst) == read_) FutexWait(&head_->written, read_, sleep);
  head_->sleeping.store(0, std::memory_order_relaxed);
}

void RingReader::Wake() { FutexWake(&head_->written); }

}  // namespace kvtide::ring
