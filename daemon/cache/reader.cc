#include "daemon/cache/reader.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "absl/strings/str_cat.h"
#include "daemon/cache/tensor_check.h"
#include "kernels/attention_state.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {

// The runs of one item in one tier, and where that tier puts its state.
struct Reader::TierPart {
  int tier = 0;
  std::vector<std::byte*> blocks;  // of all runs
  std::vector<size_t> run_begins;  // into blocks
  std::vector<BlockRun> runs;
  std::vector<std::shared_ptr<const Profile>> profiles;  // keeps them alive
  std::vector<float> own_out, own_lse;                   // when the part is not the only one
};

struct Reader::ItemPlan {
  std::vector<TierPart> parts;
  std::vector<float> q;    // f32 copy of another type
  std::vector<float> lse;  // when the caller wants none
};

// What a running attention relies on: the places that it reads stay. Ends under the mutex.
class Reader::Reading {
 public:
  Reading(CacheState& state, const std::vector<SequencePtr>& sequences)
      : state_(state), sequences_(sequences) {
    state_.attends_running++;
    for (const SequencePtr& sequence : sequences_) sequence->readers++;
  }
  ~Reading() {
    for (Place* place : places_) state_.store.Unpin(place);
    for (const SequencePtr& sequence : sequences_) sequence->readers--;
    state_.attends_running--;
    state_.changed.NotifyAll();
  }
  Reading(const Reading&) = delete;
  Reading& operator=(const Reading&) = delete;

  void Expect(size_t places) { places_.reserve(places_.size() + places); }
  void Pin(Place* place) {
    state_.store.Pin(place);
    places_.push_back(place);
  }

 private:
  CacheState& state_;
  const std::vector<SequencePtr>& sequences_;
  std::vector<Place*> places_;
};

absl::Status Reader::CheckCall(const AttendCall& call, const ModelSpec& model, bool append) const {
  if (call.layer < 0 || static_cast<size_t>(call.layer) >= model.layers.size())
    return absl::InvalidArgumentError(absl::StrCat("layer ", call.layer, ": model '", model.name,
                                                   "' has layers 0 to ", model.layers.size() - 1));
  const LayerGroupSpec& group =
      model.groups[static_cast<size_t>(model.layers[static_cast<size_t>(call.layer)].group)];
  if (call.scale.has_value() && !(std::isfinite(*call.scale) && *call.scale > 0))
    return absl::InvalidArgumentError(absl::StrCat("scale ", *call.scale, ": must be finite and positive"));
  if (call.softcap.has_value() && !(std::isfinite(*call.softcap) && *call.softcap >= 0))
    return absl::InvalidArgumentError(
        absl::StrCat("softcap ", *call.softcap, ": must be finite and not negative"));
  if (call.window.has_value() && (*call.window < 0 || (group.window > 0 && *call.window > group.window)))
    return absl::InvalidArgumentError(absl::StrCat("window ", *call.window, ": the layer keeps a window of ",
                                                   group.window, " tokens, a call may only narrow it"));
  for (size_t i = 0; i < call.items.size(); i++)
    KVTIDE_RETURN_IF_ERROR(Annotate(CheckItem(call.items[i], call.layer, group, append),
                                    absl::StrCat("item ", i, " (sequence ", call.items[i].sequence, ")")));
  return absl::OkStatus();
}

