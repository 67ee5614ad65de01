#include "daemon/calibrate/gathering.h"

#include <time.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/tide.h"

namespace kvtide {
namespace {

constexpr int64_t kMostTokens = int64_t{1} << 24, kMostHeldBack = 1024, kKeysOfAChannel = 4;
// Rows that wait for the worker; what does not fit is left out.
constexpr size_t kQueueBytes = size_t{16} << 20;
// A layer may be so far before the one with the fewest.
constexpr int64_t kAhead = 256;
// Most tokens of one call, unless all are taken.
constexpr int64_t kMostOfACall = 256;
// Until it was measured: a product of two doubles and its sum.
constexpr double kFirstNanosPerProduct = 0.5;
// What a processor copies, for the bound of a call's own time.
constexpr double kBytesPerNano = 10;

int64_t ThreadNanos() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return int64_t{1000000000} * now.tv_sec + now.tv_nsec;
}

void AddTo(std::atomic<double>& sum, double value) {
  double was = sum.load(std::memory_order_relaxed);
  while (!sum.compare_exchange_weak(was, was + value, std::memory_order_relaxed)) {
  }
}

void Raise(std::atomic<int64_t>& most, int64_t value) {
  int64_t was = most.load(std::memory_order_relaxed);
  while (was < value && !most.compare_exchange_weak(was, value, std::memory_order_relaxed)) {
  }
}

// Products of the sums of one token of a layer.
double Products(const LayerGroupSpec& group) {
  const double dim = group.shape.head_dim_k;
  return (group.shape.kv_heads + group.heads) * dim * dim / 2;
}

size_t RowValues(const LayerGroupSpec& group, bool keys) {
  return static_cast<size_t>(keys ? group.shape.kv_heads : group.heads) *
         static_cast<size_t>(group.shape.head_dim_k);
}

}  // namespace

absl::Status CompletePlan(CalibrationPlan* plan) {
  if (plan->tokens == 0) plan->tokens = CalibrationPlan().tokens;
  if (plan->tokens < 1 || plan->tokens > kMostTokens)
    return absl::InvalidArgumentError(
        absl::StrCat("tokens is ", plan->tokens, ", must be 1 to ", kMostTokens));
  if (plan->held_back == 0) plan->held_back = std::min(plan->tokens / 8, kMostHeldBack);
  if (plan->held_back < 1 || plan->held_back >= plan->tokens)
    return absl::InvalidArgumentError(absl::StrCat("held_back_tokens is ", plan->held_back,
                                                   ", must be 1 to less than the ", plan->tokens, " tokens"));
  if (plan->share == 0) plan->share = CalibrationPlan().share;
  if (!(plan->share > 0 && plan->share <= 1))
    return absl::InvalidArgumentError(
        absl::StrCat("share is ", plan->share, ", must be above 0 and at most 1"));
  for (const LayerGroupSpec& group : plan->model.groups)
    if (plan->tokens - plan->held_back < kKeysOfAChannel * group.shape.head_dim_k)
      return absl::InvalidArgumentError(
          absl::StrCat(plan->tokens, " tokens, of which ", plan->held_back, " are held back: keys of ",
                       group.shape.head_dim_k, " channels want at least ",
                       kKeysOfAChannel * group.shape.head_dim_k, " that are not"));
  if (!plan->ropes.empty() && plan->ropes.size() != plan->model.layers.size())
    return absl::InvalidArgumentError(
        absl::StrCat("RoPE of ", plan->ropes.size(), " layers, the model has ", plan->model.layers.size()));
  for (size_t l = 0; l < plan->ropes.size(); l++) {
    const auto group = plan->model.layers[l].group;
    const auto first = std::find_if(plan->model.layers.begin(), plan->model.layers.end(),
                                    [&](const LayerSpec& layer) { return layer.group == group; });
    const Rope &rope = plan->ropes[l],
               &like = plan->ropes[static_cast<size_t>(first - plan->model.layers.begin())];
    if (rope.frequencies.size() != like.frequencies.size() || rope.pairs != like.pairs)
      return absl::InvalidArgumentError(
          absl::StrCat("RoPE of layer ", l, ": layers of one shape all have as many pairs, of one kind"));
  }
  // Keys without RoPE are keys as they are stored.
  if (std::all_of(plan->ropes.begin(), plan->ropes.end(),
                  [](const Rope& rope) { return rope.frequencies.empty(); }))
    plan->after_rope = true;
  return absl::OkStatus();
}

