// What an AppendAttend costs the host besides its kernels: decode steps of realistic rows (8 KV heads, 32
// query heads, head dim 128, f16) through KvCache over a backend that does nothing, layer by layer.
//     append_attend_bench [--json FILE] [--rounds N]
// Processor time of a call in microseconds, the least and the median of `rounds` rounds of 20 steps: total,
// and on the path: without what the backend lets the caller do while a device computes.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "daemon/cache/kv_cache.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "tests/bench/idle_backend.h"
#include "tests/bench/result_file.h"
#include "tests/bench/rounds.h"

namespace kvtide::bench {
namespace {

constexpr int kLayers = 4, kKvHeads = 8, kHeads = 32, kDim = 128, kSteps = 20;
constexpr size_t kKvRow = size_t{kKvHeads} * kDim, kQRow = size_t{kHeads} * kDim;

// This thread's time on a processor: what others do meanwhile does not count.
double Microseconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return 1e6 * static_cast<double>(now.tv_sec) + 1e-3 * static_cast<double>(now.tv_nsec);
}

// Plans nothing, computes nothing, and takes the time of the caller's work.
class TimedBackend : public IdleBackend {
 public:
  absl::StatusOr<std::unique_ptr<AttendPlan>> PlanAttend(const AttendPlanArgs&,
                                                         std::unique_ptr<AttendPlan>) override {
    return std::make_unique<AttendPlan>();
  }
  absl::Status AttendLayer(AttendPlan&, const AttendLayerArgs& args) override {
    if (args.meanwhile == nullptr) return absl::OkStatus();
    const double begin = Microseconds();
    const absl::Status status = (*args.meanwhile)();
    meanwhile += Microseconds() - begin;
    return status;
  }
  double meanwhile = 0;
};

struct Times {
  std::vector<double> total, path;  // of a call, one for each round
};

struct Batch {
  int sequences;
  int64_t tokens;
};

Times Measure(const Batch& batch, int rounds) {
  TimedBackend backend;
  CacheOptions options;
  options.tiers.push_back({"device", &backend, size_t{1} << 42, false});
  options.background_moves = false;
  const std::unique_ptr<KvCache> cache = KvCache::Create(options).value();
  const ModelId model =
      cache->RegisterModel(UniformModel("m", {kLayers, kKvHeads, kDim, kDim}, kHeads)).value();
  SequenceOptions sequence;
  sequence.pair = ParseCachePair("turbo4").value();
  const auto count = static_cast<size_t>(batch.sequences);
  constexpr int64_t kChunk = 1024;
  const std::vector<uint16_t> fill(kChunk * kKvRow, F32ToF16(0.5f));
  std::vector<SequenceId> ids;
  for (size_t i = 0; i < count; i++) {
    ids.push_back(cache->CreateSequence(model, sequence).value());
    for (int64_t at = 0; at < batch.tokens; at += kChunk) {
      std::vector<LayerKv> layers;
      for (int l = 0; l < kLayers; l++)
        layers.push_back({l, {fill.data(), DataType::kF16}, {fill.data(), DataType::kF16}, 0, 0});
      AppendCall call;
      call.sequence = ids.back();
      call.start_position = at;
      call.tokens = std::min(kChunk, batch.tokens - at);
      call.layers = layers;
      KVTIDE_CHECK(cache->Append(call).ok());
    }
  }
  const std::vector<uint16_t> q(count * kQRow, F32ToF16(0.1f)), k(count * kKvRow, F32ToF16(0.2f)),
      v(count * kKvRow, F32ToF16(0.3f));
  std::vector<uint16_t> out(count * kQRow);
  std::vector<float> lse(count * kHeads);
  std::vector<AttendRequest> requests(count);
  Times times;
  int64_t position = batch.tokens;
  for (int round = -1; round < rounds; round++) {  // the first one warms up
    backend.meanwhile = 0;
    const double begin = Microseconds();
    for (int step = 0; step < kSteps; step++, position++)
      for (int layer = 0; layer < kLayers; layer++) {
        for (size_t i = 0; i < count; i++) {
          AttendRequest& request = requests[i];
          request.sequence = ids[i];
          request.q = {q.data() + i * kQRow, DataType::kF16};
          request.queries = request.new_tokens = 1;
          request.first_query_position = request.start_position = position;
          request.out = {out.data() + i * kQRow, DataType::kF16};
          request.lse = lse.data() + i * kHeads;
          request.k = {k.data() + i * kKvRow, DataType::kF16};
          request.v = {v.data() + i * kKvRow, DataType::kF16};
        }
        AttendCall call;
        call.layer = layer;
        call.items = requests;
        const absl::Status status = cache->AppendAttend(call);
        KVTIDE_CHECK(status.ok(), status.ToString());
      }
    if (round < 0) continue;
    const double total = Microseconds() - begin;
    times.total.push_back(total / (kSteps * kLayers));
    times.path.push_back((total - backend.meanwhile) / (kSteps * kLayers));
  }
  return times;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

int Run(int rounds, const std::string& json) {
  Result result = {{"benchmark", "append_attend_bench"}, {"batches", Result::array()}};
  for (const Batch& batch : {Batch{33, 32768}, Batch{1, 8192}}) {
    const Times times = Measure(batch, rounds);
    const auto least = [](const std::vector<double>& values) {
      return *std::min_element(values.begin(), values.end());
    };
    std::printf("%3d x %6ld: %6.1f us a call (median %6.1f), on the path %6.1f (median %6.1f)\n",
                batch.sequences, static_cast<long>(batch.tokens), least(times.total), Median(times.total),
                least(times.path), Median(times.path));
    result["batches"].push_back({{"sequences", batch.sequences},
                                 {"tokens", batch.tokens},
                                 {"call_us", Tenth(least(times.total))},
                                 {"call_median_us", Tenth(Median(times.total))},
                                 {"path_us", Tenth(least(times.path))},
                                 {"path_median_us", Tenth(Median(times.path))}});
  }
  return WriteResult(result, json);
}

}  // namespace
}  // namespace kvtide::bench

int main(int argc, char** argv) {
  return kvtide::bench::RunRounds(argc, argv, "append_attend_bench", 20, kvtide::bench::Run);
}
