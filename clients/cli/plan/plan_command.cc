#include "clients/cli/plan/plan_command.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "clients/cli/plan/plan_device.h"
#include "clients/cli/plan/plan_flags.h"
#include "clients/cli/plan/plan_io.h"
#include "clients/cli/terminal/command_status.h"
#include "clients/cli/terminal/terminal.h"
#include "kernels/base/status.h"
#include "planner/model/catalogue.h"
#include "planner/plan/matrix.h"
#include "planner/plan/verify.h"
#include "planner/render/explain.h"
#include "planner/render/plot.h"
#include "planner/render/render.h"
#include "planner/render/render_flags.h"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

const char* const kExamples = R"(Examples:
  kvtide plan --model llama-3.1-8b --weights q4_k_m --device "RTX 4090"
  kvtide plan --model gemma-4-26b-a4b --weights q4_0 --device "RTX 5080" --engine llama.cpp --context 32768
  kvtide plan --model ./model.gguf --device auto --engine llama.cpp --context 4K..128K --output llama-args
  kvtide plan --model ./Llama-3.1-8B/ --device vram=24GiB,bandwidth=936GB/s,host=64GiB --concurrency 8 --plot plan.svg
  kvtide plan --model qwen2.5-3b --device "RTX 3060" --pairs q8_0/turbo4 --context 32K --explain
  kvtide plan verify --model ./model.gguf --device auto --engine llama.cpp --context 32K --pairs f16/f16 --log server.log
  kvtide plan --model ./model.gguf --device "RTX 3090" --engine llama.cpp -c 32768 -np 4 -kvu -ctk q8_0 -ctv q8_0
  kvtide plan --model qwen3-32b --weights fp8 --device "H100 SXM" --engine vllm --context 32K --concurrency 64
  kvtide plan --model ./model.gguf --device vram=8GiB --context 32K --profile model.profile   (of kvtide calibrate)
Exit codes: 0 fits, 3 fits only with tiers or with sequences that wait, 4 does not fit, 2 bad input, 1 the answer could
not be written, 5 verify: beyond --tolerance.)";

struct PlanCommand {
  PlanFlags flags;
  std::string output = "table";
  std::string plot;
  std::string list;
  std::string log;
  std::string metrics;
  std::string tolerance;
  bool explain = false;
  bool matrix = false;
  bool all = false;
};

int Fail(const absl::Status& status) {
  SayFailed("kvtide plan", status);
  return IsWriteError(status) ? kExitNotWritten : kExitBadInput;
}

// The worst of the contexts; a sequence that has to wait is a degraded answer too.
int ExitCode(const planner::Plan& plan) {
  int code = 0;
  for (const planner::ContextPlan& context : plan.contexts) {
    const bool waits = context.chosen >= 0 && !context.candidates[static_cast<size_t>(context.chosen)].fits;
    if (context.verdict == planner::Verdict::kFitsWithTiers || waits)
      code = std::max(code, kExitFitsWithTiers);
    if (context.verdict == planner::Verdict::kDoesNotFit) code = std::max(code, kExitDoesNotFit);
  }
  return code;
}

absl::Status PrintList(const std::string& what) {
  if (what == "models") {
    for (const planner::ModelGeometry& model : planner::CatalogueModels()) {
      Say(absl::StrFormat("%-24s %3d layers, %7d tokens, confidence %s\n", model.name, model.layers.size(),
                          model.max_context, model.confidence));
    }
    return absl::OkStatus();
  }
  if (what == "devices") {
    for (const planner::DeviceBudget& gpu : planner::CatalogueGpus()) {
      Say(absl::StrFormat("%-24s %10s %6.0f GB/s\n", gpu.name, planner::FormatBytes(gpu.vram_bytes),
                          gpu.bandwidth_gb_s));
    }
    return absl::OkStatus();
  }
  if (what == "pairs") {
    for (planner::Engine engine : {planner::Engine::kLlamaCpp, planner::Engine::kVllm,
                                   planner::Engine::kSglang, planner::Engine::kKvtide}) {
      planner::EngineOptions options;
      options.engine = engine;
      options.build = "auto";
      std::string line = absl::StrCat(planner::EngineName(engine), ":");
      for (const planner::TypePair& pair : planner::DefaultPairs(options, false))
        absl::StrAppend(&line, " ", pair.Name());
      Say(line + "\n");
    }
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("--list: '", what, "'; known: models, devices, pairs"));
}

void PrintMatrix(const planner::PlanRequest& request) {
  std::vector<int> head_dims;
  for (const planner::LayerGroup& group : planner::GroupLayers(request.model)) {
    if (group.head_dim_k > 0 &&
        std::find(head_dims.begin(), head_dims.end(), group.head_dim_k) == head_dims.end()) {
      head_dims.push_back(group.head_dim_k);
    }
  }
  const auto pairs = request.pairs.empty() ? planner::DefaultPairs(request.engine, false) : request.pairs;
  Say(planner::RenderMatrix(planner::SupportMatrix(planner::EngineOnDevice(request), pairs, head_dims)));
}

