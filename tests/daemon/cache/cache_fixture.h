// What the cache's tests share: a cache over CPU backends (device_under_test.h) with a fake clock, random
// rows, and a client that appends and attends through the public API and compares every answer with a shadow.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "daemon/cache/kv_cache.h"
#include "daemon/disk/disk_tier.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/daemon/cache/fake_clock.h"
#include "tests/daemon/cache/faulty_backend.h"
#include "tests/daemon/cache/layer_call.h"
#include "tests/daemon/cache/shadow.h"
#include "tests/daemon/disk/fault_file_system.h"

namespace kvtide::testing {

constexpr size_t kMiB = size_t{1} << 20;

// 2 layers of 2 KV heads of 64, 4 query heads: an f16 block is 65,536 bytes.
inline ModelSpec SmallModel(const std::string& name = "small") {
  return UniformModel(name, {2, 2, 64, 64}, 4);
}
// One layer with full attention, two with a sliding window of 100 tokens and other head dims, interleaved.
ModelSpec MixedModel();
// The model with means of its keys, larger than their spread; the same ones every time.
ModelSpec WithMeans(ModelSpec model);
// With transforms for calibrated keys as well.
ModelSpec WithTransforms(ModelSpec model);

inline CachePair Pair(const std::string& text) { return *ParseCachePair(text); }
inline SequenceOptions WithPair(const std::string& pair, ExactWindow window = {}) {
  SequenceOptions options;
  options.pair = Pair(pair);
  options.exact_window = window;
  return options;
}

// Matches a status by its code and a part of its message.
inline bool IsError(const absl::Status& status, absl::StatusCode code, const std::string& part) {
  if (status.code() == code && absl::StrContains(status.message(), part)) return true;
  ADD_FAILURE() << "expected code " << static_cast<int>(code) << " with '" << part << "', got "
                << status.ToString();
  return false;
}

// Two tiers of CPU memory; limits may be changed before Start.
class CacheTest : public ::testing::Test {
 protected:
  CacheTest();
  // As it was made: no cache, no disk, new backends, the first moment of the clock, the usual options.
  void Renew();
  void Start(size_t device_bytes = 8 * kMiB, size_t host_bytes = 8 * kMiB);
  // The same on one or two devices, called "first" and "second" then.
  void StartOn(int devices, size_t device_bytes, size_t host_bytes);
  // With a third tier, on a disk in memory (files_) that a test makes fail, whose calls all run at once.
  // Encrypted if the environment has KVTIDE_TEST_DISK_ENCRYPTED.
  void StartWithDisk(size_t device_bytes, size_t host_bytes, size_t disk_bytes, int devices = 1);
  // Its disk; an error leaves no disk.
  absl::Status OpenDisk(size_t disk_bytes);
  // The process ends, with or without a crash, and another one comes: what was not synced may be gone.
  void Restart(bool crash);
  void TearDown() override;
  ModelId Register(const ModelSpec& spec) { return cache_->RegisterModel(spec).value(); }

  FakeClock clock_;
  CacheOptions options_;
  std::unique_ptr<FaultyBackend> device_, second_, host_;
  std::unique_ptr<FaultFileSystem> files_ = std::make_unique<FaultFileSystem>();
  std::unique_ptr<DiskTier> disk_;
  size_t disk_options_bytes_ = 0;
  // Of the host tier, for the next start; 0: as the device's memory.
  double host_attend_rate_ = 0, host_promote_rate_ = 0;
  uint64_t lives_ = 0;
  std::unique_ptr<KvCache> cache_;
  std::mt19937 random_{20260101};
};

// A sequence with its shadow.
class Client {
 public:
  Client(KvCache& cache, const ModelSpec& model, const SequenceOptions& options, std::mt19937& random);
  // Of a model that is registered; `model` is what its sequence has.
  Client(KvCache& cache, ModelId id, const ModelSpec& model, const SequenceOptions& options,
         std::mt19937& random);
  SequenceId id() const { return id_; }
  int64_t length() const { return shadow_.Length(); }
  ShadowSequence& shadow() { return shadow_; }
  const ModelSpec& model() const { return *model_; }

  // All layers in one call.
  absl::Status Append(int64_t tokens);
  // Layer by layer with AppendAttend, as an engine does; compares what the new tokens see.
  absl::Status Step(int64_t tokens);
  // Attends with queries that end at the last token (in a sliding window: that begin after it) and compares.
  absl::Status CheckAttention(int layer, int64_t queries = 1, const float* sinks = nullptr);
  void CheckAllLayers();
  absl::Status Truncate(int64_t tokens);
  Client Fork();
  absl::Status Close() { return cache_->CloseSequence(id_); }
  // The same sequence in a cache that comes after a restart.
  void Move(KvCache& cache) { cache_ = &cache; }
  SequenceInfo info() const { return cache_->GetSequence(id_).value(); }
  // The shadow's blocks become what the cache has recoded by now.
  void Degrade() { shadow_.Degrade(info().degraded); }

 private:
  KvCache* cache_;
  std::shared_ptr<const ModelSpec> model_;
  ShadowSequence shadow_;
  std::mt19937* random_;
  SequenceId id_ = 0;
};

// A failure with how they differ (shadow.h).
void ExpectClose(const AttentionResult& expected, const std::vector<float>& out,
                 const std::vector<float>& lse, const std::string& what, double tolerance = kCloseEnough);

uint64_t TotalBytes(const SequenceInfo& info);
uint64_t UsedBytes(const CacheStats& stats);

}  // namespace kvtide::testing
