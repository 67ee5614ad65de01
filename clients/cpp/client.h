// The C++ client of kvtided: blocking calls over gRPC, with plain structs and absl::Status, free of protobuf
// and gRPC headers. A Client may be used from any number of threads at once; each call is one RPC with the
// deadline of ClientOptions. Spans and tensor views are borrowed for the call only. Statuses carry the
// daemon's code and message; UNAVAILABLE besides means that the daemon could not be reached.
//
// Sequences live until they are closed, also when the client goes away. With ClientOptions::session the
// client keeps a session stream open, and what it created through it is closed when the Client is destroyed
// or its process dies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/base/data_type.h"
#include "kernels/format/exact_window.h"

namespace kvtide::client {

using SequenceId = uint64_t;
using LeaseId = uint64_t;  // 0 = none
using TokenId = uint32_t;

// How the client proves who it is, and checks whom it talks to. Empty fields are those of the environment:
// KVTIDE_TLS_CA, KVTIDE_TLS_CERT, KVTIDE_TLS_KEY, KVTIDE_TOKEN_FILE. On Unix sockets the kernel does both,
// and TLS is not used; a token is sent there too.
struct Credentials {
  std::string tls_ca;             // PEM file with the CA of the daemon's certificate, or "system"; set = TLS
  std::string tls_cert, tls_key;  // PEM files: the client's own certificate and key (mTLS)
  std::string token_file;  // holds a bearer token, which goes with every call; looked at again once a second
};

struct ClientOptions {
  // Of every call, from its start to its answer; also how long Connect waits for the daemon.
  absl::Duration timeout = absl::Seconds(60);
  absl::Duration connect_timeout = absl::Seconds(5);
  // False: Connect fails at once where nobody answers, instead of waiting for a daemon that may yet come.
  bool wait_for_daemon = true;
  int64_t max_message_bytes = int64_t{64} << 20;
  // All calls go through one session stream, in order: sequences die with the client. Calls of several
  // threads then wait for each other.
  bool session = false;
  Credentials credentials;
};

// A dense, row-major tensor of the caller.
struct TensorRef {
  const void* data = nullptr;
  DataType type = DataType::kF32;
  std::vector<int64_t> shape;

  static TensorRef F32(std::span<const float> values, std::vector<int64_t> shape) {
    return {values.data(), DataType::kF32, std::move(shape)};
  }
};

// The same, to be written.
struct MutableTensorRef {
  void* data = nullptr;
  DataType type = DataType::kF32;
  std::vector<int64_t> shape;

