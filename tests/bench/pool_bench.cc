// The same work by every way to a pool: a small call, and large tensors. Ways take turns, round after round,
// so that other load of the machine meets all of them; of each the best round is told, and the median of all
// rounds. The daemon is a process of its own; one thread attends.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "clients/cli/daemon_process.h"
#include "clients/cpp/pool.h"
#include "nlohmann/json.hpp"
#include "tests/bench/must.h"

namespace {

using kvtide::Pool;
using kvtide::bench::Must;
using kvtide::client::TensorRef;
using Clock = std::chrono::steady_clock;

double Microseconds(Clock::duration time) { return std::chrono::duration<double, std::micro>(time).count(); }

struct Numbers {
  std::vector<double> p50, p99;  // of each round, in us
};

double Least(const std::vector<double>& values) { return *std::min_element(values.begin(), values.end()); }
double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

// The times of `calls` calls.
template <class Call>
void Measure(int calls, Numbers* numbers, Call&& call) {
  std::vector<double> times;
  for (int i = 0; i < calls; i++) {
    const auto start = Clock::now();
    call();
    times.push_back(Microseconds(Clock::now() - start));
  }
  std::sort(times.begin(), times.end());
  numbers->p50.push_back(times[times.size() / 2]);
  numbers->p99.push_back(times[times.size() * 99 / 100]);
}

// One token of one sequence in a small layer, so that the way and not the attention is measured: 2 KV heads,
// 4 query heads, head dim 64.
class SmallCall {
 public:
  SmallCall(Pool* pool, bool in_place) : pool_(pool) {
    constexpr int kKvHeads = 2, kHeads = 4, kDim = 64;
    kvtide::client::ModelLayer layer;
    layer.kv_heads = kKvHeads;
    layer.head_dim_k = layer.head_dim_v = kDim;
    layer.query_heads = kHeads;
    Must(pool->RegisterModel({"tiny", {layer}}));
    item_.sequence = Must(pool->CreateSequence("tiny", {.pair = "f16/f16"}));
    const size_t floats = static_cast<size_t>(2 * kHeads + 2 * kKvHeads) * kDim;
    own_.assign(floats, 0.25f);
    float* data = own_.data();
    if (in_place) {
      buffer_ = Must(pool->Allocate(floats * sizeof(float)));
      data = buffer_.As<float>().data();
      std::fill(data, data + floats, 0.25f);
    }
    const auto take = [&data](int heads) {
      const std::span<float> values(data, static_cast<size_t>(heads) * kDim);
      data += values.size();
      return values;
    };
    item_.q = TensorRef::F32(take(kHeads), {1, kHeads, kDim});
    item_.k = TensorRef::F32(take(kKvHeads), {1, kKvHeads, kDim});
    item_.v = TensorRef::F32(take(kKvHeads), {1, kKvHeads, kDim});
    item_.output = take(kHeads);
  }
  ~SmallCall() { Must(pool_->CloseSequence(item_.sequence)); }

  void Rewind() {
    Must(pool_->TruncateSequence(item_.sequence, 0));
    item_.start_position = 0;
  }
  void operator()() {
    Must(pool_->AppendAttend(0, {&item_, 1}));
    item_.start_position++;
  }

 private:
  Pool* pool_;
  std::vector<float> own_;
  kvtide::client::TensorBuffer buffer_;
  kvtide::client::AppendAttendItem item_;
};

// The talk of a step of 64 sequences, a token each, of one layer; its rows are written between begin and end,
// and not counted. Sequences that are equally long begin a new block all in the same step; `apart`: each is a
// token longer than the one before, as those of a batch are that came when they came.
class StepCall {
 public:
  static constexpr int kSequences = 64, kKvHeads = 1, kHeads = 2, kDim = 64;

