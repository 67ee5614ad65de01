#include "clients/cli/bundled.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <vector>

#include "absl/strings/str_cat.h"

namespace kvtide::cli {
namespace {

namespace fs = std::filesystem;

absl::StatusOr<std::string> Find(const char* what, const char* installed, const char* in_sources) {
  std::error_code error;
  std::vector<fs::path> places;
  const char* named = std::getenv("KVTIDE_DATA_DIR");
  if (named != nullptr && *named != '\0') places.push_back(fs::path(named) / installed);
  const fs::path here = fs::read_symlink("/proc/self/exe", error).parent_path();
  places.push_back(here.parent_path() / "share" / "kvtide" / installed);
  places.push_back(fs::path(KVTIDE_SOURCE_DIR) / in_sources);
  for (const fs::path& place : places) {
    if (fs::exists(place, error)) return place.string();
  }
  return absl::NotFoundError(absl::StrCat("the bundled ", what, " is not in ", places.front().string(),
                                          "; set KVTIDE_DATA_DIR to the folder that has ", installed));
}

}  // namespace

absl::StatusOr<std::string> BundledModelFolder() {
  return Find("model", "models/tidelm-7m", "clients/engine/models/tidelm-7m");
}

absl::StatusOr<std::string> BundledTextFile() {
  return Find("text", "texts/wikitext2_slice.txt", "tests/data/wikitext2_slice.txt");
}

absl::StatusOr<std::string> ReadTextFile(const std::string& path) {
  std::error_code error;
  if (fs::is_directory(path, error))
    return absl::InvalidArgumentError(absl::StrCat(path, " is a folder, not a text"));
  std::ifstream in(path, std::ios::binary);
  if (!in)
    return absl::NotFoundError(absl::StrCat("cannot open the text ", path, ": ", std::strerror(errno)));
  std::string text(std::istreambuf_iterator<char>(in), {});
  if (text.empty()) return absl::InvalidArgumentError(absl::StrCat(path, " is empty"));
  return text;
}

}  // namespace kvtide::cli
