// A durable map from keys to small values: a file of records, each with a checksum, that only grows, and is
// written anew when most of it is out of date. What Append has acknowledged is there after a crash; what it
// has not is there whole or not at all.
//
//   index-<n>        the records of checkpoint n, then those since; the highest n counts
//   index-<n>.tmp    a checkpoint that was not finished
//
// A record that is cut off at the end of the file is one that was never acknowledged. A damaged one with good
// ones behind it means that the file is damaged: Open says DataLoss, and the caller builds it anew from what
// it finds elsewhere. Not thread-safe.
//
// With a key the changes of each record are encrypted (encryption.h), bound to the record's header and to the
// file; keys and values are not on the disk then.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/disk/encryption.h"
#include "daemon/disk/file.h"

namespace kvtide {

class Journal {
 public:
  using Entries = std::map<uint64_t, std::string>;
  // A change: a value, or none to erase.
  struct Change {
    uint64_t key = 0;
    std::optional<std::string> value;
  };

  // The newest journal of the folder; NotFound if there is none, DataLoss if it is damaged. `key`: null, or
  // what its records are encrypted with, which lives longer than the journal.
  static absl::StatusOr<std::unique_ptr<Journal>> Open(FileSystem& files, std::string folder,
                                                       const SecretKey* key = nullptr);
  // A new one with these entries, whatever is there.
  static absl::StatusOr<std::unique_ptr<Journal>> Create(FileSystem& files, std::string folder,
                                                         Entries entries, const SecretKey* key = nullptr);

  const Entries& entries() const { return entries_; }
  // All of the changes are durable when this returns OK, in one step: a crash leaves all or none. After an
  // error the journal goes on in a new file with the next change; the failed change may come back at a start.
  absl::Status Append(const std::vector<Change>& changes);
  uint64_t file_bytes() const { return end_; }

 private:
  Journal(FileSystem& files, std::string folder, const SecretKey* key)
      : files_(files), folder_(std::move(folder)), key_(key) {}
  // Writes all entries to the next file and goes on there.
  absl::Status Checkpoint();
  void Apply(const std::vector<Change>& changes);
  std::string Path(uint64_t number) const;

  FileSystem& files_;
  const std::string folder_;
  const SecretKey* const key_;
  Entries entries_;
  uint64_t number_ = 0;  // of the file
  std::unique_ptr<File> file_;
  uint64_t end_ = 0;
  uint64_t live_bytes_ = 0;  // of a checkpoint made now
  uint64_t serial_ = 0;      // of the last record
  bool broken_ = false;      // the end of the file is not known
};

}  // namespace kvtide
