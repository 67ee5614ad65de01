// The kernels of a step over an engine's pages (paged_attention.h), all but attention itself: tiles of query
// rows and block tables from the step's arrays, rows into exact pages, and jobs for the encoders.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cub/block/block_scan.cuh>
#include <type_traits>

#include "kernels/base/float16.h"
#include "kernels/cuda/codec/codec_kernels.h"
#include "kernels/cuda/device/pipeline.cuh"
#include "kernels/cuda/step/device_plan.cuh"
#include "kernels/paged_attention.h"

namespace kvtide::cuda {

// Up to kRows rows of one sequence's queries, row = query * heads of a KV head + head, with the pages of each
// kind that they see: what an item of the plan is. `rows` = 0: none.
struct alignas(16) PagedTile {
  struct Pages {
    int32_t begin, end;  // of the sequence's row of the table
    int32_t tokens;      // that count, from page `begin` on
    // Query i of the sequence sees tokens [window_begin + i, min(tokens, causal_end + i)), likewise.
    int32_t causal_end, window_begin;
  };
  int32_t sequence = 0, first_token = 0;  // row of the tensors that the sequence's query 0 stands in
  int32_t first_row = 0, rows = 0;
  Pages pages[2] = {};  // coded, exact
};
inline constexpr int kNoLimit = 1 << 30;

// The step's arrays on the device, and what the kernels make of them.
struct PagedTables {
  const int32_t* query_start = nullptr;
  const int32_t* lengths = nullptr;
  const int32_t* coded_first = nullptr;
  const int32_t* coded_count = nullptr;
  const int32_t* coded_table = nullptr;
  const int32_t* exact_table = nullptr;
  int64_t coded_row = 0, exact_row = 0;
  int32_t sequences = 0;
  // Offsets of pages as the attention kernels add them to a layer's base, [sequences][max_...] from block
  // coded_first on, and of all exact blocks. Scratch pages are filled in layer by layer (WriteKernel).
  uint64_t* coded = nullptr;
  uint64_t* exact = nullptr;
  int32_t max_coded = 0, max_exact = 0;
  uint64_t coded_stride = 0, exact_stride = 0;
  int32_t exact_pages = 0;
  // Where the step's rows go, page and token in it, [tokens]; null: the engine says so (write_slots).
  int2* places = nullptr;
  int32_t tokens = 0;

  __device__ int CodedCount(int sequence) const {
    return coded == nullptr ? 0 : min(max(coded_count[sequence], 0), max_coded);
  }
  // Of the coded blocks, those tokens that the sequence has: all, unless it is read up to one of them only.
  __device__ int CodedTokens(int sequence) const {
    const int count = CodedCount(sequence);
    return count == 0
               ? 0
               : min(count * kBlockTokens, max(lengths[sequence] - coded_first[sequence] * kBlockTokens, 0));
  }
  __device__ int ExactTokens(int sequence) const {
    return min(max(lengths[sequence] - CodedTokens(sequence), 0), max_exact * kBlockTokens);
  }
  __device__ int Queries(int sequence) const {
    return max(query_start[sequence + 1] - query_start[sequence], 0);
  }
  // Queries that stand before the end of the coded blocks and have exact blocks before those: what they see
  // of the exact ones ends there, while others see on. No tile has both.
  __device__ int QueriesBefore(int sequence) const {
    const int count = CodedCount(sequence), queries = Queries(sequence);
    if (count == 0 || coded_first[sequence] <= 0) return 0;
    return min(max((coded_first[sequence] + count) * kBlockTokens - (lengths[sequence] - queries), 0),
               queries);
  }
};

struct PagedTilesParams {
  PagedTables tables;
  PagedTile* tiles = nullptr;
  int32_t tile_count = 0;  // entries to write
  int32_t tile_rows = 0;   // rows of a tile
  int32_t group = 0;       // query heads of a KV head
  int32_t most_rows = 0;   // sequences with more rows have no tiles: others attend them
  int64_t window = 0;

