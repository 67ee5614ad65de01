#include "clients/cli/bench/bench_run.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "clients/cli/bench/roofline.h"
#include "clients/cli/daemon_process.h"
#include "clients/cli/run_facts.h"
#include "clients/cli/terminal/progress.h"
#include "clients/cpp/direct_attention.h"
#include "clients/cpp/pool.h"
#include "kernels/base/status.h"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

using client::TensorRef;
using planner::kMiB;
using Clock = std::chrono::steady_clock;

double Since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// What every measurement adds to: the rows of the report and their samples.
class Samples {
 public:
  size_t AddRow(BenchRow row) {
    rows_.push_back(std::move(row));
    times_.emplace_back();
    return rows_.size() - 1;
  }
  // Calls that brought fewer bytes than others are left out: something else was at work.
  void Add(size_t row, double seconds, int64_t bytes = 0) {
    if (bytes > rows_[row].bytes) times_[row].clear();
    if (bytes < rows_[row].bytes) return;
    rows_[row].bytes = bytes;
    times_[row].push_back(seconds);
  }
  // What was measured so far was to get going.
  void Restart() {
    for (std::vector<double>& times : times_) times.clear();
    for (BenchRow& row : rows_) row.bytes = 0;
  }
  std::vector<BenchRow> Done() {
    for (size_t i = 0; i < rows_.size(); i++) {
      std::vector<double>& times = times_[i];
      std::sort(times.begin(), times.end());
      rows_[i].samples = static_cast<int64_t>(times.size());
      if (times.empty()) {
        if (rows_[i].note.empty()) rows_[i].note = "the blocks have no room there";
        continue;
      }
      rows_[i].p50_seconds = times[times.size() / 2];
      rows_[i].p99_seconds = times[std::min(times.size() - 1, times.size() * 99 / 100)];
    }
    return std::move(rows_);
  }

 private:
  std::vector<BenchRow> rows_;
  std::vector<std::vector<double>> times_;
};

// One turn of a measurement.
using Probe = std::function<absl::Status()>;

constexpr char kCopy[] = "memory: copy by all threads", kCopyPiece[] = "memory: copy",
               kRead[] = "memory: read by all threads", kWord[] = "memory: word",
               kFileWrite[] = "file: write", kFileRead[] = "file: read", kTalk[] = "Unix socket: round trip",
               kSend[] = "Unix socket: send", kReceive[] = "Unix socket: receive",
               kToGpu[] = "GPU: copy from host", kFromGpu[] = "GPU: copy to host",
               kInGpu[] = "GPU: copy inside";

BenchRow RooflineRow(const std::string& name, int64_t bytes, std::string note = "") {
  const size_t colon = name.find(": ");
  BenchRow row;
  row.subject = name.substr(0, colon);
  row.call = name.substr(colon + 2);
  row.bytes = bytes;
  row.note = std::move(note);
  return row;
}

// A model of a pool; forgotten with the object.
class ModelOf {
 public:
  static absl::StatusOr<std::unique_ptr<ModelOf>> Register(client::Client* pool, const char* what, int layers,
                                                           client::ModelLayer layer) {
    auto model = std::unique_ptr<ModelOf>(new ModelOf);
    static std::atomic<int> number{0};
    model->model_.name = absl::StrCat("kvtide-bench-", getpid(), "-", what, "-", number++);
    model->model_.layers.assign(static_cast<size_t>(layers), layer);
    KVTIDE_RETURN_IF_ERROR(pool->RegisterModel(model->model_));
    model->pool_ = pool;
    return model;
  }
  ~ModelOf() {
    if (pool_ == nullptr) return;
    for (const client::SequenceId id : sequences_) pool_->CloseSequence(id).IgnoreError();
    pool_->UnregisterModel(model_.name).IgnoreError();
  }
  absl::StatusOr<client::SequenceId> Create(const std::string& pair) {
    KVTIDE_ASSIGN_OR_RETURN(const client::SequenceId id, pool_->CreateSequence(model_.name, {.pair = pair}));
    sequences_.push_back(id);
    return id;
  }
  const client::Model& model() const { return model_; }

