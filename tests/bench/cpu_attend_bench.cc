// Speed of the CPU backend: decode attention over pages in memory, prefill attention, and sealing.
//
//   cpu_attend_bench [--types f16,turbo4,...] [--groups 1,4,8] [--threads N] [--megabytes 512] [--dim 128]
//   [--repeats 7]
//                    [--clock wall|cpu] [--simd best|neon|avx512|avx2|plain] [--json FILE]
//
// Types are pairs, or one type for both. K types tide4 to tide1 get a profile made from rows whose
// channels weaken as those of models do; "tide3/turbo3@after-rope" codes keys after RoPE.
//
// Decode: one query over one long sequence of 8 KV heads, larger than the last-level cache, time of a whole
// Attend call (queries turned, states merged). The types take turns, so that what else the machine does meets
// all of them: rates are medians of the rounds, ratios to the first type medians of each round's ratio.
// GB/s of stored bytes; f16-equivalent = what an f16 cache of the same tokens would have needed; share = of
// plain reads of the same memory by as many threads, measured in the same run.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kernels/base/check.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/format/page_codec.h"
#include "kernels/format/tide_maker.h"

namespace kvtide {
namespace {

struct Options {
  std::vector<std::string> types = {"f16", "q8_0", "q5_0", "q4_0", "turbo4", "wht4", "turbo3", "turbo2"};
  std::vector<int> groups = {1, 4, 8};
  int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  size_t megabytes = 512;
  int dim = 128;
  int repeats = 7;
  bool cpu_clock = false;
  SimdLevel simd = SimdLevel::kBest;
  std::string json;
};

Options ParseOptions(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    const auto list = [&] { return std::vector<std::string>(absl::StrSplit(value, ',')); };
    if (name == "--types") {
      options.types = list();
    } else if (name == "--groups") {
      options.groups.clear();
      for (const std::string& g : list()) options.groups.push_back(std::stoi(g));
    } else if (name == "--threads") {
      options.threads = std::stoi(value);
    } else if (name == "--megabytes") {
      options.megabytes = std::stoul(value);
    } else if (name == "--dim") {
      options.dim = std::stoi(value);
    } else if (name == "--repeats") {
      options.repeats = std::stoi(value);
    } else if (name == "--clock") {
      options.cpu_clock = value == "cpu";
    } else if (name == "--simd") {
      options.simd = SimdLevel::kBest;
      for (SimdLevel level : SupportedSimdLevels())
        if (value == SimdLevelName(level)) options.simd = level;
    } else if (name == "--json") {
      options.json = value;
    } else {
      std::fprintf(stderr, "unknown option %s; see the head of cpu_attend_bench.cc\n", name.c_str());
      std::exit(2);
    }
  }
  return options;
}

int cpu_clock_threads = 0;  // > 0: processor time, divided by this

double Now() {
  if (cpu_clock_threads == 0)
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return (static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec)) / cpu_clock_threads;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double Seconds(const std::function<void()>& body) {
  const double start = Now();
  body();
  return Now() - start;
}

double MedianSeconds(int repeats, const std::function<void()>& body) {
  std::vector<double> seconds;
  body();
  for (int i = 0; i < repeats; i++) seconds.push_back(Seconds(body));
  return Median(seconds);
}

// Seconds of each body in each round, after a round that does not count: [body][round].
std::vector<std::vector<double>> RoundSeconds(int rounds, const std::vector<std::function<void()>>& bodies) {
  std::vector<std::vector<double>> seconds(bodies.size());
  for (int round = -1; round < rounds; round++)
    for (size_t i = 0; i < bodies.size(); i++) {
      const double time = Seconds(bodies[i]);
      if (round >= 0) seconds[i].push_back(time);
    }
  return seconds;
}

// Blocks of random tokens: a few distinct ones, repeated through the slab in random order of their bytes'
// origin.
struct Pages {
  BlockLayout layout;
  std::shared_ptr<const Profile> profile;  // of calibrated types
  std::unique_ptr<Slab> slab;
  std::vector<std::byte*> blocks;
  int64_t tokens() const { return static_cast<int64_t>(blocks.size()) * kBlockTokens; }
};

std::vector<float> RandomRows(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(count);
  for (float& x : rows) x = normal(random);
  return rows;
}

constexpr char kAfterRope[] = "@after-rope";

CachePair PairOf(const std::string& name) {
  const auto pair = ParseCachePair(std::string(absl::StripSuffix(name, kAfterRope)));
  KVTIDE_CHECK(pair.ok(), pair.status().ToString());
  return *pair;
}

// Channels and queries that weaken by a factor of 50 from the first to the last; RoPE of base 10,000.
std::shared_ptr<const Profile> MakeProfileOf(const GroupShape& shape, bool after_rope) {
  constexpr int kTokens = 2048;
  const int dim = shape.head_dim_k;
  Rope rope;
  for (int i = 0; i < dim / 2; i++)
    rope.frequencies.push_back(std::pow(1e-4f, 2.0f * static_cast<float>(i) / static_cast<float>(dim)));
  std::vector<KeyStatistics> heads;
  for (int head = 0; head < shape.layers * shape.kv_heads; head++) {
    KeyStatistics& statistics = heads.emplace_back(dim, after_rope ? Rope() : rope);
    std::vector<float> k = RandomRows(static_cast<size_t>(kTokens * dim), 200 + static_cast<uint32_t>(head)),
                       q = RandomRows(static_cast<size_t>(kTokens * dim), 300 + static_cast<uint32_t>(head));
    for (int t = 0; t < kTokens; t++)
      for (auto* rows : {&k, &q}) {
        float* row = rows->data() + t * dim;
        for (int i = 0; i < dim; i++)
          row[i] *= std::exp(-3.9f * static_cast<float>((i * 37 + head) % dim) / static_cast<float>(dim));
        TurnKey(rope, t, 0, false, row);
      }
    statistics.AddKeys(k.data(), kTokens, static_cast<size_t>(dim), 0);
    statistics.AddQueries(q.data(), kTokens, static_cast<size_t>(dim), 0);
  }
  absl::StatusOr<Profile> profile = MakeTideProfile(shape, heads);
  KVTIDE_CHECK(profile.ok(), profile.status().ToString());
  return std::make_shared<const Profile>(*std::move(profile));
}

Pages MakePages(Backend& backend, const GroupShape& shape, const std::string& pair, size_t bytes) {
  Pages pages;
  pages.layout = BlockLayout(shape, PairOf(pair));
  if (Info(pages.layout.pair().k).calibrated) {
    static std::shared_ptr<const Profile> profiles[2];  // of the one shape of a run
    const bool after_rope = absl::EndsWith(pair, kAfterRope);
    std::shared_ptr<const Profile>& profile = profiles[after_rope];
    if (profile == nullptr) profile = MakeProfileOf(shape, after_rope);
    pages.profile = profile;
  }
  const size_t count = std::max<size_t>(1, bytes / pages.layout.block_bytes());
  pages.slab = *backend.AllocateSlab(count * pages.layout.block_bytes());
  std::vector<std::byte> sample(pages.layout.block_bytes());
  for (int head = 0; head < shape.kv_heads; head++) {
    const std::vector<float> k =
        RandomRows(static_cast<size_t>(kBlockTokens * shape.head_dim_k), static_cast<uint32_t>(head));
    const std::vector<float> v =
        RandomRows(static_cast<size_t>(kBlockTokens * shape.head_dim_v), static_cast<uint32_t>(head) + 100);
    std::byte* record = sample.data() + pages.layout.RecordOffset(0, head);
    const HeadProfile* profile = pages.profile == nullptr ? nullptr : &pages.profile->key(0, head);
    EncodeHalf(pages.layout.pair().k, Side::kKey, pages.layout.k(), profile, 0, k.data(), kBlockTokens,
               record);
    EncodeHalf(pages.layout.pair().v, Side::kValue, pages.layout.v(), nullptr, v.data(), kBlockTokens,
               record + pages.layout.v_codes());
  }
  for (size_t i = 0; i < count; i++) {
    pages.blocks.push_back(pages.slab->data() + i * pages.layout.block_bytes());
    std::memcpy(pages.blocks.back(), sample.data(), sample.size());
  }
  return pages;
}

// GB/s of plain reads of a slab.
double ReadRate(const Slab& slab, size_t bytes, int threads, int repeats) {
  std::vector<uint64_t> sinks(static_cast<size_t>(threads));
  const double seconds = MedianSeconds(repeats, [&] {
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; t++)
      workers.emplace_back([&, t] {
        const size_t share = bytes / static_cast<size_t>(threads) / 64 * 64;
        const auto* p = reinterpret_cast<const uint64_t*>(slab.data() + share * static_cast<size_t>(t));
        uint64_t sums[8] = {};
        for (size_t i = 0; i < share / 8; i += 8)
          for (size_t j = 0; j < 8; j++) sums[j] += p[i + j];
        for (uint64_t sum : sums) sinks[static_cast<size_t>(t)] += sum;
      });
    for (std::thread& worker : workers) worker.join();
  });
  uint64_t total = 0;
  for (uint64_t sink : sinks) total += sink;
  volatile uint64_t keep = total;
  (void)keep;
  return static_cast<double>(bytes) / seconds / 1e9;
}

