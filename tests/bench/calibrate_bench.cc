// What a calibration from traffic costs the calls that it looks at: AppendAttend of realistic rows (8 KV
// heads, 32 query heads, head dim 128, f16) with turbo4 on the CPU, through KvCache, without a calibration
// and with one, in turns.
//     calibrate_bench [--json FILE] [--rounds N]
// Of calls of a decode step and of prompts: microseconds of the calling thread on a processor (median over
// rounds of the mean of a round's calls), and the longest call of the median round; and what the calibration
// says that it has spent, its own thread included.
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "daemon/cache/kv_cache.h"
#include "daemon/calibrate/calibrator.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/bench/must.h"
#include "tests/bench/result_file.h"
#include "tests/bench/rounds.h"

namespace kvtide::bench {
namespace {

constexpr int kLayers = 4, kKvHeads = 8, kHeads = 32, kDim = 128;
constexpr size_t kKvRow = size_t{kKvHeads} * kDim, kQRow = size_t{kHeads} * kDim;

double ThreadMicroseconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return 1e6 * static_cast<double>(now.tv_sec) + 1e-3 * static_cast<double>(now.tv_nsec);
}

struct Shape {
  const char* name;
  int sequences;
  int64_t tokens;  // that are there
  int64_t rows;    // of a call and sequence
  int steps;       // of a round
};

struct Times {
  std::vector<double> mean_us, longest_us;  // of the calls of each round
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

std::vector<uint16_t> Rows(size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<uint16_t> rows(count);
  for (uint16_t& value : rows) value = F32ToF16(normal(random));
  return rows;
}

class Bench {
 public:
  explicit Bench(const Shape& shape) : shape_(shape) {
    CpuBackendOptions cpu;
    cpu.threads = 1;  // all of a call's time is its thread's
    backend_ = MakeCpuBackend(cpu);
    CacheOptions options;
    options.tiers.push_back({"device", backend_.get(), size_t{1} << 30});
    options.background_moves = false;
    options.traffic = &calibrator_;
    cache_ = Must(KvCache::Create(options));
    plan_.model = UniformModel("m", {kLayers, kKvHeads, kDim, kDim}, kHeads);
    plan_.family = model_ = Must(cache_->RegisterModel(plan_.model));
    plan_.tenant = "default";
    plan_.ropes.resize(kLayers);
    for (Rope& rope : plan_.ropes)
      for (int i = 0; i < kDim / 2; i++)
        rope.frequencies.push_back(std::pow(5e5f, -2.0f * static_cast<float>(i) / kDim));
    plan_.tokens = 1 << 22;  // no end
    plan_.held_back = 64;
    std::mt19937 random(1);
    const auto count = static_cast<size_t>(shape.sequences * shape.rows);
    q_ = Rows(count * kQRow, random);
    k_ = Rows(count * kKvRow, random);
    v_ = Rows(count * kKvRow, random);
    out_.resize(count * kQRow);
    SequenceOptions sequence;
    sequence.pair = Must(ParseCachePair("turbo4"));
    const std::vector<uint16_t> fill = Rows(static_cast<size_t>(shape.tokens) * kKvRow, random);
    for (int i = 0; i < shape.sequences; i++) {
      ids_.push_back(Must(cache_->CreateSequence(model_, sequence)));
      std::vector<LayerKv> layers;
      for (int l = 0; l < kLayers; l++)
        layers.push_back({l, {fill.data(), DataType::kF16}, {fill.data(), DataType::kF16}, 0, 0});
      Must(cache_->Append({.sequence = ids_.back(), .tokens = shape.tokens, .layers = layers}));
    }
    position_ = shape.tokens;
  }

  void Calibrate(bool on) {
    if (on) {
      Must(calibrator_.Start(plan_));
    } else {
      Must(calibrator_.Stop(model_));
    }
  }
  CalibrationStatus Status() { return Must(calibrator_.StatusOf(model_)); }

