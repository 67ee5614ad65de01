#include "daemon/disk/journal.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

constexpr uint64_t kMagic = 0x3178646e'69746b76;  // "vktindx1"
constexpr uint64_t kLargestRecord = uint64_t{1} << 26;
constexpr uint64_t kSlack = uint64_t{1} << 20;  // out of date bytes that a file may have in any case

// Before each record's changes: `bytes` of them, and a checksum of them and of this.
struct RecordHeader {
  uint64_t magic = kMagic;
  uint64_t serial = 0;
  uint64_t bytes = 0;
  uint64_t checksum = 0;
};
struct ChangeHeader {
  uint64_t key = 0;
  uint64_t bytes = 0;  // kErase: none
};
constexpr uint64_t kErase = ~uint64_t{0};

// Before the changes of a record that are encrypted; its header counts it with them.
struct EncryptedHeader {
  Salt salt{};
  Tag tag{};
};
// What encrypted changes are bound to.
struct Bound {
  uint64_t magic = kMagic;
  uint64_t file = 0;  // its number
  uint64_t serial = 0;
};
constexpr char kPurpose[] = "kvtide disk index";

template <class T>
void Put(std::string& text, const T& value) {
  text.append(reinterpret_cast<const char*>(&value), sizeof value);
}

uint64_t ChecksumOf(RecordHeader header, const char* changes) {
  header.checksum = 0;
  return XXH3_64bits_withSeed(changes, header.bytes, XXH3_64bits(&header, sizeof header));
}

std::span<std::byte> MutableBytes(std::string& text) {
  return std::as_writable_bytes(std::span(text.data(), text.size()));
}

std::string EncryptChanges(const SecretKey& key, uint64_t file, uint64_t serial, std::string changes) {
  const Bound bound{kMagic, file, serial};
  EncryptedHeader header;
  header.salt = NewSalt();
  header.tag =
      Encrypt(key, kPurpose, header.salt, std::as_bytes(std::span(&bound, 1)), MutableBytes(changes));
  std::string text;
  Put(text, header);
  return text + changes;
}

absl::StatusOr<std::string> DecryptChanges(const SecretKey& key, uint64_t file, uint64_t serial,
                                           std::string_view text) {
  const Bound bound{kMagic, file, serial};
  EncryptedHeader header;
  if (text.size() < sizeof header) return absl::DataLossError("a record is not encrypted");
  std::memcpy(&header, text.data(), sizeof header);
  std::string changes(text.substr(sizeof header));
  if (!Decrypt(key, kPurpose, header.salt, std::as_bytes(std::span(&bound, 1)), header.tag,
               MutableBytes(changes)))
    return absl::DataLossError("an encrypted record is not the one that was written there");
  return changes;
}

// `file` is the number of the one that it is for.
std::string EncodeRecord(const SecretKey* key, uint64_t file, uint64_t serial,
                         const std::vector<Journal::Change>& changes) {
  std::string body;
  for (const Journal::Change& change : changes) {
    Put(body, ChangeHeader{change.key, change.value.has_value() ? change.value->size() : kErase});
    if (change.value.has_value()) body += *change.value;
  }
  if (key != nullptr) body = EncryptChanges(*key, file, serial, std::move(body));
  RecordHeader header;
  header.serial = serial;
  header.bytes = body.size();
  header.checksum = ChecksumOf(header, body.data());
  std::string text;
  Put(text, header);
  return text + body;
}

// The record that begins at `at`, if it is whole.
std::optional<RecordHeader> FindRecord(const std::string& text, size_t at) {
  RecordHeader header;
  if (text.size() - at < sizeof header) return std::nullopt;
  std::memcpy(&header, text.data() + at, sizeof header);
  if (header.magic != kMagic || header.bytes > kLargestRecord ||
      header.bytes > text.size() - at - sizeof header ||
      header.checksum != ChecksumOf(header, text.data() + at + sizeof header))
    return std::nullopt;
  return header;
}

absl::StatusOr<std::vector<Journal::Change>> DecodeChanges(const char* from, uint64_t bytes) {
  std::vector<Journal::Change> changes;
  while (bytes > 0) {
    ChangeHeader header;
    if (bytes < sizeof header) return absl::DataLossError("a change is cut off");
    std::memcpy(&header, from, sizeof header);
    from += sizeof header;
    bytes -= sizeof header;
    Journal::Change& change = changes.emplace_back();
    change.key = header.key;
    if (header.bytes == kErase) continue;
    if (header.bytes > bytes) return absl::DataLossError("a value is cut off");
    change.value.emplace(from, header.bytes);
    from += header.bytes;
    bytes -= header.bytes;
  }
  return changes;
}

std::span<const std::byte> Bytes(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

// Numbers of the journals in the folder, the newest first.
std::vector<uint64_t> Numbers(const std::vector<std::string>& names) {
  std::vector<uint64_t> numbers;
  for (const std::string& name : names) {
    uint64_t number = 0;
    if (absl::StartsWith(name, "index-") && absl::SimpleAtoi(name.substr(6), &number))
      numbers.push_back(number);
  }
  std::sort(numbers.rbegin(), numbers.rend());
  return numbers;
}

}  // namespace

std::string Journal::Path(uint64_t number) const { return absl::StrCat(folder_, "/index-", number); }

