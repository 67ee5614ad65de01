#include "clients/cli/connect/connect_command.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "clients/cli/connect/connect_plan.h"
#include "clients/cli/plan/plan_device.h"
#include "clients/cli/plan/plan_flags.h"
#include "clients/cli/plan/plan_io.h"
#include "clients/cli/terminal/command_status.h"
#include "clients/cpp/client.h"
#include "kernels/base/status.h"
#include "planner/render/render_flags.h"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

using planner::kGiB;
using planner::kMiB;

const char* const kExamples = R"(Examples:
  kvtide connect vllm --model meta-llama/Llama-3.1-8B-Instruct
  kvtide connect vllm --model Qwen/Qwen3-32B --context 32K --sequences 64 --gpus 2 --host-memory 256GiB --disk /var/lib/kvtide:1TiB
  kvtide connect vllm --model ./Llama-3.1-8B/ --way pages --device "RTX 4090" --pair turbo4/turbo4
  kvtide connect vllm --model ./Llama-3.1-8B/ --way pages --pair turbo3/turbo3 --profile llama.profile
  kvtide connect vllm --model ./Llama-3.1-8B/ --way both --disk /var/lib/kvtide:500GiB
  kvtide connect sglang --model Qwen/Qwen3-32B --output json
  kvtide connect transformers --model ./SmolLM2-135M/
  kvtide connect llama.cpp --model ./model.gguf --context 32K --sequences 4
Exit codes: 0, 1 the answer could not be written, 2 bad input or nothing fits.)";

struct ConnectFlags {
  std::string engine;
  std::string way = "cache";
  std::string model;
  std::string address;
  std::string context = "32K";
  int sequences = 0;
  int gpus = 1;
  std::string device = "auto";
  std::string weights;
  std::string host_memory;
  std::string disk;
  std::string pair = "auto";
  std::string profile;
  std::string output = "text";
};

// Half of what is free, in whole GiB where there is one.
int64_t DefaultHostBytes() {
  const int64_t half = AvailableHostBytes() / 2;
  return std::max(64 * kMiB, half >= kGiB ? half / kGiB * kGiB : half / kMiB * kMiB);
}

// A machine without a GPU plans with its memory.
std::string DeviceOf(const ConnectFlags& flags, bool* gpu) {
  *gpu = !IsAutomatic(flags.device) || DetectDevice(flags.device).ok();
  if (*gpu) return flags.device;
  return absl::StrCat("vram=", AvailableHostBytes(), ",bandwidth=50GB/s");
}

absl::StatusOr<std::string> LlamaArguments(PlanFlags flags) {
  flags.engine = "llama.cpp";
  flags.exact_window = "default";
  KVTIDE_ASSIGN_OR_RETURN(const planner::PlanRequest request, MakePlanRequest(flags));
  KVTIDE_ASSIGN_OR_RETURN(const planner::Plan plan, planner::MakePlan(request));
  return planner::RenderLlamaArgs(request, plan);
}

