// Steps of an engine that attends over a mapped pool by itself (clients/cpp/direct_attention.h): what its
// talk with the daemon takes, by the direct way and embedded, and on a GPU whole decode steps beside the bare
// kernels (gpu_step.h).
//   kvtide_bench_direct [--device cpu|cuda:0] [--sequences 64] [--tokens 4096] [--json FILE] [--quick]
// 32 layers, on a GPU of 8 KV heads and 32 query heads of 128, turbo4; on the CPU of one head of 64, whose
// rows are not written: only the talk is measured there. The sequences are of unequal lengths, so that one of
// them seals a block in a step.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
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

struct Setting {
  bool cuda = false;
  int sequences = 64, layers = 32, kv_heads = 1, heads = 2, dim = 64, seals = 8;
  int64_t tokens = 4096, chunk = 2048;
  int rounds = 400;
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
    options.pair = "turbo4/turbo4";
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
    if (!setting_.cuda) return;
    for (int l = 0; l < setting_.layers; l++) {
      Write(l);
      Must(attention_->Attend(l, {qkv_.data(), qkv_.width()}, {out_.data(), out_.width()}, nullptr,
                              qkv_.stream()));
    }
    Must(attention_->Seal(qkv_.stream()));
  }
  const Tensors& tensors() const { return qkv_; }
  DirectAttention& attention() { return *attention_; }

 private:
  void Write(int layer) {
    const int64_t k = int64_t{setting_.heads} * setting_.dim,
                  v = k + int64_t{setting_.kv_heads} * setting_.dim;
    Must(attention_->Write(layer, {qkv_.data(k), qkv_.width()}, {qkv_.data(v), qkv_.width()}, qkv_.stream()));
  }
  // Prompts in chunks, rows written and not attended; then what waits to be coded.
  void Fill() {
    for (int i = 0; i < setting_.sequences; i++) {
      client::SequenceOptions options;
      options.pair = "turbo4/turbo4";
      const client::SequenceId id = Must(pool_->CreateSequence("bench", options));
      const int64_t length = setting_.tokens + i % 64;
      for (int64_t done = 0; done < length;) {
        const client::StepItem item{id, std::min(setting_.chunk, length - done)};
        client::DirectStep step = Must(attention_->Begin({&item, 1}, qkv_.stream()));
        for (int l = 0; l < setting_.layers && setting_.cuda; l++) Write(l);
        if (setting_.cuda) Must(attention_->Seal(qkv_.stream()));
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
      Mark(step);
      End(std::move(step));
    }
  }

  Pool* const pool_;
  const Setting setting_;
  client::Model model_;
  Tensors qkv_, out_;
  std::unique_ptr<DirectAttention> attention_;
  std::vector<client::StepItem> items_;
};

Result Measure(Pool* pool, const Setting& setting) {
  Result result;
  result["way"] = client::WayName(pool->way());
  Engine engine(pool, setting);
  std::vector<double> begins, ends, both;
  for (int i = 0; i < setting.rounds; i++) {
    auto start = Clock::now();
    client::DirectStep step = engine.Begin();
    const double begin = Since(start);
    engine.Layers();
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
  // With what the engine does for it: tables, uploads, the plan's launch.
  result["begin_p50_us"] = At(begins, 0.5);
  result["begin_p99_us"] = At(begins, 0.99);
  result["end_p50_us"] = At(ends, 0.5);
  result["end_p99_us"] = At(ends, 0.99);
  result["begin_and_end_p50_us"] = At(both, 0.5);
  result["begin_and_end_p99_us"] = At(both, 0.99);
#ifdef KVTIDE_BENCH_HAS_CUDA
  if (setting.cuda) {
    const cudaStream_t stream = engine.tensors().stream();
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    client::DirectStep step = engine.Begin();
    result["first_sequence_tokens_in_graph"] = step.starts[0];
    engine.Layers();
    engine.Mark(step);
    engine.End(std::move(step));
    step = engine.Begin();
    KVTIDE_BENCH_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    engine.Layers();
    KVTIDE_BENCH_CUDA(cudaStreamEndCapture(stream, &graph));
    KVTIDE_BENCH_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t from, to;
    KVTIDE_BENCH_CUDA(cudaEventCreate(&from));
    KVTIDE_BENCH_CUDA(cudaEventCreate(&to));
    const auto layers = [&](bool in_graph) {
      if (in_graph) {
        KVTIDE_BENCH_CUDA(cudaGraphLaunch(exec, stream));
      } else {
        engine.Layers();
      }
    };
    layers(true);
    engine.Mark(step);
    engine.End(std::move(step));
    for (const bool in_graph : {true, false}) {
      std::vector<double> gpu, alone, overlapped;
      for (int i = 0; i < 60; i++) {
        const auto start = Clock::now();
        step = engine.Begin();
        KVTIDE_BENCH_CUDA(cudaEventRecord(from, stream));
        layers(in_graph);
        KVTIDE_BENCH_CUDA(cudaEventRecord(to, stream));
        engine.Mark(step);
        engine.End(std::move(step));
        float ms = 0;
        KVTIDE_BENCH_CUDA(cudaEventElapsedTime(&ms, from, to));
        if (i < 10) continue;
        alone.push_back(Since(start));
        gpu.push_back(1e3 * static_cast<double>(ms));
      }
      client::DirectStep last = engine.Begin();
      layers(in_graph);
      engine.Mark(last);
      for (int i = 0; i < 100; i++) {
        const auto start = Clock::now();
        client::DirectStep next = engine.Begin(last.id);
        layers(in_graph);
        engine.Mark(next);
        engine.End(std::move(last));
        last = std::move(next);
        if (i >= 10) overlapped.push_back(Since(start));
      }
      engine.End(std::move(last));
      const std::string how = in_graph ? "graph" : "calls";
      result["layers_in_" + how + "_us"] = At(gpu, 0.5);
      result["step_alone_in_" + how + "_us"] = At(alone, 0.5);
      result["step_overlapped_in_" + how + "_us"] = At(overlapped, 0.5);
      result["step_overlapped_in_" + how + "_p99_us"] = At(overlapped, 0.99);
    }
    KVTIDE_BENCH_CUDA(cudaGraphExecDestroy(exec));
    KVTIDE_BENCH_CUDA(cudaGraphDestroy(graph));
    result["device_megabytes"] = Tenth(static_cast<double>(engine.attention().device_bytes()) / 1e6);
  }
#endif
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
#ifdef KVTIDE_BENCH_HAS_CUDA
  if (setting.cuda) {
    double megabytes = 0;
    size_t plan_bytes = 0;
    result["bare_kernels_in_graph_us"] = Tenth(StepMicroseconds(
        "turbo4/turbo4", {setting.sequences, static_cast<int>(setting.tokens)}, &megabytes, &plan_bytes));
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
    result["ways"].push_back(Measure(pool.get(), setting));
    std::printf("%s\n", result["ways"].back().dump(1).c_str());
  }
  return WriteResult(result, json);
}

}  // namespace
}  // namespace kvtide::bench

int main(int argc, char** argv) { return kvtide::bench::Run(argc, argv); }