 private:
  client::Client* pool_ = nullptr;
  client::Model model_;
  std::vector<client::SequenceId> sequences_;
};

client::ModelLayer Layer(int kv_heads, int query_heads, int dim) {
  client::ModelLayer layer;
  layer.kv_heads = kv_heads;
  layer.query_heads = query_heads;
  layer.head_dim_k = layer.head_dim_v = dim;
  return layer;
}

// Numbers of about the size of keys, as f16 bits.
void FillF16(uint16_t* data, size_t count) {
  std::minstd_rand random(1);
  for (size_t i = 0; i < count; i++)
    data[i] = static_cast<uint16_t>(0x3400 + random() % 0x800 + (random() % 2 << 15));
}

// Tokens of a model with 8 layers of 8 KV heads of 128, f16: 32 KiB each.
constexpr int kLayers = 8, kKvHeads = 8, kHeads = 32, kDim = 128;
constexpr int64_t kTokenBytes = int64_t{kLayers} * kKvHeads * kDim * 2 * 2;

class Rows {
 public:
  Rows(uint16_t* data, int64_t tokens) {
    FillF16(data, static_cast<size_t>(tokens * kTokenBytes / 2));
    const std::vector<int64_t> shape = {tokens, kKvHeads, kDim};
    const int64_t rows = tokens * kKvHeads * kDim;
    for (int l = 0; l < kLayers; l++) {
      uint16_t* const k = data + 2 * l * rows;
      writes_.push_back({l, {k, DataType::kF16, shape}, {k + rows, DataType::kF16, shape}});
      reads_.push_back({l, {k, DataType::kF16, shape}, {k + rows, DataType::kF16, shape}});
    }
  }
  const std::vector<client::LayerTokens>& writes() const { return writes_; }
  const std::vector<client::ReadItem>& reads() const { return reads_; }

 private:
  std::vector<client::LayerTokens> writes_;
  std::vector<client::ReadItem> reads_;
};

// One token of one sequence in a small layer: the way is measured and not the attention.
class SmallCall {
 public:
  static absl::StatusOr<std::shared_ptr<SmallCall>> Make(Pool* pool) {
    constexpr int kSmallKv = 2, kSmallHeads = 4, kSmallDim = 64;
    auto call = std::make_shared<SmallCall>();
    call->pool_ = pool;
    KVTIDE_ASSIGN_OR_RETURN(call->model_,
                            ModelOf::Register(pool, "small", 1, Layer(kSmallKv, kSmallHeads, kSmallDim)));
    KVTIDE_ASSIGN_OR_RETURN(call->item_.sequence, call->model_->Create("f16/f16"));
    constexpr size_t kFloats = static_cast<size_t>(2 * kSmallHeads + 2 * kSmallKv) * kSmallDim;
    KVTIDE_ASSIGN_OR_RETURN(call->buffer_, pool->Allocate(kFloats * sizeof(float)));
    std::span<float> rest = call->buffer_.As<float>();
    std::fill(rest.begin(), rest.end(), 0.25f);
    const auto take = [&rest](int heads) {
      const std::span<float> values = rest.first(static_cast<size_t>(heads) * kSmallDim);
      rest = rest.subspan(values.size());
      return values;
    };
    call->item_.q = TensorRef::F32(take(kSmallHeads), {1, kSmallHeads, kSmallDim});
    call->item_.k = TensorRef::F32(take(kSmallKv), {1, kSmallKv, kSmallDim});
    call->item_.v = TensorRef::F32(take(kSmallKv), {1, kSmallKv, kSmallDim});
    call->item_.output = take(kSmallHeads);
    return call;
  }
  // Seconds of one call, or of the talk of a step with that token.
  absl::StatusOr<double> Run(bool step) {
    if (item_.start_position >= 128) {
      KVTIDE_RETURN_IF_ERROR(pool_->TruncateSequence(item_.sequence, 0));
      item_.start_position = 0;
    }
    auto start = Clock::now();
    client::Step begun;
    if (step) {
      const client::StepItem one{item_.sequence, 1};
      KVTIDE_ASSIGN_OR_RETURN(begun, pool_->BeginStep({&one, 1}, {.tables = true}));
    }
    double seconds = Since(start);
    if (!step) start = Clock::now();
    KVTIDE_RETURN_IF_ERROR(pool_->AppendAttend(0, {&item_, 1}, {}, begun.id));
    if (!step) seconds = Since(start);
    start = Clock::now();
    if (step) KVTIDE_RETURN_IF_ERROR(pool_->EndStep(begun.id));
    item_.start_position++;
    return step ? seconds + Since(start) : seconds;
  }

