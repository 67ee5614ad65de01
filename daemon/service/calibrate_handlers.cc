// The verbs of calibrations from traffic.
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/refusal.h"
#include "daemon/calibrate/calibrator.h"
#include "daemon/service/handlers.h"
#include "kernels/base/status.h"

namespace kvtide::service {
namespace {

v1::CalibrationState ToProto(CalibrationState state) {
  switch (state) {
    case CalibrationState::kGathering:
      return v1::CALIBRATION_STATE_GATHERING;
    case CalibrationState::kMaking:
      return v1::CALIBRATION_STATE_MAKING;
    case CalibrationState::kReady:
      return v1::CALIBRATION_STATE_READY;
    case CalibrationState::kRefused:
      return v1::CALIBRATION_STATE_REFUSED;
  }
  return v1::CALIBRATION_STATE_UNSPECIFIED;
}

void ToProto(const CalibrationStatus& status, v1::Calibration* proto) {
  proto->set_model(status.model);
  proto->set_tenant(status.tenant);
  proto->set_state(ToProto(status.state));
  proto->set_wanted_tokens(status.wanted_tokens);
  proto->set_wanted_held_back_tokens(status.wanted_held_back);
  proto->set_tokens(status.tokens);
  proto->set_most_tokens(status.most_tokens);
  proto->set_layers(status.layers);
  proto->set_whole_layers(status.whole_layers);
  proto->set_query_rows(status.query_rows);
  proto->set_left_out_rows(status.left_out_rows);
  proto->set_waiting_tokens(status.waiting_tokens);
  proto->set_after_rope(status.after_rope);
  proto->set_context(status.context);
  proto->set_observed_seconds(absl::ToDoubleSeconds(status.observed));
  proto->set_spent_seconds(absl::ToDoubleSeconds(status.spent));
  proto->set_making_seconds(absl::ToDoubleSeconds(status.making));
  proto->set_share(status.share);
  proto->set_memory_bytes(status.memory_bytes);
  proto->set_problem(status.problem);
  proto->set_installed(status.installed);
  for (const KeyTypeError& error : status.errors) {
    v1::KeyTypeError* const out = proto->add_errors();
    out->set_type(error.type);
    out->set_error(error.error);
    out->set_beside(error.beside);
    out->set_beside_error(error.beside_error);
  }
}

void ToProto(const InstalledProfile& profile, v1::InstalledProfile* proto) {
  proto->set_model(profile.model);
  proto->set_tenant(profile.tenant);
  proto->set_revision(static_cast<int64_t>(profile.revision));
  proto->set_after_rope(profile.after_rope);
  proto->set_sequences(profile.sequences);
}

}  // namespace

// The model that a request names, and who owns it.
struct Handlers::CalibratedModel {
  ModelId model = 0, family = 0;
  std::string tenant;
};

absl::StatusOr<Handlers::CalibratedModel> Handlers::FindCalibrated(const std::string& model,
                                                                   const std::string& tenant,
                                                                   const Call& call) const {
  if (options_.calibrator == nullptr)
    return absl::UnimplementedError("calibration from traffic is not for this pool");
  CalibratedModel found;
  found.tenant = tenant.empty() ? call.context.tenant() : tenant;
  if (!call.context.identity->MaySee(found.tenant))
    return absl::PermissionDeniedError(absl::StrCat(
        "the caller is of tenant '", call.context.tenant(),
        "' and has nothing to do with models of others; leave the tenant away, or ask an admin"));
  const Identity owner{found.tenant, false};
  CallContext context = call.context;
  context.identity = &owner;
  KVTIDE_ASSIGN_OR_RETURN(found.model, cache_->FindModel(model, context));
  KVTIDE_ASSIGN_OR_RETURN(found.family, cache_->FamilyOf(found.model));
  return found;
}

absl::Status Handlers::BeginCalibration(const CalibratedModel& model, CalibrationPlan plan) const {
  plan.family = model.family;
  plan.tenant = model.tenant;
  KVTIDE_ASSIGN_OR_RETURN(plan.model, cache_->GetModel(model.model));
  if (plan.ropes.empty()) plan.ropes = options_.calibrator->RopesOf(model.family);
  if (plan.ropes.empty()) plan.ropes = RopesOf(plan.model);
  return options_.calibrator->Start(std::move(plan));
}

absl::Status Handlers::NoteModel(const v1::Model& proto, ModelId model, const Call& call) const {
  Calibrator* const calibrator = options_.calibrator;
  if (calibrator == nullptr) return absl::OkStatus();
  KVTIDE_ASSIGN_OR_RETURN(std::vector<Rope> ropes, RopesFrom(proto));
  CalibratedModel found{model, 0, call.context.tenant()};
  KVTIDE_ASSIGN_OR_RETURN(found.family, cache_->FamilyOf(model));
  calibrator->NoteRopes(found.family, std::move(ropes));
  // One that has no room is served all the same: StartCalibration says what is wrong.
  if (calibrator->options().models == CalibratorOptions::Models::kAll && !calibrator->Has(found.family))
    BeginCalibration(found, {}).IgnoreError();
  return absl::OkStatus();
}

absl::Status Handlers::StartCalibration(const v1::StartCalibrationRequest& request,
                                        v1::StartCalibrationResponse* response, const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(const CalibratedModel model,
                          FindCalibrated(request.model(), request.tenant(), call));
  CalibrationPlan plan;
  if (request.share() > plan.share && !call.context.identity->admin)
    return absl::PermissionDeniedError(absl::StrCat("share is ", request.share(),
                                                    ", which takes time of other tenants; more than ",
                                                    plan.share, " is for admins"));
  plan.tokens = request.tokens();
  plan.held_back = request.held_back_tokens();
  plan.after_rope = request.after_rope();
  plan.share = request.share();
  KVTIDE_ASSIGN_OR_RETURN(const ModelSpec spec, cache_->GetModel(model.model));
  KVTIDE_ASSIGN_OR_RETURN(plan.ropes, RopesFrom(request.ropes(), spec));
  KVTIDE_RETURN_IF_ERROR(BeginCalibration(model, std::move(plan)));
  KVTIDE_ASSIGN_OR_RETURN(const CalibrationStatus status, options_.calibrator->StatusOf(model.family));
  ToProto(status, response->mutable_calibration());
  return absl::OkStatus();
}

absl::Status Handlers::StopCalibration(const v1::StopCalibrationRequest& request,
                                       v1::StopCalibrationResponse*, const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(const CalibratedModel model,
                          FindCalibrated(request.model(), request.tenant(), call));
  return options_.calibrator->Stop(model.family);
}

absl::Status Handlers::ListCalibrations(const v1::ListCalibrationsRequest& request,
                                        v1::ListCalibrationsResponse* response, const Call& call) {
  const auto asked = [&](const std::string& model, const std::string& tenant) {
    return (request.model().empty() || request.model() == model) &&
           (request.tenant().empty() || request.tenant() == tenant);
  };
  for (const InstalledProfile& profile : cache_->InstalledProfiles(call.context))
    if (asked(profile.model, profile.tenant)) ToProto(profile, response->add_installed());
  if (options_.calibrator == nullptr) return absl::OkStatus();
  for (const CalibrationStatus& status : options_.calibrator->List())
    if (call.context.identity->MaySee(status.tenant) && asked(status.model, status.tenant))
      ToProto(status, response->add_calibrations());
  return absl::OkStatus();
}

absl::Status Handlers::ExportProfile(const v1::ExportProfileRequest& request,
                                     v1::ExportProfileResponse* response, const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(const CalibratedModel model,
                          FindCalibrated(request.model(), request.tenant(), call));
  KVTIDE_ASSIGN_OR_RETURN(const ModelSpec spec, options_.calibrator->Export(model.family));
  KVTIDE_ASSIGN_OR_RETURN(const CalibrationStatus status, options_.calibrator->StatusOf(model.family));
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<Rope> ropes, options_.calibrator->PlannedRopes(model.family));
  ToProto(spec, ropes, response->mutable_model());
  ToProto(status, response->mutable_calibration());
  const int64_t most = MostAnswerBytes(call, options_);
  if (static_cast<int64_t>(response->ByteSizeLong()) + 4096 > most)
    return Refused(Refusal::kTooLarge,
                   absl::ResourceExhaustedError(absl::StrCat("the profile has ", response->ByteSizeLong(),
                                                             " bytes, an answer has at most ", most,
                                                             "; raise max_message_bytes")));
  return absl::OkStatus();
}