absl::Status CheckOutput(const std::string& output) {
  static const char* const known[] = {"table",     "json",        "csv",           "llama-args",
                                      "vllm-args", "sglang-args", "kvtided-config"};
  for (const char* name : known)
    if (output == name) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--output: '", output, "'; known: ", absl::StrJoin(known, ", ")));
}

absl::StatusOr<std::string> Render(const PlanCommand& command, const planner::PlanRequest& request,
                                   const planner::Plan& plan) {
  if (command.output == "table")
    return planner::RenderTable(request, plan, {UseColor(), command.all, !request.pairs.empty()});
  if (command.output == "json") return PrintableJson(planner::RenderJson(request, plan));
  if (command.output == "csv") return planner::RenderCsv(request, plan);
  if (command.output == "llama-args") return planner::RenderLlamaArgs(request, plan);
  if (command.output == "vllm-args") return planner::RenderVllmArgs(request, plan);
  if (command.output == "sglang-args") return planner::RenderSglangArgs(request, plan);
  KVTIDE_ASSIGN_OR_RETURN(const std::string config, planner::RenderKvtidedConfig(request, plan));
  return PrintableJson(config);
}

absl::Status Explain(const planner::PlanRequest& request, const planner::Plan& plan) {
  for (const planner::ContextPlan& context : plan.contexts) {
    const int index = request.pairs.size() == 1 || context.chosen < 0 ? 0 : context.chosen;
    KVTIDE_ASSIGN_OR_RETURN(
        const std::string text,
        planner::ExplainPair(request, context.candidates[static_cast<size_t>(index)].asked, context.context));
    Say(text + "\n");
  }
  return absl::OkStatus();
}

// The plan's exit code, or an error.
absl::StatusOr<int> RunPlanOnce(const PlanCommand& command) {
  KVTIDE_ASSIGN_OR_RETURN(const planner::PlanRequest request, MakePlanRequest(command.flags));
  if (command.matrix) {
    PrintMatrix(request);
    return 0;
  }
  KVTIDE_ASSIGN_OR_RETURN(const planner::Plan plan, planner::MakePlan(request));
  if (!command.plot.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(const std::string svg, planner::RenderSvg(request));
    KVTIDE_RETURN_IF_ERROR(Annotate(WriteFile(command.plot, svg), "--plot"));
  }
  if (command.explain) {
    KVTIDE_RETURN_IF_ERROR(Explain(request, plan));
    return ExitCode(plan);
  }
  absl::StatusOr<std::string> text = Render(command, request, plan);
  if (!text.ok() && absl::IsFailedPrecondition(text.status())) {
    SayFailed("kvtide plan", text.status());
    return ExitCode(plan);
  }
  if (!text.ok()) return text.status();
  Say(*text);
  return ExitCode(plan);
}

// On a machine with several GPUs, --device auto plans for each kind of them: equal ones, with equally much in
// use, once. Outputs for programs are one plan, for the GPU with the least free memory.
absl::StatusOr<int> RunPlan(const PlanCommand& command) {
  const std::string& device = command.flags.device;
  const bool any = device == "auto" || absl::StartsWith(device, "auto,");
  if (!any || command.matrix || command.flags.gpus > 0 || absl::StrContains(device, ",count="))
    return RunPlanOnce(command);
  const auto found = DetectDevices();
  if (!found.ok() || found->size() < 2)
    return RunPlanOnce(command);  // which has the words for what is missing
  struct Kind {
    std::vector<std::string> numbers;
    planner::DeviceBudget device;
  };
  std::vector<Kind> kinds;
  for (size_t i = 0; i < found->size(); i++) {
    const planner::DeviceBudget& gpu = (*found)[i];
    const auto same = std::find_if(kinds.begin(), kinds.end(), [&](const Kind& kind) {
      return kind.device.name == gpu.name && kind.device.UsableBytes() == gpu.UsableBytes();
    });
    if (same != kinds.end()) {
      same->numbers.push_back(absl::StrCat(i));
    } else {
      kinds.push_back({{absl::StrCat(i)}, gpu});
    }
  }
  const bool table = command.output == "table" && !command.explain && command.plot.empty();
  int worst = 0;
  for (const Kind& kind : kinds) {
    const std::string text = absl::StrFormat(
        "GPU %s of %d: %s, %s, %s in use", absl::StrJoin(kind.numbers, ", "), found->size(), kind.device.name,
        planner::FormatBytes(kind.device.vram_bytes), planner::FormatBytes(kind.device.in_use_bytes));
    if (!table) {
      std::fprintf(stderr, "%s\n", Printable(text).c_str());
      continue;
    }
    Say(absl::StrCat(&kind == kinds.data() ? "" : "\n", text, "\n"));
    PlanCommand one = command;
    one.flags.device = absl::StrCat("auto:", kind.numbers[0], device.substr(4));
    KVTIDE_ASSIGN_OR_RETURN(const int code, RunPlanOnce(one));
    worst = std::max(worst, code);
  }
  return table ? absl::StatusOr<int>(worst) : RunPlanOnce(command);
}

