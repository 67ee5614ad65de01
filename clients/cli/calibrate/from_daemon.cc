#include "clients/cli/calibrate/from_daemon.h"

#include <chrono>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "clients/cli/terminal/json_text.h"
#include "clients/cli/terminal/progress.h"
#include "clients/cli/terminal/terminal.h"
#include "clients/engine/daemon_kv_store.h"
#include "clients/engine/llama_model.h"
#include "kernels/base/status.h"
#include "kernels/base/thread_pool.h"
#include "nlohmann/json.hpp"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

using client::Calibration;
using client::CalibrationState;

absl::StatusOr<Calibration> Find(client::Calibrations& calibrations, const TrafficOptions& options) {
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<Calibration> list,
                          calibrations.List(options.model, options.calibration.tenant));
  if (list.size() == 1) return list.front();
  if (list.empty())
    return absl::NotFoundError(
        absl::StrCat("model '", options.model, "' is not being calibrated; begin with --start"));
  return absl::InvalidArgumentError(absl::StrCat("several tenants have a model '", options.model,
                                                 "' that is calibrated; say whose it is with --tenant"));
}

// Until there is a profile or a reason for none.
absl::StatusOr<Calibration> Wait(client::Calibrations& calibrations, const TrafficOptions& options,
                                 const std::atomic<bool>& stop) {
  std::optional<Progress> progress;
  while (true) {
    KVTIDE_ASSIGN_OR_RETURN(const Calibration now, Find(calibrations, options));
    if (options.show_progress && !progress)
      progress.emplace("calibrate", static_cast<double>(now.wanted_tokens), "tokens of each layer");
    if (progress) {
      if (now.state == CalibrationState::kMaking) progress->SetLabel("making the profile");
      progress->Update(static_cast<double>(now.tokens));
    }
    if (now.state != CalibrationState::kGathering && now.state != CalibrationState::kMaking) {
      if (progress && now.state == CalibrationState::kReady) progress->Finish();
      return now;
    }
    for (int i = 0; i < 10; ++i) {
      if (stop)
        return absl::CancelledError("stopped by the user; the daemon goes on, --wait comes back to it");
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  }
}

absl::Status TakeRope(const std::string& file, std::vector<client::ModelRope>* ropes) {
  ThreadPool pool(1);
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<engine::LlamaModel> model,
                          engine::LlamaModel::Load(file, pool));
  for (const Rope& rope : model->kv_geometry().ropes)
    ropes->push_back({rope.frequencies, rope.pairs == RopePairs::kNeighbours});
  return absl::OkStatus();
}

// Layers that say nothing but the profile of a file.
absl::StatusOr<std::vector<client::ModelLayer>> ReadLayers(const std::string& file) {
  KVTIDE_ASSIGN_OR_RETURN(const engine::KeyProfile profile, engine::ReadKeyProfile(file));
  if (profile.transforms.empty())
    return absl::InvalidArgumentError(absl::StrCat(
        file,
        " has means and no transforms, which sequences with tide keys need: make one without --means-only"));
  std::vector<client::ModelLayer> layers(profile.means.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    layers[l].key_mean = profile.means[l];
    engine::SetKeyTransforms(profile.Coding(l), &layers[l]);
  }
  return layers;
}

const char* KeysName(const Calibration& calibration) {
  return calibration.after_rope ? "after RoPE" : "before RoPE";
}

}  // namespace

absl::StatusOr<engine::KeyProfile> ProfileOf(const client::ExportedProfile& exported) {
  const client::Model& model = exported.model;
  if (model.layers.empty()) return absl::InvalidArgumentError("the daemon's model has no layers");
  const client::ModelLayer& first = model.layers.front();
  engine::KeyProfile profile;
  profile.model = model.name;
  profile.text = "traffic";
  profile.tokens = exported.calibration.wanted_tokens - exported.calibration.wanted_held_back_tokens;
  profile.kv_heads = first.kv_heads;
  profile.head_dim = first.head_dim_k;
  profile.after_rope = exported.calibration.after_rope;
  profile.context = exported.calibration.context;
  for (size_t l = 0; l < model.layers.size(); ++l) {
    const client::ModelLayer& layer = model.layers[l];
    if (layer.kv_heads != first.kv_heads || layer.head_dim_k != first.head_dim_k)
      return absl::InvalidArgumentError(absl::StrCat(
          "layer ", l, " of model '", model.name,
          "' has keys of another shape than layer 0: no profile file holds that; --install does"));
    profile.means.push_back(layer.key_mean);
    KeyTransforms keys;
    keys.matrices = layer.key_transform;
    keys.widths = layer.key_widths;
    keys.centres = layer.key_centre;
    // The file names RoPE of the model, whether or not it was taken back.
    keys.frequencies = layer.key_frequencies;
    keys.pairs = layer.key_rope_neighbours ? RopePairs::kNeighbours : RopePairs::kHalves;
    if (layer.rope.has_value()) {
      keys.frequencies = layer.rope->frequencies;
      keys.pairs = layer.rope->neighbours ? RopePairs::kNeighbours : RopePairs::kHalves;
    }
    profile.transforms.push_back(std::move(keys));
  }
  KVTIDE_RETURN_IF_ERROR(Annotate(engine::FormatProfile(profile).status(), "what the daemon answered"));
  return profile;
}

