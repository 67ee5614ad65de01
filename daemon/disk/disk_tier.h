// The disk tier: a folder of preallocated segment files that hold extents, a preallocated file of manifests,
// and an index that says which of those count. With a key all of that is encrypted (encrypted_extent.h). See
// README.md for what is where, what is durable when, and what encryption protects.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "daemon/cache/tier/extent_allocator.h"
#include "daemon/cache/tier/io_tier.h"
#include "daemon/disk/encrypted_extent.h"
#include "daemon/disk/file.h"
#include "daemon/disk/io_queue.h"
#include "daemon/disk/journal.h"
#include "kernels/base/mutex.h"

namespace kvtide {

struct DiskTierOptions {
  std::string folder;
  size_t capacity_bytes = 0;
  IoKind io = IoKind::kThreads;
  FileSystem* files = &SystemFiles();
  std::shared_ptr<const SecretKey> key;    // the operator's (folder_key.h); null: not encrypted
  size_t segment_bytes = size_t{1} << 30;  // fixed for a folder
  size_t piece_bytes = size_t{1} << 20;    // of one read or write
  unsigned depth = 8;                      // pieces under way of one Run
  int runs = 3;                            // Runs side by side; further ones wait
  // Memory for the pieces, depth x runs of them: page-locked memory is faster for a GPU. Null: ordinary.
  std::function<std::byte*(size_t bytes)> staging;
  std::function<absl::Time()> clock = absl::Now;
  uint64_t id_seed = 0;  // of the write ids; 0 = random
};

class DiskTier : public IoTier, public DurableIndex {
 public:
  // Takes the folder and its space. AlreadyExists while another daemon has it, ResourceExhausted when the
  // disk has no room for the segments; FailedPrecondition when the key is not the folder's, or when the
  // folder was larger and holds what is durable, before anything is changed.
  static absl::StatusOr<std::unique_ptr<DiskTier>> Open(DiskTierOptions options);
  ~DiskTier() override;

  std::string name() const override;
  // Of extents; the rest of what the folder may take is for manifests.
  size_t capacity_bytes() const override { return extent_bytes_; }
  size_t ExtentBytes(size_t bytes) const override;
  uint64_t NextWriteId() override;
  void Run(std::span<IoJob> jobs) override;
  bool Writable() const override;
  IoTierStats Stats() const override;

  std::map<uint64_t, std::string> Load(std::vector<std::string>* lost) override;
  absl::Status Put(uint64_t key, const std::string& value) override;
  absl::Status Erase(std::span<const uint64_t> keys) override;
  // Why the index had to be built anew from the manifests; empty: it had not.
  const std::string& rebuild_reason() const { return rebuild_reason_; }
  // Memory for pieces.
  size_t staging_bytes() const;

 private:
  class Lane;
  class Pipeline;

  // A manifest in its file.
  struct Manifest {
    size_t offset = 0;
    BlockLabel label;
    bool operator==(const Manifest&) const = default;
  };
  // What the index has of a manifest.
  static std::string EncodeEntry(const Manifest& manifest);
  static int64_t VersionOf(const std::string& entry);  // 0: it cannot be read