absl::Status Handlers::InstallProfile(const v1::InstallProfileRequest& request,
                                      v1::InstallProfileResponse* response, const Call& call) {
  KVTIDE_ASSIGN_OR_RETURN(const CalibratedModel model,
                          FindCalibrated(request.model(), request.tenant(), call));
  ModelSpec spec;
  if (request.layers_size() > 0) {
    KVTIDE_ASSIGN_OR_RETURN(spec, cache_->GetModel(model.model));
    if (static_cast<size_t>(request.layers_size()) != spec.layers.size())
      return absl::InvalidArgumentError(absl::StrCat("layers has ", request.layers_size(),
                                                     " entries, model '", request.model(), "' has ",
                                                     spec.layers.size(), " layers"));
    v1::Model with;
    ToProto(WithoutProfiles(std::move(spec)), {}, &with);
    for (int l = 0; l < with.layers_size(); l++) {
      const v1::Layer& from = request.layers(l);
      v1::Layer* const to = with.mutable_layers(l);
      to->set_key_mean(from.key_mean());
      to->set_key_transform(from.key_transform());
      to->set_key_widths(from.key_widths());
      to->set_key_centre(from.key_centre());
      to->set_key_frequencies(from.key_frequencies());
      to->set_key_rope_neighbours(from.key_rope_neighbours());
    }
    KVTIDE_ASSIGN_OR_RETURN(spec, FromProto(with));
  } else {
    KVTIDE_ASSIGN_OR_RETURN(spec, options_.calibrator->Export(model.family));
  }
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t revision, cache_->InstallProfile(model.model, spec));
  if (request.layers_size() == 0) options_.calibrator->NoteInstalled(model.family);
  response->set_revision(static_cast<int64_t>(revision));
  return absl::OkStatus();
}

}  // namespace kvtide::service
