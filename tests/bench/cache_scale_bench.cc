// What questions and bulk verbs cost in a large cache, and what they leave to attention: 10,000 sequences
// with 1,000,000 blocks over a backend that does nothing. Each case gives the time of a call (real_time) and
// attends_kept, the rate of attends of another thread while the calls come `per_second` times a second (0:
// one after another), as a part of its rate without them, in turns of the same run.
//     kvtide_bench_cache_scale --benchmark_out=tests/bench/results/cache_scale.json
#include <benchmark/benchmark.h>
#include <time.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "daemon/cache/kv_cache.h"
#include "daemon/cache/tier/extent_allocator.h"
#include "daemon/metrics/cache_collector.h"
#include "kernels/base/check.h"
#include "tests/bench/idle_backend.h"
#include "tests/bench/samples.h"

namespace kvtide::bench {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kSequences = 10'000, kBlocks = 100, kDim = 64;

// Made once: it takes seconds.
struct World {
  World() {
    CacheOptions options;
    options.tiers.push_back({"device", &device, size_t{1} << 40, false});
    options.tiers.push_back({"host", &host, size_t{1} << 40, false});
    options.background_moves = false;
    cache = KvCache::Create(options).value();
    model = cache->RegisterModel(UniformModel("m", {1, 1, kDim, kDim}, 1)).value();
    for (int i = 0; i < kSequences; i++) sequences.push_back(Open());
  }
  SequenceId Open() const {
    SequenceOptions options;
    options.pair = ExactPair();
    const SequenceId id = cache->CreateSequence(model, options).value();
    const int64_t tokens = int64_t{kBlocks} * kBlockTokens;
    static const std::vector<uint16_t> rows(static_cast<size_t>(tokens) * kDim, 0x3800);
    const LayerKv layer{0, {rows.data(), DataType::kF16}, {rows.data(), DataType::kF16}, 0, 0};
    AppendCall call;
    call.sequence = id;
    call.tokens = tokens;
    call.layers = {&layer, 1};
    KVTIDE_CHECK(cache->Append(call).ok());
    return id;
  }
  void Attend() const { Attend(sequences.front(), int64_t{kBlocks} * kBlockTokens); }
  void Attend(SequenceId sequence, int64_t tokens) const {
    static const std::vector<float> q(kDim, 0.1f);
    float out[kDim], lse;
    AttendRequest item;
    item.sequence = sequence;
    item.q = {q.data(), DataType::kF32};
    item.queries = 1;
    item.first_query_position = tokens - 1;
    item.out = out;
    item.lse = &lse;
    AttendCall call;
    call.items = {&item, 1};
    KVTIDE_CHECK(cache->Attend(call).ok());
  }

  IdleBackend device, host;
  std::unique_ptr<KvCache> cache;
  ModelId model = 0;
  std::vector<SequenceId> sequences;
  // Tokens of each; a sequence is of one client.
  mutable std::vector<int64_t> lengths = std::vector<int64_t>(kSequences, int64_t{kBlocks} * kBlockTokens);
};

World& TheWorld() {
  static World world;
  return world;
}

// Attends one after another on a thread of its own.
class Attender {
 public:
  Attender()
      : thread_([this] {
          while (!stop_.load()) {
            TheWorld().Attend();
            count_.fetch_add(1);
          }
        }) {}
  ~Attender() {
    stop_ = true;
    thread_.join();
  }
  double RateDuring(const std::function<void()>& what) const {
    const auto begin = Clock::now();
    const int64_t before = count_.load();
    what();
    return static_cast<double>(count_.load() - before) /
           std::chrono::duration<double>(Clock::now() - begin).count();
  }

 private:
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> count_{0};
  std::thread thread_;
};

void Measure(benchmark::State& state, const std::function<void()>& call) {
  TheWorld();
  for (auto _ : state) call();
  const int64_t per_second = state.range(0);
  const Attender attender;
  constexpr auto kTurn = std::chrono::milliseconds(300);
  double alone = 0, beside = 0;
  for (int turn = 0; turn < 6; turn++) {
    alone += attender.RateDuring([&] { std::this_thread::sleep_for(kTurn); });
    beside += attender.RateDuring([&] {
      const auto begin = Clock::now();
      for (auto next = begin; Clock::now() < begin + kTurn;) {
        call();
        if (per_second == 0) continue;
        next += std::chrono::microseconds(1'000'000 / per_second);
        std::this_thread::sleep_until(next);
      }
    });
  }
  state.counters["attends_kept"] = beside / alone;
  state.counters["attends_per_second"] = alone / 6;
}

void Stats(benchmark::State& state) {
  Measure(state, [] { benchmark::DoNotOptimize(TheWorld().cache->Stats()); });
}
// A page in the middle.
void ListSequences(benchmark::State& state) {
  SequenceList page;
  page.limit = 100;
  page.after = SequenceId{1} << 63;
  Measure(state, [&] { benchmark::DoNotOptimize(TheWorld().cache->ListSequences(page)); });
}
void Scrape(benchmark::State& state) {
  const metrics::CacheCollector collector([] { return TheWorld().cache->Stats(); });
  Measure(state, [&] { benchmark::DoNotOptimize(collector.Collect()); });
}
BENCHMARK(Stats)->ArgName("per_second")->Arg(10)->Arg(0)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(ListSequences)->ArgName("per_second")->Arg(10)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(Scrape)->ArgName("per_second")->Arg(10)->Unit(benchmark::kMillisecond)->UseRealTime();

// All sequences down and up again: every block is looked at.
void EvictAndPrefetch(benchmark::State& state) {
  const World& world = TheWorld();
  const std::span<const SequenceId> some = std::span(world.sequences).subspan(1, 1000);
  Measure(state, [&] {
    KVTIDE_CHECK(world.cache->Evict(some, 1).ok());
    KVTIDE_CHECK(world.cache->Prefetch(some).ok());
  });
}
BENCHMARK(EvictAndPrefetch)
    ->ArgName("per_second")
    ->Arg(0)
    ->Iterations(1)
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

// 64 clients with 156 sequences each, 50 rounds a second: in each a token is appended to one of them and
// attended, in every eighth it is forked and the fork is closed. Times of calls, by the clock and of the
// processor, which does not count how long a call waited for one of few cores.
class Client {
 public:
  enum Verb { kAppend, kAttend, kFork, kClose, kVerbs };
  static constexpr const char* kNames[kVerbs] = {"append", "attend", "fork", "close"};
  struct Times {
    std::vector<double> micros, processor_micros;
  };

