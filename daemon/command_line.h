// The command line of kvtided: a flag for each setting (settings.h), and what else it takes. `kvtide` reads
// it too, for `kvtide config`, the manual page and the completions.
#pragma once

#include <string>

#include "CLI/CLI.hpp"
#include "kvtide/v1/kvtided_config.pb.h"

namespace kvtide {

struct CommandLine {
  std::string config_file;
  v1::KvtidedConfig config;  // what the flags say, and nothing else
  std::string rekey_disk;    // empty: serve
  bool print_config = false;
  bool version = false;
};

// What kvtided is, in a sentence.
constexpr char kDaemonDescription[] =
    "kvtided keeps the KV cache of inference servers in compressed pools on GPU and host memory.";

// Flags of settings only. `config` is filled as they are parsed.
void AddSettingFlags(CLI::App* app, v1::KvtidedConfig* config);
// All of them, and the examples.
void AddCommandLine(CLI::App* app, CommandLine* flags);

}  // namespace kvtide
