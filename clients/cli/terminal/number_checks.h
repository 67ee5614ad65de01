// CLI11's checks of numbers, with words that say what is wrong instead of the range of a double.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace kvtide::cli {

inline CLI::Validator WithWords(const CLI::Validator& check, const std::string& words) {
  return CLI::Validator(
      [check, words](std::string& value) {
        return check(value).empty() ? std::string() : "'" + value + "' is not a number " + words;
      },
      check.get_description());
}

inline CLI::Validator Positive() { return WithWords(CLI::PositiveNumber, "above 0"); }
inline CLI::Validator NonNegative() { return WithWords(CLI::NonNegativeNumber, "of 0 or more"); }

}  // namespace kvtide::cli
