#include "clients/cli/calibrate/calibrate.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <filesystem>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "clients/cli/bundled.h"
#include "clients/cli/calibrate/from_daemon.h"
#include "clients/cli/terminal/command_status.h"
#include "clients/cli/terminal/file_checks.h"
#include "clients/cli/terminal/interrupt.h"
#include "clients/cli/terminal/number_checks.h"
#include "clients/cli/terminal/progress.h"
#include "clients/cli/terminal/terminal.h"
#include "clients/engine/capture_kv_store.h"
#include "clients/engine/key_calibration.h"
#include "clients/engine/key_profile.h"
#include "clients/engine/llama_model.h"
#include "clients/engine/local_kv_store.h"
#include "clients/engine/tokenizer.h"
#include "kernels/base/status.h"
#include "kernels/format/block_layout.h"

namespace kvtide::cli {
namespace {

constexpr int kChunk = 512;
constexpr int64_t kMostHeldBack = 1024;

std::string LastName(const std::string& path) {
  return std::filesystem::path(path + "/").lexically_normal().parent_path().filename().string();
}

// One window of the text as a sequence of its own; its tokens from `held_back` on are held back.
absl::Status AddWindow(const engine::LlamaModel& model, engine::KvStore& exact,
                       std::span<const int32_t> tokens, int64_t held_back,
                       engine::KeyCalibration* calibration, Progress* progress,
                       const std::atomic<bool>& stop) {
  const size_t k_width = model.kv_geometry().kv_width(), q_width = model.kv_geometry().query_width();
  engine::CaptureKvStore store(
      exact, [&](int layer, int64_t start, int n, const float* q, const float* k, const float*) {
        const auto skipped = static_cast<size_t>(std::clamp<int64_t>(kBlockTokens - start, 0, n));
        const auto held =
            static_cast<size_t>(std::clamp<int64_t>(held_back - start, static_cast<int64_t>(skipped), n));
        if (held > skipped)
          calibration->Add(layer, start + static_cast<int64_t>(skipped), static_cast<int>(held - skipped),
                           q + skipped * q_width, k + skipped * k_width);
        if (static_cast<size_t>(n) > held)
          calibration->HoldBack(layer, start + static_cast<int64_t>(held),
                                static_cast<int>(static_cast<size_t>(n) - held), q + held * q_width,
                                k + held * k_width);
      });
  KVTIDE_ASSIGN_OR_RETURN(const engine::SequenceId sequence, store.CreateSequence());
  std::vector<float> hidden;
  for (size_t at = 0; at < tokens.size(); at += kChunk) {
    if (stop) return absl::CancelledError("stopped by the user");
    const size_t n = std::min<size_t>(kChunk, tokens.size() - at);
    KVTIDE_RETURN_IF_ERROR(
        model.Forward(store, sequence, static_cast<int64_t>(at), tokens.subspan(at, n), &hidden));
    if (progress != nullptr) progress->Add(static_cast<double>(n));
  }
  return store.Close(sequence);
}

// "tide2=1.25" and the like.
absl::StatusOr<TideBudget> BudgetOf(std::span<const std::string> words, int head_dim) {
  TideBudget budget;
  for (const std::string& word : words) {
    const std::pair<absl::string_view, absl::string_view> parts = absl::StrSplit(word, absl::MaxSplits('=', 1));
    const auto* const type = std::find(std::begin(kTideNames), std::end(kTideNames), parts.first);
    double bits = 0;
    if (type == std::end(kTideNames) || !absl::SimpleAtod(parts.second, &bits) || !(bits > 0 && bits <= 8))
      return absl::InvalidArgumentError(
          absl::StrCat("--bits '", word, "': say a calibrated type and its bits per value, such as tide2=1.25"));
    const size_t index = static_cast<size_t>(type - std::begin(kTideNames));
    const int stored = StoredDim(head_dim);
    const int units = static_cast<int>(bits * stored / kTideGroup) - 1;  // one takes the gains
    const int most = TideUnits(kTideBits[index], stored);
    if (units < 1 || units > most)
      return absl::InvalidArgumentError(
          absl::StrCat("--bits '", word, "': at head dim ", head_dim, " from ", 2.0 * kTideGroup / stored, " to ",
                       1.0 * kTideGroup * (most + 1) / stored, " bits fit the pages of ", parts.first));
    budget.units[index] = units;
  }
  return budget;
}

}  // namespace

absl::StatusOr<engine::KeyProfile> Calibrate(const CalibrateOptions& options, const std::atomic<bool>& stop,
                                             std::vector<engine::KeyTypeError>* errors) {
  std::string folder = options.model;
  if (folder.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(folder, BundledModelFolder());
  }
  ThreadPool pool(options.threads);
  KVTIDE_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(options.text_file));
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<engine::Tokenizer> tokenizer,
                          engine::Tokenizer::Load(folder));
  KVTIDE_ASSIGN_OR_RETURN(std::vector<int32_t> tokens, tokenizer->EncodeText(text));
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<engine::LlamaModel> model,
                          engine::LlamaModel::Load(folder, pool));
  const int most = model->config().max_positions;
  const int context = options.context > 0 ? options.context : std::min(2048, most);
  if (context > most) {
    return absl::InvalidArgumentError(
        absl::StrCat("--context ", context, " is more than the ", most, " tokens of the model"));
  }
  tokens.resize(std::min<size_t>(tokens.size(), static_cast<size_t>(options.tokens)));
  if (tokens.size() <= static_cast<size_t>(kBlockTokens) || context <= kBlockTokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the first ", kBlockTokens, " tokens of each window do not count: use a longer text than ",
        tokens.size(), " tokens, and a longer window than ", context));
  }
  const engine::KvGeometry geometry = model->kv_geometry();
  KVTIDE_ASSIGN_OR_RETURN(const TideBudget budget, BudgetOf(options.bits, geometry.head_dim));
  engine::LocalKvStore exact(geometry, DataType::kF16, pool);
  engine::KeyCalibration calibration(geometry, options.keys, pool);
  const auto all = static_cast<int64_t>(tokens.size());
  const int64_t held_back = options.means_only ? all : all - std::min(all / 8, kMostHeldBack);
  std::optional<Progress> progress;
  if (options.show_progress) progress.emplace("calibrate", static_cast<double>(tokens.size()), "tokens");
  for (size_t at = 0; at < tokens.size(); at += static_cast<size_t>(context)) {
    const size_t n = std::min(tokens.size() - at, static_cast<size_t>(context));
    KVTIDE_RETURN_IF_ERROR(AddWindow(*model, exact, {tokens.data() + at, n},
                                     held_back - static_cast<int64_t>(at), &calibration,
                                     progress ? &*progress : nullptr, stop));
  }
  if (progress) progress->Finish();
  engine::KeyProfile profile{LastName(folder),
                             LastName(options.text_file),
                             calibration.tokens(),
                             geometry.kv_heads,
                             geometry.head_dim,
                             calibration.means(),
                             {},
                             false,
                             context};
  if (!options.means_only) KVTIDE_RETURN_IF_ERROR(calibration.AddTransforms(&profile, errors, budget));
  return profile;
}