 private:
  Pool* pool_ = nullptr;
  std::unique_ptr<ModelOf> model_;
  client::TensorBuffer buffer_;
  client::AppendAttendItem item_;
};

// The talk of a step where the pool is mapped: begin with tables and plan, mark, end. Its rows are not
// written.
class DirectTalk {
 public:
  static absl::StatusOr<std::shared_ptr<DirectTalk>> Make(Pool* pool) {
    auto talk = std::make_shared<DirectTalk>();
    talk->pool_ = pool;
    KVTIDE_ASSIGN_OR_RETURN(talk->model_, ModelOf::Register(pool, "direct", 1, Layer(1, 2, 64)));
    KVTIDE_ASSIGN_OR_RETURN(talk->sequence_, talk->model_->Create("turbo4/turbo4"));
    client::DirectOptions options;
    options.pairs = {"turbo4/turbo4"};
    options.type = options.output_type = DataType::kF16;
    options.max_sequences = 1;
    options.max_sequence_tokens = 256;
    KVTIDE_ASSIGN_OR_RETURN(talk->attention_, DirectAttention::Make(pool, talk->model_->model(), options));
    return talk;
  }
  absl::StatusOr<double> Run() {
    // Before a block is full enough to be coded.
    if (tokens_++ == 128) {
      KVTIDE_RETURN_IF_ERROR(pool_->TruncateSequence(sequence_, 0));
      tokens_ = 1;
    }
    const auto start = Clock::now();
    const client::StepItem one{sequence_, 1};
    KVTIDE_ASSIGN_OR_RETURN(client::DirectStep step, attention_->Begin({&one, 1}, nullptr));
    KVTIDE_RETURN_IF_ERROR(attention_->Mark(step, nullptr));
    KVTIDE_RETURN_IF_ERROR(attention_->End(std::move(step)));
    return Since(start);
  }

 private:
  Pool* pool_ = nullptr;
  std::unique_ptr<ModelOf> model_;
  client::SequenceId sequence_ = 0;
  std::unique_ptr<DirectAttention> attention_;
  int tokens_ = 0;
};

// A piece of a prompt in all layers, there and back.
class LargeCall {
 public:
  static constexpr int64_t kTokens = 256, kBytes = kTokens * kTokenBytes;  // 8 MiB

  static absl::StatusOr<std::shared_ptr<LargeCall>> Make(Pool* pool) {
    auto call = std::make_shared<LargeCall>();
    call->pool_ = pool;
    KVTIDE_ASSIGN_OR_RETURN(call->model_,
                            ModelOf::Register(pool, "large", kLayers, Layer(kKvHeads, kHeads, kDim)));
    KVTIDE_ASSIGN_OR_RETURN(call->sequence_, call->model_->Create("f16/f16"));
    KVTIDE_ASSIGN_OR_RETURN(call->buffer_, pool->Allocate(kBytes));
    call->rows_ = std::make_unique<Rows>(call->buffer_.As<uint16_t>().data(), kTokens);
    return call;
  }
  absl::StatusOr<double> Write() {
    KVTIDE_RETURN_IF_ERROR(pool_->TruncateSequence(sequence_, 0));
    const auto start = Clock::now();
    KVTIDE_RETURN_IF_ERROR(pool_->Append(sequence_, 0, rows_->writes()).status());
    return Since(start);
  }
  absl::StatusOr<double> Read() {
    const auto start = Clock::now();
    KVTIDE_RETURN_IF_ERROR(pool_->ReadTokens(sequence_, 0, rows_->reads()));
    return Since(start);
  }

