#include "daemon/trace/trace_recorder.h"

#include <fcntl.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/random_bytes.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

// What waits to be written, at most: 8 MiB of keys.
constexpr size_t kMostQueuedKeys = size_t{1} << 19, kMostQueuedEvents = size_t{1} << 15;
constexpr std::chrono::milliseconds kWriteEvery(100);

absl::Status FileError(const std::string& path, const char* what) {
  return absl::UnavailableError(absl::StrCat("record_trace ", path, ": ", what, ": ", std::strerror(errno)));
}

// Empty: all of it was written.
std::string WriteAll(int file, const std::string& bytes) {
  for (size_t at = 0; at < bytes.size();) {
    const ssize_t count = write(file, bytes.data() + at, bytes.size() - at);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return std::strerror(errno);
    at += static_cast<size_t>(count);
  }
  return "";
}

}  // namespace

// AES-128 under a key of its own.
class TraceRecorder::Hasher {
 public:
  static absl::StatusOr<std::unique_ptr<Hasher>> Make() {
    std::unique_ptr<Hasher> hasher(new Hasher());
    unsigned char key[16];
    FillRandom(std::as_writable_bytes(std::span(key)));
    const bool ready = hasher->cipher_ != nullptr &&
                       EVP_EncryptInit_ex(hasher->cipher_, EVP_aes_128_ecb(), nullptr, key, nullptr) == 1 &&
                       EVP_CIPHER_CTX_set_padding(hasher->cipher_, 0) == 1;
    OPENSSL_cleanse(key, sizeof key);
    if (!ready) return absl::UnavailableError("record_trace: the system's OpenSSL gives no AES-128");
    return hasher;
  }
  ~Hasher() { EVP_CIPHER_CTX_free(cipher_); }
  Hasher(const Hasher&) = delete;
  Hasher& operator=(const Hasher&) = delete;

  void Hash(std::span<const BlockKey> keys, std::vector<uint64_t>* hashes) {
    static_assert(sizeof(BlockKey) == 16);
    hashes->clear();
    if (keys.empty()) return;
    out_.resize(keys.size_bytes());
    int length = 0;
    const int done =
        EVP_EncryptUpdate(cipher_, out_.data(), &length, reinterpret_cast<const unsigned char*>(keys.data()),
                          static_cast<int>(keys.size_bytes()));
    KVTIDE_CHECK(done == 1 && length == static_cast<int>(keys.size_bytes()));
    for (size_t i = 0; i < keys.size(); i++) {
      uint64_t hash = 0;
      std::memcpy(&hash, out_.data() + 16 * i, sizeof hash);
      hashes->push_back(hash);
    }
  }
  uint64_t Hash(uint64_t name_space) {
    const BlockKey key{name_space, ~uint64_t{0}};
    std::vector<uint64_t> hash;
    Hash({&key, 1}, &hash);
    return hash.front();
  }

 private:
  Hasher() : cipher_(EVP_CIPHER_CTX_new()) {}
  EVP_CIPHER_CTX* const cipher_;
  std::vector<unsigned char> out_;
};

absl::StatusOr<std::unique_ptr<TraceRecorder>> TraceRecorder::Open(const std::string& path,
                                                                   uint64_t most_bytes, absl::Time start) {
  if (most_bytes < kLeastTraceBytes)
    return absl::InvalidArgumentError(absl::StrCat("record_trace ", path, " may have ", most_bytes,
                                                   " bytes; the least is ", kLeastTraceBytes));
  if (struct stat there{}; lstat(path.c_str(), &there) == 0) {
    if (!S_ISREG(there.st_mode) || !IsTrace(path))
      return absl::FailedPreconditionError(absl::StrCat(
          "record_trace ", path, " is there already and is no recording; name another file, or remove it"));
    if (std::rename(path.c_str(), absl::StrCat(path, ".old").c_str()) != 0)
      return FileError(path, "the recording from before cannot be renamed");
  }
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<Hasher> hasher, Hasher::Make());
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (file < 0) return FileError(path, "cannot be made");
  if (const std::string problem = WriteAll(file, EncodeTraceHeader(start)); !problem.empty()) {
    close(file);
    return absl::UnavailableError(absl::StrCat("record_trace ", path, ": cannot be written: ", problem));
  }
  return std::unique_ptr<TraceRecorder>(new TraceRecorder(file, most_bytes, start, std::move(hasher)));
}

