#include "clients/engine/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status.h"
#include "planner/model/safetensors.h"

namespace kvtide::engine {
namespace {

// None: a type that the engine does not compute with (integers, float8).
std::optional<DataType> TypeOf(const std::string& dtype) {
  if (dtype == "F32") return DataType::kF32;
  if (dtype == "F16") return DataType::kF16;
  if (dtype == "BF16") return DataType::kBf16;
  return std::nullopt;
}

}  // namespace

std::string ShapeText(std::span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

absl::StatusOr<WeightMap> ParseSafetensors(std::span<const std::byte> file,
                                           std::map<std::string, std::string>* metadata) {
  const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
  KVTIDE_ASSIGN_OR_RETURN(const int64_t length, planner::ParseSafetensorsLength(text));
  if (length > static_cast<int64_t>(file.size()) - 8)
    return absl::InvalidArgumentError(
        absl::StrCat("the header of ", length, " bytes is longer than the file of ", file.size()));
  const std::span<const std::byte> data = file.subspan(8 + static_cast<size_t>(length));
  KVTIDE_ASSIGN_OR_RETURN(planner::SafetensorsHeader header,
                          planner::ParseSafetensorsHeader(text.substr(8, static_cast<size_t>(length)),
                                                          static_cast<int64_t>(data.size())));
  WeightMap tensors;
  for (auto& [name, tensor] : header.tensors)
    tensors[name] = {
        TypeOf(tensor.dtype), tensor.dtype, std::move(tensor.shape),
        data.subspan(static_cast<size_t>(tensor.begin), static_cast<size_t>(tensor.end - tensor.begin))};
  if (metadata != nullptr) *metadata = std::move(header.notes);
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
  KVTIDE_ASSIGN_OR_RETURN(const std::set<std::string> names, planner::SafetensorsShards(folder));
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

absl::Status CheckWeight(const WeightTensor& tensor, const std::string& file, const std::string& name,
                         std::span<const int64_t> shape) {
  if (!std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end())) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": tensor ", name, " has the shape ",
                                                   ShapeText(tensor.shape), ", the model's sizes ask for ",
                                                   ShapeText(shape)));
  }
  if (!tensor.readable()) {
    return absl::UnimplementedError(absl::StrCat(
        file, ": tensor ", name, " is ", tensor.type_name,
        "; the engine reads F32, F16 and BF16 weights, and of GGUF Q4_0 to Q8_0 and Q2_K to Q6_K"));
  }
  return absl::OkStatus();
}

absl::StatusOr<WeightTensor> SafetensorsFolder::Get(const std::string& name,
                                                    std::span<const int64_t> shape) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) return absl::NotFoundError(absl::StrCat(folder_, " has no tensor ", name));
  const WeightTensor& tensor = found->second;
  KVTIDE_RETURN_IF_ERROR(CheckWeight(tensor, folder_, name, shape));
  return tensor;
}

}  // namespace kvtide::engine