std::string RenderCalibrations(const std::vector<Calibration>& calibrations) {
  if (calibrations.empty()) return "no model is being calibrated\n";
  std::string text;
  for (const Calibration& c : calibrations) {
    absl::StrAppend(&text, Printable(c.model), " of tenant ", Printable(c.tenant), ": ",
                    client::NameOf(c.state), c.installed ? ", installed" : "", "\n");
    absl::StrAppendFormat(
        &text, "  tokens    %d of %d in every layer, %d in the one with most; the last %d are held back\n",
        c.tokens, c.wanted_tokens, c.most_tokens, c.wanted_held_back_tokens);
    absl::StrAppendFormat(&text,
                          "  coverage  %d of %d layers whole, %d rows of queries, positions up to %d\n",
                          c.whole_layers, c.layers, c.query_rows, c.context);
    absl::StrAppendFormat(&text, "  keys      %s\n", KeysName(c));
    absl::StrAppendFormat(
        &text, "  cost      %.3f s beside %.1f s of calls (%.2f %%, at most %g %%)%s, %s\n", c.spent_seconds,
        c.observed_seconds, c.observed_seconds > 0 ? 100 * c.spent_seconds / c.observed_seconds : 0.0,
        100 * c.share, c.making_seconds > 0 ? absl::StrFormat(", the profile %.1f s", c.making_seconds) : "",
        planner::FormatBytes(c.memory_bytes));
    if (c.left_out_rows > 0)
      absl::StrAppendFormat(&text, "  left out  %d rows that came while others waited\n", c.left_out_rows);
    if (!c.errors.empty())
      absl::StrAppend(&text, "  error of logits on tokens held back, of their variance:\n");
    for (const client::KeyTypeError& error : c.errors)
      absl::StrAppendFormat(&text, "    %s %.5f   %s around the mean %.5f\n", Printable(error.type),
                            error.error, Printable(error.beside), error.beside_error);
    if (!c.problem.empty()) absl::StrAppend(&text, "  refused   ", Printable(c.problem), "\n");
  }
  return text;
}

std::string RenderCalibrationsJson(const std::vector<Calibration>& calibrations) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const Calibration& c : calibrations) {
    nlohmann::ordered_json errors = nlohmann::ordered_json::array();
    for (const client::KeyTypeError& error : c.errors)
      errors.push_back({{"type", error.type},
                        {"error", error.error},
                        {"beside", error.beside},
                        {"beside_error", error.beside_error}});
    list.push_back({{"model", c.model},
                    {"tenant", c.tenant},
                    {"state", client::NameOf(c.state)},
                    {"wanted_tokens", c.wanted_tokens},
                    {"wanted_held_back_tokens", c.wanted_held_back_tokens},
                    {"tokens", c.tokens},
                    {"most_tokens", c.most_tokens},
                    {"layers", c.layers},
                    {"whole_layers", c.whole_layers},
                    {"query_rows", c.query_rows},
                    {"left_out_rows", c.left_out_rows},
                    {"waiting_tokens", c.waiting_tokens},
                    {"after_rope", c.after_rope},
                    {"context", c.context},
                    {"observed_seconds", c.observed_seconds},
                    {"spent_seconds", c.spent_seconds},
                    {"making_seconds", c.making_seconds},
                    {"share", c.share},
                    {"memory_bytes", c.memory_bytes},
                    {"errors", errors},
                    {"problem", c.problem},
                    {"installed", c.installed}});
  }
  return JsonText({{"calibrations", list}});
}