TraceRecorder::TraceRecorder(int file, uint64_t most_bytes, absl::Time start, std::unique_ptr<Hasher> hasher)
    : file_(file), most_bytes_(most_bytes), start_(start), hasher_(std::move(hasher)) {
  stats_.bytes = kTraceHeaderBytes;
  thread_ = std::thread([this] { Run(); });
}

TraceRecorder::~TraceRecorder() {
  {
    const MutexLock lock(mu_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
  close(file_);
}

void TraceRecorder::Record(const TraceEvent& event) {
  if (over_.load(std::memory_order_relaxed)) return;
  const MutexLock lock(mu_);
  if (queue_.events.size() >= kMostQueuedEvents || event.keys.size() > kMostQueuedKeys - queue_.keys.size()) {
    queue_.left_out++;
    return;
  }
  queue_.events.push_back({event, queue_.keys.size()});
  queue_.keys.insert(queue_.keys.end(), event.keys.begin(), event.keys.end());
  const bool half = 2 * queue_.keys.size() > kMostQueuedKeys || 2 * queue_.events.size() > kMostQueuedEvents;
  if (!half || hurry_) return;
  hurry_ = true;
  changed_.NotifyAll();
}

void TraceRecorder::Flush() {
  const MutexLock lock(mu_);
  hurry_ = true;
  changed_.NotifyAll();
  while (writing_ || !queue_.events.empty() || queue_.left_out > 0) changed_.Wait(mu_);
}

TraceRecorderStats TraceRecorder::Stats() const {
  const MutexLock lock(mu_);
  TraceRecorderStats stats = stats_;
  stats.left_out += queue_.left_out;
  return stats;
}

void TraceRecorder::Run() {
  Queue queue;
  while (true) {
    bool last = false;
    {
      const MutexLock lock(mu_);
      if (!stopping_ && !hurry_) changed_.WaitFor(mu_, kWriteEvery);
      hurry_ = false;
      last = stopping_;
      queue.events.clear();
      queue.keys.clear();
      queue.left_out = 0;
      std::swap(queue, queue_);
      writing_ = true;
    }
    Write(queue);
    const MutexLock lock(mu_);
    writing_ = false;
    changed_.NotifyAll();
    if (last) return;
  }
}

bool TraceRecorder::Add(const RecordedEvent& event, std::string* bytes) {
  if (over_.load(std::memory_order_relaxed)) return false;
  if (ends_at_ + bytes->size() + TraceEventBytes(event.keys.size()) > most_bytes_) {
    over_.store(true, std::memory_order_relaxed);
    const MutexLock lock(mu_);
    stats_.full = true;
    return false;
  }
  EncodeTraceEvent(event, bytes);
  return true;
}

void TraceRecorder::Write(const Queue& queue) {
  constexpr size_t kPiece = size_t{1} << 20;
  std::string bytes;
  uint64_t events = 0;
  const auto flush = [&] {
    if (bytes.empty()) return;
    const std::string problem = WriteAll(file_, bytes);
    const MutexLock lock(mu_);
    if (!problem.empty()) {
      over_.store(true, std::memory_order_relaxed);
      stats_.problem = problem;
    } else {
      ends_at_ += bytes.size();
      stats_.events += events;
      stats_.bytes = ends_at_;
    }
    bytes.clear();
    events = 0;
  };
  RecordedEvent record;
  for (const Queued& queued : queue.events) {
    const std::span<const BlockKey> keys =
        std::span(queue.keys).subspan(queued.begin, queued.event.keys.size());
    record.nanos = absl::ToInt64Nanoseconds(queued.event.time - start_);
    record.verb = static_cast<uint8_t>(queued.event.verb);
    record.block_tokens = queued.event.block_tokens;
    record.name_space = hasher_->Hash(queued.event.name_space);
    record.block_bytes = queued.event.block_bytes;
    uint64_t there = queued.event.there;
    for (size_t at = 0; at == 0 || at < keys.size(); at += kMostTraceKeys) {
      const std::span<const BlockKey> part = keys.subspan(at, std::min(kMostTraceKeys, keys.size() - at));
      hasher_->Hash(part, &record.keys);
      record.count = std::min<uint64_t>(there, part.size());
      there -= record.count;
      events += Add(record, &bytes) ? 1 : 0;
    }
    if (bytes.size() >= kPiece) flush();
  }
  if (queue.left_out > 0) {
    RecordedEvent gap;
    gap.nanos = record.nanos;
    gap.verb = kTraceGap;
    gap.count = queue.left_out;
    Add(gap, &bytes);
    const MutexLock lock(mu_);
    stats_.left_out += queue.left_out;
  }
  flush();
}

}  // namespace kvtide
