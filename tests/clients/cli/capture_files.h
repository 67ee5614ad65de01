// Captured files for tests: built in memory, tensor by tensor.
#pragma once

#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "kernels/base/float16.h"
#include "nlohmann/json.hpp"

namespace kvtide::cli {

struct FileTensor {
  std::string type = "F32";
  std::vector<int64_t> shape;
  std::vector<float> values;
};
using FileTensors = std::map<std::string, FileTensor>;

inline FileTensor RandomTensor(std::vector<int64_t> shape, uint32_t seed, const std::string& type = "F32") {
  FileTensor tensor{type, std::move(shape), {}};
  size_t n = 1;
  for (const int64_t d : tensor.shape) n *= static_cast<size_t>(d);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < n; ++i) tensor.values.push_back(normal(random));
  return tensor;
}

// Two layers, 200 tokens, 2 KV heads of 64 and 32 values, 4 query heads.
inline FileTensors SmallCapture(const std::string& type = "F32") {
  FileTensors tensors;
  for (int l = 0; l < 2; ++l) {
    const std::string layer = "layers." + std::to_string(l) + ".";
    const uint32_t seed = 10 * static_cast<uint32_t>(l);
    tensors[layer + "k"] = RandomTensor({200, 2, 64}, seed, type);
    tensors[layer + "v"] = RandomTensor({200, 2, 32}, seed + 1, type);
    tensors[layer + "q"] = RandomTensor({200, 4, 64}, seed + 2, type);
  }
  return tensors;
}

inline std::string FileBytes(const FileTensors& tensors,
                             const std::map<std::string, std::string>& metadata = {}) {
  nlohmann::json header;
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const size_t begin = data.size();
    for (const float value : tensor.values) {
      if (tensor.type == "F32") {
        data.append(reinterpret_cast<const char*>(&value), 4);
      } else {
        const uint16_t bits = tensor.type == "F16" ? F32ToF16(value) : F32ToBf16(value);
        data.append(reinterpret_cast<const char*>(&bits), 2);
      }
    }
    header[name] = {{"dtype", tensor.type}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  const std::string text = header.dump();
  std::string bytes(8, '\0');
  for (int i = 0; i < 8; ++i)
    bytes[static_cast<size_t>(i)] = static_cast<char>(text.size() >> (8 * i) & 0xFF);
  return bytes + text + data;
}

}  // namespace kvtide::cli
