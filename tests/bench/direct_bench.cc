// Steps of an engine that attends over a mapped pool by itself (clients/cpp/direct_attention.h): what its
// talk with the daemon takes, by the direct way and embedded, and on a GPU whole decode steps beside the bare
// kernels (gpu_step.h).
//   kvtide_bench_direct [--device cpu|cuda:0] [--sequences 64] [--tokens 4096] [--json FILE] [--quick]
// 32 layers, on a GPU of 8 KV heads and 32 query heads of 128, turbo4; on the CPU of one head of 64, whose
// rows are not written: only the talk is measured there. The sequences are of unequal lengths, so that one of
// them seals a block in a step; in the middle of the steps that are measured they have as many tokens as
// those of the bare kernels, `tokens` and a tail of 20. Layers in a graph and by calls, alone and overlapped,
// take turns. What stands above the bare kernels is rows and attention; the seals of a step have a line of
// their own, and are part of whole steps. Beside that: rows of prompt chunks from device memory into the
// pool, beside a copy of as many bytes, and what a second pair costs a step.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "clients/cli/daemon_process.h"
#include "clients/cpp/direct_attention.h"
#include "tests/bench/must.h"
#include "tests/bench/result_file.h"
#ifdef KVTIDE_BENCH_HAS_CUDA
#include "tests/bench/gpu_step.h"
#endif

namespace kvtide::bench {
namespace {

using Clock = std::chrono::steady_clock;

double Since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}
double At(std::vector<double>& values, double share) {
  std::sort(values.begin(), values.end());
  return Tenth(
      values[std::min(values.size() - 1, static_cast<size_t>(share * static_cast<double>(values.size())))]);
}

// Rows of a step where the engine computes, and its stream.
class Tensors {
 public:
  Tensors(bool cuda, int64_t tokens, int64_t width) : width_(width) {
#ifdef KVTIDE_BENCH_HAS_CUDA
    if (cuda) {
      KVTIDE_BENCH_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
      // Values of about 1, not all equal.
      std::vector<uint16_t> values(static_cast<size_t>(tokens * width));
      for (size_t i = 0; i < values.size(); i++)
        values[i] =
            static_cast<uint16_t>(0x3800 + (i * 2654435761u >> 20) % 0x400 + (i % 3 == 0 ? 0x8000 : 0));
      KVTIDE_BENCH_CUDA(cudaMalloc(&data_, values.size() * 2));
      KVTIDE_BENCH_CUDA(cudaMemcpy(data_, values.data(), values.size() * 2, cudaMemcpyHostToDevice));
      return;
    }
#endif
    (void)cuda;
    (void)tokens;
  }
  const uint16_t* data(int64_t column = 0) const { return static_cast<const uint16_t*>(data_) + column; }
  uint16_t* data(int64_t column = 0) { return static_cast<uint16_t*>(data_) + column; }
  int64_t width() const { return width_; }
#ifdef KVTIDE_BENCH_HAS_CUDA
  cudaStream_t stream() const { return stream_; }
  void Wait() const {
    if (stream_ != nullptr) KVTIDE_BENCH_CUDA(cudaStreamSynchronize(stream_));
  }
#else
  void* stream() const { return nullptr; }
  void Wait() const {}
#endif

 private:
  const int64_t width_;
  void* data_ = nullptr;
#ifdef KVTIDE_BENCH_HAS_CUDA
  cudaStream_t stream_ = nullptr;
#endif
};

#ifdef KVTIDE_BENCH_HAS_CUDA
// The time on a stream between two places.
class StreamClock {
 public:
  StreamClock() {
    KVTIDE_BENCH_CUDA(cudaEventCreate(&from_));
    KVTIDE_BENCH_CUDA(cudaEventCreate(&to_));
  }
  ~StreamClock() {
    cudaEventDestroy(from_);
    cudaEventDestroy(to_);
  }
  StreamClock(const StreamClock&) = delete;
  StreamClock& operator=(const StreamClock&) = delete;
  void Start(cudaStream_t stream) { KVTIDE_BENCH_CUDA(cudaEventRecord(from_, stream)); }
  void Stop(cudaStream_t stream) { KVTIDE_BENCH_CUDA(cudaEventRecord(to_, stream)); }
  // Waits for the second place.
  double Microseconds() const {
    float ms = 0;
    KVTIDE_BENCH_CUDA(cudaEventSynchronize(to_));
    KVTIDE_BENCH_CUDA(cudaEventElapsedTime(&ms, from_, to_));
    return 1e3 * static_cast<double>(ms);
  }

