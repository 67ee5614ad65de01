#include "planner/csv.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace kvtide::planner {
namespace {

constexpr size_t kMaxFileBytes = size_t{64} << 20;

absl::StatusOr<std::vector<std::string>> SplitLine(const std::string& line, const std::string& place) {
  std::vector<std::string> fields(1);
  bool quoted = false;
  for (size_t i = 0; i < line.size(); ++i) {
    const char c = line[i];
    if (quoted && c == '"' && i + 1 < line.size() && line[i + 1] == '"') {
      fields.back() += '"';
      ++i;
    } else if (c == '"') {
      quoted = !quoted;
    } else if (c == ',' && !quoted) {
      fields.emplace_back();
    } else {
      fields.back() += c;
    }
  }
  if (quoted) return absl::InvalidArgumentError(absl::StrCat(place, ": a quote is not closed"));
  return fields;
}

std::string Strip(const std::string& text) { return std::string(absl::StripAsciiWhitespace(text)); }

}  // namespace

const std::string& CsvRow::Text(const std::string& column) const {
  static const std::string empty;
  auto it = fields_.find(column);
  return it == fields_.end() ? empty : it->second;
}

absl::StatusOr<int64_t> CsvRow::Integer(const std::string& column, int64_t fallback) const {
  const std::string& text = Text(column);
  if (text.empty()) return fallback;
  int64_t value = 0;
  if (!absl::SimpleAtoi(text, &value)) {
    return absl::InvalidArgumentError(
        absl::StrCat(place_, ": ", column, " is '", text, "', expected a whole number"));
  }
  return value;
}

absl::StatusOr<double> CsvRow::Number(const std::string& column, double fallback) const {
  const std::string& text = Text(column);
  if (text.empty()) return fallback;
  double value = 0;
  if (!absl::SimpleAtod(text, &value) || value != value) {
    return absl::InvalidArgumentError(
        absl::StrCat(place_, ": ", column, " is '", text, "', expected a number"));
  }
  return value;
}

absl::StatusOr<std::vector<CsvRow>> ParseCsv(const std::string& text, const std::string& file_name,
                                             const std::vector<std::string>& required) {
  if (text.size() > kMaxFileBytes) {
    return absl::InvalidArgumentError(absl::StrCat(file_name, ": larger than 64 MiB"));
  }
  std::vector<CsvRow> rows;
  std::vector<std::string> header;
  size_t begin = 0;
  for (int number = 1; begin < text.size(); ++number) {
    size_t end = text.find('\n', begin);
    if (end == std::string::npos) end = text.size();
    const std::string line = Strip(text.substr(begin, end - begin));
    begin = end + 1;
    if (line.empty() || line[0] == '#') continue;
    const std::string place = absl::StrCat(file_name, " line ", number);
    absl::StatusOr<std::vector<std::string>> fields = SplitLine(line, place);
    if (!fields.ok()) return fields.status();
    if (header.empty()) {
      for (std::string& name : *fields) header.push_back(Strip(name));
      for (const std::string& column : required) {
        if (std::find(header.begin(), header.end(), column) == header.end()) {
          return absl::InvalidArgumentError(absl::StrCat(
              place, ": column '", column, "' is missing; needed: ", absl::StrJoin(required, ", ")));
        }
      }
      continue;
    }
    if (fields->size() != header.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat(place, ": ", fields->size(), " fields, the header has ", header.size()));
    }
    std::map<std::string, std::string> values;
    for (size_t i = 0; i < header.size(); ++i) values[header[i]] = Strip((*fields)[i]);
    rows.emplace_back(place, std::move(values));
  }
  if (header.empty()) return absl::InvalidArgumentError(absl::StrCat(file_name, ": no header line"));
  return rows;
}

std::string CsvField(const std::string& text) {
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (char c : text) {
    if (c == '"') quoted += '"';
    quoted += c;
  }
  return quoted + "\"";
}

}  // namespace kvtide::planner
