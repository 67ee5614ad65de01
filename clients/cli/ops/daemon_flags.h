// The flags of every command that asks a running daemon.
#pragma once

#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "clients/cpp/client.h"

namespace kvtide::cli {

struct DaemonFlags {
  std::string address;  // empty = client::DefaultAddress()
  double timeout_seconds = 5;
  client::Credentials credentials;

  void AddTo(CLI::App* command);
  // All but --address.
  void AddCredentialsTo(CLI::App* command);
  std::string Address() const { return address.empty() ? client::DefaultAddress() : address; }
  absl::StatusOr<std::unique_ptr<client::Client>> Connect() const;
};

}  // namespace kvtide::cli