 private:
  cudaEvent_t from_ = nullptr, to_ = nullptr;
};

// GB/s, read and written, of a copy inside the device.
double CopyGigabytes(size_t bytes, cudaStream_t stream) {
  void *from = nullptr, *to = nullptr;
  KVTIDE_BENCH_CUDA(cudaMalloc(&from, bytes));
  KVTIDE_BENCH_CUDA(cudaMalloc(&to, bytes));
  std::vector<double> us;
  StreamClock clock;
  for (int i = 0; i < 20; i++) {
    clock.Start(stream);
    KVTIDE_BENCH_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
    clock.Stop(stream);
    us.push_back(clock.Microseconds());
  }
  KVTIDE_BENCH_CUDA(cudaFree(from));
  KVTIDE_BENCH_CUDA(cudaFree(to));
  return 2e-3 * static_cast<double>(bytes) / At(us, 0.5);
}
#endif

struct Setting {
  bool cuda = false;
  int sequences = 64, layers = 32, kv_heads = 1, heads = 2, dim = 64, seals = 8;
  int64_t tokens = 4096, chunk = 2048;
  int rounds = 400;
  std::vector<std::string> pairs = {"turbo4/turbo4"};  // sequences take turns
};

class Engine {
 public:
  Engine(Pool* pool, const Setting& setting)
      : pool_(pool),
        setting_(setting),
        qkv_(setting.cuda, setting.chunk, (setting.heads + 2 * setting.kv_heads) * setting.dim),
        out_(setting.cuda, setting.sequences, setting.heads * setting.dim) {
    client::ModelLayer layer;
    layer.kv_heads = setting.kv_heads;
    layer.head_dim_k = layer.head_dim_v = setting.dim;
    layer.query_heads = setting.heads;
    model_ = {"bench", std::vector<client::ModelLayer>(static_cast<size_t>(setting.layers), layer)};
    client::DirectOptions options;
    options.pairs = setting.pairs;
    options.type = options.output_type = DataType::kF16;
    options.max_sequences = setting.sequences;
    options.max_new_tokens = static_cast<int>(std::max<int64_t>(setting.chunk, setting.sequences));
    options.max_sequence_tokens = setting.tokens + 4 * setting.rounds + 128;
    options.max_seals = 1024;
    attention_ = Must(DirectAttention::Make(pool, model_, options));
    Fill();
    attention_.reset();
    options.max_seals = setting.seals;
    options.graphs = setting.cuda;
    attention_ = Must(DirectAttention::Make(pool, model_, options));
  }
  ~Engine() {
    attention_.reset();
    for (const client::StepItem& item : items_) Must(pool_->CloseSequence(item.sequence));
  }

