// A small CSV reader for the catalogues and for files of users: header line, quoted fields, comment lines
// (#), and errors that name file, line and column.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace kvtide::planner {

class CsvRow {
 public:
  CsvRow(std::string place, std::map<std::string, std::string> fields)
      : place_(std::move(place)), fields_(std::move(fields)) {}

  const std::string& place() const { return place_; }  // "quality.csv line 7"
  // Empty when the column is missing.
  const std::string& Text(const std::string& column) const;
  // Empty cells are `fallback`.
  absl::StatusOr<int64_t> Integer(const std::string& column, int64_t fallback = 0) const;
  absl::StatusOr<double> Number(const std::string& column, double fallback = 0) const;

 private:
  std::string place_;
  std::map<std::string, std::string> fields_;
};

// `required` columns must stand in the header; unknown columns are kept and ignored.
absl::StatusOr<std::vector<CsvRow>> ParseCsv(const std::string& text, const std::string& file_name,
                                             const std::vector<std::string>& required);

// A field for writing: quoted when it needs to be.
std::string CsvField(const std::string& text);

}  // namespace kvtide::planner
