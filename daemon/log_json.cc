#include "daemon/log_json.h"

#include <cctype>
#include <nlohmann/json.hpp>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace kvtide {
namespace {

bool IsKey(std::string_view text) {
  if (text.empty() || std::isalpha(static_cast<unsigned char>(text[0])) == 0) return false;
  for (const char c : text)
    if (std::isalnum(static_cast<unsigned char>(c)) == 0 && c != '_') return false;
  return true;
}

int Hex(char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0 ? c - '0' : (c | 32) - 'a' + 10; }

// The value that begins at `at`: up to the next space, or between quotes with what Escaped (failure_log.h)
// has escaped taken back. `at` is behind it afterwards.
std::string TakeValue(std::string_view line, size_t* at) {
  std::string value;
  if (*at >= line.size() || line[*at] != '"') {
    const size_t end = std::min(line.find(' ', *at), line.size());
    value = std::string(line.substr(*at, end - *at));
    *at = end;
    return value;
  }
  size_t i = *at + 1;
  for (; i < line.size() && line[i] != '"'; i++) {
    if (line[i] != '\\' || i + 1 >= line.size()) {
      value += line[i];
    } else if (const char next = line[++i]; next == 'n') {
      value += '\n';
    } else if (next == 'x' && i + 2 < line.size()) {
      value += static_cast<char>(Hex(line[i + 1]) << 4 | Hex(line[i + 2]));
      i += 2;
    } else {
      value += next;
    }
  }
  *at = std::min(i + 1, line.size());
  return value;
}

}  // namespace

std::string LogLineAsJson(absl::Time time, std::string_view level, std::string_view line) {
  nlohmann::ordered_json fields, pairs;
  std::string words;
  for (size_t at = 0; at < line.size();) {
    if (line[at] == ' ') {
      at++;
      continue;
    }
    const size_t end = std::min(line.find(' ', at), line.size());
    const size_t equals = line.substr(at, end - at).find('=');
    if (equals == std::string_view::npos || !IsKey(line.substr(at, equals))) {
      absl::StrAppend(&words, words.empty() ? "" : " ", std::string(line.substr(at, end - at)));
      at = end;
      continue;
    }
    std::string key(line.substr(at, equals));
    at += equals + 1;
    const bool quoted = at < line.size() && line[at] == '"';
    const std::string value = TakeValue(line, &at);
    if (key == "message" || key == "time" || key == "level") key = key == "message" ? "text" : key + "_";
    int64_t number = 0;
    // Names of things are texts, whatever they look like: one field has one type, and many readers keep 53
    // bits of a number. Numbers are as they were written.
    const bool id = key == "sequence" || key == "request" || key == "trace";
    if (!quoted && !id && absl::SimpleAtoi(value, &number) && std::to_string(number) == value) {
      pairs[key] = number;
    } else {
      pairs[key] = value;
    }
  }
  fields["time"] = absl::FormatTime("%Y-%m-%d%ET%H:%M:%E3SZ", time, absl::UTCTimeZone());
  fields["level"] = std::string(level);
  fields["message"] = words;
  if (!pairs.is_null()) fields.update(pairs);
  return fields.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace kvtide