  __device__ int TilesOf(int rows) const { return (rows + tile_rows - 1) / tile_rows; }
};
inline constexpr int kTileThreads = 1024;

__device__ inline int PagedClamp(int64_t x) {
  return static_cast<int>(x < -kNoLimit ? -kNoLimit : x > kNoLimit ? kNoLimit : x);
}

// What rows [first_row, first_row + rows) see of one kind: `tokens` of it, of which query i sees
// [begin + i, end + i).
__device__ inline PagedTile::Pages PagedPages(int64_t tokens, int64_t begin, int64_t end, int first_query,
                                              int last_query) {
  PagedTile::Pages pages{};
  const int64_t seen_end = min(tokens, end + last_query), seen_begin = max(begin + first_query, int64_t{0});
  if (seen_begin >= seen_end) return pages;
  pages.begin = static_cast<int32_t>(seen_begin / kBlockTokens);
  pages.end = static_cast<int32_t>((seen_end + kBlockTokens - 1) / kBlockTokens);
  const int64_t base = int64_t{pages.begin} * kBlockTokens;
  pages.tokens = PagedClamp(seen_end - base);
  pages.causal_end = PagedClamp(end - base);
  pages.window_begin = PagedClamp(begin - base);
  return pages;
}

// CTA 0 makes the tiles, the others the tables of a sequence each.
__global__ void __launch_bounds__(kTileThreads)
    PagedTilesKernel(const __grid_constant__ PagedTilesParams params) {
  const PagedTables& tables = params.tables;
  if (blockIdx.x > 0) {
    const int sequence = static_cast<int>(blockIdx.x) - 1;
    const int coded = tables.CodedCount(sequence),
              exact = (tables.ExactTokens(sequence) + kBlockTokens - 1) / kBlockTokens;
    for (int i = static_cast<int>(threadIdx.x); i < coded; i += kTileThreads) {
      const int32_t page = tables.coded_table[sequence * tables.coded_row + tables.coded_first[sequence] + i];
      tables.coded[static_cast<int64_t>(sequence) * tables.max_coded + i] =
          static_cast<uint64_t>(static_cast<int64_t>(page)) * tables.coded_stride;
    }
    for (int i = static_cast<int>(threadIdx.x); i < exact; i += kTileThreads) {
      const int32_t page = tables.exact_table[sequence * tables.exact_row + i];
      tables.exact[static_cast<int64_t>(sequence) * tables.max_exact + i] =
          static_cast<uint64_t>(static_cast<int64_t>(page)) * tables.exact_stride;
    }
    if (tables.places != nullptr) {
      const int first = tables.query_start[sequence], queries = tables.Queries(sequence),
                start = tables.lengths[sequence] - queries;
      for (int i = static_cast<int>(threadIdx.x); i < queries && first + i < tables.tokens;
           i += kTileThreads) {
        const int block = (start + i) / kBlockTokens;
        const int at = block < tables.coded_first[sequence] ? block : block - coded;
        const bool there = start + i >= 0 && at >= 0 && at < exact;
        tables.places[first + i] = there ? make_int2(tables.exact_table[sequence * tables.exact_row + at],
                                                     (start + i) % kBlockTokens)
                                         : make_int2(-1, 0);
      }
    }
    return;
  }
  // Rows of no sequence.
  if (tables.places != nullptr)
    for (int i = tables.query_start[tables.sequences] + static_cast<int>(threadIdx.x); i < tables.tokens;
         i += kTileThreads)
      tables.places[i] = make_int2(-1, 0);
  __shared__ int32_t first_tile[kMostPagedSequences + 1];
  using Scan = cub::BlockScan<int, kTileThreads>;
  __shared__ typename Scan::TempStorage storage;
  int before_all = 0;
  for (int base = 0; base < tables.sequences; base += kTileThreads) {
    const int sequence = base + static_cast<int>(threadIdx.x);
    int own = 0, before = 0, all = 0;
    if (sequence < tables.sequences && tables.lengths[sequence] > 0) {
      const int64_t rows = int64_t{tables.Queries(sequence)} * params.group;
      const int first_part = tables.QueriesBefore(sequence) * params.group;
      if (rows <= params.most_rows)
        own = params.TilesOf(first_part) + params.TilesOf(static_cast<int>(rows) - first_part);
    }
    Scan(storage).ExclusiveSum(own, before, all);
    if (sequence < tables.sequences) first_tile[sequence] = before_all + before;
    before_all += all;
    __syncthreads();
  }
  if (threadIdx.x == 0) first_tile[tables.sequences] = before_all;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < params.tile_count; i += kTileThreads) {
    PagedTile tile;
    if (i < before_all) {
      int low = 0, high = tables.sequences;  // the last sequence whose first tile is not after i
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (first_tile[middle] <= i)
          low = middle;
        else
          high = middle;
      }
      const int queries = tables.Queries(low), first_part = tables.QueriesBefore(low) * params.group,
                first_tiles = params.TilesOf(first_part);
      const int number = i - first_tile[low];
      const bool before = number < first_tiles;  // the end of the coded blocks
      tile.sequence = low;
      tile.first_token = tables.query_start[low];
      tile.first_row =
          before ? number * params.tile_rows : first_part + (number - first_tiles) * params.tile_rows;
      tile.rows = min(params.tile_rows, (before ? first_part : queries * params.group) - tile.first_row);
      const int first = tile.first_row / params.group, last = (tile.first_row + tile.rows - 1) / params.group;
      const int64_t position = tables.lengths[low] - queries;  // of query 0
      const int64_t coded = tables.CodedTokens(low),
                    coded_begin = int64_t{tables.coded_first[low]} * kBlockTokens;
      const int64_t begin = params.window > 0 ? position - params.window + 1 : -int64_t{kNoLimit};
      if (coded > 0)
        tile.pages[0] = PagedPages(coded, begin - coded_begin, position + 1 - coded_begin, first, last);
      // Of the exact blocks the coded ones are left out; without a window the first blocks are all seen.
      tile.pages[1] =
          before ? PagedPages(coded_begin, begin, position + 1, first, last)
                 : PagedPages(tables.ExactTokens(low), begin - coded, position + 1 - coded, first, last);
    }
    params.tiles[i] = tile;
  }
}