  static MutableTensorRef F32(std::span<float> values, std::vector<int64_t> shape) {
    return {values.data(), DataType::kF32, std::move(shape)};
  }
};

struct ModelRope {
  std::vector<float> frequencies;  // [pairs], radians a position
  bool neighbours = false;         // pairs are channels 2i and 2i + 1 instead of i and i + pairs
};

// The shape of a model; kvtide.v1.Model explains the fields.
struct ModelLayer {
  int kv_heads = 0;
  int head_dim_k = 0;
  int head_dim_v = 0;
  int64_t window = 0;  // 0 = full attention
  int query_heads = 0;
  float scale = 0;              // 0 = 1/sqrt(head_dim_k)
  float softcap = 0;            // 0 = none
  std::vector<float> key_mean;  // [kv_heads][head_dim_k], for KeyCentring::kCalibrated; empty = none
  // For K types tide4 to tide1, as model.proto has them; empty = none.
  std::vector<float> key_transform;  // [kv_heads][head_dim_k][head_dim_k]
  std::vector<uint8_t> key_widths;   // [kv_heads][4][head_dim_k rounded up to 32, / 8]
  std::vector<float> key_centre;     // [kv_heads][head_dim_k]
  // Of RoPE that is taken back before keys are transformed (before RoPE), [pairs], radians a position; empty:
  // they are transformed as they are stored (after RoPE, or without).
  std::vector<float> key_frequencies;
  bool key_rope_neighbours = false;  // pairs are channels 2i and 2i + 1 instead of i and i + pairs
  std::optional<ModelRope> rope;     // whatever keys are coded with; not set = not known
};
struct Model {
  std::string name;
  std::vector<ModelLayer> layers;
};

enum class KeyCentring { kDefault, kNone, kFirstBlock, kCalibrated };  // kvtide.v1.KeyCentring
enum class KeyEqualising { kDefault, kNone, kRoot, kFull };            // kvtide.v1.KeyEqualising
enum class Persistence { kDefault, kNone, kOnPark, kAll };             // kvtide.v1.Persistence
enum class Priority { kDefault, kLow, kNormal, kHigh };                // kvtide.v1.Priority
enum class RopePairs { kDefault, kNone, kHalves, kNeighbours };        // kvtide.v1.RopePairs

struct SequenceOptions {
  std::string pair;                         // "q8_0/turbo4"; empty = the daemon's default
  std::optional<ExactWindow> exact_window;  // none = the daemon's default
  bool seal_at_once = false;                // evaluation mode: everything is coded before it is attended
  KeyCentring key_centring = KeyCentring::kDefault;
  KeyEqualising key_equalising = KeyEqualising::kDefault;
  RopePairs rope_pairs = RopePairs::kDefault;
  std::string tenant;
  bool allow_drop = false;
  std::vector<std::string> group_pairs;  // by layer group; empty = `pair` for all
  std::string device;  // where it is to live, as TierInfo::device has it; empty = where most room is
  Persistence persistence = Persistence::kDefault;  // when it becomes durable by itself
  Priority priority =
      Priority::kDefault;  // which of the tenant's own blocks make way first; default = normal
  // What else K and V depend on beside model and token ids; keeps prefixes apart (LookupPrefix).
  std::string prefix_salt;
  // Pairs of fewer and fewer bits that cold blocks may be recoded as when their tier needs room, before
  // anything is demoted or dropped; empty = never. Such a sequence has no mapped steps.
  std::vector<std::string> degrade;
};

// The longest cached prefix of some tokens.
struct CachedPrefix {
  int64_t tokens = 0;                                  // in full blocks of 64; 0 = none
  std::vector<std::pair<std::string, int64_t>> tiers;  // tokens by tier, in their order
  LeaseId lease = 0;                                   // for CreateSequence, or ReleaseLease; 0 = none
  double lease_seconds = 0;
};

struct LayerTokens {
  int layer = 0;
  TensorRef k, v;  // [tokens][kv_heads][head_dim]
};

// K and V of a range of tokens in one layer, as ReadTokens brings them: rows [tokens][kv_heads][head_dim],
// little-endian.
struct LayerRows {
  int layer = 0;
  int kv_heads = 0, head_dim_k = 0, head_dim_v = 0;
  std::vector<std::byte> k, v;
};

// Rows of one layer that a read fills: [tokens][kv_heads][head_dim].
struct ReadItem {
  int layer = 0;
  MutableTensorRef k, v;
};

// What a call changes about the layer's registered attention.
struct AttentionOptions {
  std::optional<float> scale;
  std::optional<bool> causal;  // none = true
  std::optional<int64_t> window;
  std::optional<float> softcap;
  std::vector<float> sinks;  // one logit for each query head, or empty
};

// Results are written into `output` [queries][query_heads][head_dim_v] and, unless it is empty, `lse`
// [queries][query_heads]. Either of the wrong size is INVALID_ARGUMENT (after the call).
struct AttendItem {
  SequenceId sequence = 0;
  std::optional<int64_t> first_query_position;  // none = the queries belong to the last tokens
  TensorRef q;                                  // [queries][query_heads][head_dim_k]
  std::span<float> output;
  std::span<float> lse;
};
struct AppendAttendItem {
  SequenceId sequence = 0;
  int64_t start_position = 0;
  TensorRef q;  // [tokens][query_heads][head_dim_k]
  TensorRef k;  // [tokens][kv_heads][head_dim_k]
  TensorRef v;  // [tokens][kv_heads][head_dim_v]
  std::span<float> output;
  std::span<float> lse;
  std::span<const TokenId> token_ids;  // as in Append; with one layer is enough
};

// Steps: the next tokens of a batch of sequences in all layers, which count all at once
// (kvtide/v1/steps.proto).
struct StepItem {
  SequenceId sequence = 0;
  int64_t new_tokens = 0;
  std::span<const TokenId> token_ids;  // as in Append; empty: not said, or said when it ends
};
// What the new tokens of items[item] of a step are, one for each.
struct StepTokens {
  size_t item = 0;
  std::span<const TokenId> token_ids;
};
struct StepOptions {
  uint64_t after = 0;   // an open step that this one follows; 0 = none
  bool tables = false;  // tell where blocks lie
};
// What the bytes of a block are, and in whose memory they lie.
struct BlockKind {
  std::string pair, tier, device;
  bool operator==(const BlockKind&) const = default;
};
struct StepBlock {
  uint64_t offset = 0;  // where it begins in the memory of its tier
  int kind = 0;         // index into Step::kinds
  bool operator==(const StepBlock&) const = default;
};
// The blocks of one layer group of a sequence.
struct StepTable {
  int64_t first_block = 0;    // number of blocks[0]
  int64_t first_changed = 0;  // blocks before this one are as in the last step with tables
  uint64_t profile = 0;       // of its coded keys, in mapped steps (steps.proto); 0 = none
  uint64_t version = 0;       // another one with every change
  std::string pair;           // what its full blocks are coded as
  std::vector<StepBlock> blocks;
};
struct Step {
  uint64_t id = 0;
  std::vector<int64_t>
      starts;  // of the items: the first new token; of pinned ones: how many tokens there are
  // Of the items, by layer group; empty if they were not asked for.
  std::vector<std::vector<StepTable>> tables;
  std::vector<BlockKind> kinds;  // an index means the same in all steps of a Client
};

struct TierInfo {
  std::string name, backend;
  int64_t capacity_bytes = 0;
  std::string device;                // tells the parts of a tier apart that lies on several devices
  bool io = false, durable = false;  // reached by I/O; survives a restart
};
struct CacheTypeDescription {
  std::string name;
  int bits = 0, group = 0, version = 0;
  double bits_per_value = 0;
};
struct ServerInfo {
  std::string version;
  int block_tokens = 0;
  std::vector<TierInfo> tiers;
  std::vector<CacheTypeDescription> cache_types;
  std::string default_pair;
  ExactWindow default_exact_window;
  std::vector<std::string> models;
  int64_t max_message_bytes = 0, max_sequences = 0, max_models = 0, max_tokens = 0, max_items = 0;
  int64_t max_append_tokens = 0;
  int64_t max_connections = 0, max_calls_per_connection = 0;
  int64_t call_memory_bytes = 0, memory_overhead_bytes = 0;  // of the daemon, beside its tiers
  int64_t process_id = 0;
  double uptime_seconds = 0;
};

struct TierShare {
  std::string tier;
  int64_t blocks = 0, bytes = 0;
  std::string device;
};
// Tokens whose blocks in a layer group were recoded to fewer bits for room.
struct DegradedTokens {
  int layer_group = 0;
  int64_t first_token = 0, tokens = 0;
  std::string pair;  // what they are coded as now
};
struct SequenceInfo {
  SequenceId id = 0, forked_from = 0;
  std::string model, pair, tenant;
  int64_t tokens = 0, max_layer_tokens = 0;
  std::vector<TierShare> tiers;
  int64_t dropped_blocks = 0, shared_blocks = 0;
  int64_t degraded_blocks = 0;           // of fewer bits than `pair` says, because their tier needed room
  std::vector<std::string> degrade;      // what they may be recoded as
  std::vector<DegradedTokens> degraded;  // which they are; of GetSequence
  ExactWindow exact_window;
  bool seal_at_once = false;
  double idle_seconds = 0, age_seconds = 0;
  double pinned_seconds = 0;  // that it stays pinned; 0 = it is not
  std::string device;         // of the first tier, where it lives
  bool durable = false;
  int64_t durable_tokens = 0;
  Persistence persistence = Persistence::kNone;
  int64_t known_tokens = 0, reused_tokens = 0;  // whose ids are known; that it began with
  Priority priority = Priority::kNormal;
};

// kvtide.v1.GetStatsResponse explains the fields.
struct PairStats {
  std::string pair;
  int64_t blocks = 0, bytes = 0;
};
struct TierStats {
  std::string name, backend;
  int64_t capacity_bytes = 0, used_bytes = 0, largest_free_bytes = 0, blocks = 0, pinned_blocks = 0;
  std::vector<PairStats> pairs;
  int64_t demoted_blocks = 0, promoted_blocks = 0, dropped_blocks = 0, lost_blocks = 0;
  std::string device;
  bool io = false;
  std::string problem;  // why it takes no blocks now
  int64_t read_bytes = 0, written_bytes = 0;
  int64_t read_errors = 0, write_errors = 0, checksum_errors = 0, sync_errors = 0;
  int64_t prefix_hit_tokens = 0;
  bool encrypted = false;                           // what lies there
  int64_t degraded_blocks = 0, degraded_bytes = 0;  // recoded here to fewer bits, and what that has freed
  int64_t attended_in_place = 0, promoted_first = 0;
  double attend_bytes_per_second = 0, promote_bytes_per_second = 0;
  int64_t low_priority_blocks = 0, high_priority_blocks = 0;
};
struct RemoteStats {
  std::string server;                  // "redis://10.0.0.5:6379"
  std::string problem, write_problem;  // why it is not asked, not written to
  int64_t hit_blocks = 0, miss_blocks = 0;
  int64_t read_blocks = 0, read_bytes = 0, written_blocks = 0, written_bytes = 0;
  int64_t present_blocks = 0, left_out_blocks = 0, damaged_blocks = 0;
  int64_t timeouts = 0, errors = 0, connects = 0, queued_blocks = 0;
  int64_t memory_limit_bytes = 0, memory_used_bytes = 0;
  std::string memory_policy;
};
struct MethodStats {
  std::string method;
  int64_t calls = 0;
  std::vector<std::pair<std::string, int64_t>> failed;  // by code
  double p50_seconds = 0, p99_seconds = 0;
};
// A way to reach the daemon: "grpc", "shared_memory" or "direct". kvtide.v1.WayStats explains the counters.
struct WayStats {
  std::string way;
  int64_t clients = 0, calls = 0, steps = 0, received_bytes = 0, sent_bytes = 0;
};
// A client that is connected.
struct ClientStats {
  std::string name, way, tenant;
  int64_t calls = 0, steps = 0, received_bytes = 0, sent_bytes = 0;
  double connected_seconds = 0, idle_seconds = 0;
};
// Memory of "sequences", "host" or "gpus": what the planner's arithmetic and the limits say, and what it is.
struct MemoryUse {
  std::string part;
  int64_t predicted_bytes = 0, actual_bytes = 0;
};
// What is wrong and stays so until somebody mends it; the text is empty for who is no admin.
struct Trouble {
  std::string what, text;
  double seconds = 0;
  bool ends_service = false;
};
struct TenantRefusals {
  std::string tenant, reason;
  int64_t calls = 0;
};
struct ServerStats {
  std::vector<Trouble> troubles;
  std::vector<MethodStats> methods;
  std::vector<std::pair<std::string, int64_t>> refused;  // calls by reason, most frequent first
  // Whose they were, by reason in that order, each with the tenant that has most first; for who is no admin
  // its own.
  std::vector<TenantRefusals> refused_tenants;
  std::vector<WayStats> ways;
  std::vector<ClientStats> clients;  // with most calls first
  std::vector<MemoryUse> memory;
  std::vector<TierStats> tiers;
  int64_t models = 0, sequences = 0, tokens = 0, shared_blocks = 0;
  int64_t stored_bytes = 0, f16_equivalent_bytes = 0;
  double bits_per_value = 0, uptime_seconds = 0;
  int64_t sequences_created = 0, sequences_closed = 0, appended_tokens = 0, sealed_blocks = 0;
  int64_t deferred_seals = 0, failed_seals = 0;
  int64_t copied_on_write_blocks = 0, window_freed_blocks = 0, evict_calls = 0, prefetch_calls = 0;
  int64_t moves = 0, failed_moves = 0, moved_bytes = 0, dropped_blocks = 0;
  int64_t attended_blocks = 0, attended_blocks_below_first_tier = 0, checksum_failures = 0, exhausted = 0;
  int64_t lost_blocks = 0, persist_calls = 0, persisted = 0, failed_persists = 0, persisted_bytes = 0;
  int64_t durable_sequences = 0;
  int64_t compacted_blocks = 0, compacted_bytes = 0;
  int64_t prefix_blocks = 0, prefix_alone_bytes = 0, durable_prefix_blocks = 0;
  int64_t prefix_lookups = 0, prefix_miss_tokens = 0, prefix_reused_tokens = 0;
  std::optional<RemoteStats> remote;  // none: there is no remote tier
};

struct MoveResult {
  int64_t blocks = 0, bytes = 0;
  int64_t dropped_blocks = 0;
  int64_t blocks_left = 0;      // stayed where they are: busy, or no room
  int64_t shared_blocks = 0;    // stayed for forks outside the call: name all branches to move them too
  int64_t degraded_blocks = 0;  // recoded to fewer bits to make room
};
struct PersistResult {
  int64_t sequences = 0, tokens = 0;  // that are durable now
  int64_t blocks = 0, bytes = 0;      // that were written
};
// A setting of a daemon: its value with the default filled in; where that comes from, "default", "file",
// "environment" or "flag"; whether it follows a reload.
struct ConfigValue {
  std::string name, value, source;
  bool live = false;
};
struct RunningConfig {
  std::string file;  // empty = none
  std::vector<ConfigValue> values;
};
// Names of settings that a reload has changed, and of those whose new value waits for a restart.
struct ConfigChanges {
  std::vector<std::string> changed, needs_restart;
};
struct EvictOptions {
  std::string tier;  // empty = the next lower one
  bool drop = false;
};

// The planner's question and answer; kvtide.v1.PlanRequest and PlanResponse explain the fields.
struct PlanQuestion {
  std::string model;  // name of a registered model
  std::vector<int64_t> contexts;
  int concurrency = 1;
  int64_t device_bytes = 0, weights_bytes = 0, host_bytes = 0;  // 0 = those of the daemon
  std::vector<std::string> pairs;                               // empty = all
  std::optional<ExactWindow> exact_window;
  std::optional<double> max_perplexity_increase_percent;
  std::optional<int64_t> margin_bytes;
  KeyCentring key_centring = KeyCentring::kDefault;  // kCalibrated: pairs may use the model's profile
};
enum class PlanVerdict { kFits, kFitsWithTiers, kDoesNotFit };
struct PlanCandidate {
  std::string pair, rejection;
  int64_t kv_bytes = 0, total_bytes = 0, free_bytes = 0;
  bool fits = false, measured = false;
  double bits_per_value = 0, ratio_to_f16 = 0, perplexity_increase_percent = 0;
  int64_t max_context = 0, max_concurrency = 0;
  std::string measured_model, measured_text;  // what the harm was measured on
  int64_t measured_tokens = 0;
  bool calibrated = false;  // with keys coded by a profile: create sequences with KeyCentring::kCalibrated
};
struct ContextAnswer {
  int64_t context = 0;
  PlanVerdict verdict = PlanVerdict::kDoesNotFit;
  std::string chosen_pair, reason, split_pair;
  int64_t split_device_bytes = 0, split_host_bytes = 0;
  std::vector<PlanCandidate> candidates;
};
struct PlanAnswer {
  PlanVerdict verdict = PlanVerdict::kDoesNotFit;
  int64_t device_budget_bytes = 0;
  std::vector<ContextAnswer> contexts;
  std::vector<std::string> assumptions, notes;
};

class BlockStore;    // block_store.h
class Calibrations;  // calibration.h

class Client {
 public:
  // `address`: "unix:/path/to/socket" or "host:port". Waits until the daemon answers; UNAVAILABLE names the
  // address and what to check.
  static absl::StatusOr<std::unique_ptr<Client>> Connect(const std::string& address,
                                                         ClientOptions options = {});
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  const std::string& address() const;
  absl::StatusOr<ServerInfo> GetServerInfo();

