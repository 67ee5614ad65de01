// How large the weights of a model are in a quantisation named as people name them. Published files count
// first (weights.csv), then parameters x bits. Formats of safetensors keep token embedding and head in 16
// bits, those of GGUF code them too.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "planner/model/geometry.h"
#include "planner/model/weights.h"

namespace kvtide::planner {

// The one name of a quantisation: "Q4_K_M" -> "q4_k_m", "fp16" -> "f16", "Q8" -> "q8_0", "4bit" -> "w4a16".
// Empty when nobody calls weights so.
std::string WeightName(const std::string& text);

// All names that WeightName gives, for messages and completion.
std::vector<std::string> WeightNames();

// Which files an engine loads: GGUF (llama.cpp), or the safetensors of the published checkpoint as a server
// lays them out in memory. They differ where both have a format of one name (MXFP4), and GGUF codes what
// safetensors keep in 16 bits.
enum class WeightFiles { kGguf, kSafetensors };

absl::StatusOr<Weights> EstimateWeights(const ModelGeometry& model, const std::string& quantisation,
                                        WeightFiles files = WeightFiles::kGguf);

// Whether a name of WeightName is one of GGUF's, of safetensors, or of both (16 and 32 bits, mxfp4).
bool IsGgufFormat(const std::string& name);
bool IsSafetensorsFormat(const std::string& name);

// Takes the token embedding off estimated weights, for llama.cpp with a GPU that has memory of its own.
// Weights of files are counted without it already (gguf_geometry.h).
void LeaveEmbeddingOnHost(Weights* weights);

// Of weights of `bytes`: what routed experts take, by their share of the parameters. 0 for a dense model, or
// when the share is not known.
int64_t ExpertBytes(const ModelGeometry& model, int64_t bytes);

}  // namespace kvtide::planner
