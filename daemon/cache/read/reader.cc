#include "daemon/cache/read/reader.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/cache/call/tensor_check.h"
#include "kernels/attend_args.h"
#include "kernels/attention_state.h"
#include "kernels/base/check.h"
#include "kernels/base/sizes.h"
#include "kernels/base/status.h"

namespace kvtide {

// One item of a batch: what its queries see of its sequence's snapshot.
struct Reader::Item {
  const AttendRequest* request = nullptr;
  const Sequence* sequence = nullptr;
  const TableSnapshot* snapshot = nullptr;
  int64_t length = 0;          // of the layer, when the snapshot was taken; with what the call appends
  int64_t begin = 0, end = 0;  // positions that any query sees; none if begin >= end
  int64_t recent_steps = 0;    // Sequence has them
  uint64_t changes = 0;
  bool empty() const { return begin >= end; }
};

struct Reader::Batch {
  const AttendCall& call;
  const std::vector<SequencePtr>& sequences;
  const CallContext& context;
  const ModelSpec& model;
  const LayerSpec& layer;
  const LayerGroupSpec& group;
  WriteBatch* append = nullptr;
  std::span<const Held> held;  // by item, or empty
  int64_t window = 0;          // of the call; 0 = all
  std::vector<Item> items;
  std::vector<size_t> room;  // by home: that blocks of lower tiers may be brought to

  size_t heads() const { return static_cast<size_t>(group.heads); }
  size_t dim_v() const { return static_cast<size_t>(group.shape.head_dim_v); }
  size_t rows(size_t item) const { return static_cast<size_t>(items[item].request->queries) * heads(); }
};

// The f32 state of one item in one tier's part, where it is not written to the caller's tensors at once.
struct Reader::PartState {
  size_t item = 0;
  MutableTensorView out;
  float* lse = nullptr;
  std::vector<float> own_out, own_lse;
};

Reader::Reader(CacheCore& core, Mover& mover)
    : core_(core), mover_(mover), plans_(core.options().max_cached_plans, core.options().max_plan_bytes) {}

namespace {

std::string ItemText(const AttendCall& call, size_t item) {
  return absl::StrCat("item ", item, " (sequence ", call.items[item].sequence, ")");
}

absl::Status DroppedError(const SnapshotRun& run, int64_t begin, int64_t end) {
  return absl::DataLossError(
      absl::StrCat("tokens ", std::max(begin, run.first_block * kBlockTokens), " to ",
                   std::min(end, run.end_block() * kBlockTokens) - 1,
                   " were dropped or lost; compute them again in a new sequence, or truncate to ",
                   std::max(begin / kBlockTokens, run.first_block) * kBlockTokens));
}

// The rows of a dense tensor from `token` on.
MutableTensorView Rows(const MutableTensorView& tensor, int64_t token, int heads, int dim) {
  if (tensor.data == nullptr) return tensor;
  const size_t bytes = static_cast<size_t>(token) * static_cast<size_t>(heads) * static_cast<size_t>(dim) *
                       DataTypeBytes(tensor.type);
  return {static_cast<std::byte*>(tensor.data) + bytes, tensor.type};
}

}  // namespace

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
    if (const absl::Status status = CheckItem(call.items[i], call.layer, group, append); !status.ok())
      return Annotate(status, ItemText(call, i));
  return absl::OkStatus();
}

absl::Status Reader::CheckItem(const AttendRequest& item, int layer, const LayerGroupSpec& group,
                               bool append) const {
  const GroupShape& shape = group.shape;
  const CacheOptions& options = core_.options();
  if (item.queries < 1 || item.queries > options.max_queries_per_item)
    return absl::InvalidArgumentError(absl::StrCat(item.queries, " queries: must be 1 to ",
                                                   options.max_queries_per_item, " (max_queries_per_item)"));
  KVTIDE_RETURN_IF_ERROR(CheckPosition(item.first_query_position, "first query position"));
  if (item.first_query_position > kMostPosition - item.queries)
    return absl::InvalidArgumentError(
        absl::StrCat("first query position ", item.first_query_position, " is beyond 2^48"));
  if (item.q.data == nullptr || item.out.data == nullptr)
    return absl::InvalidArgumentError("q or the output is missing");
  KVTIDE_RETURN_IF_ERROR(
      CheckElements(item.q_elements, item.queries, group.heads, shape.head_dim_k, "q", layer));
  if (!append) return absl::OkStatus();
  if (item.new_tokens < 0 || item.new_tokens > options.max_tokens_per_append)
    return absl::InvalidArgumentError(absl::StrCat("append of ", item.new_tokens, " tokens: must be at most ",
                                                   options.max_tokens_per_append,
                                                   " (max_tokens_per_append)"));
  if (item.new_tokens == 0) return absl::OkStatus();
  KVTIDE_RETURN_IF_ERROR(CheckPosition(item.start_position, "start position"));
  if (item.k.data == nullptr || item.v.data == nullptr)
    return absl::InvalidArgumentError("K or V is missing");
  KVTIDE_RETURN_IF_ERROR(
      CheckElements(item.k_elements, item.new_tokens, shape.kv_heads, shape.head_dim_k, "K", layer));
  return CheckElements(item.v_elements, item.new_tokens, shape.kv_heads, shape.head_dim_v, "V", layer);
}