  StepCall(Pool* pool, bool apart) : pool_(pool), apart_(apart) {
    kvtide::client::ModelLayer layer;
    layer.kv_heads = kKvHeads;
    layer.head_dim_k = layer.head_dim_v = kDim;
    layer.query_heads = kHeads;
    Must(pool->RegisterModel({"step", {layer}}));
    values_.assign(static_cast<size_t>(kSequences) * kHeads * kDim, 0.25f);
    output_.resize(values_.size());
    for (int i = 0; i < kSequences; i++) {
      const auto id = Must(pool->CreateSequence("step", {.pair = "f16/f16"}));
      items_.push_back({id, 1});
      auto& row = rows_.emplace_back();
      row.sequence = id;
      row.q = TensorRef::F32(std::span(values_).first(kHeads * kDim), {1, kHeads, kDim});
      row.k = row.v = TensorRef::F32(std::span(values_).first(kKvHeads * kDim), {1, kKvHeads, kDim});
      row.output = std::span(output_).subspan(static_cast<size_t>(i) * kHeads * kDim, kHeads * kDim);
      if (!apart || i == 0) continue;
      const auto kv = TensorRef::F32(std::span(values_).first(static_cast<size_t>(i) * kKvHeads * kDim),
                                     {i, kKvHeads, kDim});
      const kvtide::client::LayerTokens tokens{0, kv, kv};
      Must(pool->Append(id, 0, {&tokens, 1}).status());
    }
  }
  ~StepCall() {
    for (const auto& item : items_) Must(pool_->CloseSequence(item.sequence));
  }

  void Rewind() {
    for (size_t i = 0; i < items_.size(); i++)
      Must(pool_->TruncateSequence(items_[i].sequence, apart_ ? static_cast<int64_t>(i) : 0));
  }
  // Microseconds of begin and end.
  double operator()() {
    auto start = Clock::now();
    const kvtide::client::Step step = Must(pool_->BeginStep(items_, {.tables = true}));
    double time = Microseconds(Clock::now() - start);
    for (size_t i = 0; i < rows_.size(); i++) rows_[i].start_position = step.starts[i];
    Must(pool_->AppendAttend(0, rows_, {}, step.id));
    start = Clock::now();
    Must(pool_->EndStep(step.id));
    return time + Microseconds(Clock::now() - start);
  }

 private:
  Pool* pool_;
  const bool apart_;
  std::vector<float> values_, output_;
  std::vector<kvtide::client::StepItem> items_;
  std::vector<kvtide::client::AppendAttendItem> rows_;
};

// A chunk of a prompt in all layers, there and back: f16, 8 KV heads of 128.
class LargeCall {
 public:
  static constexpr int64_t kTokens = 512;
  static constexpr int kLayers = 8, kKvHeads = 8, kDim = 128;
  static constexpr int64_t kBytes = kTokens * kLayers * kKvHeads * kDim * 2 * 2;

  LargeCall(Pool* pool, bool in_place) : pool_(pool) {
    kvtide::client::ModelLayer layer;
    layer.kv_heads = kKvHeads;
    layer.head_dim_k = layer.head_dim_v = kDim;
    layer.query_heads = kKvHeads;
    Must(pool->RegisterModel({"large", std::vector<kvtide::client::ModelLayer>(kLayers, layer)}));
    sequence_ = Must(pool->CreateSequence("large", {.pair = "f16/f16"}));
    uint16_t* data = nullptr;
    if (in_place) {
      buffer_ = Must(pool->Allocate(kBytes));
      data = buffer_.As<uint16_t>().data();
    } else {
      own_.resize(kBytes / 2);
      data = own_.data();
    }
    std::fill(data, data + kBytes / 2, uint16_t{0x3400});
    constexpr int64_t kRows = kTokens * kKvHeads * kDim;
    for (int l = 0; l < kLayers; l++) {
      const std::vector<int64_t> shape = {kTokens, kKvHeads, kDim};
      uint16_t* const k = data + 2 * l * kRows;
      uint16_t* const v = k + kRows;
      layers_.push_back({l, {k, kvtide::DataType::kF16, shape}, {v, kvtide::DataType::kF16, shape}});
      reads_.push_back({l, {k, kvtide::DataType::kF16, shape}, {v, kvtide::DataType::kF16, shape}});
    }
  }
  ~LargeCall() { Must(pool_->CloseSequence(sequence_)); }

