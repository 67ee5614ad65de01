// KvCache holds the K and V of many sequences in blocks over several tiers of memory, attends over them where
// they lie, and moves them between tiers. All calls are thread-safe; readers of one sequence run side by
// side, writers of one sequence exclude each other: the second one gets Aborted at once. Metadata is under
// one mutex, bytes are under none: copies and kernels work on pinned blocks.
//
// Every verb takes a CallContext: who calls, and how long the answer is wanted.
//
// Errors (absl::Status), the same everywhere:
//
//  * InvalidArgument: a shape, an element type, a value that is NaN, infinite or beyond f16 (its position is
//    named), a position or size out of bounds, an unsupported pair.
//  * NotFound: an unknown model or sequence, or another tenant's; the message says so if it was closed.
//  * PermissionDenied: a sequence is to be made for another tenant.
//  * FailedPrecondition: another spec under a registered name; a drop that the sequence does not allow.
//  * OutOfRange: a start position that is not the layer's length; tokens that left the sliding window.
//  * Aborted: another writer holds the sequence (retry later), or it was closed while the call ran.
//  * ResourceExhausted: no room in any tier (needed and free bytes are named), or a limit; then nothing has
//    changed.
//  * DataLoss: a visible token was dropped, or a block failed its checksum (the token range is named).
//  * Cancelled: the caller no longer wants the answer; what the verb says of it has happened.
//  * DeadlineExceeded: the same, by time.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/cache/call/cache_options.h"
#include "daemon/cache/call/cache_stats.h"
#include "daemon/cache/call/call_context.h"
#include "daemon/cache/call/keyed_calls.h"
#include "daemon/cache/call/model.h"
#include "daemon/cache/call/move_report.h"
#include "daemon/cache/call/persist_report.h"
#include "daemon/cache/call/prefix_calls.h"
#include "daemon/cache/call/sequence_calls.h"
#include "daemon/cache/call/sequence_options.h"

namespace kvtide {

class Slab;       // kernels/backend.h
class Step;       // stepper.h
struct StepCall;  // stepper.h
struct PinCall;   // stepper.h

class KvCache {
 public:
  // Takes the memory of all tiers. InvalidArgument for bad options, ResourceExhausted when a slab cannot be
  // had.
  static absl::StatusOr<std::unique_ptr<KvCache>> Create(CacheOptions options);
  // Stops the mover. No call may be running.
  ~KvCache();

  // Models belong to the caller's tenant, and so do their names. Idempotent: an equal spec under the same
  // name gives the same id. A shard of a model (some of its KV heads and their query heads) is a model of its
  // own, whose sequences are created on the shard's device.
  absl::StatusOr<ModelId> RegisterModel(const ModelSpec& spec, const CallContext& context = {});
  // Forgets a model of the caller's tenant; its id is never used again. FailedPrecondition while it has open
  // sequences.
  absl::StatusOr<ModelId> UnregisterModel(const std::string& name, const CallContext& context = {});
  // As its sequences have it: one with another profile (InstallProfile) is another model with another id.
  absl::StatusOr<ModelSpec> GetModel(ModelId model) const;
  // As new sequences of a K type that needs a profile have it: with the profile that was installed last.
  absl::StatusOr<ModelSpec> NewestModel(ModelId model) const;
  // What all those of a name and tenant have in common: the id of the first of them.
  absl::StatusOr<ModelId> FamilyOf(ModelId model) const;
  // New sequences whose K type needs a profile have that of `spec` from now on; those that exist keep theirs.
  // Counts what was installed for the model. It survives a restart with durable sequences that have it.
  // InvalidArgument if the spec differs from the model in anything else, or has no transforms;
  // ResourceExhausted where open sequences use too many profiles.
  absl::StatusOr<uint64_t> InstallProfile(ModelId model, const ModelSpec& spec);
  // The last one of each model of the caller's tenant; an admin sees those of all.
  std::vector<InstalledProfile> InstalledProfiles(const CallContext& context = {}) const;
  absl::StatusOr<ModelId> FindModel(const std::string& name, const CallContext& context = {}) const;
  // In order of registration; an admin sees those of all tenants.
  std::vector<std::string> ModelNames(const CallContext& context = {}) const;

