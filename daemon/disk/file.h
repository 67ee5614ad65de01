// Files as the disk tier needs them, and nothing more: a seam where tests put a file system that fails, tears
// writes and forgets what was not synced. Thread-safe: calls on one file may run side by side.
//
// What survives a crash, by POSIX and no more: bytes after Sync of the file, names after SyncFolder of their
// folder. Everything else may be there, in part, or not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvtide {

class File {
 public:
  virtual ~File() = default;
  // As the system gives them: perhaps fewer bytes than asked for, 0 at the end of the file.
  virtual absl::StatusOr<size_t> Read(uint64_t offset, std::span<std::byte> bytes) = 0;
  virtual absl::StatusOr<size_t> Write(uint64_t offset, std::span<const std::byte> bytes) = 0;
  // The bytes of all writes that have returned are durable (fdatasync). After an error nothing is known of
  // them.
  virtual absl::Status Sync() = 0;
  // Takes the space for the first `bytes` bytes. ResourceExhausted when the disk is full.
  virtual absl::Status Reserve(uint64_t bytes) = 0;
  virtual absl::Status Truncate(uint64_t bytes) = 0;
  virtual absl::StatusOr<uint64_t> Size() const = 0;
  // For io_uring; -1: reads and writes go through the calls above.
  virtual int descriptor() const { return -1; }
};

// Held: nobody else has the folder.
class FolderLock {
 public:
  virtual ~FolderLock() = default;
  // FailedPrecondition when the folder, or the file that locks it, was removed: what is written goes nowhere,
  // and another process may have one of that name.
  virtual absl::Status Check() const { return absl::OkStatus(); }
};

class FileSystem {
 public:
  virtual ~FileSystem() = default;
  // `create`: makes the file if it is not there. `direct`: past the page cache (O_DIRECT) where the file
  // system can; offsets, sizes and memory are multiples of kDiskPage then.
  virtual absl::StatusOr<std::unique_ptr<File>> Open(const std::string& path, bool create, bool direct) = 0;
  virtual absl::StatusOr<std::vector<std::string>> List(const std::string& folder) = 0;  // names of files
  virtual absl::Status MakeFolder(const std::string& path) = 0;  // in one that is there; OK if it is, too
  virtual absl::Status Rename(const std::string& from, const std::string& to) = 0;
  virtual absl::Status Remove(const std::string& path) = 0;
  virtual absl::Status SyncFolder(const std::string& path) = 0;
  // AlreadyExists while another process has it; the system frees it when this one ends.
  virtual absl::StatusOr<std::unique_ptr<FolderLock>> Lock(const std::string& folder) = 0;
};

// The unit of direct I/O: a multiple of every sector size in use.
constexpr size_t kDiskPage = 4096;

// The machine's own.
FileSystem& SystemFiles();

// All of the bytes, however the system cuts them. OutOfRange when the file ends before.
absl::Status ReadAll(File& file, uint64_t offset, std::span<std::byte> bytes);
absl::Status WriteAll(File& file, uint64_t offset, std::span<const std::byte> bytes);
// The beginning of a small file, at most so many bytes of it.
absl::StatusOr<std::string> ReadFile(FileSystem& files, const std::string& path, size_t most_bytes);
// The file has these bytes when this returns OK, over a crash the former ones or these.
absl::Status ReplaceFile(FileSystem& files, const std::string& folder, const std::string& name,
                         const std::string& bytes);

// "writing segment-3: No space left on device": ResourceExhausted for a full disk or quota, else Unavailable.
absl::Status IoError(int error, const std::string& what);

}  // namespace kvtide
