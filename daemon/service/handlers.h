// The verbs: each checks its request completely, calls the cache and fills the answer. One function for each,
// used by the unary calls and by the session stream alike. Thread-safe.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "daemon/cache/kv_cache.h"
#include "daemon/calibrate/calibrator.h"
#include "daemon/service/call.h"
#include "daemon/service/service_options.h"
#include "daemon/service/tensor.h"
#include "kernels/base/mutex.h"
#include "kvtide/v1/blocks.pb.h"
#include "kvtide/v1/calibration.pb.h"
#include "kvtide/v1/plan.pb.h"
#include "kvtide/v1/sequence.pb.h"
#include "kvtide/v1/server.pb.h"
#include "kvtide/v1/steps.pb.h"

namespace kvtide::service {

// What an answer by this way has at most.
inline int64_t MostAnswerBytes(const Call& call, const ServiceOptions& options) {
  return call.max_answer_bytes > 0 ? call.max_answer_bytes : options.max_message_bytes;
}

class Handlers {
 public:
  // Borrows the cache.
  Handlers(KvCache* cache, const ServiceOptions& options);

  absl::Status GetServerInfo(const v1::GetServerInfoRequest&, v1::GetServerInfoResponse*, const Call&);
  absl::Status RegisterModel(const v1::RegisterModelRequest&, v1::RegisterModelResponse*, const Call&);
  absl::Status UnregisterModel(const v1::UnregisterModelRequest&, v1::UnregisterModelResponse*, const Call&);
  absl::Status CreateSequence(const v1::CreateSequenceRequest&, v1::CreateSequenceResponse*, const Call&);
  absl::Status LookupPrefix(const v1::LookupPrefixRequest&, v1::LookupPrefixResponse*, const Call&);
  absl::Status ForkSequence(const v1::ForkSequenceRequest&, v1::ForkSequenceResponse*, const Call&);
  absl::Status TruncateSequence(const v1::TruncateSequenceRequest&, v1::TruncateSequenceResponse*,
                                const Call&);
  absl::Status CloseSequence(const v1::CloseSequenceRequest&, v1::CloseSequenceResponse*, const Call&);
  absl::Status Append(const v1::AppendRequest&, v1::AppendResponse*, const Call&);
  absl::Status Attend(const v1::AttendRequest&, v1::AttendResponse*, const Call&);
  absl::Status AppendAttend(const v1::AppendAttendRequest&, v1::AppendAttendResponse*, const Call&);
  absl::Status ReadTokens(const v1::ReadTokensRequest&, v1::ReadTokensResponse*, const Call&);
  absl::Status EvictSequences(const v1::EvictSequencesRequest&, v1::EvictSequencesResponse*, const Call&);
  absl::Status PrefetchSequences(const v1::PrefetchSequencesRequest&, v1::PrefetchSequencesResponse*,
                                 const Call&);
  absl::Status PersistSequences(const v1::PersistSequencesRequest&, v1::PersistSequencesResponse*,
                                const Call&);
  absl::Status PinSequences(const v1::PinSequencesRequest&, v1::PinSequencesResponse*, const Call&);
  absl::Status SetPriority(const v1::SetPriorityRequest&, v1::SetPriorityResponse*, const Call&);
  absl::Status ListSequences(const v1::ListSequencesRequest&, v1::ListSequencesResponse*, const Call&);
  absl::Status BeginStep(const v1::BeginStepRequest&, v1::BeginStepResponse*, const Call&);
  absl::Status EndStep(const v1::EndStepRequest&, v1::EndStepResponse*, const Call&);
  absl::Status GetStepProfile(const v1::GetStepProfileRequest&, v1::GetStepProfileResponse*, const Call&);
  absl::Status PinStep(const v1::PinStepRequest&, v1::PinStepResponse*, const Call&);
  // The block store.
  absl::Status OpenNamespace(const v1::OpenNamespaceRequest&, v1::OpenNamespaceResponse*, const Call&);
  absl::Status StoreBlocks(const v1::StoreBlocksRequest&, v1::StoreBlocksResponse*, const Call&);
  absl::Status LookupBlocks(const v1::LookupBlocksRequest&, v1::LookupBlocksResponse*, const Call&);
  absl::Status LoadBlocks(const v1::LoadBlocksRequest&, v1::LoadBlocksResponse*, const Call&);
  absl::Status ReleaseLease(const v1::ReleaseLeaseRequest&, v1::ReleaseLeaseResponse*, const Call&);
  absl::Status DeleteNamespace(const v1::DeleteNamespaceRequest&, v1::DeleteNamespaceResponse*, const Call&);
  absl::Status PersistNamespace(const v1::PersistNamespaceRequest&, v1::PersistNamespaceResponse*,
                                const Call&);
  absl::Status ListNamespaces(const v1::ListNamespacesRequest&, v1::ListNamespacesResponse*, const Call&);
  // Calibration from traffic; Unimplemented where there is no calibrator.
  absl::Status StartCalibration(const v1::StartCalibrationRequest&, v1::StartCalibrationResponse*,
                                const Call&);
  absl::Status StopCalibration(const v1::StopCalibrationRequest&, v1::StopCalibrationResponse*, const Call&);
  absl::Status ListCalibrations(const v1::ListCalibrationsRequest&, v1::ListCalibrationsResponse*,
                                const Call&);
  absl::Status ExportProfile(const v1::ExportProfileRequest&, v1::ExportProfileResponse*, const Call&);
  absl::Status InstallProfile(const v1::InstallProfileRequest&, v1::InstallProfileResponse*, const Call&);
  absl::Status GetStats(const v1::GetStatsRequest&, v1::GetStatsResponse*, const Call&);
  // For admins; Unimplemented where there is no configuration to read (a pool in a process of its own).
  absl::Status GetConfig(const v1::GetConfigRequest&, v1::GetConfigResponse*, const Call&);
  absl::Status ReloadConfig(const v1::ReloadConfigRequest&, v1::ReloadConfigResponse*, const Call&);
  absl::Status Plan(const v1::PlanRequest&, v1::PlanResponse*, const Call&);

