// Files of the source tree that tests read.
#pragma once

#include <cstdlib>
#include <string>

namespace kvtide::testing {

// `name` is relative to the top. The tree is where it was when the test was compiled, or, for programs that
// were carried to another machine, where KVTIDE_SOURCE_DIR says.
inline std::string SourcePath(const std::string& name) {
  const char* const here = std::getenv("KVTIDE_SOURCE_DIR");
  return std::string(here != nullptr ? here : KVTIDE_SOURCE_DIR) + "/" + name;
}

}  // namespace kvtide::testing
