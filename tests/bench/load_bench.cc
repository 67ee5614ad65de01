// A prefix from the host tier of a kvtided into an engine's pages, as the vLLM connector loads it: Llama 3.1
// 8B's dimensions in blocks of 64 tokens, a daemon in a process of its own. Both ways in one run, in turns:
// through the arena (the daemon copies, the engine's copier takes it from there) and in place (kvtided
// --host-sharing: the copier takes blocks from where they lie). Beside them a plain copy of as many bytes of
// pinned memory, what the daemon's copy into the arena does alone, and what threads of the host can copy at
// all.
//   kvtide_bench_load [--device cuda:0] [--kvtided PROGRAM] [--json FILE] [--tokens N] [--piece-mib N]
//   [--quick]
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "clients/cli/daemon_process.h"
#include "clients/cpp/block_store.h"
#include "clients/cpp/page_load.h"
#include "clients/cpp/pool.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/cpu_page_copier.h"
#include "kernels/cpu/stream_copy.h"
#include "tests/bench/must.h"
#include "tests/bench/result_file.h"
#ifdef KVTIDE_BENCH_HAS_CUDA
#include <cuda_runtime.h>

#include "kernels/cuda/pages/cuda_page_copier.h"
#include "tests/bench/gpu_check.h"
#endif