double Gathering::Bytes(const CalibrationPlan& plan) {
  double bytes = kQueueBytes;
  for (const LayerGroupSpec& group : plan.model.groups) {
    const double dim = group.shape.head_dim_k;
    bytes += KeySums::Bytes(group.shape, plan.held_back);
    // The profile: transform and inverse.
    bytes += double{1} * group.shape.layers * group.shape.kv_heads * 2 * dim * (dim + 1) * sizeof(float);
  }
  return bytes + static_cast<double>(plan.model.layers.size() * sizeof(LayerCount));
}

Gathering::Gathering(CalibrationPlan plan)
    : plan_(std::move(plan)), layers_(plan_.model.layers.size()), nanos_per_product_(kFirstNanosPerProduct) {
  plan_.model = WithoutProfiles(std::move(plan_.model));
  for (size_t g = 0; g < plan_.model.groups.size(); g++) {
    const LayerGroupSpec& group = plan_.model.groups[g];
    std::vector<Rope> ropes;
    if (!plan_.after_rope) {
      ropes.resize(static_cast<size_t>(group.shape.layers));
      for (size_t l = 0; l < plan_.model.layers.size(); l++)
        if (plan_.model.layers[l].group == static_cast<int>(g))
          ropes[static_cast<size_t>(plan_.model.layers[l].layer_in_group)] = plan_.ropes[l];
    }
    sums_.emplace_back(group.shape, group.heads, ropes, &pool_, plan_.held_back);
  }
}

int64_t Gathering::memory_bytes() const { return static_cast<int64_t>(Bytes(plan_)); }

int64_t Gathering::Room(int64_t taken, int64_t fewest) const {
  const int64_t most = plan_.share >= 1 ? plan_.tokens : std::min(plan_.tokens, fewest + kAhead);
  return std::max<int64_t>(0, most - taken);
}

int64_t Gathering::Wants(int layer, absl::Duration took) {
  constexpr auto kRelaxed = std::memory_order_relaxed;
  const auto nanos = static_cast<double>(std::max<int64_t>(0, absl::ToInt64Nanoseconds(took)));
  observed_nanos_.fetch_add(static_cast<int64_t>(nanos), kRelaxed);
  const LayerCount& count = layers_[static_cast<size_t>(layer)];
  const int64_t room = std::max(Room(count.keys.load(kRelaxed), fewest_keys_.load(kRelaxed)),
                                Room(count.queries.load(kRelaxed), fewest_queries_.load(kRelaxed)));
  if (plan_.share >= 1) return room > 0 ? std::numeric_limits<int64_t>::max() : 0;
  const double each = Products(GroupOf(layer)) * nanos_per_product_.load(kRelaxed);
  // What is saved up is enough for one call's worth, so that no burst follows a pause.
  const double had = account_nanos_.load(kRelaxed);
  const double saved = static_cast<double>(kMostOfACall) * each;
  if (had < saved) AddTo(account_nanos_, std::min(nanos * plan_.share, saved - had));
  if (room == 0 || had < each) return 0;
  const double bytes = static_cast<double>(
      (RowValues(GroupOf(layer), true) + RowValues(GroupOf(layer), false)) * sizeof(float));
  const double copied = std::max(1.0, nanos * plan_.share * kBytesPerNano / bytes);
  return std::min({room, kMostOfACall, static_cast<int64_t>(std::min(had / each, copied))});
}

