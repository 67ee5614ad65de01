#include "tests/daemon/disk/fault_file_system.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::testing {

class FaultFileSystem::OpenFile : public File {
 public:
  OpenFile(FaultFileSystem& files, NodePtr node)
      : files_(files), node_(std::move(node)), life_(files.life_) {}

  absl::StatusOr<size_t> Read(uint64_t offset, std::span<std::byte> bytes) override {
    if (files_.hook_) files_.hook_(kRead);
    std::lock_guard<std::mutex> lock(files_.mu_);
    KVTIDE_RETURN_IF_ERROR(Enter(kRead, false, nullptr));
    if (offset >= node_->now.size()) return size_t{0};
    const size_t count = Shorten(std::min<size_t>(bytes.size(), node_->now.size() - offset));
    std::copy_n(node_->now.begin() + static_cast<int64_t>(offset), count, bytes.begin());
    return count;
  }
  absl::StatusOr<size_t> Write(uint64_t offset, std::span<const std::byte> bytes) override {
    if (files_.hook_) files_.hook_(kWrite);
    std::lock_guard<std::mutex> lock(files_.mu_);
    bool torn = false;
    const absl::Status status = Enter(kWrite, true, &torn);
    if (!status.ok() && !torn) return status;
    const uint64_t end = offset + bytes.size();
    const uint64_t growth = end > node_->now.size() ? end - node_->now.size() : 0;
    if (files_.BytesTaken() + growth > files_.capacity_)
      return absl::ResourceExhaustedError("No space left on device");
    const size_t count = Shorten(bytes.size());
    FaultFileSystem::Write write{offset, {bytes.begin(), bytes.begin() + static_cast<int64_t>(count)}};
    Apply(node_->now, write);
    node_->unsynced.push_back(std::move(write));
    if (torn) return status;
    return count;
  }
  absl::Status Sync() override {
    std::lock_guard<std::mutex> lock(files_.mu_);
    KVTIDE_RETURN_IF_ERROR(Enter(kSync, true, nullptr));
    // Then it is what is there now.
    for (const FaultFileSystem::Write& write : node_->unsynced) Apply(node_->durable, write);
    node_->unsynced.clear();
    return absl::OkStatus();
  }
  absl::Status Reserve(uint64_t bytes) override {
    std::lock_guard<std::mutex> lock(files_.mu_);
    KVTIDE_RETURN_IF_ERROR(Enter(kReserve, true, nullptr));
    if (bytes <= node_->now.size()) return absl::OkStatus();
    if (files_.BytesTaken() + bytes - node_->now.size() > files_.capacity_)
      return absl::ResourceExhaustedError("No space left on device");
    return Resize(bytes);
  }
  absl::Status Truncate(uint64_t bytes) override {
    std::lock_guard<std::mutex> lock(files_.mu_);
    KVTIDE_RETURN_IF_ERROR(Enter(kReserve, true, nullptr));
    return Resize(bytes);
  }
  absl::StatusOr<uint64_t> Size() const override {
    std::lock_guard<std::mutex> lock(files_.mu_);
    return node_->now.size();
  }

 private:
  absl::Status Enter(Call call, bool changes, bool* torn) {
    if (life_ != files_.life_) return absl::UnavailableError("the file is of a process that has died");
    return files_.Enter(call, changes, torn);
  }
  size_t Shorten(size_t count) {
    if (!files_.short_results_ || count < 2 || files_.random_() % 2 == 0) return count;
    return 1 + files_.random_() % (count - 1);
  }
  absl::Status Resize(uint64_t bytes) {
    FaultFileSystem::Write write{bytes, {}, true};
    Apply(node_->now, write);
    node_->unsynced.push_back(std::move(write));
    return absl::OkStatus();
  }

  FaultFileSystem& files_;
  const NodePtr node_;
  const uint64_t life_;
};

class FaultFileSystem::Locked : public FolderLock {
 public:
  explicit Locked(FaultFileSystem& files) : files_(files), life_(files.life_) {}
  ~Locked() override {
    std::lock_guard<std::mutex> lock(files_.mu_);
    if (files_.locked_life_ == life_) files_.locked_life_ = ~uint64_t{0};
  }

 private:
  FaultFileSystem& files_;
  const uint64_t life_;
};

void FaultFileSystem::Apply(std::vector<std::byte>& content, const Write& write) {
  if (write.resize) return content.resize(write.offset);
  content.resize(std::max<size_t>(content.size(), write.offset + write.bytes.size()));
  std::copy(write.bytes.begin(), write.bytes.end(), content.begin() + static_cast<int64_t>(write.offset));
}

void FaultFileSystem::Apply(std::map<std::string, NodePtr>& names, const NameChange& change) {
  if (!change.renamed_from.empty()) names.erase(change.renamed_from);
  if (change.node == nullptr) {
    names.erase(change.name);
  } else {
    names[change.name] = change.node;
  }
}

absl::Status FaultFileSystem::Enter(Call call, bool changes, bool* torn) {
  if (dead_) return absl::UnavailableError("the process has died");
  Fault& fault = faults_[call];
  if (fault.times > 0 && fault.calls-- <= 0) {
    fault.times--;
    return fault.status;
  }
  if (!changes) return absl::OkStatus();
  changes_++;
  if (die_after_ < 0 || die_after_-- > 0) return absl::OkStatus();
  dead_ = true;
  if (torn != nullptr) *torn = random_() % 2 == 0;
  return absl::UnavailableError("the process dies");
}