// A call of Attend with `queries` queries of `group` heads per KV head at the end of the pages, which are
// borrowed.
std::function<void()> AttendCall(Backend& backend, const Pages& pages, int group, int queries) {
  struct Call {
    std::vector<float> q, out, lse;
    BlockRun run;
    AttendItem item;
    AttendArgs args;
  };
  const GroupShape& shape = pages.layout.shape();
  const size_t heads = static_cast<size_t>(shape.kv_heads * group),
               rows = heads * static_cast<size_t>(queries);
  const auto call = std::make_shared<Call>();
  call->q = RandomRows(rows * static_cast<size_t>(shape.head_dim_k), 7);
  call->out.resize(rows * static_cast<size_t>(shape.head_dim_v));
  call->lse.resize(rows);
  call->run.layout = &pages.layout;
  call->run.profile = pages.profile.get();
  call->run.blocks = pages.blocks;
  call->run.tokens = pages.tokens();
  call->item.runs = {&call->run, 1};
  call->item.q = call->q.data();
  call->item.queries = queries;
  call->item.first_query_position = call->run.tokens - queries;
  call->item.out = call->out.data();
  call->item.lse = call->lse.data();
  call->args.heads = static_cast<int>(heads);
  call->args.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim_k));
  call->args.items = {&call->item, 1};
  return [call, &backend] {
    const absl::Status status = backend.Attend(call->args);
    KVTIDE_CHECK(status.ok(), status.ToString());
  };
}

