// A recording of what was asked of cached blocks (daemon/cache/call/trace_sink.h) as a file: a header and
// records, all numbers little-endian. What a record holds is named by hashes whose key is nowhere: equal keys
// have equal hashes within one file, and nothing leads back to tokens, keys or tenants.
//
//   header, 32 bytes: "KVTRACE\n", u32 version (1), u32 size of the header (32), i64 start (Unix
//   nanoseconds),
//                     u64 0
//   record:           u32 size of the body, u32 lower half of XXH3 of the body with that size as its seed,
//   body body:             i64 nanoseconds since the start, u8 verb, 3 bytes 0, u32 tokens of a block,
//                     u64 hash of the namespace, u64 bytes of a block, u64 count, u64 hashes of the keys
//
// Verbs are those of TraceVerb, and 255: `count` events before this one are missing, because they came faster
// than they could be written. The count of a lookup says how many of its keys, from the first one on, were
// there; that of the others is 0.
#pragma once

#include <cstdint>
#include <fstream>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/cache/call/trace_sink.h"

namespace kvtide {

constexpr size_t kTraceHeaderBytes = 32;
constexpr uint8_t kTraceGap = 255;
// Of one record; a longer call is recorded in parts.
constexpr size_t kMostTraceKeys = size_t{1} << 16;

struct RecordedEvent {
  int64_t nanos = 0;  // since the start of the recording
  uint8_t verb = 0;   // of TraceVerb, or kTraceGap
  uint32_t block_tokens = 0;
  uint64_t name_space = 0;
  uint64_t block_bytes = 0;
  uint64_t count = 0;
  std::vector<uint64_t> keys;

  bool Is(TraceVerb of) const { return verb == static_cast<uint8_t>(of); }
  bool operator==(const RecordedEvent&) const = default;
};

std::string EncodeTraceHeader(absl::Time start);
// Appends the record to `bytes`.
void EncodeTraceEvent(const RecordedEvent& event, std::string* bytes);
// What it takes in the file.
size_t TraceEventBytes(size_t keys);
// Whether the file's first bytes are those of a recording, of any version.
bool IsTrace(const std::string& path);

// Reads a recording from its beginning.
class TraceReader {
 public:
  // NotFound, FailedPrecondition (no recording, or of another version).
  static absl::StatusOr<std::unique_ptr<TraceReader>> Open(const std::string& path);

  // False at the end. DataLoss, with the place, for a record that is not as it was written: what came before
  // it is right.
  absl::StatusOr<bool> Next(RecordedEvent* event);
  absl::Time start() const { return start_; }
  // The file ends inside a record, as that of a daemon that was killed does; known at the end.
  bool cut_off() const { return cut_off_; }

 private:
  TraceReader(std::string path, std::ifstream file, absl::Time start);

  const std::string path_;
  std::ifstream file_;
  const absl::Time start_;
  uint64_t at_ = kTraceHeaderBytes;
  bool cut_off_ = false;
  std::string body_;
};

}  // namespace kvtide
