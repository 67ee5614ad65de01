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
#include "kernels/format/profile_maker.h"
#include "kernels/format/tide.h"
#include "kernels/format/tide_maker.h"

namespace kvtide::engine {
namespace {

constexpr char kFormat[] = "kvtide-key-profile-1", kTransformFormat[] = "kvtide-key-profile-3",
               kAfterRopeFormat[] = "kvtide-key-profile-4", kOldFormat[] = "kvtide-key-profile-2";
constexpr float kLargest = 65504;  // of f16

std::string MeanName(size_t layer) { return absl::StrCat("layers.", layer, ".key_mean"); }
std::string TransformName(size_t layer) { return absl::StrCat("layers.", layer, ".key_transform"); }
std::string CentreName(size_t layer) { return absl::StrCat("layers.", layer, ".key_centre"); }
std::string FrequencyName(size_t layer) { return absl::StrCat("layers.", layer, ".key_frequencies"); }
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
  if (!values.empty()) std::memcpy(values.data(), tensor.bytes.data(), tensor.bytes.size());
  return values;
}

// Transforms and widths of every layer, looked at as a whole by the format itself.
absl::Status ReadTransforms(const WeightMap& tensors, RopePairs rope_pairs, KeyProfile* profile) {
  int64_t pairs = 0;
  for (size_t l = 0; l < profile->means.size(); ++l) {
    const int64_t heads = profile->kv_heads, dim = profile->head_dim;
    KeyTransforms& layer = profile->transforms.emplace_back();
    layer.pairs = rope_pairs;
    if (const auto found = tensors.find(FrequencyName(l));
        l == 0 && found != tensors.end() && found->second.shape.size() == 1)
      pairs = found->second.shape[0];
    KVTIDE_ASSIGN_OR_RETURN(layer.frequencies, Values(tensors, FrequencyName(l), {pairs}));
    KVTIDE_ASSIGN_OR_RETURN(layer.centres, Values(tensors, CentreName(l), {heads, dim}));
    KVTIDE_ASSIGN_OR_RETURN(layer.matrices, Values(tensors, TransformName(l), {heads, dim, dim}));
    const auto widths = tensors.find(WidthName(l));
    const int64_t types = widths != tensors.end() && widths->second.shape.size() == 3 ? widths->second.shape[1]
                                                                                      : kTideTypes;
    KVTIDE_ASSIGN_OR_RETURN(
        const std::vector<float> numbers,
        Values(tensors, WidthName(l), {heads, types == kLeastTideTypes ? types : kTideTypes, Groups(*profile)}));
    for (const float number : numbers) {
      if (!(number >= 0 && number <= kMostTideWidth))
        return absl::InvalidArgumentError(absl::StrCat(WidthName(l), " has the value ", number));
      layer.widths.push_back(static_cast<uint8_t>(number));
    }
  }
  return FormatProfile(*profile).status();
}

}  // namespace

KeyTransforms KeyProfile::Coding(size_t layer) const {
  KeyTransforms coding = transforms[layer];
  if (after_rope) coding.frequencies.clear();
  return coding;
}

absl::StatusOr<Profile> FormatProfile(const KeyProfile& profile) {
  const GroupShape shape{static_cast<int>(profile.means.size()), profile.kv_heads, profile.head_dim,
                         profile.head_dim};
  KVTIDE_RETURN_IF_ERROR(CheckGroupShape(shape));
  std::vector<float> means;
  const auto add = [](const auto& from, auto& to) { to.insert(to.end(), from.begin(), from.end()); };
  for (const std::vector<float>& layer : profile.means) add(layer, means);
  if (profile.transforms.empty()) return MakeMeanProfile(shape, means);
  KeyTransforms all;
  for (size_t l = 0; l < profile.transforms.size(); ++l) {
    const KeyTransforms layer = profile.Coding(l);
    all.pairs = layer.pairs;
    add(layer.frequencies, all.frequencies);
    add(layer.centres, all.centres);
    add(layer.matrices, all.matrices);
    add(layer.widths, all.widths);
  }
  return MakeCalibratedProfile(shape, means, all);
}

