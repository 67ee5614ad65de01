#include "clients/engine/safetensors_writer.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "nlohmann/json.hpp"

namespace kvtide::engine {

int64_t TensorToWrite::size() const {
  auto size = static_cast<int64_t>(DataTypeBytes(type));
  for (const int64_t n : shape) size *= n;
  return size;
}

std::string SafetensorsHeader(std::span<const TensorToWrite> tensors,
                              const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json json;
  json["__metadata__"] = metadata;
  int64_t offset = 0;
  for (const TensorToWrite& tensor : tensors) {
    json[tensor.name] = {{"dtype", absl::AsciiStrToUpper(DataTypeName(tensor.type))},
                         {"shape", tensor.shape},
                         {"data_offsets", {offset, offset + tensor.size()}}};
    offset += tensor.size();
  }
  std::string text = json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::string header(8, '\0');
  for (int i = 0; i < 8; ++i)
    header[static_cast<size_t>(i)] = static_cast<char>(text.size() >> (8 * i) & 0xFF);
  return header + text;
}

absl::Status FailedWrite(const std::string& path) {
  const int error = errno;
  const std::string what = absl::StrCat("cannot write ", path, ": ", std::strerror(error));
  return error == ENOENT || error == EACCES || error == EISDIR || error == ENOTDIR
             ? absl::InvalidArgumentError(what)
             : absl::InternalError(what);
}

absl::Status WriteSafetensors(const std::string& path, std::span<const TensorToWrite> tensors,
                              const std::map<std::string, std::string>& metadata) {
  const std::string part = path + ".part";
  std::ofstream out(part, std::ios::binary | std::ios::trunc);
  if (!out) return FailedWrite(path);
  const std::string header = SafetensorsHeader(tensors, metadata);
  out.write(header.data(), static_cast<std::streamsize>(header.size()));
  for (const TensorToWrite& tensor : tensors) {
    KVTIDE_CHECK(static_cast<int64_t>(tensor.bytes.size()) == tensor.size(), tensor.name, " has ",
                 tensor.bytes.size(), " bytes, its shape ", tensor.size());
    out.write(reinterpret_cast<const char*>(tensor.bytes.data()),
              static_cast<std::streamsize>(tensor.bytes.size()));
  }
  out.close();
  if (out && std::rename(part.c_str(), path.c_str()) == 0) return absl::OkStatus();
  const absl::Status failed = FailedWrite(path);
  std::remove(part.c_str());
  return failed;
}

}  // namespace kvtide::engine