absl::Status Reader::CheckItem(const AttendRequest& item, int layer, const LayerGroupSpec& group,
                               bool append) const {
  const GroupShape& shape = group.shape;
  const CacheOptions& options = core_.options();
  if (item.queries < 1 || item.queries > options.max_queries_per_item)
    return absl::InvalidArgumentError(absl::StrCat(item.queries, " queries: must be 1 to ",
                                                   options.max_queries_per_item, " (max_queries_per_item)"));
  if (item.first_query_position < 0)
    return absl::InvalidArgumentError(
        absl::StrCat("first query position ", item.first_query_position, " is negative"));
  if (item.first_query_position > int64_t{1} << 48)
    return absl::InvalidArgumentError(
        absl::StrCat("first query position ", item.first_query_position, " is beyond 2^48"));
  if (item.q.data == nullptr || item.out == nullptr)
    return absl::InvalidArgumentError("q or the output is missing");
  KVTIDE_RETURN_IF_ERROR(
      CheckElements(item.q_elements, item.queries, group.heads, shape.head_dim_k, "q", layer));
  KVTIDE_RETURN_IF_ERROR(CheckFinite(item.q, item.queries, group.heads, shape.head_dim_k, "q", layer,
                                     item.first_query_position));
  if (!append) return absl::OkStatus();
  if (item.new_tokens < 0 || item.new_tokens > options.max_tokens_per_append)
    return absl::InvalidArgumentError(absl::StrCat("append of ", item.new_tokens, " tokens: must be at most ",
                                                   options.max_tokens_per_append,
                                                   " (max_tokens_per_append)"));
  if (item.new_tokens == 0) return absl::OkStatus();
  if (item.k.data == nullptr || item.v.data == nullptr)
    return absl::InvalidArgumentError("K or V is missing");
  KVTIDE_RETURN_IF_ERROR(
      CheckElements(item.k_elements, item.new_tokens, shape.kv_heads, shape.head_dim_k, "K", layer));
  KVTIDE_RETURN_IF_ERROR(
      CheckElements(item.v_elements, item.new_tokens, shape.kv_heads, shape.head_dim_v, "V", layer));
  KVTIDE_RETURN_IF_ERROR(CheckValues(item.k, item.new_tokens, shape.kv_heads, shape.head_dim_k, "K", layer,
                                     item.start_position));
  return CheckValues(item.v, item.new_tokens, shape.kv_heads, shape.head_dim_v, "V", layer,
                     item.start_position);
}

absl::StatusOr<std::vector<SequencePtr>> Reader::FindSequences(const AttendCall& call) const {
  if (call.items.empty()) return absl::InvalidArgumentError("attention without items");
  if (call.items.size() > core_.options().max_batch_items)
    return absl::InvalidArgumentError(absl::StrCat(call.items.size(), " items: the limit is ",
                                                   core_.options().max_batch_items, " (max_batch_items)"));
  std::vector<SequencePtr> sequences;
  CacheLock lock(core_);
  for (size_t i = 0; i < call.items.size(); i++) {
    absl::StatusOr<SequencePtr> sequence = lock->sequences.Find(call.items[i].sequence);
    if (!sequence.ok()) return Annotate(sequence.status(), absl::StrCat("item ", i));
    if (!sequences.empty() && (*sequence)->model != sequences.front()->model)
      return absl::InvalidArgumentError(absl::StrCat(
          "item ", i, ": sequence ", (*sequence)->id, " is of model '", (*sequence)->model->spec.name,
          "', item 0 of '", sequences.front()->model->spec.name, "'; a call serves one model"));
    sequences.push_back(*std::move(sequence));
  }
  return sequences;
}

