// Models and sequences: who exists, under which id, on which device. Guarded by the cache's mutex (it is part
// of CacheState).
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/cache/block/block_store.h"
#include "daemon/cache/call/cache_options.h"
#include "daemon/cache/call/call_context.h"
#include "daemon/cache/sequence/sequence.h"

namespace kvtide {

using SequencePtr = std::shared_ptr<Sequence>;

class Sequences {
 public:
  using ModelPtr = std::shared_ptr<const ModelState>;

  // Borrows all of them.
  Sequences(const CacheOptions& options, const LiveLimits* limits, BlockStore* store, TenantTable* tenants);

  // Names of models are the tenant's own: two tenants may have different ones of a name.
  // `restored`: it was there before, so no quota counts.
  absl::StatusOr<ModelId> RegisterModel(const ModelSpec& spec, const std::string& tenant,
                                        bool restored = false);
  // A revision that was there before.
  absl::StatusOr<ModelId> RestoreRevision(const ModelSpec& spec, const std::string& tenant,
                                          uint64_t revision);
  // The model with another profile, for new sequences with calibrated K types. InvalidArgument if it differs
  // in anything else, or has no profile; ResourceExhausted where open sequences use too many revisions.
  absl::StatusOr<ModelPtr> InstallRevision(ModelId model, const ModelSpec& spec);
  // The revision of its family that was installed last; the model itself where none was.
  ModelPtr Newest(ModelPtr model) const;
  // Of all families that have one and that the caller may see, in order of registration.
  std::vector<InstalledProfile> InstalledProfiles(const Identity& caller) const;
  // Revisions that no sequence uses and no new one would, which are forgotten.
  std::vector<ModelPtr> TakeUnusedRevisions();
  // Returns all that were registered and installed under the name.
  absl::StatusOr<std::vector<ModelPtr>> UnregisterModel(const std::string& name, const std::string& tenant);
  absl::StatusOr<ModelPtr> GetModel(ModelId model) const;
  // As registered; the newest revision where a restart has brought back nothing else.
  absl::StatusOr<ModelId> FindModel(const std::string& name, const std::string& tenant) const;
  // Those that the caller may see; an admin, all.
  std::vector<std::string> ModelNames(const Identity& caller) const;
  size_t models() const;

  absl::StatusOr<SequencePtr> Create(ModelId model, const SequenceOptions& options);
  // Create in two steps, for one that was there before a restart: its tables are filled in between.
  // `restored`: of this revision of the model, not of the newest.
  absl::StatusOr<SequencePtr> Build(ModelId model, const SequenceOptions& options,
                                    bool restored = false) const;
  absl::Status Restore(const SequencePtr& sequence);
  absl::StatusOr<SequencePtr> Fork(SequenceId id, const CallContext& context);
  // The tables go at once, or with the writer that runs.
  absl::Status Close(const SequencePtr& sequence);
  // What belongs to another tenant is not there: the same error, in the same words.
  absl::StatusOr<SequencePtr> Find(SequenceId id, const CallContext& context) const;
  // Each of them once, in the order of `ids`.
  // Until then the blocks of these sequences stay in their tiers, unless a call names them; the past ends a
  // pin. Forks are not pinned, but the blocks that they share are. ResourceExhausted where the tenant's quota
  // of pins allows fewer; then nothing has changed.
  absl::Status Pin(std::span<const SequencePtr> sequences, absl::Time until);
  void SetPriority(std::span<const SequencePtr> sequences, Priority priority);
  // Forgets pins whose time is over, and marks the blocks of the others, whose records forks may have
  // changed.
  void ApplyPins(absl::Time now);
  uint64_t pins() const { return pins_.size(); }
  absl::StatusOr<std::vector<SequencePtr>> FindAll(std::span<const SequenceId> ids,
                                                   const CallContext& context) const;
  bool IsOpen(SequenceId id) const { return by_id_.count(id) != 0; }
  const std::map<SequenceId, SequencePtr>& all() const { return sequences_; }
  // A layout of this shape, the same one each time.
  const BlockLayout* Layout(const GroupShape& shape, CachePair pair) const;
  // Blocks of the shape that are coded as `pair` and may be recoded as those of `degrade` that take fewer
  // bytes. Null: none does.
  const Ladder* LadderOf(const GroupShape& shape, CachePair pair, std::span<const CachePair> degrade) const;
  size_t spare_bytes() const { return spare_bytes_; }  // the largest block that a ladder begins with
  // Any number; the caller sees to it that nobody has it.
  uint64_t RandomId();
  // One that no sequence has or had lately, and that is no name in the durable index.
  SequenceId NewId();
  // A name that the durable index had at the start: it is not given again, as what has it would be replaced.
  void Reserve(SequenceId id) { reserved_.insert(id); }

