// The planning step of the demo: which pair keeps a context in a device tier of a given size.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "clients/engine/kv_store.h"

namespace kvtide::cli {

struct DemoPlan {
  std::string pair, reason;
  bool measured = false;
  bool fits = false;  // the pair in the device tier
  bool f16_fits = false;
  int64_t f16_bytes = 0, pair_bytes = 0;
  int64_t margin_bytes = 0;   // kept free for blocks that are being filled
  double change_percent = 0;  // measured harm of the pair
};

// Bytes of one f16 block of 64 tokens, all layers.
int64_t ExactBlockBytes(const engine::KvGeometry& geometry);

// `pair` empty: the planner chooses among pairs with measured quality. Otherwise that pair is sized.
// INVALID_ARGUMENT for unknown types; FAILED_PRECONDITION when not even the smallest measured pair fits
// device and host together.
absl::StatusOr<DemoPlan> PlanDemo(const std::string& model_name, const engine::KvGeometry& geometry,
                                  int64_t context, int64_t device_bytes, int64_t host_bytes,
                                  const std::string& pair);

}  // namespace kvtide::cli