bool Gathering::See(int layer, std::span<const TrafficRows> rows, int64_t tokens) {
  const auto begin = std::chrono::steady_clock::now();
  const LayerGroupSpec& group = GroupOf(layer);
  // Tokens of the first block of a sequence do not count.
  struct Span {
    const TrafficRows* rows;
    int64_t first_key, first_query, tokens;
  };
  std::vector<Span> spans;
  int64_t all = 0;
  for (const TrafficRows& one : rows) {
    const auto skipped = [](int64_t position, int64_t n) {
      return std::clamp<int64_t>(kBlockTokens - position, 0, n);
    };
    Span span{&one, skipped(one.key_position, one.keys), skipped(one.query_position, one.queries), 0};
    span.tokens = std::max(one.keys - span.first_key, one.queries - span.first_query);
    if (span.tokens <= 0) continue;
    all += span.tokens;
    spans.push_back(span);
  }
  if (all == 0) return false;
  Batch batch;
  batch.layer = layer;
  int64_t key_room = 0, query_room = 0;
  LayerCount& count = layers_[static_cast<size_t>(layer)];
  {
    const MutexLock lock(mutex_);
    if (state_ != CalibrationState::kGathering) return false;
    key_room = Room(count.keys, fewest_keys_);
    query_room = Room(count.queries, fewest_queries_);
  }
  // No call fills the queue alone, however large it is.
  const auto fit = static_cast<int64_t>(kQueueBytes / 4 /
                                        ((RowValues(group, true) + RowValues(group, false)) * sizeof(float)));
  const int64_t wanted = std::min({tokens, all, std::max<int64_t>(1, fit)});
  // Every token, or so many at equal distances.
  int64_t key_rows = 0, query_rows = 0;
  const auto take = [&](const Span& span, int64_t at, int64_t n) {
    const TrafficRows& one = *span.rows;
    const auto copy = [&](bool keys, int64_t first, int64_t end, int64_t position, const TensorView& from,
                          int64_t* room, int64_t* taken) {
      const int64_t i = first + at, m = std::min({n, end - i, *room});
      if (m <= 0) return;
      const size_t row = RowValues(group, keys) * DataTypeBytes(from.type), was = batch.bytes.size();
      batch.bytes.resize(was + static_cast<size_t>(m) * row);
      std::memcpy(batch.bytes.data() + was,
                  static_cast<const std::byte*>(from.data) + static_cast<size_t>(i) * row,
                  static_cast<size_t>(m) * row);
      batch.runs.push_back({keys, position + i, static_cast<int>(m), from.type, was});
      *room -= m;
      *taken += m;
    };
    copy(true, span.first_key, one.keys, one.key_position, one.k, &key_room, &key_rows);
    copy(false, span.first_query, one.queries, one.query_position, one.q, &query_room, &query_rows);
  };
  if (wanted == all) {
    for (const Span& span : spans) take(span, 0, span.tokens);
  } else {
    // Where the first lies differs from call to call.
    const int64_t step = all / wanted, start = (query_rows_.load(std::memory_order_relaxed) * 7 +
                                                begin.time_since_epoch().count()) %
                                               step;
    int64_t before = 0;
    size_t span = 0;
    for (int64_t i = 0; i < wanted; i++) {
      const int64_t at = std::max<int64_t>(0, start) + i * step;
      while (at >= before + spans[span].tokens) before += spans[span++].tokens;
      take(spans[span], at - before, 1);
    }
  }
  if (batch.runs.empty()) return false;
  batch.tokens = std::max(key_rows, query_rows);
  const auto nanos =
      static_cast<double>(std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin).count());
  spent_nanos_ += static_cast<int64_t>(nanos);
  batch.paid_nanos = static_cast<double>(batch.tokens) * Products(group) * nanos_per_product_;
  if (plan_.share < 1) AddTo(account_nanos_, -nanos - batch.paid_nanos);
  const MutexLock lock(mutex_);
  if (queued_bytes_ + batch.bytes.size() > kQueueBytes || state_ != CalibrationState::kGathering) {
    left_out_rows_ += key_rows * group.shape.kv_heads + query_rows * group.heads;
    return false;
  }
  // Another call may have been faster: Add takes no more than is wanted.
  count.keys += key_rows;
  count.queries += query_rows;
  int64_t keys = std::numeric_limits<int64_t>::max(), queries = keys;
  for (const LayerCount& one : layers_) {
    keys = std::min(keys, one.keys.load());
    queries = std::min(queries, one.queries.load());
  }
  fewest_keys_ = keys;
  fewest_queries_ = queries;
  waiting_tokens_ += batch.tokens;
  queued_bytes_ += batch.bytes.size();
  queue_.push_back(std::move(batch));
  return true;
}

