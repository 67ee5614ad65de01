// The weights of a model as they lie on the device(s), all of them together.
#pragma once

#include <cstdint>
#include <string>

#include "planner/item.h"

namespace kvtide::planner {

struct Weights {
  int64_t bytes = 0;
  Provenance provenance = Provenance::kExact;
  std::string source;  // "--weights 14.4GB", "gguf tensors", "25.2e9 x 4.5 bits", ...
  // Of bytes, where a GGUF file is estimated: a token embedding that does not double as head. llama.cpp
  // leaves it in host memory (LeaveEmbeddingOnHost).
  int64_t embedding_bytes = 0;
  std::string format;  // a name of WeightName (weight_size.h), empty for sizes and files
};

}  // namespace kvtide::planner
