// Shell completions, generated from the options and subcommands that the command line really has.
#pragma once

#include <string>

#include "CLI/CLI.hpp"

namespace kvtide::cli {

// The script for "bash", "zsh" or "fish".
std::string CompletionScript(const CLI::App& app, const std::string& shell);

// `kvtide completion SHELL [kvtide|kvtided]`.
void AddCompletionCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
