#include "planner/model/model_name.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "planner/model/weight_size.h"

namespace kvtide::planner {
namespace {

bool IsDigit(char c) { return absl::ascii_isdigit(static_cast<unsigned char>(c)); }

// Words behind a model's name that do not change its shape.
bool SaysNothingOfShape(const std::string& word) {
  for (const char* known :
       {"instruct",  "it",      "base", "chat",    "thinking",   "reasoning",  "hf",
        "gguf",      "mlx",     "pt",   "qat",     "dynamic",    "static",     "pertensor",
        "latest",    "preview", "sft",  "dpo",     "rl",         "turbo",      "text",
        "unsloth",   "cloud",   "g128", "marlin",  "compressed", "tensors",    "quantized",
        "autoround", "xl",      "ud",   "imatrix", "i1",         "abliterated"}) {
    if (word == known) return true;
  }
  // A date (2507, 20250115) or a release (v1, v0.2).
  const bool date = (word.size() == 4 || word.size() == 8) && std::all_of(word.begin(), word.end(), IsDigit);
  const bool release = word.size() >= 2 && word[0] == 'v' && IsDigit(word[1]);
  return date || release;
}

// The last word of "a-b-c" and what stands before it; false when there is one word only.
bool SplitLast(const std::string& name, std::string* before, std::string* last) {
  const size_t dash = name.find_last_of("- ");
  if (dash == std::string::npos || dash == 0) return false;
  *before = name.substr(0, dash);
  *last = absl::AsciiStrToLower(name.substr(dash + 1));
  return true;
}

// A tag of ollama that is part of the name (32b, e4b, 30b-a3b, scout), not of the weights.
std::string JoinTag(const std::string& name, const std::string& tag) {
  return tag.empty() || tag == "latest" ? name : absl::StrCat(name, "-", tag);
}

}  // namespace

ModelName ReadModelName(const std::string& text) {
  ModelName read;
  std::string name(absl::StripAsciiWhitespace(text));
  for (const char* host : {"https://huggingface.co/", "huggingface.co/", "hf.co/", "hf://"}) {
    if (absl::StartsWith(name, host)) name = name.substr(std::string(host).size());
  }
  if (absl::EndsWithIgnoreCase(name, ".gguf")) name = name.substr(0, name.size() - 5);
  read.candidates.push_back(name);
  const size_t slash = name.rfind('/');
  if (slash != std::string::npos) name = name.substr(slash + 1);
  const size_t colon = name.find(':');
  if (colon != std::string::npos) name = JoinTag(name.substr(0, colon), name.substr(colon + 1));
  read.candidates.push_back(name);
  std::string before, last;
  while (SplitLast(name, &before, &last)) {
    const std::string weights = WeightName(last);
    if (weights.empty() && !SaysNothingOfShape(last)) break;
    if (!weights.empty() && read.weights.empty()) read.weights = weights;
    name = before;
    read.candidates.push_back(name);
  }
  return read;
}

}  // namespace kvtide::planner
