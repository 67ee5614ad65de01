#include "clients/cli/plan/fleet_command.h"

#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "clients/cli/plan/plan_command.h"
#include "clients/cli/plan/plan_flags.h"
#include "clients/cli/plan/plan_io.h"
#include "clients/cli/terminal/command_status.h"
#include "clients/cli/terminal/terminal.h"
#include "kernels/base/status.h"
#include "planner/fleet/fleet.h"

namespace kvtide::cli {
namespace {

const char* const kExamples =
    R"(The mix is a CSV: context_tokens (at the end of a session), rate_per_s (new sessions per second), and optionally
name, output_tokens (per turn, 256), turns (1), think_s (between turns, 30):
  name,context_tokens,output_tokens,turns,think_s,rate_per_s
  chat,16384,400,12,45,0.5
  agent,65536,300,40,8,0.05
Examples:
  kvtide fleet --model llama-3.1-8b --weights bf16 --device "H100 SXM" --mix mix.csv --pair q8_0/turbo4
  kvtide fleet --model qwen3-32b --weights fp8 --device H200 --mix mix.csv --host-sizes 0,64GiB,256GiB --output json)";

struct FleetCommand {
  PlanFlags flags;
  std::string mix;
  std::string pair = "f16/f16";
  std::string host_sizes;
  std::string mode = "exclusive";
  std::string output = "table";
  planner::FleetRequest request;
};

absl::StatusOr<int> RunFleet(FleetCommand& command) {
  planner::FleetRequest& request = command.request;
  KVTIDE_ASSIGN_OR_RETURN(request.plan, MakePlanRequest(command.flags));
  KVTIDE_ASSIGN_OR_RETURN(request.pair, planner::ParsePair(command.pair));
  KVTIDE_ASSIGN_OR_RETURN(const std::string csv, ReadFile(command.mix));
  KVTIDE_ASSIGN_OR_RETURN(request.mix, planner::ParseMixCsv(csv, command.mix));
  if (!command.host_sizes.empty()) {
    for (const std::string& size : std::vector<std::string>(absl::StrSplit(command.host_sizes, ','))) {
      KVTIDE_ASSIGN_OR_RETURN(const int64_t bytes, planner::ParseBytes(size));
      request.host_bytes.push_back(bytes);
    }
  }
  if (command.mode != "exclusive" && command.mode != "inclusive") {
    return absl::InvalidArgumentError(
        absl::StrCat("--host-tier: '", command.mode, "'; known: exclusive, inclusive"));
  }
  if (command.output != "table" && command.output != "json") {
    return absl::InvalidArgumentError(absl::StrCat("--output: '", command.output, "'; known: table, json"));
  }
  request.mode =
      command.mode == "inclusive" ? planner::HostTierMode::kInclusive : planner::HostTierMode::kExclusive;
  KVTIDE_ASSIGN_OR_RETURN(const planner::FleetResult result, planner::SimulateFleet(request));
  Say(command.output == "json" ? PrintableJson(planner::RenderFleetJson(request, result))
                               : planner::RenderFleetTable(request, result));
  KVTIDE_RETURN_IF_ERROR(FlushOutput());
  for (const planner::FleetPoint& point : result.points) {
    if (point.gpus > 0) return 0;
  }
  return kExitDoesNotFit;
}

}  // namespace

void AddFleetCommand(CLI::App& app, int* exit_code) {
  auto command = std::make_shared<FleetCommand>();
  CLI::App* fleet =
      app.add_subcommand("fleet", "Simulate a workload mix: how many GPUs, and what a host tier is worth");
  fleet->footer(kExamples);
  AddPlanFlags(*fleet, &command->flags);
  fleet->add_option("--mix", command->mix, "CSV of session classes; - = standard input (needed)");
  fleet->add_option("--pair", command->pair, "Cache types of the fleet")->capture_default_str();
  fleet->add_option("--host-sizes", command->host_sizes,
                    "Host tiers per GPU to compare (default 0 to 4 times the device tier)");
  fleet
      ->add_option("--host-tier", command->mode,
                   "exclusive (blocks move down) or inclusive (write-through copies)")
      ->capture_default_str();
  fleet
      ->add_option("--prefill-rate", command->request.prefill_tokens_per_s,
                   "Prompt tokens per second and GPU, shared by its turns; measure yours")
      ->capture_default_str();
  fleet
      ->add_option("--max-wait", command->request.max_wait_s,
                   "Seconds that 95 % of the turns may wait at most")
      ->capture_default_str();
  fleet
      ->add_option("--duration", command->request.duration_s,
                   "Seconds to simulate; the first quarter is not counted")
      ->capture_default_str();
  fleet->add_option("--max-gpus", command->request.max_gpus, "Stop looking beyond this number of cards")
      ->capture_default_str();
  fleet->add_option("--seed", command->request.seed, "Seed of the arrivals")->capture_default_str();
  fleet->add_option("--output", command->output, "table or json")->capture_default_str();
  fleet->require_subcommand(0, 1);
  fleet->callback([command, fleet, exit_code] {
    if (!fleet->get_subcommands().empty()) return;  // it has done its work
    if (command->mix.empty()) throw CLI::RequiredError("--mix");
    const absl::StatusOr<int> code = RunFleet(*command);
    if (code.ok()) {
      *exit_code = *code;
      return;
    }
    SayFailed("kvtide fleet", code.status());
    *exit_code = absl::IsFailedPrecondition(code.status()) ? kExitDoesNotFit
                 : IsWriteError(code.status())             ? kExitNotWritten
                                                           : kExitBadInput;
  });
}

}  // namespace kvtide::cli
