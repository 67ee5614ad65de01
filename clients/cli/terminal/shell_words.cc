#include "clients/cli/terminal/shell_words.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "clients/cli/terminal/terminal.h"

namespace kvtide::cli {
namespace {

std::string Quoted(const std::string& word) {
  return absl::StrCat("'", absl::StrReplaceAll(word, {{"'", R"('\'')"}}), "'");
}

// What printf writes, which takes control characters as numbers. A substitution loses line ends at the end,
// which therefore stand behind it.
std::string Printed(const std::string& word) {
  const size_t end = word.find_last_not_of('\n') + 1;
  std::string format;
  for (const char c : word.substr(0, end)) {
    if (c == '\\' || c == '%') format += c;
    if (absl::ascii_isprint(static_cast<unsigned char>(c))) {
      format += c;
    } else {
      absl::StrAppendFormat(&format, "\\%03o", static_cast<unsigned char>(c));
    }
  }
  return absl::StrCat("\"$(printf -- ", Quoted(format), ")\"",
                      end < word.size() ? Quoted(word.substr(end)) : "");
}

}  // namespace

std::string ShellQuoted(const std::string& word) {
  const auto plain = [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || absl::StrContains("_-./:=,+@%", c);
  };
  if (!word.empty() && std::all_of(word.begin(), word.end(), plain)) return word;
  if (Printable(word) != word) return Printed(word);
  return Quoted(word);
}

std::string ShellLine(const std::vector<std::string>& words) {
  return absl::StrJoin(words, " ",
                       [](std::string* out, const std::string& word) { out->append(ShellQuoted(word)); });
}

}  // namespace kvtide::cli
