// `kvtide seq list|show|fork|evict|prefetch|pin|close`: one sequence, or some, of a running daemon.
#pragma once

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "clients/cpp/client.h"

namespace kvtide::cli {

void AddSeqVerbs(CLI::App* seq, int* exit_code);

// NotFound with what to do.
absl::StatusOr<client::SequenceInfo> FindSequence(client::Client& client, client::SequenceId id);

}  // namespace kvtide::cli
