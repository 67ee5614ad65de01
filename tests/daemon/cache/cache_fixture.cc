#include "tests/daemon/cache/cache_fixture.h"

#include <chrono>
#include <cmath>
#include <numeric>
#include <thread>

#include "tests/daemon/cache/device_under_test.h"

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

std::vector<float> RandomRows(std::mt19937& random, size_t count, float spread) {
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> values(count);
  for (float& x : values) x = normal(random);
  return values;
}

CacheTest::CacheTest() {
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
  absl::StatusOr<std::unique_ptr<DiskTier>> disk = DiskTier::Open(options);
  ASSERT_TRUE(disk.ok()) << disk.status();
  disk_ = *std::move(disk);
  StartOn(devices, device_bytes, host_bytes);
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
    : cache_(&cache),
      model_(std::make_shared<const ModelSpec>(model)),
      shadow_(model, options),
      random_(&random) {
  const absl::StatusOr<ModelId> model_id = cache.RegisterModel(model);
  EXPECT_TRUE(model_id.ok()) << model_id.status();
  const absl::StatusOr<SequenceId> id = cache.CreateSequence(*model_id, options);
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

Client::Rows Client::MakeRows(int layer, int64_t tokens) {
  const GroupShape& shape = group(layer).shape;
  const auto rows = static_cast<size_t>(tokens * shape.kv_heads);
  Rows made{RandomRows(*random_, rows * static_cast<size_t>(shape.head_dim_k)),
            RandomRows(*random_, rows * static_cast<size_t>(shape.head_dim_v))};
  // Keys have channels with a mean, as models' keys do.
  for (size_t i = 0; i < made.k.size(); i += 8) made.k[i] += 2.0f;
  return made;
}

absl::Status Client::Append(int64_t tokens) {
  std::vector<Rows> rows;
  std::vector<LayerKv> layers;
  for (size_t l = 0; l < model_->layers.size(); l++) rows.push_back(MakeRows(static_cast<int>(l), tokens));
  for (size_t l = 0; l < rows.size(); l++) {
    LayerKv kv;
    kv.layer = static_cast<int>(l);
    kv.k = {rows[l].k.data(), DataType::kF32};
    kv.v = {rows[l].v.data(), DataType::kF32};
    kv.k_elements = rows[l].k.size();
    kv.v_elements = rows[l].v.size();
    layers.push_back(kv);
  }
  AppendCall call;
  call.sequence = id_;
  call.start_position = length();
  call.tokens = tokens;
  call.layers = layers;
  const absl::Status status = cache_->Append(call);
  if (!status.ok()) return status;
  for (size_t l = 0; l < rows.size(); l++) shadow_.Append(static_cast<int>(l), rows[l].k, rows[l].v, tokens);
  shadow_.Settle();
  return status;
}

absl::Status Client::Step(int64_t tokens) {
  for (size_t l = 0; l < model_->layers.size(); l++) {
    const int layer = static_cast<int>(l);
    const LayerGroupSpec& spec = group(layer);
    const int64_t start = shadow_.LayerLength(layer);
    const Rows rows = MakeRows(layer, tokens);
    const auto query_rows = static_cast<size_t>(tokens * spec.heads);
    const std::vector<float> q =
        RandomRows(*random_, query_rows * static_cast<size_t>(spec.shape.head_dim_k));
    std::vector<float> out(query_rows * static_cast<size_t>(spec.shape.head_dim_v)), lse(query_rows);
    AttendRequest item;
    item.sequence = id_;
    item.q = {q.data(), DataType::kF32};
    item.q_elements = q.size();
    item.queries = tokens;
    item.first_query_position = start;
    item.out = out.data();
    item.lse = lse.data();
    item.new_tokens = tokens;
    item.start_position = start;
    item.k = {rows.k.data(), DataType::kF32};
    item.v = {rows.v.data(), DataType::kF32};
    item.k_elements = rows.k.size();
    item.v_elements = rows.v.size();
    AttendCall call;
    call.layer = layer;
    call.items = {&item, 1};
    const absl::Status status = cache_->AppendAttend(call);
    if (!status.ok()) return status;
    shadow_.Append(layer, rows.k, rows.v, tokens);
    ExpectClose(shadow_.Attend(layer, q, tokens, start), out, lse,
                "step of " + std::to_string(tokens) + " at " + std::to_string(start) + ", layer " +
                    std::to_string(l));
    shadow_.Settle();
  }
  return absl::OkStatus();
}

absl::Status Client::CheckAttention(int layer, int64_t queries, const float* sinks) {
  const LayerGroupSpec& spec = group(layer);
  const int64_t tokens = shadow_.LayerLength(layer);
  // In a sliding window only what the next token sees is sure to be there.
  const int64_t first = spec.window > 0 ? tokens : std::max<int64_t>(0, tokens - queries);
  const auto rows = static_cast<size_t>(queries * spec.heads);
  const std::vector<float> q = RandomRows(*random_, rows * static_cast<size_t>(spec.shape.head_dim_k));
  std::vector<float> out(rows * static_cast<size_t>(spec.shape.head_dim_v)), lse(rows);
  AttendRequest item;
  item.sequence = id_;
  item.q = {q.data(), DataType::kF32};
  item.queries = queries;
  item.first_query_position = first;
  item.out = out.data();
  item.lse = lse.data();
  AttendCall call;
  call.layer = layer;
  call.items = {&item, 1};
  call.sinks = sinks;
  const absl::Status status = cache_->Attend(call);
  if (!status.ok()) return status;
  ExpectClose(shadow_.Attend(layer, q, queries, first, true, 0, sinks), out, lse,
              "attention over " + std::to_string(tokens) + " tokens, layer " + std::to_string(layer));
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
                 const std::vector<float>& lse, const std::string& what) {
  ASSERT_EQ(expected.out.size(), out.size()) << what;
  double error = 0, norm = 0;
  for (size_t i = 0; i < out.size(); i++) {
    const double difference = static_cast<double>(out[i]) - static_cast<double>(expected.out[i]);
    error += difference * difference;
    norm += static_cast<double>(expected.out[i]) * static_cast<double>(expected.out[i]);
  }
  EXPECT_LE(std::sqrt(error), 3e-3 * std::sqrt(norm) + 1e-6) << what;
  for (size_t i = 0; i < lse.size(); i++) {
    if (std::isinf(expected.lse[i])) {
      EXPECT_EQ(lse[i], expected.lse[i]) << what;
    } else {
      EXPECT_NEAR(lse[i], expected.lse[i], 3e-3) << what << ", row " << i;
    }
  }
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
