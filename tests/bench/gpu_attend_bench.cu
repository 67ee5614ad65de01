// Decode attention over pages in GPU memory: times the kernels of the CUDA backend on the shapes of a table,
// beside the time in which the same pages can only be read, and writes the result as JSON.
//   gpu_attend_bench [--json FILE] [--filter TEXT[,TEXT...]]
// Random codes and scales, blocks in shuffled order, buffers used in turn so that nothing is left in L2;
// median of 30 calls, each between two events, the three kernels together; the same calls in a CUDA graph;
// and, of some shapes, the graph on end for a second, the last half of which counts: the chip runs at its
// power cap then. Every shape is also checked against float64 on one (sequence, KV head).
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/attend/attend_kernel.cuh"
#include "kernels/cuda/attend/kernel_list.h"
#include "kernels/cuda/attend/level_kernels.h"
#include "kernels/cuda/device/launch.h"
#include "kernels/cuda/device/level_tables.h"
#include "kernels/cuda/device/tide_tables.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/page_codec.h"
#include "tests/bench/gpu_fill.cuh"
#include "tests/bench/tide_profile.h"

namespace kvtide::cuda {
namespace {

struct Shape {
  const char* pair;
  int sequences, kv_heads, tokens, dim, group;
  bool levels = false;  // calibrated keys are coded after RoPE
  bool alone = false;   // also for a second on end
  std::string name() const { return std::string(pair) + (levels ? " after RoPE" : ""); }
};

constexpr Shape kShapes[] = {
    {"turbo4", 33, 4, 32768, 128, 1},
    {"turbo4", 33, 4, 32768, 128, 4},
    {"turbo4", 33, 4, 32768, 128, 8, false, true},
    {"turbo4", 33, 4, 32768, 128, 16, false, true},
    {"wht4", 33, 4, 32768, 128, 1},
    {"wht4", 33, 4, 32768, 128, 8, false, true},
    {"wht4", 33, 4, 32768, 128, 16, false, true},
    {"turbo4/wht4", 33, 4, 32768, 128, 8, false, true},
    {"turbo4/wht4", 33, 4, 32768, 128, 16, false, true},
    {"turbo3", 33, 4, 32768, 128, 1},
    {"turbo3", 33, 4, 32768, 128, 8},
    {"turbo3", 33, 4, 32768, 128, 16},
    {"turbo2", 33, 4, 32768, 128, 8},
    {"tide4/turbo4", 33, 4, 32768, 128, 8},
    {"tide3/turbo3", 33, 4, 32768, 128, 1},
    {"tide3/turbo3", 33, 4, 32768, 128, 8},
    {"tide3/turbo3", 33, 4, 32768, 128, 16},
    {"tide2/turbo2", 33, 4, 32768, 128, 8},
    {"tide2/turbo2", 33, 4, 32768, 128, 16},
    {"tide1/turbo2", 33, 4, 32768, 128, 8},
    {"tide3/turbo3", 33, 4, 32768, 64, 8},
    {"tide2/turbo2", 33, 4, 32768, 64, 8},
    {"tide3/turbo3", 1, 8, 131072, 128, 4},
    {"tide2/turbo2", 66, 8, 4096, 128, 4},
    {"tide4/turbo4", 33, 4, 32768, 128, 8, true},
    {"tide3/turbo3", 33, 4, 32768, 128, 1, true},
    {"tide3/turbo3", 33, 4, 32768, 128, 8, true},
    {"tide3/turbo3", 33, 4, 32768, 128, 16, true},
    {"tide2/turbo2", 33, 4, 32768, 128, 8, true},
    {"tide2/turbo2", 33, 4, 32768, 128, 16, true},
    {"tide1/turbo2", 33, 4, 32768, 128, 8, true},
    {"tide1/turbo2", 33, 4, 32768, 128, 16, true},
    {"tide4/turbo4", 33, 4, 32768, 64, 8, true},
    {"tide3/turbo3", 33, 4, 32768, 64, 8, true},
    {"tide2/turbo2", 33, 4, 32768, 64, 8, true},
    {"tide1/turbo2", 33, 4, 32768, 64, 8, true},
    {"tide3/turbo3", 1, 8, 131072, 128, 4, true},
    {"tide2/turbo2", 66, 8, 4096, 128, 4, true},
    {"tide3/turbo3", 512, 8, 512, 128, 4, true},
    {"q8_0/turbo4", 33, 4, 32768, 128, 8},
    {"q8_0/turbo4", 33, 4, 32768, 128, 16},
    {"q8_0/wht4", 33, 4, 32768, 128, 8},
    {"q8_0/wht4", 33, 4, 32768, 128, 16},
    {"q8_0", 33, 4, 32768, 128, 8},
    {"f16", 33, 4, 32768, 128, 1},
    {"f16", 33, 4, 32768, 128, 8},
    {"turbo4", 33, 4, 32768, 64, 8},
    {"wht4", 33, 4, 32768, 64, 8},
    {"turbo3", 33, 4, 32768, 64, 8},
    {"f16", 33, 4, 32768, 64, 8},
    {"turbo4", 16, 4, 32768, 256, 8},
    {"wht4", 16, 4, 32768, 256, 8},
    {"f16", 16, 4, 32768, 256, 8},
    {"turbo4", 1, 8, 131072, 128, 4},
    {"wht4", 1, 8, 131072, 128, 4},
    {"turbo3", 1, 8, 131072, 128, 4},
    {"f16", 1, 8, 131072, 128, 4},
    {"turbo4", 66, 8, 4096, 128, 4},
    {"f16", 66, 8, 4096, 128, 4},
    {"turbo4", 1, 8, 32768, 128, 4},
    {"turbo4", 512, 8, 512, 128, 4},
    {"turbo4", 33, 4, 32768, 96, 8},
    {"turbo4", 16, 2, 32768, 512, 8},
};

// Reads pages as the attention kernel does and computes next to nothing.
template <class Config, class Tile>
__global__ void __launch_bounds__(Config::kThreads, 1)
    ReadKernel(const __grid_constant__ AttendParams params) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = static_cast<int>(threadIdx.x) >> 5, lane = DeviceWarp::Lane();
  const uint32_t base = SharedAddress(shared);
  typename Config::Ring ring;
  const AttendWorker worker = params.workers[blockIdx.x * Config::kWarps + warp];
  ring.Start(reinterpret_cast<PageList*>(shared + Config::kPagesAt) + warp,
             base + static_cast<uint32_t>(warp) * Config::kWarpBytes,
             base + Config::kBarriersAt + 8 * static_cast<uint32_t>(warp) * Config::kSlots, params.units,
             worker, params.layer_lines);
  ring.Fill();
  uint32_t x = 0;
  for (uint32_t page = worker.begin; page < worker.end; page++) {
    const uint32_t piece = ring.Wait();
    uint32_t w[4];
    for (int i = 0; i + 512 <= Tile::kKBytes + Tile::kVBytes; i += 512) {
      DeviceWarp::Load128(piece + i + lane * 16, w);
      x ^= w[0] ^ w[1] ^ w[2] ^ w[3];
    }
    ring.template Release<true>();
  }
  if (x == 0x12345678u) params.outputs[0] = 1;
}

template <class T>
T* Upload(const std::vector<T>& v, std::vector<void*>* owned) {
  T* p = nullptr;
  KVTIDE_BENCH_CUDA(cudaMalloc(&p, std::max<size_t>(16, v.size() * sizeof(T))));
  KVTIDE_BENCH_CUDA(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  owned->push_back(p);
  return p;
}
template <class T>
T* Allocate(size_t count, std::vector<void*>* owned) {
  T* p = nullptr;
  KVTIDE_BENCH_CUDA(cudaMalloc(&p, count * sizeof(T)));
  KVTIDE_BENCH_CUDA(cudaMemset(p, 0xff, count * sizeof(T)));
  owned->push_back(p);
  return p;
}

struct Timing {
  double median = 0, least = 0, most = 0;
};
template <class F>
Timing TimeCalls(F call) {
  cudaEvent_t begin, end;
  KVTIDE_BENCH_CUDA(cudaEventCreate(&begin));
  KVTIDE_BENCH_CUDA(cudaEventCreate(&end));
  std::vector<double> us;
  for (int i = 0; i < 35; i++) {
    KVTIDE_BENCH_CUDA(cudaEventRecord(begin));
    call(i);
    KVTIDE_BENCH_CUDA(cudaEventRecord(end));
    KVTIDE_BENCH_CUDA(cudaEventSynchronize(end));
    float ms = 0;
    KVTIDE_BENCH_CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 5) us.push_back(1e3 * static_cast<double>(ms));
  }
  std::sort(us.begin(), us.end());
  return {us[us.size() / 2], us.front(), us.back()};
}

void Launch(const void* function, unsigned grid, unsigned block, size_t shared, bool dependent, void* params,
            cudaStream_t stream) {
  const absl::Status status = LaunchKernel(function, grid, static_cast<int>(block), static_cast<int>(shared),
                                           dependent, params, stream);
  if (status.ok()) return;
  std::printf("%s\n", std::string(status.message()).c_str());
  std::exit(1);
}

// Relative L2 error of one (sequence, KV head) against float64 in the stored frame.
double CheckHead(const Shape& s, const BlockLayout& layout, const std::byte* blocks, const Profile* profile,
                 const std::vector<size_t>& order, int sequence, int head, const std::vector<float>& q,
                 const std::vector<float>& out, double* lse_error, const std::vector<float>& lse) {
  const int pages = (s.tokens + 63) / 64, d = s.dim;
  std::vector<float> k(static_cast<size_t>(pages) * 64 * d), v(k.size());
  std::vector<std::byte> record(layout.record_bytes());
  for (int p = 0; p < pages; p++) {
    KVTIDE_BENCH_CUDA(cudaMemcpy(record.data(),
                                 blocks +
                                     order[static_cast<size_t>(sequence) * pages + p] * layout.block_bytes() +
                                     layout.RecordOffset(0, head),
                                 record.size(), cudaMemcpyDeviceToHost));
    const auto decode = [&](CacheType type, Side side, const HalfLayout& half, const std::byte* from,
                            float* rows) {
      const bool calibrated = Info(type).calibrated;
      DecodeHalf(type, side, half, calibrated ? &profile->key(0, head) : nullptr, 64 * p, from,
                 rows + static_cast<size_t>(p) * 64 * d);
    };
    decode(layout.pair().k, Side::kKey, layout.k(), record.data(), k.data());
    decode(layout.pair().v, Side::kValue, layout.v(), record.data() + layout.v_codes(), v.data());
  }
  double worst = 0;
  *lse_error = 0;
  for (int g = 0; g < s.group; g++) {
    const size_t row = (static_cast<size_t>(sequence) * s.kv_heads + head) * s.group + g;
    std::vector<double> w(static_cast<size_t>(s.tokens)), o(static_cast<size_t>(d), 0.0);
    double top = -1e300, sum = 0;
    for (int t = 0; t < s.tokens; t++) {
      double dot = 0;
      for (int i = 0; i < d; i++)
        dot += static_cast<double>(q[row * d + i]) * static_cast<double>(k[static_cast<size_t>(t) * d + i]);
      w[t] = dot / std::sqrt(static_cast<double>(d));
      top = std::max(top, w[t]);
    }
    for (int t = 0; t < s.tokens; t++) {
      const double e = std::exp(w[t] - top);
      sum += e;
      for (int i = 0; i < d; i++) o[i] += e * static_cast<double>(v[static_cast<size_t>(t) * d + i]);
    }
    double error = 0, size = 0;
    for (int i = 0; i < d; i++) {
      const double e = o[i] / sum;
      error += (e - static_cast<double>(out[row * d + i])) * (e - static_cast<double>(out[row * d + i]));
      size += e * e;
    }
    worst = std::max(worst, std::sqrt(error / size));
    if (!(worst == worst)) worst = 1e9;
    *lse_error = std::max(*lse_error, std::fabs(static_cast<double>(lse[row]) - top - std::log(sum)));
  }
  return worst;
}

template <class K, class V, int D, int kWarps, int kSlots>
const void* ReaderOf(int* threads, int* bytes) {
  using Tile = CodedTile<DeviceWarp, typename K::Stored, typename V::Stored, D, D, 1>;
  using Config = AttendConfig<Tile, kWarps, kSlots, true>;
  *threads = Config::kThreads;
  *bytes = Config::kSharedBytes;
  return reinterpret_cast<const void*>(&ReadKernel<Config, Tile>);
}

std::string RunShape(const Shape& s, int sms) {
  std::vector<void*> owned;
  const CachePair pair = *ParseCachePair(s.pair);
  const BlockLayout layout({1, s.kv_heads, s.dim, s.dim}, pair);
  const size_t pages = static_cast<size_t>((s.tokens + 63) / 64),
               blocks = pages * static_cast<size_t>(s.sequences);
  const size_t bytes = blocks * layout.block_bytes();
  const int copies = static_cast<int>(std::clamp<size_t>((size_t{400} << 20) / bytes + 1, 2, 16));
  auto* data = Allocate<std::byte>(bytes * static_cast<size_t>(copies), &owned);
  bench::FillBlocks(layout, blocks * static_cast<size_t>(copies), data, 1);

  std::mt19937 rng(7);
  std::normal_distribution<float> normal;
  const size_t rows = static_cast<size_t>(s.sequences) * s.kv_heads * s.group;
  std::vector<float> q(rows * s.dim);
  const bool coded = Info(pair.k).storage == Storage::kCodes;
  for (float& x : q) x = normal(rng) * (coded ? 0.7f : 1.0f);
  const float* q_device = Upload(q, &owned);
  float* out = Allocate<float>(rows * s.dim, &owned);
  float* lse = Allocate<float>(rows, &owned);

  const bool calibrated = Info(pair.k).calibrated;
  Profile profile;
  const std::byte* tables = nullptr;
  if (calibrated) {
    profile = bench::MakeProfile(s.kv_heads, s.dim, s.levels);
    tables = Upload(s.levels ? MakeLevelTables(profile, pair.k) : MakeTideTables(profile, pair.k), &owned);
  }
  const AttendKernel* kernel = (s.levels ? FindLevelKernel : FindAttendKernel)(
      FormOf(pair.k), FormOf(pair.v), StoredDim(s.dim), StoredDim(s.dim), s.group, 0);
  if (kernel == nullptr) {
    std::printf("%s d %d: no kernel\n", s.name().c_str(), s.dim);
    return "";
  }
  KVTIDE_BENCH_CUDA(cudaFuncSetAttribute(kernel->function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         kernel->shared_bytes));
  std::vector<size_t> order(blocks);
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), rng);

  std::vector<AttendParams> attend(static_cast<size_t>(copies));
  std::vector<CombineParams> combine(static_cast<size_t>(copies));
  unsigned grid = 0, unit_count = 0;
  for (int copy = 0; copy < copies; copy++) {
    std::vector<std::byte*> table(blocks);
    for (size_t i = 0; i < blocks; i++)
      table[i] = data + (static_cast<size_t>(copy) * blocks + order[i]) * layout.block_bytes();
    std::byte* const* table_device = Upload(table, &owned);
    std::vector<AttendUnit> units;
    for (int b = 0; b < s.sequences; b++)
      for (int h = 0; h < s.kv_heads; h++) {
        AttendUnit unit;
        unit.blocks = table_device + static_cast<size_t>(b) * pages;
        unit.record_offset = layout.RecordOffset(0, h);
        unit.first_query = (static_cast<int64_t>(b) * s.kv_heads + h) * s.group * s.dim;
        unit.pages = static_cast<uint32_t>(pages);
        unit.tokens = s.tokens;
        unit.rows = unit.rows_per_query = s.group;
        unit.causal_end = 1 << 30;
        unit.window_begin = -(1 << 30);
        if (calibrated)
          unit.tables =
              tables + static_cast<size_t>(h) * (s.levels ? LevelTableBytes(s.dim) : TideTableBytes(s.dim));
        units.push_back(unit);
      }
    NumberPages(&units);
    const int warps = kernel->threads / 32;
    const std::vector<AttendWorker> workers = CutShares(units, sms, warps);
    grid = static_cast<unsigned>(workers.size() / static_cast<size_t>(warps));
    unit_count = static_cast<unsigned>(units.size());
    const size_t slots = SlotCount(units.size(), workers.size());
    AttendParams& p = attend[static_cast<size_t>(copy)];
    p.units = Upload(units, &owned);
    p.workers = Upload(workers, &owned);
    p.queries = Allocate<std::byte>(units.size() * static_cast<size_t>(kernel->query_bytes), &owned);
    p.outputs = Allocate<float>(slots * kernel->rows * kernel->dv, &owned);
    p.sums = Allocate<StateHead>(slots * kernel->rows, &owned);
    p.head_dim = s.dim;
    p.query = q_device;
    const Rotation hadamard{RotationKind::kHadamard, 0, nullptr};
    const auto rotation = [&](CacheType type) { return Info(type).rotated ? hadamard : Rotation{}; };
    p.k_rotation = rotation(pair.k);
    p.scale = 1.4426950408889634f / std::sqrt(static_cast<float>(s.dim));
    p.key_scale = p.scale * kernel->key_unit;
    std::vector<CombineSource> sources;
    std::vector<CombineGroup> groups;
    std::vector<uint32_t> slot_list, counts;
    for (size_t u = 0; u < units.size(); u++)
      counts.push_back(AppendSlots(units, u, workers.size(), warps, &slot_list));
    const uint32_t* slots_device = Upload(slot_list, &owned);
    for (size_t u = 0, at = 0; u < units.size(); at += counts[u], u++) {
      CombineSource source;
      source.outputs = reinterpret_cast<uint64_t>(p.outputs);
      source.sums = reinterpret_cast<uint64_t>(p.sums);
      source.slot_list = slots_device + at;
      source.slots = counts[u];
      for (uint32_t i = 0; i < std::min(counts[u], 4u); i++) source.first_slots[i] = slot_list[at + i];
      source.slot_rows = kernel->rows;
      source.v_rotation = rotation(pair.v);
      CombineGroup group;
      group.first_output = static_cast<int64_t>(u) * s.group * s.dim;
      group.first_lse = static_cast<int64_t>(u) * s.group;
      group.first_source = static_cast<uint32_t>(sources.size());
      group.sources = 1;
      group.rows = group.rows_per_query = s.group;
      group.team = CombineTeam(counts[u]);
      group.first[0] = source;
      sources.push_back(source);
      groups.push_back(group);
    }
    CombineParams& c = combine[static_cast<size_t>(copy)];
    c.sources = Upload(sources, &owned);
    c.groups = Upload(groups, &owned);
    c.group_count = static_cast<int32_t>(groups.size());
    c.rows = s.group;
    c.team = CombineTeam(*std::max_element(counts.begin(), counts.end()));
    c.head_dim = s.dim;
    c.output = out;
    c.lse = lse;
  }
  const void* merge = FindCombineKernel(kernel->dv, combine[0].team);
  const unsigned merge_grid = static_cast<unsigned>(
      (combine[0].group_count * s.group * combine[0].team + kCombineWarps - 1) / kCombineWarps);
  const auto call = [&](int copy, cudaStream_t stream) {
    Launch(kernel->query_function, unit_count,
           static_cast<unsigned>(calibrated ? kernel->query_threads : 32 * s.group), 0, false,
           &attend[static_cast<size_t>(copy)], stream);
    Launch(kernel->function, grid, static_cast<unsigned>(kernel->threads),
           static_cast<size_t>(kernel->shared_bytes), true, &attend[static_cast<size_t>(copy)], stream);
    Launch(merge, merge_grid, 32 * kCombineWarps, 0, true, &combine[static_cast<size_t>(copy)], stream);
  };

  for (int copy = 0; copy < copies; copy++) call(copy, nullptr);  // queries are prepared for what follows
  const Timing attend_only = TimeCalls([&](int i) {
    Launch(kernel->function, grid, static_cast<unsigned>(kernel->threads),
           static_cast<size_t>(kernel->shared_bytes), false, &attend[static_cast<size_t>(i % copies)],
           nullptr);
  });
  const Timing whole = TimeCalls([&](int i) { call(i % copies, nullptr); });
  // The same in a graph of 10 calls.
  cudaStream_t stream;
  KVTIDE_BENCH_CUDA(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  KVTIDE_BENCH_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < 10; i++) call(i % copies, stream);
  KVTIDE_BENCH_CUDA(cudaStreamEndCapture(stream, &graph));
  KVTIDE_BENCH_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  const Timing in_graph = TimeCalls([&](int) { KVTIDE_BENCH_CUDA(cudaGraphLaunch(exec, nullptr)); });

  // The graph on end, a hundred calls in flight at most.
  double alone_us = 0;
  if (s.alone) {
    const auto begin = std::chrono::steady_clock::now();
    const auto seconds = [&] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    double half = 0, last = 0;
    for (int calls = 0; last < 1; last = seconds()) {
      for (int i = 0; i < 10; i++) KVTIDE_BENCH_CUDA(cudaGraphLaunch(exec, stream));
      KVTIDE_BENCH_CUDA(cudaStreamSynchronize(stream));
      const double now = seconds();
      if (now < 0.5) {
        half = now;
        continue;
      }
      calls += 100;
      alone_us = 1e6 * (now - half) / calls;
    }
  }

  // Read ceiling: the same ring without arithmetic, where the pair is one of the three timed widths.
  Timing read;
  int threads = 0, shared = 0;
  const void* reader = nullptr;
  const std::string name = s.pair;
  if (s.dim == 128 && name == "turbo4") reader = ReaderOf<Turbo4, Turbo4, 128, 12, 2>(&threads, &shared);
  if (s.dim == 128 && name == "turbo3") reader = ReaderOf<Turbo3, Turbo3, 128, 12, 2>(&threads, &shared);
  if (s.dim == 64 && name == "turbo4") reader = ReaderOf<Turbo4, Turbo4, 64, 16, 2>(&threads, &shared);
  if (reader != nullptr && threads == kernel->threads) {  // it walks the same shares
    KVTIDE_BENCH_CUDA(cudaFuncSetAttribute(reader, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    read = TimeCalls([&](int i) {
      Launch(reader, grid, static_cast<unsigned>(threads), static_cast<size_t>(shared), false,
             &attend[static_cast<size_t>(i % copies)], nullptr);
    });
  }

  call(0, nullptr);
  KVTIDE_BENCH_CUDA(cudaDeviceSynchronize());
  std::vector<float> out_host(rows * s.dim), lse_host(rows);
  KVTIDE_BENCH_CUDA(cudaMemcpy(out_host.data(), out, out_host.size() * 4, cudaMemcpyDeviceToHost));
  KVTIDE_BENCH_CUDA(cudaMemcpy(lse_host.data(), lse, lse_host.size() * 4, cudaMemcpyDeviceToHost));
  double lse_error = 0;
  const double error = CheckHead(s, layout, data, &profile, order, s.sequences - 1, s.kv_heads / 2, q,
                                 out_host, &lse_error, lse_host);

  std::printf(
      "%-23s %4d x %d x %6d d %3d G %2d | %7.1f MB | attend %7.1f us, with merge %7.1f [%.1f, %.1f], in a "
      "graph %7.1f, for a second %7.1f | %5.0f GB/s | read %6.1f us (%2.0f %%) | err %.1e lse %.1e | warps "
      "%d smem %d\n",
      s.name().c_str(), s.sequences, s.kv_heads, s.tokens, s.dim, s.group, static_cast<double>(bytes) * 1e-6,
      attend_only.median, whole.median, whole.least, whole.most, in_graph.median / 10, alone_us,
      static_cast<double>(bytes) / whole.median * 1e-3, read.median, 100 * read.median / whole.median, error,
      lse_error, kernel->threads / 32, kernel->shared_bytes);
  std::fflush(stdout);
  KVTIDE_BENCH_CUDA(cudaGraphExecDestroy(exec));
  KVTIDE_BENCH_CUDA(cudaGraphDestroy(graph));
  KVTIDE_BENCH_CUDA(cudaStreamDestroy(stream));
  for (void* p : owned) KVTIDE_BENCH_CUDA(cudaFree(p));
  char line[1024];
  std::snprintf(line, sizeof(line),
                "{\"pair\": \"%s\", \"sequences\": %d, \"kv_heads\": %d, \"tokens\": %d, \"head_dim\": %d, "
                "\"group\": %d, \"bytes\": %zu, "
                "\"attend_us\": %.2f, \"with_merge_us\": %.2f, \"least_us\": %.2f, \"most_us\": %.2f, "
                "\"in_graph_us\": %.2f, \"alone_us\": %.2f, "
                "\"read_only_us\": %.2f, \"relative_error\": %.3e, \"lse_error\": %.3e}",
                s.name().c_str(), s.sequences, s.kv_heads, s.tokens, s.dim, s.group, bytes,
                attend_only.median, whole.median, whole.least, whole.most, in_graph.median / 10, alone_us,
                read.median, error, lse_error);
  return line;
}

}  // namespace

