#include "tests/sim/cache_sim.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "tests/sim/sim_runs.h"

namespace kvtide::testing {
namespace {

using Call = FaultyBackend::Call;

}  // namespace

// Marks a call as running on a client.
class CacheSim::Scope {
 public:
  Scope(CacheSim* sim, const char* verb, ClientPtr client, int writes, int reads)
      : sim_(sim), writes_(writes), reads_(reads) {
    frame_.verb = verb;
    frame_.context.cancellation = &frame_.cancellation;
    frame_.client = std::move(client);
    frame_.first_new = sim->opened_;
    frame_.copying = sim->copying_ > 0;
    const CacheStats stats = sim->cache_->Stats();
    frame_.deferred_seals = stats.deferred_seals;
    frame_.drops = stats.dropped_blocks;
    frame_.degraded = sim->Degraded();
    if (frame_.client != nullptr) {
      sim->Degrade(*frame_.client);
      frame_.lost = !frame_.client->closed && sim->Info(*frame_.client).dropped_blocks > 0;
      frame_.written = frame_.client->writing > 0;
      frame_.read = frame_.client->reading > 0;
      frame_.client->writing += writes;
      frame_.client->reading += reads;
    }
    sim->frames_.push_back(&frame_);
  }
  ~Scope() {
    if (frame_.client != nullptr) {
      frame_.client->writing -= writes_;
      frame_.client->reading -= reads_;
    }
    for (const ClientPtr& client : sim_->clients_) sim_->Degrade(*client);
    sim_->JudgeFresh(frame_);
    sim_->frames_.pop_back();
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
  Frame& frame() { return frame_; }

 private:
  CacheSim* sim_;
  Frame frame_;
  int writes_, reads_;
};

std::string CacheSim::Where() const {
  std::string where = absl::StrCat("seed ", seed_, ", step ", step_);
  for (const Frame* frame : frames_)
    absl::StrAppend(&where, " > ", frame->verb,
                    frame->client != nullptr ? absl::StrCat(" #", frame->client->serial) : "");
  return where;
}

void CacheSim::Expect(bool good, const std::function<std::string()>& text) {
  if (good || failed_) return;
  failed_ = true;
  ADD_FAILURE() << Where() << ": " << text();
}

std::vector<FaultyBackend*> CacheSim::Backends() const {
  std::vector<FaultyBackend*> backends;
  for (FaultyBackend* backend : {device_.get(), second_.get(), host_.get()})
    if (backend != nullptr) backends.push_back(backend);
  return backends;
}

// By tier; those that are reached by I/O have none.
std::vector<FaultyBackend*> CacheSim::TierBackends() const {
  std::vector<FaultyBackend*> backends;
  for (const TierOptions& tier : cache_->options().tiers)
    backends.push_back(static_cast<FaultyBackend*>(tier.backend));
  return backends;
}

// Blocks of the client were dropped before the call, or somebody's while it ran.
bool CacheSim::MayHaveLost(const Frame& frame) const {
  return frame.lost || cache_->Stats().dropped_blocks > frame.drops;
}

uint64_t CacheSim::Degraded() const {
  uint64_t blocks = 0;
  for (const TierStats& tier : cache_->Stats().tiers) blocks += tier.degraded_blocks;
  return blocks;
}

// The model's blocks become what the cache has recoded by now. Of a client that is being written the model is
// behind: later.
void CacheSim::Degrade(SimClient& client) const {
  if (client.closed || client.writing > 0 || client.options.degrade.empty()) return;
  client.shadow.Degrade(Info(client).degraded);
}

double CacheSim::Tolerance(const SimClient& client, const Frame& frame) const {
  constexpr double kCoarse = 3;
  if (client.options.degrade.empty()) return kCloseEnough;
  return client.blurred || frame.written || Degraded() != frame.degraded ? kCoarse : kCloseEnough;
}

// What may go wrong, and only that.
bool CacheSim::Excused(const absl::Status& status, const Frame& frame) const {
  if (status.code() == absl::StatusCode::kCancelled) return frame.cancellation.cancelled();
  if (frame.client == nullptr) return false;
  const SimClient& client = *frame.client;
  const std::string text(status.message());
  switch (status.code()) {
    case absl::StatusCode::kInternal:
      // Evaluation mode says that its blocks are not coded (Defect::kSealNothing); the others are to be
      // found.
      return (fault_ && absl::StrContains(text, "planted")) ||
             (client.options.seal_at_once && absl::StrContains(text, "a defect"));
    case absl::StatusCode::kDataLoss:
      // A cut that ran inside of the call may have taken the lost blocks away.
      return client.options.allow_drop && (client.closed || MayHaveLost(frame));
    case absl::StatusCode::kResourceExhausted:
      if (world_ == World::kDisk && fault_ && absl::StrContains(text, "No space left")) return true;
      // A step wants all blocks of its sequences in memory at a time.
      if (world_ == World::kDisk && absl::StrContains(text, "blocks of the step leave memory")) return true;
      return (world_ == World::kTight || world_ == World::kDisk) && absl::StrContains(text, "no room");
    case absl::StatusCode::kUnavailable:  // of a disk, or of copies to where blocks can be used
      return world_ == World::kDisk && (fault_ || absl::StrContains(text, "restart the daemon"));
    case absl::StatusCode::kFailedPrecondition:
      return client.options.seal_at_once && absl::StrContains(text, "evaluation mode");
    case absl::StatusCode::kAborted:
      if (absl::StrContains(text, "was closed")) return client.closed;
      if (absl::StrContains(text, "is being moved")) return frame.copying;
      if (absl::StrContains(text, "codes at once"))
        return client.options.seal_at_once && (frame.written || frame.read);
      return absl::StrContains(text, "being written") && frame.written;
    case absl::StatusCode::kNotFound:
      return client.closed;
    default:
      return false;
  }
}

void CacheSim::Judge(const absl::Status& status, const Frame& frame) {
  Expect(status.ok() || Excused(status, frame), [&] { return status.ToString(); });
}

void CacheSim::JudgeLength(const SimClient& client) {
  if (client.closed || client.writing > 0) return;
  const int64_t tokens = Info(client).tokens;
  Expect(tokens == client.length(),
         [&] { return absl::StrCat("the cache has ", tokens, " tokens, the model ", client.length()); });
}

// Blocks that were written after a plan was made are not in it: they stay where they are. But an eviction may
// drop what lies below to make room there.
void CacheSim::JudgeFresh(const Frame& frame) {
  for (const ClientPtr& client : clients_) {
    if (client->writing > 0) continue;
    const SequenceInfo info = Info(*client);
    uint64_t home_blocks = 0;
    for (size_t t = 0; t < info.blocks_by_tier.size(); t++)
      if (t < static_cast<size_t>(CountHomes(cache_->options().tiers))) home_blocks += info.blocks_by_tier[t];
    if (frame.moves_only && client->serial >= frame.first_new && !client->fork)
      Expect(home_blocks == client->home_blocks &&
                 (info.dropped_blocks == client->dropped || (frame.evicts && client->options.allow_drop)),
             [&] {
               return absl::StrCat("#", client->serial, " was opened while it ran and had ",
                                   client->home_blocks, " blocks in the first tier and ", client->dropped,
                                   " dropped, now ", home_blocks, " and ", info.dropped_blocks);
             });
    client->home_blocks = home_blocks;
    client->dropped = info.dropped_blocks;
  }
}

void CacheSim::JudgeBytes() {
  for (const ClientPtr& client : clients_) {
    const SequenceInfo info = Info(*client);
    Expect(info.tokens == client->length() &&
               (info.dropped_blocks > 0 || TotalBytes(info) == client->shadow.BytesAtRest()),
           [&] {
             return absl::StrCat("#", client->serial, " has ", info.tokens, " tokens in ", TotalBytes(info),
                                 " bytes, the model ", client->length(), " in ",
                                 client->shadow.BytesAtRest());
           });
  }
}

// What follows an append. The model codes all blocks but those that the cache had no room for.
void CacheSim::Settle(SimClient& client, const Frame& frame) {
  const std::vector<DeferredBlocks> deferred =
      client.closed ? std::vector<DeferredBlocks>() : Info(client).deferred;
  Expect(
      deferred.empty() || (world_ != World::kRoomy && cache_->Stats().deferred_seals > frame.deferred_seals),
      [&] { return absl::StrCat("#", client.serial, " has seals that wait, for no reason"); });
  // The window may have freed since what was lost when the profile was made.
  client.shadow.Settle(deferred, client.options.allow_drop && MayHaveLost(frame));
  if (!client.closed) client.shadow.Degrade(Info(client).degraded);
}

void CacheSim::Open() {
  SequenceOptions options = WithPair(
      Any("f16", "turbo4", "q8_0/turbo3", "turbo3", "planar4/q4_0", "bf16/turbo2"), {Random(3), Random(3)});
  options.seal_at_once = Random(6) == 0;
  // A first block that cannot be brought in defers the profile too, which the naive model does not know.
  if (world_ == World::kDisk && !options.seal_at_once) options.pair = ExactPair();
  options.allow_drop = Random(5) == 0;
  options.priority = Any(Priority::kLow, Priority::kNormal, Priority::kNormal, Priority::kHigh);
  if (Random(4) == 0) options.centre = Random(2) == 0 ? Centre::kNone : Centre::kCalibrated;
  if (options.pair != ExactPair() && !options.seal_at_once && Random(3) == 0) {
    const std::string pair = PairName(options.pair);
    if (pair == "turbo4/turbo4" && Random(2) == 0) options.degrade.push_back(Pair("turbo3"));
    if (pair == "q8_0/turbo3") options.degrade.push_back(Pair("q4_0/turbo3"));
    if (pair == "planar4/q4_0") options.degrade.push_back(Pair("planar3/turbo3"));
    if (pair != "bf16/turbo2" || Random(2) == 0) options.degrade.push_back(Pair("turbo2"));
  }
  const std::shared_ptr<const ModelSpec>& model = Random(2) == 0 ? small_ : mixed_;
  const absl::StatusOr<SequenceId> id = cache_->CreateSequence(Register(*model), options);
  Expect(id.ok(), [&] { return id.status().ToString(); });
  if (!id.ok()) return;
  clients_.push_back(std::make_shared<SimClient>(*id, model, options));
  clients_.back()->serial = opened_++;
}

// All layers in one call.
void CacheSim::Append(ClientPtr client, int64_t tokens) {
  Scope scope(this, "append", client, 1, 0);
  std::vector<NewRows> rows;
  std::vector<LayerKv> layers;
  for (size_t l = 0; l < client->model->layers.size(); l++)
    rows.emplace_back(*client->model, static_cast<int>(l), tokens, dice_);
  for (const NewRows& row : rows) layers.push_back(row.Kv());
  AppendCall call;
  call.sequence = client->id;
  call.start_position = client->length();
  call.tokens = tokens;
  call.layers = layers;
  call.context = &scope.frame().context;
  if (!scope.frame().written) client->pending = rows;
  const absl::Status status = cache_->Append(call);
  if (!scope.frame().written) client->pending.clear();
  Judge(status, scope.frame());
  if (!status.ok()) return;
  for (const NewRows& row : rows) client->shadow.Append(row.layer, row.k, row.v, tokens);
  Settle(*client, scope.frame());
}

bool CacheSim::AppendAttend(ClientPtr client, int layer, int64_t tokens) {
  Scope scope(this, "append+attend", client, 1, 1);
  const int64_t start = client->shadow.LayerLength(layer);
  const NewRows rows(*client->model, layer, tokens, dice_);
  LayerCall attend(*client->model, layer, client->id, tokens, start, dice_);
  attend.Append(rows);
  attend.call().context = &scope.frame().context;
  if (!scope.frame().written) client->pending = {rows};
  const absl::Status status = cache_->AppendAttend(attend.call());
  if (!scope.frame().written) client->pending.clear();
  Judge(status, scope.frame());
  if (!status.ok()) return false;
  client->shadow.Append(layer, rows.k, rows.v, tokens);
  const std::string difference = client->shadow.KnowsKeys(layer)
                                     ? Difference(client->shadow.Attend(layer, attend.q, tokens, start),
                                                  attend.out, attend.lse, Tolerance(*client, scope.frame()))
                                     : "";
  Expect(difference.empty(), [&] {
    return absl::StrCat("wrong attention of ", tokens, " new tokens at ", start, ", layer ", layer, ", ",
                        PairName(client->options.pair), ": ", difference);
  });
  Settle(*client, scope.frame());
  return true;
}

// Layer by layer, as an engine does. It may stop between two layers: they are brought in line again.
void CacheSim::DecodeStep(ClientPtr client, int64_t tokens) {
  const int64_t before = client->length();
  for (size_t l = 0; l < client->model->layers.size(); l++) {
    if (AppendAttend(client, static_cast<int>(l), tokens)) continue;
    if (l == 0 || client->closed) return;
    Truncate(client, before);
    if (!client->closed && client->shadow.LayerLength(0) != before) Close(client);  // excused: it lost blocks
    return;
  }
}

// A step of an engine that writes and attends by itself. Other verbs run from inside of its calls to the
// backends, while the step is open. It may be given up.
void CacheSim::EngineStep(const std::vector<ClientPtr>& clients, int64_t tokens) {
  std::vector<std::unique_ptr<Scope>> scopes;
  std::vector<StepItem> items;
  for (const ClientPtr& client : clients) {
    scopes.push_back(std::make_unique<Scope>(this, "step", client, 1, 1));
    items.push_back({client->id, tokens});
  }
  StepCall call;
  call.items = items;
  call.context = &scopes.front()->frame().context;
  absl::StatusOr<std::unique_ptr<kvtide::Step>> step = cache_->BeginStep(call);
  std::vector<double> tolerances;  // what the step shows is settled
  for (size_t i = 0; i < clients.size(); i++)
    tolerances.push_back(Tolerance(*clients[i], scopes[i]->frame()));
  const auto judge = [&](const absl::Status& status) {
    Expect(status.ok() || std::any_of(scopes.begin(), scopes.end(),
                                      [&](const auto& scope) { return Excused(status, scope->frame()); }),
           [&] { return status.ToString(); });
    return status.ok();
  };
  if (judge(step.status())) {
    std::vector<std::vector<NewRows>> rows(clients.size());
    bool whole = Random(8) != 0;
    for (size_t i = 0; i < clients.size(); i++) {
      const SimClient& client = *clients[i];
      Expect(client.closed || (*step)->start(i) == client.length(),
             [&] { return absl::StrCat("a step begins at ", (*step)->start(i), ", not ", client.length()); });
      for (size_t l = 0; l < client.model->layers.size() && whole; l++) {
        rows[i].emplace_back(*client.model, static_cast<int>(l), tokens, dice_);
        whole = RunLayer(**step, i, *clients[i], rows[i].back(), tolerances[i]);
      }
    }
    if (whole) {
      for (size_t i = 0; i < clients.size(); i++) clients[i]->pending = rows[i];
      const bool ended = judge(cache_->EndStep(*std::move(step)));
      for (size_t i = 0; i < clients.size(); i++) {
        clients[i]->pending.clear();
        if (!ended) continue;
        for (const NewRows& row : rows[i]) clients[i]->shadow.Append(row.layer, row.k, row.v, tokens);
        Settle(*clients[i], scopes[i]->frame());
      }
    }
  }
  if (step.ok()) step->reset();  // what was given up is taken back
  while (!scopes.empty()) scopes.pop_back();
}

// False: an error of the backend that was planted; the engine gives up.
bool CacheSim::RunLayer(const kvtide::Step& step, size_t item, SimClient& client, const NewRows& rows,
                        double tolerance) {
  const StepLayer work(step, item, *client.model, rows);
  Expect(work.complete(), [&] { return "a step has no exact blocks for its tokens"; });
  const std::vector<FaultyBackend*> backends = TierBackends();
  for (const auto& [tier, pieces] : work.pieces()) {
    AppendArgs append;
    append.pieces = pieces;
    if (!backends[static_cast<size_t>(tier)]->Append(append).ok()) return false;
  }
  if (work.tier() < 0) return true;
  const LayerGroupSpec& group = client.group(rows.layer);
  const std::vector<float> q =
      RandomRows(dice_, static_cast<size_t>(rows.tokens * group.heads * group.shape.head_dim_k));
  ShadowSequence with = client.shadow;
  const bool closed = client.closed;
  std::vector<float> out, lse;
  if (!work.Attend(*backends[static_cast<size_t>(work.tier())], q, &out, &lse).ok()) return false;
  if (closed) return true;
  with.Append(rows.layer, rows.k, rows.v, rows.tokens);
  if (!with.KnowsKeys(rows.layer)) return true;
  const std::string difference =
      Difference(with.Attend(rows.layer, q, rows.tokens, step.start(item)), out, lse, tolerance);
  Expect(difference.empty(), [&] {
    return absl::StrCat("wrong attention of a step of ", rows.tokens, " tokens at ", step.start(item),
                        ", layer ", rows.layer, ", ", PairName(client.options.pair),
                        ", "
                        ": ",
                        difference);
  });
  return true;
}

void CacheSim::Attend(ClientPtr client) {
  const int layer = Random(static_cast<int>(client->model->layers.size()));
  AttendLayer(client, layer, 1 + Random(4), Random(3) == 0);
}

void CacheSim::AttendLayer(ClientPtr client, int layer, int64_t queries, bool with_sinks) {
  Scope scope(this, "attend", client, 0, 1);
  const absl::StatusOr<int64_t> length = cache_->LayerLength(client->id, layer);
  if (!length.ok()) return Judge(length.status(), scope.frame());
  const std::vector<ShadowSequence> states = client->States(*length, layer);
  if (states.empty() || states.front().LayerLength(layer) != *length)
    return Expect(false, [&] {
      return absl::StrCat("the cache has ", *length, " tokens in layer ", layer, ", the model ",
                          client->shadow.LayerLength(layer));
    });
  if (*length == 0) return;
  const LayerGroupSpec& spec = client->group(layer);
  // In a sliding window only what the next token sees is sure to be there.
  const int64_t first = spec.window > 0 ? *length : std::max<int64_t>(0, *length - queries);
  LayerCall attend(*client->model, layer, client->id, queries, first, dice_);
  const std::vector<float> sinks(static_cast<size_t>(spec.heads), 1.5f);
  const float* sink = with_sinks ? sinks.data() : nullptr;
  attend.call().sinks = sink;
  attend.call().context = &scope.frame().context;
  const absl::Status status = cache_->Attend(attend.call());
  Judge(status, scope.frame());
  if (!status.ok() || !std::all_of(states.begin(), states.end(),
                                   [&](const ShadowSequence& state) { return state.KnowsKeys(layer); }))
    return;
  std::string difference;
  // As they were before the call: other verbs have changed the model while it ran.
  for (const ShadowSequence& state : states) {
    difference = Difference(state.Attend(layer, attend.q, queries, first, true, 0, sink), attend.out,
                            attend.lse, Tolerance(*client, scope.frame()));
    if (difference.empty()) return;
  }
  Expect(false, [&] {
    return absl::StrCat("wrong attention over ", *length, " tokens, layer ", layer, ", ",
                        PairName(client->options.pair), ": ", difference);
  });
}

void CacheSim::Read(ClientPtr client) {
  Scope scope(this, "read", client, 0, 1);
  const int layer = Random(static_cast<int>(client->model->layers.size()));
  const absl::StatusOr<int64_t> length = cache_->LayerLength(client->id, layer);
  if (!length.ok()) return Judge(length.status(), scope.frame());
  const std::vector<ShadowSequence> states = client->States(*length, layer);
  if (states.empty()) return;  // said by Attend
  const int64_t live = states.back().FirstLiveToken(layer);
  if (*length <= live) return;
  const int64_t first = live + Random(static_cast<int>(*length - live));
  const int64_t tokens = 1 + Random(static_cast<int>(*length - first));
  const GroupShape& shape = client->group(layer).shape;
  std::vector<float> k(static_cast<size_t>(tokens * shape.kv_heads * shape.head_dim_k)),
      v(static_cast<size_t>(tokens * shape.kv_heads * shape.head_dim_v));
  std::vector<std::pair<std::vector<float>, std::vector<float>>> expected;
  for (const ShadowSequence& state : states)
    expected.emplace_back(state.Keys(layer, first, tokens), state.Values(layer, first, tokens));
  const LayerRead read{layer, {k.data(), DataType::kF32}, {v.data(), DataType::kF32}};
  ReadCall call;
  call.sequence = client->id;
  call.first_token = first;
  call.tokens = tokens;
  call.layers = {&read, 1};
  call.context = &scope.frame().context;
  const absl::Status status = cache_->ReadTokens(call);
  Judge(status, scope.frame());
  if (!status.ok()) return;
  if (Tolerance(*client, scope.frame()) > kCloseEnough) return;
  // Blocks become coded one after another: each is as one of the states has it.
  const auto same = [](const std::vector<float>& a, const std::vector<float>& b, int64_t begin, int64_t end,
                       int64_t row) {
    return std::equal(a.begin() + begin * row, a.begin() + end * row, b.begin() + begin * row,
                      [](float x, float y) { return std::fabs(x - y) <= std::fabs(y) / 1024 + 2e-4f; });
  };
  const int64_t k_row = int64_t{shape.kv_heads} * shape.head_dim_k,
                v_row = int64_t{shape.kv_heads} * shape.head_dim_v;
  const auto find = [&](int64_t begin, int64_t end, bool keys) {
    return std::any_of(expected.begin(), expected.end(), [&](const auto& rows) {
      return (!keys || same(k, rows.first, begin, end, k_row)) && same(v, rows.second, begin, end, v_row);
    });
  };
  const bool keys_known = std::all_of(states.begin(), states.end(),
                                      [&](const ShadowSequence& state) { return state.KnowsKeys(layer); });
  // The model makes the profile of keys from the first block, the cache from the first that is not lost.
  const auto first_lost = [&] {
    std::vector<float> row(static_cast<size_t>(k_row));
    const LayerRead one{layer, {row.data(), DataType::kF32}, {}};
    ReadCall again = call;
    again.first_token = live;
    again.tokens = 1;
    again.layers = {&one, 1};
    return !cache_->ReadTokens(again).ok();
  };
  for (int64_t begin = 0, end; begin < tokens; begin = end) {
    end = std::min(tokens, ((first + begin) / kBlockTokens + 1) * kBlockTokens - first);
    Expect(find(begin, end, true) || (find(begin, end, false) && (!keys_known || first_lost())), [&] {
      return absl::StrCat("read wrong rows, ", first + begin, " to ", first + end - 1, " of ", tokens,
                          " from ", first, ", layer ", layer);
    });
  }
}

int64_t CacheSim::RandomCut(const SimClient& client) {
  const int64_t length = client.length();
  int64_t cut =
      Random(3) == 0 ? std::max<int64_t>(0, length - 1 - Random(20)) : Random(static_cast<int>(length) + 1);
  if (client.options.seal_at_once) cut = cut / kBlockTokens * kBlockTokens;
  return cut;
}

void CacheSim::Truncate(ClientPtr client, int64_t tokens) {
  Scope scope(this, "truncate", client, 1, 0);
  const absl::Status status = cache_->TruncateSequence(client->id, tokens, scope.frame().context);
  if (status.ok()) client->shadow.Truncate(tokens);
  client->blurred =
      client->blurred || (!client->options.degrade.empty() && Degraded() != scope.frame().degraded);
  const bool past = status.code() == absl::StatusCode::kOutOfRange;
  // While an append brings new tokens, what the window has lost is not what the model thinks.
  if (past && (scope.frame().written || absl::StrContains(status.message(), "sliding window"))) return;
  Judge(status, scope.frame());
}

void CacheSim::Fork(ClientPtr client) {
  Scope scope(this, "fork", client, 0, 0);
  const absl::StatusOr<SequenceId> id = cache_->ForkSequence(client->id);
  Judge(id.status(), scope.frame());
  if (!id.ok()) return;
  clients_.push_back(std::make_shared<SimClient>(*client));
  SimClient& fork = *clients_.back();
  fork.id = *id;
  fork.fork = true;
  fork.reading = 0;
  fork.serial = opened_++;
}

void CacheSim::Close(ClientPtr client) {
  const ClientPtr kept = client;
  Scope scope(this, "close", kept, 0, 0);
  const absl::Status status = cache_->CloseSequence(kept->id);
  // It is closed in any case; a disk that fails may bring it back after a restart.
  Expect(status.ok() || (world_ == World::kDisk && fault_), [&] { return status.ToString(); });
  kept->closed = true;
  clients_.erase(std::find(clients_.begin(), clients_.end(), kept));
}

void CacheSim::Evict(ClientPtr client, int tier) {
  Scope scope(this, "evict", client, 0, 0);
  scope.frame().moves_only = scope.frame().evicts = true;
  const SequenceId id = client->id;
  const absl::StatusOr<MoveReport> report = cache_->Evict({&id, 1}, tier, scope.frame().context);
  if (tier == kDropTier && !client->options.allow_drop) {
    Expect(report.status().code() == absl::StatusCode::kFailedPrecondition,
           [&] { return "a drop that is not allowed: " + report.status().ToString(); });
  } else {
    Judge(report.status(), scope.frame());
  }
}

void CacheSim::EvictAll(int tier) {
  Scope scope(this, "evict all", nullptr, 0, 0);
  scope.frame().moves_only = scope.frame().evicts = true;
  Judge(cache_->EvictAll(tier, scope.frame().context).status(), scope.frame());
}

void CacheSim::Prefetch(ClientPtr client) {
  Scope scope(this, "prefetch", client, 0, 0);
  scope.frame().moves_only = true;
  const SequenceId id = client->id;
  Judge(cache_->Prefetch({&id, 1}, scope.frame().context).status(), scope.frame());
}

void CacheSim::RunMoves() {
  Scope scope(this, "moves", nullptr, 0, 0);
  scope.frame().moves_only = true;
  cache_->RunMovesOnce();
}

void CacheSim::SetPriority(ClientPtr client) {
  Scope scope(this, "priority", client, 0, 0);
  client->options.priority = Any(Priority::kLow, Priority::kNormal, Priority::kHigh);
  const SequenceId id = client->id;
  const absl::Status status = cache_->SetPriority({&id, 1}, client->options.priority, scope.frame().context);
  Expect(status.ok() && Info(*client).options.priority == client->options.priority,
         [&] { return status.ToString(); });
}

void CacheSim::Persist(ClientPtr client) {
  Scope scope(this, "persist", client, 0, 0);
  const SequenceId id = client->id;
  const absl::StatusOr<PersistReport> report = cache_->Persist({&id, 1}, scope.frame().context);
  Judge(report.status(), scope.frame());
  if (report.ok() && !client->closed)
    Expect(Info(*client).durable_tokens == client->length(), [&] {
      return absl::StrCat(Info(*client).durable_tokens, " tokens are durable of ", client->length());
    });
}

void CacheSim::Cancel() {
  frames_[static_cast<size_t>(Random(static_cast<int>(frames_.size())))]->cancellation.Cancel();
}

void CacheSim::PlantFault(std::initializer_list<Call> calls) {
  if (Random(12) != 0) return;
  const std::vector<FaultyBackend*> backends = Backends();
  const Call call = std::data(calls)[Random(static_cast<int>(calls.size()))];
  backends[static_cast<size_t>(Random(static_cast<int>(backends.size())))]->Fail(call, 1 + Random(2));
  fault_ = true;
}

void CacheSim::ClearFaults() {
  fault_ = false;
  for (FaultyBackend* backend : Backends())
    for (int call = 0; call < FaultyBackend::kCalls; call++) backend->Fail(static_cast<Call>(call), 0);
}

// A window in which the cache has given up its mutex.
void CacheSim::Inside(Call call) {
  if (std::this_thread::get_id() != thread_ || frames_.empty() || frames_.size() >= kDepth || budget_ == 0 ||
      failed_)
    return;
  if (Random(frames_.size() == 1 ? 4 : 8) != 0) return;
  budget_--;
  nested_++;
  // Faults are for the call in which they were planted.
  std::vector<int> faults;
  for (FaultyBackend* backend : Backends())
    for (int c = 0; c < FaultyBackend::kCalls; c++) faults.push_back(backend->failing(static_cast<Call>(c)));
  const bool fault = std::exchange(fault_, false);
  const bool copy = call == Call::kStartCopy || call == Call::kPoll || call == Call::kRecode;
  copying_ += copy ? 1 : 0;
  ClearFaults();
  Nested();
  copying_ -= copy ? 1 : 0;
  fault_ = fault;
  size_t i = 0;
  for (FaultyBackend* backend : Backends())
    for (int c = 0; c < FaultyBackend::kCalls; c++) backend->Fail(static_cast<Call>(c), faults[i++]);
}

// A step of this client, and maybe of another one of its model.
void CacheSim::StepOf(ClientPtr client, int64_t tokens) {
  const auto fits = [&](const ClientPtr& other) {
    return other->model == client->model && other->writing == 0 && !other->options.seal_at_once;
  };
  if (!fits(client)) return Append(client, tokens);
  std::vector<ClientPtr> clients = {client};
  if (const ClientPtr other = AnyClient(); other != client && fits(other)) clients.push_back(other);
  EngineStep(clients, tokens);
}

void CacheSim::Nested() {
  const int dice = Random(100);
  if (clients_.empty() || dice < 12) {
    // A new one in the place of an old one gets its block ids, too.
    if (clients_.size() >= 8 || (clients_.size() > 1 && Random(2) == 0)) Close(AnyClient());
    Open();
    return Append(clients_.back(), 1 + Random(200));
  }
  const ClientPtr client = AnyClient();
  if (dice < 30) {
    if (Random(2) == 0) return Append(client, 1 + Random(Random(4) == 0 ? 200 : 70));
    if (client->writing > 0) return;
    if (Random(2) == 0) return DecodeStep(client, 1 + Random(20));
    StepOf(client, 1 + Random(20));
  } else if (dice < 45) {
    Attend(client);
  } else if (dice < 50) {
    Read(client);
  } else if (dice < 58) {
    Truncate(client, RandomCut(*client));
  } else if (dice < 64) {
    if (clients_.size() < 8) Fork(client);
  } else if (dice < 67) {
    if (clients_.size() > 1) Close(client);
  } else if (dice < 76) {
    Evict(client, static_cast<int>(cache_->options().tiers.size()) - 1);
  } else if (dice < 82) {
    Prefetch(client);
  } else if (dice < 84) {
    Evict(client, kDropTier);
  } else if (dice < 86) {
    EvictAll(static_cast<int>(cache_->options().tiers.size()) - 1);
  } else if (dice < 93) {
    if (Random(2) == 0) clock_.Advance(absl::Seconds(Random(10)));
    RunMoves();
  } else if (dice < 94) {
    SetPriority(client);
  } else if (dice < 97) {
    Cancel();
  } else {
    cache_->CheckInvariants();
  }
}

void CacheSim::Step() {
  const bool host = cache_->options().tiers.back().name != "device";
  if (world_ == World::kDisk && Random(10) == 0) {
    // A disk that was full takes blocks again after a while.
    clock_.Advance(absl::Minutes(1));
    files_->Fail(FaultFileSystem::kWrite, Random(30), 1 + Random(3),
                 absl::ResourceExhaustedError("No space left on device"));
    fault_ = true;
  }
  if (clients_.empty() || (clients_.size() < 6 && Random(12) == 0)) Open();
  const ClientPtr client = AnyClient();
  const int dice = Random(100);
  if (dice < 40) {
    // A copy may fail while room is made.
    if (world_ == World::kTight) {
      PlantFault({Call::kAppend, Call::kAttend, Call::kStartCopy, Call::kPoll});
    } else {
      PlantFault({Call::kAppend, Call::kAttend});
    }
    const int64_t tokens = Random(3) == 0 ? 1 : 1 + Random(Random(4) == 0 ? 300 : 90);
    switch (Random(3)) {
      case 0:
        Append(client, tokens);
        break;
      case 1:
        DecodeStep(client, tokens);
        break;
      default:
        StepOf(client, tokens);
    }
  } else if (dice < 60) {
    PlantFault({Call::kAttend});
    Attend(client);
  } else if (dice < 65) {
    PlantFault({Call::kDecode});
    Read(client);
  } else if (dice < 73) {
    PlantFault({Call::kDecode, Call::kAppend, Call::kStartCopy});
    Truncate(client, RandomCut(*client));
  } else if (dice < 90) {
    if (!host) return;
    PlantFault({Call::kStartCopy, Call::kPoll});
    const int last = static_cast<int>(cache_->options().tiers.size()) - 1;
    switch (Random(5)) {
      case 0:
        Evict(client, last);
        break;
      case 1:
        Prefetch(client);
        break;
      case 2:
        if (Random(4) == 0) Evict(client, kDropTier);
        break;
      case 3:
        if (Random(4) == 0) EvictAll(1 + Random(last));
        if (world_ == World::kDisk) Persist(client);
        break;
      default:
        clock_.Advance(absl::Seconds(Random(10)));
        RunMoves();
    }
  } else if (dice < 92) {
    SetPriority(client);
  } else if (dice < 95 && clients_.size() < 8) {
    Fork(client);
  } else if (clients_.size() > 1) {
    Close(client);
  }
  ClearFaults();
  files_->ClearFaults();
  cache_->CheckInvariants();
  JudgeBytes();
}

bool CacheSim::Run(World world, uint32_t seed, int64_t steps, FaultyBackend::Defect defect) {
  Renew();
  world_ = world;
  seed_ = seed;
  step_ = 0;
  failed_ = fault_ = false;
  opened_ = 0;
  copying_ = 0;
  thread_ = std::this_thread::get_id();
  dice_.seed(seed * 4 + static_cast<uint32_t>(world));
  clients_.clear();
  options_.id_seed = seed + 1;
  options_.eviction = seed % 2 == 0 ? EvictionKind::kLru : EvictionKind::kS3Fifo;
  // The clock stands while backends work, so the rates stay as they are given: some under which blocks of the
  // host tier are brought home first, some under which they are not, and those of one memory.
  options_.attend_lower_tiers =
      Any(AttendLowerTiers::kCost, AttendLowerTiers::kInPlace, AttendLowerTiers::kPromoteFirst);
  host_attend_rate_ = Any(0.0, 1e8, 5e9);
  host_promote_rate_ = Any(0.0, 1e10);
  options_.limits.high_watermark = world == World::kRoomy ? 0.05 : 0.8;
  options_.limits.low_watermark = world == World::kRoomy ? 0.02 : 0.5;
  options_.limits.promote_below = world == World::kRoomy ? 0.1 : 0.8;
  options_.max_moves_in_flight = static_cast<size_t>(1 + Random(16));
  options_.move_piece_bytes = static_cast<size_t>(4096 + Random(100000));
  options_.room_wait = absl::ZeroDuration();  // whoever would have to be waited for is a caller of ours
  size_t device = (6 + static_cast<size_t>(Random(30))) * 65536, host = 64 * kMiB;
  if (world == World::kTight) host = static_cast<size_t>(Random(20)) * 65536;
  if (world == World::kRoomy) device = 64 * kMiB;
  if (world == World::kDisk) {
    files_ = std::make_unique<FaultFileSystem>(seed);
    host = static_cast<size_t>(8 + Random(20)) * 65536;
    StartWithDisk(device, host, (16 + static_cast<size_t>(Random(50))) * kMiB, 1 + Random(2));
  } else {
    StartOn(1 + Random(2), device, host);
  }
  for (FaultyBackend* backend : Backends()) {
    backend->Plant(defect);
    backend->DelayCopies([this] { return Random(2) == 0 ? 0 : Random(4); });
    backend->SetHook(world == World::kPressure || world == World::kDisk
                         ? nullptr
                         : std::function<void(Call)>([this](Call call) { Inside(call); }));
  }
  for (; step_ < steps && !failed_; step_++) {
    budget_ = 10;
    Step();
  }
  budget_ = 0;
  for (const ClientPtr& client : std::vector<ClientPtr>(clients_)) {
    for (size_t l = 0; l < client->model->layers.size() && !failed_ && Info(*client).dropped_blocks == 0; l++)
      AttendLayer(client, static_cast<int>(l), 2, false);
    Close(client);
  }
  cache_->CheckInvariants();
  const CacheStats stats = cache_->Stats();
  deferred_ += stats.deferred_seals;
  degraded_ += Degraded();
  for (const TierStats& tier : stats.tiers) {
    in_place_ += tier.attended_in_place;
    promoted_ += tier.promoted_first;
  }
  trail_ = absl::StrCat(opened_, " ", stats.appended_tokens, " ", stats.sealed_blocks, " ",
                        stats.deferred_seals, " ", stats.moves, " ", stats.attended_blocks, " ", dice_());
  SayTrail(seed, trail_);
  const uint64_t left = UsedBytes(stats);
  Expect(left == 0, [&] { return absl::StrCat(left, " bytes are left after every sequence was closed"); });
  for (FaultyBackend* backend : Backends()) {
    backend->SetHook(nullptr);
    backend->DelayCopies(nullptr);
    backend->Plant(FaultyBackend::Defect::kNone);
  }
  cache_.reset();
  return !failed_;
}

}  // namespace kvtide::testing