  client::DirectStep Begin(uint64_t after = 0) {
    return Must(attention_->Begin(items_, qkv_.stream(), after));
  }
  void End(client::DirectStep step) { Must(attention_->End(std::move(step))); }
  void Mark(client::DirectStep& step) { Must(attention_->Mark(step, qkv_.stream())); }
  void Layers() {
    for (int l = 0; l < setting_.layers && setting_.cuda; l++)
      Must(attention_->WriteAttend(l, Keys(), Values(), {qkv_.data(), qkv_.width()},
                                   {out_.data(), out_.width()}, nullptr, qkv_.stream()));
  }
  // Written, not attended.
  void Rows() {
    for (int l = 0; l < setting_.layers && setting_.cuda; l++) Write(l);
  }
  void Seal() {
    if (setting_.cuda) Must(attention_->Seal(qkv_.stream()));
  }
#ifdef KVTIDE_BENCH_HAS_CUDA
  // Of the rows of all layers of a whole chunk, read and written.
  double chunk_gigabytes() {
    const double bytes =
        4.0 * 2 * static_cast<double>(setting_.chunk) * setting_.layers * setting_.kv_heads * setting_.dim;
    return 1e-3 * bytes / At(chunk_us_, 0.5);
  }
  size_t chunk_bytes() const {
    return static_cast<size_t>(setting_.chunk) * static_cast<size_t>(setting_.layers * setting_.kv_heads) *
           static_cast<size_t>(setting_.dim) * 4;
  }
#endif
  const Tensors& tensors() const { return qkv_; }
  DirectAttention& attention() { return *attention_; }

 private:
  PagedRows Keys() const { return {qkv_.data(int64_t{setting_.heads} * setting_.dim), qkv_.width()}; }
  PagedRows Values() const {
    return {qkv_.data(int64_t{setting_.heads + setting_.kv_heads} * setting_.dim), qkv_.width()};
  }
  void Write(int layer) { Must(attention_->Write(layer, Keys(), Values(), qkv_.stream())); }
  void WriteAll(bool whole_chunk) {
    if (!setting_.cuda) return;
#ifdef KVTIDE_BENCH_HAS_CUDA
    clock_.Start(qkv_.stream());
    Rows();
    clock_.Stop(qkv_.stream());
    if (whole_chunk) chunk_us_.push_back(clock_.Microseconds());
#endif
    (void)whole_chunk;
  }
  // Prompts in chunks, rows written and not attended; then what waits to be coded.
  void Fill() {
    for (int i = 0; i < setting_.sequences; i++) {
      client::SequenceOptions options;
      options.pair = setting_.pairs[static_cast<size_t>(i) % setting_.pairs.size()];
      const client::SequenceId id = Must(pool_->CreateSequence("bench", options));
      const int64_t length = std::max<int64_t>(64, setting_.tokens - kFilledBefore) + i % 64;
      for (int64_t done = 0; done < length;) {
        const client::StepItem item{id, std::min(setting_.chunk, length - done)};
        client::DirectStep step = Must(attention_->Begin({&item, 1}, qkv_.stream()));
        WriteAll(item.new_tokens == setting_.chunk);
        Seal();
        Mark(step);
        End(std::move(step));
        done += item.new_tokens;
      }
      items_.push_back({id, 1});
    }
    // In every step some sequence fills a block.
    const int usual = setting_.sequences / 16 + 1;
    for (int more = usual + 1; more > usual;) {
      client::DirectStep step = Begin();
      more = step.seals;
      Layers();
      Seal();
      Mark(step);
      End(std::move(step));
    }
  }

  // So many tokens, less the tail of the bare kernels, come until the middle of the measured steps: 32 of
  // unequal lengths, some steps that seal what the prompts have left, and half of the measured ones.
  static constexpr int64_t kFilledBefore = 32 + 6 + 80 - 20;

