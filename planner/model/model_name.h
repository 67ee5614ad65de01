// Model names as people write them: catalogue names, Hugging Face ids (Qwen/Qwen3-32B-AWQ), llama.cpp's and
// ollama's tags (unsloth/Qwen3-32B-GGUF:Q4_K_M, qwen3:32b). Pure function.
#pragma once

#include <string>
#include <vector>

namespace kvtide::planner {

struct ModelName {
  // Names to look for, the most exact first: without owner, then without the words behind it one by one.
  std::vector<std::string> candidates;
  std::string weights;  // a name of weights that the text carries (awq, q4_k_m), empty when it has none
};

ModelName ReadModelName(const std::string& text);

}  // namespace kvtide::planner
