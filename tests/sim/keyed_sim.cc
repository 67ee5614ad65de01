#include "tests/sim/keyed_sim.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "tests/daemon/cache/keyed_rungs.h"
#include "tests/sim/sim_runs.h"

namespace kvtide::testing {
namespace {

constexpr int kKeys = 60;
constexpr uint64_t kOpaqueBytes = 5000;
constexpr size_t kPlenty = 100'000;  // blocks
constexpr int kHostTier = 1;

std::vector<std::string> Names(int first, uint64_t count) {
  std::vector<std::string> names;
  for (uint64_t i = 0; i < count; i++) names.push_back(absl::StrCat("key ", first + static_cast<int>(i)));
  return names;
}

}  // namespace

void KeyedSim::Expect(bool good, const std::string& text) {
  if (good || failed_) return;
  failed_ = true;
  ADD_FAILURE() << "seed " << seed_ << ", step " << step_ << ", depth " << depth_ << ": " << text;
}

std::vector<std::byte> KeyedSim::Payload(size_t space, int first, uint64_t count) const {
  const NamespaceSpec& spec = spaces_[space].spec;
  const size_t bytes = spec.opaque.has_value()
                           ? spec.opaque->block_bytes
                           : static_cast<size_t>(spec.rows() * spec.tensors->kv_heads * 2 *
                                                 (spec.tensors->head_dim_k + spec.tensors->head_dim_v));
  std::vector<std::byte> payload(bytes * count);
  for (uint64_t i = 0; i < count; i++) {
    // Finite values of f16, so that they are rows too. Four at a time, from a counter that is mixed.
    uint64_t counter = (uint64_t{space} << 32 | (static_cast<uint64_t>(first) + i)) * 0xd1342543de82ef95u;
    for (size_t b = 0; b < bytes; b += 8) {
      uint64_t bits = counter += 0x9e3779b97f4a7c15u;
      bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
      bits = (bits ^ (bits >> 27)) & 0x77ff'77ff'77ff'77ffu;
      std::memcpy(payload.data() + i * bytes + b, &bits, std::min<size_t>(8, bytes - b));
    }
  }
  return payload;
}

void KeyedSim::Open(size_t at) {
  Space& space = spaces_[at];
  const absl::StatusOr<NamespaceInfo> info =
      cache_->OpenNamespace(space.spec, Random(2) == 0 ? Persistence::kAll : Persistence::kNone,
                            kAllPriorities[static_cast<size_t>(Random(3))]);
  if (!info.ok()) return Expect(false, info.status().ToString());
  Expect(space.id == 0 || space.id == info->id, "the id of a namespace has changed");
  space.id = info->id;
  space.open = true;
}

void KeyedSim::Store(size_t at, int first, int count) {
  const uint64_t deletes = spaces_[at].deletes;
  const std::vector<std::string> names = Names(first, static_cast<uint64_t>(count));
  const std::vector<std::string_view> keys(names.begin(), names.end());
  const std::vector<std::byte> payload = Payload(at, first, static_cast<uint64_t>(count));
  StoreCall call;
  call.name_space = spaces_[at].id;
  call.keys = keys;
  call.form = spaces_[at].spec.opaque.has_value() ? BlockPayload::kBytes : BlockPayload::kTensors;
  call.payload = payload;
  if (Random(3) == 0) call.priority = kAllPriorities[static_cast<size_t>(Random(3))];
  for (int i = 0; i < count; i++) spaces_[at].stored.insert(first + i);
  // Those that were not there, which nobody says, have all of their bits again.
  const std::map<int, size_t> rungs = spaces_[at].rungs;
  const uint64_t nested = nested_;
  ForgetRungs(at, first, count);
  const absl::StatusOr<StoreReport> report = cache_->StoreBlocks(call);
  ForgetRungs(at, first, count);
  if (report.ok() && report->stored == 0 && nested_ == nested) spaces_[at].rungs = rungs;
  if (report.ok()) {
    Expect(report->stored + report->present + report->left_out == static_cast<uint64_t>(count),
           "a store has lost count");
    return;
  }
  const absl::StatusCode code = report.status().code();
  Expect((code == absl::StatusCode::kNotFound && (spaces_[at].deletes != deletes || !spaces_[at].open)) ||
             (code == absl::StatusCode::kInternal && fault_) || code == absl::StatusCode::kResourceExhausted,
         report.status().ToString());
}

void KeyedSim::ForgetRungs(size_t at, int first, int count) {
  std::map<int, size_t>& rungs = spaces_[at].rungs;
  rungs.erase(rungs.lower_bound(first), rungs.lower_bound(first + count));
}

uint64_t KeyedSim::Hits(size_t at, int first, int count) {
  const std::vector<std::string> names = Names(first, static_cast<uint64_t>(count));
  const std::vector<std::string_view> keys(names.begin(), names.end());
  LookupCall call;
  call.name_space = spaces_[at].id;
  call.keys = keys;
  call.peek = true;
  const absl::StatusOr<LookupReport> report = cache_->LookupBlocks(call);
  return report.ok() ? report->hits : 0;
}

void KeyedSim::Lookup(size_t at, int first, int count) {
  const uint64_t deletes = spaces_[at].deletes;
  const std::vector<std::string> names = Names(first, static_cast<uint64_t>(count));
  const std::vector<std::string_view> keys(names.begin(), names.end());
  LookupCall call;
  call.name_space = spaces_[at].id;
  call.keys = keys;
  call.lease = absl::Seconds(1 + Random(20));
  if (remote_ != nullptr) ForgetRungs(at, first, count);  // it has what was stored
  const absl::StatusOr<LookupReport> report = cache_->LookupBlocks(call);
  if (remote_ != nullptr) ForgetRungs(at, first, count);
  const Space& space = spaces_[at];
  if (!report.ok())
    return Expect(absl::IsNotFound(report.status()) && (!space.open || space.deletes != deletes),
                  report.status().ToString());
  for (uint64_t i = 0; i < report->hits; i++)
    Expect(space.deletes != deletes || space.stored.count(first + static_cast<int>(i)) == 1,
           absl::StrCat("key ", first + static_cast<int>(i), " is found and was never stored"));
  const std::set<uint64_t> degraded(report->degraded.begin(), report->degraded.end());
  Expect(degraded.empty() || (!space.spec.degrade.empty() && *degraded.rbegin() < report->hits),
         "a lookup calls blocks degraded that cannot be");
  if (report->lease != 0)
    leases_.push_back(
        {report->lease, at, deletes, first, report->hits, options_.clock() + call.lease, degraded});
}

void KeyedSim::Load(size_t index) {
  const Lease lease = leases_[index];
  const auto from = static_cast<uint64_t>(Random(static_cast<int>(lease.blocks)));
  const uint64_t count = std::min<uint64_t>(lease.blocks - from, static_cast<uint64_t>(1 + Random(6)));
  std::vector<std::byte> expected = Payload(lease.space, lease.first + static_cast<int>(from), count);
  if (world_.lie) expected.back() ^= std::byte{1};
  if (spaces_[lease.space].spec.opaque.has_value() && Random(2) == 0)
    return LoadInPlace(lease, from, count, expected);
  std::vector<std::byte> payload(expected.size());
  LoadCall call;
  call.lease = lease.id;
  call.first = from;
  call.blocks = count;
  call.form = spaces_[lease.space].spec.opaque.has_value() ? BlockPayload::kBytes : BlockPayload::kTensors;
  call.payload = payload;
  const uint64_t nested = nested_;
  const absl::StatusOr<LoadReport> report = cache_->LoadBlocks(call);
  if (LoadFailed(lease, report.status())) return;
  loaded_ += count;
  if (nested_ != nested)  // others have seen them meanwhile, and perhaps stored them once more
    ForgetRungs(lease.space, lease.first + static_cast<int>(from), static_cast<int>(count));
  if (!spaces_[lease.space].spec.degrade.empty())
    return CheckRows(lease, from, *report, payload, nested_ == nested);
  Expect(report->degraded.empty(), "a load calls blocks degraded that cannot be");
  Expect(payload == expected, absl::StrCat("a load of key ", lease.first + static_cast<int>(from),
                                           " has other bytes than were stored"));
}

bool KeyedSim::Holds(const Lease& lease) const {
  return options_.clock() < lease.end && spaces_[lease.space].deletes == lease.deletes &&
         std::any_of(leases_.begin(), leases_.end(), [&](const Lease& l) { return l.id == lease.id; });
}

const std::vector<std::byte>& KeyedSim::AfterRung(size_t at, int key, size_t rung) {
  std::vector<std::byte>& after = after_[{key, rung}];
  if (!after.empty()) return after;
  const NamespaceSpec& spec = spaces_[at].spec;
  const std::span<const CachePair> rungs = std::span(spec.degrade).first(rung);
  after = AfterRungs(spec, Payload(at, key, 1), world_.skips_rungs && rung > 0 ? rungs.last(1) : rungs);
  return after;
}

void KeyedSim::CheckRows(const Lease& lease, uint64_t from, const LoadReport& report,
                         const std::vector<std::byte>& payload, bool remember) {
  Space& space = spaces_[lease.space];
  const std::set<uint64_t> degraded(report.degraded.begin(), report.degraded.end());
  const auto bytes = static_cast<int64_t>(payload.size() / report.blocks);
  for (uint64_t i = 0; i < report.blocks && !failed_; i++) {
    const int key = lease.first + static_cast<int>(from + i);
    const auto begin = payload.begin() + static_cast<int64_t>(i) * bytes;
    const auto before = space.rungs.find(key);
    const size_t seen = before != space.rungs.end() ? before->second : 0;
    size_t rung = 0;
    const auto is = [&](size_t r) {
      const std::vector<std::byte>& after = AfterRung(lease.space, key, r);
      return !world_.lie && std::equal(begin, begin + bytes, after.begin());
    };
    while (rung <= space.spec.degrade.size() && !is(rung)) rung++;
    const auto where = [&] { return absl::StrCat("a load of key ", key, ", seen after ", seen, " rungs, "); };
    if (rung > space.spec.degrade.size())
      return Expect(false, where() + "has bytes that no rung of the ladder gives");
    Expect(rung >= seen, absl::StrCat(where(), "has more bits again: those of ", rung));
    Expect((rung > 0) == degraded.contains(from + i),
           absl::StrCat(where(), "is after ", rung, ", and the load does not say so"));
    Expect(!Holds(lease) || (rung > 0) == lease.degraded.contains(from + i),
           absl::StrCat(where(), "is after ", rung, ", which the lookup did not say"));
    if (remember) space.rungs[key] = rung;
    degraded_ += rung > 0;
  }
}

bool KeyedSim::LoadFailed(const Lease& lease, const absl::Status& status) {
  if (status.ok()) return false;
  const bool over =
      options_.clock() >= lease.end || spaces_[lease.space].deletes != lease.deletes ||
      std::none_of(leases_.begin(), leases_.end(), [&](const Lease& l) { return l.id == lease.id; });
  const absl::StatusCode code = status.code();
  // A lease that ended meanwhile keeps nothing.
  Expect((code == absl::StatusCode::kNotFound && over) || (code == absl::StatusCode::kInternal && fault_) ||
             (code == absl::StatusCode::kUnavailable && fault_) ||
             (code == absl::StatusCode::kAborted && depth_ > 0) ||
             (code == absl::StatusCode::kDataLoss && (lost_ || over)) ||
             code == absl::StatusCode::kResourceExhausted,
         status.ToString());
  return true;
}

void KeyedSim::LoadInPlace(const Lease& lease, uint64_t from, uint64_t count,
                           const std::vector<std::byte>& expected) {
  LoadCall call;
  call.lease = lease.id;
  call.first = from;
  call.blocks = count;
  call.form = BlockPayload::kBytes;
  call.in_place = kHostTier;
  const absl::StatusOr<LoadReport> report = cache_->LoadBlocks(call);
  if (LoadFailed(lease, report.status())) return;
  const size_t bytes = expected.size() / count;
  Held held;
  held.id = report->places;
  for (size_t i = 0; i < report->offsets.size(); i++) {
    if (report->offsets[i] < 0) continue;  // on the device
    const auto at = expected.begin() + static_cast<int64_t>(i * bytes);
    held.blocks.emplace_back(report->offsets[i],
                             std::vector<std::byte>(at, at + static_cast<int64_t>(bytes)));
  }
  in_place_ += held.blocks.size();
  Expect(report->offsets.size() == count && (held.id != 0) == !held.blocks.empty(),
         "a load in place has lost count");
  if (held.id == 0) return;
  held_.push_back(std::move(held));
  GiveBack(held_.size() > 3 || Random(3) == 0 ? static_cast<size_t>(Random(static_cast<int>(held_.size())))
                                              : held_.size());
}

void KeyedSim::GiveBack(size_t index) {
  const std::byte* const tier = cache_->SlabOf(kHostTier)->data();
  for (const Held& held : held_)
    for (const auto& [offset, bytes] : held.blocks)
      Expect(std::equal(bytes.begin(), bytes.end(), tier + offset), "what is read in place has changed");
  if (index >= held_.size()) return;
  const PlacesId id = held_[index].id;
  held_.erase(held_.begin() + static_cast<int64_t>(index));
  Expect(cache_->ReleasePlaces(id), "places were over before they were given back");
}

void KeyedSim::Release(size_t index) {
  const Lease lease = leases_[index];
  leases_.erase(leases_.begin() + static_cast<int64_t>(index));
  const bool over = options_.clock() >= lease.end || spaces_[lease.space].deletes != lease.deletes;
  Expect(cache_->ReleaseLease(lease.id) || over, "a lease was over before its time");
}

void KeyedSim::Delete(size_t at) {
  Space& space = spaces_[at];
  const bool open = space.open;
  const NamespaceId id = space.id;
  space.deletes++;
  space.open = false;
  const std::set<int> before = std::exchange(space.stored, {});
  space.rungs.clear();
  const uint64_t nested = nested_;
  const absl::Status status = cache_->DeleteNamespace(id).status();
  // It is gone here, or was not known; what the remote tier has may be found when the namespace is opened
  // again, and what a disk has that failed, after a restart. The next deletion tries the disk once more.
  const bool away = remote_ != nullptr && absl::IsUnavailable(status);
  const bool unknown = absl::IsNotFound(status);
  if (absl::StrContains(status.message(), "may be there again after a restart")) {
    space.on_disk = true;
  } else if (status.ok() && depth_ == 0 && nested_ == nested) {
    space.on_disk = false;
  }
  if (away || space.on_disk || (remote_ != nullptr && unknown))
    space.stored.insert(before.begin(), before.end());
  Expect(status.ok() || away || (unknown && !open) || fault_, status.ToString());
}

void KeyedSim::Persist(size_t at) {
  const uint64_t deletes = spaces_[at].deletes, nested = nested_;
  const absl::StatusOr<NamespacePersistReport> report = cache_->PersistNamespace(spaces_[at].id);
  if (!report.ok()) {
    const absl::StatusCode code = report.status().code();
    return Expect(
        (code == absl::StatusCode::kNotFound && (!spaces_[at].open || spaces_[at].deletes != deletes)) ||
            fault_ || code == absl::StatusCode::kResourceExhausted ||
            (code == absl::StatusCode::kAborted && depth_ > 0),
        report.status().ToString());
  }
  if (depth_ > 0 || fault_ || nested_ != nested || Random(3) != 0) return;
  const bool exact = Random(4) != 0;
  if (exact) cache_->PersistChanged();
  // What is there now is there after a crash.
  std::vector<int> there;
  for (const int key : spaces_[at].stored)
    if (Hits(at, key, 1) == 1) there.push_back(key);
  // A store inside the asking is not durable. And lists name some blocks too many, which take the room of
  // others at a restart where few are allowed.
  if (nested_ != nested || options_.max_keyed_blocks < kPlenty) return;
  // To ask may have found that some are gone: the list of what is durable does not grow by it.
  RestartNow(false, exact);
  for (const int key : there)
    Expect(Hits(at, key, 1) == 1, absl::StrCat("key ", key, " was durable and is not there after a restart"));
}

// A disk that does not give all of itself: what cannot be read is lost or keeps the process from starting,
// and then loses nothing.
void KeyedSim::StartOverABadDisk(bool crash) {
  const std::vector<TierOptions> tiers = options_.tiers;
  cache_.reset();
  disk_.reset();
  if (crash) files_->Crash();
  files_->Fail(FaultFileSystem::kRead, Random(12), 1 + Random(4),
               absl::UnavailableError("Input/output error"));
  const absl::Status opened = OpenDisk(disk_options_bytes_);
  if (!opened.ok()) {
    refused_starts_++;
    Expect(absl::StrContains(opened.message(), "Input/output error"), opened.ToString());
    files_->ClearFaults();
    const absl::Status again = OpenDisk(disk_options_bytes_);
    if (!again.ok()) return Expect(false, again.ToString());
  }
  StartOn(1, tiers[0].capacity_bytes, tiers[1].capacity_bytes);
  lost_ = lost_ || opened.ok();
  files_->ClearFaults();
}

void KeyedSim::RestartNow(bool read_faults, bool exact) {
  restarts_++;
  files_->ClearFaults();  // a start on a disk that takes nothing is refused
  sequences_.clear();
  leases_.clear();
  held_.clear();
  for (FaultyBackend* backend : {device_.get(), host_.get()}) backend->SetHook(nullptr);
  const bool crash = Random(2) == 0;
  // Other bytes may lie behind an old label then: of a write that was torn, or of a block that was written to
  // a part of the place, while a list that was not renewed names what lay there before.
  lost_ = lost_ || crash || !exact;
  if (read_faults && Random(2) == 0) {
    StartOverABadDisk(crash);
  } else {
    Restart(crash);
  }
  for (const auto& backend : {device_.get(), host_.get()}) {
    backend->DelayCopies([this] { return Random(2) == 0 ? 0 : Random(3); });
    backend->SetHook([this](FaultyBackend::Call) { Inside(); });
  }
  std::set<NamespaceId> there;
  for (const NamespaceInfo& info : cache_->ListNamespaces()) there.insert(info.id);
  for (Space& space : spaces_) {
    space.rungs.clear();  // what was durable before may be there again
    Expect(space.open || space.on_disk || there.count(space.id) == 0,
           "a namespace is there again that was deleted");
    space.open = there.count(space.id) == 1;
    space.on_disk = false;
  }
  for (size_t at = 0; at < spaces_.size(); at++)
    if (!spaces_[at].open) Open(at);
}

// Sequences want room, too.
void KeyedSim::Crowd() {
  if (sequences_.size() > 3 || (!sequences_.empty() && Random(2) == 0)) {
    (void)sequences_.front()->Close();
    sequences_.erase(sequences_.begin());
    return;
  }
  sequences_.push_back(
      std::make_unique<Client>(*cache_, SmallModel(), WithPair("q8_0/turbo4", {1, 1}), dice_));
  const absl::Status status = sequences_.back()->Append(1 + Random(300));
  Expect(status.ok() || absl::IsResourceExhausted(status) || fault_ || depth_ > 0, status.ToString());
}

void KeyedSim::Inside() {
  if (std::this_thread::get_id() != thread_ || depth_ >= 2 || budget_ <= 0 || failed_ || Random(6) != 0)
    return;
  budget_--;
  nested_++;
  depth_++;
  Step(true);
  depth_--;
}

void KeyedSim::Step(bool nested) {
  auto at = static_cast<size_t>(Random(static_cast<int>(spaces_.size())));
  if (world_.ladders && Random(2) == 0) at = 0;
  const int dice = Random(100), first = Random(kKeys), count = 1 + Random(12);
  const size_t lease = leases_.empty() ? 0 : static_cast<size_t>(Random(static_cast<int>(leases_.size())));
  if (dice < 30) {
    Store(at, first, count);
  } else if (dice < 50) {
    Lookup(at, first, count);
  } else if (dice < 70) {
    if (!leases_.empty()) Load(lease);
  } else if (dice < 78) {
    if (!leases_.empty()) Release(lease);
    if (!held_.empty()) GiveBack(static_cast<size_t>(Random(static_cast<int>(held_.size()))));
  } else if (dice < 81) {
    Delete(at);
    if (Random(3) != 0) Open(at);
  } else if (dice < 84) {
    Open(at);
  } else if (dice < 89) {
    Persist(at);
  } else if (dice < 93) {
    clock_.Advance(absl::Milliseconds(1 + Random(4000)));
    cache_->RunMovesOnce();
  } else if (dice < 97) {
    if (!nested) Crowd();
  } else if (!nested && Random(4) == 0) {
    cache_->PersistChanged();
    if (!fault_)  // what could not be erased is erased now
      for (Space& space : spaces_) space.on_disk = false;
    RestartNow(world_.read_faults, !fault_);
  }
}

bool KeyedSim::Run(uint32_t seed, int64_t steps, World world) {
  Renew();
  seed_ = seed;
  failed_ = false;
  world_ = world;
  fault_ = lost_ = false;
  depth_ = 0;
  thread_ = std::this_thread::get_id();
  dice_.seed(seed);
  files_ = std::make_unique<FaultFileSystem>(seed);
  options_.id_seed = seed + 1;
  options_.eviction = seed % 2 == 0 ? EvictionKind::kLru : EvictionKind::kS3Fifo;
  options_.room_wait = absl::ZeroDuration();  // whoever would have to be waited for is a caller of ours
  options_.max_moves_in_flight = static_cast<size_t>(1 + Random(8));
  options_.max_copy_threads = 1;  // others would throw the dice when they like
  options_.max_keyed_blocks = Random(3) == 0 ? 40 : kPlenty;
  options_.limits.high_watermark = 0.8;
  options_.limits.low_watermark = 0.5;
  options_.limits.idle = world.ladders ? absl::Milliseconds(Random(2000)) : TierLimits{}.idle;
  store_ = world.remote ? std::make_unique<RemoteStore>() : nullptr;
  remote_ = world.remote ? std::make_unique<FaultRemote>(store_.get()) : nullptr;
  options_.remote = remote_.get();
  options_.remote_writes = seed % 4 < 2 ? RemoteWrites::kAll : RemoteWrites::kOnDemote;
  if (world.remote) {
    options_.max_unsent_blocks = static_cast<size_t>(1 + Random(40));
    remote_->SetHook([this](const char*) {
      if (Random(8) == 0) clock_.Advance(absl::Milliseconds(Random(1500)));
      Inside();
    });
  }
  StartWithDisk((2 + static_cast<size_t>(Random(6))) * 65536, (2 + static_cast<size_t>(Random(8))) * 65536,
                (1 + static_cast<size_t>(Random(6))) * kMiB);
  spaces_.assign(3, {});
  for (size_t at = 0; at < spaces_.size(); at++) {
    NamespaceSpec& spec = spaces_[at].spec;
    spec.model = absl::StrCat("space ", at);
    spec.block_tokens = 16;
    if (at == 0) {
      spec.tensors = TensorContent{3, 1, 64, 64, ExactPair()};
      if (world.ladders && seed % 2 == 0) spec.tensors->pair = *ParseCachePair("q8_0");
      for (const char* rung : {"q8_0/turbo4", "turbo4", "turbo3/turbo2"})
        if (world.ladders) spec.degrade.push_back(*ParseCachePair(rung));
    } else {
      spec.opaque = OpaqueContent{at == 1 ? kOpaqueBytes : 2 * kOpaqueBytes, ""};
    }
    Open(at);
  }
  leases_.clear();
  held_.clear();
  after_.clear();
  sequences_.clear();
  for (const auto& backend : {device_.get(), host_.get()}) {
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
    } else if (Random(20) == 0) {
      fault_ = true;
      host_->Fail(Random(2) == 0 ? FaultyBackend::kStartCopy : FaultyBackend::kPoll, 1 + Random(2));
    }
    if (world.remote) {
      using Fault = FaultRemote::Fault;
      constexpr Fault kFaults[] = {Fault::kAway, Fault::kFull, Fault::kLosesAfterFind, Fault::kDamages};
      const Fault fault = Random(4) == 0 ? kFaults[Random(4)] : Fault::kNone;
      remote_->Plant(world.unseen_damage ? Fault::kDamagesUnseen : fault);
    }
    Step(false);
    files_->ClearFaults();
    for (FaultyBackend* backend : {device_.get(), host_.get()})
      for (int call = 0; call < FaultyBackend::kCalls; call++)
        backend->Fail(static_cast<FaultyBackend::Call>(call), 0);
    cache_->CheckInvariants();
  }
  budget_ = 0;
  for (const auto& sequence : sequences_) (void)sequence->Close();
  sequences_.clear();
  if (world.remote) remote_->Plant(FaultRemote::Fault::kNone);
  for (Space& space : spaces_) (void)cache_->DeleteNamespace(space.id).status();
  while (!held_.empty()) GiveBack(0);
  cache_->CheckInvariants();
  const CacheStats stats = cache_->Stats();
  trail_ = absl::StrCat(stats.appended_tokens, " ", stats.moves, " ", stats.lost_blocks, " ", dice_());
  SayTrail(seed, trail_);
  const uint64_t left = UsedBytes(stats);
  Expect(left == 0 && stats.leases == 0, absl::StrCat(left, " bytes are left after all was deleted"));
  for (FaultyBackend* backend : {device_.get(), host_.get()}) {
    backend->SetHook(nullptr);
    backend->DelayCopies(nullptr);
  }
  cache_.reset();
  if (world.remote) fetched_ += remote_->Stats().read_blocks;
  options_.remote = nullptr;
  return !failed_;
}

}  // namespace kvtide::testing