namespace kvtide::bench {
namespace {

using client::BlockStore;

constexpr int kBlock = 64;

struct Setting {
  bool cuda = false;
  int layers = 32, heads = 8, dim = 128;
  int tokens = 4096, prefixes = 4, rounds = 21;
  size_t piece_bytes = size_t{32} << 20;
  int blocks() const { return tokens / kBlock; }
  size_t page_bytes() const { return size_t{kBlock} * static_cast<size_t>(heads * dim) * 4; }
};

struct Case {
  const char* name;
  const char* pair;
  bool rows;  // coded and decoded where the engine computes; else pages travel as they are
};

double Seconds(const std::chrono::steady_clock::time_point& begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Memory where the engine computes.
class Memory {
 public:
  Memory(bool cuda, size_t bytes) : cuda_(cuda), bytes_(bytes) {
    if (!cuda) host_.resize(bytes + 64);
    data_ = host_.data();
#ifdef KVTIDE_BENCH_HAS_CUDA
    if (cuda) KVTIDE_BENCH_CUDA(cudaMalloc(&data_, bytes));
#endif
  }
  ~Memory() {
#ifdef KVTIDE_BENCH_HAS_CUDA
    if (cuda_) (void)cudaFree(data_);
#endif
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  std::byte* data() const { return data_; }
  void Put(const std::byte* from, size_t at, size_t bytes) const {
    if (!cuda_) std::memcpy(data_ + at, from, bytes);
#ifdef KVTIDE_BENCH_HAS_CUDA
    if (cuda_) KVTIDE_BENCH_CUDA(cudaMemcpy(data_ + at, from, bytes, cudaMemcpyHostToDevice));
#endif
  }
  std::vector<std::byte> Get() const {
    std::vector<std::byte> out(bytes_);
    if (!cuda_) std::memcpy(out.data(), data_, bytes_);
#ifdef KVTIDE_BENCH_HAS_CUDA
    if (cuda_) KVTIDE_BENCH_CUDA(cudaMemcpy(out.data(), data_, bytes_, cudaMemcpyDeviceToHost));
#endif
    return out;
  }
  void Clear() const {
    if (!cuda_) std::memset(data_, 0, bytes_);
#ifdef KVTIDE_BENCH_HAS_CUDA
    if (cuda_) {
      KVTIDE_BENCH_CUDA(cudaMemset(data_, 0, bytes_));
      KVTIDE_BENCH_CUDA(cudaDeviceSynchronize());
    }
#endif
  }

 private:
  const bool cuda_;
  const size_t bytes_;
  std::vector<std::byte> host_;
  std::byte* data_ = nullptr;
};

// The engine's pages of all layers, room for two prefixes.
struct Engine {
  explicit Engine(const Setting& setting) : pages(2 * setting.blocks()) {
    const size_t bytes = setting.page_bytes() * static_cast<size_t>(pages);
    std::mt19937 random(7);
    std::vector<std::byte> filled(bytes);
    auto* const values = reinterpret_cast<uint16_t*>(filled.data());
    for (size_t i = 0; i < bytes / 2; i++)  // f16 of 1 to 2, and of -2 to -1
      values[i] = static_cast<uint16_t>((random() & 0x83ff) | 0x3c00);
    for (int layer = 0; layer < setting.layers; layer++) {
      layers.push_back(std::make_unique<Memory>(setting.cuda, bytes));
      layers.back()->Put(filled.data(), 0, bytes);
      at.push_back(layers.back()->data());
    }
  }
  const int pages;
  std::vector<std::unique_ptr<Memory>> layers;
  std::vector<std::byte*> at;
};

class Bench {
 public:
  Bench(const Setting& setting, const std::string& address) : setting_(setting), engine_(setting) {
    backend_ = MakeCpuBackend({.threads = 1});
    for (const bool in_place : {false, true}) {
      client::PoolOptions options;
      options.host_tier = in_place;
      options.arena_bytes = static_cast<int64_t>(2 * setting.piece_bytes + (size_t{64} << 20));
      pools_.push_back(Must(Pool::Connect(absl::StrCat("shm:", address), options)));
    }
  }

  Result Measure(const Case& c) {
    PageCopyOptions options;
    options.page_stride = static_cast<int64_t>(setting_.page_bytes());
    options.pages = engine_.pages;
    options.type = DataType::kF16;
    options.tokens = kBlock;
    options.kv_heads = setting_.heads;
    options.head_dim_k = options.head_dim_v = setting_.dim;
    const int64_t dim = setting_.dim;
    options.k = {0, 2 * dim, kBlock * 2 * dim, 1};
    options.v = {dim, 2 * dim, kBlock * 2 * dim, 1};
    options.pair = *ParseCachePair(c.pair);
    const size_t chunk = ChunkBytes(options, engine_.at.size());
    if (!c.rows) options.page_bytes = chunk / engine_.at.size();
    const size_t per_piece = std::max<size_t>(1, setting_.piece_bytes / chunk);
    options.piece_bytes = per_piece * chunk;

    client::NamespaceSpec spec;
    spec.model = absl::StrCat("load bench, ", c.name);
    spec.block_tokens = kBlock;
    spec.content = client::TensorBlocks{setting_.layers, setting_.heads, setting_.dim, setting_.dim, c.pair};
    Result row;
    row["pages"] = c.name;
    row["pair"] = c.pair;
    const double bytes = static_cast<double>(chunk) * setting_.blocks();
    row["megabytes"] = Tenth(1e-6 * bytes);
    std::vector<Way> ways;
    for (const auto& pool : pools_) {
      Way& way = ways.emplace_back();
      way.store = Must(BlockStore::Open(*pool, spec));
      way.copier = MakeCopier(options);
      for (client::TensorBuffer& buffer : way.buffers) {
        buffer = Must(pool->Allocate(options.piece_bytes));
        Must(way.copier->Pin(buffer.data(), buffer.bytes()));
      }
    }
    Way& shared = ways[1];
    const client::HostTier mapped = shared.store->host_tier();
    const std::span<const std::byte> tier = mapped.bytes;
    if (tier.empty()) {
      row["in_place_problem"] = "kvtided shares no host tier with this client";
    } else {
      const auto begin = std::chrono::steady_clock::now();
      const absl::Status pinned = shared.copier->PinReadOnly(tier.data(), tier.size());
      row["tier_mib"] = tier.size() >> 20;
      row["register_tier_ms"] = Tenth(1e3 * Seconds(begin));
      if (!pinned.ok()) row["in_place_problem"] = std::string(pinned.message());
      shared.in_place = pinned.ok();
    }
    row["store_gb_s"] = Tenth(1e-9 * bytes / StoreAll(ways[0], options, chunk));

    for (int round = 0; round < setting_.rounds; round++)
      for (Way& way : ways) LoadOnce(way, round, chunk, nullptr);
    const auto tell = [&](const Way& way) {
      const double load = Median(way.load), all = Median(way.all);
      return Result{
          {"load_ms", Hundredth(1e3 * load)},
          {"load_gb_s", Tenth(1e-9 * bytes / load)},
          {"with_lookup_ms", Hundredth(1e3 * all)},
          {"with_lookup_gb_s", Tenth(1e-9 * bytes / all)},
          {"best_load_gb_s", Tenth(1e-9 * bytes / *std::min_element(way.load.begin(), way.load.end()))},
          {"blocks_in_place", way.blocks_in_place}};
    };
    row["arena"] = tell(ways[0]);
    if (shared.in_place) row["in_place"] = tell(shared);
    row["daemon_copy_gb_s"] = Tenth(1e-9 * bytes / DaemonCopy(ways[0], per_piece, chunk));
    row["plain_copy_gb_s"] = Tenth(1e-9 * bytes / PlainCopy(static_cast<size_t>(bytes)));
    // What came is the same by both ways, and for pages that travel as they are what was stored.
    std::vector<std::vector<std::byte>> by_arena, in_place;
    LoadOnce(ways[0], 0, chunk, &by_arena);
    LoadOnce(shared, 0, chunk, &in_place);
    row["same_bytes"] = by_arena == in_place;
    if (by_arena != in_place) {
      std::fprintf(stderr, "%s: the two ways brought other bytes\n", c.name);
      std::exit(1);
    }
    if (shared.in_place) shared.copier->Unpin(tier.data());
    for (Way& way : ways)
      for (client::TensorBuffer& buffer : way.buffers) way.copier->Unpin(buffer.data());
    (void)Must(ways[0].store->Delete());
    return row;
  }

 private:
  struct Way {
    std::unique_ptr<BlockStore> store;
    std::unique_ptr<PageCopier> copier;
    client::TensorBuffer buffers[PageCopier::kSlots];
    bool in_place = false;
    std::vector<double> load, all;
    int64_t blocks_in_place = 0;  // of the last load
  };

  static double Hundredth(double value) { return std::round(100 * value) / 100; }

  std::unique_ptr<PageCopier> MakeCopier(const PageCopyOptions& options) const {
#ifdef KVTIDE_BENCH_HAS_CUDA
    if (setting_.cuda) return Must(MakeCudaPageCopier(options, engine_.at));
#endif
    return Must(MakeCpuPageCopier(*backend_, options, engine_.at));
  }

  std::vector<std::string> Keys(int prefix) const {
    std::vector<std::string> keys;
    for (int i = 0; i < setting_.blocks(); i++) keys.push_back(absl::StrCat("prefix ", prefix, " block ", i));
    return keys;
  }

  // Pages of the engine in some order; the same for the same seed.
  std::vector<int32_t> Pages(unsigned seed) const {
    std::vector<int32_t> pages(static_cast<size_t>(engine_.pages));
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), std::mt19937(seed));
    pages.resize(static_cast<size_t>(setting_.blocks()));
    return pages;
  }

  // Seconds of the median prefix.
  double StoreAll(Way& way, const PageCopyOptions& options, size_t chunk) {
    std::vector<double> seconds;
    const size_t per_piece = options.piece_bytes / chunk;
    for (int prefix = 0; prefix < setting_.prefixes; prefix++) {
      const std::vector<std::string> names = Keys(prefix);
      const std::vector<std::string_view> keys(names.begin(), names.end());
      const std::vector<int32_t> pages = Pages(static_cast<unsigned>(prefix));
      const auto begin = std::chrono::steady_clock::now();
      for (size_t first = 0; first < keys.size(); first += per_piece) {
        const size_t count = std::min(per_piece, keys.size() - first);
        std::byte* const to = way.buffers[0].data();
        Must(way.copier->Read(0, std::span(pages).subspan(first, count), to));
        Must(way.copier->Wait(0));
        const auto stored = Must(way.store->Store(std::span(keys).subspan(first, count), {to, count * chunk},
                                                  client::BlockForm::kBytes));
        if (stored.stored != static_cast<int64_t>(count)) Must(absl::InternalError("blocks found no room"));
      }
      seconds.push_back(Seconds(begin));
    }
    return Median(seconds);
  }

  // `got`: null, or gets the engine's pages afterwards, which were empty before.
  void LoadOnce(Way& way, int round, size_t chunk, std::vector<std::vector<std::byte>>* got) {
    const std::vector<std::string> names = Keys(round % setting_.prefixes);
    const std::vector<std::string_view> keys(names.begin(), names.end());
    const std::vector<int32_t> pages = Pages(static_cast<unsigned>(1000 + round));
    if (got != nullptr)
      for (const auto& layer : engine_.layers) layer->Clear();
    const auto begin = std::chrono::steady_clock::now();
    const client::LookupBlocksResult found = Must(way.store->Lookup(keys));
    const auto looked_up = std::chrono::steady_clock::now();
    client::PageLoad load;
    load.lease = found.lease;
    load.chunks = found.hits;
    load.pages = pages;
    load.in_place = way.in_place;
    for (int slot = 0; slot < PageCopier::kSlots; slot++)
      load.buffers[slot] = {way.buffers[slot].data(), way.buffers[slot].bytes()};
    client::PageLoadReport report;
    Must(LoadPages(*way.store, *way.copier, load, &report));
    const double loaded = Seconds(looked_up);
    (void)Must(way.store->Release(found.lease));
    const double all = Seconds(begin);
    if (report.chunks != setting_.blocks() || chunk == 0) Must(absl::InternalError("not all blocks came"));
    way.blocks_in_place = report.in_place;
    if (got != nullptr) {
      for (const auto& layer : engine_.layers) got->push_back(layer->Get());
    } else if (round >= 4) {  // the others warm up
      way.load.push_back(loaded);
      way.all.push_back(all);
    }
  }

  double DaemonCopy(Way& way, size_t per_piece, size_t chunk) {
    std::vector<double> seconds;
    for (int round = 0; round < 9; round++) {
      const std::vector<std::string> names = Keys(round % setting_.prefixes);
      const std::vector<std::string_view> keys(names.begin(), names.end());
      const client::LookupBlocksResult found = Must(way.store->Lookup(keys));
      const auto begin = std::chrono::steady_clock::now();
      int slot = 0;
      for (int64_t first = 0; first < found.hits; first += static_cast<int64_t>(per_piece), slot ^= 1) {
        const int64_t count = std::min(static_cast<int64_t>(per_piece), found.hits - first);
        Must(way.store->Load(found.lease, first, count,
                             {way.buffers[slot].data(), static_cast<size_t>(count) * chunk},
                             client::BlockForm::kBytes));
      }
      seconds.push_back(Seconds(begin));
      (void)Must(way.store->Release(found.lease));
    }
    return Median(seconds);
  }

  double PlainCopy(size_t bytes) const {
    std::vector<double> seconds;
    if (!setting_.cuda) {
      std::vector<std::byte> from(bytes), to(bytes);
      for (int i = 0; i < 9; i++) {
        const auto begin = std::chrono::steady_clock::now();
        std::memcpy(to.data(), from.data(), bytes);
        seconds.push_back(Seconds(begin));
      }
    }
#ifdef KVTIDE_BENCH_HAS_CUDA
    if (setting_.cuda) {
      std::byte *from = nullptr, *to = nullptr;
      KVTIDE_BENCH_CUDA(cudaMallocHost(&from, bytes));
      std::memset(from, 1, bytes);
      KVTIDE_BENCH_CUDA(cudaMalloc(&to, bytes));
      for (int i = 0; i < 13; i++) {
        const auto begin = std::chrono::steady_clock::now();
        KVTIDE_BENCH_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, nullptr));
        KVTIDE_BENCH_CUDA(cudaStreamSynchronize(nullptr));
        if (i >= 3) seconds.push_back(Seconds(begin));
      }
      KVTIDE_BENCH_CUDA(cudaFree(to));
      KVTIDE_BENCH_CUDA(cudaFreeHost(from));
    }
#endif
    return Median(seconds);
  }

