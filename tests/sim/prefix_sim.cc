#include "tests/sim/prefix_sim.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/float16.h"
#include "tests/sim/sim_runs.h"

namespace kvtide::testing {
namespace {

constexpr size_t kMostTokens = 64 * 7;

int64_t FullBlocks(const Tokens& tokens) { return static_cast<int64_t>(tokens.size()) / kBlockTokens; }

Tokens First(const Tokens& tokens, int64_t count) { return {tokens.begin(), tokens.begin() + count}; }

}  // namespace

void PrefixSim::Expect(bool good, const std::string& text) {
  if (good || failed_) return;
  failed_ = true;
  ADD_FAILURE() << "seed " << seed_ << ", step " << step_ << ", depth " << depth_ << ": " << text;
}

Tokens PrefixSim::Prompt(size_t tokens) {
  Tokens prompt;
  while (prompt.size() < tokens) {
    const auto way = static_cast<TokenId>(Random(3) == 0 ? Random(3) : 0);
    for (int i = 0; i < kBlockTokens && prompt.size() < tokens; i++)
      prompt.push_back(way * 1000 + static_cast<TokenId>(i));
  }
  return prompt;
}

std::vector<float> PrefixSim::Rows(int layer, bool keys, const Tokens& tokens, size_t from) const {
  const GroupShape& shape = GroupOf(model_, layer).shape;
  const size_t row = static_cast<size_t>(shape.kv_heads * (keys ? shape.head_dim_k : shape.head_dim_v));
  std::vector<float> rows;
  rows.reserve((tokens.size() - from) * row);
  uint64_t history = static_cast<uint64_t>(layer) * 2 + (keys ? 1 : 0);
  for (size_t t = 0; t < tokens.size(); t++) {
    history = history * 6364136223846793005u + tokens[t] + 1;
    if (t < from) continue;
    // Of f16, so that they are stored as they are. They come again after kPeriod values.
    constexpr size_t kPeriod = 40;
    const size_t begin = rows.size();
    rows.resize(begin + row);
    for (size_t i = 0; i < std::min(row, kPeriod); i++)
      rows[begin + i] = static_cast<float>((history >> i) % 2048) / 1024 - 1;
    for (size_t i = kPeriod; i < row; i += kPeriod)
      std::memcpy(&rows[begin + i], &rows[begin], std::min(kPeriod, row - i) * sizeof(float));
  }
  return rows;
}

// Full blocks that the sequence has are computed from then on.
void PrefixSim::Note(const Client& client) {
  for (int64_t block = 1; block <= FullBlocks(client.tokens); block++)
    tenants_[client.tenant].computed.insert(First(client.tokens, block * kBlockTokens));
}

bool PrefixSim::Excused(const absl::Status& status, const Client* client) const {
  const std::string text(status.message());
  switch (status.code()) {
    case absl::StatusCode::kResourceExhausted:
      return absl::StrContains(text, "no room") || fault_;
    case absl::StatusCode::kUnavailable:
      return fault_;
    case absl::StatusCode::kInternal:
      return fault_ && absl::StrContains(text, "planted");
    case absl::StatusCode::kDataLoss:
      return lost_ || (client != nullptr && client->may_lose && MayHaveLost());
    case absl::StatusCode::kNotFound:
      return client == nullptr || client->closed;
    case absl::StatusCode::kAborted:
      return depth_ > 0 || (client != nullptr && client->closed);
    default:
      return false;
  }
}

void PrefixSim::Lookup(size_t at, const Tokens& tokens) {
  PrefixCall call;
  call.model = tenants_[at].model;
  call.options = sequence_;
  call.token_ids = tokens;
  call.lease = absl::Seconds(1 + Random(20));
  call.context = &tenants_[at].context;
  const absl::StatusOr<PrefixReport> report = cache_->LookupPrefix(call);
  if (!report.ok()) return Expect(false, report.status().ToString());
  int64_t told = 0;
  for (const PrefixReport::Run& run : report->tiers) told += run.tokens;
  Expect(told == report->tokens && report->tokens <= static_cast<int64_t>(tokens.size()) &&
             report->tokens % kBlockTokens == 0 && (report->lease != 0) == (report->tokens > 0),
         "a lookup has lost count");
  if (report->lease == 0) return;
  const Tokens found = First(tokens, report->tokens);
  Expect(tenants_[at].computed.count(found) == 1,
         absl::StrCat(report->tokens, " tokens are found that tenant ", at, " has never computed"));
  leases_.push_back({report->lease, at, found, options_.clock() + call.lease});
}

// A sequence that begins with a lease, if there is one.
void PrefixSim::Create(size_t at, size_t index) {
  Lease lease;
  if (index < leases_.size()) {
    lease = leases_[index];
    at = lease.tenant;
    leases_.erase(leases_.begin() + static_cast<int64_t>(index));
  }
  SequenceOptions options = sequence_;
  options.priority = kAllPriorities[static_cast<size_t>(Random(3))];
  const absl::StatusOr<SequenceId> id =
      cache_->CreateSequence(tenants_[at].model, options, tenants_[at].context, lease.id);
  if (!id.ok())
    return Expect(absl::IsNotFound(id.status()) && lease.id != 0 && options_.clock() >= lease.end,
                  id.status().ToString());
  const int64_t tokens = cache_->Length(*id, tenants_[at].context).value();
  Expect(tokens == static_cast<int64_t>(lease.tokens.size()) ||
             ((lost_ || MayHaveLost()) && tokens < static_cast<int64_t>(lease.tokens.size())),
         absl::StrCat("a lease of ", lease.tokens.size(), " tokens gave ", tokens));
  auto client = std::make_shared<Client>();
  client->id = *id;
  gone_.erase(*id);  // another life of the cache may have had one of that name
  client->tenant = at;
  client->tokens = First(lease.tokens, tokens);
  client->said = static_cast<size_t>(tokens);
  // After a restart other bytes may lie under an old label, as those of a block that was written behind the
  // label of one that was dropped: they are not served, but they were found.
  client->may_lose = restarted_ && tokens > 0;
  clients_.push_back(client);
  reused_ += static_cast<uint64_t>(tokens);
}

void PrefixSim::Append(ClientPtr client, const Tokens& next, bool say) {
  if (client->running > 0 || next.empty()) return;
  const Tokens all = client->tokens + next;
  std::vector<std::vector<float>> rows;
  std::vector<LayerKv> layers;
  for (int layer = 0; layer < static_cast<int>(model_.layers.size()); layer++)
    for (const bool keys : {true, false}) rows.push_back(Rows(layer, keys, all, client->tokens.size()));
  for (size_t layer = 0; layer < model_.layers.size(); layer++)
    layers.push_back({static_cast<int>(layer),
                      {rows[2 * layer].data(), DataType::kF32},
                      {rows[2 * layer + 1].data(), DataType::kF32}});
  AppendCall call;
  call.sequence = client->id;
  call.start_position = static_cast<int64_t>(client->tokens.size());
  call.tokens = static_cast<int64_t>(next.size());
  call.layers = layers;
  if (say) call.token_ids = next;
  call.context = &tenants_[client->tenant].context;
  client->running++;
  const Tokens before = std::exchange(client->tokens, all);
  Note(*client);  // others may find it before the call ends
  const absl::Status status = cache_->Append(call);
  client->running--;
  if (status.ok()) {
    if (say && client->said == before.size()) client->said = all.size();
    return;
  }
  client->tokens = before;
  Expect(Excused(status, client.get()), status.ToString());
}

void PrefixSim::Read(ClientPtr client) {
  if (client->running > 0 || client->tokens.empty()) return;
  const int layer = Random(static_cast<int>(model_.layers.size()));
  const LayerGroupSpec& group = GroupOf(model_, layer);
  const auto length = static_cast<int64_t>(client->tokens.size());
  const int64_t from = FirstLiveBlock(length, group.window) * kBlockTokens;
  Tokens tokens = client->tokens;
  if (lie_) tokens.back()++;
  const std::vector<float> k = Rows(layer, true, tokens, static_cast<size_t>(from)),
                           v = Rows(layer, false, tokens, static_cast<size_t>(from));
  std::vector<float> k_read(k.size()), v_read(v.size());
  const LayerRead read{layer, MutableTensorView(k_read.data()), MutableTensorView(v_read.data())};
  ReadCall call;
  call.sequence = client->id;
  call.first_token = from;
  call.tokens = length - from;
  call.layers = {&read, 1};
  call.context = &tenants_[client->tenant].context;
  client->running++;
  const absl::Status status = cache_->ReadTokens(call);
  client->running--;
  if (!status.ok()) return Expect(Excused(status, client.get()), status.ToString());
  const auto k_row = static_cast<size_t>(group.shape.kv_heads * group.shape.head_dim_k),
             v_row = static_cast<size_t>(group.shape.kv_heads * group.shape.head_dim_v);
  Expect(AreRows(k, k_read, k_row) && AreRows(v, v_read, v_row),
         absl::StrCat("a sequence of ", length, " tokens has other rows in layer ", layer));
}

// As they were appended; coded, and maybe recoded to fewer bits, as much as is left of them: rows of other
// tokens are further away than two bits.
bool PrefixSim::AreRows(const std::vector<float>& rows, const std::vector<float>& read, size_t row) const {
  if (sequence_.degrade.empty()) return rows == read;
  constexpr double kMost = 0.85;
  for (size_t begin = 0; begin < rows.size(); begin += row) {
    double error = 0, norm = 0;
    for (size_t i = begin; i < begin + row; i++) {
      const double difference = static_cast<double>(rows[i]) - static_cast<double>(read[i]);
      error += difference * difference;
      norm += static_cast<double>(rows[i]) * static_cast<double>(rows[i]);
    }
    if (!(error <= kMost * kMost * norm)) return false;
  }
  return true;
}

void PrefixSim::Truncate(ClientPtr client, int64_t tokens) {
  if (client->running > 0) return;
  client->running++;
  const absl::Status status = cache_->TruncateSequence(client->id, tokens, tenants_[client->tenant].context);
  client->running--;
  if (status.ok()) {
    client->tokens.resize(static_cast<size_t>(tokens));
    // Inside of an old block its first ids are not known any more.
    client->said = std::min(client->said, client->tokens.size() / kBlockTokens * kBlockTokens);
  } else {
    Expect(absl::IsOutOfRange(status) || Excused(status, client.get()), status.ToString());
  }
}

void PrefixSim::Fork(ClientPtr client) {
  if (client->running > 0) return;
  const absl::StatusOr<SequenceId> id = cache_->ForkSequence(client->id, tenants_[client->tenant].context);
  if (!id.ok()) return Expect(Excused(id.status(), client.get()), id.status().ToString());
  auto fork = std::make_shared<Client>(*client);
  fork->id = *id;
  gone_.erase(*id);
  fork->running = 0;
  fork->durable.reset();
  clients_.push_back(fork);
}

void PrefixSim::Close(ClientPtr client) {
  client->closed = true;
  clients_.erase(std::find(clients_.begin(), clients_.end(), client));
  const absl::Status status = cache_->CloseSequence(client->id, tenants_[client->tenant].context);
  if (status.ok()) gone_.insert(client->id);
  Expect(status.ok() || (fault_ && (absl::IsUnavailable(status) || absl::IsResourceExhausted(status))),
         status.ToString());
}

void PrefixSim::Persist(ClientPtr client) {
  const uint64_t nested = nested_;
  client->durable.reset();  // it may be what was, or what is
  const absl::StatusOr<PersistReport> report =
      cache_->Persist({{client->id}}, tenants_[client->tenant].context);
  if (report.ok() && nested_ == nested) {
    client->durable = client->tokens;
    client->durable_said = client->said;
  }
  if (!report.ok()) return Expect(Excused(report.status(), client.get()), report.status().ToString());
  if (depth_ > 0 || fault_ || nested_ != nested || client->closed || Random(3) != 0) return;
  // Closed now, it is found after a restart with everything of it that was found before.
  const Tokens tokens = client->tokens;
  const auto said = static_cast<int64_t>(client->said / kBlockTokens * kBlockTokens);
  const size_t tenant = client->tenant;
  const uint64_t failed = cache_->Stats().failed_persists;
  Close(client);
  PrefixCall call;
  call.model = tenants_[tenant].model;
  call.options = sequence_;
  call.token_ids = tokens;
  call.peek = true;
  call.context = &tenants_[tenant].context;
  const absl::StatusOr<PrefixReport> before = cache_->LookupPrefix(call);
  // Sequences whose tokens were not said leave nothing, and with a sliding window less may be durable than is
  // there.
  // Where another one's copy on the disk was found in the place of a block there are two; while a lease holds
  // that one, or when they are of different bits, it stays the one that is found.
  const bool leased =
      std::any_of(leases_.begin(), leases_.end(), [&](const Lease& lease) { return lease.tenant == tenant; });
  const bool whole = before.ok() && sequence_.degrade.empty() && !leased &&
                     before->tokens == FullBlocks(tokens) * kBlockTokens &&
                     options_.max_prefix_blocks > 1000 && cache_->Stats().failed_persists == failed;
  RestartNow();
  if (!whole || nested_ != nested) return;
  call.model = tenants_[tenant].model;
  const absl::StatusOr<PrefixReport> after = cache_->LookupPrefix(call);
  // What others have computed behind it is theirs.
  const int64_t durable = std::min(before->tokens, said);
  Expect(after.ok() && after->tokens >= durable,
         absl::StrCat(durable, " tokens were durable, ", after.ok() ? after->tokens : -1,
                      " are found after a restart",
                      cache_->restored().lost.empty() ? "" : "; lost: " + cache_->restored().lost.front()));
}

void PrefixSim::RestartNow() {
  restarts_++;
  const bool crash = files_->dead() || Random(2) == 0;
  files_->DieAfter(-1);
  files_->ClearFaults();  // a start on a disk that takes nothing is refused
  std::vector<ClientPtr> durable;
  for (const ClientPtr& client : clients_) {
    if (!client->durable.has_value()) continue;
    client->tokens = *client->durable;
    client->said = client->durable_said;
    durable.push_back(client);
  }
  clients_.clear();
  leases_.clear();
  for (FaultyBackend* backend : {device_.get(), host_.get()}) backend->SetHook(nullptr);
  restarted_ = true;
  Restart(crash);
  for (const auto& backend : {device_.get(), host_.get()})
    backend->SetHook([this](FaultyBackend::Call) { Inside(); });
  for (Tenant& tenant : tenants_) tenant.model = cache_->RegisterModel(model_, tenant.context).value();
  for (const SequenceInfo& info : cache_->ListSequences()) {
    const auto known = std::find_if(durable.begin(), durable.end(),
                                    [&](const ClientPtr& client) { return client->id == info.id; });
    Expect(gone_.count(info.id) == 0, "a sequence that was closed is there again");
    if (known == durable.end()) {
      const absl::Status status = cache_->CloseSequence(info.id);
      Expect(status.ok(), status.ToString());
      continue;
    }
    Expect(static_cast<int64_t>((*known)->tokens.size()) == info.tokens,
           absl::StrCat(info.tokens, " tokens are there after a restart, durable were ",
                        (*known)->tokens.size()));
    clients_.push_back(*known);
  }
  Expect(clients_.size() == durable.size(), "a durable sequence is not there after a restart");
}

void PrefixSim::Begin() {
  const auto tenant = static_cast<size_t>(Random(2));
  const Tokens prompt = Prompt(static_cast<size_t>(1 + Random(static_cast<int>(kMostTokens))));
  const size_t leases = leases_.size();
  Lookup(tenant, prompt);
  if (clients_.size() >= 6) return;
  Create(tenant, leases_.size() > leases ? leases_.size() - 1 : leases_.size());
  if (clients_.empty()) return;
  const ClientPtr client = clients_.back();
  if (client->tokens.size() >= prompt.size() ||
      !std::equal(client->tokens.begin(), client->tokens.end(), prompt.begin()))
    return;
  Append(client, {prompt.begin() + static_cast<int64_t>(client->tokens.size()), prompt.end()},
         Random(8) != 0);
}

void PrefixSim::Inside() {
  if (std::this_thread::get_id() != thread_ || depth_ >= 2 || budget_ <= 0 || failed_ || Random(6) != 0)
    return;
  budget_--;
  nested_++;
  depth_++;
  Step(true);
  depth_--;
}

void PrefixSim::Step(bool nested) {
  const int dice = Random(100);
  if (clients_.empty() || dice < 22) return Begin();
  const ClientPtr client = clients_[static_cast<size_t>(Random(static_cast<int>(clients_.size())))];
  const auto length = static_cast<int64_t>(client->tokens.size());
  if (dice < 38) {
    if (client->tokens.size() < kMostTokens) {
      const Tokens next = Prompt(static_cast<size_t>(1 + Random(150)));
      Append(client, next, Random(12) != 0);
    }
  } else if (dice < 54) {
    Read(client);
  } else if (dice < 60) {
    Truncate(client, Random(static_cast<int>(length) + 1));
  } else if (dice < 65) {
    if (clients_.size() < 7) Fork(client);
  } else if (dice < 75) {
    if (client->running == 0 || Random(4) == 0) Close(client);
  } else if (dice < 80) {
    if (!leases_.empty()) {
      const auto at = static_cast<size_t>(Random(static_cast<int>(leases_.size())));
      const Lease lease = leases_[at];
      if (Random(2) == 0) return Create(0, at);
      leases_.erase(leases_.begin() + static_cast<int64_t>(at));
      Expect(cache_->ReleaseLease(lease.id, tenants_[lease.tenant].context) || options_.clock() >= lease.end,
             "a lease was over before its time");
      Expect(!cache_->ReleaseLease(lease.id, tenants_[1 - lease.tenant].context),
             "a lease of another tenant was released");
    }
  } else if (dice < 85) {
    Persist(client);
  } else if (dice < 90) {
    const SequenceId id = client->id;
    const absl::Status status = cache_->Evict({&id, 1}, 1 + Random(2)).status();
    Expect(status.ok() || Excused(status, client.get()), status.ToString());
  } else if (dice < 96) {
    clock_.Advance(absl::Milliseconds(1 + Random(4000)));
    cache_->RunMovesOnce();
  } else if (!nested && Random(3) == 0) {
    RestartNow();
  }
}

bool PrefixSim::Run(uint32_t seed, int64_t steps, bool lie, bool remote) {
  Renew();
  seed_ = seed;
  failed_ = false;
  lie_ = lie;
  fault_ = lost_ = restarted_ = false;
  depth_ = 0;
  thread_ = std::this_thread::get_id();
  dice_.seed(seed);
  files_ = std::make_unique<FaultFileSystem>(seed);
  options_.id_seed = seed + 1;
  options_.eviction = seed % 2 == 0 ? EvictionKind::kLru : EvictionKind::kS3Fifo;
  options_.room_wait = absl::ZeroDuration();  // whoever would have to be waited for is a caller of ours
  options_.max_moves_in_flight = static_cast<size_t>(1 + Random(8));
  options_.max_prefix_blocks = Random(4) == 0 ? 20 : 100'000;
  options_.limits.high_watermark = 0.8;
  options_.limits.low_watermark = 0.5;
  model_ = Random(2) == 0 ? SmallModel() : MixedModel();
  sequence_ = WithPair("f16");
  if (Random(3) == 0) {
    sequence_ = WithPair("turbo4", {0, 0});
    sequence_.centre = Centre::kNone;
    sequence_.degrade = {Pair("turbo3"), Pair("turbo2")};
  }
  store_ = remote ? std::make_unique<RemoteStore>() : nullptr;
  remote_ = remote ? std::make_unique<FaultRemote>(store_.get()) : nullptr;
  options_.remote = remote_.get();
  options_.remote_writes = seed % 4 < 2 ? RemoteWrites::kAll : RemoteWrites::kOnDemote;
  if (remote) {
    options_.max_unsent_blocks = static_cast<size_t>(1 + Random(40));
    remote_->SetHook([this](const char*) {
      if (Random(8) == 0) clock_.Advance(absl::Milliseconds(Random(1500)));
      Inside();
    });
  }
  StartWithDisk((10 + static_cast<size_t>(Random(20))) * 65536,
                (10 + static_cast<size_t>(Random(20))) * 65536, (3 + static_cast<size_t>(Random(6))) * kMiB);
  tenants_.assign(2, {});
  for (size_t at = 0; at < tenants_.size(); at++) {
    tenants_[at].identity = {absl::StrCat("tenant ", at), false};
    tenants_[at].context.identity = &tenants_[at].identity;
    tenants_[at].model = cache_->RegisterModel(model_, tenants_[at].context).value();
  }
  clients_.clear();
  gone_.clear();
  leases_.clear();
  for (FaultyBackend* backend : {device_.get(), host_.get()}) {
    backend->DelayCopies([this] { return Random(2) == 0 ? 0 : Random(3); });
    backend->SetHook([this](FaultyBackend::Call) { Inside(); });
  }
  for (step_ = 0; step_ < steps && !failed_; step_++) {
    budget_ = 8;
    fault_ = false;
    if (Random(20) == 0) {
      fault_ = true;
      clock_.Advance(absl::Minutes(1));
      files_->Fail(FaultFileSystem::kWrite, Random(20), 1 + Random(3),
                   absl::ResourceExhaustedError("No space left on device"));
    } else if (Random(25) == 0) {
      // The process dies in the middle of something; what is done without the disk goes on to the end.
      fault_ = lost_ = true;
      files_->DieAfter(Random(40));
    } else if (Random(20) == 0) {
      fault_ = true;
      host_->Fail(Random(2) == 0 ? FaultyBackend::kStartCopy : FaultyBackend::kPoll, 1 + Random(2));
    }
    if (remote) {
      constexpr FaultRemote::Fault kFaults[] = {FaultRemote::Fault::kAway, FaultRemote::Fault::kFull,
                                                FaultRemote::Fault::kLosesAfterFind,
                                                FaultRemote::Fault::kDamages};
      remote_->Plant(Random(4) == 0 ? kFaults[Random(4)] : FaultRemote::Fault::kNone);
    }
    Step(false);
    if (files_->dead()) {
      budget_ = 0;
      deaths_++;
      RestartNow();
    }
    files_->DieAfter(-1);
    lost_ = false;
    files_->ClearFaults();
    for (FaultyBackend* backend : {device_.get(), host_.get()})
      for (int call = 0; call < FaultyBackend::kCalls; call++)
        backend->Fail(static_cast<FaultyBackend::Call>(call), 0);
    cache_->CheckInvariants();
  }
  budget_ = 0;
  for (const ClientPtr& client : std::vector<ClientPtr>(clients_)) {
    Read(client);
    Close(client);
  }
  for (const Lease& lease : leases_) cache_->ReleaseLease(lease.id);
  for (Tenant& tenant : tenants_) {
    const absl::Status status = cache_->UnregisterModel(model_.name, tenant.context).status();
    Expect(status.ok(), status.ToString());
  }
  cache_->CheckInvariants();
  const CacheStats stats = cache_->Stats();
  for (const TierStats& tier : stats.tiers) degraded_ += tier.degraded_blocks;
  trail_ = absl::StrCat(stats.appended_tokens, " ", stats.moves, " ", stats.lost_blocks, " ", dice_());
  SayTrail(seed, trail_);
  const uint64_t left = UsedBytes(stats);
  Expect(left == 0 && stats.leases == 0, absl::StrCat(left, " bytes are left after all was forgotten"));
  for (FaultyBackend* backend : {device_.get(), host_.get()}) {
    backend->SetHook(nullptr);
    backend->DelayCopies(nullptr);
  }
  cache_.reset();
  if (remote) fetched_ += remote_->Stats().read_blocks;
  options_.remote = nullptr;
  return !failed_;
}

}  // namespace kvtide::testing
