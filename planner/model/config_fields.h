// Which fields of a Hugging Face config.json could change the cache: a reader that does not know such a field
// must not go on as if it were not there. Pure functions.
#pragma once

#include <string>

namespace kvtide::planner {

// True for a name that looks as if it were about the cache and that the reader neither understands nor knows
// to change nothing.
bool UnknownCacheField(const std::string& field);

}  // namespace kvtide::planner
