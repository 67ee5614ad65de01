// What a Client is made of: its address and the carrier of its messages.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "clients/cpp/carrier.h"
#include "clients/cpp/client.h"
#include "clients/cpp/step_tables.h"
#include "kernels/direct_device.h"

namespace kvtide::client {

struct Client::Impl {
  std::string address;
  std::unique_ptr<DirectDevice> direct;  // where a mapped pool is attended; null: nowhere
  std::unique_ptr<Carrier> carrier;
  std::function<absl::Status()> check_health;  // empty: whoever answers is healthy
  StepTables step_tables;
};

// The carriers over gRPC: a call for each message, or all on one session stream (ClientOptions::session).
absl::StatusOr<std::unique_ptr<Client::Impl>> ConnectGrpc(const std::string& address,
                                                          const ClientOptions& options);

}  // namespace kvtide::client
