#include "planner/model/config_object.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::planner {
namespace {

using Json = ConfigObject::Json;

constexpr int64_t kMaxField = int64_t{1} << 40;

std::string PlainJson(const std::string& text) {
  std::string plain;
  plain.reserve(text.size());
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '"') quoted = !quoted;
    if (quoted && text[i] == '\\' && i + 1 < text.size()) plain += text[i++];
    size_t skip = 0;
    for (const char* word : {"-Infinity", "Infinity", "NaN"}) {
      if (!quoted && skip == 0 && text.compare(i, std::strlen(word), word) == 0) skip = std::strlen(word);
    }
    if (skip > 0) {
      plain += "null";
      i += skip - 1;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

absl::Status Unexpected(const char* field, const Json& value, const char* expected) {
  return absl::InvalidArgumentError(
      absl::StrCat("field '", field, "' is ", value.dump().substr(0, 64), ", expected ", expected));
}

}  // namespace

absl::StatusOr<ConfigObject> ConfigObject::Parse(const std::string& text) {
  Json root = Json::parse(PlainJson(text), nullptr, /*allow_exceptions=*/false);
  if (root.is_discarded() || !root.is_object())
    return absl::InvalidArgumentError("config.json is not a JSON object");
  for (const char* part : {"text_config", "llm_config", "language_config"}) {
    if (!root.contains(part) || !root[part].is_object()) continue;
    Json text_part = root[part];
    // Tied embeddings may be said once, for the whole model.
    if (!text_part.contains("tie_word_embeddings") && root.contains("tie_word_embeddings"))
      text_part["tie_word_embeddings"] = root["tie_word_embeddings"];
    return ConfigObject(std::move(text_part));
  }
  return ConfigObject(std::move(root));
}

absl::StatusOr<int64_t> ConfigObject::Whole(const char* field, int64_t fallback) const {
  if (!Has(field)) return fallback;
  const Json& value = json_[field];
  if (!value.is_number_integer() || value.get<double>() < 0 ||
      value.get<double>() > static_cast<double>(kMaxField))
    return Unexpected(field, value, "a whole number of 0 or more");
  return value.get<int64_t>();
}

absl::StatusOr<int64_t> ConfigObject::Required(const char* field) const {
  KVTIDE_ASSIGN_OR_RETURN(const int64_t value, Whole(field, 0));
  if (value == 0) return absl::InvalidArgumentError(absl::StrCat("field '", field, "' is missing or 0"));
  return value;
}

absl::StatusOr<double> ConfigObject::Positive(const char* field, double fallback) const {
  if (!Has(field)) return fallback;
  const Json& value = json_[field];
  if (!value.is_number() || !(value.get<double>() > 0) || !std::isfinite(value.get<double>()))
    return Unexpected(field, value, "a positive number");
  return value.get<double>();
}

absl::StatusOr<bool> ConfigObject::Flag(const char* field, bool fallback) const {
  if (!Has(field)) return fallback;
  if (!json_[field].is_boolean()) return Unexpected(field, json_[field], "true or false");
  return json_[field].get<bool>();
}

absl::StatusOr<std::string> ConfigObject::Text(const char* field, const std::string& fallback) const {
  if (!Has(field)) return fallback;
  if (!json_[field].is_string()) return Unexpected(field, json_[field], "a text");
  return json_[field].get<std::string>();
}

absl::StatusOr<ConfigObject> ConfigObject::Object(const char* field) const {
  if (!Has(field)) return ConfigObject(Json::object());
  if (!json_[field].is_object()) return Unexpected(field, json_[field], "an object");
  return ConfigObject(json_[field]);
}

std::string ConfigObject::Architecture() const {
  if (!Has("architectures")) return "";
  const Json& list = json_["architectures"];
  return list.is_array() && !list.empty() && list[0].is_string() ? list[0].get<std::string>() : "";
}

std::string ConfigObject::Family() const {
  if (Has("model_type") && json_["model_type"].is_string()) return json_["model_type"].get<std::string>();
  const std::string architecture = Architecture();
  return absl::AsciiStrToLower(architecture.substr(0, architecture.find("For")));
}

}  // namespace kvtide::planner