  const Setting setting_;
  Engine engine_;
  std::unique_ptr<Backend> backend_;
  std::vector<std::unique_ptr<Pool>> pools_;  // by the arena, in place
};

// What threads of the host copy from memory like the tier's into memory like the arena's: blocks of 2 MiB,
// into 64 MiB that are used again and again, in GB/s (best of 3). Bounds what a daemon's copy can do.
Result HostCopies(size_t bytes) {
  constexpr size_t kPart = size_t{2} << 20, kTarget = size_t{64} << 20;
  const auto map = [](size_t size, bool file) {
    const int fd = file ? ::memfd_create("bench", MFD_CLOEXEC) : -1;
    if (file && ::ftruncate(fd, static_cast<off_t>(size)) != 0) Must(absl::ResourceExhaustedError("memfd"));
    void* const data =
        ::mmap(nullptr, size, PROT_READ | PROT_WRITE, file ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, fd, 0);
    if (data == MAP_FAILED) Must(absl::ResourceExhaustedError("mmap"));
    if (file) ::close(fd);
    (void)::madvise(data, size, MADV_HUGEPAGE);
    std::memset(data, 1, size);
    return static_cast<std::byte*>(data);
  };
  std::byte* const target = map(kTarget, true);
  Result rows = Result::array();
  for (const bool file : {false, true}) {
    std::byte* const source = map(bytes, file);
    for (const char* how : {"memcpy", "past the caches"})
      for (const int threads : {1, 2, 4, 8, 16}) {
        if (threads > ::sysconf(_SC_NPROCESSORS_ONLN)) continue;
        double best = 1e9;
        for (int round = 0; round < 3; round++) {
          std::atomic<size_t> next = 0;
          const auto begin = std::chrono::steady_clock::now();
          std::vector<std::thread> workers;
          for (int t = 0; t < threads; t++)
            workers.emplace_back([&] {
              for (size_t i = next++; i * kPart < bytes; i = next++) {
                std::byte* const to = target + i * kPart % kTarget;
                if (*how == 'm') {
                  std::memcpy(to, source + i * kPart, kPart);
                } else {
                  StreamCopy(to, source + i * kPart, kPart);
                }
              }
            });
          for (std::thread& worker : workers) worker.join();
          best = std::min(best, Seconds(begin));
        }
        rows.push_back({{"from", file ? "memory file" : "anonymous memory"},
                        {"copy", how},
                        {"threads", threads},
                        {"gb_s", Tenth(1e-9 * static_cast<double>(bytes) / best)}});
      }
    ::munmap(source, bytes);
  }
  ::munmap(target, kTarget);
  return rows;
}