  // PermissionDenied where the options name a tenant that is not the caller's, unless an admin does.
  // `prefix`: a lease of LookupPrefix, whose tokens the sequence begins with; the lease is over then.
  // NotFound if it is over already, FailedPrecondition if the prefix is of a sequence of another kind.
  absl::StatusOr<SequenceId> CreateSequence(ModelId model, const SequenceOptions& options,
                                            const CallContext& context = {}, LeaseId prefix = 0);
  // The longest prefix of the tokens that is cached for sequences of these options, in full blocks, and can
  // be read now. ResourceExhausted at the limit of leases. What sequences have whose appends said token ids
  // is cached as soon as it is sealed, and stays when they are closed until the room is needed.
  absl::StatusOr<PrefixReport> LookupPrefix(const PrefixCall& call);
  // A copy that shares all blocks; whoever writes into the shared tail first gets a copy of it.
  absl::StatusOr<SequenceId> ForkSequence(SequenceId sequence, const CallContext& context = {});
  // Every layer keeps at most `tokens`. Inside a coded block the remaining tokens are decoded into an f16
  // tail: they keep the values that coding gave them. OutOfRange beyond the length, or when the tail's start
  // has left a sliding window.
  absl::Status TruncateSequence(SequenceId sequence, int64_t tokens, const CallContext& context = {});
  // Frees everything; calls that run on the sequence end well or with Aborted. One that was durable is not
  // there after a restart; Unavailable if that could not be written down (it is closed all the same).
  absl::Status CloseSequence(SequenceId sequence, const CallContext& context = {});

  // CacheOptions::traffic is shown rows of these, and of AttendStepLayer.
  absl::Status Append(const AppendCall& call);
  absl::Status Attend(const AttendCall& call);
  absl::Status AppendAttend(const AttendCall& call);
  // About what Attend, or AppendAttend where items bring new tokens, takes: products of queries, visible
  // tokens and query heads. Infinite if it may have to wait for others, or to move, copy or code blocks, and
  // for calls that will fail. Cheap.
  double EstimateWork(const AttendCall& call) const;
  // All layers as they are at one moment; writers and moves go on meanwhile. OutOfRange beyond a layer's
  // length or before its sliding window, DataLoss where tokens were dropped, Cancelled between blocks: the
  // buffers are undefined then.
  absl::Status ReadTokens(const ReadCall& call);

  // For engines that write and attend over the blocks themselves: a step reserves room for new tokens in all
  // layers and pins what they see (stepper.h). EndStep publishes what the engine has written; a step that is
  // destroyed instead has never been.
  absl::StatusOr<std::unique_ptr<Step>> BeginStep(const StepCall& call);
  absl::Status AttendStepLayer(Step& step, const AttendCall& call);
  // The same for those who only read: sequences as they are now, whatever becomes of them until the step
  // ends.
  absl::StatusOr<std::unique_ptr<Step>> PinStep(const PinCall& call);
  absl::Status AttendPinned(const Step& step, const AttendCall& call);
  absl::Status EndStep(std::unique_ptr<Step> step);
  // The memory of a tier that SnapshotRun::tier names; null for one of I/O.
  const Slab* SlabOf(int tier) const;

  // Moves blocks that lie above `tier` down to it (kDropTier: drops them, if the sequence allows it). Returns
  // when the copies are done. Making room below may demote further or drop, by policy. A call that is no
  // longer wanted stops between rounds; what has moved stays moved.
  absl::StatusOr<MoveReport> Evict(std::span<const SequenceId> sequences, int tier,
                                   const CallContext& context = {});
  absl::StatusOr<MoveReport> EvictAll(int tier, const CallContext& context = {});
  // Moves the sequences' blocks up to the first tier, each to the device where it lives, demoting colder
  // blocks of others if needed. What finds no room stays.
  absl::StatusOr<MoveReport> Prefetch(std::span<const SequenceId> sequences, const CallContext& context = {});

  // For so long the blocks of these sequences stay in the tiers where they are, unless a call names them: no
  // policy and no other sequence's need for room moves or drops them. At most 24 h; 0 ends it.
  // ResourceExhausted by the tenant's quota.
  absl::Status Pin(std::span<const SequenceId> sequences, absl::Duration time,
                   const CallContext& context = {});
  // Which of the tenant's own blocks make way first, in every tier: those of lower priority before those of
  // higher, and they come up after them. Between tenants priorities say nothing. Blocks that several
  // sequences have go by the highest of theirs, prefixes of closed ones by what they had.
  absl::Status SetPriority(std::span<const SequenceId> sequences, Priority priority,
                           const CallContext& context = {});
  // Makes the sequences durable as they are: after a restart they are there again, with their ids, and read
  // back bit for bit. Needs a tier with TierOptions::index. Appends to a sequence wait while its last blocks
  // are written. FailedPrecondition in evaluation mode; DataLoss where tokens were dropped; ResourceExhausted
  // when the tier is full; Unavailable when it cannot write: what was durable before stays so.
  // SequenceOptions:: persistence does the same by itself.
  absl::StatusOr<PersistReport> Persist(std::span<const SequenceId> sequences,
                                        const CallContext& context = {});
  // Those that are always to be durable, now instead of in a while: before a stop.
  void PersistChanged();
  bool IsDurable(SequenceId sequence) const;
  // What was there at the start.
  const RestoreReport& restored() const;

