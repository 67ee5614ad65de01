// Small pieces of the reports' text forms.
#pragma once

#include <cmath>
#include <string>

namespace kvtide::cli {

// Numbers with the digits that mean something.
inline double Rounded(double x, int digits) {
  if (x == 0 || !std::isfinite(x)) return x;
  const double unit = std::pow(10.0, digits - 1 - static_cast<int>(std::floor(std::log10(std::abs(x)))));
  return std::round(x * unit) / unit;
}

// A cell of a CSV line: quoted when it has to be.
inline std::string CsvCell(const std::string& text) {
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string out = "\"";
  for (const char c : text) out += c == '"' ? "\"\"" : std::string(1, c);
  return out + "\"";
}

}  // namespace kvtide::cli
