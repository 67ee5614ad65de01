// Which known names somebody may have meant. Case and separators do not count. A name is near by shared
// words ("qwen", "8b") and by few changed letters. Pure function.
#pragma once

#include <string>
#include <vector>

namespace kvtide::planner {

// Lower case without '-', '_', ':' and spaces: names that are equal so are the same name.
std::string NormalName(const std::string& name);

// At most `count` of `names`, nearest first, ties in their order.
std::vector<std::string> NearNames(const std::string& wanted, const std::vector<std::string>& names,
                                   size_t count);

// What to say of command-line arguments that nobody expected: "no option --pair; did you mean --pairs?".
// `known`: options with their dashes, and subcommands. Values behind unknown options are not mentioned.
std::string UnknownArguments(const std::vector<std::string>& arguments,
                             const std::vector<std::string>& known);

}  // namespace kvtide::planner
