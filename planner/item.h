// One line of a memory bill: what, how many bytes, and how well the number is known.
#pragma once

#include <cstdint>

#include "absl/container/inlined_vector.h"
#include "planner/saturating.h"

namespace kvtide::planner {

enum class Provenance {
  kExact,       // read from a file or given by the user, or allocated by the code that computed it
  kFormula,     // the engine's own allocation rule
  kCalibrated,  // a constant that somebody measured
  kGuess,       // an order of magnitude
};

enum class ItemKind {
  kWeights,
  kKvFull,
  kKvSliding,
  kKvChunked,
  kKvLatent,
  kKvWindowTail,  // blocks kept exact and the block that is being filled
  kKvRounding,    // cells, blocks and layer groups rounded up
  kRecurrent,
  kCompute,
  kDequantScratch,
  kPlanTables,  // what attention kernels read of which blocks they attend over
  kKeyProfile,  // means and transforms of calibrated keys
  kContext,     // CUDA context and library workspaces
  kGraphs,
  kFragmentation,
  kMmproj,
  kDraft,
  kDraftKv,
  kDraftCompute,
  kMargin,
};

struct Item {
  ItemKind kind;
  int64_t bytes;
  Provenance provenance;
};

using ItemList = absl::InlinedVector<Item, 16>;

const char* ItemKindName(ItemKind kind);   // "kv_full": stable, for JSON and CSV
const char* ItemKindLabel(ItemKind kind);  // "KV, full attention": for people
const char* ProvenanceName(Provenance provenance);

inline int64_t TotalBytes(const ItemList& items) {
  int64_t total = 0;
  for (const Item& item : items) total = Sum(total, item.bytes);
  return total;
}

}  // namespace kvtide::planner