  Client(const World& world, size_t index) : world_(world), first_(index), next_(index) {}

  void Round() {
    const SequenceId id = world_.sequences[next_];
    static const std::vector<uint16_t> row(kDim, 0x3800);
    const LayerKv layer{0, {row.data(), DataType::kF16}, {row.data(), DataType::kF16}, 0, 0};
    AppendCall call;
    call.sequence = id;
    call.start_position = world_.lengths[next_];
    call.tokens = 1;
    call.layers = {&layer, 1};
    Timed(kAppend, [&] { KVTIDE_CHECK(world_.cache->Append(call).ok()); });
    const int64_t length = ++world_.lengths[next_];
    Timed(kAttend, [&] { world_.Attend(id, length); });
    if (rounds_++ % 8 == 0) {
      SequenceId fork = 0;
      Timed(kFork, [&] { fork = world_.cache->ForkSequence(id).value(); });
      Timed(kClose, [&] { KVTIDE_CHECK(world_.cache->CloseSequence(fork).ok()); });
    }
    next_ += kClients;
    if (next_ >= kSequences) next_ = first_;
  }

  static constexpr size_t kClients = 64;
  Times times[kVerbs];

 private:
  template <class F>
  void Timed(Verb verb, F call) {
    const auto begin = Clock::now();
    const double processor = ThreadMicros();
    call();
    times[verb].processor_micros.push_back(ThreadMicros() - processor);
    times[verb].micros.push_back(SecondsSince(begin) * 1e6);
  }
  static double ThreadMicros() {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) * 1e6 + static_cast<double>(time.tv_nsec) / 1e3;
  }

  const World& world_;
  const size_t first_;
  size_t next_;
  int rounds_ = 0;
};

void Report(benchmark::State& state, const std::string& name, const Client::Times& times) {
  state.counters[name + "p50_us"] = At(times.micros, 0.5);
  state.counters[name + "p99_us"] = At(times.micros, 0.99);
  state.counters[name + "processor_p50_us"] = At(times.processor_micros, 0.5);
  state.counters[name + "processor_p99_us"] = At(times.processor_micros, 0.99);
}

// `spread`: each client has its own moment of the 20 ms, as clients that know nothing of each other have;
// else all wake at the same one, and wait for the few cores.
void Clients(benchmark::State& state) {
  constexpr auto kEvery = std::chrono::microseconds(20'000);
  const World& world = TheWorld();
  std::vector<Client> clients;
  for (size_t i = 0; i < Client::kClients; i++) clients.emplace_back(world, i);
  for (auto _ : state) {
    const auto begin = Clock::now() + kEvery;
    std::vector<std::thread> threads;
    for (size_t i = 0; i < clients.size(); i++)
      threads.emplace_back([&client = clients[i], kEvery,
                            first = begin + kEvery * (state.range(0) != 0 ? static_cast<int>(i) : 0) /
                                                static_cast<int>(clients.size())] {
        for (int round = 0; round < 250; round++) {
          std::this_thread::sleep_until(first + kEvery * round);
          client.Round();
        }
      });
    for (std::thread& thread : threads) thread.join();
  }
  Client::Times all;
  for (int verb = 0; verb < Client::kVerbs; verb++) {
    Client::Times of_verb;
    for (const Client& client : clients)
      for (Client::Times* to : {&of_verb, &all}) {
        const Client::Times& from = client.times[verb];
        to->micros.insert(to->micros.end(), from.micros.begin(), from.micros.end());
        to->processor_micros.insert(to->processor_micros.end(), from.processor_micros.begin(),
                                    from.processor_micros.end());
      }
    Report(state, std::string(Client::kNames[verb]) + "_", of_verb);
  }
  state.counters["calls"] = static_cast<double>(all.micros.size());
  Report(state, "", all);
}
BENCHMARK(Clients)->ArgName("spread")->Arg(1)->Arg(0)->Iterations(1)->Unit(benchmark::kSecond)->UseRealTime();

// A block that needs a hole where every second of a million free extents is in use.
void AllocateAmongAMillionExtents(benchmark::State& state) {
  constexpr size_t kPage = 8192, kPages = 2'000'000;
  ExtentAllocator allocator(kPages * kPage);
  for (size_t page = 0; page < kPages; page++)
    KVTIDE_CHECK(allocator.Allocate(kPage, ExtentAllocator::End::kBottom));
  for (size_t page = 0; page < kPages; page += 2) allocator.Free(page * kPage, kPage);
  size_t turn = 0;
  for (auto _ : state) {
    const auto end = ++turn % 2 == 0 ? ExtentAllocator::End::kBottom : ExtentAllocator::End::kTop;
    KVTIDE_CHECK(!allocator.Allocate(kPage * 2, end).has_value());
    const std::optional<size_t> offset = allocator.Allocate(kPage, end);
    allocator.Free(*offset, kPage);
  }
}
BENCHMARK(AllocateAmongAMillionExtents)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace kvtide::bench

BENCHMARK_MAIN();