// Which profile a sequence or seal has.
__device__ inline int64_t ProfileIndex(const int32_t* indices, int at, int32_t most) {
  return indices == nullptr ? 0 : min(max(indices[at], 0), max(0, most - 1));
}

// Of those that sequences may have, the first one is 0 and 1: not looked at.
__device__ inline bool HasProfile(int64_t index, int32_t most) { return most == 0 || index > 0; }

// The items of the plan (device_plan.cuh): tiles, launches are batches of `batch` tiles.
struct TileItems {
  const PagedTile* tiles = nullptr;
  int32_t batch = 0;
  int32_t kinds[2] = {};   // which of a tile's pages
  uint64_t bases[2] = {};  // of the kinds' pages, before what a layer adds
  int32_t heads = 0, group = 0, head_dim_k = 0, head_dim_v = 0;
  int64_t query_stride = 0, output_stride = 0;  // elements between rows of the tensors
  const float* mean = nullptr;                  // of layer 0, or null
  const float* gain = nullptr;
  const int32_t* profiles = nullptr;  // [sequences], or null
  int32_t most_profiles = 0;
  int64_t profile_stride = 0;
  const std::byte* tables = nullptr;  // of calibrated keys' heads (level_tables.h), of layer 0, or null
  uint64_t table_bytes = 0;           // of a head