  void Round(Times* times) {
    double all = 0, longest = 0;
    for (int step = 0; step < shape_.steps; step++) {
      for (int layer = 0; layer < kLayers; layer++) {
        const double begin = ThreadMicroseconds();
        Call(layer);
        const double took = ThreadMicroseconds() - begin;
        all += took;
        longest = std::max(longest, took);
      }
      position_ += shape_.rows;
    }
    for (const SequenceId id : ids_) Must(cache_->TruncateSequence(id, shape_.tokens));
    position_ = shape_.tokens;
    times->mean_us.push_back(all / (shape_.steps * kLayers));
    times->longest_us.push_back(longest);
  }

 private:
  void Call(int layer) {
    std::vector<AttendRequest> requests(ids_.size());
    for (size_t i = 0; i < ids_.size(); i++) {
      AttendRequest& request = requests[i];
      const size_t row = i * static_cast<size_t>(shape_.rows);
      request.sequence = ids_[i];
      request.q = {q_.data() + row * kQRow, DataType::kF16};
      request.queries = request.new_tokens = shape_.rows;
      request.first_query_position = request.start_position = position_;
      request.out = {out_.data() + row * kQRow, DataType::kF16};
      request.k = {k_.data() + row * kKvRow, DataType::kF16};
      request.v = {v_.data() + row * kKvRow, DataType::kF16};
    }
    Must(cache_->AppendAttend({.layer = layer, .items = requests}));
  }

  const Shape shape_;
  Calibrator calibrator_{{CalibratorOptions::Models::kAsked, int64_t{1} << 30}};
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<KvCache> cache_;
  CalibrationPlan plan_;
  ModelId model_ = 0;
  std::vector<SequenceId> ids_;
  std::vector<uint16_t> q_, k_, v_, out_;
  int64_t position_ = 0;
};

int Run(int rounds, const std::string& json) {
  Result result = {{"benchmark", "calibrate_bench"}, {"calls", Result::array()}};
  for (const Shape& shape :
       {Shape{"decode, 8 x 4096", 8, 4096, 1, 20}, Shape{"decode, 1 x 1024", 1, 1024, 1, 60},
        Shape{"prompt, 1 x 512 at 1024", 1, 1024, 512, 1}}) {
    Bench bench(shape);
    Times without, with;
    double spent = 0, observed = 0;
    int64_t tokens = 0;
    bench.Round(&without);  // warms up
    without = {};
    for (int round = 0; round < rounds; round++) {
      bench.Round(&without);
      bench.Calibrate(true);
      bench.Round(&with);
      const CalibrationStatus status = bench.Status();
      spent += absl::ToDoubleSeconds(status.spent);
      observed += absl::ToDoubleSeconds(status.observed);
      tokens += status.most_tokens;
      bench.Calibrate(false);
    }
    const double before = Median(without.mean_us), after = Median(with.mean_us);
    std::printf(
        "%-24s %9.1f us a call, calibrated %9.1f (%+.2f %%); longest %9.1f and %9.1f; spent in all %.3f s of "
        "%.1f s (%.2f %%)\n",
        shape.name, before, after, 100 * (after / before - 1), Median(without.longest_us),
        Median(with.longest_us), spent, observed, 100 * spent / observed);
    result["calls"].push_back({{"name", shape.name},
                               {"call_us", Tenth(before)},
                               {"calibrated_us", Tenth(after)},
                               {"longest_us", Tenth(Median(without.longest_us))},
                               {"calibrated_longest_us", Tenth(Median(with.longest_us))},
                               {"spent_percent", std::round(1e4 * spent / observed) / 100},
                               {"tokens_of_a_layer", tokens}});
  }
  return WriteResult(result, json);
}

}  // namespace
}  // namespace kvtide::bench

int main(int argc, char** argv) {
  return kvtide::bench::RunRounds(argc, argv, "calibrate_bench", 15, kvtide::bench::Run);
}
