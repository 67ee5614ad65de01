// Records what is asked of cached blocks into a file (trace_file.h), beside the calls: an event costs a copy
// of its keys into a bounded queue, a thread hashes and writes. When events come faster than they are
// written, some are left out, and the file says so; when the file has its size, the recording ends.
//
// Keys and namespaces are hashed by AES-128 under a random key of this recording, which nobody keeps (a block
// of AES is a key of 128 bits; half of the result stands in the file). Tenants and token ids are nowhere.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "daemon/cache/call/trace_sink.h"
#include "daemon/trace/trace_file.h"
#include "kernels/base/mutex.h"

namespace kvtide {

constexpr uint64_t kLeastTraceBytes = uint64_t{1} << 16;

struct TraceRecorderStats {
  uint64_t events = 0;    // records in the file
  uint64_t left_out = 0;  // came faster than they could be written
  uint64_t bytes = 0;     // of the file
  bool full = false;      // it has the size that it may have: the recording is over
  std::string problem;    // a write failed: the recording is over
};

class TraceRecorder : public TraceSink {
 public:
  // Makes the file, for its owner only, of at most `most_bytes`. A recording of that name from before becomes
  // FILE.old. FailedPrecondition if something else has that name; errors of the file.
  static absl::StatusOr<std::unique_ptr<TraceRecorder>> Open(const std::string& path, uint64_t most_bytes,
                                                             absl::Time start);
  // Writes what is queued.
  ~TraceRecorder() override;

  void Record(const TraceEvent& event) override;
  // Everything that was recorded before is in the file (or left out) when this returns.
  void Flush();
  TraceRecorderStats Stats() const;

 private:
  class Hasher;
  // An event and where its keys lie in the queue.
  struct Queued {
    TraceEvent event;
    size_t begin = 0;
  };
  struct Queue {
    std::vector<Queued> events;
    std::vector<BlockKey> keys;
    uint64_t left_out = 0;  // behind the last one
  };

  TraceRecorder(int file, uint64_t most_bytes, absl::Time start, std::unique_ptr<Hasher> hasher);
  void Run();
  void Write(const Queue& queue);
  // False: the file has its size.
  bool Add(const RecordedEvent& event, std::string* bytes);

  const int file_;
  const uint64_t most_bytes_;
  const absl::Time start_;
  const std::unique_ptr<Hasher> hasher_;
  std::atomic<bool> over_ = false;
  uint64_t ends_at_ = kTraceHeaderBytes;  // of the thread
  mutable Mutex mu_;
  CondVar changed_;
  Queue queue_ ABSL_GUARDED_BY(mu_);
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool hurry_ ABSL_GUARDED_BY(mu_) = false;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  TraceRecorderStats stats_ ABSL_GUARDED_BY(mu_);
  std::thread thread_;
};

}  // namespace kvtide
