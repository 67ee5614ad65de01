#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/float16.h"
#include "kernels/base/status.h"
#include "kernels/cuda/codec/codec_kernels.h"
#include "kernels/cuda/device/capability.h"
#include "kernels/cuda/device/launch.h"
#include "kernels/cuda/prefill/prefill_call.h"
#include "kernels/cuda/prefill/prefill_map.h"
#include "kernels/cuda/step/paged_prefill.h"

namespace kvtide::cuda {

// A CodecJob before a layer has said where its pages are.
struct alignas(16) PagedJob {
  uint64_t source = 0;  // entry of a table << 32 | bytes in a page; with kExactEntry: of the exact pages
  std::byte* target = nullptr;
};

namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr uint64_t kExactEntry = uint64_t{1} << 63;
constexpr float kMostSoftcapOfMany = 1000;  // layer_plan.cc says why

size_t Size(int64_t n) { return static_cast<size_t>(n); }
size_t RoundUp(size_t bytes) { return (bytes + 255) / 256 * 256; }

// A block of a run as an address that nobody reads: which entry of a table it is.
std::byte* EntryAddress(uint64_t entry, bool exact) {
  return reinterpret_cast<std::byte*>(entry << 32 | (exact ? kExactEntry : 0));
}

struct ResolveParams {
  const PagedJob* jobs = nullptr;
  CodecJob* to = nullptr;
  int32_t count = 0, heads = 0, head_dim_k = 0;
  const uint64_t *coded_entries = nullptr, *exact_entries = nullptr;
  PagedPrefillLayer layer;
  uint64_t coded_record = 0, coded_values = 0;  // bytes, and where V begins in them
  float* sinks = nullptr;
};
constexpr int kResolveThreads = 256;

// Jobs of a layer, and a copy of its sinks where plans name them: without sinks such that count for nothing.
__global__ void ResolveKernel(const __grid_constant__ ResolveParams params) {
  const int i = static_cast<int>(blockIdx.x * kResolveThreads + threadIdx.x);
  if (i < params.heads) params.sinks[i] = params.layer.sinks == nullptr ? -INFINITY : params.layer.sinks[i];
  if (i >= params.count) return;
  const PagedJob from = params.jobs[i];
  const bool exact = (from.source & kExactEntry) != 0;
  const uint64_t entry = (from.source & ~kExactEntry) >> 32, inside = from.source & 0xffffffffu;
  CodecJob job;
  job.source = (exact ? params.layer.exact + params.exact_entries[entry]
                      : params.layer.coded + params.coded_entries[entry]) +
               inside;
  job.target = from.target;
  // Profiles are of coded keys alone.
  if (!exact && inside % params.coded_record < params.coded_values) {
    const uint64_t head = inside / params.coded_record,
                   values = head * static_cast<uint64_t>(params.head_dim_k);
    if (params.layer.mean != nullptr) job.mean = params.layer.mean + values;
    if (params.layer.gain != nullptr) job.gain = params.layer.gain + values;
    if (params.layer.heads != nullptr) job.tide = params.layer.heads + head;
  }
  params.to[i] = job;
}

struct MoveParams {
  void* rows = nullptr;  // of the engine
  int64_t stride = 0;    // elements
  DataType type = DataType::kF32;
  float* dense = nullptr;  // [count][width]
  int64_t count = 0;
  int32_t width = 0;
  // With results, the log-sum-exps too: [count][heads] both; null = not wanted.
  float* lse = nullptr;
  const float* dense_lse = nullptr;
  int32_t heads = 0;
};
constexpr int kMoveThreads = 256;

// Four values a thread. kOut: to the engine's rows, rounded to nearest; else from them.
template <bool kOut>
__global__ void __launch_bounds__(kMoveThreads) MoveRows(const __grid_constant__ MoveParams params) {
  const int64_t first = int64_t{blockIdx.x} * kMoveThreads + threadIdx.x,
                step = int64_t{gridDim.x} * kMoveThreads;
  const int per_row = params.width / 4;
  for (int64_t i = first; i < params.count * per_row; i += step) {
    const int64_t row = i / per_row, at = row * params.stride + i % per_row * 4;
    auto* const dense = reinterpret_cast<float4*>(params.dense) + i;
    if (params.type == DataType::kF32) {
      auto* const rows = reinterpret_cast<float4*>(static_cast<float*>(params.rows) + at);
      if constexpr (kOut)
        *rows = *dense;
      else
        *dense = *rows;
      continue;
    }
    auto* const rows = reinterpret_cast<ushort4*>(static_cast<uint16_t*>(params.rows) + at);
    const bool half = params.type == DataType::kF16;
    if constexpr (kOut) {
      const float4 x = *dense;
      const auto narrow = [half](float v) {
        return half ? F32ToF16(fminf(fmaxf(v, -65504.0f), 65504.0f)) : F32ToBf16(v);
      };
      *rows = make_ushort4(narrow(x.x), narrow(x.y), narrow(x.z), narrow(x.w));
    } else {
      const ushort4 x = *rows;
      const auto widen = [half](uint16_t v) { return half ? F16ToF32(v) : Bf16ToF32(v); };
      *dense = make_float4(widen(x.x), widen(x.y), widen(x.z), widen(x.w));
    }
  }
  if constexpr (kOut) {
    if (params.lse != nullptr)
      for (int64_t i = first; i < params.count * params.heads; i += step) params.lse[i] = params.dense_lse[i];
  }
}

template <bool kOut>
absl::Status LaunchMove(MoveParams params, int processors, cudaStream_t stream) {
  const size_t ctas = (Size(params.count) * Size(params.width / 4) + kMoveThreads - 1) / kMoveThreads;
  return LaunchKernel(reinterpret_cast<const void*>(&MoveRows<kOut>), std::min(ctas, 8 * Size(processors)),
                      kMoveThreads, 0, false, &params, stream);
}

}  // namespace