  absl::Status RegisterModel(const Model& model);
  // Forgets it, so that its name and its place are free; its sequences have to be closed.
  absl::Status UnregisterModel(const std::string& model);
  // `prefix`: a lease of LookupPrefix, with whose tokens the sequence begins (CachedPrefix::tokens, unless
  // some were lost meanwhile: `tokens`, if it is not null, gets the length); it is over then.
  absl::StatusOr<SequenceId> CreateSequence(const std::string& model, const SequenceOptions& options = {},
                                            LeaseId prefix = 0, int64_t* tokens = nullptr);
  // What is cached of the tokens for sequences of these options, and can be read now. Leave the last token
  // out: one has to be computed. lease_seconds: how long it is kept for CreateSequence; negative = not at
  // all.
  absl::StatusOr<CachedPrefix> LookupPrefix(const std::string& model, const SequenceOptions& options,
                                            std::span<const TokenId> token_ids, double lease_seconds = 30,
                                            bool peek = false);
  // False if it was over.
  absl::StatusOr<bool> ReleaseLease(LeaseId lease);
  absl::StatusOr<SequenceId> ForkSequence(SequenceId sequence);
  absl::Status TruncateSequence(SequenceId sequence, int64_t tokens);
  absl::Status CloseSequence(SequenceId sequence);

