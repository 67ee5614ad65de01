#include "clients/engine/key_calibration.h"

#include <cstddef>
#include <span>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide::engine {
namespace {

GroupShape ShapeOf(const KvGeometry& g) { return {g.layers, g.kv_heads, g.head_dim, g.head_dim}; }

}  // namespace

KeyCalibration::KeyCalibration(const KvGeometry& geometry, KeysAt keys, ThreadPool& pool)
    : geometry_(geometry),
      keys_(keys),
      sums_(ShapeOf(geometry), geometry.query_heads,
            keys == KeysAt::kAfterRope ? std::span<const Rope>() : std::span<const Rope>(geometry_.ropes),
            &pool) {}

void KeyCalibration::Add(int layer, int64_t position, int n, const float* q, const float* k) {
  sums_.AddKeys(layer, position, n, k);
  sums_.AddQueries(layer, position, n, q);
}

void KeyCalibration::HoldBack(int layer, int64_t position, int n, const float* q, const float* k) {
  sums_.HoldBackKeys(layer, position, n, k);
  sums_.HoldBackQueries(layer, position, n, q);
}

std::vector<std::vector<float>> KeyCalibration::means() const {
  std::vector<std::vector<float>> means;
  for (int layer = 0; layer < geometry_.layers; ++layer) {
    KVTIDE_CHECK(sums_.keys(layer) > 0, "layer ", layer, " was given no tokens");
    means.push_back(sums_.Means(layer));
  }
  return means;
}

absl::Status KeyCalibration::AddTransforms(KeyProfile* profile, std::vector<KeyTypeError>* errors,
                                           const TideBudget& budget) const {
  KVTIDE_ASSIGN_OR_RETURN(const Profile made, sums_.MakeProfile(budget));
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<KeyTypeHarm> harms, sums_.Measure(made));
  if (const absl::Status status = CompareKeyTypes(harms, errors); !status.ok())
    return absl::InvalidArgumentError(
        absl::StrCat(status.message(), ": use a longer text, of the kind that the model will see"));
  for (size_t first = 0; first < made.k.size(); first += static_cast<size_t>(geometry_.kv_heads)) {
    Profile layer;
    layer.shape = made.shape;
    const auto begin = made.k.begin() + static_cast<std::ptrdiff_t>(first);
    layer.k.assign(begin, begin + geometry_.kv_heads);
    KeyTransforms& transforms = profile->transforms.emplace_back(TransformsOf(layer));
    if (geometry_.ropes.empty()) continue;
    const Rope& rope = geometry_.ropes[first / static_cast<size_t>(geometry_.kv_heads)];
    transforms.pairs = rope.pairs;
    transforms.frequencies = rope.frequencies;
  }
  profile->after_rope = keys_ == KeysAt::kAfterRope;
  return absl::OkStatus();
}

}  // namespace kvtide::engine