 private:
  Pool* pool_ = nullptr;
  std::unique_ptr<ModelOf> model_;
  client::SequenceId sequence_ = 0;
  client::TensorBuffer buffer_;
  std::unique_ptr<Rows> rows_;
};

// A sequence that is attended over in a tier, and goes there and back.
class TierCall {
 public:
  static constexpr int64_t kTokens = 4096, kChunk = 512;  // 128 MiB in f16

  static absl::StatusOr<std::shared_ptr<TierCall>> Make(client::Client* pool, const std::string& pair) {
    auto call = std::make_shared<TierCall>();
    call->pool_ = pool;
    KVTIDE_ASSIGN_OR_RETURN(call->model_,
                            ModelOf::Register(pool, "tier", kLayers, Layer(kKvHeads, kHeads, kDim)));
    KVTIDE_ASSIGN_OR_RETURN(call->sequence_, call->model_->Create(pair));
    std::vector<uint16_t> values(static_cast<size_t>(kChunk * kTokenBytes / 2));
    const Rows rows(values.data(), kChunk);
    for (int64_t done = 0; done < kTokens; done += kChunk)
      KVTIDE_RETURN_IF_ERROR(pool->Append(call->sequence_, done, rows.writes()).status());
    call->q_.resize(size_t{kHeads} * kDim);
    FillF16(call->q_.data(), call->q_.size());
    call->output_.resize(call->q_.size());
    return call;
  }
  // The bytes that one layer's attention reads, where all of the sequence lies in `tier`; 0 where it does
  // not.
  absl::StatusOr<int64_t> LayerBytes(const std::string& tier) {
    KVTIDE_ASSIGN_OR_RETURN(const auto all, pool_->ListSequences(model_->model().name));
    int64_t here = 0, elsewhere = 0;
    for (const client::SequenceInfo& one : all) {
      if (one.id != sequence_) continue;
      for (const client::TierShare& share : one.tiers) (share.tier == tier ? here : elsewhere) += share.bytes;
    }
    return elsewhere > 0 ? 0 : here / kLayers;
  }
  absl::StatusOr<double> Attend() {
    client::AttendItem item;
    item.sequence = sequence_;
    item.q = {q_.data(), DataType::kF16, {1, kHeads, kDim}};
    item.output = output_;
    layer_ = (layer_ + 1) % kLayers;
    const auto start = Clock::now();
    KVTIDE_RETURN_IF_ERROR(pool_->Attend(layer_, {&item, 1}));
    return Since(start);
  }
  struct Moved {
    double seconds = 0;
    int64_t bytes = 0;
  };
  absl::StatusOr<Moved> Demote(const std::string& tier) {
    return Move([&] { return pool_->EvictSequences({&sequence_, 1}, {.tier = tier}); });
  }
  absl::StatusOr<Moved> Promote() {
    return Move([&] { return pool_->PrefetchSequences({&sequence_, 1}); });
  }

 private:
  // Until no block is left behind: those that are on their way already, since attention has asked for them,
  // are busy for a moment. Blocks without room stay for good.
  template <class Call>
  static absl::StatusOr<Moved> Move(const Call& call) {
    constexpr double kPatience = 1;
    Moved moved;
    const auto start = Clock::now();
    for (;;) {
      KVTIDE_ASSIGN_OR_RETURN(const client::MoveResult result, call());
      moved.bytes += result.bytes;
      moved.seconds = Since(start);
      if (result.blocks_left == 0 || moved.seconds > kPatience) return moved;
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  }

  client::Client* pool_ = nullptr;
  std::unique_ptr<ModelOf> model_;
  client::SequenceId sequence_ = 0;
  std::vector<uint16_t> q_;
  std::vector<float> output_;
  int layer_ = 0;
};

// A folder that goes with the object.
class Folder {
 public:
  static absl::StatusOr<std::unique_ptr<Folder>> Make(const std::string& parent) {
    std::string name = parent + "/kvtide-bench-XXXXXX";
    if (mkdtemp(name.data()) == nullptr)
      return absl::InvalidArgumentError(
          absl::StrCat("cannot make a folder in ", parent, ": ", std::strerror(errno)));
    return std::unique_ptr<Folder>(new Folder(name));
  }
  ~Folder() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  const std::string& path() const { return path_; }