  explicit DiskTier(DiskTierOptions options);
  // The label that begins an extent, whose page may be encrypted. `decryptor`, which may be null, is for the
  // bytes behind it, and stays empty where they are in clear. Errors are those of ReadExtentHeader.
  absl::StatusOr<BlockLabel> ReadLabel(const ExtentPlace& place, std::span<const std::byte> page,
                                       std::optional<ExtentDecryptor>* decryptor) const;
  absl::StatusOr<size_t> SizeOfFiles(const std::vector<std::string>& names);
  // A smaller tier than last time gives back what lies behind its end: not where something is durable.
  absl::Status CheckNothingIsDurable(size_t former_bytes);
  // Files that are shorter than the tier of so many bytes had them.
  void NoteShortFiles(size_t former_bytes, const std::vector<std::string>& names);
  absl::Status OpenFiles(bool* fresh);
  absl::StatusOr<std::unique_ptr<File>> OpenSized(const std::string& name, size_t bytes);
  absl::Status OpenIndex(bool fresh);
  // And the pages that could not be read.
  absl::StatusOr<std::vector<Manifest>> ScanManifests(std::vector<size_t>* unread);
  absl::StatusOr<std::string> ReadManifest(const Manifest& manifest);
  // A manifest that was there and cannot be read.
  void Lose(std::string what) ABSL_EXCLUSIVE_LOCKS_REQUIRED(index_mu_);
  absl::Status WriteManifest(Manifest& manifest, const std::string& value)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(index_mu_);
  // The parts of the tier's bytes that lie in one segment each.
  struct Part {
    size_t segment = 0;
    uint64_t offset = 0;
    size_t bytes = 0;
  };
  std::vector<Part> PartsOf(size_t offset, size_t bytes) const;
  // Nothing begins there any more.
  absl::Status WipeManifest(size_t offset);
  absl::Status SyncFile(File& file) ABSL_EXCLUSIVE_LOCKS_REQUIRED(index_mu_);
  // Segments that were written to since they were last synced.
  absl::Status SyncSegments() ABSL_EXCLUSIVE_LOCKS_REQUIRED(index_mu_);
  absl::Status EraseKeys(std::span<const uint64_t> keys) ABSL_EXCLUSIVE_LOCKS_REQUIRED(index_mu_);
  absl::Status WipeManifests(uint64_t key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(index_mu_);
  void FreeManifests(uint64_t key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(index_mu_);
  std::unique_ptr<Lane> TakeLane();
  void GiveBack(std::unique_ptr<Lane> lane);
  void CountWrite(const absl::Status& status, uint64_t bytes);
  void CountRead(const absl::Status& status, bool device_error, uint64_t bytes);

  const DiskTierOptions options_;
  size_t extent_bytes_ = 0, manifest_bytes_ = 0;
  std::unique_ptr<FolderLock> lock_;
  std::shared_ptr<const SecretKey> key_;  // the folder's; null: not encrypted
  std::vector<std::unique_ptr<File>> segments_;
  std::unique_ptr<File> manifest_file_;
  std::string rebuild_reason_;
  std::unique_ptr<IoQueues> queues_;

  mutable Mutex mu_;
  CondVar lane_free_;
  std::vector<std::unique_ptr<Lane>> lanes_ ABSL_GUARDED_BY(mu_);  // those that are free
  std::vector<bool> dirty_ ABSL_GUARDED_BY(mu_);                   // by segment
  IoTierStats stats_ ABSL_GUARDED_BY(mu_);
  absl::Time retry_at_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Duration back_off_ ABSL_GUARDED_BY(mu_);
  uint64_t id_base_ = 0;
  uint64_t last_id_ ABSL_GUARDED_BY(mu_) = 0;

  mutable Mutex index_mu_;  // one change of the index at a time; taken before mu_
  std::unique_ptr<Journal> journal_ ABSL_GUARDED_BY(index_mu_);
  std::map<uint64_t, Manifest> manifests_ ABSL_GUARDED_BY(index_mu_);
  // Written by a Put that failed: they may count at the next start, until the key is put or erased.
  std::map<uint64_t, std::vector<Manifest>> in_doubt_ ABSL_GUARDED_BY(index_mu_);
  std::vector<std::string> lost_ ABSL_GUARDED_BY(index_mu_);  // what the index knew and nobody found
  ExtentAllocator manifest_space_ ABSL_GUARDED_BY(index_mu_){0};
  bool wipes_unsynced_ ABSL_GUARDED_BY(index_mu_) = false;  // of manifests that were replaced
  int64_t last_version_ ABSL_GUARDED_BY(index_mu_) = 0;
  absl::Status sync_failed_ ABSL_GUARDED_BY(index_mu_);  // for good: nobody knows what was lost
};

}  // namespace kvtide
