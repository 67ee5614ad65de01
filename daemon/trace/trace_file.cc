#include "daemon/trace/trace_file.h"

#include <xxhash.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/cache/persist/manifest_bytes.h"

namespace kvtide {
namespace {

constexpr char kMagic[] = "KVTRACE\n";
constexpr size_t kMagicBytes = 8;
constexpr uint32_t kVersion = 1;
constexpr size_t kBodyBytes = 40, kFrameBytes = 8;  // of a record: without keys; in front of the body

uint32_t Checksum(const std::string& body) {
  return static_cast<uint32_t>(XXH3_64bits_withSeed(body.data(), body.size(), body.size()));
}

}  // namespace

std::string EncodeTraceHeader(absl::Time start) {
  ManifestWriter writer;
  writer.Put(kVersion);
  writer.Put(static_cast<uint32_t>(kTraceHeaderBytes));
  writer.Put(absl::ToUnixNanos(start));
  writer.Put(uint64_t{0});
  return absl::StrCat(kMagic, writer.Take());
}

size_t TraceEventBytes(size_t keys) { return kFrameBytes + kBodyBytes + keys * sizeof(uint64_t); }

void EncodeTraceEvent(const RecordedEvent& event, std::string* bytes) {
  ManifestWriter body;
  body.Put(event.nanos);
  body.Put(event.verb);
  for (int i = 0; i < 3; i++) body.Put(uint8_t{0});
  body.Put(event.block_tokens);
  body.Put(event.name_space);
  body.Put(event.block_bytes);
  body.Put(event.count);
  for (const uint64_t key : event.keys) body.Put(key);
  const std::string text = body.Take();
  ManifestWriter frame;
  frame.Put(static_cast<uint32_t>(text.size()));
  frame.Put(Checksum(text));
  absl::StrAppend(bytes, frame.Take(), text);
}

bool IsTrace(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  char magic[kMagicBytes] = {};
  return file.read(magic, kMagicBytes) && std::memcmp(magic, kMagic, kMagicBytes) == 0;
}

TraceReader::TraceReader(std::string path, std::ifstream file, absl::Time start)
    : path_(std::move(path)), file_(std::move(file)), start_(start) {}

absl::StatusOr<std::unique_ptr<TraceReader>> TraceReader::Open(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  std::string header(kTraceHeaderBytes, '\0');
  file.read(header.data(), static_cast<std::streamsize>(header.size()));
  if (file.gcount() < static_cast<std::streamsize>(header.size()) ||
      std::memcmp(header.data(), kMagic, kMagicBytes) != 0)
    return absl::FailedPreconditionError(
        absl::StrCat(path, " is no recording of kvtided (--record-trace makes them)"));
  const std::string rest = header.substr(kMagicBytes);
  ManifestReader reader(rest);
  const auto version = reader.Get<uint32_t>();
  const auto size = reader.Get<uint32_t>();
  const auto start = reader.Get<int64_t>();
  if (version != kVersion || size != kTraceHeaderBytes)
    return absl::FailedPreconditionError(absl::StrCat(path, " is a recording of version ", version,
                                                      ", this program reads version ", kVersion));
  return std::unique_ptr<TraceReader>(new TraceReader(path, std::move(file), absl::FromUnixNanos(start)));
}

absl::StatusOr<bool> TraceReader::Next(RecordedEvent* event) {
  const auto damaged = [&](const char* what) {
    return absl::DataLossError(absl::StrCat(path_, " is damaged at byte ", at_, ": ", what));
  };
  std::string frame(kFrameBytes, '\0');
  file_.read(frame.data(), static_cast<std::streamsize>(frame.size()));
  if (file_.gcount() < static_cast<std::streamsize>(frame.size())) {
    cut_off_ = file_.gcount() > 0;
    return false;
  }
  ManifestReader front(frame);
  const auto size = front.Get<uint32_t>();
  const auto checksum = front.Get<uint32_t>();
  if (size < kBodyBytes || (size - kBodyBytes) % sizeof(uint64_t) != 0 ||
      (size - kBodyBytes) / sizeof(uint64_t) > kMostTraceKeys)
    return damaged("no record has that size");
  body_.resize(size);
  file_.read(body_.data(), static_cast<std::streamsize>(size));
  if (file_.gcount() < static_cast<std::streamsize>(size)) {
    cut_off_ = true;
    return false;
  }
  if (Checksum(body_) != checksum) return damaged("the record is not what was written");
  ManifestReader body(body_);
  *event = {};
  body.Get(&event->nanos);
  body.Get(&event->verb);
  for (int i = 0; i < 3; i++) body.Get<uint8_t>();
  body.Get(&event->block_tokens);
  body.Get(&event->name_space);
  body.Get(&event->block_bytes);
  body.Get(&event->count);
  event->keys.resize((size - kBodyBytes) / sizeof(uint64_t));
  for (uint64_t& key : event->keys) body.Get(&key);
  at_ += kFrameBytes + size;
  return true;
}

}  // namespace kvtide
