#include "kernels/paged_attention.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "kernels/attend_args.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

constexpr size_t kPageAlignment = 128, kRowAlignment = 16;

bool IsAligned(const void* data, size_t to) { return reinterpret_cast<uintptr_t>(data) % to == 0; }

absl::Status CheckPages(const char* kind, bool pool, size_t stride, size_t bytes) {
  if (stride == 0 || pool) return absl::OkStatus();
  if (stride < bytes || stride % kPageAlignment != 0)
    return absl::InvalidArgumentError(absl::StrCat(kind, " pages of ", bytes, " bytes every ", stride,
                                                   ": the stride must be a multiple of ", kPageAlignment,
                                                   " that holds a page"));
  return absl::OkStatus();
}

absl::Status CheckCount(const char* name, int64_t count, int64_t least, int64_t most) {
  if (count < least || count > most)
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is ", count, ", ", least, " to ", most, " are possible"));
  return absl::OkStatus();
}

// Keys of a calibrated type have transforms, of keys after RoPE.
absl::Status CheckCalibratedKeys(const PagedOptions& options, std::span<const PagedLayer> layers) {
  const CacheType type = options.pair.k;
  if (!Info(type).calibrated) return absl::OkStatus();
  constexpr char kMakeOne[] =
      "make one of keys after RoPE with `kvtide calibrate --keys after-rope` or `python -m kvtide.calibrate "
      "--keys after-rope`";
  if (options.max_profiles > 0)
    return absl::InvalidArgumentError(
        absl::StrCat(PairName(options.pair),
                     ": calibrated keys have the transforms of their layer, and no profiles of sequences "
                     "(max_profiles); choose another K type, or let the pool attend"));
  for (size_t i = 0; i < layers.size(); i++) {
    const PagedLayer& layer = layers[i];
    const auto wrong = [&](const auto&... what) {
      return absl::InvalidArgumentError(
          absl::StrCat("layer ", i, ", ", PairName(options.pair), ": ", what...));
    };
    if (layer.keys == nullptr) return wrong("calibrated keys need the transforms of a profile: ", kMakeOne);
    if (layer.k_mean != nullptr || layer.k_gain != nullptr)
      return wrong(
          "calibrated keys have means of their own, in their transforms; leave k_mean and k_gain out");
    for (int h = 0; h < options.shape.kv_heads; h++)
      if (layer.keys[h].turned_back())
        return wrong("the profile codes keys before RoPE, which only a pool attends, as it knows positions: ",
                     kMakeOne);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckPagedOptions(const PagedOptions& options, std::span<const PagedLayer> layers,
                               size_t alignment) {
  KVTIDE_RETURN_IF_ERROR(CheckGroupShape(options.shape));
  if (Info(options.pair.v).calibrated)
    return absl::InvalidArgumentError(
        absl::StrCat(PairName(options.pair), ": calibrated types are of keys alone; choose another V type"));
  if (options.shape.layers != 1)
    return absl::InvalidArgumentError(
        absl::StrCat("a page of ", options.shape.layers, " layers: a page is one layer of a block"));
  if (options.heads <= 0 || options.heads % options.shape.kv_heads != 0)
    return absl::InvalidArgumentError(absl::StrCat(options.heads,
                                                   " query heads: must be a positive multiple "
                                                   "of the ",
                                                   options.shape.kv_heads, " KV heads"));
  if (!std::isfinite(options.scale))
    return absl::InvalidArgumentError(absl::StrCat("scale ", options.scale, " is not finite"));
  if (!(options.softcap >= 0) || !std::isfinite(options.softcap))
    return absl::InvalidArgumentError(
        absl::StrCat("softcap ", options.softcap, ": must be positive, or 0 for none"));
  if (options.window < 0 || options.window > kMostPosition)
    return absl::InvalidArgumentError(
        absl::StrCat("window ", options.window, ": must be positive, or 0 for none"));
  constexpr int64_t kMostBlocks = (int64_t{1} << 30) / kBlockTokens, kMostTokens = 1 << 20;
  KVTIDE_RETURN_IF_ERROR(CheckCount("max_sequences", options.max_sequences, 1, kMostPagedSequences));
  KVTIDE_RETURN_IF_ERROR(CheckCount("max_tokens", options.max_tokens, options.max_sequences, kMostTokens));
  KVTIDE_RETURN_IF_ERROR(CheckCount("max_coded_blocks", options.max_coded_blocks, 0, kMostBlocks));
  KVTIDE_RETURN_IF_ERROR(CheckCount("max_exact_blocks", options.max_exact_blocks, 1, kMostBlocks));
  KVTIDE_RETURN_IF_ERROR(CheckCount("max_profiles", options.max_profiles, 0, kMostTokens));
  KVTIDE_RETURN_IF_ERROR(CheckCount("max_seals", options.max_seals, 0, kMostTokens));
  KVTIDE_RETURN_IF_ERROR(
      CheckCount("exact_pages", options.exact_pages, 0, options.pool ? INT32_MAX : INT32_MAX / kBlockTokens));
  if (options.pool && options.scratch != nullptr)
    return absl::InvalidArgumentError("a pool has no scratch pages: every page has its place in a block");
  KVTIDE_RETURN_IF_ERROR(
      CheckPages("coded", options.pool, options.coded_stride, CodedPage(options).block_bytes()));
  KVTIDE_RETURN_IF_ERROR(
      CheckPages("exact", options.pool, options.exact_stride, ExactPage(options).block_bytes()));
  if (options.prefill_bytes != 0 && options.prefill_bytes < (size_t{1} << 20))
    return absl::InvalidArgumentError(
        absl::StrCat("prefill_bytes is ", options.prefill_bytes, ", 0 or at least 1 MiB are possible"));
  if (!IsAligned(options.scratch, alignment))
    return absl::InvalidArgumentError(absl::StrCat("scratch pages must begin at a multiple of ", alignment));
  if (layers.empty()) return absl::InvalidArgumentError("no layers");
  for (size_t i = 0; i < layers.size(); i++) {
    const PagedLayer& layer = layers[i];
    const auto wrong = [i](const std::string& what) {
      return absl::InvalidArgumentError(absl::StrCat("layer ", i, ": ", what));
    };
    if (layer.coded == nullptr && options.max_coded_blocks > 0) return wrong("no coded pages");
    if (options.max_profiles > 0 && (layer.k_mean != nullptr || layer.k_gain != nullptr))
      return wrong("a profile of the layer, and profiles of sequences (max_profiles); give one of the two");
    if (layer.exact == nullptr && options.exact_pages > 0) return wrong("no exact pages");
    if (!IsAligned(layer.coded, alignment) || !IsAligned(layer.exact, alignment))
      return wrong(absl::StrCat("pages must begin at a multiple of ", alignment));
  }
  return CheckCalibratedKeys(options, layers);
}

absl::StatusOr<Profile> MakePagedKeyProfile(const PagedOptions& options, std::span<const PagedLayer> layers) {
  Profile profile;
  profile.shape = options.shape;
  profile.shape.layers = static_cast<int>(layers.size());
  for (size_t i = 0; i < layers.size(); i++)
    for (int h = 0; h < options.shape.kv_heads; h++) {
      HeadProfile& head = profile.k.emplace_back(layers[i].keys[h]);
      const absl::Status status = CompleteTransform(options.shape.head_dim_k, head);
      if (!status.ok())
        return absl::InvalidArgumentError(absl::StrCat("layer ", i, ", head ", h, ": ", status.message(),
                                                       "; the profile is of another model"));
    }
  KVTIDE_RETURN_IF_ERROR(CheckProfileFor(options.pair.k, profile.shape, &profile));
  profile.v.resize(profile.k.size());
  profile.hash = HashProfile(profile);
  return profile;
}

absl::Status CheckPagedStep(const PagedStep& step, const PagedOptions& options) {
  KVTIDE_RETURN_IF_ERROR(CheckCount("sequences of the step", step.sequences, 0, options.max_sequences));
  KVTIDE_RETURN_IF_ERROR(CheckCount("tokens of the step", step.tokens, 0, options.max_tokens));
  KVTIDE_RETURN_IF_ERROR(CheckCount("most_queries", step.most_queries, 0, step.tokens));
  KVTIDE_RETURN_IF_ERROR(CheckCount("seals of the step", step.seals, 0, options.max_seals));
  if (step.seals > 0 && step.seal_pages == nullptr)
    return absl::InvalidArgumentError("a step with seals and without seal_pages");
  if (step.sequences == 0) return absl::OkStatus();
  if (step.query_start == nullptr || step.lengths == nullptr || step.coded_first == nullptr ||
      step.coded_count == nullptr || step.exact_table == nullptr)
    return absl::InvalidArgumentError(
        "a step needs query_start, lengths, coded_first, coded_count and exact_table");
  if (step.write_slots != nullptr && options.pool)
    return absl::InvalidArgumentError("a step over a pool with write_slots: rows go where exact_table says");
  if (step.coded_table == nullptr && options.max_coded_blocks > 0)
    return absl::InvalidArgumentError("a step without coded_table: max_coded_blocks is not 0");
  if (step.coded_row < 0 || step.exact_row < 1)
    return absl::InvalidArgumentError(absl::StrCat("rows of ", step.coded_row, " coded and ", step.exact_row,
                                                   " exact pages in the tables"));
  const bool some = step.host_query_start != nullptr || step.host_lengths != nullptr ||
                    step.host_coded_first != nullptr || step.host_coded_count != nullptr;
  const bool all = step.host_query_start != nullptr && step.host_lengths != nullptr &&
                   step.host_coded_first != nullptr && step.host_coded_count != nullptr;
  if (some && !all) return absl::InvalidArgumentError("of the four host_ arrays all are given or none");
  return absl::OkStatus();
}

absl::Status CheckPagedProfile(int index, const PagedOptions& options) {
  if (index >= 1 && index < options.max_profiles) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("profile ", index, ": 1 to ", options.max_profiles - 1, " are possible (max_profiles)"));
}

absl::Status CheckPagedRows(PagedRows rows, DataType type, int heads, int head_dim, const char* name) {
  const int64_t width = int64_t{heads} * head_dim;
  if (rows.data == nullptr) return absl::InvalidArgumentError(absl::StrCat("no ", name));
  if (rows.stride < width)
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": a stride of ", rows.stride, " between rows of ", width, " values"));
  if (!IsAligned(rows.data, kRowAlignment) ||
      static_cast<size_t>(rows.stride) * DataTypeBytes(type) % kRowAlignment != 0)
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": rows must begin at multiples of ", kRowAlignment, " bytes"));
  return absl::OkStatus();
}

absl::Status CheckPagedWritten(PagedRows k, PagedRows v, const PagedStep& step, const PagedOptions& options) {
  if (step.among_coded) return absl::FailedPreconditionError("the step is only read (among_coded)");
  const GroupShape& shape = options.shape;
  KVTIDE_RETURN_IF_ERROR(CheckPagedRows(k, options.type, shape.kv_heads, shape.head_dim_k, "k"));
  return CheckPagedRows(v, options.type, shape.kv_heads, shape.head_dim_v, "v");
}

absl::Status CheckPagedAttended(PagedRows q, MutablePagedRows out, const PagedOptions& options) {
  KVTIDE_RETURN_IF_ERROR(CheckPagedRows(q, options.type, options.heads, options.shape.head_dim_k, "q"));
  return CheckPagedRows({out.data, out.stride}, options.output_type, options.heads, options.shape.head_dim_v,
                        "out");
}

}  // namespace kvtide
