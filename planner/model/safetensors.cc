#include "planner/model/safetensors.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::planner {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxElements = int64_t{1} << 56;

int DtypeBits(const std::string& name) {
  static const std::map<std::string, int> bits = {
      {"BOOL", 8}, {"U8", 8},   {"I8", 8},    {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"I16", 16},
      {"U16", 16}, {"F16", 16}, {"BF16", 16}, {"I32", 32},    {"U32", 32},    {"F32", 32},    {"I64", 64},
      {"U64", 64}, {"F64", 64}, {"F4", 4},    {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"C64", 64}};
  auto it = bits.find(name);
  return it == bits.end() ? 0 : it->second;
}

absl::Status TensorError(const std::string& name, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat("tensor '", name.substr(0, 128), "': ", what));
}

// Fills shape and elements.
absl::Status ReadShape(const std::string& name, const Json& shape, SafetensorsTensor* tensor) {
  if (!shape.is_array() || shape.size() > 16)
    return TensorError(name, "shape is not a list of at most 16 numbers");
  int64_t elements = 1;
  for (const Json& dim : shape) {
    if (!dim.is_number_integer() || (!dim.is_number_unsigned() && dim.get<int64_t>() < 0)) {
      return TensorError(name, "shape has an entry that is not a number of 0 or more");
    }
    const uint64_t size = dim.get<uint64_t>();
    if (size > static_cast<uint64_t>(kMaxElements) ||
        (size > 0 && elements > kMaxElements / static_cast<int64_t>(size))) {
      return TensorError(name, "shape is absurdly large");
    }
    elements *= static_cast<int64_t>(size);
    tensor->shape.push_back(static_cast<int64_t>(size));
  }
  tensor->elements = elements;
  return absl::OkStatus();
}

absl::Status AddTensor(const std::string& name, const Json& tensor, int64_t data_bytes,
                       SafetensorsHeader* header) {
  if (!tensor.is_object() || !tensor.contains("dtype") || !tensor.contains("shape") ||
      !tensor.contains("data_offsets")) {
    return TensorError(name, "dtype, shape and data_offsets must be given");
  }
  if (!tensor["dtype"].is_string()) return TensorError(name, "dtype is not a name");
  const std::string dtype = tensor["dtype"].get<std::string>();
  const int bits = DtypeBits(dtype);
  if (bits == 0) return TensorError(name, absl::StrCat("unknown dtype '", dtype.substr(0, 32), "'"));
  SafetensorsTensor read;
  read.dtype = dtype;
  KVTIDE_RETURN_IF_ERROR(ReadShape(name, tensor["shape"], &read));
  const int64_t elements = read.elements;
  const Json& offsets = tensor["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned()) {
    return TensorError(name, "data_offsets is not a pair of numbers of 0 or more");
  }
  const uint64_t begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
  if (begin > end || end > static_cast<uint64_t>(kMaxElements) * 8) {
    return TensorError(name, absl::StrCat("data_offsets ", begin, " to ", end, " are not in order"));
  }
  const int64_t bytes = static_cast<int64_t>(end - begin);
  const int64_t expected = elements / 8 * bits + (elements % 8 * bits + 7) / 8;
  if (bytes != expected) {
    return TensorError(name,
                       absl::StrCat("data_offsets span ", bytes, " bytes, shape and dtype need ", expected));
  }
  if (data_bytes >= 0 && static_cast<int64_t>(end) > data_bytes) {
    return TensorError(name, absl::StrCat("data ends at ", end, " but the file holds ", data_bytes,
                                          " bytes of data (truncated download?)"));
  }
  if (header->tensor_bytes > INT64_MAX - bytes) return TensorError(name, "the sum of all tensors overflows");
  header->tensor_bytes += bytes;
  header->elements += elements;
  read.begin = static_cast<int64_t>(begin);
  read.end = static_cast<int64_t>(end);
  header->tensors.emplace(name, std::move(read));
  return absl::OkStatus();
}

absl::Status CheckPlaces(const SafetensorsHeader& header) {
  std::vector<std::pair<const std::string*, const SafetensorsTensor*>> order;
  for (const auto& [name, tensor] : header.tensors)
    if (tensor.begin < tensor.end) order.emplace_back(&name, &tensor);
  std::sort(order.begin(), order.end(),
            [](const auto& a, const auto& b) { return a.second->begin < b.second->begin; });
  for (size_t i = 1; i < order.size(); i++)
    if (order[i].second->begin < order[i - 1].second->end)
      return TensorError(*order[i].first,
                         absl::StrCat("it shares bytes with tensor '", *order[i - 1].first, "'"));
  return absl::OkStatus();
}

absl::StatusOr<std::set<std::string>> ShardsOfIndex(const std::filesystem::path& index) {
  std::ifstream file(index);
  std::stringstream text;
  text << file.rdbuf();
  const Json json = Json::parse(text.str(), nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded() || !json.is_object() || !json.contains("weight_map") ||
      !json["weight_map"].is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(index.string(), ": not an index with a weight_map"));
  }
  std::set<std::string> shards;
  for (const auto& [name, shard] : json["weight_map"].items()) {
    if (!shard.is_string())
      return absl::InvalidArgumentError(absl::StrCat(index.string(), ": '", name, "' names no file"));
    const std::string file_name = shard.get<std::string>();
    if (file_name.empty() || file_name.find('/') != std::string::npos)
      return absl::InvalidArgumentError(
          absl::StrCat(index.string(), ": shard name '", file_name, "' leaves the folder"));
    shards.insert(file_name);
  }
  return shards;
}

}  // namespace

absl::StatusOr<int64_t> ParseSafetensorsLength(std::string_view first_bytes) {
  if (first_bytes.size() < 8)
    return absl::InvalidArgumentError("shorter than the 8 bytes of a safetensors header length");
  uint64_t length = 0;
  std::memcpy(&length, first_bytes.data(), 8);
  if (length < 2 || length > static_cast<uint64_t>(kMaxSafetensorsHeader)) {
    return absl::InvalidArgumentError(absl::StrCat("header length ", length, " is outside 2 to ",
                                                   kMaxSafetensorsHeader, "; not a safetensors file?"));
  }
  return static_cast<int64_t>(length);
}

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view json, int64_t data_bytes) {
  const Json root = Json::parse(json.begin(), json.end(), nullptr, /*allow_exceptions=*/false);
  if (root.is_discarded() || !root.is_object()) {
    return absl::InvalidArgumentError("the safetensors header is not a JSON object");
  }
  SafetensorsHeader header;
  header.header_bytes = static_cast<int64_t>(json.size());
  for (const auto& [name, tensor] : root.items()) {
    if (name != "__metadata__") {
      KVTIDE_RETURN_IF_ERROR(AddTensor(name, tensor, data_bytes, &header));
      continue;
    }
    if (!tensor.is_object()) return absl::InvalidArgumentError("__metadata__ is not a JSON object");
    for (const auto& [note, text] : tensor.items())
      if (text.is_string()) header.notes[note] = text.get<std::string>();
  }
  KVTIDE_RETURN_IF_ERROR(CheckPlaces(header));
  return header;
}

absl::StatusOr<SafetensorsHeader> ReadSafetensorsFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  if (!file || error) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
  char first[8] = {};
  file.read(first, 8);
  KVTIDE_ASSIGN_OR_RETURN(const int64_t length, ParseSafetensorsLength(std::string_view(
                                                    first, static_cast<size_t>(file.gcount()))));
  if (length + 8 > static_cast<int64_t>(size)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": the header of ", length, " bytes is longer than the file of ", size));
  }
  std::string json(static_cast<size_t>(length), '\0');
  if (!file.read(json.data(), length)) return absl::DataLossError(absl::StrCat(path, ": cannot be read"));
  absl::StatusOr<SafetensorsHeader> header =
      ParseSafetensorsHeader(json, static_cast<int64_t>(size) - length - 8);
  if (!header.ok()) return Annotate(header.status(), path);
  return header;
}

absl::StatusOr<std::set<std::string>> SafetensorsShards(const std::string& folder) {
  std::set<std::string> shards;
  std::error_code error;
  const std::filesystem::path index = std::filesystem::path(folder) / "model.safetensors.index.json";
  if (std::filesystem::exists(index, error)) return ShardsOfIndex(index);
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    if (entry.path().extension() == ".safetensors") shards.insert(entry.path().filename().string());
  }
  if (error || shards.empty()) return absl::NotFoundError(absl::StrCat(folder, ": no .safetensors files"));
  return shards;
}

absl::StatusOr<SafetensorsHeader> ReadSafetensorsFolder(const std::string& path) {
  KVTIDE_ASSIGN_OR_RETURN(const std::set<std::string> shards, SafetensorsShards(path));
  SafetensorsHeader sum;
  for (const std::string& shard : shards) {
    KVTIDE_ASSIGN_OR_RETURN(SafetensorsHeader header,
                            ReadSafetensorsFile((std::filesystem::path(path) / shard).string()));
    sum.header_bytes += header.header_bytes;
    sum.tensor_bytes += header.tensor_bytes;
    sum.elements += header.elements;
    for (auto& [name, tensor] : header.tensors)
      if (!sum.tensors.emplace(name, std::move(tensor)).second)
        return absl::InvalidArgumentError(
            absl::StrCat(path, "/", shard, ": tensor '", name, "' is in another shard too"));
    sum.notes.merge(header.notes);
  }
  return sum;
}

}  // namespace kvtide::planner