absl::StatusOr<std::unique_ptr<Journal>> Journal::Open(FileSystem& files, std::string folder,
                                                       const SecretKey* key) {
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<std::string> names, files.List(folder));
  const std::vector<uint64_t> numbers = Numbers(names);
  if (numbers.empty()) return absl::NotFoundError(absl::StrCat("no index in ", folder));
  auto journal = std::unique_ptr<Journal>(new Journal(files, std::move(folder), key));
  journal->number_ = numbers.front();
  const std::string path = journal->Path(journal->number_);
  KVTIDE_ASSIGN_OR_RETURN(journal->file_, files.Open(path, false, false));
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t size, journal->file_->Size());
  std::string text(size, '\0');
  KVTIDE_RETURN_IF_ERROR(Annotate(ReadAll(*journal->file_, 0, MutableBytes(text)), path));
  size_t at = 0;
  while (const std::optional<RecordHeader> header = FindRecord(text, at)) {
    if (at > 0 && header->serial != journal->serial_ + 1)
      return absl::DataLossError(absl::StrCat(path, ": a record is missing at ", at));
    std::string body = text.substr(at + sizeof(RecordHeader), header->bytes);
    if (key != nullptr) {
      absl::StatusOr<std::string> opened = DecryptChanges(*key, journal->number_, header->serial, body);
      if (!opened.ok()) return Annotate(opened.status(), path);
      body = *std::move(opened);
    }
    KVTIDE_ASSIGN_OR_RETURN(const std::vector<Change> changes, DecodeChanges(body.data(), body.size()));
    journal->Apply(changes);
    journal->serial_ = header->serial;
    at += sizeof(RecordHeader) + header->bytes;
  }
  // The first record is the checkpoint: it was synced before the file got its name.
  if (at == 0) return absl::DataLossError(absl::StrCat(path, " has no checkpoint"));
  for (size_t later = at; later < text.size(); later++) {
    uint64_t magic = 0;
    if (text.size() - later < sizeof magic) break;
    std::memcpy(&magic, text.data() + later, sizeof magic);
    if (magic == kMagic && FindRecord(text, later).has_value())
      return absl::DataLossError(absl::StrCat(path, " is damaged at ", at));
  }
  journal->end_ = at;
  // What is cut off at the end was never acknowledged. It must not stand before later records.
  if (at < text.size()) {
    KVTIDE_RETURN_IF_ERROR(journal->file_->Truncate(at));
    KVTIDE_RETURN_IF_ERROR(journal->file_->Sync());
  }
  for (size_t i = 1; i < numbers.size(); i++) KVTIDE_RETURN_IF_ERROR(files.Remove(journal->Path(numbers[i])));
  return journal;
}

absl::StatusOr<std::unique_ptr<Journal>> Journal::Create(FileSystem& files, std::string folder,
                                                         Entries entries, const SecretKey* key) {
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<std::string> names, files.List(folder));
  const std::vector<uint64_t> numbers = Numbers(names);
  auto journal = std::unique_ptr<Journal>(new Journal(files, std::move(folder), key));
  journal->number_ = numbers.empty() ? 0 : numbers.front();
  for (auto& [name, value] : entries) journal->Apply({{name, std::move(value)}});
  KVTIDE_RETURN_IF_ERROR(journal->Checkpoint());
  for (const uint64_t number : numbers) KVTIDE_RETURN_IF_ERROR(files.Remove(journal->Path(number)));
  return journal;
}

void Journal::Apply(const std::vector<Change>& changes) {
  for (const Change& change : changes) {
    if (const auto old = entries_.find(change.key); old != entries_.end()) {
      live_bytes_ -= sizeof(ChangeHeader) + old->second.size();
      entries_.erase(old);
    }
    if (!change.value.has_value()) continue;
    live_bytes_ += sizeof(ChangeHeader) + change.value->size();
    entries_.emplace(change.key, *change.value);
  }
}

absl::Status Journal::Checkpoint() {
  std::vector<Change> all;
  for (const auto& [key, value] : entries_) all.push_back({key, value});
  const std::string record = EncodeRecord(key_, number_ + 1, serial_ + 1, all);
  if (record.size() - sizeof(RecordHeader) > kLargestRecord)
    return absl::ResourceExhaustedError(absl::StrCat(
        "the index has ", record.size(), " bytes of entries, at most ", kLargestRecord, " are possible"));
  const std::string path = Path(number_ + 1), unfinished = path + ".tmp";
  KVTIDE_RETURN_IF_ERROR(files_.Remove(unfinished));
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<File> file, files_.Open(unfinished, true, false));
  KVTIDE_RETURN_IF_ERROR(WriteAll(*file, 0, Bytes(record)));
  KVTIDE_RETURN_IF_ERROR(file->Sync());
  KVTIDE_RETURN_IF_ERROR(files_.Rename(unfinished, path));
  KVTIDE_RETURN_IF_ERROR(files_.SyncFolder(folder_));
  const uint64_t former = number_++;
  const bool had_file = file_ != nullptr;
  file_ = std::move(file);
  end_ = record.size();
  serial_++;
  broken_ = false;
  // A leftover is removed by the next start.
  if (had_file) files_.Remove(Path(former)).IgnoreError();
  return absl::OkStatus();
}

absl::Status Journal::Append(const std::vector<Change>& changes) {
  const std::string record = EncodeRecord(key_, number_, serial_ + 1, changes);
  if (record.size() - sizeof(RecordHeader) > kLargestRecord)
    return absl::InvalidArgumentError("the change is too large for the index");
  if (broken_ || end_ + record.size() > 2 * live_bytes_ + kSlack) {
    broken_ = true;  // until it has succeeded: the next file may be there already, and count
    KVTIDE_RETURN_IF_ERROR(Checkpoint());
  }
  // The file and the serial may be other ones now.
  const std::string bytes = EncodeRecord(key_, number_, serial_ + 1, changes);
  absl::Status status = WriteAll(*file_, end_, Bytes(bytes));
  if (status.ok()) status = file_->Sync();
  if (!status.ok()) {
    broken_ = true;
    return status;
  }
  end_ += bytes.size();
  serial_++;
  Apply(changes);
  return absl::OkStatus();
}

}  // namespace kvtide
