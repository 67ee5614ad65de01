#include "tests/daemon/cache/fault_remote.h"

#include <xxhash.h>

#include "absl/strings/str_cat.h"

namespace kvtide::testing {
namespace {

std::string Text(const RemoteName& name) {
  return absl::StrCat(static_cast<int>(name.kind), ":", name.key.high, ":", name.key.low, ":", name.group);
}

// As the real one compares: all but write id, sequence, profile and what is 0.
bool Fits(const BlockLabel& found, BlockLabel wanted) {
  if (wanted.bytes == 0) wanted.bytes = found.bytes;
  wanted.checksum = wanted.checksum == 0 ? found.checksum : wanted.checksum;
  wanted.write_id = found.write_id;
  wanted.sequence = found.sequence;
  wanted.profile_hash = found.profile_hash;
  return found == wanted;
}

}  // namespace

void FaultRemote::Enter(const char* call) {
  calls_++;
  if (hook_) hook_(call);
}

std::vector<std::optional<BlockLabel>> FaultRemote::Find(const std::string& space,
                                                         std::span<const RemoteName> names,
                                                         const RemoteLimit&) {
  Enter("Find");
  std::vector<std::optional<BlockLabel>> found(names.size());
  if (fault_ == Fault::kAway) return found;
  const std::lock_guard<std::mutex> lock(store_->mu);
  for (size_t i = 0; i < names.size(); i++)
    if (const auto at = store_->values.find({space, Text(names[i])}); at != store_->values.end())
      found[i] = at->second.label;
  return found;
}

void FaultRemote::Read(const std::string& space, std::span<RemoteJob> jobs, const RemoteLimit&) {
  Enter("Read");
  size_t blocks = 0;
  for (RemoteJob& job : jobs) {
    if (fault_ == Fault::kAway) {
      job.status = absl::UnavailableError("planted");
      continue;
    }
    const bool victim = job.name.kind == RemoteName::Kind::kBlock && blocks++ % 4 == 2;
    RemoteStore::Value value;
    {
      const std::lock_guard<std::mutex> lock(store_->mu);
      const auto at = store_->values.find({space, Text(job.name)});
      if (at != store_->values.end()) value = at->second;
      if (at == store_->values.end() || (fault_ == Fault::kLosesAfterFind && victim)) {
        job.status = absl::NotFoundError("nothing lies there");
        continue;
      }
    }
    if (!Fits(value.label, job.label)) {
      job.status = absl::DataLossError("another value lies there");
      continue;
    }
    if (((fault_ == Fault::kDamages && victim) || fault_ == Fault::kDamagesUnseen) && !value.bytes.empty())
      value.bytes[value.bytes.size() / 2] ^= std::byte{1};
    // Bytes go out before the checksum of all of them is known.
    job.status = job.copy(0, value.bytes);
    const uint64_t checksum = XXH3_64bits(value.bytes.data(), value.bytes.size());
    if (fault_ == Fault::kDamagesUnseen) value.label.checksum = checksum;
    if (job.status.ok() && checksum != value.label.checksum) {
      stats_.damaged_blocks++;
      job.status = absl::DataLossError("the checksum of the value is not that of its bytes");
    }
    if (!job.status.ok()) continue;
    job.label = value.label;
    stats_.read_blocks++;
    stats_.read_bytes += value.bytes.size();
  }
}

void FaultRemote::Write(const std::string& space, std::span<RemoteJob> jobs, const RemoteLimit&) {
  Enter("Write");
  for (RemoteJob& job : jobs) {
    if (fault_ == Fault::kAway || fault_ == Fault::kFull) {
      job.status =
          fault_ == Fault::kAway ? absl::UnavailableError("planted") : absl::ResourceExhaustedError("OOM");
      continue;
    }
    RemoteStore::Value value;
    value.bytes.resize(static_cast<size_t>(job.label.bytes));
    job.status = value.bytes.empty() ? absl::OkStatus() : job.copy(0, value.bytes);
    if (!job.status.ok()) continue;
    job.label.checksum = XXH3_64bits(value.bytes.data(), value.bytes.size());
    value.label = job.label;
    stats_.written_blocks++;
    stats_.written_bytes += value.bytes.size();
    const std::lock_guard<std::mutex> lock(store_->mu);
    store_->values[{space, Text(job.name)}] = std::move(value);
  }
}

absl::Status FaultRemote::Erase(const std::string& space, const RemoteLimit&) {
  Enter("Erase");
  if (fault_ == Fault::kAway) return absl::UnavailableError("planted");
  const std::lock_guard<std::mutex> lock(store_->mu);
  std::erase_if(store_->values, [&](const auto& value) { return value.first.first == space; });
  return absl::OkStatus();
}

}  // namespace kvtide::testing