absl::Status PagedPrefill::Create(const PagedOptions& options, const BlockLayout& coded,
                                  const BlockLayout& exact, const DeviceImage& image, int processors) {
  options_ = options;
  coded_ = coded;
  exact_ = exact;
  environment_.processors = processors;
  environment_.scratch_bytes = options.prefill_bytes;
  environment_.shared_limit = image.shared_limit;
  environment_.warpgroups = HasWarpgroups(image.image_capability);
  environment_.read_in_place = false;
  const GroupShape& shape = options_.shape;
  const int64_t most_rows = int64_t{options.max_tokens} * (options.heads / shape.kv_heads);
  if (options.prefill_bytes == 0 || options.softcap > kMostSoftcapOfMany ||
      most_rows <= environment_.most_decode_rows)
    return absl::OkStatus();
  BlockRun runs[2];
  runs[0].layout = options.max_coded_blocks > 0 ? &coded_ : &exact_;
  runs[1].layout = &exact_;
  if (!IsPrefill({runs, options.max_tokens, 0}, shape, options.heads, environment_)) return absl::OkStatus();
  possible_ = true;
  kernel_ = FindPrefillKernel(std::max(shape.head_dim_k, shape.head_dim_v), environment_.warpgroups);
  KVTIDE_RETURN_IF_ERROR(PreparePrefillKernels(image));
  const size_t tokens = Size(options.max_tokens), heads = Size(options.heads);
  const auto take = [this](DeviceBuffer& buffer, size_t bytes) {
    bytes_ += bytes;
    return buffer.Reserve(bytes, bytes);
  };
  KVTIDE_RETURN_IF_ERROR(take(scratch_, options.prefill_bytes));
  KVTIDE_RETURN_IF_ERROR(take(queries_, tokens * heads * Size(shape.head_dim_k) * sizeof(float)));
  KVTIDE_RETURN_IF_ERROR(take(output_, tokens * heads * Size(shape.head_dim_v) * sizeof(float)));
  KVTIDE_RETURN_IF_ERROR(take(lse_, tokens * heads * sizeof(float)));
  KVTIDE_RETURN_IF_ERROR(take(sinks_, heads * sizeof(float)));
  if (kernel_->warpgroups) {
    KVTIDE_RETURN_IF_ERROR(MakePageMap(scratch_.data(), kernel_->dim, &maps_.scratch));
    maps_.blocks = maps_.scratch;
  }
  for (Upload& upload : uploads_) KVTIDE_RETURN_IF_ERROR(upload.sent.Create());
  return absl::OkStatus();
}