  __device__ const PagedTile& Tile(size_t item) const { return tiles[blockIdx.x * batch + item]; }
  __device__ int2 Pages(const PlanKind*, int k, int item) const {
    const PagedTile::Pages& pages = Tile(item).pages[kinds[k]];
    return make_int2(pages.begin, pages.end);
  }
  __device__ const std::byte* const* Blocks(const PlanKind* plan, int k, int item) const {
    return plan[k].blocks +
           static_cast<size_t>(Tile(item).sequence) * static_cast<size_t>(plan[k].max_blocks);
  }
  __device__ uint64_t RecordBase(const PlanKind*, int k, size_t) const { return bases[k]; }
  __device__ void FillUnit(const PlanKind* plan, int k, size_t, int item, int head, int2,
                           AttendUnit& unit) const {
    const PagedTile& tile = Tile(item);
    const PagedTile::Pages& pages = tile.pages[kinds[k]];
    unit.first_query = tile.first_token * query_stride + static_cast<int64_t>(head) * group * head_dim_k;
    unit.query_stride = query_stride;
    const int64_t index = ProfileIndex(profiles, tile.sequence, most_profiles),
                  profile = static_cast<int64_t>(head) * head_dim_k + index * profile_stride;
    const bool has_profile = plan[k].coded && HasProfile(index, most_profiles);
    if (has_profile && mean != nullptr) unit.mean = mean + profile;
    if (has_profile && gain != nullptr) unit.gain = gain + profile;
    if (plan[k].coded && tables != nullptr) unit.tables = tables + static_cast<uint64_t>(head) * table_bytes;
    unit.tokens = pages.tokens;
    unit.first_row = tile.first_row;
    unit.rows = tile.rows;
    unit.rows_per_query = group;
    unit.causal_end = pages.causal_end;
    unit.window_begin = pages.window_begin;
  }
  __device__ void FillGroup(size_t, int item, int head, CombineGroup& to) const {
    const PagedTile& tile = Tile(item);
    to.first_output = tile.first_token * output_stride + static_cast<int64_t>(head) * group * head_dim_v;
    to.output_stride = output_stride;
    to.first_head = head * group;
    to.first_lse = static_cast<int64_t>(tile.first_token) * heads + to.first_head;
    to.lse_stride = heads;
    to.first_row = tile.first_row;
    to.rows = tile.rows;
    to.rows_per_query = group;
  }
};

// Where a layer's exact pages are.
struct ExactPages {
  std::byte* pages = nullptr;
  std::byte* scratch = nullptr;
  int32_t count = 0;  // numbers from here on are scratch pages
  uint64_t stride = 0;

  __device__ std::byte* Page(int32_t number) const {
    return number < count ? pages + static_cast<uint64_t>(number) * stride
                          : scratch + static_cast<uint64_t>(number - count) * stride;
  }
};

struct WriteSide {
  const void* rows = nullptr;
  int64_t stride = 0;  // elements
  int32_t head_dim = 0, stored_dim = 0;
  int32_t offset = 0;  // of the half in a record
};
struct WriteParams {
  WriteSide k, v;
  const int32_t* slots = nullptr;  // or null: places
  const int2* places = nullptr;
  int32_t tokens = 0, kv_heads = 0;
  uint64_t record_bytes = 0;
  ExactPages exact;
  unsigned long long* changed = nullptr;
  // Scratch pages of this layer go into the table here: what the layer's base will be added to.
  PagedTables tables;
  bool fill_scratch = false;
  uint64_t layer_base = 0;

  __device__ int2 Place(int token) const {
    if (token >= tokens) return make_int2(-1, 0);
    if (slots == nullptr) return places[token];
    const int32_t slot = slots[token];
    return slot < 0 ? make_int2(-1, 0) : make_int2(slot / kBlockTokens, slot % kBlockTokens);
  }
};
inline constexpr int kWriteThreads = 256;

// Whether one of the two halves of a word is infinite or no number.
__device__ inline bool HasSpecialHalf(uint32_t word) {
  const uint32_t exponents = word & 0x7c007c00u;
  return (exponents & 0xffffu) == 0x7c00u || (exponents >> 16) == 0x7c00u;
}

