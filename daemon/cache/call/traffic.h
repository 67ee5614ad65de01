// Who watches what sequences append and attend: the cache shows rows of keys and queries on their way, after
// calls that went well. Only rows of sequences of the model's own tenant are shown.
#pragma once

#include <cstdint>
#include <span>

#include "absl/time/time.h"
#include "daemon/cache/call/cache_stats.h"
#include "kernels/base/data_type.h"

namespace kvtide {

// Rows of one sequence in one layer, as the call brought them: k [keys][kv_heads][head_dim_k] from
// key_position on, q [queries][query_heads][head_dim_k] from query_position on. Borrowed for the call.
struct TrafficRows {
  int64_t key_position = 0, keys = 0;
  TensorView k;
  int64_t query_position = 0, queries = 0;
  TensorView q;
};

// Thread-safe.
class TrafficWatcher {
 public:
  virtual ~TrafficWatcher() = default;
  // False: nothing is to be told, as nobody watches. Quick.
  virtual bool active() const = 0;
  // A call on a layer of a model (ModelState::family) took so long; how many tokens the watcher wants to see
  // the rows of, 0 = none. Quick.
  virtual int64_t Wants(ModelId family, int layer, absl::Duration took) = 0;
  // Follows a Wants that was not 0: `tokens` is what it said.
  virtual void See(ModelId family, int layer, std::span<const TrafficRows> rows, int64_t tokens) = 0;
};

}  // namespace kvtide
