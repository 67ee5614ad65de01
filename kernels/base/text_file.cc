#include "kernels/base/text_file.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace kvtide {

absl::StatusOr<std::string> ReadTextFile(const char* what, const std::string& path) {
  errno = 0;
  std::ifstream file(path);
  std::stringstream text;
  if (!file || !(text << file.rdbuf()))
    return absl::InvalidArgumentError(
        absl::StrCat("cannot read the ", what, " ", path, ": ",
                     errno != 0 ? std::strerror(errno) : "it is empty or no file"));
  return text.str();
}

}  // namespace kvtide
