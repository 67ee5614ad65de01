// A decode step of an engine that keeps its own pages (paged_attention.h): 32 layers of writing new rows and
// attending, every sequence with the default exact window beside its coded pages; beside the bare kernels
// (DeviceDecode over the same amounts of blocks, as gpu_step_bench) in the same run. Then the rows of a
// prefill chunk, and the seals of a step.
//   paged_attention_bench [--json FILE] [--quick] [--pairs turbo4,f16]
// Calibrated keys are those coded after RoPE; there are no bare kernels beside them.
// Microseconds, medians of 20. "above": a layer of the step in a CUDA graph, with writing, beside a layer of
// the bare kernels in one. "called": the same verb by verb without a graph.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "absl/strings/str_split.h"
#include "kernels/cuda/step/cuda_paged_attention.h"
#include "tests/bench/gpu_step.h"
#include "tests/bench/tide_profile.h"

namespace kvtide::bench {
namespace {

size_t Size(int64_t n) { return static_cast<size_t>(n); }

void Ok(const absl::Status& status) {
  if (status.ok()) return;
  std::printf("%s\n", std::string(status.message()).c_str());
  std::exit(1);
}

class Times {
 public:
  Times() {
    KVTIDE_BENCH_CUDA(cudaStreamCreate(&stream_));
    KVTIDE_BENCH_CUDA(cudaEventCreate(&begin_));
    KVTIDE_BENCH_CUDA(cudaEventCreate(&end_));
  }
  cudaStream_t stream() const { return stream_; }
  // Between events, median of 20.
  double Microseconds(const std::function<void()>& work) const {
    std::vector<double> us;
    for (int i = 0; i < 23; i++) {
      KVTIDE_BENCH_CUDA(cudaEventRecord(begin_, stream_));
      work();
      KVTIDE_BENCH_CUDA(cudaEventRecord(end_, stream_));
      KVTIDE_BENCH_CUDA(cudaEventSynchronize(end_));
      float ms = 0;
      KVTIDE_BENCH_CUDA(cudaEventElapsedTime(&ms, begin_, end_));
      if (i >= 3) us.push_back(1e3 * static_cast<double>(ms));
    }
    std::sort(us.begin(), us.end());
    return us[us.size() / 2];
  }
  double InGraph(const std::function<void()>& work) const {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    KVTIDE_BENCH_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    work();
    KVTIDE_BENCH_CUDA(cudaStreamEndCapture(stream_, &graph));
    KVTIDE_BENCH_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    const double us = Microseconds([&] { KVTIDE_BENCH_CUDA(cudaGraphLaunch(exec, stream_)); });
    KVTIDE_BENCH_CUDA(cudaGraphExecDestroy(exec));
    KVTIDE_BENCH_CUDA(cudaGraphDestroy(graph));
    return us;
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

// An engine's step: `new_tokens` of each sequence, `exact` blocks of each in f16.
struct Engine {
  PagedOptions options;
  std::vector<PagedLayer> layers;
  Profile profile;  // of calibrated keys, for all layers
  PagedStep step;
  std::vector<void*> owned;
  uint16_t *qkv = nullptr, *out = nullptr;
  std::unique_ptr<PagedAttention> attention;

  Engine(const char* pair, const Step& of, int new_tokens) {
    std::mt19937 rng(5);
    const int64_t sequences = of.sequences, length = of.tokens + kTailTokens,
                  blocks = (length + kBlockTokens - 1) / kBlockTokens,
                  first = (length - new_tokens) / kBlockTokens;
    options.shape = {1, kKvHeads, kDim, kDim};
    options.pair = *ParseCachePair(pair);
    const bool all_exact = options.pair == ExactPair();
    const int64_t coded = all_exact ? 0 : std::max<int64_t>(0, first - 3), exact = blocks - coded;
    options.heads = kHeads;
    options.scale = 1.0f / std::sqrt(static_cast<float>(kDim));
    options.type = options.output_type = DataType::kF16;
    options.max_sequences = of.sequences;
    options.max_tokens = of.sequences * new_tokens;
    options.max_coded_blocks = static_cast<int>(coded);
    options.max_exact_blocks = static_cast<int>(exact);
    options.exact_pages = static_cast<int>(sequences * exact);
    options.max_seals = std::max(of.sequences, of.sequences * new_tokens / kBlockTokens);
    const bool calibrated = Info(options.pair.k).calibrated;
    if (calibrated) profile = MakeProfile(kKvHeads, kDim, true);
    for (int l = 0; l < kLayers; l++) {
      PagedLayer layer;
      if (calibrated) layer.keys = profile.k.data();
      if (coded > 0) {
        const BlockLayout page = CodedPage(options);
        const std::vector<std::byte*> made = MakeBlocks(page, Size(sequences * coded), rng, &owned);
        layer.coded = *std::min_element(made.begin(), made.end());
      }
      const std::vector<std::byte*> made =
          MakeBlocks(ExactPage(options), Size(sequences * exact), rng, &owned);
      layer.exact = *std::min_element(made.begin(), made.end());
      layers.push_back(layer);
    }
    const auto shuffled = [&](int64_t count) {
      std::vector<int32_t> pages(Size(count));
      for (size_t i = 0; i < pages.size(); i++) pages[i] = static_cast<int32_t>(i);
      std::shuffle(pages.begin(), pages.end(), rng);
      return pages;
    };
    const std::vector<int32_t> coded_pages = shuffled(sequences * coded),
                               exact_pages = shuffled(sequences * exact);
    std::vector<int32_t> coded_table(Size(sequences * blocks)), start, lengths, coded_first, coded_count,
        slots, seals;
    for (int64_t s = 0; s < sequences; s++) {
      start.push_back(static_cast<int32_t>(s * new_tokens));
      lengths.push_back(static_cast<int32_t>(length));
      coded_first.push_back(coded > 0 ? 1 : 0);
      coded_count.push_back(static_cast<int32_t>(coded));
      for (int64_t b = 0; b < coded; b++)
        coded_table[Size(s * blocks + 1 + b)] = coded_pages[Size(s * coded + b)];
      for (int64_t t = length - new_tokens; t < length; t++)
        slots.push_back(static_cast<int32_t>(
            exact_pages[Size(s * exact + t / kBlockTokens - coded)] * kBlockTokens + t % kBlockTokens));
      // Seals: the blocks that the new tokens fill, or one for each sequence.
      for (int64_t b = new_tokens > 1 ? 0 : exact - 1; b < exact && coded > 0; b++)
        if (Size(options.max_seals) > seals.size() / 2) {
          seals.push_back(exact_pages[Size(s * exact + b)]);
          seals.push_back(coded_pages[Size(s * coded + b % coded)]);
        }
    }
    start.push_back(static_cast<int32_t>(sequences * new_tokens));
    step.sequences = of.sequences;
    step.tokens = of.sequences * new_tokens;
    step.most_queries = new_tokens;
    step.query_start = Upload(start, &owned);
    step.lengths = Upload(lengths, &owned);
    step.coded_first = Upload(coded_first, &owned);
    step.coded_count = Upload(coded_count, &owned);
    step.coded_table = Upload(coded_table, &owned);
    step.coded_row = blocks;
    step.exact_table = Upload(exact_pages, &owned);
    step.exact_row = exact;
    step.write_slots = Upload(slots, &owned);
    step.seals = static_cast<int>(seals.size() / 2);
    if (step.seals > 0) step.seal_pages = Upload(seals, &owned);
    qkv = Upload(std::vector<uint16_t>(Size(step.tokens) * kRow, 0x3400), &owned);
    out = Upload(std::vector<uint16_t>(Size(step.tokens) * kHeads * kDim), &owned);
    auto made = MakeCudaPagedAttention(options, layers);
    Ok(made.status());
    attention = std::move(made).value();
  }
  ~Engine() {
    attention.reset();
    for (void* p : owned) KVTIDE_BENCH_CUDA(cudaFree(p));
  }
  // A fused projection: q, k and v of a token side by side.
  static constexpr int64_t kRow = (kHeads + 2 * kKvHeads) * kDim;
  void Plan(cudaStream_t stream) const { Ok(attention->Plan(step, stream)); }
  void Write(int layer, cudaStream_t stream) const {
    Ok(attention->Write(layer, {qkv + kHeads * kDim, kRow}, {qkv + (kHeads + kKvHeads) * kDim, kRow},
                        stream));
  }
  void WriteAttend(int layer, cudaStream_t stream) const {
    Ok(attention->WriteAttend(layer, {qkv + kHeads * kDim, kRow}, {qkv + (kHeads + kKvHeads) * kDim, kRow},
                              {qkv, kRow}, {out, kHeads * kDim}, nullptr, stream));
  }
  void Attend(int layer, cudaStream_t stream) const {
    Ok(attention->Attend(layer, {qkv, kRow}, {out, kHeads * kDim}, nullptr, stream));
  }
};

struct Result {
  double bare = 0, step = 0, apart = 0, attend = 0, called = 0, plan = 0, seal = 0, host = 0;
  size_t bytes = 0;
};

Result Measure(const char* pair, const Step& step, const Times& times) {
  Result result;
  double megabytes = 0;
  size_t plan_bytes = 0;
  Ok(ParseCachePair(pair).status());
  const bool calibrated = Info(ParseCachePair(pair)->k).calibrated;
  result.bare = calibrated ? std::nan("") : StepMicroseconds(pair, step, &megabytes, &plan_bytes);
  const Engine engine(pair, step, 1);
  const cudaStream_t stream = times.stream();
  engine.Plan(stream);  // rows of q and out begin where they do from now on
  engine.Attend(0, stream);
  enum class Rows { kNone, kApart, kTogether };
  const auto layers = [&](Rows rows) {
    engine.Plan(stream);
    for (int l = 0; l < kLayers; l++) {
      if (rows == Rows::kApart) engine.Write(l, stream);
      rows == Rows::kTogether ? engine.WriteAttend(l, stream) : engine.Attend(l, stream);
    }
  };
  result.step = times.InGraph([&] { layers(Rows::kTogether); });
  result.apart = times.InGraph([&] { layers(Rows::kApart); });
  result.attend = times.InGraph([&] { layers(Rows::kNone); });
  result.called = times.Microseconds([&] { layers(Rows::kTogether); });
  result.plan = times.InGraph([&] { engine.Plan(stream); });
  if (engine.step.seals > 0) result.seal = times.InGraph([&] { Ok(engine.attention->SealLayers(stream)); });
  KVTIDE_BENCH_CUDA(cudaStreamSynchronize(stream));
  const auto begin = std::chrono::steady_clock::now();
  layers(Rows::kTogether);  // what the calls take the host
  result.host = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
  KVTIDE_BENCH_CUDA(cudaStreamSynchronize(stream));
  result.bytes = engine.attention->bytes();
  return result;
}

int Run(const std::string& json, bool quick, const std::vector<std::string>& pairs) {
  cudaDeviceProp device{};
  KVTIDE_BENCH_CUDA(cudaGetDeviceProperties(&device, 0));
  const Times times;
  std::string text = "{\n  \"device\": \"" + std::string(device.name) +
                     "\",\n  \"layers\": " + std::to_string(kLayers) + ",\n  \"steps\": [";
  std::printf("%s, %d layers, %d KV heads, %d query heads, d %d; microseconds a step\n", device.name, kLayers,
              kKvHeads, kHeads, kDim);
  bool first = true;
  const std::vector<Step> steps = quick ? std::vector<Step>{{4, 1024}}
                                        : std::vector<Step>{{64, 4096}, {64, 8192}, {16, 32768}, {1, 8192}};
  for (const Step& step : steps)
    for (const std::string& name : pairs) {
      const char* const pair = name.c_str();
      const Result r = Measure(pair, step, times);
      const auto number = [](double value, int digits) {
        char digits_of[32];
        std::snprintf(digits_of, sizeof digits_of, "%.*f", digits, value);
        return std::string(std::isnan(value) ? "null" : digits_of);
      };
      std::printf(
          "%4d x %6d  %-12s bare %7.0f  step %7.0f  above a layer %5.2f (%.2f without writing, %.2f written "
          "apart)  called %7.0f  "
          "plan %4.0f  seals %4.0f  host %4.0f  %.0f MB\n",
          step.sequences, step.tokens, pair, r.bare, r.step, (r.step - r.bare) / kLayers,
          (r.attend - r.bare) / kLayers, (r.apart - r.bare) / kLayers, r.called, r.plan, r.seal, r.host,
          static_cast<double>(r.bytes) / 1e6);
      char line[500];
      std::snprintf(
          line, sizeof line,
          "%s\n    {\"pair\": \"%s\", \"sequences\": %d, \"tokens\": %d, \"bare_us\": %s, "
          "\"step_us\": %.1f, "
          "\"above_a_layer_us\": %s, \"above_without_writing_us\": %s, "
          "\"above_written_apart_us\": %s, \"called_us\": %.1f, "
          "\"plan_us\": %.1f, "
          "\"seal_of_every_sequence_us\": %.1f, \"host_us\": %.1f, \"bytes\": %zu}",
          first ? "" : ",", pair, step.sequences, step.tokens, number(r.bare, 1).c_str(), r.step,
          number((r.step - r.bare) / kLayers, 2).c_str(), number((r.attend - r.bare) / kLayers, 2).c_str(),
          number((r.apart - r.bare) / kLayers, 2).c_str(), r.called, r.plan, r.seal, r.host, r.bytes);
      text += line;
      first = false;
    }
  text += "\n  ]";
  {
    const int chunk = quick ? 256 : 2048;
    const Engine engine("turbo4", {1, chunk}, chunk);
    const cudaStream_t stream = times.stream();
    engine.Plan(stream);
    const double write = times.InGraph([&] {
      for (int l = 0; l < kLayers; l++) engine.Write(l, stream);
    });
    const double seal = times.InGraph([&] {
      for (int l = 0; l < kLayers; l++) Ok(engine.attention->Seal(l, stream));
    });
    const size_t row_bytes = 2 * kKvHeads * kDim * 2, bytes = Size(chunk) * row_bytes * kLayers;
    std::byte* copy = nullptr;
    KVTIDE_BENCH_CUDA(cudaMalloc(&copy, 2 * bytes));
    const double copied = times.InGraph([&] {
      KVTIDE_BENCH_CUDA(cudaMemcpyAsync(copy, copy + bytes, bytes, cudaMemcpyDeviceToDevice, stream));
    });
    KVTIDE_BENCH_CUDA(cudaFree(copy));
    std::printf("chunk of %d tokens: write %.0f us (%.2f of a copy of the same bytes), seals %.0f us\n",
                chunk, write, copied / write, seal);
    char line[300];
    std::snprintf(
        line, sizeof line,
        ",\n  \"chunk\": {\"tokens\": %d, \"write_us\": %.1f, \"copy_us\": %.1f, \"of_copy\": %.3f, "
        "\"seal_us\": %.1f}\n}\n",
        chunk, write, copied, copied / write, seal);
    text += line;
  }
  if (json.empty()) return 0;
  std::ofstream file(json);
  file << text;
  return file.flush() ? 0 : 1;
}

}  // namespace
}  // namespace kvtide::bench

int main(int argc, char** argv) {
  std::string json;
  bool quick = false;
  std::vector<std::string> pairs = {"turbo4", "f16"};
  for (int i = 1; i < argc; i++) {
    if (std::strcmp(argv[i], "--json") == 0 && i + 1 < argc) {
      json = argv[++i];
    } else if (std::strcmp(argv[i], "--pairs") == 0 && i + 1 < argc) {
      pairs = absl::StrSplit(argv[++i], ',');
    } else if (std::strcmp(argv[i], "--quick") == 0) {
      quick = true;
    } else {
      std::printf("usage: paged_attention_bench [--json FILE] [--quick] [--pairs turbo4,f16]\n");
      return 2;
    }
  }
  return kvtide::bench::Run(json, quick, pairs);
}