// The exit code, or an error.
absl::StatusOr<int> RunVerify(const PlanCommand& command) {
  KVTIDE_ASSIGN_OR_RETURN(planner::PlanRequest request, MakePlanRequest(command.flags));
  if (request.pairs.size() != 1 || request.workload.contexts.size() != 1) {
    return absl::InvalidArgumentError(
        "verify compares one pair at one context: give --pairs K/V and --context N as the engine ran");
  }
  if (command.log.empty() == command.metrics.empty()) {
    return absl::InvalidArgumentError("verify needs --log FILE or --metrics http://host:port/metrics");
  }
  std::optional<double> tolerance;
  if (!command.tolerance.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(tolerance, ParsePercent(command.tolerance));
  }
  KVTIDE_ASSIGN_OR_RETURN(const std::string text,
                          command.log.empty() ? HttpGet(command.metrics) : ReadFile(command.log));
  KVTIDE_ASSIGN_OR_RETURN(planner::Measured measured, planner::ParseAnyLog(text));
  planner::PerRequest(request.workload.contexts.front(), &measured);
  if (request.weights.provenance == planner::Provenance::kGuess) {
    measured.bytes.erase("weights");
    measured.notes.push_back("weights are not compared: name them with --weights or plan for the file");
  }
  KVTIDE_ASSIGN_OR_RETURN(const planner::Plan plan, planner::MakePlan(request));
  const planner::ContextPlan& context = plan.contexts.front();
  const std::vector<planner::VerifyLine> lines =
      planner::Compare(context.candidates.front(), context.split, request.workload.concurrency, measured);
  Say(planner::RenderVerify(lines, measured));
  if (!tolerance.has_value() || planner::WithinTolerance(lines, *tolerance)) return 0;
  std::fprintf(stderr, "kvtide plan verify: an item is more than %g %% and 4 MiB off\n", *tolerance);
  return kExitBeyondTolerance;
}

}  // namespace

void AddPlanCommand(CLI::App& app, int* exit_code) {
  auto command = std::make_shared<PlanCommand>();
  CLI::App* plan =
      app.add_subcommand("plan", "Pick the K and V types per context length that keep the cache resident");
  plan->footer(kExamples);
  AddPlanFlags(*plan, &command->flags);
  plan->add_option("--context,--num-ctx,--max-model-len,--context-length", command->flags.contexts,
                   "Tokens per sequence: list (8192,32K) or range (4K..128K, doubling)")
      ->capture_default_str();
  plan->add_option("--output", command->output,
                   "table, json, csv, llama-args, vllm-args, sglang-args, kvtided-config")
      ->capture_default_str();
  plan->add_option("--plot", command->plot, "Write memory and harm against context as SVG");
  plan->add_flag("--all", command->all, "Show every pair, the bill of every context and what others claim");
  plan->add_flag("--explain", command->explain,
                 "Show the arithmetic line by line, for the pair given or chosen");
  plan->add_flag("--matrix", command->matrix, "Show kernel support per pair and head dim of the model");
  plan->add_option("--list", command->list, "List what is known: models, devices, pairs");

  CLI::App* verify =
      plan->add_subcommand("verify", "Compare a prediction with a start-up log or a running kvtided");
  verify->fallthrough();
  verify->add_option("--log", command->log,
                     "Start-up log of llama.cpp or vLLM, or saved metrics of kvtided; - = standard input");
  verify->add_option("--metrics", command->metrics, "Metrics address of a running kvtided");
  verify->add_option("--tolerance", command->tolerance,
                     "Exit with 5 when an item is further off than this (10%) and than 4 MiB");

  plan->callback([command, verify, exit_code] {
    absl::Status status = CheckOutput(command->output);
    *exit_code = 0;
    if (!status.ok()) {
      *exit_code = Fail(status);
      return;
    }
    if (!command->list.empty()) {
      status = PrintList(command->list);
    } else {
      const absl::StatusOr<int> code = verify->parsed() ? RunVerify(*command) : RunPlan(*command);
      status = code.status();
      if (code.ok()) *exit_code = *code;
    }
    if (status.ok()) status = FlushOutput();
    if (!status.ok()) *exit_code = Fail(status);
  });
}

}  // namespace kvtide::cli