absl::Status PagedPrefill::Plan(const PagedStep& step, const uint64_t* coded_entries,
                                const uint64_t* exact_entries, cudaStream_t stream) {
  items_.clear();
  plan_.reset();
  if (!possible_ || step.host_query_start == nullptr) return absl::OkStatus();
  coded_entries_ = coded_entries;
  exact_entries_ = exact_entries;
  KVTIDE_RETURN_IF_ERROR(AddItems(step));
  if (items_.empty()) return absl::OkStatus();
  batch_ = {options_.heads, true, options_.window, plan_items_};
  plan_.emplace(batch_, options_.shape, environment_, *kernel_);
  return Place(stream);
}

absl::Status PagedPrefill::AddItems(const PagedStep& step) {
  blocks_.clear();
  runs_.clear();
  plan_items_.clear();
  size_t rows = 0;
  const int group = options_.heads / options_.shape.kv_heads;
  for (int s = 0; s < step.sequences; s++) {
    const int64_t first = step.host_query_start[s], queries = step.host_query_start[s + 1] - first,
                  length = step.host_lengths[s];
    if (length <= 0 || queries * group <= most_rows()) continue;
    const int64_t coded = step.host_coded_count[s], coded_first = coded > 0 ? step.host_coded_first[s] : 0,
                  blocks = (length + kBlockTokens - 1) / kBlockTokens, exact = blocks - coded;
    if (first < 0 || first + queries > step.tokens || queries > length || coded < 0 ||
        coded > options_.max_coded_blocks || coded_first < 0 || coded_first + coded > length / kBlockTokens ||
        exact > options_.max_exact_blocks)
      return absl::InvalidArgumentError(absl::StrCat(
          "sequence ", s, " of the step: ", length, " tokens, ", queries, " of them new at row ", first,
          ", coded blocks ", coded_first, " + ", coded, " do not fit together or the options"));
    std::vector<BlockRun>& runs = runs_.emplace_back();
    const auto add = [&](const BlockLayout& layout, int64_t begin, int64_t count, int64_t first_entry) {
      if (count == 0) return;
      const bool of_exact = &layout == &exact_;
      std::vector<std::byte*>& list = blocks_.emplace_back();
      const int64_t row = int64_t{s} * (of_exact ? options_.max_exact_blocks : options_.max_coded_blocks);
      for (int64_t i = 0; i < count; i++)
        list.push_back(EntryAddress(static_cast<uint64_t>(row + first_entry + i), of_exact));
      runs.push_back({&layout, nullptr, list, begin * kBlockTokens,
                      std::min(count * kBlockTokens, length - begin * kBlockTokens)});
    };
    add(exact_, 0, coded_first, 0);
    add(coded_, coded_first, coded, 0);
    add(exact_, coded_first + coded, blocks - coded_first - coded, coded_first);
    plan_items_.push_back({runs, static_cast<int>(queries), length - queries});
    items_.push_back({first, queries, rows});
    rows += Size(queries);
  }
  return absl::OkStatus();
}

