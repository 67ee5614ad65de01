#include "planner/near_names.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"

namespace kvtide::planner {
namespace {

bool IsLetter(char c) { return absl::ascii_isalpha(static_cast<unsigned char>(c)); }
bool IsDigit(char c) { return absl::ascii_isdigit(static_cast<unsigned char>(c)) || c == '.'; }

// "Llama3.1-8B" -> {"llama", "3.1", "8b"}: runs of letters and of digits; a letter behind digits belongs to
// them.
std::vector<std::string> Words(const std::string& name) {
  std::vector<std::string> words;
  std::string word;
  const auto end_word = [&] {
    if (!word.empty()) words.push_back(std::exchange(word, {}));
  };
  for (size_t i = 0; i < name.size(); ++i) {
    const char c = absl::ascii_tolower(static_cast<unsigned char>(name[i]));
    if (!IsLetter(c) && !IsDigit(c)) {
      end_word();
      continue;
    }
    if (!word.empty() && IsLetter(word.back()) && IsDigit(c)) end_word();
    const bool unit = IsLetter(c) && !word.empty() && IsDigit(word.back()) &&
                      (i + 1 == name.size() || !IsLetter(name[i + 1]));
    if (!word.empty() && IsDigit(word.back()) && IsLetter(c) && !unit) end_word();
    word += c;
  }
  end_word();
  return words;
}

// Letters that have to be inserted, removed or changed.
size_t EditDistance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t change = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({change, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

// The first word that tells a size ("27b", "0.6b"); 0 when none does.
double SizeIn(const std::vector<std::string>& words) {
  for (const std::string& word : words) {
    double size = 0;
    if (word.size() > 1 && word.back() == 'b' && absl::SimpleAtod(word.substr(0, word.size() - 1), &size))
      return size;
  }
  return 0;
}

// 0 for the same name, 1 for nothing in common; every shared word counts by its length, and more when all
// words before it are shared too, or the size is alike ("gemma-4-27b" is nearer to Gemma4-26B than to
// Llama-27B).
double Distance(const std::string& wanted, const std::string& name) {
  constexpr double kSameBeginning = 0.12;  // per word after the first
  constexpr double kLikeSize = 0.15, kAlike = 1.25;
  const std::string a = NormalName(wanted), b = NormalName(name);
  const double longest = static_cast<double>(std::max({a.size(), b.size(), size_t{1}}));
  const std::vector<std::string> ours = Words(wanted), theirs = Words(name);
  const std::set<std::string> set(theirs.begin(), theirs.end());
  size_t shared = 0, beginning = 0;
  for (const std::string& word : std::set<std::string>(ours.begin(), ours.end()))
    shared += set.count(word) > 0 ? word.size() : 0;
  while (beginning < std::min(ours.size(), theirs.size()) && ours[beginning] == theirs[beginning])
    ++beginning;
  const double by_words = 1 - static_cast<double>(shared) / longest;
  const double near = std::min(by_words, static_cast<double>(EditDistance(a, b)) / longest);
  const double size = SizeIn(ours), their_size = SizeIn(theirs);
  const bool alike = size > 0 && their_size > size / kAlike && their_size < size * kAlike;
  return a == b ? 0
                : near - (alike ? kLikeSize : 0) -
                      (beginning > 1 ? kSameBeginning * static_cast<double>(beginning - 1) : 0);
}

}  // namespace

std::string NormalName(const std::string& name) {
  std::string normal;
  for (const char c : name) {
    if (c != '-' && c != '_' && c != ' ' && c != ':')
      normal += absl::ascii_tolower(static_cast<unsigned char>(c));
  }
  return normal;
}

std::vector<std::string> NearNames(const std::string& wanted, const std::vector<std::string>& names,
                                   size_t count) {
  std::vector<std::pair<double, std::string>> ranked;
  for (const std::string& name : names) ranked.emplace_back(Distance(wanted, name), name);
  std::stable_sort(ranked.begin(), ranked.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<std::string> near;
  for (size_t i = 0; i < std::min(count, ranked.size()); ++i) near.push_back(ranked[i].second);
  return near;
}

std::string UnknownArguments(const std::vector<std::string>& arguments,
                             const std::vector<std::string>& known) {
  constexpr double kFar = 0.5;  // more than half is different: no suggestion
  const auto is_option = [](const std::string& a) { return a.size() > 1 && a[0] == '-'; };
  const bool options = std::any_of(arguments.begin(), arguments.end(), is_option);
  std::string text;
  for (const std::string& argument : arguments) {
    if (options && !is_option(argument)) continue;
    const std::string name = argument.substr(0, argument.find('='));
    std::vector<std::string> alike;
    for (const std::string& other : known)
      if (is_option(other) == is_option(name)) alike.push_back(other);
    const std::vector<std::string> near = NearNames(name, alike, 1);
    if (!text.empty()) text += "\n";
    text += options ? "no option " + name : "'" + name + "' was not expected";
    if (!near.empty() && Distance(name, near[0]) <= kFar) text += "; did you mean " + near[0] + "?";
  }
  return text;
}

}  // namespace kvtide::planner
