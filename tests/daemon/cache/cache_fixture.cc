#include "tests/daemon/cache/cache_fixture.h"

#include <chrono>
#include <cstdlib>
#include <numeric>
#include <thread>

#include "kernels/base/status.h"
#include "kernels/format/tide_maker.h"
#include "tests/daemon/cache/device_under_test.h"
#include "tests/format/test_tide.h"

namespace kvtide::testing {

ModelSpec MixedModel() {
  ModelSpec model;
  model.name = "mixed";
  LayerGroupSpec full, sliding;
  full.shape = {1, 1, 128, 64};
  full.heads = 3;
  sliding.shape = {2, 2, 64, 64};
  sliding.window = 100;
  sliding.heads = 4;
  sliding.softcap = 20.0f;
  sliding.scale = 0.1f;
  model.groups = {full, sliding};
  model.layers = {{1, 0}, {0, 0}, {1, 1}};
  return model;
}

ModelSpec WithMeans(ModelSpec model) {
  std::mt19937 random(5);
  model.name += "-calibrated";
  for (LayerGroupSpec& group : model.groups)
    group.key_means = RandomRows(
        random, static_cast<size_t>(group.shape.layers * group.shape.kv_heads * group.shape.head_dim_k),
        3.0f);
  return model;
}

ModelSpec WithTransforms(ModelSpec model) {
  model = WithMeans(std::move(model));
  model.name += "-transformed";
  for (LayerGroupSpec& group : model.groups)
    group.key_transforms = TransformsOf(test::TideProfile(group.shape, 31));
  return model;
}

CacheTest::CacheTest() { Renew(); }

void CacheTest::Renew() {
  cache_.reset();
  disk_.reset();
  files_ = std::make_unique<FaultFileSystem>();
  second_.reset();
  lives_ = 0;
  clock_.Reset();
  options_ = {};
  options_.background_moves = false;
  options_.clock = clock_.function();
  options_.id_seed = 7;
  options_.move_piece_bytes = 10'000;  // several pieces per block, the last one short
  CpuBackendOptions cpu;
  cpu.threads = 1;
  cpu.huge_pages = false;
  device_ = std::make_unique<FaultyBackend>(MakeDeviceUnderTest(0, cpu));
  cpu.name = "host";
  host_ = std::make_unique<FaultyBackend>(MakeCpuBackend(cpu));
}

void CacheTest::Start(size_t device_bytes, size_t host_bytes) { StartOn(1, device_bytes, host_bytes); }

void CacheTest::StartWithDisk(size_t device_bytes, size_t host_bytes, size_t disk_bytes, int devices) {
  const absl::Status opened = OpenDisk(disk_bytes);
  ASSERT_TRUE(opened.ok()) << opened;
  StartOn(devices, device_bytes, host_bytes);
}

absl::Status CacheTest::OpenDisk(size_t disk_bytes) {
  DiskTierOptions options;
  options.folder = "/disk";
  options.capacity_bytes = disk_options_bytes_ = disk_bytes;
  options.segment_bytes = 100 * kDiskPage;
  options.piece_bytes = 3 * kDiskPage;
  options.depth = 3;
  options.io = IoKind::kInline;
  options.files = files_.get();
  options.clock = clock_.function();
  options.id_seed = ++lives_;
  if (std::getenv("KVTIDE_TEST_DISK_ENCRYPTED") != nullptr) {
    auto key = std::make_shared<SecretKey>();
    key->bytes()[0] = std::byte{1};
    options.key = std::move(key);
  }
  KVTIDE_ASSIGN_OR_RETURN(disk_, DiskTier::Open(options));
  return absl::OkStatus();
}

void CacheTest::Restart(bool crash) {
  const std::vector<TierOptions> tiers = options_.tiers;
  cache_.reset();
  const size_t disk_bytes = disk_options_bytes_;
  disk_.reset();
  if (crash) files_->Crash();
  const int devices = CountHomes(tiers);
  StartWithDisk(tiers[0].capacity_bytes, tiers[static_cast<size_t>(devices)].capacity_bytes, disk_bytes,
                devices);
}

void CacheTest::StartOn(int devices, size_t device_bytes, size_t host_bytes) {
  // As two processors' memories begin, whatever the device is: so that tests do not depend on what is decided
  // by a GPU's rates.
  constexpr double kAttendRate = 1e10, kPromoteRate = 8e9;
  options_.tiers.clear();
  options_.tiers.push_back({"device", device_.get(), device_bytes, false});
  if (devices == 2) {
    CpuBackendOptions cpu;
    cpu.threads = 1;
    cpu.huge_pages = false;
    if (second_ == nullptr) second_ = std::make_unique<FaultyBackend>(MakeDeviceUnderTest(1, cpu));
    options_.tiers.push_back({"device", second_.get(), device_bytes, false, "second"});
    options_.tiers[0].device = "first";
  }
  if (host_bytes > 0) options_.tiers.push_back({"host", host_.get(), host_bytes, true});
  for (TierOptions& tier : options_.tiers) tier.attend_rate = kAttendRate;
  if (host_bytes > 0) {
    if (host_attend_rate_ > 0) options_.tiers.back().attend_rate = host_attend_rate_;
    options_.tiers.back().promote_rate = host_promote_rate_ > 0 ? host_promote_rate_ : kPromoteRate;
  }
  if (disk_ != nullptr)
    options_.tiers.push_back({"disk", nullptr, disk_->capacity_bytes(), true, "", disk_.get(), disk_.get()});
  absl::StatusOr<std::unique_ptr<KvCache>> cache = KvCache::Create(options_);
  ASSERT_TRUE(cache.ok()) << cache.status();
  cache_ = *std::move(cache);
}

void CacheTest::TearDown() {
  if (cache_ == nullptr) return;
  cache_->CheckInvariants();
  for (const SequenceInfo& info : cache_->ListSequences()) EXPECT_TRUE(cache_->CloseSequence(info.id).ok());
  cache_->CheckInvariants();
  // A move that runs in the background keeps its blocks until it ends.
  for (int i = 0; i < 10'000 && options_.background_moves && UsedBytes(cache_->Stats()) > 0; i++)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(UsedBytes(cache_->Stats()), 0u) << "bytes are left after every sequence was closed";
}

Client::Client(KvCache& cache, const ModelSpec& model, const SequenceOptions& options, std::mt19937& random)
    : Client(cache, cache.RegisterModel(model).value(), model, options, random) {}

Client::Client(KvCache& cache, ModelId model_id, const ModelSpec& model, const SequenceOptions& options,
               std::mt19937& random)
    : cache_(&cache),
      model_(std::make_shared<const ModelSpec>(model)),
      shadow_(model, options),
      random_(&random) {
  const absl::StatusOr<SequenceId> id = cache.CreateSequence(model_id, options);
  EXPECT_TRUE(id.ok()) << id.status();
  id_ = *id;
}

Client Client::Fork() {
  Client fork = *this;
  const absl::StatusOr<SequenceId> id = cache_->ForkSequence(id_);
  EXPECT_TRUE(id.ok()) << id.status();
  fork.id_ = *id;
  return fork;
}

absl::Status Client::Append(int64_t tokens) {
  std::vector<NewRows> rows;
  std::vector<LayerKv> layers;
  for (size_t l = 0; l < model_->layers.size(); l++)
    rows.emplace_back(*model_, static_cast<int>(l), tokens, *random_);
  for (const NewRows& row : rows) layers.push_back(row.Kv());
  AppendCall call;
  call.sequence = id_;
  call.start_position = length();
  call.tokens = tokens;
  call.layers = layers;
  const absl::Status status = cache_->Append(call);
  if (!status.ok()) return status;
  for (const NewRows& row : rows) shadow_.Append(row.layer, row.k, row.v, tokens);
  shadow_.Settle();
  return status;
}

namespace {

double Tolerance(const ShadowSequence& shadow) {
  constexpr double kRebuilt = 0.2;  // kRebuiltDistance of tests/kernels/attend_check.h
  return shadow.calibrated() && DeviceRebuildsKeys() ? kRebuilt : kCloseEnough;
}

}  // namespace

absl::Status Client::Step(int64_t tokens) {
  for (size_t l = 0; l < model_->layers.size(); l++) {
    const int layer = static_cast<int>(l);
    const int64_t start = shadow_.LayerLength(layer);
    const NewRows rows(*model_, layer, tokens, *random_);
    LayerCall attend(*model_, layer, id_, tokens, start, *random_);
    attend.Append(rows);
    const absl::Status status = cache_->AppendAttend(attend.call());
    if (!status.ok()) return status;
    shadow_.Append(layer, rows.k, rows.v, tokens);
    ExpectClose(
        shadow_.Attend(layer, attend.q, tokens, start), attend.out, attend.lse,
        "step of " + std::to_string(tokens) + " at " + std::to_string(start) + ", layer " + std::to_string(l),
        Tolerance(shadow_));
    shadow_.Settle();
  }
  return absl::OkStatus();
}

absl::Status Client::CheckAttention(int layer, int64_t queries, const float* sinks) {
  const int64_t tokens = shadow_.LayerLength(layer);
  // In a sliding window only what the next token sees is sure to be there.
  const int64_t first = GroupOf(*model_, layer).window > 0 ? tokens : std::max<int64_t>(0, tokens - queries);
  LayerCall attend(*model_, layer, id_, queries, first, *random_);
  attend.call().sinks = sinks;
  const absl::Status status = cache_->Attend(attend.call());
  if (!status.ok()) return status;
  ExpectClose(shadow_.Attend(layer, attend.q, queries, first, true, 0, sinks), attend.out, attend.lse,
              "attention over " + std::to_string(tokens) + " tokens, layer " + std::to_string(layer),
              Tolerance(shadow_));
  return status;
}

void Client::CheckAllLayers() {
  for (size_t l = 0; l < model_->layers.size(); l++) {
    const absl::Status status = CheckAttention(static_cast<int>(l));
    EXPECT_TRUE(status.ok()) << status;
  }
}

absl::Status Client::Truncate(int64_t tokens) {
  const absl::Status status = cache_->TruncateSequence(id_, tokens);
  if (status.ok()) shadow_.Truncate(tokens);
  return status;
}

void ExpectClose(const AttentionResult& expected, const std::vector<float>& out,
                 const std::vector<float>& lse, const std::string& what, double tolerance) {
  EXPECT_EQ(Difference(expected, out, lse, tolerance), "") << what;
}

uint64_t TotalBytes(const SequenceInfo& info) {
  return std::accumulate(info.bytes_by_tier.begin(), info.bytes_by_tier.end(), uint64_t{0});
}

uint64_t UsedBytes(const CacheStats& stats) {
  uint64_t bytes = 0;
  for (const TierStats& tier : stats.tiers) bytes += tier.used_bytes;
  return bytes;
}

}  // namespace kvtide::testing
