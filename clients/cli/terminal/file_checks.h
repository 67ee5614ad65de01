// CLI11's check of files that a command writes at its end: what would fail then is said before the work.
#pragma once

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <string>
#include <system_error>

namespace kvtide::cli {

// A file that can be made or written over: its folder exists and lets this user write. Empty passes.
inline CLI::Validator WritableFile() {
  return CLI::Validator(
      [](std::string& value) -> std::string {
        if (value.empty()) return "";
        const std::filesystem::path path(value);
        std::error_code error;
        if (std::filesystem::is_directory(path, error)) return value + " is a folder; name a file";
        if (std::filesystem::exists(path, error))
          return access(value.c_str(), W_OK) == 0 ? "" : value + " cannot be written by this user";
        const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
        if (!std::filesystem::is_directory(folder, error))
          return "there is no folder " + folder.string() + " for " + value;
        return access(folder.c_str(), W_OK | X_OK) == 0
                   ? ""
                   : "this user cannot write to the folder " + folder.string() + " of " + value;
      },
      "FILE");
}

}  // namespace kvtide::cli