absl::Status WriteKeyProfile(const std::string& path, const KeyProfile& profile) {
  std::vector<TensorToWrite> tensors;
  for (size_t l = 0; l < profile.means.size(); ++l)
    tensors.push_back({MeanName(l),
                       DataType::kF32,
                       {profile.kv_heads, profile.head_dim},
                       std::as_bytes(std::span(profile.means[l]))});
  std::vector<std::vector<float>> widths;
  for (const KeyTransforms& layer : profile.transforms)
    widths.emplace_back(layer.widths.begin(), layer.widths.end());
  for (size_t l = 0; l < profile.transforms.size(); ++l) {
    const KeyTransforms& layer = profile.transforms[l];
    tensors.push_back({FrequencyName(l),
                       DataType::kF32,
                       {static_cast<int64_t>(layer.frequencies.size())},
                       std::as_bytes(std::span(layer.frequencies))});
    tensors.push_back({CentreName(l),
                       DataType::kF32,
                       {profile.kv_heads, profile.head_dim},
                       std::as_bytes(std::span(layer.centres))});
    tensors.push_back({TransformName(l),
                       DataType::kF32,
                       {profile.kv_heads, profile.head_dim, profile.head_dim},
                       std::as_bytes(std::span(layer.matrices))});
    tensors.push_back({WidthName(l),
                       DataType::kF32,
                       {profile.kv_heads,
                        static_cast<int64_t>(widths[l].size()) / (profile.kv_heads * Groups(profile)),
                        Groups(profile)},
                       std::as_bytes(std::span(widths[l]))});
  }
  std::map<std::string, std::string> metadata = {{"format", profile.transforms.empty() ? kFormat
                                                            : profile.after_rope       ? kAfterRopeFormat
                                                                                       : kTransformFormat},
                                                 {"model", profile.model},
                                                 {"text", profile.text},
                                                 {"tokens", absl::StrCat(profile.tokens)},
                                                 {"context", absl::StrCat(profile.context)}};
  if (!profile.transforms.empty())
    metadata["rope_pairs"] = profile.transforms[0].pairs == RopePairs::kNeighbours ? "neighbours" : "halves";
  return WriteSafetensors(path, tensors, metadata);
}

absl::StatusOr<KeyProfile> ReadKeyProfile(const std::string& path) {
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<MappedFile> file, MappedFile::Open(path));
  std::map<std::string, std::string> metadata;
  KVTIDE_ASSIGN_OR_RETURN(const WeightMap tensors, ParseSafetensors(file->bytes(), &metadata));
  const auto bad = [&path](const std::string& what) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", what));
  };
  const bool after_rope = metadata["format"] == kAfterRopeFormat,
             transformed = after_rope || metadata["format"] == kTransformFormat;
  if (metadata["format"] == kOldFormat)
    return bad(absl::StrCat("its format is \"", kOldFormat,
                            "\", of an earlier layout, which is no longer read; make it anew "
                            "with `kvtide calibrate`"));
  if (metadata["format"] != kFormat && !transformed)
    return bad(absl::StrCat("its format is \"", metadata["format"], "\", not \"", kFormat, "\", \"",
                            kTransformFormat, "\" or \"", kAfterRopeFormat,
                            "\"; `kvtide calibrate` writes it"));
  KeyProfile profile;
  profile.model = metadata["model"];
  profile.text = metadata["text"];
  profile.after_rope = after_rope;
  if (!metadata["context"].empty() &&
      (!absl::SimpleAtoi(metadata["context"], &profile.context) || profile.context < 0))
    return bad(absl::StrCat("its context is \"", metadata["context"], "\", not a number of tokens"));
  if (!absl::SimpleAtoi(metadata["tokens"], &profile.tokens))
    return bad("it does not say of how many tokens");
  for (size_t l = 0; l < tensors.size() / (transformed ? 5 : 1); ++l) {
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
  if (!transformed) return profile;
  const std::string pairs = metadata["rope_pairs"];
  if (pairs != "halves" && pairs != "neighbours")
    return bad(absl::StrCat("its rope_pairs are \"", pairs, "\", not \"halves\" or \"neighbours\""));
  if (const absl::Status status =
          ReadTransforms(tensors, pairs == "halves" ? RopePairs::kHalves : RopePairs::kNeighbours, &profile);
      !status.ok())
    return bad(std::string(status.message()));
  return profile;
}

absl::Status CheckKeyProfile(const KeyProfile& profile, const KvGeometry& geometry) {
  if (static_cast<int>(profile.means.size()) == geometry.layers && profile.kv_heads == geometry.kv_heads &&
      profile.head_dim == geometry.head_dim) {
    for (size_t l = 0; l < profile.transforms.size() && l < geometry.ropes.size(); ++l)
      if (profile.transforms[l].pairs != geometry.ropes[l].pairs ||
          profile.transforms[l].frequencies != geometry.ropes[l].frequencies)
        return absl::InvalidArgumentError(absl::StrCat("the profile is of ", profile.model,
                                                       " with another RoPE in layer ", l,
                                                       ": make one with `kvtide calibrate`"));
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "the profile is of ", profile.model, " with ", profile.means.size(), " layers of ", profile.kv_heads,
      " KV heads of ", profile.head_dim, "; this model has ", geometry.layers, " of ", geometry.kv_heads,
      " of ", geometry.head_dim, ": make one with `kvtide calibrate`"));
}

void UseKeyProfile(const KeyProfile& profile, KvGeometry* geometry) {
  geometry->key_means = profile.means;
  geometry->key_transforms.clear();
  for (size_t l = 0; l < profile.transforms.size(); ++l)
    geometry->key_transforms.push_back(profile.Coding(l));
}

}  // namespace kvtide::engine