void FaultFileSystem::Crash() {
  std::lock_guard<std::mutex> lock(mu_);
  // Names, in the order in which they changed, as far as it came.
  const size_t kept = unsynced_names_.empty() ? 0 : random_() % (unsynced_names_.size() + 1);
  for (size_t i = 0; i < kept; i++) Apply(durable_names_, unsynced_names_[i]);
  unsynced_names_.clear();
  names_ = durable_names_;
  constexpr size_t kSector = 512;
  std::map<Node*, bool> seen;
  for (auto& [name, node] : names_) {
    if (std::exchange(seen[node.get()], true)) continue;
    for (const Write& write : node->unsynced) {
      const uint32_t fate = random_() % 3;
      if (fate == 0) continue;
      if (fate == 1 || write.resize) {
        Apply(node->durable, write);
        continue;
      }
      for (size_t at = 0; at < write.bytes.size(); at += kSector) {
        if (random_() % 2 == 0) continue;
        const size_t end = std::min(write.bytes.size(), at + kSector);
        Apply(node->durable, {write.offset + at,
                              {write.bytes.begin() + static_cast<int64_t>(at),
                               write.bytes.begin() + static_cast<int64_t>(end)}});
      }
    }
    node->unsynced.clear();
    node->now = node->durable;
  }
  dead_ = false;
  die_after_ = -1;
  life_++;
  locked_life_ = ~uint64_t{0};
}

bool FaultFileSystem::Damage(const std::string& path, uint64_t offset) {
  std::lock_guard<std::mutex> lock(mu_);
  const auto found = names_.find(path);
  if (found == names_.end() || offset >= found->second->now.size()) return false;
  found->second->now[offset] ^= std::byte{0x10};
  if (offset < found->second->durable.size()) found->second->durable[offset] = found->second->now[offset];
  found->second->unsynced.push_back({offset, {found->second->now[offset]}});  // what was written before it
  return true;
}

uint64_t FaultFileSystem::SizeOf(const std::string& path) {
  std::lock_guard<std::mutex> lock(mu_);
  const auto found = names_.find(path);
  return found == names_.end() ? 0 : found->second->now.size();
}

std::vector<std::string> FaultFileSystem::Paths() {
  std::lock_guard<std::mutex> lock(mu_);
  std::vector<std::string> paths;
  for (const auto& [path, node] : names_) paths.push_back(path);
  return paths;
}

uint64_t FaultFileSystem::BytesTaken() const {
  uint64_t bytes = 0;
  for (const auto& [name, node] : names_) bytes += node->now.size();
  return bytes;
}

void FaultFileSystem::ChangeName(NameChange change) {
  Apply(names_, change);
  unsynced_names_.push_back(std::move(change));
}

absl::StatusOr<std::unique_ptr<File>> FaultFileSystem::Open(const std::string& path, bool create, bool) {
  std::lock_guard<std::mutex> lock(mu_);
  const auto found = names_.find(path);
  NodePtr node = found != names_.end() ? found->second : nullptr;
  if (node == nullptr && !create) return absl::NotFoundError(absl::StrCat(path, " does not exist"));
  KVTIDE_RETURN_IF_ERROR(Enter(kFolder, node == nullptr));
  if (node == nullptr) {
    node = std::make_shared<Node>();
    ChangeName({path, node, ""});
  }
  return std::make_unique<OpenFile>(*this, node);
}

absl::StatusOr<std::vector<std::string>> FaultFileSystem::List(const std::string& folder) {
  std::lock_guard<std::mutex> lock(mu_);
  KVTIDE_RETURN_IF_ERROR(Enter(kFolder, false));
  std::vector<std::string> names;
  for (const auto& [path, node] : names_)
    if (absl::StartsWith(path, folder + "/")) names.push_back(path.substr(folder.size() + 1));
  return names;
}

absl::Status FaultFileSystem::MakeFolder(const std::string&) {
  std::lock_guard<std::mutex> lock(mu_);
  return Enter(kFolder, false);
}

absl::Status FaultFileSystem::Rename(const std::string& from, const std::string& to) {
  std::lock_guard<std::mutex> lock(mu_);
  KVTIDE_RETURN_IF_ERROR(Enter(kFolder, true));
  ChangeName({to, names_.at(from), from});
  return absl::OkStatus();
}

absl::Status FaultFileSystem::Remove(const std::string& path) {
  std::lock_guard<std::mutex> lock(mu_);
  KVTIDE_RETURN_IF_ERROR(Enter(kFolder, true));
  if (names_.count(path) != 0) ChangeName({path, nullptr, ""});
  return absl::OkStatus();
}

absl::Status FaultFileSystem::SyncFolder(const std::string&) {
  std::lock_guard<std::mutex> lock(mu_);
  KVTIDE_RETURN_IF_ERROR(Enter(kSync, true));
  durable_names_ = names_;
  unsynced_names_.clear();
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<FolderLock>> FaultFileSystem::Lock(const std::string& folder) {
  std::lock_guard<std::mutex> lock(mu_);
  if (locked_life_ == life_)
    return absl::AlreadyExistsError(
        absl::StrCat("the folder ", folder, " belongs to another running daemon"));
  locked_life_ = life_;
  return std::make_unique<Locked>(*this);
}

}  // namespace kvtide::testing