CLI::Option* AddTrafficOptions(CLI::App* calibrate, TrafficOptions* options, bool* from_daemon) {
  TrafficOptions& t = *options;
  CLI::Option* const from = calibrate->add_option_function<std::string>(
      "--from-daemon",
      [options, from_daemon](const std::string& address) {
        *from_daemon = true;
        options->daemon.address = address;
      },
      "From the traffic of the kvtided at this address: unix:/path/to/socket or host:port");
  const auto flag = [&](const char* name, bool* value, const char* help) {
    calibrate->add_flag(name, *value, help)->needs(from);
  };
  const auto text = [&](const char* name, std::string* value, const char* help) {
    return calibrate->add_option(name, *value, help)->needs(from);
  };
  flag("--start", &t.start, "Begin to gather, anew if it was begun");
  flag("--wait", &t.wait, "Wait until there is a profile");
  flag("--install", &t.install, "New sequences with tide keys have the profile");
  flag("--stop", &t.stop, "Forget sums and profile; what is installed stays");
  text("--profile", &t.profile_file, "The profile file to install, instead of one from traffic")
      ->check(CLI::ExistingFile);
  text("--rope-of", &t.rope_of,
       "Folder or GGUF file that says the model's RoPE, where it was registered without")
      ->check(CLI::ExistingPath);
  text("--tenant", &t.calibration.tenant, "Whose model it is; default: the caller's");
  calibrate
      ->add_option("--held-back", t.calibration.held_back_tokens,
                   "Tokens of --tokens that measure the profile; default: an eighth, at most 1024")
      ->needs(from)
      ->check(CLI::PositiveNumber);
  calibrate
      ->add_option("--share", t.calibration.share,
                   "Share of the time of appends and attends to spend at most; 1 = take every row. More than "
                   "the default, .01, is for admins")
      ->needs(from)
      ->check(CLI::Range(1e-6, 1.0));
  text("--output", &t.output, "text or json")->check(CLI::IsMember({"text", "json"}))->default_str("text");
  t.daemon.AddCredentialsTo(calibrate);
  return from;
}

absl::StatusOr<std::string> CalibrateFromDaemon(const TrafficOptions& options,
                                                const std::atomic<bool>& stop) {
  const bool acts =
      options.start || options.wait || options.install || options.stop || !options.out_file.empty();
  if (acts && options.model.empty())
    return absl::InvalidArgumentError("say which model with --model, as it is registered (kvtide status)");
  if (!options.profile_file.empty() && !options.install)
    return absl::InvalidArgumentError("--profile is what --install installs; give both");
  if (options.stop && options.wait)
    return absl::InvalidArgumentError("--stop ends what --wait waits for; give one of the two");
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<client::Client> client, options.daemon.Connect());
  client::Calibrations calibrations(*client);
  const std::string& tenant = options.calibration.tenant;
  std::string done;
  if (options.start) {
    client::CalibrationOptions start = options.calibration;
    if (!options.rope_of.empty()) KVTIDE_RETURN_IF_ERROR(TakeRope(options.rope_of, &start.ropes));
    KVTIDE_RETURN_IF_ERROR(calibrations.Start(options.model, start).status());
  }
  if (options.wait) {
    KVTIDE_ASSIGN_OR_RETURN(const Calibration now, Wait(calibrations, options, stop));
    if (now.state == CalibrationState::kRefused)
      return absl::FailedPreconditionError(absl::StrCat("no profile: ", now.problem));
  }
  if (!options.out_file.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(const client::ExportedProfile exported,
                            calibrations.Export(options.model, tenant));
    KVTIDE_ASSIGN_OR_RETURN(const engine::KeyProfile profile, ProfileOf(exported));
    KVTIDE_RETURN_IF_ERROR(engine::WriteKeyProfile(options.out_file, profile));
    absl::StrAppend(&done, Printable(options.out_file), ": means and transforms ",
                    KeysName(exported.calibration), " of keys over ", profile.tokens, " tokens of traffic\n");
  }
  if (options.install) {
    std::vector<client::ModelLayer> layers;
    if (!options.profile_file.empty()) {
      KVTIDE_ASSIGN_OR_RETURN(layers, ReadLayers(options.profile_file));
    }
    KVTIDE_ASSIGN_OR_RETURN(const int64_t revision, calibrations.Install(options.model, tenant, layers));
    absl::StrAppend(&done, "new sequences of ", Printable(options.model),
                    " with tide keys have the profile from now on; it is number ", revision,
                    " of this model\n");
  }
  std::vector<Calibration> shown;
  if (!options.stop) {
    KVTIDE_ASSIGN_OR_RETURN(shown, calibrations.List(options.model, tenant));
  } else {
    KVTIDE_RETURN_IF_ERROR(calibrations.Stop(options.model, tenant));
    absl::StrAppend(&done, Printable(options.model), " is not calibrated any more\n");
  }
  if (options.output == "json") return RenderCalibrationsJson(shown);
  return done + (options.stop ? "" : RenderCalibrations(shown));
}

}  // namespace kvtide::cli