  // The length of the sequence after it. `token_ids`: what the tokens are, one for each, so that their blocks
  // are found by LookupPrefix; they count from the sequence's first token on. Empty: not said.
  absl::StatusOr<int64_t> Append(SequenceId sequence, int64_t start_position,
                                 std::span<const LayerTokens> layers,
                                 std::span<const TokenId> token_ids = {});
  // K and V of `count` tokens from `first` on, in the named layers (empty = all), decoded where they are
  // coded; in the order of the layers. Large ranges come in several calls, so that a sequence that is cut
  // meanwhile is OUT_OF_RANGE.
  absl::StatusOr<std::vector<LayerRows>> ReadTokens(SequenceId sequence, std::span<const int> layers,
                                                    int64_t first, int64_t count,
                                                    DataType type = DataType::kF16);
  // The same into the caller's memory: as many tokens as the items have rows, of one type in all of them.
  absl::Status ReadTokens(SequenceId sequence, int64_t first, std::span<const ReadItem> items);
  // `step`: a pinned one, whose sequences these are, as they were when it began; 0 = none.
  absl::Status Attend(int layer, std::span<const AttendItem> items, const AttentionOptions& options = {},
                      uint64_t step = 0);
  // `step`: an open step, whose items these are; 0 = none.
  absl::Status AppendAttend(int layer, std::span<const AppendAttendItem> items,
                            const AttentionOptions& options = {}, uint64_t step = 0);

