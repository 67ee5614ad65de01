#include "clients/cli/demo/demo.h"

#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "clients/cli/demo/demo_run.h"
#include "clients/cli/terminal/command_status.h"
#include "clients/cli/terminal/number_checks.h"
#include "planner/model/device.h"

namespace kvtide::cli {
namespace {

struct DemoFlags {
  DemoOptions options;
  std::string device_memory, host_memory;
  std::string output = "table";
  bool no_reference = false, no_prefix = false, no_progress = false;
};

absl::Status ReadSize(const std::string& text, int64_t* bytes) {
  if (text.empty()) return absl::OkStatus();
  const auto parsed = planner::ParseBytes(text);
  if (parsed.ok()) *bytes = *parsed;
  return parsed.status();
}

absl::Status RunCommand(DemoFlags& flags, bool* same) {
  absl::Status status = ReadSize(flags.device_memory, &flags.options.device_bytes);
  if (status.ok()) status = ReadSize(flags.host_memory, &flags.options.host_bytes);
  if (!status.ok()) return status;
  const bool json = flags.output == "json";
  flags.options.reference = !flags.no_reference;
  flags.options.reuse = !flags.no_prefix;
  flags.options.show_progress = !flags.no_progress;
  flags.options.narrate = !json;
  const auto report = RunDemo(flags.options);
  if (!report.ok()) return report.status();
  *same = report->AllSame();
  const Terminal terminal = Terminal::Of(1);
  if (json) {
    Say(RenderDemoJson(*report));
  } else {
    Say(absl::StrCat("\n", terminal.Painted("Result", Paint::kBold), "\n",
                     RenderDemoTable(*report, terminal)));
  }
  return absl::OkStatus();
}

}  // namespace

void AddDemoCommand(CLI::App& app, int* exit_code) {
  auto flags = std::make_shared<DemoFlags>();
  CLI::App* demo = app.add_subcommand("demo", "Run a real model with its KV cache in a kvtided of its own");
  demo->footer(
      "Examples:\n"
      "  kvtide demo\n"
      "  kvtide demo --device-memory 8MiB --cache-type-k turbo3 --cache-type-v turbo3\n"
      "  kvtide demo --model ~/Llama-3.2-1B --file book.txt --context 8192 --output json");
  DemoOptions& o = flags->options;
  demo->add_option("--model", o.model_folder,
                   "Hugging Face folder (Llama family, safetensors); default: the bundled tidelm-7m");
  auto* prompt = demo->add_option("--prompt", o.prompt, "Text to start from");
  demo->add_option("--file", o.text_file,
                   "UTF-8 file to start from; default: the bundled slice of WikiText-2")
      ->excludes(prompt);
  demo->add_option("--context", o.context, "Tokens to plan for; default: 4096, or what the model can handle")
      ->check(Positive());
  demo->add_option("--generate", o.generate, "Tokens to generate")->capture_default_str()->check(Positive());
  demo->add_option("--device-memory", flags->device_memory,
                   "Size of the device tier, such as 12MiB; default: about half of what f16 needs");
  demo->add_option("--host-memory", flags->host_memory,
                   "Size of the host tier; default: three times what f16 needs");
  demo->add_option("--cache-type-k", o.cache_type_k, "Cache type of K instead of the planner's choice");
  demo->add_option("--cache-type-v", o.cache_type_v, "Cache type of V; default: that of K");
  demo->add_option("--temperature", o.temperature, "Randomness of the generated text; 0 = none")
      ->capture_default_str()
      ->check(NonNegative());
  demo->add_option("--seed", o.seed, "Seed of the generated text")->capture_default_str();
  demo->add_flag("--no-reference", flags->no_reference, "Leave out the second run over the text with f16");
  demo->add_flag("--no-prefix", flags->no_prefix,
                 "Leave out the prompts that begin as an earlier one did, and the restart");
  demo->add_option("--threads", o.threads, "Threads of the engine; default: one per core")->check(Positive());
  demo->add_option("--kvtided", o.daemon_program, "The daemon's program; default: beside kvtide, or in PATH");
  demo->add_option("--output", flags->output, "table or json")
      ->check(CLI::IsMember({"table", "json"}))
      ->capture_default_str();
  demo->add_flag("--no-progress", flags->no_progress, "No progress bars");
  demo->callback([flags, exit_code] {
    bool same = true;
    const absl::Status status = RunCommand(*flags, &same);
    *exit_code = status.ok() && !same ? 1 : ExitCode(status);
    SayFailed("kvtide demo", status);
  });
}

}  // namespace kvtide::cli