// Whether `name` contains one of the texts in `filter`, which are separated by commas.
bool Matches(const std::string& filter, const std::string& name) {
  for (size_t at = 0; at <= filter.size();) {
    const size_t end = std::min(filter.find(',', at), filter.size());
    if (name.find(filter.substr(at, end - at)) != std::string::npos) return true;
    at = end + 1;
  }
  return false;
}

int Main(int argc, char** argv) {
  std::string json, filter;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--json") == 0) json = argv[i + 1];
    if (std::strcmp(argv[i], "--filter") == 0) filter = argv[i + 1];
  }
  cudaDeviceProp device;
  KVTIDE_BENCH_CUDA(cudaGetDeviceProperties(&device, 0));
  int driver = 0;
  KVTIDE_BENCH_CUDA(cudaDriverGetVersion(&driver));
  std::printf("%s, %d SMs\n", device.name, device.multiProcessorCount);
  std::string rows;
  for (const Shape& s : kShapes) {
    const std::string name = s.name() + " " + std::to_string(s.sequences) + "x" + std::to_string(s.kv_heads) +
                             "x" + std::to_string(s.tokens) + " d" + std::to_string(s.dim) + " G" +
                             std::to_string(s.group);
    if (!Matches(filter, name)) continue;
    const std::string row = RunShape(s, device.multiProcessorCount);
    if (!row.empty()) rows += (rows.empty() ? "\n    " : ",\n    ") + row;
  }
  if (!json.empty()) {
    std::ofstream file(json);
    file << "{\n  \"device\": \"" << device.name << "\",\n  \"driver\": " << driver << ",\n  \"shapes\": ["
         << rows << "\n  ]\n}\n";
  }
  return 0;
}

}  // namespace kvtide::cuda

int main(int argc, char** argv) { return kvtide::cuda::Main(argc, argv); }