  // On a session only. The rows of each layer go to AppendAttend with the step's id; they count when it ends.
  // A step that is open when the Client goes has never been.
  absl::StatusOr<Step> BeginStep(std::span<const StepItem> items, const StepOptions& options = {});
  // For whoever only reads: sequences as they are now, whoever writes to them or closes them later
  // (kvtide/v1/steps.proto). Ends with EndStep. `tables`: tell where blocks lie.
  absl::StatusOr<Step> PinStep(std::span<const SequenceId> sequences, bool tables = false);
  // `tokens`: of items whose token ids were not known before.
  absl::Status EndStep(uint64_t step, std::span<const StepTokens> tokens = {});
  // Nothing of the step counts, nor of those that follow it.
  absl::Status RollBackStep(uint64_t step);

  absl::StatusOr<MoveResult> EvictSequences(std::span<const SequenceId> sequences,
                                            const EvictOptions& options = {});
  absl::StatusOr<MoveResult> EvictAll(const EvictOptions& options = {});
  absl::StatusOr<MoveResult> PrefetchSequences(std::span<const SequenceId> sequences);
  // What the daemon runs with, and reading that again, as its SIGHUP does. For admins.
  absl::StatusOr<RunningConfig> GetConfig();
  absl::StatusOr<ConfigChanges> ReloadConfig();
  // For so long (a day at most, 0 ends it) their blocks stay in their tiers, unless a call names them.
  absl::Status PinSequences(std::span<const SequenceId> sequences, absl::Duration time);
  // Which of the tenant's own blocks make way first, from now on. kDefault is InvalidArgument.
  absl::Status SetPriority(std::span<const SequenceId> sequences, Priority priority);
  // They are there again after a stop, a crash or a kill of the daemon, as they are now.
  absl::StatusOr<PersistResult> PersistSequences(std::span<const SequenceId> sequences);

  // All sequences, or those of a model.
  absl::StatusOr<std::vector<SequenceInfo>> ListSequences(const std::string& model = "");
  // All that is known of one, NotFound where there is none.
  absl::StatusOr<SequenceInfo> GetSequence(SequenceId sequence);
  absl::StatusOr<ServerStats> GetStats();
  absl::StatusOr<PlanAnswer> Plan(const PlanQuestion& question);

  // OK if the health service says SERVING.
  absl::Status CheckHealth();

  struct Impl;  // client_impl.h

 protected:
  friend class BlockStore;
  friend class Calibrations;
  explicit Client(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Where the daemon is, when nobody says: $KVTIDE_ADDRESS, else the Unix socket that kvtided listens on by
// default.
std::string DefaultAddress();

}  // namespace kvtide::client

namespace kvtide {
using client::Client;
}  // namespace kvtide