// Finds the blocks that the item's queries can see, pins them, and groups them into runs per tier.
absl::Status Reader::PlanItem(CacheState& state, const AttendCall& call, const AttendRequest& item,
                              const SequencePtr& sequence, bool own_writer, ItemPlan* plan,
                              Reading* reading) {
  BlockStore& store = state.store;
  if (sequence->closed) return absl::AbortedError("the sequence was closed");
  if (sequence->options.seal_at_once && sequence->writer && !(own_writer && item.new_tokens > 0))
    return absl::AbortedError(
        "the sequence codes at once (evaluation mode) and is being written; one call at a time");
  const LayerSpec& layer = sequence->model->spec.layers[static_cast<size_t>(call.layer)];
  GroupTable& table = sequence->groups[static_cast<size_t>(layer.group)];
  const int64_t length = table.layers[static_cast<size_t>(layer.layer_in_group)].tokens;
  int64_t window = table.window;
  if (call.window.has_value() && *call.window > 0) window = *call.window;
  const int64_t end = call.causal ? std::min(length, item.first_query_position + item.queries) : length;
  const int64_t begin = window > 0 ? std::max<int64_t>(0, item.first_query_position - window + 1) : 0;
  if (begin >= end) return absl::OkStatus();
  const int64_t first = begin / kBlockTokens, last = (end - 1) / kBlockTokens;
  if (first < table.first_block)
    return absl::OutOfRangeError(absl::StrCat(
        "the query at ", item.first_query_position, " sees tokens from ", begin, " on, but those before ",
        table.first_block * kBlockTokens, " have left the sliding window of layer ", call.layer,
        "; append and attend in one call (AppendAttend), or ask later positions"));
  for (int64_t index = first; index <= last; index++) {
    if (table.at(index)->place != nullptr) continue;
    int64_t dropped_end = index;
    while (dropped_end <= last && table.at(dropped_end)->place == nullptr) dropped_end++;
    return absl::DataLossError(absl::StrCat(
        "tokens ", std::max(begin, index * kBlockTokens), " to ",
        std::min(end, dropped_end * kBlockTokens) - 1,
        " were dropped; compute them again in a new sequence, or truncate to ", index * kBlockTokens));
  }
  const bool touch = layer.layer_in_group == 0;  // once a step is enough
  const absl::Time now = touch ? core_.options().clock() : absl::Time();
  if (touch) sequence->last_used = now;
  reading->Expect(static_cast<size_t>(last - first + 1));
  std::vector<TierPart*> part_of_tier(store.tiers(), nullptr);
  plan->parts.reserve(store.tiers());
  int previous_tier = -1;
  for (int64_t index = first; index <= last; index++) {
    Block* block = table.at(index);
    Place* place = block->place;
    TierPart*& part = part_of_tier[static_cast<size_t>(place->tier)];
    if (part == nullptr) {
      part = &plan->parts.emplace_back();
      part->tier = place->tier;
    }
    if (previous_tier != place->tier || part->runs.empty() || part->runs.back().layout != block->layout ||
        part->runs.back().profile != block->profile.get()) {
      BlockRun& run = part->runs.emplace_back();
      run.layout = block->layout;
      run.profile = block->profile.get();
      run.first_position = index * kBlockTokens;
      part->run_begins.push_back(part->blocks.size());
      if (block->profile != nullptr) part->profiles.push_back(block->profile);
    }
    previous_tier = place->tier;
    part->runs.back().tokens += std::min<int64_t>(kBlockTokens, end - index * kBlockTokens);
    part->blocks.push_back(place->data);
    reading->Pin(place);
    state.counters.attended_blocks++;
    const bool below = place->tier >= store.homes();
    if (below) state.counters.attended_blocks_below_tier0++;
    if (!touch) continue;
    store.Touch(block, now);
    if (below && core_.options().limits.promote_on_attend) store.Want(block);
  }
  for (TierPart& part : plan->parts)
    for (size_t r = 0; r < part.runs.size(); r++) {
      const size_t from = part.run_begins[r];
      const size_t to = r + 1 < part.runs.size() ? part.run_begins[r + 1] : part.blocks.size();
      part.runs[r].blocks = std::span<std::byte* const>(part.blocks).subspan(from, to - from);
    }
  return absl::OkStatus();
}

absl::Status Reader::Attend(const AttendCall& call, const std::vector<SequencePtr>& sequences,
                            bool own_writer) {
  const ModelSpec& model = sequences.front()->model->spec;
  const LayerSpec& layer = model.layers[static_cast<size_t>(call.layer)];
  const LayerGroupSpec& group = model.groups[static_cast<size_t>(layer.group)];
  const auto heads = static_cast<size_t>(group.heads), dim_k = static_cast<size_t>(group.shape.head_dim_k),
             dim_v = static_cast<size_t>(group.shape.head_dim_v);
  std::vector<ItemPlan> plans(call.items.size());
  CacheLock lock(core_);
  Reading reading(*lock, sequences);
  for (size_t i = 0; i < plans.size(); i++)
    KVTIDE_RETURN_IF_ERROR(
        Annotate(PlanItem(*lock, call, call.items[i], sequences[i], own_writer, &plans[i], &reading),
                 absl::StrCat("item ", i, " (sequence ", sequences[i]->id, ")")));
  const Unlocked unlocked(lock);
  std::vector<std::vector<AttendItem>> work(core_.tiers());
  for (size_t i = 0; i < plans.size(); i++) {
    const AttendRequest& item = call.items[i];
    ItemPlan& plan = plans[i];
    const size_t rows = static_cast<size_t>(item.queries) * heads;
    const float* q = static_cast<const float*>(item.q.data);
    if (item.q.type != DataType::kF32) {
      plan.q.resize(rows * dim_k);
      for (size_t j = 0; j < plan.q.size(); j++) plan.q[j] = item.q.At(j);
      q = plan.q.data();
    }
    if (item.lse == nullptr) plan.lse.resize(rows);
    float* lse = item.lse != nullptr ? item.lse : plan.lse.data();
    if (plan.parts.empty()) {
      std::fill_n(item.out, rows * dim_v, 0.0f);
      std::fill_n(lse, rows, -std::numeric_limits<float>::infinity());
    }
    for (size_t p = 0; p < plan.parts.size(); p++) {
      TierPart& part = plan.parts[p];
      AttendItem& to = work[static_cast<size_t>(part.tier)].emplace_back();
      to.runs = part.runs;
      to.q = q;
      to.queries = static_cast<int>(item.queries);
      to.first_query_position = item.first_query_position;
      to.out = item.out;
      to.lse = lse;
      if (p == 0) continue;
      part.own_out.resize(rows * dim_v);
      part.own_lse.resize(rows);
      to.out = part.own_out.data();
      to.lse = part.own_lse.data();
    }
  }
  AttendArgs args;
  args.layer = layer.layer_in_group;
  args.heads = group.heads;
  args.scale =
      call.scale.value_or(group.scale > 0 ? group.scale : 1.0f / std::sqrt(static_cast<float>(dim_k)));
  args.causal = call.causal;
  args.window = call.window.has_value() && *call.window > 0 ? *call.window : group.window;
  args.softcap = call.softcap.value_or(group.softcap);
  KVTIDE_RETURN_IF_ERROR(AttendTiers(args, work));
  MergeTiers(call, group, plans);
  return absl::OkStatus();
}

