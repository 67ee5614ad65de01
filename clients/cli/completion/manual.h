// Manual pages, generated from the options and subcommands that a command line really has.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"

namespace kvtide::cli {

// What a page says beside the command line: titles ("ENVIRONMENT") with their items and what each means.
struct ManualSection {
  std::string title;
  std::vector<std::pair<std::string, std::string>> items;
};

// The page in roff (man(7)) for `man`. `section`: 1 for commands, 8 for daemons.
std::string ManualPage(const CLI::App& app, int section, const std::string& version,
                       const std::vector<ManualSection>& more);

// `kvtide manual [kvtide|kvtided]`.
void AddManualCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
