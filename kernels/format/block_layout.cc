#include "kernels/format/block_layout.h"

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/format/tide.h"

namespace kvtide {

absl::Status CheckGroupShape(const GroupShape& shape) {
  const auto bad_dim = [](int d) { return d < 16 || d > 512 || d % 16 != 0; };
  if (shape.layers < 1 || shape.layers > 1024 || shape.kv_heads < 1 || shape.kv_heads > 1024)
    return absl::InvalidArgumentError(absl::StrCat("layer group with ", shape.layers, " layers and ",
                                                   shape.kv_heads, " KV heads: both must be 1 to 1024"));
  if (bad_dim(shape.head_dim_k) || bad_dim(shape.head_dim_v))
    return absl::InvalidArgumentError(absl::StrCat("head dims K ", shape.head_dim_k, " and V ",
                                                   shape.head_dim_v,
                                                   ": must be multiples of 16 from 16 to 512"));
  return absl::OkStatus();
}

HalfLayout MakeHalfLayout(CacheType type, int head_dim) {
  const CacheTypeInfo& info = Info(type);
  HalfLayout half;
  half.head_dim = head_dim;
  half.stored_dim = StoredDim(head_dim);
  if (info.storage == Storage::kHalf) {
    half.code_bytes = static_cast<size_t>(half.stored_dim) * kBlockTokens * 2;
  } else if (info.calibrated) {
    half.groups = 1;
    half.code_bytes = static_cast<size_t>(TideUnits(info.bits, half.stored_dim)) * kTideUnitBytes;
    half.scale_bytes = kTideGainBytes;
  } else {
    half.groups = (half.stored_dim + info.group - 1) / info.group;
    half.code_bytes = CodePlaneBytes(info.bits, half.stored_dim);
    half.scale_bytes = static_cast<size_t>(half.groups) * kBlockTokens * 2;
  }
  half.bytes = half.code_bytes + half.scale_bytes;
  KVTIDE_CHECK(half.bytes % 128 == 0, info.name, " d ", head_dim);
  return half;
}

BlockLayout::BlockLayout(const GroupShape& shape, CachePair pair)
    : shape_(shape),
      pair_(pair),
      k_(MakeHalfLayout(pair.k, shape.head_dim_k)),
      v_(MakeHalfLayout(pair.v, shape.head_dim_v)) {
  KVTIDE_CHECK(CheckGroupShape(shape).ok(), std::string(CheckGroupShape(shape).message()));
}

double BlockLayout::BitsPerValue() const {
  return 8.0 * static_cast<double>(record_bytes()) /
         (kBlockTokens * static_cast<double>(shape_.head_dim_k + shape_.head_dim_v));
}

}  // namespace kvtide
