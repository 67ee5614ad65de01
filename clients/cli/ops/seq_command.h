// `kvtide seq read`: keys and values of a sequence in a running kvtided, as they are stored, into a file.
#pragma once

#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "clients/cpp/client.h"

namespace kvtide::cli {

struct SeqReadOptions {
  client::SequenceId sequence = 0;
  std::vector<int> layers;  // empty = all
  int64_t first = 0;
  int64_t tokens = -1;  // -1 = all from `first` on
  DataType type = DataType::kF16;
  std::string part;      // "k" or "v", for .npy
  std::string out_file;  // .safetensors: layers.N.k and layers.N.v; .npy: one layer and part
};

// Writes the file and says what is in it. INVALID_ARGUMENT for a file name that is neither, and for .npy of
// more than one array; else the daemon's statuses.
absl::StatusOr<std::string> ReadSequence(client::Client& client, const SeqReadOptions& options);

// Exit codes: 0, 1 (the daemon cannot be reached or says no), 2 (bad input).
void AddSeqCommand(CLI::App& app, int* exit_code);

}  // namespace kvtide::cli
