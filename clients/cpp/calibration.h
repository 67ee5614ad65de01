// Calibration from the traffic of a daemon or pool: profiles of keys made from what sequences append and
// attend. kvtide/v1/calibration.proto explains the verbs, who may call them, and their errors.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/cpp/client.h"

namespace kvtide::client {

enum class CalibrationState {
  kUnknown,
  kGathering,
  kMaking,
  kReady,
  kRefused
};  // kvtide.v1.CalibrationState
// "gathering", "making the profile", "ready", "refused".
const char* NameOf(CalibrationState state);

struct KeyTypeError {
  std::string type, beside;
  double error = 0, beside_error = 0;
};

// kvtide.v1.Calibration.
struct Calibration {
  std::string model, tenant;
  CalibrationState state = CalibrationState::kUnknown;
  int64_t wanted_tokens = 0, wanted_held_back_tokens = 0;
  int64_t tokens = 0, most_tokens = 0;  // of the layer with the fewest, and with the most
  int layers = 0, whole_layers = 0;
  int64_t query_rows = 0, left_out_rows = 0, waiting_tokens = 0;
  bool after_rope = false;
  int64_t context = 0;
  double observed_seconds = 0, spent_seconds = 0, making_seconds = 0;
  double share = 0;
  int64_t memory_bytes = 0;
  std::vector<KeyTypeError> errors;
  std::string problem;
  bool installed = false;
};

struct CalibrationOptions {
  std::string tenant;            // whose model; empty = the caller's
  int64_t tokens = 0;            // 0 = the daemon's default
  int64_t held_back_tokens = 0;  // likewise
  bool after_rope = false;
  double share = 0;              // of the time of calls that may be spent; 0 = the daemon's default
  std::vector<ModelRope> ropes;  // of all layers, one entry, or of each; empty = as registered
};

// kvtide.v1.InstalledProfile.
struct InstalledProfile {
  std::string model, tenant;
  int64_t revision = 0;
  bool after_rope = false;
  int64_t sequences = 0;
};

// kvtide.v1.ListCalibrationsResponse.
struct CalibrationReport {
  std::vector<Calibration> calibrations;
  std::vector<InstalledProfile> installed;
};

struct ExportedProfile {
  Model model;  // with the profile in its layers
  Calibration calibration;
};

// Borrows its client.
class Calibrations {
 public:
  explicit Calibrations(Client& client) : client_(client) {}

  absl::StatusOr<Calibration> Start(const std::string& model, const CalibrationOptions& options = {});
  absl::Status Stop(const std::string& model, const std::string& tenant = "");
  // Empty = all that the caller may see.
  absl::StatusOr<CalibrationReport> Report(const std::string& model = "", const std::string& tenant = "");
  absl::StatusOr<std::vector<Calibration>> List(const std::string& model = "",
                                                const std::string& tenant = "");
  absl::StatusOr<ExportedProfile> Export(const std::string& model, const std::string& tenant = "");
  // That of the calibration, or with `layers` the one that they have. Counts those of the model.
  absl::StatusOr<int64_t> Install(const std::string& model, const std::string& tenant = "",
                                  const std::vector<ModelLayer>& layers = {});

 private:
  Client& client_;
};

}  // namespace kvtide::client
