// What a call to kvtided costs: starts a daemon of its own (device cpu, one compute thread by default) and
// measures round trips as an engine makes them, with one client, by unary calls and on a session.
//   rpc_bench [--kvtided PATH] [--calls N] [--json FILE]
// Prints a table; --json writes the same numbers with hardware, date and command.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "clients/cli/daemon_process.h"
#include "clients/cpp/client.h"

namespace {

using kvtide::client::TensorRef;

// An 8B model's layer: 8 KV heads, 32 query heads, head dim 128.
constexpr int kKvHeads = 8, kHeads = 32, kDim = 128;

struct Result {
  std::string call, transport;
  double p50_us = 0, p99_us = 0;
  int64_t bytes = 0;  // of tensors, both ways
};

void Check(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "rpc_bench: %s\n", status.ToString().c_str());
  std::exit(1);
}

// Times `call` after some calls to warm up.
Result Measure(const std::string& name, const std::string& transport, int calls, int64_t bytes,
               const std::function<absl::Status(int)>& call) {
  std::vector<double> times;
  const int warm = std::min(calls / 10 + 1, 50);
  for (int i = 0; i < warm + calls; i++) {
    const auto start = std::chrono::steady_clock::now();
    Check(call(i));
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
    if (i >= warm) times.push_back(time.count());
  }
  std::sort(times.begin(), times.end());
  return {name, transport, times[times.size() / 2], times[times.size() * 99 / 100], bytes};
}

// A sequence with `tokens` tokens in layer 0, and what it takes to append to it.
class Stream {
 public:
  Stream(kvtide::Client* client, const std::string& pair, int64_t tokens) : client_(client) {
    kvtide::client::SequenceOptions options;
    options.pair = pair;
    const auto sequence = client->CreateSequence("bench", options);
    Check(sequence.status());
    sequence_ = *sequence;
    while (length_ < tokens) Check(Append(std::min<int64_t>(512, tokens - length_)));
  }
  ~Stream() { client_->CloseSequence(sequence_).IgnoreError(); }

  absl::Status Append(int64_t tokens) {
    const std::vector<float> rows(static_cast<size_t>(tokens * kKvHeads * kDim), 0.25f);
    const TensorRef tensor = TensorRef::F32(rows, {tokens, kKvHeads, kDim});
    const kvtide::client::LayerTokens layer{0, tensor, tensor};
    const absl::Status status = client_->Append(sequence_, length_, std::span(&layer, 1)).status();
    if (status.ok()) length_ += tokens;
    return status;
  }

  absl::Status AppendAttend(int64_t tokens) {
    const std::vector<float> rows(static_cast<size_t>(tokens * kHeads * kDim), 0.25f);
    std::vector<float> output(rows.size());
    kvtide::client::AppendAttendItem item;
    item.sequence = sequence_;
    item.start_position = length_;
    item.q = TensorRef::F32(rows, {tokens, kHeads, kDim});
    item.k = item.v = TensorRef::F32(rows, {tokens, kKvHeads, kDim});
    item.output = output;
    const absl::Status status = client_->AppendAttend(0, std::span(&item, 1));
    if (status.ok()) length_ += tokens;
    return status;
  }

 private:
  kvtide::Client* client_;
  kvtide::client::SequenceId sequence_ = 0;
  int64_t length_ = 0;
};

std::vector<Result> MeasureAll(kvtide::Client* client, const std::string& transport, int calls) {
  constexpr int64_t kRow = kDim * static_cast<int64_t>(sizeof(float));
  std::vector<Result> results;
  kvtide::client::Model model;
  model.name = "bench";
  kvtide::client::ModelLayer layer;
  layer.kv_heads = kKvHeads;
  layer.head_dim_k = layer.head_dim_v = kDim;
  layer.query_heads = kHeads;
  model.layers.push_back(layer);
  Check(client->RegisterModel(model));
  results.push_back(Measure("create + close sequence", transport, calls, 0, [&](int) {
    auto sequence = client->CreateSequence("bench");
    return sequence.ok() ? client->CloseSequence(*sequence) : sequence.status();
  }));
  for (const char* pair : {"f16/f16", "turbo4/turbo4"}) {
    for (const int64_t context : {64, 4096}) {
      Stream stream(client, pair, context);
      results.push_back(Measure("append + attend 1 token after " + std::to_string(context) + ", " + pair,
                                transport, calls, (2 * kHeads + 2 * kKvHeads) * kRow,
                                [&](int) { return stream.AppendAttend(1); }));
    }
    Stream stream(client, pair, 0);
    results.push_back(Measure("append 256 tokens, " + std::string(pair), transport, std::min(calls, 60),
                              256 * 2 * kKvHeads * kRow, [&](int) { return stream.Append(256); }));
  }
  return results;
}

std::string Processor() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 10, "model name") == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Round trips to kvtided.");
  kvtide::cli::DaemonOptions daemon_options;
  daemon_options.device_bytes = int64_t{512} << 20;
  daemon_options.compute_threads = 1;
  int calls = 500;
  std::string json_file;
  app.add_option("--kvtided", daemon_options.program, "the daemon's program");
  app.add_option("--compute-threads", daemon_options.compute_threads, "threads that attend");
  app.add_option("--calls", calls, "calls of each kind")->check(CLI::Range(10, 1000000));
  app.add_option("--json", json_file, "write the results here too");
  CLI11_PARSE(app, argc, argv);
  auto daemon = kvtide::cli::DaemonProcess::Start(daemon_options);
  Check(daemon.status());
  std::vector<Result> results;
  for (const bool session : {false, true}) {
    kvtide::client::ClientOptions options;
    options.session = session;
    auto client = kvtide::Client::Connect((*daemon)->address(), options);
    Check(client.status());
    const std::vector<Result> some = MeasureAll(client->get(), session ? "session" : "unary", calls);
    results.insert(results.end(), some.begin(), some.end());
  }
  std::printf("%-52s %-8s %10s %10s %12s\n", "call", "by", "p50 us", "p99 us", "tensor bytes");
  nlohmann::json rows = nlohmann::json::array();
  for (const Result& r : results) {
    std::printf("%-52s %-8s %10.1f %10.1f %12lld\n", r.call.c_str(), r.transport.c_str(), r.p50_us, r.p99_us,
                static_cast<long long>(r.bytes));
    rows.push_back({{"call", r.call},
                    {"by", r.transport},
                    {"p50_us", r.p50_us},
                    {"p99_us", r.p99_us},
                    {"tensor_bytes", r.bytes}});
  }
  if (json_file.empty()) return 0;
  const std::time_t now = std::time(nullptr);
  char date[32];
  std::strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  std::string command;
  for (int i = 0; i < argc; i++) command += (i == 0 ? "" : " ") + std::string(i == 0 ? "rpc_bench" : argv[i]);
  double load = 0;  // of the last minute: on a busy machine the numbers are upper bounds
  std::ifstream("/proc/loadavg") >> load;
  std::ofstream(json_file) << nlohmann::json{{"benchmark", "rpc"},
                                             {"hardware", Processor()},
                                             {"processors", ::sysconf(_SC_NPROCESSORS_ONLN)},
                                             {"date", date},
                                             {"command", command},
                                             {"socket", "unix"},
                                             {"load_average", load},
                                             {"results", rows}}
                                  .dump(1)
                           << "\n";
  return 0;
}
