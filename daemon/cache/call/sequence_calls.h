// The calls over sequences: what is written, attended and read (KvCache says what becomes of it).
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>

#include "daemon/cache/call/cache_stats.h"
#include "daemon/cache/call/call_context.h"
#include "daemon/cache/call/sequence_options.h"
#include "daemon/cache/call/token_chain.h"
#include "kernels/base/data_type.h"

namespace kvtide {

// New K and V of one layer, dense rows [tokens][kv_heads][head_dim]. Bytes are the caller's until the call
// returns; `elements` is what the caller has, checked against tokens x kv_heads x head_dim (0 = the caller
// has checked).
struct LayerKv {
  int layer = 0;  // model layer
  TensorView k, v;
  size_t k_elements = 0, v_elements = 0;
};

// Appends `tokens` tokens at start_position, which must equal the length of each named layer. The whole call
// takes effect or none of it. A repeat of the last append of a layer (same start, count and values, as after
// a lost answer) is recognised and succeeds without writing; other values at the same place are Aborted.
struct AppendCall {
  SequenceId sequence = 0;
  int64_t start_position = 0;
  int64_t tokens = 0;
  std::span<const LayerKv> layers;
  // What the tokens are, one id for each: full blocks are found by them from then on (LookupPrefix). Empty:
  // not said. Ids count from the sequence's first token on; what comes after a token without id is not found.
  std::span<const TokenId> token_ids;
  const CallContext* context = nullptr;  // who calls; null = this process, for as long as it takes
};

// One sequence's part of a batch. With new_tokens > 0 (AppendAttend only) k and v are appended at
// start_position first, and the queries see them exactly (as f16); sealing comes after. All-or-nothing for
// the batch.
struct AttendRequest {
  SequenceId sequence = 0;
  TensorView q;           // [queries][heads][head_dim_k]
  size_t q_elements = 0;  // 0 = the caller has checked
  int64_t queries = 0;
  int64_t first_query_position = 0;  // query i stands at first_query_position + i
  MutableTensorView out;             // [queries][heads][head_dim_v]; a float* will do
  float* lse = nullptr;              // [queries][heads], natural log; may be null
  // AppendAttend.
  int64_t new_tokens = 0;
  int64_t start_position = 0;
  TensorView k, v;  // [new_tokens][kv_heads][head_dim]
  size_t k_elements = 0, v_elements = 0;
  std::span<const TokenId> token_ids;  // as in AppendCall; saying them with one layer is enough
};

// A batch over one layer of one model. Unset values are those of the layer's group.
struct AttendCall {
  int layer = 0;  // model layer
  std::span<const AttendRequest> items;
  bool causal = true;  // query at p sees positions <= p
  std::optional<float> scale;
  std::optional<float> softcap;
  std::optional<int64_t> window;         // may only narrow the group's window
  const float* sinks = nullptr;          // [heads]; null = none
  const CallContext* context = nullptr;  // who calls; null = this process, for as long as it takes
};

// Rows of one layer to read, [tokens][kv_heads][head_dim] in the caller's type; a view without data is not
// wanted.
struct LayerRead {
  int layer = 0;  // model layer
  MutableTensorView k, v;
};

// K and V of tokens first_token to first_token + tokens - 1, as they are stored: decoded where coded.
struct ReadCall {
  SequenceId sequence = 0;
  int64_t first_token = 0;
  int64_t tokens = 0;
  std::span<const LayerRead> layers;
  const CallContext* context = nullptr;
};

// A page of open sequences.
struct SequenceList {
  SequenceId after = 0;  // those with larger ids
  size_t limit = std::numeric_limits<size_t>::max();
  std::string model;  // of models of this name; empty = any
};

}  // namespace kvtide