  Pool* const pool_;
  const Setting setting_;
#ifdef KVTIDE_BENCH_HAS_CUDA
  StreamClock clock_;
  std::vector<double> chunk_us_;
#endif
  client::Model model_;
  Tensors qkv_, out_;
  std::unique_ptr<DirectAttention> attention_;
  std::vector<client::StepItem> items_;
};

#ifdef KVTIDE_BENCH_HAS_CUDA
double MeanTokens(const client::DirectStep& step) {
  double sum = 0;
  for (const int64_t start : step.starts) sum += static_cast<double>(start);
  return Tenth(sum / static_cast<double>(step.starts.size()));
}

// Steps whose layers and seals are called or replayed, as `layers` and `seal` do.
struct Steps {
  std::string how;
  std::function<void()> layers, seal;
  std::vector<double> on_device, alone, overlapped, tokens;
};

// One that is ended before the next one begins: the layers on the device, and all of it.
void Alone(Engine& engine, Steps& steps) {
  const cudaStream_t stream = engine.tensors().stream();
  StreamClock clock;
  const auto start = Clock::now();
  client::DirectStep step = engine.Begin();
  steps.tokens.push_back(MeanTokens(step));
  clock.Start(stream);
  steps.layers();
  clock.Stop(stream);
  steps.seal();
  engine.Mark(step);
  engine.End(std::move(step));
  steps.alone.push_back(Since(start));
  steps.on_device.push_back(clock.Microseconds());
}

// Some that begin while the device works on the one before; the first two are not counted.
void Overlapped(Engine& engine, Steps& steps) {
  client::DirectStep last = engine.Begin();
  const auto work = [&](client::DirectStep& step) {
    steps.layers();
    steps.seal();
    engine.Mark(step);
  };
  work(last);
  for (int i = 0; i < 5; i++) {
    const auto start = Clock::now();
    client::DirectStep next = engine.Begin(last.id);
    work(next);
    engine.End(std::move(last));
    last = std::move(next);
    if (i > 0) steps.overlapped.push_back(Since(start));
  }
  engine.End(std::move(last));
}

// Work of a step that was captured.
class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& work) : stream_(stream) {
    cudaGraph_t graph;
    KVTIDE_BENCH_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    work();
    KVTIDE_BENCH_CUDA(cudaStreamEndCapture(stream, &graph));
    KVTIDE_BENCH_CUDA(cudaGraphInstantiate(&exec_, graph, 0));
    KVTIDE_BENCH_CUDA(cudaGraphDestroy(graph));
  }
  ~Graph() { cudaGraphExecDestroy(exec_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void Replay() const { KVTIDE_BENCH_CUDA(cudaGraphLaunch(exec_, stream_)); }

 private:
  const cudaStream_t stream_;
  cudaGraphExec_t exec_ = nullptr;
};

// What the seals of a step take by themselves; a sequence fills a block every 64 steps.
void MeasureSeals(Engine& engine, double step_us, Result* result) {
  const cudaStream_t stream = engine.tensors().stream();
  std::vector<double> seals;
  StreamClock clock;
  for (int i = 0; i < 40; i++) {
    client::DirectStep step = engine.Begin();
    engine.Rows();
    engine.tensors().Wait();
    clock.Start(stream);
    engine.Seal();
    clock.Stop(stream);
    engine.Mark(step);
    engine.End(std::move(step));
    seals.push_back(clock.Microseconds());
  }
  (*result)["seals_us"] = At(seals, 0.5);
  (*result)["seals_share_percent"] = Tenth(100 * At(seals, 0.5) / step_us);
}

void MeasureSteps(Engine& engine, double bare_us, Result* result) {
  const cudaStream_t stream = engine.tensors().stream();
  const double copy = CopyGigabytes(engine.chunk_bytes(), stream);
  (*result)["chunk_gb_s"] = Tenth(engine.chunk_gigabytes());
  (*result)["copy_gb_s"] = Tenth(copy);
  (*result)["chunk_share_of_copy_percent"] = Tenth(100 * engine.chunk_gigabytes() / copy);
  const auto called_layers = [&] { engine.Layers(); };
  const auto called_seal = [&] { engine.Seal(); };
  Steps called{"calls", called_layers, called_seal, {}, {}, {}, {}};
  Alone(engine, called);  // where rows begin is part of what is planned
  client::DirectStep step = engine.Begin();
  const Graph layers(stream, called_layers), seal(stream, called_seal);
  Steps replayed{"graph", [&] { layers.Replay(); }, [&] { seal.Replay(); }, {}, {}, {}, {}};
  replayed.layers();
  replayed.seal();
  engine.Mark(step);
  engine.End(std::move(step));
  called = {called.how, called_layers, called_seal, {}, {}, {}, {}};
  for (int round = 0; round < 10; round++) {
    for (Steps* const steps : {&replayed, &called, &replayed, &called}) Alone(engine, *steps);
    for (Steps* const steps : {&replayed, &called}) Overlapped(engine, *steps);
  }
  for (Steps* const steps : {&replayed, &called}) {
    const std::string in = "_in_" + steps->how;
    (*result)["mean_tokens" + in] = At(steps->tokens, 0.5);
    (*result)["layers" + in + "_us"] = At(steps->on_device, 0.5);
    (*result)["above_bare" + in + "_us_a_layer"] = Tenth((At(steps->on_device, 0.5) - bare_us) / kLayers);
    (*result)["step_alone" + in + "_us"] = At(steps->alone, 0.5);
    (*result)["step_overlapped" + in + "_us"] = At(steps->overlapped, 0.5);
    (*result)["step_overlapped" + in + "_p99_us"] = At(steps->overlapped, 0.99);
  }
  MeasureSeals(engine, (*result)["layers_in_graph_us"], result);
  (*result)["device_megabytes"] = Tenth(static_cast<double>(engine.attention().device_bytes()) / 1e6);
}

// What it costs that the sequences of a step have two pairs: beside the mean of steps of each pair alone, as
// many sequences each.
void MeasurePairs(Pool* pool, Setting setting, Result* result) {
  const auto layers_of = [&](const std::vector<std::string>& pairs) {
    setting.pairs = pairs;
    Engine engine(pool, setting);
    const auto called = [&] { engine.Layers(); };
    Steps steps{"", called, [&] { engine.Seal(); }, {}, {}, {}, {}};
    Alone(engine, steps);
    client::DirectStep step = engine.Begin();
    const Graph layers(engine.tensors().stream(), called);
    engine.Layers();
    engine.Seal();
    engine.Mark(step);
    engine.End(std::move(step));
    steps = {"", [&] { layers.Replay(); }, [&] { engine.Seal(); }, {}, {}, {}, {}};
    for (int i = 0; i < 24; i++) Alone(engine, steps);
    return At(steps.on_device, 0.5);
  };
  const std::string first = "turbo4/turbo4", second = "turbo3/turbo3";
  Result pairs;
  pairs["pairs"] = {first, second};
  const double of_first = layers_of({first}), of_second = layers_of({second}),
               of_both = layers_of({first, second});
  pairs["layers_of_first_us"] = of_first;
  pairs["layers_of_second_us"] = of_second;
  pairs["layers_of_both_us"] = of_both;
  pairs["price_us_a_layer"] = Tenth((of_both - (of_first + of_second) / 2) / kLayers);
  pairs["price_percent"] = Tenth(200 * of_both / (of_first + of_second) - 100);
  (*result)["two_pairs"] = pairs;
}
#endif

// Begin and End by themselves, with what the engine does for them: tables, uploads, the plan's launch.
void MeasureTalk(Engine& engine, const Setting& setting, Result* result) {
  std::vector<double> begins, ends, both;
  for (int i = 0; i < setting.rounds; i++) {
    auto start = Clock::now();
    client::DirectStep step = engine.Begin();
    const double begin = Since(start);
    engine.Layers();
    engine.Seal();
    engine.Mark(step);
    engine.tensors().Wait();
    start = Clock::now();
    engine.End(std::move(step));
    const double end = Since(start);
    if (i < 20) continue;
    begins.push_back(begin);
    ends.push_back(end);
    both.push_back(begin + end);
  }
  (*result)["begin_p50_us"] = At(begins, 0.5);
  (*result)["begin_p99_us"] = At(begins, 0.99);
  (*result)["end_p50_us"] = At(ends, 0.5);
  (*result)["end_p99_us"] = At(ends, 0.99);
  (*result)["begin_and_end_p50_us"] = At(both, 0.5);
  (*result)["begin_and_end_p99_us"] = At(both, 0.99);
}

Result Measure(Pool* pool, const Setting& setting, [[maybe_unused]] double bare_us) {
  Result result;
  result["way"] = client::WayName(pool->way());
  Engine engine(pool, setting);
#ifdef KVTIDE_BENCH_HAS_CUDA
  if (setting.cuda) MeasureSteps(engine, bare_us, &result);
#endif
  MeasureTalk(engine, setting, &result);
  return result;
}

int Run(int argc, char** argv) {
  CLI::App app("Steps of an engine over a mapped pool.");
  cli::DaemonOptions daemon_options;
  std::string device = "cpu", json;
  Setting setting;
  bool quick = false;
  app.add_option("--kvtided", daemon_options.program, "the daemon's program");
  app.add_option("--device", device, "cpu, or cuda:0");
  app.add_option("--sequences", setting.sequences, "of a step");
  app.add_option("--tokens", setting.tokens, "of each sequence");
  app.add_option("--json", json, "write the results here too");
  app.add_flag("--quick", quick, "few and small, to see that it runs");
  CLI11_PARSE(app, argc, argv);
  setting.cuda = device != "cpu";
  if (setting.cuda) {
    setting.kv_heads = 8;
    setting.heads = 32;
    setting.dim = 128;
    setting.seals = 2;
  } else if (app.count("--tokens") == 0) {
    setting.tokens = 256;
  }
  if (quick) {
    setting.sequences = 4;
    setting.tokens = 128;
    setting.rounds = 30;
  }
  // Exact blocks of all while they wait to be coded, and the coded ones.
  const int64_t row_bytes = int64_t{setting.layers} * setting.kv_heads * setting.dim * 4;
  daemon_options.device_bytes =
      setting.sequences * (setting.tokens + 4 * setting.rounds + 256) * row_bytes * 3 / 2 +
      (int64_t{64} << 20);
  daemon_options.device = device;
  daemon_options.share_pool = true;
  Result result;
  result["benchmark"] = "direct";
  std::string command = "kvtide_bench_direct";
  for (int i = 1; i < argc; i++) absl::StrAppend(&command, " ", argv[i]);
  result["command"] = command;
  result["processors"] = ::sysconf(_SC_NPROCESSORS_ONLN);
  result["sequences"] = setting.sequences;
  result["tokens"] = setting.tokens;
  result["layers"] = setting.layers;
  double bare_us = 0;
#ifdef KVTIDE_BENCH_HAS_CUDA
  if (setting.cuda) {
    double megabytes = 0;
    size_t plan_bytes = 0;
    bare_us = Tenth(StepMicroseconds("turbo4/turbo4", {setting.sequences, static_cast<int>(setting.tokens)},
                                     &megabytes, &plan_bytes));
    result["bare_kernels_in_graph_us"] = bare_us;
  }
#endif
  for (const bool embedded : {false, true}) {
    client::PoolOptions options;
    options.direct_device = device;
    options.direct_threads = 1;
    std::unique_ptr<cli::DaemonProcess> daemon;
    std::string address = "embedded";
    if (embedded) {
      options.embedded_config =
          absl::StrCat(R"({"device": ")", device, R"(", "device_tier_bytes": )", daemon_options.device_bytes,
                       R"(, "host_memory": "0", "compute_threads": 1})");
    } else {
      daemon = Must(cli::DaemonProcess::Start(daemon_options));
      address = absl::StrCat("direct:", daemon->address());
    }
    const auto pool = Must(Pool::Connect(address, options));
    result["ways"].push_back(Measure(pool.get(), setting, bare_us));
    std::printf("%s\n", result["ways"].back().dump(1).c_str());
#ifdef KVTIDE_BENCH_HAS_CUDA
    if (setting.cuda && embedded) {
      MeasurePairs(pool.get(), setting, &result);
      std::printf("%s\n", result["two_pairs"].dump(1).c_str());
    }
#endif
  }
  return WriteResult(result, json);
}

}  // namespace
}  // namespace kvtide::bench

int main(int argc, char** argv) { return kvtide::bench::Run(argc, argv); }