double RecodeSeconds(Backend& backend, const GroupShape& shape, const std::string& source,
                     const std::string& pair, int blocks, int repeats) {
  const Pages from = MakePages(
      backend, shape, source, static_cast<size_t>(blocks) * BlockLayout(shape, PairOf(source)).block_bytes());
  const Pages to = MakePages(backend, shape, pair,
                             static_cast<size_t>(blocks) * BlockLayout(shape, PairOf(pair)).block_bytes());
  std::vector<RecodePiece> pieces;
  for (size_t i = 0; i < from.blocks.size(); i++) {
    RecodePiece piece;
    piece.from = &from.layout;
    piece.source = from.blocks[i];
    piece.to = &to.layout;
    piece.from_profile = from.profile.get();
    piece.to_profile = to.profile.get();
    piece.position = static_cast<int64_t>(i) * kBlockTokens;
    piece.target = to.blocks[i];
    piece.layers = 1;
    pieces.push_back(piece);
  }
  return MedianSeconds(repeats, [&] {
    const absl::Status status = backend.Recode(pieces);
    KVTIDE_CHECK(status.ok(), status.ToString());
  });
}

std::string CommandOutput(const char* command) {
  std::string text;
  if (FILE* pipe = popen(command, "r")) {
    char buffer[256];
    while (std::fgets(buffer, sizeof(buffer), pipe) != nullptr) text += buffer;
    pclose(pipe);
  }
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

std::string ProcessorName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown";
}

const char* LevelName(const Options& options) {
  return SimdLevelName(options.simd == SimdLevel::kBest ? SupportedSimdLevels().back() : options.simd);
}

std::string Head(const Options& options, const std::string& command) {
  const std::time_t now = std::time(nullptr);
  char date[32];
  std::strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  return absl::StrFormat(
      "{\n  \"benchmark\": \"cpu_attend_bench\",\n  \"command\": \"%s\",\n  \"date\": \"%s\",\n  \"commit\": "
      "\"%s\",\n"
      "  \"processor\": \"%s\",\n  \"threads\": %d,\n  \"simd\": \"%s\",\n  \"kv_heads\": 8,\n  "
      "\"head_dim\": %d,\n"
      "  \"megabytes\": %d,\n",
      command, date, CommandOutput("git rev-parse --short HEAD 2>/dev/null"), ProcessorName(),
      options.threads, LevelName(options), options.dim, options.megabytes);
}