  // The block store, for engines that keep pages of their own: blocks without a sequence, found by key
  // (keyed_store.h). Idempotent: an equal spec is the same namespace, after a restart too. The last call's
  // persistence and priority count; blocks that had its former priority get the new one.
  absl::StatusOr<NamespaceInfo> OpenNamespace(const NamespaceSpec& spec, Persistence persistence,
                                              Priority priority = Priority::kNormal);
  // NotFound for a namespace that is unknown or is deleted while this runs: nothing of it is there then.
  // InvalidArgument for keys, payloads or values that do not fit: nothing was stored. ResourceExhausted if
  // not one block found room.
  absl::StatusOr<StoreReport> StoreBlocks(const StoreCall& call);
  // Only what can be read now counts. ResourceExhausted at the limit of leases.
  absl::StatusOr<LookupReport> LookupBlocks(const LookupCall& call);
  absl::StatusOr<LeaseInfo> DescribeLease(LeaseId lease, const CallContext& context = {});
  // NotFound for a lease that is over; DataLoss for blocks that cannot be read any more, which are misses
  // from then on. In place: the caller gives the places back when nothing of it reads them any more.
  absl::StatusOr<LoadReport> LoadBlocks(const LoadCall& call);
  // False if they are unknown.
  bool ReleasePlaces(PlacesId places);
  // False if it was over.
  bool ReleaseLease(LeaseId lease, const CallContext& context = {});
  // Returns how many blocks it had. Unavailable if it could not be removed from the durable tier: it is gone,
  // but may be there again after a restart.
  absl::StatusOr<uint64_t> DeleteNamespace(NamespaceId name_space, const CallContext& context = {});
  // What is there now survives a restart. FailedPrecondition without a tier that does.
  absl::StatusOr<NamespacePersistReport> PersistNamespace(NamespaceId name_space,
                                                          const CallContext& context = {});
  absl::StatusOr<NamespaceInfo> GetNamespace(NamespaceId name_space, const CallContext& context = {}) const;
  std::vector<NamespaceInfo> ListNamespaces(const CallContext& context = {}) const;

  absl::StatusOr<SequenceInfo> GetSequence(SequenceId sequence, const CallContext& context = {}) const;
  // Those that the caller may see, in the order of their ids; costs what it returns and what it passes over.
  std::vector<SequenceInfo> ListSequences(const SequenceList& list = {},
                                          const CallContext& context = {}) const;
  // Cheap questions of every call, unlike GetSequence, which counts blocks.
  absl::StatusOr<ModelId> ModelOf(SequenceId sequence, const CallContext& context = {}) const;
  absl::StatusOr<int64_t> Length(SequenceId sequence, const CallContext& context = {}) const;
  // Length of one layer; a new token of the layer goes there.
  absl::StatusOr<int64_t> LayerLength(SequenceId sequence, int layer, const CallContext& context = {}) const;
  CacheStats Stats() const;
  const CacheOptions& options() const;
  // Those of the options until SetLimits. What is there beyond new limits stays; nothing new is made until
  // there is less.
  LiveLimits limits() const;
  // InvalidArgument as CheckCacheOptions; then nothing has changed.
  absl::Status SetLimits(LiveLimits limits);

  // The bytes that a sequence of `tokens` tokens, at most 2^48, holds at rest.
  // The sum of Predict over all open sequences, beside what they hold. The mutex is free now and then.
  SequenceMemory MemoryOfSequences() const;
  static absl::StatusOr<PredictedBytes> Predict(const ModelSpec& model, const SequenceOptions& options,
                                                int64_t tokens);

  // One round of the policy: demotes idle blocks above the high watermark, promotes what attention wants, and
  // PersistChanged. Threads of the cache do so; without background_moves the owner does.
  MoveReport RunMovesOnce();
  // Stops the process with a message when the tables, counts and allocators contradict each other. For tests.
  void CheckInvariants() const;

 private:
  class Impl;
  explicit KvCache(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvtide
