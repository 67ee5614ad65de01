#include "clients/engine/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status.h"
#include "nlohmann/json.hpp"

namespace kvtide::engine {
namespace {

using nlohmann::json;

// The format's own limit; a larger length is a sign of a damaged file.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;

struct ElementType {
  const char* name;
  size_t bytes;
  std::optional<DataType> type;
};
constexpr ElementType kElementTypes[] = {
    {"F32", 4, DataType::kF32},
    {"F16", 2, DataType::kF16},
    {"BF16", 2, DataType::kBf16},
    {"F64", 8, {}},
    {"I64", 8, {}},
    {"I32", 4, {}},
    {"I16", 2, {}},
    {"I8", 1, {}},
    {"U64", 8, {}},
    {"U32", 4, {}},
    {"U16", 2, {}},
    {"U8", 1, {}},
    {"BOOL", 1, {}},
    {"F8_E4M3", 1, {}},
    {"F8_E5M2", 1, {}},
    {"F8_E8M0", 1, {}},
};

absl::Status Damaged(const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat("not a whole safetensors file: ", what));
}

absl::StatusOr<uint64_t> ReadOffset(const json& value, const std::string& name) {
  if (!value.is_number_unsigned())
    return Damaged(absl::StrCat("tensor ", name, " has a data offset that is no count"));
  return value.get<uint64_t>();
}

absl::StatusOr<WeightTensor> ParseTensor(const std::string& name, const json& entry,
                                         std::span<const std::byte> data) {
  if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string() ||
      !entry.contains("shape") || !entry["shape"].is_array() || !entry.contains("data_offsets") ||
      !entry["data_offsets"].is_array() || entry["data_offsets"].size() != 2) {
    return Damaged(absl::StrCat("tensor ", name, " lacks dtype, shape or data_offsets"));
  }
  WeightTensor tensor;
  tensor.type_name = entry["dtype"].get<std::string>();
  const auto* known = std::find_if(std::begin(kElementTypes), std::end(kElementTypes),
                                   [&](const ElementType& t) { return tensor.type_name == t.name; });
  if (known == std::end(kElementTypes)) {
    return Damaged(absl::StrCat("tensor ", name, " has the unknown dtype ", tensor.type_name));
  }
  tensor.type = known->type;
  uint64_t bytes = known->bytes;
  for (const json& dim : entry["shape"]) {
    if (!dim.is_number_unsigned())
      return Damaged(absl::StrCat("tensor ", name, " has a negative or fractional dimension"));
    const uint64_t n = dim.get<uint64_t>();
    if (n > uint64_t{1} << 48 || __builtin_mul_overflow(bytes, n, &bytes)) {
      return Damaged(absl::StrCat("tensor ", name, " has an impossible shape"));
    }
    tensor.shape.push_back(static_cast<int64_t>(n));
  }
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t begin, ReadOffset(entry["data_offsets"][0], name));
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t end, ReadOffset(entry["data_offsets"][1], name));
  if (begin > end || end > data.size()) {
    return Damaged(absl::StrCat("tensor ", name, " ends at byte ", end, " of the data, the file holds ",
                                data.size(), "; download it again"));
  }
  if (end - begin != bytes) {
    return Damaged(absl::StrCat("tensor ", name, " ", tensor.type_name, ShapeText(tensor.shape), " needs ",
                                bytes, " bytes, its range has ", end - begin));
  }
  tensor.bytes = data.subspan(begin, end - begin);
  return tensor;
}

absl::StatusOr<json> ReadJson(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return absl::NotFoundError(absl::StrCat("cannot open ", path, ": ", std::strerror(errno)));
  json parsed = json::parse(in, nullptr, /*allow_exceptions=*/false);
  if (parsed.is_discarded()) return absl::InvalidArgumentError(absl::StrCat(path, " is not JSON"));
  return parsed;
}

// The shard names of an index, each a plain name in the same folder.
absl::StatusOr<std::set<std::string>> ShardNames(const std::string& index_path) {
  KVTIDE_ASSIGN_OR_RETURN(const json index, ReadJson(index_path));
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(index_path, " has no weight_map"));
  }
  std::set<std::string> names;
  for (const auto& item : index["weight_map"].items()) {
    if (!item.value().is_string())
      return absl::InvalidArgumentError(absl::StrCat(index_path, ": ", item.key(), " names no file"));
    const std::string name = item.value().get<std::string>();
    if (name.empty() || name.find('/') != std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat(index_path, ": shard name \"", name, "\" leaves the folder"));
    }
    names.insert(name);
  }
  return names;
}

}  // namespace

std::string ShapeText(std::span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

absl::StatusOr<WeightMap> ParseSafetensors(std::span<const std::byte> file,
                                           std::map<std::string, std::string>* metadata) {
  if (file.size() < 8) return Damaged(absl::StrCat("it has ", file.size(), " bytes"));
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | static_cast<uint64_t>(file[i]);
  if (header_bytes > kMaxHeaderBytes || header_bytes > file.size() - 8) {
    return Damaged(absl::StrCat("its header claims ", header_bytes, " bytes, the file has ", file.size()));
  }
  const char* text = reinterpret_cast<const char*>(file.data() + 8);
  const json header = json::parse(text, text + header_bytes, nullptr, /*allow_exceptions=*/false);
  if (!header.is_object()) return Damaged("its header is not a JSON object");
  const std::span<const std::byte> data = file.subspan(8 + header_bytes);
  WeightMap tensors;
  std::vector<std::pair<const std::byte*, const std::byte*>> ranges;
  for (const auto& item : header.items()) {
    if (item.key() == "__metadata__") {
      if (!item.value().is_object()) return Damaged("its metadata is not a JSON object");
      for (const auto& note : item.value().items()) {
        if (metadata != nullptr && note.value().is_string())
          (*metadata)[note.key()] = note.value().get<std::string>();
      }
      continue;
    }
    KVTIDE_ASSIGN_OR_RETURN(WeightTensor tensor, ParseTensor(item.key(), item.value(), data));
    ranges.emplace_back(tensor.bytes.data(), tensor.bytes.data() + tensor.bytes.size());
    tensors.emplace(item.key(), std::move(tensor));
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return Damaged("two tensors share bytes");
  }
  return tensors;
}

absl::StatusOr<std::unique_ptr<MappedFile>> MappedFile::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return absl::NotFoundError(absl::StrCat("cannot open ", path, ": ", std::strerror(errno)));
  struct stat info {};
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(fd);
    return absl::InvalidArgumentError(absl::StrCat(path, " is not a regular file"));
  }
  const size_t size = static_cast<size_t>(info.st_size);
  if (size == 0) {
    close(fd);
    return absl::InvalidArgumentError(absl::StrCat(path, " is empty"));
  }
  void* address = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  const int error = errno;
  close(fd);
  if (address == MAP_FAILED)
    return absl::InternalError(absl::StrCat("cannot map ", path, ": ", std::strerror(error)));
  return std::unique_ptr<MappedFile>(new MappedFile({static_cast<const std::byte*>(address), size}));
}

MappedFile::~MappedFile() { munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size()); }

absl::StatusOr<SafetensorsFolder> SafetensorsFolder::Open(const std::string& folder) {
  namespace fs = std::filesystem;
  std::error_code error;
  if (!fs::is_directory(folder, error)) {
    return absl::NotFoundError(
        absl::StrCat("no model folder ", folder, " (a Hugging Face folder with safetensors is expected)"));
  }
  const fs::path index = fs::path(folder) / "model.safetensors.index.json";
  std::set<std::string> names;
  if (fs::exists(index, error)) {
    KVTIDE_ASSIGN_OR_RETURN(names, ShardNames(index.string()));
  } else {
    names.insert("model.safetensors");
  }
  SafetensorsFolder model;
  model.folder_ = folder;
  for (const std::string& name : names) {
    const std::string path = (fs::path(folder) / name).string();
    KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<MappedFile> file, MappedFile::Open(path));
    absl::StatusOr<WeightMap> tensors = ParseSafetensors(file->bytes());
    if (!tensors.ok()) return Annotate(tensors.status(), path);
    for (auto& [tensor_name, tensor] : *tensors) {
      if (!model.tensors_.emplace(tensor_name, std::move(tensor)).second) {
        return absl::InvalidArgumentError(
            absl::StrCat(path, ": tensor ", tensor_name, " is in another shard too"));
      }
    }
    model.files_.push_back(std::move(file));
  }
  return model;
}

absl::StatusOr<WeightTensor> SafetensorsFolder::Get(const std::string& name,
                                                    std::span<const int64_t> shape) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) return absl::NotFoundError(absl::StrCat(folder_, " has no tensor ", name));
  const WeightTensor& tensor = found->second;
  if (!std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end())) {
    return absl::InvalidArgumentError(absl::StrCat(folder_, ": tensor ", name, " has the shape ",
                                                   ShapeText(tensor.shape), ", config.json asks for ",
                                                   ShapeText(shape)));
  }
  if (!tensor.type) {
    return absl::UnimplementedError(absl::StrCat(folder_, ": tensor ", name, " is ", tensor.type_name,
                                                 "; the engine reads F32, F16 and BF16 weights"));
  }
  return tensor;
}

}  // namespace kvtide::engine