  void NotEmptyAnyMore(Sequence& sequence);
  // After every change of the sequence's lengths or first blocks.
  void CountHeld(Sequence& sequence);
  uint64_t tokens() const { return tokens_; }  // of open sequences
  // What the tokens that they have not left behind would take in f16; dropped ones are not taken off.
  uint64_t held_f16_bytes() const { return held_f16_bytes_; }
  int dropping_sequences() const { return dropping_sequences_; }
  uint64_t created() const { return created_; }
  uint64_t closed() const { return closed_count_; }
  // Closed sequences whose writer still runs.
  int closing() const { return closing_; }
  void CheckInvariants() const;
  // Gives the tables of all sequences back. No call may be running.
  void Clear();

 private:
  friend class WriterGuard;
  struct HomeCount {
    size_t sequences = 0, empty = 0;
  };

  std::vector<ModelPtr> FamilyOf(const std::string& name, const std::string& tenant) const;
  // Of every family what was installed last, or the model itself.
  std::map<ModelId, ModelPtr> NewestByFamily() const;
  // The revision that new sequences of these options have.
  ModelPtr RevisionFor(ModelPtr model, const SequenceOptions& options) const;
  // Enters it; `family` = 0: it is the first of one.
  absl::StatusOr<ModelPtr> AddModel(const ModelSpec& spec, const std::string& tenant, uint64_t revision,
                                    ModelId family);
  static absl::Status CheckQuota(const TenantAccount& account);
  absl::Status CheckRoomForOne(const TenantAccount* account) const;
  // The device of the first tier for a new sequence: the one with this name, or the one with the most room.
  absl::StatusOr<int> ChooseHome(const std::string& device) const;
  void Enter(const SequencePtr& sequence);
  void ReleaseTables(Sequence& sequence);

  const CacheOptions& options_;
  const LiveLimits* const limits_;
  BlockStore* const store_;
  TenantTable* const tenants_;
  std::map<ModelId, std::shared_ptr<const ModelState>> models_;
  ModelId last_model_ = 0;
  std::map<SequenceId, SequencePtr> sequences_;         // in order, for lists
  absl::flat_hash_map<SequenceId, SequencePtr> by_id_;  // the same, to find
  std::vector<HomeCount> home_counts_;                  // of open sequences, by device of the first tier
  int dropping_sequences_ = 0;  // with allow_drop, those included whose tables are still there
  int closing_ = 0;
  uint64_t created_ = 0, closed_count_ = 0;
  uint64_t tokens_ = 0, held_f16_bytes_ = 0;
  std::map<SequenceId, SequencePtr> pins_;
  std::vector<std::weak_ptr<Recency>> marked_;                       // as pinned
  std::deque<SequenceId> closed_;                                    // the latest ones, for better messages
  mutable std::vector<std::unique_ptr<const BlockLayout>> layouts_;  // made as they are asked for,
  mutable std::vector<std::unique_ptr<const Ladder>> ladders_;       // and so are these
  mutable size_t spare_bytes_ = 0;
  absl::flat_hash_set<SequenceId> reserved_;
  std::mt19937_64 ids_;  // with CacheOptions::id_seed only
};

// What one token of all layers of a group takes in f16, unpadded.
uint64_t BytesPerToken(const GroupShape& shape);

// The one append or truncation that may change the sequence's tables and lengths. When it ends, a sequence
// that was closed meanwhile gives its tables back.
class WriterGuard {
 public:
  // `writer` names the call. Aborted if another one runs, or the sequence is closed; with seal_at_once also
  // while it is read. InvalidArgument if the same call is the writer already.
  static absl::StatusOr<WriterGuard> Begin(Sequences& sequences, SequencePtr sequence, const void* writer);
  WriterGuard(WriterGuard&&) = default;
  WriterGuard& operator=(WriterGuard&&) = delete;
  ~WriterGuard();

  Sequence& sequence() const { return *sequence_; }

 private:
  WriterGuard(Sequences& sequences, SequencePtr sequence)
      : sequences_(&sequences), sequence_(std::move(sequence)) {}

  Sequences* sequences_;
  SequencePtr sequence_;  // null: moved from
};

}  // namespace kvtide
