#include "clients/cli/plan/plan_flags.h"

#include <algorithm>
#include <filesystem>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "clients/cli/plan/plan_device.h"
#include "clients/cli/plan/plan_io.h"
#include "kernels/base/status.h"
#include "planner/model/load_model.h"

namespace kvtide::cli {
namespace {

using planner::PlanRequest;

absl::StatusOr<int64_t> ParseTokens(const std::string& text) {
  std::string digits(absl::StripAsciiWhitespace(text));
  int64_t unit = 1, tokens = 0;
  if (!digits.empty() && (digits.back() == 'K' || digits.back() == 'k')) unit = 1024;
  if (!digits.empty() && (digits.back() == 'M' || digits.back() == 'm')) unit = 1024 * 1024;
  if (unit > 1) digits.pop_back();
  if (!absl::SimpleAtoi(digits, &tokens) || tokens < 1 || tokens > (int64_t{1} << 30) / unit) {
    return absl::InvalidArgumentError(absl::StrCat("'", text, "' is not a number of tokens (8192, 32K, 1M)"));
  }
  return tokens * unit;
}

absl::StatusOr<double> ParsePercent(const std::string& text) {
  std::string digits(absl::StripAsciiWhitespace(text));
  if (!digits.empty() && digits.back() == '%') digits.pop_back();
  double value = 0;
  if (!absl::SimpleAtod(digits, &value) || !(value >= 0) || value > 1e6) {
    return absl::InvalidArgumentError(absl::StrCat("'", text, "' is not a percentage of 0 or more (1%)"));
  }
  return value;
}

absl::StatusOr<ExactWindow> ParseWindow(const std::string& text) {
  if (text == "default") return ExactWindow{};
  if (text == "none") return ExactWindow{0, 0};
  const std::vector<std::string> sides = absl::StrSplit(text, '+');
  ExactWindow window;
  if (sides.size() != 2 || !absl::SimpleAtoi(sides[0], &window.first_blocks) ||
      !absl::SimpleAtoi(sides[1], &window.last_blocks) || window.first_blocks < 0 || window.last_blocks < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is not an exact window: default, none, or FIRST+LAST blocks (1+2)"));
  }
  return window;
}

// A size, or the size of a file.
absl::StatusOr<int64_t> ParseBytesOrFile(const std::string& text) {
  std::error_code error;
  const auto size = std::filesystem::file_size(text, error);
  if (!error) return static_cast<int64_t>(size);
  return planner::ParseBytes(text);
}

absl::Status Flag(const char* name, const absl::Status& status) { return Annotate(status, name); }

// Evaluates a StatusOr into `lhs`, naming the flag on failure.
#define KVTIDE_FLAG(lhs, name, expression)                          \
  do {                                                              \
    auto flag_result = (expression);                                \
    if (!flag_result.ok()) return Flag(name, flag_result.status()); \
    lhs = *std::move(flag_result);                                  \
  } while (false)

absl::Status SetDevice(const PlanFlags& flags, PlanRequest* request) {
  KVTIDE_FLAG(request->device, "--device",
              IsAutomatic(flags.device) ? DetectDevice(flags.device) : planner::ParseDevice(flags.device));
  if (!flags.used.empty())
    KVTIDE_FLAG(request->device.in_use_bytes, "--used", planner::ParseBytes(flags.used));
  if (flags.host_memory == "auto") {
    request->device.host_bytes = AvailableHostBytes() / 2;
  } else if (!flags.host_memory.empty()) {
    KVTIDE_FLAG(request->device.host_bytes, "--host-memory", planner::ParseBytes(flags.host_memory));
  }
  if (flags.gpus > 0) request->device.count = flags.gpus;
  return absl::OkStatus();
}

absl::Status SetEngine(const PlanFlags& flags, PlanRequest* request) {
  planner::EngineOptions& engine = request->engine;
  KVTIDE_FLAG(engine.engine, "--engine", planner::ParseEngine(flags.engine));
  for (const char* build : {"auto", "upstream", "turboquant", "pairquant", "planarquant", ""}) {
    if (flags.build == build) break;
    if (*build == '\0') {
      return absl::InvalidArgumentError(
          absl::StrCat("--build: unknown tree '", flags.build,
                       "'; known: auto, upstream, turboquant, pairquant, planarquant"));
    }
  }
  engine.build = flags.build;
  engine.ubatch = flags.ubatch;
  engine.unified = !flags.separate_caches;
  engine.swa_full = flags.swa_full;
  engine.rewrites = !flags.no_rewrites;
  engine.flash_attention = !flags.no_flash_attention;
  engine.block_tokens = flags.block_size;
  engine.max_batched_tokens = flags.max_batched_tokens;
  engine.gpu_memory_utilization = flags.gpu_memory_utilization;
  engine.cuda_graphs = !flags.enforce_eager;
  KVTIDE_FLAG(engine.exact_window, "--exact-window", ParseWindow(flags.exact_window));
  return absl::OkStatus();
}

absl::Status SetQuality(const PlanFlags& flags, PlanRequest* request) {
  request->quality = planner::BuiltInQuality();
  for (const std::string& file : flags.quality_files) {
    std::string text;
    KVTIDE_FLAG(text, "--quality", ReadFile(file));
    std::vector<planner::QualityRow> rows;
    KVTIDE_FLAG(rows, "--quality", planner::ParseQualityCsv(text, file));
    request->quality.insert(request->quality.end(), rows.begin(), rows.end());
  }
  request->accept_proxy_quality = !flags.own_quality_only;
  if (!flags.max_ppl_increase.empty()) {
    KVTIDE_FLAG(request->max_ppl_increase_percent, "--max-ppl-increase",
                ParsePercent(flags.max_ppl_increase));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<int64_t>> ParseContexts(const std::string& text) {
  std::vector<int64_t> contexts;
  for (const std::string& part : std::vector<std::string>(absl::StrSplit(text, ','))) {
    const size_t dots = part.find("..");
    if (dots == std::string::npos) {
      KVTIDE_ASSIGN_OR_RETURN(const int64_t tokens, ParseTokens(part));
      contexts.push_back(tokens);
      continue;
    }
    KVTIDE_ASSIGN_OR_RETURN(const int64_t first, ParseTokens(part.substr(0, dots)));
    KVTIDE_ASSIGN_OR_RETURN(const int64_t last, ParseTokens(part.substr(dots + 2)));
    if (last < first) return absl::InvalidArgumentError(absl::StrCat("'", part, "' runs backwards"));
    for (int64_t tokens = first; tokens < last; tokens *= 2) contexts.push_back(tokens);
    contexts.push_back(last);
  }
  if (contexts.size() > 1000) return absl::InvalidArgumentError("more than 1000 context lengths");
  return contexts;
}

void AddPlanFlags(CLI::App& command, PlanFlags* flags) {
  command.add_option("--model", flags->model,
                     "Catalogue name, GGUF file, config.json, or folder of safetensors");
  command
      .add_option("--device", flags->device,
                  "Card by name, 'auto' (this machine's GPUs; 'auto:1' for one of them), or numbers: "
                  "vram=16GiB,bandwidth=960GB/s,pcie=64GB/s,used=1GiB,count=2,host=64GiB")
      ->capture_default_str();
  command.add_option("--engine", flags->engine, "llama.cpp, vllm or kvtide")->capture_default_str();
  command
      .add_option("--build", flags->build,
                  "llama.cpp tree: auto, upstream, turboquant, pairquant, planarquant")
      ->capture_default_str();
  command.add_option("--weights", flags->weights,
                     "GGUF file, folder of safetensors, size (14.4GB), or quantisation (q4_0, bf16)");
  command.add_option("--pairs", flags->pairs, "Allowed pairs of cache types, K/V,K/V, or 'all'")
      ->capture_default_str();
  command.add_option("--concurrency", flags->concurrency, "Sequences at once")->capture_default_str();
  command.add_option("--shared-prefix", flags->shared_prefix, "First tokens that all sequences share");
  command.add_option("--max-ppl-increase", flags->max_ppl_increase,
                     "Most measured harm to accept, in percent of perplexity");
  command.add_option("--quality", flags->quality_files, "Further measurements (CSV of `kvtide eval`)");
  command.add_flag("--own-quality-only", flags->own_quality_only, "Ignore measurements made on other models");
  command
      .add_option("--exact-window", flags->exact_window,
                  "Blocks kept in f16 (kvtide): default, none, FIRST+LAST")
      ->capture_default_str();
  command.add_option("--gpus", flags->gpus, "Equal devices: tensor parallel, or layers split (llama.cpp)");
  command.add_option("--used", flags->used, "Device memory that others use already");
  command.add_option("--host-memory", flags->host_memory,
                     "Host memory for the cache: a size, or 'auto' for half of what is free");
  command.add_option("--margin", flags->margin, "Device memory to keep free (default 3 %, at least 512 MiB)");
  command.add_option("--mmproj", flags->mmproj, "Multimodal projector: file or size");
  command.add_option("--draft", flags->draft, "Draft model: file or size");
  command.add_option("--ubatch", flags->ubatch, "llama.cpp: physical batch")->capture_default_str();
  command.add_flag("--separate-caches", flags->separate_caches,
                   "llama.cpp: one cache per sequence (no -kvu)");
  command.add_flag("--swa-full", flags->swa_full, "llama.cpp: full-size caches for sliding layers");
  command.add_flag("--no-rewrites", flags->no_rewrites,
                   "llama.cpp turboquant: silent changes of types turned off");
  command.add_flag("--no-flash-attention", flags->no_flash_attention, "llama.cpp: -fa off");
  command.add_option("--block-size", flags->block_size, "vLLM: tokens per block")->capture_default_str();
  command.add_option("--max-batched-tokens", flags->max_batched_tokens, "vLLM: tokens per step")
      ->capture_default_str();
  command.add_option("--gpu-memory-utilization", flags->gpu_memory_utilization, "vLLM: share of the device")
      ->capture_default_str();
  command.add_flag("--enforce-eager", flags->enforce_eager, "vLLM: no CUDA graphs");
  command.add_flag("--ignore-unknown-fields", flags->ignore_unknown_fields,
                   "Go on when the model has fields that kvtide does not know");
}

absl::StatusOr<PlanRequest> MakePlanRequest(const PlanFlags& flags) {
  PlanRequest request;
  if (flags.model.empty()) {
    return absl::InvalidArgumentError(
        "--model is missing: a catalogue name (kvtide plan --list models), a GGUF file, a config.json or a "
        "folder");
  }
  planner::LoadedModel model;
  KVTIDE_FLAG(model, "--model", planner::LoadModel(flags.model, {flags.ignore_unknown_fields}));
  request.model = std::move(model.geometry);
  if (model.weights.has_value()) request.weights = *model.weights;
  if (!flags.weights.empty()) {
    KVTIDE_FLAG(request.weights, "--weights", planner::LoadWeights(flags.weights, request.model));
  }
  KVTIDE_RETURN_IF_ERROR(SetDevice(flags, &request));
  KVTIDE_RETURN_IF_ERROR(SetEngine(flags, &request));
  KVTIDE_RETURN_IF_ERROR(SetQuality(flags, &request));
  KVTIDE_FLAG(request.workload.contexts, "--context", ParseContexts(flags.contexts));
  KVTIDE_FLAG(request.pairs, "--pairs", planner::ParsePairs(flags.pairs));
  request.workload.concurrency = flags.concurrency;
  request.workload.shared_prefix_tokens = flags.shared_prefix;
  if (!flags.margin.empty()) KVTIDE_FLAG(request.margin_bytes, "--margin", planner::ParseBytes(flags.margin));
  if (!flags.mmproj.empty())
    KVTIDE_FLAG(request.workload.mmproj_bytes, "--mmproj", ParseBytesOrFile(flags.mmproj));
  if (!flags.draft.empty())
    KVTIDE_FLAG(request.workload.draft_bytes, "--draft", ParseBytesOrFile(flags.draft));
  return request;
}

}  // namespace kvtide::cli