absl::Status Reader::CheckValues(const AttendCall& call, const ModelSpec& model, WriteBatch* append) const {
  const LayerGroupSpec& group =
      model.groups[static_cast<size_t>(model.layers[static_cast<size_t>(call.layer)].group)];
  const GroupShape& shape = group.shape;
  size_t written = 0;
  for (size_t i = 0; i < call.items.size(); i++) {
    const AttendRequest& item = call.items[i];
    absl::Status status = CheckFinite(item.q, item.queries, group.heads, shape.head_dim_k, "q", call.layer,
                                      item.first_query_position);
    if (status.ok() && append != nullptr && item.new_tokens > 0) {
      status = kvtide::CheckValues(item.k, item.new_tokens, shape.kv_heads, shape.head_dim_k, "K", call.layer,
                                   item.start_position);
      if (status.ok())
        status = kvtide::CheckValues(item.v, item.new_tokens, shape.kv_heads, shape.head_dim_v, "V",
                                     call.layer, item.start_position);
      LayerWrite& write = append->writes[written++];
      write.hash = HashRows(write);
    }
    if (!status.ok()) return Annotate(status, ItemText(call, i));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<SequencePtr>> Reader::FindSequences(const AttendCall& call) const {
  if (call.items.empty()) return absl::InvalidArgumentError("attention without items");
  if (call.items.size() > core_.options().max_batch_items)
    return absl::InvalidArgumentError(absl::StrCat(call.items.size(), " items: the limit is ",
                                                   core_.options().max_batch_items, " (max_batch_items)"));
  std::vector<SequencePtr> sequences;
  sequences.reserve(call.items.size());
  static const CallContext kNobody;
  const CallContext& context = call.context != nullptr ? *call.context : kNobody;
  CacheLock lock(core_);
  for (size_t i = 0; i < call.items.size(); i++) {
    absl::StatusOr<SequencePtr> sequence = lock->sequences.Find(call.items[i].sequence, context);
    if (!sequence.ok()) return AnnotateRefused(sequence.status(), absl::StrCat("item ", i));
    if (!sequences.empty() && (*sequence)->model->family != sequences.front()->model->family)
      return absl::InvalidArgumentError(absl::StrCat(
          "item ", i, ": sequence ", (*sequence)->id, " is of model '", (*sequence)->model->spec.name,
          "', item 0 of '", sequences.front()->model->spec.name, "'; a call serves one model"));
    sequences.push_back(*std::move(sequence));
  }
  return sequences;
}

absl::Status Reader::Attend(CacheLock& lock, const AttendCall& call,
                            const std::vector<SequencePtr>& sequences, WriteBatch* append,
                            std::span<const Held> held) {
  static const CallContext kNobody;
  const ModelSpec& model = sequences.front()->model->spec;
  const LayerSpec& layer = model.layers[static_cast<size_t>(call.layer)];
  const LayerGroupSpec& group = model.groups[static_cast<size_t>(layer.group)];
  Batch batch{call,   sequences, call.context != nullptr ? *call.context : kNobody,
              model,  layer,     group,
              append, held,      0,
              {},     {}};
  batch.window = std::min(kMostPosition, call.window.value_or(0) > 0 ? *call.window : group.window);
  uint64_t before_serial = 0;
  for (int round = 0;; round++) {
    batch.items.assign(call.items.size(), {});
    KVTIDE_ASSIGN_OR_RETURN(const std::vector<Wanted> far, TryAttend(lock, batch));
    if (far.empty()) return absl::OkStatus();
    KVTIDE_RETURN_IF_ERROR(BringIn(lock, far, round, &before_serial, batch.context));
  }
}

std::vector<Reader::Wanted> Reader::PickPromoted(Batch& batch, Reading& reading) const {
  std::vector<Wanted> promoted;
  const CacheOptions& options = core_.options();
  AttendLowerTiers rule = options.attend_lower_tiers;
  // What is attended as it was when it was pinned stays where it was then.
  if (!batch.held.empty() || (rule == AttendLowerTiers::kCost && !options.limits.promote_on_attend))
    rule = AttendLowerTiers::kInPlace;
  std::vector<uint64_t> bytes;  // by tier
  for (size_t i = 0; i < batch.items.size(); i++) {
    const Item& item = batch.items[i];
    if (item.empty()) continue;
    const int64_t begin = item.begin / kBlockTokens, end = DivideUp(item.end, kBlockTokens);
    bytes.clear();
    for (const SnapshotRun& run : item.snapshot->RunsOf(begin, end)) {
      if (run.tier < core_.homes()) continue;
      bytes.resize(core_.tiers());
      bytes[static_cast<size_t>(run.tier)] +=
          static_cast<uint64_t>(std::min(run.end_block(), end) - std::max(run.first_block, begin)) *
          run.layout->block_bytes();
    }
    bool first = false;
    for (size_t t = 0; t < bytes.size(); t++) {
      if (bytes[t] == 0) continue;
      reading.attended_in_place.resize(core_.tiers());
      reading.promoted_first.resize(core_.tiers());
      const int home = item.sequence->home;
      size_t& room = batch.room[static_cast<size_t>(home)];
      const LowerTierView view{bytes[t], room, ReadsOf(item.recent_steps), PassesOf(item.request->queries)};
      const bool up = rule != AttendLowerTiers::kInPlace &&
                      PromoteFirst(view, core_.rates().Of(static_cast<int>(t), home), rule);
      (up ? reading.promoted_first : reading.attended_in_place)[t]++;
      if (!up) continue;
      room -= bytes[t];
      if (!std::exchange(first, true))
        promoted.push_back({batch.sequences[i], batch.layer.group, begin, end, {}});
      promoted.back().tiers.push_back(static_cast<int>(t));
    }
  }
  return promoted;
}

void Reader::BringHome(CacheLock& lock, Batch& batch, std::span<const Wanted> wanted, Reading& reading) {
  std::vector<HeldBlock> blocks;
  for (const Wanted& want : wanted) {
    const GroupTable& table = want.sequence->groups[static_cast<size_t>(want.group)];
    const int64_t end = std::min(want.end, table.end_block());
    for (int64_t index = std::max(want.begin, table.first_block()); index < end; index++) {
      Block* const block = table.at(index);
      if (block->place != nullptr && std::count(want.tiers.begin(), want.tiers.end(), block->place->tier) > 0)
        blocks.emplace_back(lock->store, block);
    }
  }
  mover_.BringHome(lock, blocks, batch.context);
  // Others may have changed the sequences meanwhile; then the items see what they saw, where it was.
  for (size_t i = 0; i < batch.items.size(); i++) {
    Item& item = batch.items[i];
    const SequencePtr& sequence = batch.sequences[i];
    if (item.empty() || sequence->changes != item.changes) continue;
    const absl::StatusOr<const TableSnapshot*> now = reading.Add(sequence, batch.layer.group, batch.append);
    if (!now.ok()) continue;
    const auto runs = (*now)->RunsOf(item.begin / kBlockTokens, DivideUp(item.end, kBlockTokens));
    if (std::all_of(runs.begin(), runs.end(), [&](const SnapshotRun& run) {
          return run.tier != ChunkPicture::kDropped && core_.attends(run.tier);
        }))
      item.snapshot = *now;
  }
}

// Returns what has to be brought in first; nothing: the call is done.
absl::StatusOr<std::vector<Reader::Wanted>> Reader::TryAttend(CacheLock& lock, Batch& batch) {
  Reading reading(*lock, batch.items.size());
  std::optional<Reading> later;
  KVTIDE_RETURN_IF_ERROR(TakeSnapshots(*lock, batch, reading));
  std::vector<Wanted> lower;
  {
    const Unlocked unlocked(lock);
    for (size_t i = 0; i < batch.items.size(); i++)
      if (const absl::Status status = FindVisible(batch, batch.items[i]); !status.ok())
        return AnnotateRefused(status, ItemText(batch.call, i));
    KVTIDE_RETURN_IF_ERROR(CheckWork(batch));
    std::vector<Wanted> far;
    for (size_t i = 0; i < batch.items.size(); i++) {
      const Item& item = batch.items[i];
      const int64_t begin = item.begin / kBlockTokens, end = DivideUp(item.end, kBlockTokens);
      if (!item.empty() && HasFar(*item.snapshot, begin, end))
        far.push_back({batch.sequences[i], batch.layer.group, begin, end, {}});
    }
    if (!far.empty()) return far;
    lower = PickPromoted(batch, reading);
    if (lower.empty()) return AttendNow(batch, reading);
  }
  BringHome(lock, batch, lower, later.emplace(*lock, batch.items.size()));
  const Unlocked unlocked(lock);
  return AttendNow(batch, reading);
}

absl::StatusOr<std::vector<Reader::Wanted>> Reader::AttendNow(const Batch& batch, Reading& reading) {
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<CachedAttendPlan> plan, FindPlan(batch));
  std::vector<PartState> states;
  KVTIDE_RETURN_IF_ERROR(AttendParts(batch, *plan, states));
  KVTIDE_RETURN_IF_ERROR(MergeParts(batch, states));
  reading.attended_blocks = plan->blocks;
  reading.attended_blocks_below_tier0 = plan->blocks_below_tier0;
  reading.attended_bytes = plan->tier_bytes;
  plans_.Put(std::move(plan));
  return std::vector<Wanted>();
}

bool Reader::HasFar(const TableSnapshot& snapshot, int64_t begin, int64_t end) const {
  for (const SnapshotRun& run : snapshot.RunsOf(begin, end))
    if (run.tier != ChunkPicture::kDropped && !core_.attends(run.tier)) return true;
  return false;
}

absl::Status Reader::BringIn(CacheLock& lock, std::span<const Wanted> wanted, int round,
                             uint64_t* before_serial, const CallContext& context) {
  constexpr int kRounds = 16;  // others may move blocks away again
  if (round == kRounds)
    return absl::ResourceExhaustedError(absl::StrCat(
        "blocks that were brought in for the call were moved away ", kRounds,
        " times by others that need the room; send fewer calls at a time, or give a tier more memory"));
  if (round == 0) *before_serial = lock->store.serial() + 1;
  const absl::Time now = core_.options().clock();
  std::vector<HeldBlock> blocks;
  for (const Wanted& want : wanted) {
    const GroupTable& table = want.sequence->groups[static_cast<size_t>(want.group)];
    lock->store.Touch(want.sequence->recency, now);
    const int64_t end = std::min(want.end, table.end_block());
    for (int64_t index = std::max(want.begin, table.first_block()); index < end; index++)
      if (mover_.IsFar(*table.at(index))) blocks.emplace_back(lock->store, table.at(index));
  }
  return mover_.BringIn(lock, blocks, *before_serial, context);
}

absl::Status Reader::TakeSnapshots(CacheState& state, Batch& batch, Reading& reading) const {
  batch.room.clear();
  for (int home = 0; home < core_.homes(); home++)
    batch.room.push_back(Mover::RoomAtHome(state, home, core_.options().limits));
  const bool touch = batch.layer.layer_in_group == 0;  // once a step is enough
  const absl::Time now = touch ? core_.options().clock() : absl::Time();
  size_t written = 0;
  for (size_t i = 0; i < batch.items.size(); i++) {
    const SequencePtr& sequence = batch.sequences[i];
    Item& item = batch.items[i];
    item.request = &batch.call.items[i];
    item.sequence = sequence.get();
    if (batch.held.empty()) {
      absl::StatusOr<const TableSnapshot*> snapshot = reading.Add(sequence, batch.layer.group, batch.append);
      if (!snapshot.ok()) return Annotate(snapshot.status(), ItemText(batch.call, i));
      item.snapshot = *snapshot;
      item.length =
          sequence->groups[static_cast<size_t>(batch.layer.group)].layer(batch.layer.layer_in_group).tokens;
    } else {
      item.snapshot = batch.held[i].table;
      item.length = batch.held[i].tokens;
    }
    if (batch.append != nullptr && item.request->new_tokens > 0) {
      item.length = batch.append->writes[written++].end();
    } else if (batch.append != nullptr && sequence->writer == batch.append) {
      item.length = batch.append->EndOf(*sequence);
    }
    if (touch) {
      if (now - sequence->last_attended >= core_.options().limits.idle) sequence->recent_steps = 0;
      sequence->last_attended = now;
      sequence->recent_steps++;
    }
    item.recent_steps = sequence->recent_steps;
    item.changes = sequence->changes;
    if (!touch) continue;
    sequence->last_used = now;
    state.store.Touch(sequence->recency, now);
    if (core_.options().limits.promote_on_attend) state.store.Want(sequence->recency);
  }
  return absl::OkStatus();
}

absl::Status Reader::FindVisible(const Batch& batch, Item& item) const {
  const int64_t first = item.request->first_query_position;
  item.begin = VisiblePositions(first, batch.call.causal, batch.window).begin;
  item.end = batch.call.causal ? std::min(item.length, first + item.request->queries) : item.length;
  if (item.empty()) return absl::OkStatus();
  const int64_t held = item.snapshot->first_block() * kBlockTokens;
  if (item.begin / kBlockTokens * kBlockTokens < held)
    return absl::OutOfRangeError(
        absl::StrCat("the query at ", first, " sees tokens from ", item.begin, " on, but those before ", held,
                     " have left the sliding window of layer ", batch.call.layer,
                     "; append and attend in one call (AppendAttend), or ask later positions"));
  for (const SnapshotRun& run :
       item.snapshot->RunsOf(item.begin / kBlockTokens, DivideUp(item.end, kBlockTokens)))
    if (run.tier == ChunkPicture::kDropped) return DroppedError(run, item.begin, item.end);
  return absl::OkStatus();
}

absl::Status Reader::CheckWork(const Batch& batch) const {
  const int64_t most =
      batch.context.max_attend_work > 0 ? batch.context.max_attend_work : core_.options().max_attend_work;
  double work = 0;
  for (const Item& item : batch.items)
    if (!item.empty())
      work += static_cast<double>(item.request->queries) * static_cast<double>(item.end - item.begin);
  work *= batch.group.heads;
  if (work <= static_cast<double>(most)) return absl::OkStatus();
  return Refused(Refusal::kTooLarge,
                 absl::ResourceExhaustedError(absl::StrCat(
                     "the attention needs ", work, " products of queries, tokens and heads, the limit is ",
                     most, " (max_attend_work); send fewer queries or items in one call")));
}

absl::StatusOr<std::unique_ptr<CachedAttendPlan>> Reader::FindPlan(const Batch& batch) {
  AttendPlanKey key;
  key.shape = {reinterpret_cast<uintptr_t>(&batch.group), batch.call.causal ? 1u : 0u,
               static_cast<uint64_t>(batch.window)};
  key.shape.reserve(3 + 2 * batch.items.size());
  key.content.reserve(3 * batch.items.size());
  for (const Item& item : batch.items) {
    key.shape.push_back(item.sequence->id);
    key.shape.push_back(static_cast<uint64_t>(item.request->queries));
    key.content.push_back(item.snapshot->serial());
    key.content.push_back(static_cast<uint64_t>(item.length));
    key.content.push_back(static_cast<uint64_t>(item.request->first_query_position));
  }
  if (std::unique_ptr<CachedAttendPlan> plan = plans_.Take(key)) return plan;
  return MakePlan(batch, std::move(key));
}

absl::StatusOr<std::unique_ptr<CachedAttendPlan>> Reader::MakePlan(const Batch& batch, AttendPlanKey key) {
  std::unique_ptr<CachedAttendPlan> previous = plans_.TakeShape(key);
  auto plan = std::make_unique<CachedAttendPlan>();
  plan->key = std::move(key);
  plan->parts_of_item.resize(batch.items.size());
  plan->tier_bytes.resize(core_.tiers());
  std::vector<std::vector<std::vector<BlockRun>>> runs(core_.tiers());  // by tier, by item of the part
  std::vector<CachedAttendPlan::TierPart> parts(core_.tiers());
  for (size_t i = 0; i < batch.items.size(); i++) {
    const Item& item = batch.items[i];
    if (item.empty()) continue;
    const int64_t first = item.begin / kBlockTokens, last = DivideUp(item.end, kBlockTokens);
    for (const SnapshotRun& run : item.snapshot->RunsOf(first, last)) {
      const auto t = static_cast<size_t>(run.tier);
      if (parts[t].items.empty() || parts[t].items.back() != i) {
        parts[t].items.push_back(i);
        runs[t].emplace_back();
        plan->parts_of_item[i]++;
      }
      const int64_t from = std::max(run.first_block, first), to = std::min(run.end_block(), last);
      runs[t].back().push_back(
          {run.layout, run.profile.get(),
           run.blocks.subspan(static_cast<size_t>(from - run.first_block), static_cast<size_t>(to - from)),
           from * kBlockTokens, std::min(to * kBlockTokens, item.end) - from * kBlockTokens});
      if (run.profile != nullptr && (plan->profiles.empty() || plan->profiles.back() != run.profile))
        plan->profiles.push_back(run.profile);
      plan->blocks += static_cast<uint64_t>(to - from);
      const uint64_t bytes = static_cast<uint64_t>(to - from) * run.layout->block_bytes() /
                             static_cast<uint64_t>(run.layout->shape().layers);
      plan->tier_bytes[t] += bytes;
      parts[t].pass_bytes += static_cast<double>(bytes) * PassesOf(item.request->queries);
      if (run.tier >= core_.homes()) plan->blocks_below_tier0 += static_cast<uint64_t>(to - from);
    }
  }
  for (size_t t = 0; t < parts.size(); t++) {
    CachedAttendPlan::TierPart& part = parts[t];
    if (part.items.empty()) continue;
    part.tier = static_cast<int>(t);
    std::vector<PlanItem> items;
    for (size_t j = 0; j < part.items.size(); j++) {
      const AttendRequest& request = *batch.items[part.items[j]].request;
      items.push_back({runs[t][j], static_cast<int>(request.queries), request.first_query_position});
    }
    std::unique_ptr<AttendPlan> old;
    if (previous != nullptr)
      for (CachedAttendPlan::TierPart& candidate : previous->parts)
        if (candidate.tier == part.tier) old = std::move(candidate.plan);
    AttendPlanArgs args;
    args.heads = batch.group.heads;
    args.causal = batch.call.causal;
    args.window = batch.window;
    args.items = items;
    absl::StatusOr<std::unique_ptr<AttendPlan>> made =
        core_.backend(part.tier).PlanAttend(args, std::move(old));
    if (!made.ok())
      return Annotate(made.status(), absl::StrCat("attention in ", TierText(core_.options(), t)));
    part.plan = *std::move(made);
    plan->parts.push_back(std::move(part));
  }
  return plan;
}

// Rows for tiers in which nothing is attended.
absl::Status Reader::WriteApart(const Batch& batch, const CachedAttendPlan& plan) const {
  if (batch.append == nullptr) return absl::OkStatus();
  for (size_t t = 0; t < core_.tiers(); t++) {
    AppendArgs args;
    args.pieces = batch.append->PiecesIn(static_cast<int>(t));
    if (args.pieces.empty() ||
        std::any_of(plan.parts.begin(), plan.parts.end(),
                    [&](const CachedAttendPlan::TierPart& part) { return part.tier == static_cast<int>(t); }))
      continue;
    KVTIDE_RETURN_IF_ERROR(Annotate(core_.backend(static_cast<int>(t)).Append(args),
                                    absl::StrCat(TierText(core_.options(), t), ": writing new tokens")));
  }
  return absl::OkStatus();
}

// Runs every part, and checks the values of the call: while the first machine computes or, where one could
// work on what is not checked yet, before. Different machines work side by side, tiers of one machine in
// turn; the first machine with work on this thread.
absl::Status Reader::AttendParts(const Batch& batch, CachedAttendPlan& plan, std::vector<PartState>& states) {
  const AttendCall& call = batch.call;
  const std::vector<size_t> first_state = MakeStates(batch, plan, states);
  std::vector<std::vector<size_t>> machines;  // parts by backend
  for (size_t p = 0; p < plan.parts.size(); p++) {
    const auto same = std::find_if(machines.begin(), machines.end(), [&](const std::vector<size_t>& parts) {
      return &core_.backend(plan.parts[parts.front()].tier) == &core_.backend(plan.parts[p].tier);
    });
    if (same != machines.end()) {
      same->push_back(p);
    } else {
      machines.push_back({p});
    }
  }
  bool checked = false;
  absl::Status values;
  const std::function<absl::Status()> check = [&] {
    checked = true;
    return values = CheckValues(call, batch.model, batch.append);
  };
  if (machines.size() != 1) KVTIDE_RETURN_IF_ERROR(check());
  KVTIDE_RETURN_IF_ERROR(WriteApart(batch, plan));
  AttendLayerArgs args;
  args.layer = batch.layer.layer_in_group;
  args.scale = call.scale.value_or(batch.group.scale > 0
                                       ? batch.group.scale
                                       : 1.0f / std::sqrt(static_cast<float>(batch.group.shape.head_dim_k)));
  args.softcap = call.softcap.value_or(batch.group.softcap);
  args.cancellation = batch.context.cancellation;
  std::vector<absl::Status> status(plan.parts.size());
  const auto attend = [&](size_t p) {
    CachedAttendPlan::TierPart& part = plan.parts[p];
    std::vector<LayerItem> items;
    items.reserve(part.items.size());
    for (size_t j = 0; j < part.items.size(); j++) {
      const PartState& state = states[first_state[p] + j];
      items.push_back({batch.items[part.items[j]].request->q, state.out, state.lse});
    }
    AttendLayerArgs mine = args;
    mine.items = items;
    if (batch.append != nullptr) mine.append = batch.append->PiecesIn(part.tier);
    if (!checked) mine.meanwhile = &check;
    const absl::Time start = core_.options().clock();
    status[p] = core_.backend(part.tier).AttendLayer(*part.plan, mine);
    if (status[p].ok())
      core_.rates().AddAttention(part.tier, part.pass_bytes, core_.options().clock() - start);
  };
  std::vector<std::function<void()>> work;
  for (const std::vector<size_t>& parts : machines)
    work.emplace_back([&attend, &parts] {
      for (const size_t p : parts) attend(p);
    });
  machines_.Run(work);
  // Bad values are a better reason than what came of them.
  if (!checked && !IsCancelled(batch.context.cancellation)) KVTIDE_RETURN_IF_ERROR(check());
  KVTIDE_RETURN_IF_ERROR(values);
  for (size_t p = 0; p < status.size(); p++)
    if (!status[p].ok())
      return Annotate(
          status[p],
          absl::StrCat("attention in ", TierText(core_.options(), static_cast<size_t>(plan.parts[p].tier))));
  return absl::OkStatus();
}

// Where each item of each part goes; says which state is the first of each part.
std::vector<size_t> Reader::MakeStates(const Batch& batch, const CachedAttendPlan& plan,
                                       std::vector<PartState>& states) const {
  std::vector<size_t> first_state;
  size_t count = 0;
  for (const CachedAttendPlan::TierPart& part : plan.parts) {
    first_state.push_back(count);
    count += part.items.size();
  }
  states.reserve(count);
  for (const CachedAttendPlan::TierPart& part : plan.parts)
    for (const size_t i : part.items) {
      const AttendRequest& request = *batch.items[i].request;
      PartState& state = states.emplace_back();
      state.item = i;
      // The caller's tensors where nothing is merged into them.
      const bool alone = plan.parts_of_item[i] == 1;
      if (!alone || batch.call.sinks != nullptr) state.own_out.resize(batch.rows(i) * batch.dim_v());
      if (!alone || request.lse == nullptr) state.own_lse.resize(batch.rows(i));
      state.out = state.own_out.empty() ? request.out : MutableTensorView(state.own_out.data());
      state.lse = state.own_lse.empty() ? request.lse : state.own_lse.data();
    }
  return first_state;
}

absl::Status Reader::MergeParts(const Batch& batch, std::vector<PartState>& states) const {
  const int dim = static_cast<int>(batch.dim_v());
  const std::vector<float> zeros(batch.call.sinks != nullptr ? batch.dim_v() : 0);
  std::vector<PartState*> first(batch.items.size(), nullptr);
  for (PartState& state : states) {
    PartState*& into = first[state.item];
    if (into == nullptr) {
      into = &state;
      continue;
    }
    for (size_t r = 0; r < batch.rows(state.item); r++)
      MergeAttentionState(into->own_out.data() + r * batch.dim_v(), into->lse + r,
                          state.own_out.data() + r * batch.dim_v(), state.lse[r], dim);
  }
  for (size_t i = 0; i < batch.items.size(); i++) {
    const AttendRequest& request = *batch.items[i].request;
    const size_t rows = batch.rows(i);
    PartState nothing;
    if (first[i] == nullptr) {
      nothing.own_out.assign(rows * batch.dim_v(), 0.0f);
      nothing.own_lse.assign(rows, -std::numeric_limits<float>::infinity());
      nothing.lse = nothing.own_lse.data();
      first[i] = &nothing;
    }
    PartState& state = *first[i];
    if (const absl::Status status = CheckLogits(batch, i, state.lse); !status.ok())
      return AnnotateRefused(status, ItemText(batch.call, i));
    // A sink is one more state: its logit with value 0. Merged here, it counts once however many tiers took
    // part.
    if (batch.call.sinks != nullptr)
      for (size_t r = 0; r < rows; r++)
        MergeAttentionState(state.own_out.data() + r * batch.dim_v(), state.lse + r, zeros.data(),
                            batch.call.sinks[r % batch.heads()], dim);
    for (size_t j = 0; j < state.own_out.size(); j++) request.out.Set(j, state.own_out[j]);
    if (request.lse != nullptr && !state.own_lse.empty())
      std::copy(state.own_lse.begin(), state.own_lse.end(), request.lse);
  }
  return absl::OkStatus();
}

// A row that sees tokens has a finite log-sum-exp, unless its logits are beyond f32.
absl::Status Reader::CheckLogits(const Batch& batch, size_t index, const float* lse) const {
  const Item& item = batch.items[index];
  for (size_t r = 0; r < batch.rows(index); r++) {
    if (std::isfinite(lse[r])) continue;
    const int64_t position = item.request->first_query_position + static_cast<int64_t>(r / batch.heads());
    const PositionRange seen = VisiblePositions(position, batch.call.causal, batch.window);
    if (seen.begin >= std::min(item.length, seen.end)) continue;
    return absl::InternalError(absl::StrCat("the logits of the query at ", position, ", head ",
                                            r % batch.heads(),
                                            ", are beyond f32; the queries or the scale are too large"));
  }
  return absl::OkStatus();
}

// Rows of one layer on their way to the caller.
struct Reader::LayerRows {
  const LayerRead* request = nullptr;
  const TableSnapshot* snapshot = nullptr;
  int64_t length = 0;
};

absl::Status Reader::CheckRead(const ReadCall& call, const ModelSpec& model) const {
  const CacheOptions& options = core_.options();
  if (call.layers.empty()) return absl::InvalidArgumentError("read without layers");
  if (call.first_token < 0 || call.first_token >= kMostPosition)
    return absl::InvalidArgumentError(
        absl::StrCat("first token ", call.first_token, ": must be 0 to 2^48 - 1"));
  if (call.tokens < 1 || call.tokens > options.max_tokens_per_sequence)
    return absl::InvalidArgumentError(
        absl::StrCat("read of ", call.tokens, " tokens: must be 1 to ", options.max_tokens_per_sequence));
  for (const LayerRead& layer : call.layers) {
    if (layer.layer < 0 || static_cast<size_t>(layer.layer) >= model.layers.size())
      return absl::InvalidArgumentError(absl::StrCat("layer ", layer.layer, ": model '", model.name,
                                                     "' has layers 0 to ", model.layers.size() - 1));
    if (layer.k.data == nullptr && layer.v.data == nullptr)
      return absl::InvalidArgumentError(absl::StrCat("layer ", layer.layer, ": neither K nor V is wanted"));
  }
  return absl::OkStatus();
}

absl::Status Reader::ReadTokens(const ReadCall& call) {
  static const CallContext kNobody;
  const CallContext& context = call.context != nullptr ? *call.context : kNobody;
  uint64_t before_serial = 0;
  for (int round = 0;; round++) {
    KVTIDE_ASSIGN_OR_RETURN(const std::vector<Wanted> far, TryRead(call, context));
    if (far.empty()) return absl::OkStatus();
    CacheLock lock(core_);
    KVTIDE_RETURN_IF_ERROR(BringIn(lock, far, round, &before_serial, context));
  }
}

// As TryAttend.
absl::StatusOr<std::vector<Reader::Wanted>> Reader::TryRead(const ReadCall& call,
                                                            const CallContext& context) {
  CacheLock lock(core_);
  KVTIDE_ASSIGN_OR_RETURN(const SequencePtr sequence, lock->sequences.Find(call.sequence, context));
  const ModelSpec& model = sequence->model->spec;
  KVTIDE_RETURN_IF_ERROR(CheckRead(call, model));
  Reading reading(*lock, call.layers.size());
  std::vector<LayerRows> layers;
  const int64_t end = call.first_token + call.tokens;
  for (const LayerRead& request : call.layers) {
    const LayerSpec& spec = model.layers[static_cast<size_t>(request.layer)];
    const GroupTable& table = sequence->groups[static_cast<size_t>(spec.group)];
    const int64_t length = table.layer(spec.layer_in_group).tokens;
    if (end > length)
      return absl::OutOfRangeError(absl::StrCat("sequence ", call.sequence, ", layer ", request.layer,
                                                " has ", length, " tokens, not up to ", end));
    KVTIDE_ASSIGN_OR_RETURN(const TableSnapshot* snapshot, reading.Add(sequence, spec.group, nullptr));
    layers.push_back({&request, snapshot, length});
  }
  sequence->last_used = core_.options().clock();
  lock->store.Touch(sequence->recency, sequence->last_used);
  const Unlocked unlocked(lock);
  std::vector<Wanted> far;
  const int64_t first_block = call.first_token / kBlockTokens, end_block = DivideUp(end, kBlockTokens);
  for (const LayerRows& layer : layers)
    if (HasFar(*layer.snapshot, first_block, end_block))
      far.push_back({sequence,
                     model.layers[static_cast<size_t>(layer.request->layer)].group,
                     first_block,
                     end_block,
                     {}});
  if (!far.empty()) return far;
  for (const LayerRows& layer : layers) {
    const std::string where = absl::StrCat("sequence ", call.sequence, ", layer ", layer.request->layer);
    KVTIDE_RETURN_IF_ERROR(Annotate(
        ReadLayer(call, context, layer, model.layers[static_cast<size_t>(layer.request->layer)]), where));
  }
  return far;
}

absl::Status Reader::ReadLayer(const ReadCall& call, const CallContext& context, const LayerRows& layer,
                               const LayerSpec& spec) const {
  const int64_t begin = call.first_token, end = call.first_token + call.tokens;
  const int64_t held = layer.snapshot->first_block() * kBlockTokens;
  if (begin / kBlockTokens * kBlockTokens < held)
    return absl::OutOfRangeError(
        absl::StrCat("tokens before ", held, " have left the sliding window, token ", begin, " is one"));
  for (const SnapshotRun& run : layer.snapshot->RunsOf(begin / kBlockTokens, DivideUp(end, kBlockTokens))) {
    if (run.tier == ChunkPicture::kDropped) return DroppedError(run, begin, end);
    const GroupShape& shape = run.layout->shape();
    const int64_t at = run.first_block * kBlockTokens;
    const int64_t from = std::max(begin, at), to = std::min(end, run.end_block() * kBlockTokens);
    const BlockRun blocks{run.layout, run.profile.get(), run.blocks, at,
                          std::min(layer.length, run.end_block() * kBlockTokens) - at};
    DecodePiece piece;
    piece.run = &blocks;
    piece.layer = spec.layer_in_group;
    piece.first_token = from - at;
    piece.tokens = to - from;
    piece.k = Rows(layer.request->k, from - begin, shape.kv_heads, shape.head_dim_k);
    piece.v = Rows(layer.request->v, from - begin, shape.kv_heads, shape.head_dim_v);
    KVTIDE_RETURN_IF_ERROR(context.Check(core_.options().clock(), "the read"));
    KVTIDE_RETURN_IF_ERROR(
        Annotate(core_.backend(run.tier).DecodeTokens({&piece, 1}, context.cancellation),
                 absl::StrCat("reading in ", TierText(core_.options(), static_cast<size_t>(run.tier)))));
  }
  return absl::OkStatus();
}

}  // namespace kvtide