// Takes memory for the plan's arrays, makes offsets addresses and queues the copy.
absl::Status PagedPrefill::Place(cudaStream_t stream) {
  size_t bytes = 0, jobs = 0;
  const auto count = [&](size_t elements, size_t size) { bytes += RoundUp(elements * size); };
  for (const PrefillRound& round : plan_->rounds()) {
    count(round.parts.size(), sizeof(PrefillPart));
    count(round.groups.size(), sizeof(PrefillGroup));
    count(round.slots.size(), sizeof(uint32_t));
    count(round.places.size(), sizeof(PagePlace));
    for (const PrefillRound::Conversion& c : round.conversions) jobs += c.jobs.size();
  }
  count(jobs, sizeof(PagedJob));
  Upload& upload = uploads_[next_upload_++ % 2];
  if (upload.used) KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventSynchronize(upload.sent.get()));
  KVTIDE_RETURN_IF_ERROR(upload.host.Reserve(bytes));
  KVTIDE_RETURN_IF_ERROR(upload.device.Reserve(bytes));
  KVTIDE_RETURN_IF_ERROR(jobs_.Reserve(jobs * sizeof(CodecJob)));
  size_t used = 0;
  const auto place = [&]<class T>(size_t elements, T** host) {
    used = RoundUp(used);
    *host = reinterpret_cast<T*>(upload.host.data() + used);
    T* const device = reinterpret_cast<T*>(upload.device.data() + used);
    used += elements * sizeof(T);
    return device;
  };
  const auto put = [&]<class T>(const std::vector<T>& values) {
    T* host = nullptr;
    T* const device = place(values.size(), &host);
    if (!values.empty()) std::memcpy(host, values.data(), values.size() * sizeof(T));
    return device;
  };
  PagedJob* job = nullptr;
  device_jobs_ = place(jobs, &job);
  job_count_ = jobs;
  std::byte* const scratch = scratch_.data();
  const size_t tiles = RoundUp(plan_->scratch_bytes()),
               outputs = RoundUp(plan_->most_parts() * Size(kernel_->rows * kernel_->dim) * sizeof(float));
  if (tiles + outputs + plan_->most_parts() * Size(kernel_->rows) * sizeof(float2) > scratch_.bytes())
    return absl::ResourceExhaustedError(
        absl::StrCat("a prefill needs more than the ", scratch_.bytes(), " bytes of prefill_bytes"));
  const auto* resolved = reinterpret_cast<const CodecJob*>(jobs_.data());
  const auto moved = [](auto* offset, const DeviceBuffer& base) {
    return reinterpret_cast<decltype(offset)>(base.data() + reinterpret_cast<size_t>(offset));
  };
  for (PrefillRound& round : plan_->rounds()) {
    for (PrefillRound::Conversion& c : round.conversions) {
      for (const PrefillJob& from : c.jobs)
        *job++ = {reinterpret_cast<uint64_t>(from.source), scratch + from.target};
      c.device = resolved;
      resolved += c.jobs.size();
    }
    const PagePlace* const places = put(round.places);
    PrefillPart* parts = nullptr;
    round.attend.parts = place(round.parts.size(), &parts);
    for (size_t i = 0; i < round.parts.size(); i++) {
      parts[i] = round.parts[i].part;
      parts[i].tiles = scratch + round.parts[i].tiles;
      parts[i].pages = places + round.parts[i].pages;
      parts[i].query = reinterpret_cast<const float*>(queries_.data()) + round.parts[i].query;
    }
    for (PrefillGroup& group : round.groups) {
      group.output = moved(group.output, output_);
      group.lse = moved(group.lse, lse_);
      group.sinks = moved(group.sinks, sinks_);
    }
    round.attend.maps = maps_;
    round.attend.outputs = reinterpret_cast<float*>(scratch + tiles);
    round.attend.sums = reinterpret_cast<float2*>(scratch + tiles + outputs);
    round.attend.head_dim = options_.shape.head_dim_k;
    round.attend.value_dim = options_.shape.head_dim_v;
    round.attend.scale = options_.scale * kLog2E;
    round.attend.softcap = options_.softcap * kLog2E;
    round.attend.groups = round.merge.groups = put(round.groups);
    round.merge.slots = put(round.slots);
    round.merge.outputs = round.attend.outputs;
    round.merge.sums = round.attend.sums;
    round.merge.group_count = static_cast<int32_t>(round.merged_groups);
    round.merge.head_dim = options_.shape.head_dim_v;
    round.merge.rows = kernel_->rows;
  }
  KVTIDE_CUDA_RETURN_IF_ERROR(
      cudaMemcpyAsync(upload.device.data(), upload.host.data(), used, cudaMemcpyHostToDevice, stream));
  KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventRecord(upload.sent.get(), stream));
  upload.used = true;
  return absl::OkStatus();
}