  void Rewind() { Must(pool_->TruncateSequence(sequence_, 0)); }
  void Append() { Must(pool_->Append(sequence_, 0, layers_).status()); }
  void Read() { Must(pool_->ReadTokens(sequence_, 0, reads_)); }
  // What the machine gives: the same bytes from the same memory to other memory of this process.
  void Copy() {
    copy_.resize(kBytes);
    std::memcpy(copy_.data(), layers_.front().k.data, kBytes);
  }

 private:
  Pool* pool_;
  kvtide::client::SequenceId sequence_ = 0;
  std::vector<uint16_t> own_;
  kvtide::client::TensorBuffer buffer_;
  std::vector<std::byte> copy_;
  std::vector<kvtide::client::LayerTokens> layers_;
  std::vector<kvtide::client::ReadItem> reads_;
};

std::string Processor() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 10, "model name") == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

double LoadAverage() {
  double load = 0;
  std::ifstream("/proc/loadavg") >> load;
  return load;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("The same work by every way to a pool.");
  kvtide::cli::DaemonOptions daemon_options;
  daemon_options.device_bytes = int64_t{256} << 20;
  daemon_options.compute_threads = 1;
  daemon_options.device = "cpu";
  daemon_options.share_pool = true;
  int rounds = 10, calls = 200, large_calls = 5, poll = 50;
  std::string json_file;
  app.add_option("--kvtided", daemon_options.program, "the daemon's program");
  app.add_option("--rounds", rounds, "rounds of all ways")->check(CLI::Range(1, 1000));
  app.add_option("--calls", calls, "small calls of a round")->check(CLI::Range(10, 250));
  app.add_option("--large-calls", large_calls, "large calls of a round")->check(CLI::Range(1, 1000));
  app.add_option("--poll", poll, "microseconds that a caller looks for its answer")
      ->check(CLI::Range(0, 100000));
  app.add_option("--json", json_file, "write the results here too");
  CLI11_PARSE(app, argc, argv);

  const auto daemon = Must(kvtide::cli::DaemonProcess::Start(daemon_options));
  struct Way {
    const char* name;
    std::string address;
    bool session, in_place;
    std::unique_ptr<Pool> pool;
    std::unique_ptr<SmallCall> small;
    std::unique_ptr<LargeCall> large;
    std::unique_ptr<StepCall> step, apart;  // null: no session
  };
  std::vector<Way> ways;
  ways.push_back({"embedded", "embedded", false, false});
  ways.push_back({"direct", "direct:" + daemon->address(), false, true});
  ways.push_back({"shared memory, in place", "shm:" + daemon->address(), false, true});
  ways.push_back({"shared memory, copied", "shm:" + daemon->address(), false, false});
  ways.push_back({"gRPC, session", daemon->address(), true, false});
  ways.push_back({"gRPC", daemon->address(), false, false});
  for (Way& way : ways) {
    kvtide::client::PoolOptions options;
    options.client.session = way.session;
    options.poll = absl::Microseconds(poll);
    options.direct_device = "cpu";
    options.direct_threads = 1;
    options.embedded_config =
        R"({"device": "cpu", "device_memory": "256MiB", "host_memory": "0", "compute_threads": 1})";
    way.pool = Must(Pool::Connect(way.address, options));
    way.small = std::make_unique<SmallCall>(way.pool.get(), way.in_place);
    way.large = std::make_unique<LargeCall>(way.pool.get(), way.in_place);
    if (!way.session && way.pool->way() == kvtide::client::Way::kGrpc) continue;
    way.step = std::make_unique<StepCall>(way.pool.get(), false);
    way.apart = std::make_unique<StepCall>(way.pool.get(), true);
  }
  const double load_before = LoadAverage();
  constexpr const char* kSmall = "append + attend 1 token, tiny model";
  constexpr const char* kStep = "begin + end of a step, 64 equally long sequences";
  constexpr const char* kApart = "64 sequences of different lengths";
  constexpr const char* kCopy = "a plain copy of as much";
  constexpr const char* kAppend = "append 512 tokens, 8 layers of 8 x 128, f16";
  constexpr const char* kRead = "read them back";
  std::map<std::string, std::map<std::string, Numbers>> all;  // by call, by way
  for (int round = 0; round < rounds; round++) {
    for (Way& way : ways) {
      way.small->Rewind();
      for (int i = 0; i < 5; i++) (*way.small)();
      Measure(calls, &all[kSmall][way.name], *way.small);
      for (const auto& [call, step] :
           {std::pair(kStep, way.step.get()), std::pair(kApart, way.apart.get())}) {
        if (step == nullptr) continue;
        step->Rewind();
        std::vector<double> talks;
        for (int i = 0; i < calls + 5; i++) {
          const double talk = (*step)();
          if (i >= 5) talks.push_back(talk);
        }
        std::sort(talks.begin(), talks.end());
        all[call][way.name].p50.push_back(talks[talks.size() / 2]);
        all[call][way.name].p99.push_back(talks[talks.size() * 99 / 100]);
      }
      way.large->Rewind();
      way.large->Append();
      Numbers* const append = &all[kAppend][way.name];
      std::vector<double> times;
      for (int i = 0; i < large_calls; i++) {
        way.large->Rewind();
        const auto start = Clock::now();
        way.large->Append();
        times.push_back(Microseconds(Clock::now() - start));
      }
      append->p50.push_back(Median(times));
      append->p99.push_back(*std::max_element(times.begin(), times.end()));
      Measure(large_calls, &all[kRead][way.name], [&way] { way.large->Read(); });
      Measure(large_calls, &all[kCopy][way.name], [&way] { way.large->Copy(); });
    }
  }

  std::printf("%-46s %-24s %10s %10s %10s %8s\n", "call", "way", "p50 us", "p99 us", "median p50", "GB/s");
  nlohmann::json rows = nlohmann::json::array();
  for (const char* call : {kSmall, kStep, kApart, kAppend, kRead, kCopy}) {
    for (const Way& way : ways) {
      const bool talk = call == kStep || call == kApart;
      if (talk && way.step == nullptr) continue;
      const Numbers& numbers = all[call][way.name];
      const double p50 = Least(numbers.p50), p99 = Least(numbers.p99), median = Median(numbers.p50);
      nlohmann::json row = {{"call", call},
                            {"way", way.name},
                            {"best_p50_us", p50},
                            {"best_p99_us", p99},
                            {"median_p50_us", median}};
      if (call == kSmall || talk) {
        std::printf("%-46s %-24s %10.1f %10.1f %10.1f\n", call, way.name, p50, p99, median);
      } else {
        const double rate = static_cast<double>(LargeCall::kBytes) / p50 / 1e3;
        row["gigabytes_per_second"] = rate;
        std::printf("%-46s %-24s %10.1f %10.1f %10.1f %8.2f\n", call, way.name, p50, p99, median, rate);
      }
      rows.push_back(row);
    }
  }
  if (json_file.empty()) return 0;
  const std::time_t now = std::time(nullptr);
  char date[32];
  std::strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  std::string command = "kvtide_bench_pool";
  for (int i = 1; i < argc; i++) absl::StrAppend(&command, " ", argv[i]);
  std::ofstream(json_file) << nlohmann::json{{"benchmark", "pool"},
                                             {"hardware", Processor()},
                                             {"processors", ::sysconf(_SC_NPROCESSORS_ONLN)},
                                             {"date", date},
                                             {"command", command},
                                             {"load_average", {load_before, LoadAverage()}},
                                             {"results", rows}}
                                  .dump(1)
                           << "\n";
  return 0;
}