 private:
  explicit Folder(std::string path) : path_(std::move(path)) {}
  const std::string path_;
};

constexpr int64_t kRooflineBytes = 64 * kMiB;

class Bench {
 public:
  explicit Bench(const BenchOptions& options) : options_(options) {}
  ~Bench() {
    // Models go before their pools.
    probes_.clear();
    pools_.clear();
  }

  absl::StatusOr<BenchReport> Run(const std::atomic<bool>& stop) {
    const auto start = Clock::now();
    KVTIDE_RETURN_IF_ERROR(Connect());
    KVTIDE_RETURN_IF_ERROR(AddRooflines());
    KVTIDE_RETURN_IF_ERROR(AddWays());
    KVTIDE_RETURN_IF_ERROR(AddTiers());
    KVTIDE_RETURN_IF_ERROR(Measure(stop));
    report_.rows = samples_.Done();
    report_.date = Today();
    report_.machine = Machine();
    report_.seconds = Since(start);
    return std::move(report_);
  }

 private:
  bool gpu() const { return !absl::StartsWith(info_.tiers.front().backend, "cpu"); }
  // The first tier's device, for pools of this process.
  std::string Device() const {
    const client::TierInfo& first = info_.tiers.front();
    if (!gpu()) return "cpu";
    return absl::StartsWith(first.device, "GPU-") ? "cuda:" + first.device : first.backend;
  }

  absl::Status Connect() {
    address_ = options_.address;
    report_.disk_folder = options_.disk_folder;
    if (address_.empty()) {
      if (report_.disk_folder.empty()) report_.disk_folder = std::filesystem::temp_directory_path().string();
      KVTIDE_ASSIGN_OR_RETURN(folder_, Folder::Make(report_.disk_folder));
      DaemonOptions daemon;
      daemon.program = options_.daemon_program;
      daemon.device = options_.device;
      daemon.device_bytes = 384 * kMiB;
      daemon.host_bytes = 256 * kMiB;
      daemon.disk = folder_->path() + "/tier:256MiB";
      daemon.share_pool = true;
      KVTIDE_ASSIGN_OR_RETURN(daemon_, DaemonProcess::Start(daemon));
      address_ = daemon_->address();
    }
    client::ClientOptions client;
    client.wait_for_daemon = options_.address.empty();
    client.credentials = options_.credentials;
    KVTIDE_ASSIGN_OR_RETURN(client_, client::Client::Connect(address_, client));
    KVTIDE_ASSIGN_OR_RETURN(info_, client_->GetServerInfo());
    report_.version = info_.version;
    report_.daemon = options_.address.empty() ? "its own" : address_;
    report_.pair = options_.pair.empty() ? info_.default_pair : options_.pair;
    report_.device = Device();
    if (!options_.address.empty() && report_.disk_folder.empty()) {
      // "FOLDER:SIZE", told to admins.
      const absl::StatusOr<client::RunningConfig> config = client_->GetConfig();
      const bool disk =
          std::any_of(info_.tiers.begin(), info_.tiers.end(), [](const auto& tier) { return tier.io; });
      for (const client::ConfigValue& value :
           config.ok() ? config->values : std::vector<client::ConfigValue>())
        if (disk && value.name == "disk") report_.disk_folder = value.value.substr(0, value.value.rfind(':'));
    }
    return absl::OkStatus();
  }

  void AddProbe(const std::string& name, int64_t bytes, std::function<absl::StatusOr<double>()> run,
                std::string note = "") {
    const size_t row = samples_.AddRow(RooflineRow(name, bytes, std::move(note)));
    Measured(row, bytes, std::move(run));
  }
  void Measured(size_t row, int64_t bytes, std::function<absl::StatusOr<double>()> run) {
    probes_.push_back([this, row, bytes, run = std::move(run)]() -> absl::Status {
      KVTIDE_ASSIGN_OR_RETURN(const double seconds, run());
      samples_.Add(row, seconds, bytes);
      return absl::OkStatus();
    });
  }