absl::StatusOr<ConnectRequest> Ask(const ConnectFlags& flags) {
  ConnectRequest request;
  KVTIDE_ASSIGN_OR_RETURN(request.engine, ParseServingEngine(flags.engine));
  KVTIDE_ASSIGN_OR_RETURN(request.way, ParseWay(flags.way));
  request.model = flags.model;
  request.address = flags.address.empty() ? client::DefaultAddress() : flags.address;
  const bool server = request.engine == ServingEngine::kVllm || request.engine == ServingEngine::kSglang;
  request.sequences = flags.sequences > 0 ? flags.sequences : server ? 64 : 1;
  request.gpus = flags.gpus;
  request.disk = flags.disk;
  request.pair = flags.pair;
  request.host_bytes = DefaultHostBytes();
  if (!flags.host_memory.empty()) {
    const absl::StatusOr<int64_t> bytes = planner::ParseBytes(flags.host_memory);
    KVTIDE_RETURN_IF_ERROR(Annotate(bytes.status(), "--host-memory"));
    request.host_bytes = *bytes;
  }
  PlanFlags plan;
  plan.model = flags.model;
  plan.device = DeviceOf(flags, &request.gpu);
  plan.weights = flags.weights;
  plan.contexts = flags.context;
  plan.concurrency = request.sequences;
  plan.gpus = flags.gpus > 1 ? flags.gpus : 0;
  plan.ignore_unknown_fields = true;
  // Blocks of the store are coded, all of them; sequences and pages have an exact window.
  plan.exact_window = server && request.way == Way::kCache ? "none" : "default";
  if (request.pair != "auto") plan.pairs = request.pair;
  plan.profile = flags.profile;
  if (!flags.profile.empty())
    request.profile = std::filesystem::absolute(flags.profile).lexically_normal().string();
  KVTIDE_ASSIGN_OR_RETURN(const planner::PlanRequest asked, MakePlanRequest(plan));
  if (asked.workload.contexts.size() != 1)
    return absl::InvalidArgumentError("--context: one number of tokens, such as 32K");
  request.context = asked.workload.contexts.front();
  if (request.pair != "auto") request.pair = asked.pairs.front().Name();
  KVTIDE_ASSIGN_OR_RETURN(request.plan, planner::MakePlan(asked));
  if (request.engine == ServingEngine::kLlamaCpp) {
    plan.pairs = "all";
    KVTIDE_ASSIGN_OR_RETURN(request.llama_arguments, LlamaArguments(plan));
  }
  return request;
}

absl::Status Run(const ConnectFlags& flags) {
  KVTIDE_ASSIGN_OR_RETURN(const ConnectRequest request, Ask(flags));
  KVTIDE_ASSIGN_OR_RETURN(const Connection connection, MakeConnection(request));
  Say(flags.output == "json" ? RenderConnectionJson(connection) : RenderConnection(connection));
  return FlushOutput();
}

}  // namespace

void AddConnectCommand(CLI::App& app, int* exit_code) {
  auto flags = std::make_shared<ConnectFlags>();
  CLI::App* connect = app.add_subcommand(
      "connect", "Print how an engine on this machine uses kvtide: commands, settings, checks");
  connect->footer(kExamples);
  connect->add_option("engine", flags->engine, "vllm, sglang, transformers or llama.cpp")->required();
  connect
      ->add_option(
          "--model", flags->model,
          "What the engine loads and the planner knows: a name, a folder, a config.json or a GGUF file")
      ->required();
  connect
      ->add_option("--way", flags->way,
                   "cache: the engine's blocks rest in kvtided; pages: vLLM's own pages are kvtide's; both")
      ->capture_default_str();
  connect->add_option("--address", flags->address,
                      "Where kvtided listens (default: $KVTIDE_ADDRESS, else the default socket)");
  connect
      ->add_option("--context,--max-model-len,--context-length", flags->context,
                   "Tokens per sequence at most")
      ->capture_default_str();
  connect
      ->add_option("--sequences,--concurrency,--max-num-seqs", flags->sequences,
                   "Sequences at once (default: 64 for servers, else 1)")
      ->check(CLI::Range(1, 1 << 20));
  connect->add_option("--gpus,--tensor-parallel-size,--tp-size", flags->gpus, "GPUs that share the model")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
  connect->add_option("--device", flags->device, "Card of the planner, for another machine than this one")
      ->capture_default_str();
  connect->add_option("--weights", flags->weights, "Type or size of the weights, as in kvtide plan");
  connect->add_option("--host-memory", flags->host_memory,
                      "Size of kvtided's host tier (default: half of what is free here)");
  connect->add_option("--disk", flags->disk, "kvtided's disk tier: FOLDER:SIZE");
  connect->add_option("--pair", flags->pair, "Types of keys and values (default: the planner's choice)")
      ->capture_default_str();
  connect->add_option("--profile", flags->profile,
                      "Code keys by this profile (kvtide calibrate): transformers, vLLM with --way pages");
  connect->add_option("--output", flags->output, "text or json")
      ->check(CLI::IsMember({"text", "json"}))
      ->capture_default_str();
  connect->callback([flags, exit_code] {
    const absl::Status status = Run(*flags);
    *exit_code = status.ok() ? 0 : IsWriteError(status) ? 1 : 2;
    SayFailed("kvtide connect", status);
  });
}

}  // namespace kvtide::cli
