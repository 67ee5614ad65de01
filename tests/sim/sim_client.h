// A sequence of the simulation with its naive model (tests/daemon/cache/shadow.h), and what the judge has to
// know of it: which calls run on it right now, whether it was closed, what an unfinished append brings.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "daemon/cache/kv_cache.h"
#include "tests/daemon/cache/layer_call.h"
#include "tests/daemon/cache/shadow.h"

namespace kvtide::testing {

struct SimClient {
  SimClient(SequenceId sequence, std::shared_ptr<const ModelSpec> its_model,
            const SequenceOptions& its_options)
      : id(sequence), model(std::move(its_model)), options(its_options), shadow(*model, options) {}

  const LayerGroupSpec& group(int layer) const { return GroupOf(*model, layer); }
  int64_t length() const { return shadow.Length(); }

  // What a read of a layer may see now, as states of the naive model; in the last one most has left the
  // window. Usually the one that it has. An append that has published its tokens and not returned lets blocks
  // become coded and leave the window one after another, those of other layers too: with the new rows, coded
  // or not yet.
  std::vector<ShadowSequence> States(int64_t length_in_cache, int layer) const {
    std::vector<ShadowSequence> states;
    if (length_in_cache == shadow.LayerLength(layer)) states.push_back(shadow);
    if (pending.empty()) return states;
    ShadowSequence with = shadow;
    for (const NewRows& rows : pending) with.Append(rows.layer, rows.k, rows.v, rows.tokens);
    if (with.LayerLength(layer) != length_in_cache) return states;
    states.push_back(with);
    with.Settle();
    states.push_back(std::move(with));
    return states;
  }

  SequenceId id;
  std::shared_ptr<const ModelSpec> model;
  SequenceOptions options;
  ShadowSequence shadow;
  bool fork = false;
  // Blocks were recoded in the middle of a call that changed the sequence: which bits it kept is not known.
  bool blurred = false;
  bool closed = false;
  int writing = 0, reading = 0;           // calls that run on it
  std::vector<NewRows> pending;           // of the append that runs
  uint64_t serial = 0;                    // order of creation
  uint64_t home_blocks = 0, dropped = 0;  // when the last call ended
};

}  // namespace kvtide::testing