  absl::Status AddRooflines() {
    const int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    const auto memory = std::make_shared<MemoryRoofline>(kRooflineBytes, threads);
    AddProbe(kCopy, kRooflineBytes, [memory] { return memory->CopySideBySide(); });
    AddProbe(kCopyPiece, LargeCall::kBytes, [memory] { return memory->Copy(LargeCall::kBytes); });
    AddProbe(kRead, kRooflineBytes, [memory] { return memory->Read(); });
    KVTIDE_ASSIGN_OR_RETURN(auto made, TalkRoofline::Make());
    const std::shared_ptr<TalkRoofline> talk = std::move(made);
    AddProbe(kWord, 0, [talk] { return talk->Word(); });
    AddProbe(kTalk, 0, [talk] { return talk->Socket(64, 64); });
    AddProbe(kSend, LargeCall::kBytes, [talk] { return talk->Socket(LargeCall::kBytes, 1); });
    AddProbe(kReceive, LargeCall::kBytes, [talk] { return talk->Socket(1, LargeCall::kBytes); });
    if (std::any_of(info_.tiers.begin(), info_.tiers.end(), [](const auto& tier) { return tier.io; })) {
      absl::StatusOr<std::unique_ptr<FileRoofline>> file =
          report_.disk_folder.empty()
              ? absl::StatusOr<std::unique_ptr<FileRoofline>>(absl::NotFoundError(
                    "kvtided tells only admins where its disk tier is; name a folder on that "
                    "disk with --disk-folder"))
              : FileRoofline::Make(report_.disk_folder, kRooflineBytes);
      if (file.ok()) {
        const std::shared_ptr<FileRoofline> shared = *std::move(file);
        const std::string note = shared->direct() ? "" : "through the page cache";
        AddProbe(
            kFileWrite, kRooflineBytes, [shared] { return shared->Write(); }, note);
        AddProbe(
            kFileRead, kRooflineBytes, [shared] { return shared->Read(); }, note);
      } else {
        samples_.AddRow(RooflineRow(kFileWrite, 0, std::string(file.status().message())));
      }
    }
    if (gpu()) {
      auto one = GpuRoofline::Make(Device(), kRooflineBytes);
      if (one.ok()) {
        const std::shared_ptr<GpuRoofline> shared = *std::move(one);
        AddProbe(kToGpu, kRooflineBytes, [shared] { return shared->Copy(CopyDirection::kFromHost); });
        AddProbe(kFromGpu, kRooflineBytes, [shared] { return shared->Copy(CopyDirection::kToHost); });
        AddProbe(
            kInGpu, 2 * kRooflineBytes, [shared] { return shared->Copy(CopyDirection::kInside); },
            "read and written");
      } else {
        samples_.AddRow(RooflineRow(kToGpu, 0, std::string(one.status().message())));
      }
    }
    return absl::OkStatus();
  }

  absl::Status AddWays() {
    struct Asked {
      const char* name;
      std::string address;
      bool session;
      const char *small, *write, *read;  // rooflines
    };
    const char* const to = gpu() ? kToGpu : kCopyPiece;
    const char* const from = gpu() ? kFromGpu : kCopyPiece;
    const std::vector<Asked> ways = {
        {"embedded", "embedded", false, "", to, from},
        {"direct", "direct:" + address_, false, kWord, to, from},
        {"shared memory", "shm:" + address_, false, kWord, to, from},
        {"gRPC, session", address_, true, kTalk, kSend, kReceive},
        {"gRPC", address_, false, kTalk, kSend, kReceive},
    };
    for (const Asked& way : ways) {
      const absl::Status status = AddWay(way.name, way.address, way.session, way.small, way.write, way.read);
      if (status.ok()) continue;
      BenchRow row;
      row.part = BenchPart::kWay;
      row.subject = way.name;
      row.note = std::string(status.message());
      samples_.AddRow(std::move(row));
      // Over the plain way everything works, or nothing is to be measured.
      if (std::string(way.name) == "gRPC") return status;
    }
    return absl::OkStatus();
  }