void Gathering::Add(const Batch& batch) {
  const int64_t summed = plan_.tokens - plan_.held_back;
  const LayerSpec& layer = plan_.model.layers[static_cast<size_t>(batch.layer)];
  const LayerGroupSpec& group = GroupOf(batch.layer);
  KeySums& sums = sums_[static_cast<size_t>(layer.group)];
  LayerCount& count = layers_[static_cast<size_t>(batch.layer)];
  std::vector<float> rows;
  for (const Run& run : batch.runs) {
    const size_t values = RowValues(group, run.keys);
    rows.resize(static_cast<size_t>(run.tokens) * values);
    const TensorView from{batch.bytes.data() + run.at, run.type};
    for (size_t i = 0; i < rows.size(); i++) rows[i] = from.At(i);
    std::atomic<int64_t>& added = run.keys ? count.added_keys : count.added_queries;
    const auto to_sum = static_cast<int>(std::clamp<int64_t>(summed - added, 0, run.tokens));
    const auto to_hold =
        static_cast<int>(std::clamp<int64_t>(plan_.tokens - added - to_sum, 0, run.tokens - to_sum));
    const float* const held = rows.data() + static_cast<size_t>(to_sum) * values;
    if (run.keys) {
      if (to_sum > 0) sums.AddKeys(layer.layer_in_group, run.position, to_sum, rows.data());
      if (to_hold > 0) sums.HoldBackKeys(layer.layer_in_group, run.position + to_sum, to_hold, held);
    } else {
      if (to_sum > 0) sums.AddQueries(layer.layer_in_group, run.position, to_sum, rows.data());
      if (to_hold > 0) sums.HoldBackQueries(layer.layer_in_group, run.position + to_sum, to_hold, held);
      if (to_sum + to_hold > 0) Raise(context_, run.position + to_sum + to_hold);
      query_rows_ += int64_t{1} * (to_sum + to_hold) * group.heads;
    }
    added += to_sum + to_hold;
  }
}

bool Gathering::Whole() const {
  return std::all_of(layers_.begin(), layers_.end(), [&](const LayerCount& count) {
    return count.added_keys >= plan_.tokens && count.added_queries >= plan_.tokens;
  });
}

bool Gathering::Work(const std::atomic<bool>& stop) {
  bool worked = false;
  while (!stop) {
    Batch batch;
    {
      const MutexLock lock(mutex_);
      if (queue_.empty() || state_ != CalibrationState::kGathering) break;
      batch = std::move(queue_.front());
      queue_.pop_front();
      queued_bytes_ -= batch.bytes.size();
    }
    worked = true;
    const int64_t begin = ThreadNanos();
    Add(batch);
    const auto nanos = static_cast<double>(ThreadNanos() - begin);
    spent_nanos_ += static_cast<int64_t>(nanos);
    if (plan_.share < 1) AddTo(account_nanos_, batch.paid_nanos - nanos);
    const double each = nanos / (static_cast<double>(batch.tokens) * Products(GroupOf(batch.layer)));
    nanos_per_product_ = 0.9 * nanos_per_product_ + 0.1 * each;
    waiting_tokens_ -= batch.tokens;
    if (!Whole()) continue;
    Make();
    break;
  }
  return worked;
}