int Main(int argc, char** argv) {
  const Options options = ParseOptions(argc, argv);
  if (options.cpu_clock) cpu_clock_threads = options.threads;
  CpuBackendOptions backend_options;
  backend_options.threads = options.threads;
  backend_options.simd = options.simd;
  const std::unique_ptr<Backend> backend = MakeCpuBackend(backend_options);
  const GroupShape shape{1, 8, options.dim, options.dim};
  const size_t bytes = options.megabytes << 20;
  double read_rate = 0;
  {
    const Pages pages = MakePages(*backend, shape, "f16", bytes);
    read_rate = ReadRate(*pages.slab, pages.blocks.size() * pages.layout.block_bytes(), options.threads,
                         options.repeats);
  }
  std::printf("%s, %d threads, %s, reads %.1f GB/s\n", ProcessorName().c_str(), options.threads,
              LevelName(options), read_rate);
  std::string rows;
  std::printf(
      "\ndecode                   group  bits/value   stored GB/s  f16-eq. GB/s  share of reads  against "
      "first\n");
  std::vector<Pages> pages;
  for (const std::string& type : options.types) pages.push_back(MakePages(*backend, shape, type, bytes));
  for (const int group : options.groups) {
    std::vector<std::function<void()>> calls;
    for (const Pages& p : pages) calls.push_back(AttendCall(*backend, p, group, 1));
    const std::vector<std::vector<double>> seconds = RoundSeconds(options.repeats, calls);
    const auto stored = [&](size_t i) {
      return static_cast<double>(pages[i].blocks.size() * pages[i].layout.block_bytes());
    };
    for (size_t i = 0; i < pages.size(); i++) {
      const double bits = pages[i].layout.BitsPerValue();
      const double rate = stored(i) / Median(seconds[i]) / 1e9, equivalent = rate * 16 / bits;
      std::vector<double> ratios;
      for (size_t round = 0; round < seconds[i].size(); round++)
        ratios.push_back(stored(i) / bits / seconds[i][round] * seconds[0][round] /
                         (stored(0) / pages[0].layout.BitsPerValue()));
      const double ratio = Median(ratios);
      const char* type = options.types[i].c_str();
      std::printf("%-24s %5d %11.3f %13.1f %13.1f %15.2f %12.2f\n", type, group, bits, rate, equivalent,
                  rate / read_rate, ratio);
      absl::StrAppendFormat(
          &rows,
          "%s    {\"type\": \"%s\", \"group\": %d, \"bits_per_value\": %.4f, \"stored_gb_per_s\": %.2f, "
          "\"f16_equivalent_gb_per_s\": %.2f, \"share_of_reads\": %.3f, \"ratio_to_%s\": %.3f}",
          rows.empty() ? "" : ",\n", type, group, bits, rate, equivalent, rate / read_rate, options.types[0],
          ratio);
    }
  }
  pages.clear();
  // Prefill: 512 queries, 4 query heads per KV head, at the end of 4,096 tokens.
  constexpr int kQueries = 512, kTokens = 4096, kGroup = 4;
  std::printf(
      "\nprefill of %d queries over %d tokens, seal of f16 blocks\ntype                     prefill GFLOP/s  "
      " seal M "
      "values/s   to turbo2 M values/s\n",
      kQueries, kTokens);
  std::string more;
  for (const std::string& type : options.types) {
    const Pages short_pages = MakePages(
        *backend, shape, type, BlockLayout(shape, PairOf(type)).block_bytes() * (kTokens / kBlockTokens));
    const double seconds = MedianSeconds(3, AttendCall(*backend, short_pages, kGroup, kQueries));
    const double flop = 4.0 * shape.kv_heads * kGroup * kQueries * (kTokens - kQueries / 2.0) * options.dim;
    const double values = 2.0 * shape.kv_heads * options.dim * kTokens;
    const double seal = values / RecodeSeconds(*backend, shape, "f16", type, kTokens / kBlockTokens, 3);
    const double recode = values / RecodeSeconds(*backend, shape, type, "turbo2", kTokens / kBlockTokens, 3);
    std::printf("%-24s %15.1f %17.1f %23.1f\n", type.c_str(), flop / seconds / 1e9, seal / 1e6, recode / 1e6);
    absl::StrAppendFormat(
        &more,
        "%s    {\"type\": \"%s\", \"prefill_gflop_per_s\": %.1f, \"seal_values_per_s\": %.3g, "
        "\"recode_to_turbo2_values_per_s\": %.3g}",
        more.empty() ? "" : ",\n", type, flop / seconds / 1e9, seal, recode);
  }
  if (!options.json.empty()) {
    std::string command = "cpu_attend_bench";
    for (int i = 1; i < argc; i++) command += std::string(" ") + argv[i];
    std::ofstream file(options.json);
    file << Head(options, command) << absl::StrFormat("  \"read_gb_per_s\": %.2f,\n", read_rate)
         << "  \"decode\": [\n"
         << rows << "\n  ],\n  \"prefill_and_seal\": [\n"
         << more << "\n  ]\n}\n";
    if (!file) {
      std::fprintf(stderr, "cannot write %s\n", options.json.c_str());
      return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace kvtide

int main(int argc, char** argv) { return kvtide::Main(argc, argv); }
