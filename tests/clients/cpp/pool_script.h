// What the tests of pools share: the ways, each opened as a user would, and a script of random verbs that
// compares every answer with the cache's naive model and keeps all answers, so that ways can be compared with
// each other to the bit.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "clients/cpp/pool.h"
#include "tests/e2e/test_daemon.h"

namespace kvtide::testing {

// Names of tests: letters and underscores.
inline const std::vector<std::string> kWays = {"embedded", "shared_memory", "grpc", "grpc_session"};

// Pools over equal tiers with one computing thread each, so that equal calls give equal bits.
class Ways {
 public:
  // A pool by the named way; a daemon is started when the first way needs one.
  std::unique_ptr<Pool> Open(const std::string& way, client::PoolOptions options = {});
  e2e::TestDaemon& daemon();

 private:
  std::unique_ptr<e2e::TestDaemon> daemon_;
};

// One layer with full attention, two with a sliding window of 100 tokens and other head dims, interleaved.
client::Model MixedModel(const std::string& name);

struct ScriptOptions {
  uint32_t seed = 1;
  int verbs = 120;
  // Sequences are evicted and prefetched too: blocks then come back in the background, and where a block lies
  // when it is attended is a matter of time, so that answers are equal to rounding and not to the bit.
  bool moves = false;
  bool steps = true;  // steps too, on a session
};

// Runs random verbs on a few sequences; failures are test failures. All that came back: outputs,
// log-sum-exps, rows, lengths, in order.
std::vector<float> RunScript(Pool& pool, const ScriptOptions& options);

}  // namespace kvtide::testing