  absl::Status AddWay(const std::string& name, const std::string& address, bool session,
                      const std::string& small_roofline, const std::string& write_roofline,
                      const std::string& read_roofline) {
    client::PoolOptions options;
    options.client.session = session;
    options.client.credentials = options_.credentials;
    options.direct_device = Device();
    options.direct_threads = 1;
    options.embedded_config =
        absl::StrCat(R"({"device": ")", Device(), R"(", "device_memory": "128MiB", "host_memory": "0"})");
    KVTIDE_ASSIGN_OR_RETURN(auto connected, Pool::Connect(address, options));
    Pool* const pool = pools_.emplace_back(std::move(connected)).get();
    if (pool->way() == client::Way::kSharedMemory || (session && tier_pool_ == nullptr)) tier_pool_ = pool;
    const auto row = [&](const char* call, const std::string& roofline) {
      BenchRow one;
      one.part = BenchPart::kWay;
      one.subject = name;
      one.call = call;
      one.roofline = roofline;
      return one;
    };
    constexpr char kStep[] = "begin + end a step";
    // Calls by the direct way are those of shared memory; what it is for is the step.
    if (pool->way() == client::Way::kDirect) {
      KVTIDE_ASSIGN_OR_RETURN(const auto talk, DirectTalk::Make(pool));
      Measured(samples_.AddRow(row(kStep, small_roofline)), 0, [talk] { return talk->Run(); });
      return absl::OkStatus();
    }
    KVTIDE_ASSIGN_OR_RETURN(const auto small, SmallCall::Make(pool));
    KVTIDE_ASSIGN_OR_RETURN(const auto large, LargeCall::Make(pool));
    KVTIDE_RETURN_IF_ERROR(large->Write().status());
    Measured(samples_.AddRow(row("append + attend a token", small_roofline)), 0,
             [small] { return small->Run(false); });
    if (session || pool->way() != client::Way::kGrpc)
      Measured(samples_.AddRow(row(kStep, "")), 0, [small] { return small->Run(true); });
    Measured(samples_.AddRow(row("write", write_roofline)), LargeCall::kBytes,
             [large] { return large->Write(); });
    Measured(samples_.AddRow(row("read", read_roofline)), LargeCall::kBytes,
             [large] { return large->Read(); });
    return absl::OkStatus();
  }

  absl::Status AddTiers() {
    std::vector<client::TierInfo> tiers;
    for (const client::TierInfo& tier : info_.tiers)
      if (tiers.empty() || tiers.back().name != tier.name) tiers.push_back(tier);
    client::Client* const pool = tier_pool_ != nullptr ? tier_pool_ : client_.get();
    KVTIDE_ASSIGN_OR_RETURN(const auto call, TierCall::Make(pool, report_.pair));
    for (size_t i = 0; i < tiers.size(); i++) {
      const client::TierInfo& tier = tiers[i];
      const auto add = [&](const char* what, const char* roofline) {
        BenchRow row;
        row.part = BenchPart::kTier;
        row.subject = tier.name;
        row.call = what;
        row.roofline = roofline;
        return samples_.AddRow(std::move(row));
      };
      constexpr int kAttends = 16;
      const auto attend = [this, call, name = tier.name](size_t row) -> absl::Status {
        KVTIDE_ASSIGN_OR_RETURN(const int64_t bytes, call->LayerBytes(name));
        for (int n = 0; n < kAttends && bytes > 0; n++) {
          KVTIDE_ASSIGN_OR_RETURN(const double seconds, call->Attend());
          samples_.Add(row, seconds, bytes);
        }
        return absl::OkStatus();
      };
      const size_t attended = add(tier.io ? "attend, brought in first" : "attend", i == 0 && gpu() ? kInGpu
                                                                                   : tier.io       ? kFileRead
                                                                                                   : kRead);
      if (i == 0) {
        probes_.push_back([attend, attended] { return attend(attended); });
        continue;
      }
      const bool over_bus = gpu() && !tier.io;
      const size_t down = add("move there", tier.io ? kFileWrite : over_bus ? kFromGpu : kCopy);
      const size_t up = add("move back", tier.io ? kFileRead : over_bus ? kToGpu : kCopy);
      probes_.push_back(
          [this, call, attend, attended, down, up, io = tier.io, name = tier.name]() -> absl::Status {
            KVTIDE_RETURN_IF_ERROR(call->Promote().status());
            KVTIDE_ASSIGN_OR_RETURN(TierCall::Moved moved, call->Demote(name));
            samples_.Add(down, moved.seconds, moved.bytes);
            KVTIDE_ASSIGN_OR_RETURN(moved, call->Promote());
            samples_.Add(up, moved.seconds, moved.bytes);
            KVTIDE_ASSIGN_OR_RETURN(moved, call->Demote(name));
            if (io) {
              // Attention brings blocks in from where they cannot be attended: one call waits for all of
              // them.
              KVTIDE_ASSIGN_OR_RETURN(const double seconds, call->Attend());
              samples_.Add(attended, seconds, moved.bytes);
            } else {
              KVTIDE_RETURN_IF_ERROR(attend(attended));
            }
            return call->Promote().status();
          });
    }
    return absl::OkStatus();
  }