// Different machines work side by side, tiers of one machine in turn; the first machine with work on this
// thread.
absl::Status Reader::AttendTiers(const AttendArgs& args, std::vector<std::vector<AttendItem>>& work) {
  std::vector<absl::Status> status(work.size());
  std::vector<std::vector<size_t>> machines;
  for (size_t t = 0; t < work.size(); t++) {
    if (work[t].empty()) continue;
    const auto same = std::find_if(machines.begin(), machines.end(), [&](const std::vector<size_t>& tiers) {
      return &core_.backend(static_cast<int>(tiers.front())) == &core_.backend(static_cast<int>(t));
    });
    if (same != machines.end()) {
      same->push_back(t);
    } else {
      machines.push_back({t});
    }
  }
  std::vector<std::function<void()>> parts;
  for (const std::vector<size_t>& tiers : machines)
    parts.emplace_back([&args, &status, &tiers, &work, this] {
      for (const size_t t : tiers) {
        AttendArgs mine = args;
        mine.items = work[t];
        status[t] = core_.backend(static_cast<int>(t)).Attend(mine);
      }
    });
  machines_.Run(parts);
  for (size_t t = 0; t < status.size(); t++)
    KVTIDE_RETURN_IF_ERROR(Annotate(status[t], absl::StrCat("attention in ", TierText(core_.options(), t))));
  return absl::OkStatus();
}

void Reader::MergeTiers(const AttendCall& call, const LayerGroupSpec& group, std::vector<ItemPlan>& plans) {
  const auto heads = static_cast<size_t>(group.heads), dim_v = static_cast<size_t>(group.shape.head_dim_v);
  const std::vector<float> zeros(call.sinks != nullptr ? dim_v : 0);
  for (size_t i = 0; i < plans.size(); i++) {
    const AttendRequest& item = call.items[i];
    float* lse = item.lse != nullptr ? item.lse : plans[i].lse.data();
    const size_t rows = static_cast<size_t>(item.queries) * heads;
    for (size_t p = 1; p < plans[i].parts.size(); p++) {
      const TierPart& part = plans[i].parts[p];
      for (size_t r = 0; r < rows; r++)
        MergeAttentionState(item.out + r * dim_v, lse + r, part.own_out.data() + r * dim_v, part.own_lse[r],
                            static_cast<int>(dim_v));
    }
    // A sink is one more state: its logit with value 0. Merged here, it counts once however many tiers took
    // part.
    if (call.sinks != nullptr)
      for (size_t r = 0; r < rows; r++)
        MergeAttentionState(item.out + r * dim_v, lse + r, zeros.data(), call.sinks[r % heads],
                            static_cast<int>(dim_v));
  }
}

}  // namespace kvtide