// Eight values in f16: those that would round to infinity, and what is no number, are changed and counted.
template <class T>
__device__ inline uint4 ToHalves(const uint32_t (&words)[4 * sizeof(T) / 2], uint32_t* changed) {
  if constexpr (std::is_same_v<T, __half>) {
    if (!HasSpecialHalf(words[0]) && !HasSpecialHalf(words[1]) && !HasSpecialHalf(words[2]) &&
        !HasSpecialHalf(words[3]))
      return make_uint4(words[0], words[1], words[2], words[3]);
  }
  uint32_t packed[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float x[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      if constexpr (sizeof(T) == 4) {
        x[e] = __uint_as_float(words[2 * i + e]);
      } else {
        const auto bits = static_cast<uint16_t>(words[i] >> (16 * e));
        x[e] = std::is_same_v<T, __half> ? F16ToF32(bits) : Bf16ToF32(bits);
      }
      if (!(fabsf(x[e]) < 65520.0f)) {
        (*changed)++;
        x[e] = x[e] > 0 ? 65504.0f : x[e] < 0 ? -65504.0f : 0.0f;
      }
    }
    packed[i] = DeviceWarp::Pack<false>(x[0], x[1]);
  }
  return make_uint4(packed[0], packed[1], packed[2], packed[3]);
}

// CTA (x, y): the y-th 256 times 8 values of tokens x and x + gridDim.x, of K and V of all heads. T: element
// type of the rows. A thread's 8 values are neighbours in a row and in a page.
template <class T>
__global__ void __launch_bounds__(kWriteThreads) WriteKernel(const __grid_constant__ WriteParams params) {
  WaitForEarlierKernels();  // the engine's among them, which made the rows
  LetNextKernelStart();
  constexpr int kTokens = 2, kWords = 4 * sizeof(T) / 2;
  const int k_chunks = params.k.stored_dim / 8, chunks = k_chunks + params.v.stored_dim / 8,
            i = static_cast<int>(blockIdx.y * kWriteThreads + threadIdx.x);
  uint32_t changed = 0;
  if (i < params.kv_heads * chunks) {
    const int head = i / chunks, at = i % chunks;
    const bool key = at < k_chunks;
    const WriteSide& side = key ? params.k : params.v;
    const int dim = 8 * (key ? at : at - k_chunks);
    uint32_t words[kTokens][kWords] = {};
    int2 places[kTokens];  // page and token in it
#pragma unroll
    for (int n = 0; n < kTokens; n++) {
      const int token = static_cast<int>(blockIdx.x + n * gridDim.x);
      places[n] = params.Place(token);
      if (places[n].x < 0 || dim >= side.head_dim) continue;  // zeros behind the head dim
      const auto* const from = reinterpret_cast<const uint4*>(
          static_cast<const T*>(side.rows) + token * side.stride + head * side.head_dim + dim);
#pragma unroll
      for (int w = 0; w < kWords / 4; w++) reinterpret_cast<uint4*>(words[n])[w] = from[w];
    }
#pragma unroll
    for (int n = 0; n < kTokens; n++) {
      if (places[n].x < 0) continue;
      auto* const half = reinterpret_cast<uint16_t*>(
          params.exact.Page(places[n].x) + static_cast<uint64_t>(head) * params.record_bytes + side.offset);
      *reinterpret_cast<uint4*>(half + HalfPrecisionIndex(places[n].y, dim, side.stored_dim)) =
          ToHalves<T>(words[n], &changed);
    }
  }
  if (changed > 0) atomicAdd(params.changed, static_cast<unsigned long long>(changed));
  if (!params.fill_scratch) return;
  const PagedTables& tables = params.tables;
  for (int sequence = static_cast<int>(blockIdx.x); blockIdx.y == 0 && sequence < tables.sequences;
       sequence += static_cast<int>(gridDim.x)) {
    const int pages = (tables.ExactTokens(sequence) + kBlockTokens - 1) / kBlockTokens;
    for (int i = static_cast<int>(threadIdx.x); i < pages; i += kWriteThreads) {
      const int32_t number = tables.exact_table[sequence * tables.exact_row + i];
      if (number >= params.exact.count)
        tables.exact[static_cast<int64_t>(sequence) * tables.max_exact + i] =
            reinterpret_cast<uint64_t>(params.exact.Page(number)) - params.layer_base;
    }
  }
}

