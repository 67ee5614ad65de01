#include "clients/cli/eval/eval.h"

#include <atomic>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "clients/cli/eval/eval_captured.h"
#include "clients/cli/eval/eval_run.h"
#include "clients/cli/terminal/command_status.h"
#include "clients/cli/terminal/file_checks.h"
#include "clients/cli/terminal/interrupt.h"
#include "clients/cli/terminal/number_checks.h"
#include "clients/cli/terminal/terminal.h"
#include "planner/model/device.h"

namespace kvtide::cli {
namespace {

struct EvalFlags {
  EvalOptions options;
  std::string pairs = "all";
  std::string memory;
  std::string key_centring = "default", key_equalising = "default";
  std::string output = "table";
  std::string out_file, plot_file, captured_file;
  bool no_layers = false, no_progress = false;
};

absl::Status WriteFile(const std::string& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  out.close();
  return out ? absl::OkStatus() : absl::InvalidArgumentError(absl::StrCat("cannot write ", path));
}

template <class Report>
std::string Render(const Report& report, const std::string& output, const Terminal& terminal) {
  if (output == "json") return RenderJson(report);
  if (output == "csv") return RenderCsv(report);
  return RenderTable(report, terminal);
}

template <class Report>
absl::Status Print(const EvalFlags& flags, const absl::StatusOr<Report>& report) {
  if (!report.ok()) return report.status();
  if (!flags.plot_file.empty()) {
    const absl::Status written = WriteFile(flags.plot_file, RenderSvg(*report));
    if (!written.ok()) return written;
  }
  if (!flags.out_file.empty())
    return WriteFile(flags.out_file, Render(*report, flags.output, Terminal(false, false, 100)));
  Say(Render(*report, flags.output, Terminal::Of(1)));
  return absl::OkStatus();
}

absl::Status RunCommand(EvalFlags& flags) {
  if (flags.pairs != "all") {
    for (const absl::string_view pair : absl::StrSplit(flags.pairs, ',', absl::SkipEmpty())) {
      flags.options.pairs.emplace_back(pair.data(), pair.size());
    }
  }
  if (!flags.memory.empty()) {
    const auto bytes = planner::ParseBytes(flags.memory);
    if (!bytes.ok()) return bytes.status();
    flags.options.memory_bytes = *bytes;
  }
  const auto choice = [](const std::string& text) {
    return text == "none" ? 1 : text == "first-block" ? 2 : 0;
  };
  flags.options.key_centring = static_cast<client::KeyCentring>(choice(flags.key_centring));
  flags.options.key_equalising = static_cast<client::KeyEqualising>(choice(flags.key_equalising));
  flags.options.layer_errors = !flags.no_layers;
  flags.options.show_progress = !flags.no_progress;
  const std::atomic<bool>& stop = StopAtInterrupt();
  if (flags.captured_file.empty()) return Print(flags, RunEval(flags.options, stop));
  const EvalOptions& o = flags.options;
  const CapturedOptions captured{flags.captured_file, o.pairs,   o.window_policy, o.key_centring,
                                 o.key_equalising,    o.threads, o.state_file,    o.show_progress};
  return Print(flags, RunEvalCaptured(captured, stop));
}

}  // namespace

void AddEvalCommand(CLI::App& app, int* exit_code) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App* eval =
      app.add_subcommand("eval", "Measure what pairs of cache types do to a model's predictions");
  eval->footer(
      "Examples:\n"
      "  kvtide eval --pairs q8_0/q8_0,turbo4/turbo4 --windows 2\n"
      "  kvtide eval --pairs all --exact-window default --output csv --out quality.csv --plot harm.svg\n"
      "  kvtide eval --model ~/Llama-3.2-1B --text book.txt --pairs turbo3/turbo3 --exact-window none "
      "--resume run.json\n"
      "  kvtide eval --captured book.safetensors --pairs q8_0/turbo4,turbo3/turbo3   (see kvtide capture)");
  EvalOptions& o = flags->options;
  eval->add_option(
      "--model", o.model_folder,
      "Hugging Face folder or GGUF file (Llama, Mistral, Qwen 2/3, Gemma 2/3, Phi-3); default: the bundled "
      "tidelm-7m");
  eval->add_option("--text", o.text_file, "UTF-8 text; default: the bundled slice of WikiText-2");
  CLI::Option* captured = eval->add_option("--captured", flags->captured_file,
                                           "Measure the vectors of this captured K/V/Q file instead: errors "
                                           "and attention of each layer, no model");
  eval->add_option("--pairs", flags->pairs,
                   "K/V pairs, comma-separated, or all. fp8 and fp8_calibrated, with --exact-window none, "
                   "are what vLLM and SGLang store (E4M3 with scale 1 or the largest value of the first 512 "
                   "tokens over 448); no type of the pools")
      ->capture_default_str();
  eval->add_option("--windows", o.windows, "Windows of the text, from its start")
      ->capture_default_str()
      ->check(Positive());
  eval->add_option("--context", o.context, "Tokens of a window; default: 4096, or what the model can handle")
      ->check(Positive());
  eval->add_option("--exact-window", o.window_policy,
                   "Blocks of 64 tokens kept in f16: default (first 1, last 2), FIRST+LAST, or none: every "
                   "token is coded "
                   "before anything attends over it")
      ->capture_default_str();
  eval->add_option("--chunk", o.chunk,
                   "Tokens appended at a time; new ones are attended exactly. Default: 64, with "
                   "--exact-window none 512")
      ->check(Positive());
  eval->add_option("--key-centring", flags->key_centring, "default, none or first-block")
      ->check(CLI::IsMember({"default", "none", "first-block"}))
      ->capture_default_str();
  eval->add_option("--profile", o.profile_file, "Centre keys by this profile of `kvtide calibrate`")
      ->excludes(eval->get_option("--key-centring"));
  eval->add_option("--key-equalising", flags->key_equalising, "default, none or first-block")
      ->check(CLI::IsMember({"default", "none", "first-block"}))
      ->capture_default_str();
  eval->add_option("--needles", o.needles,
                   "Also ask for this many planted lines at as many depths (at most 16)")
      ->check(CLI::Range(0, 16));
  eval->add_flag("--no-layer-errors", flags->no_layers, "Leave out the errors of K, V and logits per layer");
  eval->add_option("--output", flags->output, "table, json or csv (rows for planner/plan/quality.csv)")
      ->check(CLI::IsMember({"table", "json", "csv"}))
      ->capture_default_str();
  eval->add_option("--out", flags->out_file, "Write the output there instead of standard output")
      ->check(WritableFile());
  eval->add_option("--plot", flags->plot_file, "Also write an SVG of harm against bits")
      ->check(WritableFile());
  eval->add_option("--resume", o.state_file, "Keep finished windows in this file and go on from it")
      ->check(WritableFile());
  eval->add_option("--memory", flags->memory,
                   "Memory of the daemon that is started; default: what the run needs, at most 4GiB");
  eval->add_option("--threads", o.threads, "Threads of the engine; default: one per core")->check(Positive());
  eval->add_option("--address", o.address,
                   "Use this running daemon (unix:/path or host:port) instead of starting one");
  eval->add_option("--kvtided", o.daemon_program, "The daemon's program; default: beside kvtide, or in PATH");
  eval->add_flag("--no-progress", flags->no_progress, "No progress bar");
  for (const char* of_model : {"--model", "--text", "--windows", "--context", "--chunk", "--needles",
                               "--memory", "--address", "--kvtided", "--no-layer-errors", "--profile"})
    captured->excludes(eval->get_option(of_model));
  eval->callback([flags, exit_code] {
    const absl::Status status = RunCommand(*flags);
    *exit_code = ExitCode(status);
    if (status.code() == absl::StatusCode::kCancelled && !flags->options.state_file.empty()) {
      std::fprintf(stderr, "kvtide eval: stopped; the same command goes on from %s\n",
                   Printable(flags->options.state_file).c_str());
    } else if (!status.ok()) {
      SayFailed("kvtide eval", status);
    }
  });
}

}  // namespace kvtide::cli