int Run(int argc, char** argv) {
  CLI::App app{"loads of a prefix into an engine's pages, through the arena and in place"};
  cli::DaemonOptions daemon_options;
  std::string device = "cuda:0", json;
  Setting setting;
  size_t piece_mib = 32;
  bool quick = false;
  app.add_option("--kvtided", daemon_options.program, "the daemon's program");
  app.add_option("--device", device, "cpu, or cuda:0");
  app.add_option("--tokens", setting.tokens, "of a prefix, a multiple of 64");
  app.add_option("--rounds", setting.rounds, "loads by each way");
  app.add_option("--piece-mib", piece_mib, "of a piece");
  app.add_option("--json", json, "write the results here too");
  app.add_flag("--quick", quick, "few and small, to see that it runs");
  CLI11_PARSE(app, argc, argv);
  setting.cuda = device != "cpu";
  setting.piece_bytes = piece_mib << 20;
  if (quick) {
    setting.layers = 2;
    setting.heads = 2;
    setting.dim = 64;
    setting.tokens = 512;
    setting.rounds = 6;
    setting.piece_bytes = size_t{1} << 20;
  }
  // Exact pages of every prefix, and some room.
  const size_t exact = setting.page_bytes() * static_cast<size_t>(setting.layers * setting.blocks());
  daemon_options.device = device;
  daemon_options.device_bytes = int64_t{64} << 20;
  daemon_options.host_bytes =
      static_cast<int64_t>(exact * static_cast<size_t>(setting.prefixes) * 5 / 4 + (size_t{64} << 20));
  daemon_options.host_sharing = true;
  daemon_options.shared_memory = "1GiB";
  Result result;
  result["benchmark"] = "load";
  std::string command = "kvtide_bench_load";
  for (int i = 1; i < argc; i++) absl::StrAppend(&command, " ", argv[i]);
  result["command"] = command;
  result["what"] = absl::StrCat(setting.tokens, " tokens in blocks of 64, ", setting.layers, " layers of ",
                                setting.heads, " KV heads of ", setting.dim, ", pieces of ",
                                setting.piece_bytes >> 20, " MiB; median of ", setting.rounds - 4, " loads");
  char host[256] = {};
  (void)::gethostname(host, sizeof(host) - 1);
  result["host"] = host;
  result["processors"] = ::sysconf(_SC_NPROCESSORS_ONLN);
#ifdef KVTIDE_BENCH_HAS_CUDA
  if (setting.cuda) {
    cudaDeviceProp about;
    KVTIDE_BENCH_CUDA(cudaGetDeviceProperties(&about, 0));
    result["device"] = about.name;
    int read_only = 0;
    KVTIDE_BENCH_CUDA(cudaDeviceGetAttribute(&read_only, cudaDevAttrHostRegisterReadOnlySupported, 0));
    result["registers_read_only"] = read_only != 0;
  }
#endif
  const std::unique_ptr<cli::DaemonProcess> daemon = Must(cli::DaemonProcess::Start(daemon_options));
  Bench bench(setting, daemon->address());
  for (const Case& c : {Case{"turbo4 pages as they are", "turbo4/turbo4", false},
                        {"f16 rows in turbo4/turbo4", "turbo4/turbo4", true},
                        {"f16 rows in q8_0/turbo4", "q8_0/turbo4", true},
                        {"f16 pages as they are", "f16/f16", false}}) {
    result["loads"].push_back(bench.Measure(c));
    std::printf("%s\n", result["loads"].back().dump(1).c_str());
    std::fflush(stdout);
  }
  result["host_copies"] = HostCopies(quick ? size_t{16} << 20 : size_t{512} << 20);
  std::printf("%s\n", result["host_copies"].dump().c_str());
  return WriteResult(result, json);
}

}  // namespace
}  // namespace kvtide::bench

int main(int argc, char** argv) { return kvtide::bench::Run(argc, argv); }