struct SealParams {
  const int32_t* pages = nullptr;     // [seals][2]
  const int32_t* count = nullptr;     // or null
  const int32_t* profiles = nullptr;  // [seals], or null
  int32_t most_profiles = 0;
  int64_t profile_stride = 0;
  int32_t seals = 0, kv_heads = 0;
  // Of each layer [layers].
  struct Layer {
    ExactPages exact;
    std::byte* coded;
    const float *mean, *gain;  // of keys, or null
    const TideHead* heads;     // of calibrated keys, [kv_heads], or null
  };
  const Layer* layers = nullptr;
  int32_t first_layer = 0, layer_count = 0;
  int32_t head_dim_k = 0;
  uint64_t coded_stride = 0;
  uint64_t exact_record = 0, coded_record = 0;  // bytes
  uint64_t exact_values = 0, coded_values = 0;  // where V begins in them
  CodecJob *k = nullptr, *v = nullptr;          // [seals * layers * heads]
  // What jobs of no seal read and write: a record of each.
  const std::byte* blank = nullptr;
  std::byte* waste = nullptr;
};
inline constexpr int kSealThreads = 256;

// One CTA: jobs of all seals but the negative ones, in order; then jobs that change nothing, as the encoders
// are launched for all that there could be. Those have no transform, and calibrated keys' encoder does
// nothing.
__global__ void __launch_bounds__(kSealThreads) SealJobsKernel(const __grid_constant__ SealParams params) {
  using Scan = cub::BlockScan<int, kSealThreads>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ int2 chosen[kSealThreads];
  __shared__ int64_t chosen_profile[kSealThreads];  // index
  const int seals = params.count == nullptr ? params.seals : min(max(*params.count, 0), params.seals);
  int before = 0;  // of the seals
  for (int base = 0; base < seals; base += kSealThreads) {
    const int i = base + static_cast<int>(threadIdx.x);
    int2 pages = make_int2(-1, -1);
    if (i < seals) pages = make_int2(params.pages[2 * i], params.pages[2 * i + 1]);
    int at = 0, all = 0;
    const int own = pages.x >= 0 ? 1 : 0;
    Scan(storage).ExclusiveSum(own, at, all);
    if (own == 1) {
      chosen[at] = pages;
      chosen_profile[at] = ProfileIndex(params.profiles, i, params.most_profiles);
    }
    __syncthreads();
    const int per_seal = params.layer_count * params.kv_heads;
    for (int j = static_cast<int>(threadIdx.x); j < all * per_seal; j += kSealThreads) {
      const int2 seal = chosen[j / per_seal];
      const SealParams::Layer& layer = params.layers[params.first_layer + j % per_seal / params.kv_heads];
      const auto head = static_cast<uint64_t>(j % params.kv_heads);
      const std::byte* const source = layer.exact.Page(seal.x) + head * params.exact_record;
      std::byte* const target = layer.coded +
                                static_cast<uint64_t>(static_cast<int64_t>(seal.y)) * params.coded_stride +
                                head * params.coded_record;
      CodecJob job;
      job.row_stride = params.head_dim_k;
      job.source = source + params.exact_values;
      job.target = target + params.coded_values;
      params.v[static_cast<int64_t>(before) * per_seal + j] = job;
      job.source = source;
      job.target = target;
      const int64_t index = chosen_profile[j / per_seal],
                    values = static_cast<int64_t>(head) * params.head_dim_k + index * params.profile_stride;
      const bool has_profile = HasProfile(index, params.most_profiles);
      job.mean = !has_profile || layer.mean == nullptr ? nullptr : layer.mean + values;
      job.gain = !has_profile || layer.gain == nullptr ? nullptr : layer.gain + values;
      if (layer.heads != nullptr) job.tide = layer.heads + head;
      params.k[static_cast<int64_t>(before) * per_seal + j] = job;
    }
    before += all;
    __syncthreads();
  }
  const int64_t per_seal = int64_t{params.layer_count} * params.kv_heads;
  for (int64_t j = before * per_seal + threadIdx.x; j < params.seals * per_seal; j += kSealThreads) {
    CodecJob job;
    job.row_stride = params.head_dim_k;
    job.source = params.blank + params.exact_values;
    job.target = params.waste + params.coded_values;
    params.v[j] = job;
    job.source = params.blank;
    job.target = params.waste;
    params.k[j] = job;
  }
}

}  // namespace kvtide::cuda
