#include "planner/item.h"

namespace kvtide::planner {

const char* ItemKindName(ItemKind kind) {
  switch (kind) {
    case ItemKind::kWeights:
      return "weights";
    case ItemKind::kKvFull:
      return "kv_full";
    case ItemKind::kKvSliding:
      return "kv_sliding";
    case ItemKind::kKvChunked:
      return "kv_chunked";
    case ItemKind::kKvLatent:
      return "kv_latent";
    case ItemKind::kKvWindowTail:
      return "kv_window_tail";
    case ItemKind::kKvRounding:
      return "kv_rounding";
    case ItemKind::kRecurrent:
      return "recurrent";
    case ItemKind::kCompute:
      return "compute";
    case ItemKind::kDequantScratch:
      return "dequant_scratch";
    case ItemKind::kPlanTables:
      return "plan_tables";
    case ItemKind::kKeyProfile:
      return "key_profile";
    case ItemKind::kContext:
      return "context";
    case ItemKind::kGraphs:
      return "graphs";
    case ItemKind::kFragmentation:
      return "fragmentation";
    case ItemKind::kMmproj:
      return "mmproj";
    case ItemKind::kDraft:
      return "draft";
    case ItemKind::kDraftKv:
      return "draft_kv";
    case ItemKind::kDraftCompute:
      return "draft_compute";
    case ItemKind::kMargin:
      return "margin";
  }
  return "unknown";
}

const char* ItemKindLabel(ItemKind kind) {
  switch (kind) {
    case ItemKind::kWeights:
      return "weights";
    case ItemKind::kKvFull:
      return "KV, full attention";
    case ItemKind::kKvSliding:
      return "KV, sliding window";
    case ItemKind::kKvChunked:
      return "KV, chunked attention";
    case ItemKind::kKvLatent:
      return "KV, MLA latent";
    case ItemKind::kKvWindowTail:
      return "KV, exact window and tail";
    case ItemKind::kKvRounding:
      return "KV, rounding";
    case ItemKind::kRecurrent:
      return "recurrent state";
    case ItemKind::kCompute:
      return "compute buffers";
    case ItemKind::kDequantScratch:
      return "dequantisation scratch";
    case ItemKind::kPlanTables:
      return "plans of attention";
    case ItemKind::kKeyProfile:
      return "profile of the keys";
    case ItemKind::kContext:
      return "CUDA context";
    case ItemKind::kGraphs:
      return "CUDA graphs";
    case ItemKind::kFragmentation:
      return "fragmentation";
    case ItemKind::kMmproj:
      return "multimodal projector";
    case ItemKind::kDraft:
      return "draft model";
    case ItemKind::kDraftKv:
      return "KV of the draft";
    case ItemKind::kDraftCompute:
      return "compute buffers of the draft";
    case ItemKind::kMargin:
      return "margin";
  }
  return "unknown";
}

const char* ProvenanceName(Provenance provenance) {
  switch (provenance) {
    case Provenance::kExact:
      return "exact";
    case Provenance::kFormula:
      return "formula";
    case Provenance::kCalibrated:
      return "calibrated";
    case Provenance::kGuess:
      return "guess";
  }
  return "unknown";
}

}  // namespace kvtide::planner
