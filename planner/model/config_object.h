// A Hugging Face config.json, or an object inside of it, read field by field: what is there, of which kind
// and in which range, with one form of words for refusals. All readers of such files begin here: that of the
// cache's geometry (config_json.h) and that of the reference engine.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/statusor.h"

namespace kvtide::planner {

class ConfigObject {
 public:
  using Json = nlohmann::json;

  // The text part of multimodal models. Numbers that JSON does not have and Python writes (Infinity, NaN)
  // count as null.
  static absl::StatusOr<ConfigObject> Parse(const std::string& text);

  // Whether a field is there and is not null: null stands for the family's default.
  bool Has(const char* field) const { return json_.contains(field) && !json_[field].is_null(); }

  // Fields that are not there give the fallback; those of another kind are InvalidArgument with their names.
  absl::StatusOr<int64_t> Whole(const char* field, int64_t fallback) const;  // 0 to 2^40
  absl::StatusOr<int64_t> Required(const char* field) const;  // the same, neither missing nor 0
  absl::StatusOr<double> Positive(const char* field, double fallback) const;
  absl::StatusOr<bool> Flag(const char* field, bool fallback) const;
  absl::StatusOr<std::string> Text(const char* field, const std::string& fallback) const;
  // An object inside; one without fields where it is not there.
  absl::StatusOr<ConfigObject> Object(const char* field) const;

  // The first of "architectures"; empty where there is none.
  std::string Architecture() const;
  // "model_type"; where it is missing what the architecture is called ("Qwen2ForCausalLM": "qwen2").
  std::string Family() const;

  const Json& json() const { return json_; }

 private:
  explicit ConfigObject(Json json) : json_(std::move(json)) {}

  Json json_;
};

}  // namespace kvtide::planner