void AddCalibrateCommand(CLI::App& app, int* exit_code) {
  struct Flags {
    CalibrateOptions options;
    bool from_daemon = false;
    TrafficOptions traffic;
    bool no_progress = false;
  };
  auto flags = std::make_shared<Flags>();
  CalibrateOptions& o = flags->options;
  TrafficOptions& t = flags->traffic;
  CLI::App* calibrate =
      app.add_subcommand("calibrate", "Make a profile of a model's keys, with which they are coded better");
  calibrate->footer(
      "Examples:\n"
      "  kvtide calibrate --model model.gguf --text manual.txt --out model.profile\n"
      "  kvtide eval --model model.gguf --text book.txt --profile model.profile --pairs turbo4/turbo4\n"
      "  kvtide eval --model model.gguf --text book.txt --profile model.profile --pairs "
      "tide3/turbo3,tide2/turbo2\n"
      "  kvtide calibrate --from-daemon unix:/run/kvtide/kvtided.sock\n"
      "  kvtide calibrate --from-daemon unix:/run/kvtide/kvtided.sock --model llama --start --wait "
      "--install\n"
      "  kvtide calibrate --from-daemon 127.0.0.1:7600 --model llama --out llama.profile\n"
      "  kvtide calibrate --from-daemon 127.0.0.1:7600 --model llama --install --profile llama.profile\n"
      "Take a text of the kind that the model will see; a few thousand tokens are enough for means, "
      "transforms\n"
      "(tide4 to tide1) want 8 thousand and more. With --keys before-rope they take RoPE back: least "
      "harm, "
      "at\n"
      "any position. With after-rope they code keys as they are stored: fast attention, but how such keys "
      "spread\n"
      "depends on positions, so let windows be as long as sequences will be (--context).\n"
      "The last tokens, an eighth and at most 1024, are held back: a profile with which one of these types "
      "changes\n"
      "logits more than turbo of the same bits is refused.\n"
      "With --from-daemon a running kvtided gathers the same sums from a sample of what its clients append "
      "and "
      "attend,\n"
      "with a hundredth of their time; what is asked for is done in this order: start, wait, out, install, "
      "stop. "
      "Without\n"
      "any of these the calibrations are shown. Exit codes: 0 done, 1 failed, 2 bad input, or no profile "
      "(yet, or "
      "refused),\n"
      "130 stopped.");
  calibrate->add_option(
      "--model", o.model,
      "Hugging Face folder or GGUF file; default: the bundled tidelm-7m. With --from-daemon: "
      "the name of a registered model");
  auto* const text = calibrate->add_option("--text", o.text_file, "UTF-8 text");
  calibrate->add_option("--tokens", o.tokens, "Tokens from the start of the text, at most, or of the traffic")
      ->check(Positive())
      ->capture_default_str();
  calibrate
      ->add_option(
          "--context", o.context,
          "Tokens of a window, and with after-rope the positions that the profile is for; default: 2048, or "
          "what the model can handle")
      ->check(Positive());
  calibrate
      ->add_option_function<std::string>(
          "--keys",
          [&o](const std::string& at) {
            o.keys = at == "after-rope" ? engine::KeysAt::kAfterRope : engine::KeysAt::kBeforeRope;
          },
          "Transforms of keys with RoPE taken back (before-rope: least harm) or as they are stored "
          "(after-rope: fast attention)")
      ->check(CLI::IsMember({"before-rope", "after-rope"}))
      ->default_str("before-rope");
  calibrate->add_option("--out", t.out_file, "The profile to write (safetensors)")->check(WritableFile());
  calibrate->add_option("--threads", o.threads, "Threads of the engine; default: one per core")
      ->check(Positive());
  auto* const bits = calibrate->add_option(
      "--bits", o.bits,
      "Fewer bits per value for a calibrated type, gains included, such as tide2=1.25: pages keep their size, for "
      "measuring what lower rates lose");
  auto* const means_only =
      calibrate->add_flag("--means-only", o.means_only, "Means of keys and no transforms: for short texts");
  calibrate->add_flag("--no-progress", flags->no_progress, "No progress bar");
  AddTrafficOptions(calibrate, &t, &flags->from_daemon)->excludes(text)->excludes(means_only)->excludes(bits);
  calibrate->callback([flags, exit_code] {
    flags->options.show_progress = flags->traffic.show_progress = !flags->no_progress;
    if (flags->from_daemon) {
      TrafficOptions& traffic = flags->traffic;
      traffic.model = flags->options.model;
      traffic.calibration.tokens = flags->options.tokens;
      traffic.calibration.after_rope = flags->options.keys == engine::KeysAt::kAfterRope;
      const absl::StatusOr<std::string> done = CalibrateFromDaemon(traffic, StopAtInterrupt());
      if (done.ok()) {
        Say(*done);
      } else {
        SayFailed("kvtide calibrate", done.status());
      }
      *exit_code = ExitCode(done.status());
      return;
    }
    const std::string& out_file = flags->traffic.out_file;
    if (flags->options.text_file.empty() || out_file.empty())
      throw CLI::RequiredError("--text and --out, or --from-daemon");
    std::vector<engine::KeyTypeError> errors;
    const absl::StatusOr<engine::KeyProfile> profile = Calibrate(flags->options, StopAtInterrupt(), &errors);
    absl::Status status = profile.status();
    if (status.ok()) status = engine::WriteKeyProfile(out_file, *profile);
    *exit_code = ExitCode(status);
    if (status.ok()) {
      std::printf("%s: means%s of keys over %lld tokens, %zu layers of %d KV heads of %d\n",
                  Printable(out_file).c_str(),
                  profile->transforms.empty() ? ""
                  : profile->after_rope       ? " and transforms after RoPE"
                                              : " and transforms before RoPE",
                  static_cast<long long>(profile->tokens), profile->means.size(), profile->kv_heads,
                  profile->head_dim);
      if (!errors.empty()) std::printf("error of logits on tokens held back, of their variance:\n");
      for (const engine::KeyTypeError& error : errors)
        std::printf("  %s %.5f   %s around the mean %.5f\n", error.type.c_str(), error.error,
                    error.beside.c_str(), error.beside_error);
    } else {
      SayFailed("kvtide calibrate", status);
    }
  });
}

}  // namespace kvtide::cli
