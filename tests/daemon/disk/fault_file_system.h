// A test fake: files in memory that keep what POSIX promises over a crash and nothing more. Bytes that were
// not synced are there, gone or torn by sectors; names that were not synced with their folder are there or
// not. Calls fail, come back short, or run into a full disk where a test says so.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "daemon/disk/file.h"

namespace kvtide::testing {

class FaultFileSystem : public FileSystem {
 public:
  enum Call { kRead, kWrite, kSync, kReserve, kFolder, kCalls };

  explicit FaultFileSystem(uint32_t seed = 1) : random_(seed) {}

  // The call of the kind after the next `calls` ones fails, and `times - 1` more.
  void Fail(Call call, int calls = 0, int times = 1,
            absl::Status status = absl::UnavailableError("planted")) {
    faults_[call] = {calls, times, std::move(status)};
  }
  bool failing(Call call) const { return faults_[call].times > 0; }
  void ClearFaults() {
    for (Fault& fault : faults_) fault.times = 0;
  }
  // Reads and writes come back with fewer bytes than asked for.
  void set_short_results(bool on) { short_results_ = on; }
  // Bytes of all files; more is a full disk.
  void set_capacity(uint64_t bytes) { capacity_ = bytes; }
  // Runs before every read and write.
  void SetHook(std::function<void(Call)> hook) { hook_ = std::move(hook); }

  // The process dies in the call that changes something after the next `calls` ones: half of a write may have
  // happened. Everything fails from then on, until Crash.
  void DieAfter(int calls) { die_after_ = calls; }
  bool dead() const { return dead_; }
  // What a new process finds. Files that are open are of the dead one, and fail.
  void Crash();
  uint64_t changes() const { return changes_; }

  // Changes a byte on the medium. False: the file is shorter or not there.
  bool Damage(const std::string& path, uint64_t offset);
  uint64_t SizeOf(const std::string& path);
  std::vector<std::string> Paths();

  absl::StatusOr<std::unique_ptr<File>> Open(const std::string& path, bool create, bool direct) override;
  absl::StatusOr<std::vector<std::string>> List(const std::string& folder) override;
  absl::Status MakeFolder(const std::string& path) override;
  absl::Status Rename(const std::string& from, const std::string& to) override;
  absl::Status Remove(const std::string& path) override;
  absl::Status SyncFolder(const std::string& path) override;
  absl::StatusOr<std::unique_ptr<FolderLock>> Lock(const std::string& folder) override;

 private:
  class OpenFile;
  class Locked;
  struct Write {
    uint64_t offset = 0;
    std::vector<std::byte> bytes;
    bool resize = false;  // to `offset` bytes
  };
  struct Node {
    std::vector<std::byte> now, durable;
    std::vector<Write> unsynced;
  };
  using NodePtr = std::shared_ptr<Node>;
  struct NameChange {
    std::string name;
    NodePtr node;  // null: removed
    std::string renamed_from;
  };
  struct Fault {
    int calls = 0, times = 0;
    absl::Status status;
  };

  // The next call's fault, or OK. Changes count towards DieAfter; `torn` is set when the process dies in it.
  absl::Status Enter(Call call, bool changes, bool* torn = nullptr);
  static void Apply(std::vector<std::byte>& content, const Write& write);
  static void Apply(std::map<std::string, NodePtr>& names, const NameChange& change);
  void ChangeName(NameChange change);
  uint64_t BytesTaken() const;

  std::mutex mu_;
  std::mt19937 random_;
  std::map<std::string, NodePtr> names_, durable_names_;
  std::vector<NameChange> unsynced_names_;
  Fault faults_[kCalls];
  std::function<void(Call)> hook_;
  bool short_results_ = false;
  uint64_t capacity_ = ~uint64_t{0};
  int die_after_ = -1;
  bool dead_ = false;
  uint64_t changes_ = 0;
  uint64_t life_ = 0;  // which process
  uint64_t locked_life_ = ~uint64_t{0};
};

}  // namespace kvtide::testing
