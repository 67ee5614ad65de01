// A line of the log as JSON. Lines are written as words and key=value pairs ("call failed method=Append us=12
// message=\"no room\""); the words become "message", each pair a field of its own. Pure function.
#pragma once

#include <string>
#include <string_view>

#include "absl/time/time.h"

namespace kvtide {

// One line without its end: {"time":"2026-01-31T12:00:00.000Z","level":"info","message":"call failed",
// "method":"Append","us":12,"text":"no room"}. Whole numbers are numbers, all else is text; a pair called
// "message" becomes "text". What is not UTF-8 is replaced.
std::string LogLineAsJson(absl::Time time, std::string_view level, std::string_view line);

}  // namespace kvtide