void Gathering::Make() {
  {
    const MutexLock lock(mutex_);
    state_ = CalibrationState::kMaking;
    queue_.clear();
    queued_bytes_ = 0;
    waiting_tokens_ = 0;
  }
  const int64_t begin = ThreadNanos();
  std::vector<Profile> profiles;
  std::vector<KeyTypeHarm> harms;
  std::vector<KeyTypeError> errors;
  const auto make = [&]() -> absl::Status {
    for (size_t g = 0; g < sums_.size(); g++) {
      const std::string where = absl::StrCat("layer group ", g);
      absl::StatusOr<Profile> made = sums_[g].MakeProfile();
      if (!made.ok()) return Annotate(made.status(), where);
      const absl::StatusOr<std::vector<KeyTypeHarm>> measured = sums_[g].Measure(*made);
      if (!measured.ok()) return Annotate(measured.status(), where);
      harms.resize(measured->size());
      for (size_t i = 0; i < harms.size(); i++) {
        harms[i].type = (*measured)[i].type;
        harms[i].beside = (*measured)[i].beside;
        harms[i].own += (*measured)[i].own;
        harms[i].of_beside += (*measured)[i].of_beside;
        harms[i].of_leaving_out += (*measured)[i].of_leaving_out;
      }
      profiles.push_back(*std::move(made));
    }
    return CompareKeyTypes(harms, &errors);
  };
  const absl::Status status = make();
  making_nanos_ = ThreadNanos() - begin;
  sums_.clear();
  const MutexLock lock(mutex_);
  errors_ = std::move(errors);
  if (status.ok()) {
    profiles_ = std::move(profiles);
    state_ = CalibrationState::kReady;
  } else {
    problem_ =
        absl::StrCat(status.message(),
                     ": the traffic that the sums are of and what came last differ, or are too little; "
                     "calibrate again with more tokens");
    state_ = CalibrationState::kRefused;
  }
}

bool Gathering::gathers() const {
  const MutexLock lock(mutex_);
  return state_ == CalibrationState::kGathering;
}

CalibrationStatus Gathering::Status() const {
  CalibrationStatus status;
  status.model = plan_.model.name;
  status.tenant = plan_.tenant;
  status.wanted_tokens = plan_.tokens;
  status.wanted_held_back = plan_.held_back;
  status.layers = static_cast<int>(layers_.size());
  status.tokens = std::numeric_limits<int64_t>::max();
  for (const LayerCount& count : layers_) {
    const int64_t tokens = std::min(count.added_keys.load(), count.added_queries.load());
    status.tokens = std::min(status.tokens, tokens);
    status.most_tokens = std::max(status.most_tokens, tokens);
    if (tokens >= plan_.tokens) status.whole_layers++;
  }
  status.query_rows = query_rows_;
  status.left_out_rows = left_out_rows_;
  status.waiting_tokens = waiting_tokens_;
  status.after_rope = plan_.after_rope;
  status.context = context_;
  status.observed = absl::Nanoseconds(observed_nanos_.load());
  status.spent = absl::Nanoseconds(spent_nanos_.load());
  status.making = absl::Nanoseconds(making_nanos_.load());
  status.share = plan_.share;
  status.memory_bytes = memory_bytes();
  status.installed = installed_;
  const MutexLock lock(mutex_);
  status.state = state_;
  status.errors = errors_;
  status.problem = problem_;
  return status;
}

absl::StatusOr<ModelSpec> Gathering::Export() const {
  const CalibrationStatus status = Status();
  const std::string what = absl::StrCat("calibration of model '", status.model, "'");
  switch (status.state) {
    case CalibrationState::kGathering:
      return absl::FailedPreconditionError(
          absl::StrCat(what, " has ", status.tokens, " of ", status.wanted_tokens, " tokens, ",
                       status.whole_layers, " of ", status.layers, " layers are whole"));
    case CalibrationState::kMaking:
      return absl::FailedPreconditionError(absl::StrCat(what, " is making its profile"));
    case CalibrationState::kRefused:
      return absl::FailedPreconditionError(absl::StrCat(what, " was refused: ", status.problem));
    case CalibrationState::kReady:
      break;
  }
  ModelSpec model = plan_.model;
  const MutexLock lock(mutex_);
  for (size_t g = 0; g < model.groups.size(); g++) {
    for (const HeadProfile& head : profiles_[g].k)
      model.groups[g].key_means.insert(model.groups[g].key_means.end(), head.mean.begin(), head.mean.end());
    model.groups[g].key_transforms = TransformsOf(profiles_[g]);
  }
  return model;
}

}  // namespace kvtide
