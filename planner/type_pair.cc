#include "planner/type_pair.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/base/status.h"

namespace kvtide::planner {
namespace {

bool IsTypeName(const std::string& name) {
  if (name.empty() || name.size() > 32) return false;
  for (char c : name) {
    if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) && c != '_' && c != '-' && c != '.') return false;
  }
  return true;
}

}  // namespace

absl::StatusOr<TypePair> ParsePair(const std::string& text) {
  std::vector<std::string> sides = absl::StrSplit(text, '/');
  if (sides.size() == 1) sides.push_back(sides[0]);
  if (sides.size() != 2 || !IsTypeName(sides[0]) || !IsTypeName(sides[1])) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is not a pair of cache types; write K/V, for example q8_0/turbo4"));
  }
  return TypePair{sides[0], sides[1]};
}

absl::StatusOr<std::vector<TypePair>> ParsePairs(const std::string& text) {
  std::vector<TypePair> pairs;
  if (text.empty() || text == "all") return pairs;
  for (const std::string& part : std::vector<std::string>(absl::StrSplit(text, ','))) {
    KVTIDE_ASSIGN_OR_RETURN(TypePair pair, ParsePair(std::string(absl::StripAsciiWhitespace(part))));
    pairs.push_back(pair);
  }
  return pairs;
}

}  // namespace kvtide::planner
