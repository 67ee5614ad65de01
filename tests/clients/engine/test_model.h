// Small random models for the engine's tests: written as Hugging Face folders, and computed again the slow
// way in double precision.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "clients/engine/model_config.h"

namespace kvtide::engine {

// A folder of its own under the test's temporary directory.
std::string MakeFolder(const std::string& name);
void WriteFile(const std::string& path, const std::string& bytes);

struct TestTensor {
  std::vector<int64_t> shape;
  std::vector<float> values;  // exact in bfloat16
};
using TestTensors = std::map<std::string, TestTensor>;

// The bytes of a safetensors file in BF16, F16 or F32.
std::string SafetensorsBytes(const TestTensors& tensors, const std::string& type);

// Random weights for a config, by their names in the file.
TestTensors RandomWeights(const ModelConfig& config, uint32_t seed);

// logits[tokens][vocab_size], all tokens at once, straight from the definition.
std::vector<double> ReferenceLogits(const ModelConfig& config, const TestTensors& weights,
                                    const std::vector<int32_t>& tokens);

}  // namespace kvtide::engine
