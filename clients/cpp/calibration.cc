#include "clients/cpp/calibration.h"

#include "clients/cpp/client_impl.h"
#include "clients/cpp/convert.h"
#include "kernels/base/status.h"
#include "kvtide/v1/kv_cache_service.pb.h"

namespace kvtide::client {
namespace {

CalibrationState FromProto(v1::CalibrationState state) {
  switch (state) {
    case v1::CALIBRATION_STATE_GATHERING:
      return CalibrationState::kGathering;
    case v1::CALIBRATION_STATE_MAKING:
      return CalibrationState::kMaking;
    case v1::CALIBRATION_STATE_READY:
      return CalibrationState::kReady;
    case v1::CALIBRATION_STATE_REFUSED:
      return CalibrationState::kRefused;
    default:
      return CalibrationState::kUnknown;
  }
}

Calibration FromProto(const v1::Calibration& proto) {
  Calibration calibration;
  calibration.model = proto.model();
  calibration.tenant = proto.tenant();
  calibration.state = FromProto(proto.state());
  calibration.wanted_tokens = proto.wanted_tokens();
  calibration.wanted_held_back_tokens = proto.wanted_held_back_tokens();
  calibration.tokens = proto.tokens();
  calibration.most_tokens = proto.most_tokens();
  calibration.layers = proto.layers();
  calibration.whole_layers = proto.whole_layers();
  calibration.query_rows = proto.query_rows();
  calibration.left_out_rows = proto.left_out_rows();
  calibration.waiting_tokens = proto.waiting_tokens();
  calibration.after_rope = proto.after_rope();
  calibration.context = proto.context();
  calibration.observed_seconds = proto.observed_seconds();
  calibration.spent_seconds = proto.spent_seconds();
  calibration.making_seconds = proto.making_seconds();
  calibration.share = proto.share();
  calibration.memory_bytes = proto.memory_bytes();
  for (const v1::KeyTypeError& error : proto.errors())
    calibration.errors.push_back({error.type(), error.beside(), error.error(), error.beside_error()});
  calibration.problem = proto.problem();
  calibration.installed = proto.installed();
  return calibration;
}

}  // namespace

const char* NameOf(CalibrationState state) {
  switch (state) {
    case CalibrationState::kGathering:
      return "gathering";
    case CalibrationState::kMaking:
      return "making the profile";
    case CalibrationState::kReady:
      return "ready";
    case CalibrationState::kRefused:
      return "refused";
    case CalibrationState::kUnknown:
      break;
  }
  return "unknown to this version";
}

absl::StatusOr<Calibration> Calibrations::Start(const std::string& model, const CalibrationOptions& options) {
  v1::SessionRequest message;
  v1::StartCalibrationRequest& request = *message.mutable_start_calibration();
  request.set_model(model);
  request.set_tenant(options.tenant);
  request.set_tokens(options.tokens);
  request.set_held_back_tokens(options.held_back_tokens);
  request.set_after_rope(options.after_rope);
  request.set_share(options.share);
  for (const ModelRope& rope : options.ropes) ToProto(rope, request.add_ropes());
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(client_.impl_->carrier->Call(&message, &answer));
  return FromProto(answer.start_calibration().calibration());
}

absl::Status Calibrations::Stop(const std::string& model, const std::string& tenant) {
  v1::SessionRequest message;
  message.mutable_stop_calibration()->set_model(model);
  message.mutable_stop_calibration()->set_tenant(tenant);
  v1::SessionResponse answer;
  return client_.impl_->carrier->Call(&message, &answer);
}

absl::StatusOr<CalibrationReport> Calibrations::Report(const std::string& model, const std::string& tenant) {
  v1::SessionRequest message;
  message.mutable_list_calibrations()->set_model(model);
  message.mutable_list_calibrations()->set_tenant(tenant);
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(client_.impl_->carrier->Call(&message, &answer));
  CalibrationReport report;
  for (const v1::Calibration& calibration : answer.list_calibrations().calibrations())
    report.calibrations.push_back(FromProto(calibration));
  for (const v1::InstalledProfile& profile : answer.list_calibrations().installed())
    report.installed.push_back(
        {profile.model(), profile.tenant(), profile.revision(), profile.after_rope(), profile.sequences()});
  return report;
}

absl::StatusOr<std::vector<Calibration>> Calibrations::List(const std::string& model,
                                                            const std::string& tenant) {
  KVTIDE_ASSIGN_OR_RETURN(CalibrationReport report, Report(model, tenant));
  return std::move(report.calibrations);
}

absl::StatusOr<ExportedProfile> Calibrations::Export(const std::string& model, const std::string& tenant) {
  v1::SessionRequest message;
  message.mutable_export_profile()->set_model(model);
  message.mutable_export_profile()->set_tenant(tenant);
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(client_.impl_->carrier->Call(&message, &answer));
  return ExportedProfile{FromProto(answer.export_profile().model()),
                         FromProto(answer.export_profile().calibration())};
}

absl::StatusOr<int64_t> Calibrations::Install(const std::string& model, const std::string& tenant,
                                              const std::vector<ModelLayer>& layers) {
  v1::SessionRequest message;
  v1::InstallProfileRequest& request = *message.mutable_install_profile();
  request.set_model(model);
  request.set_tenant(tenant);
  v1::Model given;
  ToProto(Model{model, layers}, &given);
  *request.mutable_layers() = std::move(*given.mutable_layers());
  v1::SessionResponse answer;
  KVTIDE_RETURN_IF_ERROR(client_.impl_->carrier->Call(&message, &answer));
  return answer.install_profile().revision();
}

}  // namespace kvtide::client