absl::Status PagedPrefill::Attend(const PagedPrefillLayer& layer, PagedRows q, MutablePagedRows out,
                                  float* lse, cudaStream_t stream) {
  if (empty()) return absl::OkStatus();
  const int heads = options_.heads, processors = environment_.processors;
  ResolveParams resolve;
  resolve.jobs = device_jobs_;
  resolve.to = reinterpret_cast<CodecJob*>(jobs_.data());
  resolve.count = static_cast<int32_t>(job_count_);
  resolve.heads = heads;
  resolve.head_dim_k = options_.shape.head_dim_k;
  resolve.coded_entries = coded_entries_;
  resolve.exact_entries = exact_entries_;
  resolve.layer = layer;
  resolve.coded_record = coded_.record_bytes();
  resolve.coded_values = coded_.v_codes();
  resolve.sinks = reinterpret_cast<float*>(sinks_.data());
  const size_t threads = std::max(job_count_, Size(heads));
  KVTIDE_RETURN_IF_ERROR(LaunchKernel(reinterpret_cast<const void*>(&ResolveKernel),
                                      (threads + kResolveThreads - 1) / kResolveThreads, kResolveThreads, 0,
                                      false, &resolve, stream));
  for (const Item& item : items_) {
    MoveParams move;
    move.rows = static_cast<std::byte*>(const_cast<void*>(q.data)) +
                Size(item.first_token * q.stride) * DataTypeBytes(options_.type);
    move.stride = q.stride;
    move.type = options_.type;
    move.width = heads * options_.shape.head_dim_k;
    move.count = item.queries;
    move.dense = reinterpret_cast<float*>(queries_.data()) + item.first_row * Size(move.width);
    KVTIDE_RETURN_IF_ERROR(LaunchMove<false>(move, processors, stream));
  }
  for (PrefillRound& round : plan_->rounds()) {
    for (const PrefillRound::Conversion& c : round.conversions) {
      const bool key = c.side == Side::kKey;
      KVTIDE_CUDA_RETURN_IF_ERROR(LaunchDecode(
          key ? c.layout->pair().k : c.layout->pair().v, c.side, key ? c.layout->k() : c.layout->v(),
          kernel_->warpgroups ? RowTarget::kF16Page : RowTarget::kF16Tile, kernel_->dim, c.device,
          static_cast<int>(c.jobs.size()), stream));
    }
    PrefillParams attend = round.attend;
    PrefillMergeParams merge = round.merge;
    KVTIDE_RETURN_IF_ERROR(LaunchKernel(kernel_->attend, round.parts.size(), kernel_->threads,
                                        kernel_->shared_bytes, false, &attend, stream));
    KVTIDE_RETURN_IF_ERROR(LaunchKernel(
        kernel_->merge, (round.merged_groups * Size(kernel_->rows) + kMergeWarps - 1) / kMergeWarps,
        32 * kMergeWarps, 0, false, &merge, stream));
  }
  for (const Item& item : items_) {
    MoveParams move;
    move.rows = static_cast<std::byte*>(out.data) +
                Size(item.first_token * out.stride) * DataTypeBytes(options_.output_type);
    move.stride = out.stride;
    move.type = options_.output_type;
    move.width = heads * options_.shape.head_dim_v;
    move.count = item.queries;
    move.dense = reinterpret_cast<float*>(output_.data()) + item.first_row * Size(move.width);
    move.heads = heads;
    move.lse = lse == nullptr ? nullptr : lse + item.first_token * heads;
    move.dense_lse = reinterpret_cast<const float*>(lse_.data()) + item.first_row * Size(heads);
    KVTIDE_RETURN_IF_ERROR(LaunchMove<true>(move, processors, stream));
  }
  return absl::OkStatus();
}

}  // namespace kvtide::cuda
