// The embedded way: a KvCache with its backends and its disk in this process, behind the daemon's own
// handlers, so that checks, defaults and words are the same. Places are addresses: tensors are read and
// written where the caller has them.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "clients/cpp/carrier.h"

namespace kvtide::client {

// `config_json` as PoolOptions::embedded_config.
absl::StatusOr<std::unique_ptr<Carrier>> MakeEmbeddedCarrier(const std::string& config_json);

}  // namespace kvtide::client
