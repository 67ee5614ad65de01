#include "clients/engine/key_profile.h"

#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <span>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "clients/engine/safetensors.h"
#include "clients/engine/safetensors_writer.h"
#include "kernels/base/status.h"
#include "kernels/format/tide.h"
#include "kernels/format/tide_maker.h"

namespace kvtide::engine {
namespace {

constexpr char kFormat[] = "kvtide-key-profile-1", kTransformFormat[] = "kvtide-key-profile-2";
constexpr float kLargest = 65504;  // of f16

std::string MeanName(size_t layer) { return absl::StrCat("layers.", layer, ".key_mean"); }
std::string TransformName(size_t layer) { return absl::StrCat("layers.", layer, ".key_transform"); }
std::string WidthName(size_t layer) { return absl::StrCat("layers.", layer, ".key_widths"); }

int64_t Groups(const KeyProfile& profile) { return StoredDim(profile.head_dim) / kTideGroup; }

// The values of a tensor of this shape.
absl::StatusOr<std::vector<float>> Values(const WeightMap& tensors, const std::string& name,
                                          const std::vector<int64_t>& shape) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) return absl::InvalidArgumentError(absl::StrCat("it has no ", name));
  const WeightTensor& tensor = found->second;
  if (tensor.type != DataType::kF32 || tensor.shape != shape)
    return absl::InvalidArgumentError(absl::StrCat(name, " is not f32 ", ShapeText(shape)));
  std::vector<float> values(tensor.bytes.size() / sizeof(float));
  std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
  return values;
}

// Transforms and widths of every layer, looked at as a whole by the format itself.
absl::Status ReadTransforms(const WeightMap& tensors, KeyProfile* profile) {
  std::vector<float> means, transforms;
  std::vector<uint8_t> widths;
  for (size_t l = 0; l < profile->means.size(); ++l) {
    const int64_t heads = profile->kv_heads, dim = profile->head_dim;
    KVTIDE_ASSIGN_OR_RETURN(profile->transforms.emplace_back(),
                            Values(tensors, TransformName(l), {heads, dim, dim}));
    KVTIDE_ASSIGN_OR_RETURN(const std::vector<float> numbers,
                            Values(tensors, WidthName(l), {heads, kTideTypes, Groups(*profile)}));
    std::vector<uint8_t>& own = profile->widths.emplace_back();
    for (const float number : numbers) {
      if (!(number >= 0 && number <= kMostTideWidth))
        return absl::InvalidArgumentError(absl::StrCat(WidthName(l), " has the value ", number));
      own.push_back(static_cast<uint8_t>(number));
    }
    means.insert(means.end(), profile->means[l].begin(), profile->means[l].end());
    transforms.insert(transforms.end(), profile->transforms[l].begin(), profile->transforms[l].end());
    widths.insert(widths.end(), own.begin(), own.end());
  }
  const GroupShape shape{static_cast<int>(profile->means.size()), profile->kv_heads, profile->head_dim,
                         profile->head_dim};
  KVTIDE_RETURN_IF_ERROR(CheckGroupShape(shape));
  return MakeCalibratedProfile(shape, means, transforms, widths).status();
}

}  // namespace

absl::Status WriteKeyProfile(const std::string& path, const KeyProfile& profile) {
  std::vector<TensorToWrite> tensors;
  for (size_t l = 0; l < profile.means.size(); ++l)
    tensors.push_back({MeanName(l),
                       DataType::kF32,
                       {profile.kv_heads, profile.head_dim},
                       std::as_bytes(std::span(profile.means[l]))});
  std::vector<std::vector<float>> widths;
  for (const std::vector<uint8_t>& layer : profile.widths) widths.emplace_back(layer.begin(), layer.end());
  for (size_t l = 0; l < profile.transforms.size(); ++l) {
    tensors.push_back({TransformName(l),
                       DataType::kF32,
                       {profile.kv_heads, profile.head_dim, profile.head_dim},
                       std::as_bytes(std::span(profile.transforms[l]))});
    tensors.push_back({WidthName(l),
                       DataType::kF32,
                       {profile.kv_heads, kTideTypes, Groups(profile)},
                       std::as_bytes(std::span(widths[l]))});
  }
  return WriteSafetensors(path, tensors,
                          {{"format", profile.transforms.empty() ? kFormat : kTransformFormat},
                           {"model", profile.model},
                           {"text", profile.text},
                           {"tokens", absl::StrCat(profile.tokens)}});
}

absl::StatusOr<KeyProfile> ReadKeyProfile(const std::string& path) {
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<MappedFile> file, MappedFile::Open(path));
  std::map<std::string, std::string> metadata;
  KVTIDE_ASSIGN_OR_RETURN(const WeightMap tensors, ParseSafetensors(file->bytes(), &metadata));
  const auto bad = [&path](const std::string& what) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", what));
  };
  const bool transformed = metadata["format"] == kTransformFormat;
  if (metadata["format"] != kFormat && !transformed)
    return bad(absl::StrCat("its format is \"", metadata["format"], "\", not \"", kFormat, "\" or \"",
                            kTransformFormat, "\"; `kvtide calibrate` writes it"));
  KeyProfile profile;
  profile.model = metadata["model"];
  profile.text = metadata["text"];
  if (!absl::SimpleAtoi(metadata["tokens"], &profile.tokens))
    return bad("it does not say of how many tokens");
  for (size_t l = 0; l < tensors.size() / (transformed ? 3 : 1); ++l) {
    const auto found = tensors.find(MeanName(l));
    if (found == tensors.end()) return bad(absl::StrCat("it has no ", MeanName(l)));
    const WeightTensor& tensor = found->second;
    if (tensor.type != DataType::kF32 || tensor.shape.size() != 2 ||
        (l > 0 && tensor.shape != std::vector<int64_t>{profile.kv_heads, profile.head_dim}))
      return bad(absl::StrCat(MeanName(l), " is not f32 [kv_heads][head_dim] as that of layer 0"));
    profile.kv_heads = static_cast<int>(tensor.shape[0]);
    profile.head_dim = static_cast<int>(tensor.shape[1]);
    std::vector<float>& mean = profile.means.emplace_back(tensor.bytes.size() / sizeof(float));
    std::memcpy(mean.data(), tensor.bytes.data(), tensor.bytes.size());
    for (const float value : mean)
      if (!(std::abs(value) <= kLargest)) return bad(absl::StrCat(MeanName(l), " has the value ", value));
  }
  if (profile.means.empty()) return bad("it has no layers");
  if (transformed)
    if (const absl::Status status = ReadTransforms(tensors, &profile); !status.ok())
      return bad(std::string(status.message()));
  return profile;
}

absl::Status CheckKeyProfile(const KeyProfile& profile, const KvGeometry& geometry) {
  if (static_cast<int>(profile.means.size()) == geometry.layers && profile.kv_heads == geometry.kv_heads &&
      profile.head_dim == geometry.head_dim)
    return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "the profile is of ", profile.model, " with ", profile.means.size(), " layers of ", profile.kv_heads,
      " KV heads of ", profile.head_dim, "; this model has ", geometry.layers, " of ", geometry.kv_heads,
      " of ", geometry.head_dim, ": make one with `kvtide calibrate`"));
}

void UseKeyProfile(const KeyProfile& profile, KvGeometry* geometry) {
  geometry->key_means = profile.means;
  geometry->key_transforms = profile.transforms;
  geometry->key_widths = profile.widths;
}

}  // namespace kvtide::engine