  // Closes a sequence of a session that ended.
  void Release(SequenceId sequence);
  // The same for a lease.
  void EndLease(LeaseId lease) { cache_->ReleaseLease(lease); }
  // And for loads in place.
  void EndPlaces(PlacesInUse* places);

 private:
  using SpecPointer = std::shared_ptr<const ModelSpec>;
  class Batch;

  // Those of the caller's session; others are passed over.
  void GiveBack(std::span<const uint64_t> places, const Call& call);

  // The spec of the model of a sequence. Models never change, so they are kept once asked for.
  absl::StatusOr<SpecPointer> SpecOfSequence(SequenceId sequence, const CallContext& context);
  absl::StatusOr<SpecPointer> SpecOfModel(ModelId model);
  struct CalibratedModel;
  absl::StatusOr<CalibratedModel> FindCalibrated(const std::string& model, const std::string& tenant,
                                                 const Call& call) const;
  absl::Status BeginCalibration(const CalibratedModel& model, CalibrationPlan plan) const;
  // A model was registered: its RoPE may be known now, and where all models are calibrated it begins.
  absl::Status NoteModel(const v1::Model& proto, ModelId model, const Call& call) const;
  // The group of model layer `layer`, or InvalidArgument with the number of layers.
  static absl::StatusOr<const LayerGroupSpec*> GroupOfLayer(const ModelSpec& spec, int layer);

  // For metrics: hits by tier and what was missing of `asked`.
  template <class Hits>
  void TellLookup(const Call& call, const char* unit, const Hits& hits, uint64_t asked) const {
    if (!options_.looked_up) return;
    const std::string_view tenant =
        call.context.identity == nullptr ? std::string_view(kDefaultTenant) : call.context.identity->tenant;
    for (const auto& [tier, count] : hits) {
      const auto found = static_cast<uint64_t>(count);
      options_.looked_up(tenant, unit, cache_->options().tiers[static_cast<size_t>(tier)].name, found);
      asked -= std::min(asked, found);
    }
    options_.looked_up(tenant, unit, "", asked);
  }

  KvCache* const cache_;
  const ServiceOptions options_;
  const absl::Time started_;
  Mutex mutex_;
  absl::flat_hash_map<ModelId, SpecPointer> specs_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvtide::service