  absl::Status Measure(const std::atomic<bool>& stop) {
    constexpr int kRounds = 5;
    for (const Probe& probe : probes_) {
      if (stop) return absl::CancelledError("stopped");
      KVTIDE_RETURN_IF_ERROR(probe());
    }
    samples_.Restart();
    const auto start = Clock::now();
    std::optional<Progress> progress;
    if (options_.show_progress) progress.emplace("bench", options_.seconds, "s");
    const double slice = options_.seconds / kRounds / static_cast<double>(probes_.size());
    for (int round = 0; round < kRounds; round++) {
      for (size_t i = 0; i < probes_.size(); i++) {
        const double end = slice * static_cast<double>(static_cast<size_t>(round) * probes_.size() + i + 1);
        // At least once, whatever those before it took; later rounds do without what there is no time for.
        do {
          if (stop) return absl::CancelledError("stopped");
          KVTIDE_RETURN_IF_ERROR(probes_[i]());
          if (progress) progress->Update(std::min(Since(start), options_.seconds));
        } while (Since(start) < end);
        if (round > 0 && Since(start) > options_.seconds) break;
      }
    }
    if (progress) progress->Finish();
    return absl::OkStatus();
  }

  const BenchOptions& options_;
  std::unique_ptr<Folder> folder_;  // of the daemon's disk tier
  std::unique_ptr<DaemonProcess> daemon_;
  std::string address_;
  std::unique_ptr<client::Client> client_;
  client::ServerInfo info_;
  std::vector<std::unique_ptr<Pool>> pools_;
  client::Client* tier_pool_ = nullptr;
  Samples samples_;
  std::vector<Probe> probes_;
  BenchReport report_;
};

}  // namespace

const char* NameOf(BenchPart part) {
  return part == BenchPart::kRoofline ? "roofline" : part == BenchPart::kWay ? "way" : "tier";
}

const BenchRow* BenchReport::Find(const std::string& roofline) const {
  for (const BenchRow& row : rows)
    if (row.part == BenchPart::kRoofline && row.samples > 0 &&
        absl::StrCat(row.subject, ": ", row.call) == roofline)
      return &row;
  return nullptr;
}

double BenchReport::ShareOfRoofline(const BenchRow& row) const {
  const BenchRow* const bound = Find(row.roofline);
  if (bound == nullptr || row.samples == 0 || row.p50_seconds <= 0) return 0;
  if (row.bytes == 0) return bound->p50_seconds / row.p50_seconds;
  return row.bytes_per_second() / bound->bytes_per_second();
}

absl::StatusOr<BenchReport> RunBench(const BenchOptions& options, const std::atomic<bool>& stop) {
  return Bench(options).Run(stop);
}

}  // namespace kvtide::cli
