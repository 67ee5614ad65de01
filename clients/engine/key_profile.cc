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
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide::engine {
namespace {

constexpr char kFormat[] = "kvtide-key-profile-1";
constexpr float kLargest = 65504;  // of f16

std::string MeanName(size_t layer) { return absl::StrCat("layers.", layer, ".key_mean"); }

}  // namespace

absl::Status WriteKeyProfile(const std::string& path, const KeyProfile& profile) {
  std::vector<TensorToWrite> tensors;
  for (size_t l = 0; l < profile.means.size(); ++l)
    tensors.push_back({MeanName(l),
                       DataType::kF32,
                       {profile.kv_heads, profile.head_dim},
                       std::as_bytes(std::span(profile.means[l]))});
  return WriteSafetensors(path, tensors,
                          {{"format", kFormat},
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
  if (metadata["format"] != kFormat)
    return bad(absl::StrCat("its format is \"", metadata["format"], "\", not \"", kFormat,
                            "\"; `kvtide calibrate` writes it"));
  KeyProfile profile;
  profile.model = metadata["model"];
  profile.text = metadata["text"];
  if (!absl::SimpleAtoi(metadata["tokens"], &profile.tokens))
    return bad("it does not say of how many tokens");
  for (size_t l = 0; l < tensors.size(); ++l) {
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

KeyMeans::KeyMeans(const KvGeometry& geometry)
    : sums_(static_cast<size_t>(geometry.layers), std::vector<double>(geometry.kv_width())),
      tokens_(static_cast<size_t>(geometry.layers)) {}

void KeyMeans::Add(int layer, int n, const float* k) {
  std::vector<double>& sums = sums_[static_cast<size_t>(layer)];
  for (int t = 0; t < n; ++t)
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += k[static_cast<size_t>(t) * sums.size() + i];
  tokens_[static_cast<size_t>(layer)] += n;
}

std::vector<std::vector<float>> KeyMeans::means() const {
  std::vector<std::vector<float>> means;
  for (size_t l = 0; l < sums_.size(); ++l) {
    KVTIDE_CHECK(tokens_[l] > 0, "layer ", l, " was given no tokens");
    std::vector<float>& mean = means.emplace_back();
    for (const double sum : sums_[l])
      mean.push_back(static_cast<float>(sum / static_cast<double>(tokens_[l])));
  }
  return means;
}

}  // namespace kvtide::engine
