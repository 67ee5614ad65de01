// Between the messages of kvtide.v1 and the structs of the cache. Pure functions; what they refuse is named
// by field.
#pragma once

#include "absl/status/statusor.h"
#include "daemon/cache/kv_cache.h"
#include "grpcpp/support/status.h"
#include "kvtide/v1/model.pb.h"
#include "kvtide/v1/sequence.pb.h"
#include "kvtide/v1/server.pb.h"

namespace kvtide::service {

// Tokens of a sliding window, at most: the planner counts them in int.
constexpr int64_t kMostWindow = (int64_t{1} << 31) - 1;

// Same code, same message. A message that gRPC could not carry is cut (at 4 KiB).
grpc::Status ToGrpc(const absl::Status& status);

// Layers with equal heads, dims, window and attention settings become a layer group, in order of their first
// layer.
absl::StatusOr<ModelSpec> FromProto(const v1::Model& proto);
void ToProto(const ModelSpec& spec, v1::RegisterModelResponse* proto);
// RoPE by layer as the layers say it, or that which their profiles take back; empty = not known.
absl::StatusOr<std::vector<Rope>> RopesFrom(const v1::Model& proto);
// One entry for all layers of the model, or one for each.
absl::StatusOr<std::vector<Rope>> RopesFrom(const google::protobuf::RepeatedPtrField<v1::Rope>& proto,
                                            const ModelSpec& model);
// RoPE that the profiles of a model take back; empty = none does.
std::vector<Rope> RopesOf(const ModelSpec& model);
// What FromProto and RopesFrom read.
void ToProto(const ModelSpec& spec, std::span<const Rope> ropes, v1::Model* proto);

// What a sequence gets when its request does not say.
struct SequenceDefaults {
  CachePair pair;
  ExactWindow exact_window;
  Persistence persistence = Persistence::kNone;
};
// InvalidArgument that names the field; unset is `unset`.
absl::StatusOr<Priority> FromProto(v1::Priority proto, Priority unset);
v1::Priority ToProto(Priority priority);
// What a request asks for: 0 is the default; InvalidArgument beyond the most that a lease may last.
absl::StatusOr<double> LeaseSeconds(double asked);
absl::StatusOr<SequenceOptions> FromProto(const v1::CreateSequenceRequest& proto,
                                          const SequenceDefaults& defaults);
absl::StatusOr<ExactWindow> FromProto(const v1::ExactWindow& proto);
void ToProto(const ExactWindow& window, v1::ExactWindow* proto);

void ToProto(const SequenceInfo& info, const std::vector<TierOptions>& tiers, absl::Time now,
             v1::Sequence* proto);
void ToProto(const CacheStats& stats, v1::GetStatsResponse* proto);

}  // namespace kvtide::service
