#include "clients/cli/plan/plan_flags.h"

#include <algorithm>
#include <filesystem>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "clients/cli/plan/plan_device.h"
#include "clients/cli/plan/plan_io.h"
#include "clients/engine/key_profile.h"
#include "kernels/base/status.h"
#include "planner/engines/kv_sizer.h"
#include "planner/model/catalogue.h"
#include "planner/model/load_model.h"
#include "planner/model/weight_size.h"
#include "planner/near_names.h"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

using planner::PlanRequest;

constexpr int64_t kMostTokens = int64_t{1} << 30;

absl::StatusOr<int64_t> ParseTokens(const std::string& text) {
  std::string digits(absl::StripAsciiWhitespace(text));
  int64_t unit = 1, tokens = 0;
  if (!digits.empty() && (digits.back() == 'K' || digits.back() == 'k')) unit = 1024;
  if (!digits.empty() && (digits.back() == 'M' || digits.back() == 'm')) unit = 1024 * 1024;
  if (unit > 1) digits.pop_back();
  double number = 0;  // also of what no integer holds, to tell what is too large from what is no number
  if (!absl::SimpleAtoi(digits, &tokens)) {
    if (!absl::SimpleAtod(digits, &number) || number < kMostTokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", text, "' is not a number of tokens (8192, 32K, 1M)"));
    }
    tokens = int64_t{1} << 31;
  }
  if (tokens < 1) return absl::InvalidArgumentError(absl::StrCat("'", text, "': expected 1 token or more"));
  if (tokens > kMostTokens / unit) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is more than 2^30 tokens, beyond every model"));
  }
  return tokens * unit;
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

constexpr int kServerSlots = 4;  // llama-server without -np: four slots that share one cache

struct EngineWord {
  const char* word;
  const char* option;
};
constexpr EngineWord kEngineWords[] = {
    {"-np", "--parallel"},      {"-kvu", "--kv-unified"}, {"-ub", "--ubatch"},    {"-ctk", "--cache-type-k"},
    {"-ctv", "--cache-type-v"}, {"-fa", "--flash-attn"},  {"-sm", "--split-mode"}};

// Settings that people copy from Modelfiles and environments: num_ctx=8192, OLLAMA_KV_CACHE_TYPE=q8_0.
constexpr EngineWord kSettings[] = {{"num_ctx", "--context"},
                                    {"OLLAMA_CONTEXT_LENGTH", "--context"},
                                    {"OLLAMA_NUM_PARALLEL", "--concurrency"},
                                    {"OLLAMA_KV_CACHE_TYPE", "--pairs"},
                                    {"OLLAMA_FLASH_ATTENTION", "--flash-attn"},
                                    {"LLAMA_ARG_CTX_SIZE", "--ctx-size"},
                                    {"LLAMA_ARG_N_PARALLEL", "--parallel"},
                                    {"LLAMA_ARG_CACHE_TYPE_K", "--cache-type-k"},
                                    {"LLAMA_ARG_CACHE_TYPE_V", "--cache-type-v"},
                                    {"LLAMA_ARG_FLASH_ATTN", "--flash-attn"}};

// The option of a setting, or the argument as it is.
std::string OptionOf(const std::string& argument) {
  const size_t equals = argument.find('=');
  if (equals == std::string::npos) return argument;
  const std::string key = argument.substr(0, equals);
  std::string value = argument.substr(equals + 1);
  for (const EngineWord& setting : kSettings) {
    if (key != setting.word) continue;
    if (std::string(setting.option) == "--flash-attn") {
      if (value == "1" || value == "true") value = "on";
      if (value == "0" || value == "false") value = "off";
    }
    return absl::StrCat(setting.option, "=", value);
  }
  return argument;
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
  if (flags.gpus > 0 && request->device.count > 1 && request->device.count != flags.gpus)
    return absl::InvalidArgumentError(absl::StrCat("--device names ", request->device.count,
                                                   " cards, --gpus ", flags.gpus, "; say it in one of them"));
  if (flags.gpus > 0) request->device.count = flags.gpus;
  return absl::OkStatus();
}

// -c, -np and -kvu as llama-server means them: -c is the cells of all slots, without -np four slots share
// them, with -np every slot has its part unless -kvu is given.
absl::Status SetServerWords(const PlanFlags& flags, PlanRequest* request) {
  if (flags.ctx_size == 0 && flags.parallel == 0 && !flags.kv_unified) return absl::OkStatus();
  planner::EngineOptions& engine = request->engine;
  if (engine.engine != planner::Engine::kLlamaCpp)
    return absl::InvalidArgumentError(
        "-c, -np and -kvu are words of llama-server: add --engine llama.cpp, or say --context and "
        "--concurrency");
  if (flags.parallel < 0 || flags.parallel > (1 << 20))
    return absl::InvalidArgumentError(absl::StrCat("-np: ", flags.parallel, " slots; expected 1 or more"));
  if (flags.ctx_size < 0) return absl::InvalidArgumentError("-c: expected 1 token or more");
  engine.total_context = true;
  engine.unified = flags.parallel == 0 || flags.parallel == 1 || flags.kv_unified;
  request->workload.concurrency = flags.parallel > 0 ? flags.parallel : kServerSlots;
  if (flags.ctx_size > 0) {
    request->workload.contexts = {flags.ctx_size};
  } else if (request->model.max_context > 0) {  // -c 0: the context that the model was made for
    request->workload.contexts = {request->model.max_context};
  } else {
    return absl::InvalidArgumentError("-c is missing, and the model does not say its context");
  }
  return absl::OkStatus();
}

// Options that only some engines have: given for another one they would be ignored without a word.
absl::Status CheckForeignOptions(const PlanFlags& flags, planner::Engine engine) {
  using planner::Engine;
  struct Option {
    const char* name;
    std::vector<Engine> engines;
  };
  static const Option options[] = {{"--block-size", {Engine::kVllm}},
                                   {"--max-batched-tokens", {Engine::kVllm}},
                                   {"--gpu-memory-utilization", {Engine::kVllm}},
                                   {"--mem-fraction-static", {Engine::kSglang}},
                                   {"--max-total-tokens", {Engine::kSglang}},
                                   {"--page-size", {Engine::kSglang}},
                                   {"--chunked-prefill-size", {Engine::kSglang}},
                                   {"--swa-full-tokens-ratio", {Engine::kSglang}},
                                   {"--dp-attention", {Engine::kVllm, Engine::kSglang}},
                                   {"--enforce-eager", {Engine::kVllm, Engine::kSglang}},
                                   {"--ubatch", {Engine::kLlamaCpp}},
                                   {"--build", {Engine::kLlamaCpp}},
                                   {"--fa-all-quants", {Engine::kLlamaCpp}},
                                   {"--separate-caches", {Engine::kLlamaCpp}},
                                   {"--no-rewrites", {Engine::kLlamaCpp}},
                                   {"--split-mode", {Engine::kLlamaCpp}},
                                   {"--swa-full", {Engine::kLlamaCpp, Engine::kSglang}},
                                   {"--exact-window", {Engine::kKvtide}},
                                   {"--profile", {Engine::kKvtide}}};
  if (!flags.given) return absl::OkStatus();
  for (const Option& option : options) {
    if (!flags.given(option.name) ||
        std::find(option.engines.begin(), option.engines.end(), engine) != option.engines.end())
      continue;
    return absl::InvalidArgumentError(
        absl::StrCat(option.name, " is an option of ",
                     absl::StrJoin(option.engines, " and ",
                                   [](std::string* out, Engine e) { *out += planner::EngineName(e); }),
                     "; ", planner::EngineName(engine), " has none such"));
  }
  return absl::OkStatus();
}

absl::Status SetEngine(const PlanFlags& flags, PlanRequest* request) {
  planner::EngineOptions& engine = request->engine;
  KVTIDE_FLAG(engine.engine, "--engine", planner::ParseEngine(flags.engine));
  KVTIDE_RETURN_IF_ERROR(CheckForeignOptions(flags, engine.engine));
  if (flags.split_mode != "layer" && flags.split_mode != "tensor") {
    return absl::InvalidArgumentError(
        absl::StrCat("--split-mode: '", flags.split_mode,
                     "'; known: layer, tensor (row keeps the cache on the first "
                     "GPU and is not planned)"));
  }
  if (flags.flash_attention != "on" && flags.flash_attention != "off" && flags.flash_attention != "auto") {
    return absl::InvalidArgumentError(
        absl::StrCat("--flash-attn: '", flags.flash_attention, "'; known: on, off, auto"));
  }
  engine.build = flags.build;
  engine.all_quants = flags.all_quants;
  engine.split_tensors = flags.split_mode == "tensor";
  engine.recurrent_copies = flags.recurrent_copies;
  engine.ubatch = flags.ubatch;
  engine.unified = !flags.separate_caches;
  engine.swa_full = flags.swa_full;
  engine.rewrites = !flags.no_rewrites;
  engine.flash_attention = flags.flash_attention != "off";
  engine.block_tokens = flags.block_size;
  // vLLM's server takes 8192 tokens per step on GPUs of 70 GiB and more, but not on an A100.
  const bool large = request->device.vram_bytes >= 70 * planner::kGiB &&
                     !absl::StrContains(absl::AsciiStrToUpper(request->device.name), "A100");
  engine.max_batched_tokens = flags.max_batched_tokens != 0 ? flags.max_batched_tokens : large ? 8192 : 2048;
  engine.gpu_memory_utilization = flags.gpu_memory_utilization;
  engine.cuda_graphs = !flags.enforce_eager;
  engine.mem_fraction_static = flags.mem_fraction_static;
  engine.max_total_tokens = flags.max_total_tokens;
  engine.page_tokens = flags.page_size;
  engine.chunked_prefill = flags.chunked_prefill;
  engine.swa_full_tokens_ratio = flags.swa_full_tokens_ratio;
  engine.dp_attention = flags.dp_attention;
  KVTIDE_FLAG(engine.exact_window, "--exact-window", ParseWindow(flags.exact_window));
  return absl::OkStatus();
}

// Pairs may be coded by a profile of the model's keys.
absl::Status SetProfile(const PlanFlags& flags, PlanRequest* request) {
  if (flags.profile.empty()) return absl::OkStatus();
  engine::KeyProfile profile;
  KVTIDE_FLAG(profile, "--profile", engine::ReadKeyProfile(flags.profile));
  engine::KvGeometry layers;  // of the model that keep keys
  for (const planner::LayerGeometry& layer : request->model.layers) {
    if (!layer.OwnsCache() || layer.kind == planner::LayerKind::kRecurrent) continue;
    if (layers.layers++ > 0 && (layer.n_kv_heads != layers.kv_heads || layer.head_dim_k != layers.head_dim))
      return absl::InvalidArgumentError(absl::StrCat("--profile: layers of ", request->model.name,
                                                     " differ in KV heads or head dims, and a "
                                                     "profile is of equal ones"));
    layers.kv_heads = layer.n_kv_heads;
    layers.head_dim = layer.head_dim_k;
  }
  KVTIDE_RETURN_IF_ERROR(Flag("--profile", engine::CheckKeyProfile(profile, layers)));
  request->engine.calibrated_keys =
      planner::CalibratedKeys{std::filesystem::path(flags.profile).filename().string(),
                              profile.text,
                              profile.tokens,
                              !profile.transforms.empty(),
                              profile.after_rope,
                              profile.context};
  if (!profile.transforms.empty())
    request->engine.calibrated_keys->lowest =
        HasWidthsOf(CalibratedTypes().back(), profile.transforms[0].widths.size(),
                    static_cast<size_t>(profile.kv_heads), StoredDim(profile.head_dim));
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
  request->allow_unmeasured = flags.allow_unmeasured;
  if (!flags.max_ppl_increase.empty()) {
    KVTIDE_FLAG(request->max_ppl_increase_percent, "--max-ppl-increase",
                ParsePercent(flags.max_ppl_increase));
  }
  return absl::OkStatus();
}

// Names of the types of one engine that a person may have meant: "q8" is q8_0.
absl::Status CheckTypes(const PlanRequest& request) {
  const std::vector<std::string> known = planner::CacheTypeNames(request.engine.engine);
  for (const planner::TypePair& pair : request.pairs) {
    for (const std::string& type : {pair.k, pair.v}) {
      if (type == "none" || std::find(known.begin(), known.end(), type) != known.end()) continue;
      std::string meant;
      for (const std::string& name : known) {
        if (meant.empty() && absl::StartsWith(name, type)) meant = name;
      }
      if (const auto near = planner::NearNames(type, known, 1); meant.empty() && !near.empty())
        meant = near.front();
      return absl::InvalidArgumentError(
          absl::StrCat(planner::EngineName(request.engine.engine), " has no cache type '", type, "'",
                       meant.empty() ? "" : absl::StrCat("; did you mean ", meant, "?"),
                       " Known: ", absl::StrJoin(known, ", ")));
    }
  }
  return absl::OkStatus();
}

// The precision in which a model was published.
const char* PublishedWeights(const std::string& model) {
  static const std::pair<const char*, const char*> published[] = {
      {"gpt-oss", "mxfp4"},         {"Kimi-K2-Thinking", "int4"}, {"Kimi-K2.", "int4"},
      {"Kimi-K2", "fp8"},           {"DeepSeek-V3", "fp8"},       {"DeepSeek-R1", "fp8"},
      {"DeepSeek-V4", "mxfp4_fp8"}, {"MiniMax-M2", "fp8"}};
  for (const auto& [prefix, weights] : published) {
    if (absl::StartsWith(model, prefix)) return weights;
  }
  return "bf16";
}

// What a catalogue model weighs when nobody says: as it was published, or as the program downloads it.
struct DefaultFormat {
  std::string name;
  std::string why;
};
DefaultFormat DefaultFormatOf(const PlanFlags& flags, const std::string& model, const std::string& asked) {
  const std::string published = PublishedWeights(model);
  const std::string name = absl::AsciiStrToLower(asked);
  const bool tag = absl::StrContains(name, ':') && !absl::StrContains(name, "://");
  const bool ollama =
      absl::AsciiStrToLower(flags.engine) == "ollama" || (tag && !absl::StrContains(name, '/'));
  if (published != "mxfp4" && (ollama || absl::EndsWith(name, "gguf"))) {
    return {"q4_k_m", ollama ? "as ollama's tags mean" : "as llama.cpp takes of a GGUF repository"};
  }
  // llama.cpp reads no FP8 or INT4 of safetensors; the nearest that it has.
  const auto engine = planner::ParseEngine(flags.engine);
  if (engine.ok() && *engine == planner::Engine::kLlamaCpp) {
    if (published == "fp8") return {"q8_0", "the GGUF nearest to the published fp8, as nothing was said"};
    if (published != "bf16" && published != "mxfp4")
      return {"q4_k_m", "the GGUF nearest to what was published, as nothing was said"};
  }
  return {published, "as nothing was said"};
}

planner::WeightFiles FilesOf(const PlanFlags& flags) {
  const auto engine = planner::ParseEngine(flags.engine);
  const bool server =
      engine.ok() && (*engine == planner::Engine::kVllm || *engine == planner::Engine::kSglang);
  return server ? planner::WeightFiles::kSafetensors : planner::WeightFiles::kGguf;
}

absl::StatusOr<planner::Weights> DefaultWeights(const PlanFlags& flags, const planner::ModelGeometry& model,
                                                const std::string& asked) {
  const DefaultFormat format = DefaultFormatOf(flags, model.name, asked);
  absl::StatusOr<planner::Weights> weights = planner::EstimateWeights(model, format.name, FilesOf(flags));
  if (!weights.ok()) {
    return absl::InvalidArgumentError(
        "missing, and the model's number of parameters is unknown; give a size (14.4GB), a quantisation "
        "(q4_k_m), a "
        "GGUF file or a folder of safetensors");
  }
  weights->source = absl::StrCat(planner::WeightName(format.name), ", ", format.why,
                                 "; name yours with --weights q4_k_m, --weights 14.4GB or a file");
  weights->provenance = planner::Provenance::kGuess;
  return weights;
}

absl::Status SetDraft(const PlanFlags& flags, PlanRequest* request) {
  request->workload.mtp_layers = flags.mtp;
  if (flags.draft.empty()) return absl::OkStatus();
  const absl::StatusOr<int64_t> bytes = planner::ParseBytes(flags.draft);
  if (bytes.ok()) {
    request->workload.draft_bytes = *bytes;
    return absl::OkStatus();
  }
  planner::LoadedModel model;
  KVTIDE_FLAG(model, "--draft",
              planner::LoadModel(flags.draft, {flags.ignore_unknown_fields}, FilesOf(flags)));
  planner::DraftModel draft;
  if (model.weights.has_value()) draft.weights = *model.weights;
  draft.model = std::move(model.geometry);
  if (!flags.draft_weights.empty()) {
    KVTIDE_FLAG(draft.weights, "--draft-weights",
                planner::LoadWeights(flags.draft_weights, draft.model, FilesOf(flags)));
  } else if (!model.weights.has_value()) {
    KVTIDE_FLAG(draft.weights, "--draft-weights", DefaultWeights(flags, draft.model, flags.draft));
  }
  KVTIDE_FLAG(draft.pair, "--draft-pair", planner::ParsePair(flags.draft_pair));
  request->workload.draft = std::move(draft);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<double> ParsePercent(const std::string& text) {
  std::string digits(absl::StripAsciiWhitespace(text));
  if (!digits.empty() && digits.back() == '%') digits.pop_back();
  double value = 0;
  if (!absl::SimpleAtod(digits, &value) || !(value >= 0) || value > 1e6) {
    return absl::InvalidArgumentError(absl::StrCat("'", text, "' is not a percentage of 0 or more (1%)"));
  }
  return value;
}

std::vector<std::string> WithEngineWords(int argc, char** argv) {
  std::vector<std::string> arguments(argv + std::min(argc, 1), argv + argc);
  const bool plans = !arguments.empty() && (arguments[0] == "plan" || arguments[0] == "fleet");
  for (std::string& argument : arguments) {
    for (const EngineWord& word : kEngineWords) {
      if (plans && argument == word.word) argument = word.option;
    }
    if (plans) argument = OptionOf(argument);
  }
  std::reverse(arguments.begin(), arguments.end());
  return arguments;
}

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

namespace {

// What is planned: a model on a device, in an engine.
void AddEngineFlags(CLI::App& command, PlanFlags* flags) {
  command.add_option("--model", flags->model,
                     "Catalogue name, GGUF file, config.json, or folder of safetensors");
  command
      .add_option("--device", flags->device,
                  "Card by name, 'auto' (this machine's GPUs; 'auto:1' for one of them), or numbers: "
                  "vram=16GiB,bandwidth=960GB/s,pcie=64GB/s,used=1GiB,count=2,host=64GiB")
      ->capture_default_str();
  command
      .add_option("--engine", flags->engine, "llama.cpp (also ollama, llama-server), vllm, sglang or kvtide")
      ->capture_default_str();
  command
      .add_option("--build", flags->build,
                  "llama.cpp: newest (upstream), b10819 (upstream by number), auto (forks too), turboquant, "
                  "pairquant, planarquant")
      ->capture_default_str();
  command.add_flag("--fa-all-quants", flags->all_quants, "llama.cpp: built with GGML_CUDA_FA_ALL_QUANTS");
  command
      .add_option("--split-mode", flags->split_mode,
                  "llama.cpp, several GPUs: layer (one after another) or tensor (-sm)")
      ->capture_default_str();
}

// llama-server's own words.
void AddLlamaServerFlags(CLI::App& command, PlanFlags* flags) {
  command.add_option("-c,--ctx-size", flags->ctx_size, "llama-server: tokens of all slots together");
  command.add_option("--parallel", flags->parallel,
                     "llama-server: slots (-np); without it four share one cache of -c tokens");
  command.add_flag("--kv-unified", flags->kv_unified, "llama-server: slots share one cache (-kvu)");
  command.add_option("--cache-type-k", flags->cache_type_k, "llama-server: type of K (-ctk)");
  command.add_option("--cache-type-v", flags->cache_type_v, "llama-server: type of V (-ctv)");
}

// What it has to hold.
void AddDemandFlags(CLI::App& command, PlanFlags* flags) {
  command.add_option("--weights", flags->weights,
                     "GGUF file, folder of safetensors, size (14.4GB), or quantisation (q4_0, bf16)");
  command
      .add_option("--pairs,--kv-cache-dtype", flags->pairs, "Allowed pairs of cache types, K/V,K/V, or 'all'")
      ->capture_default_str();
  command
      .add_option("--concurrency,--max-num-seqs,--max-running-requests", flags->concurrency,
                  "Sequences at once")
      ->capture_default_str();
  command.add_option("--shared-prefix", flags->shared_prefix, "First tokens that all sequences share");
}

// How much harm may be done.
void AddQualityFlags(CLI::App& command, PlanFlags* flags) {
  command.add_option("--max-ppl-increase", flags->max_ppl_increase,
                     "Most measured harm to accept, in percent of perplexity");
  command.add_option("--quality", flags->quality_files, "Further measurements (CSV of `kvtide eval`)");
  command.add_flag("--allow-unmeasured", flags->allow_unmeasured,
                   "Choose pairs whose harm nobody measured, when no measured one fits");
  command.add_flag("--own-quality-only", flags->own_quality_only, "Ignore measurements made on other models");
  command
      .add_option("--exact-window", flags->exact_window,
                  "Blocks kept in f16 (kvtide): default, none, FIRST+LAST")
      ->capture_default_str();
  command.add_option("--profile", flags->profile,
                     "Keys may be coded by this profile of `kvtide calibrate` (kvtide)");
}

// Devices, and what else lies in their memory.
void AddMemoryFlags(CLI::App& command, PlanFlags* flags) {
  command
      .add_option("--gpus,--tensor-parallel-size,--tp-size,--tp", flags->gpus,
                  "Equal devices: tensor parallel, or layers split (llama.cpp)")
      ->check(CLI::Range(1, 4096));
  command.add_option("--used", flags->used, "Device memory that others use already");
  command.add_option("--host-memory", flags->host_memory,
                     "Host memory for the cache: a size, or 'auto' for half of what is free");
  command.add_option("--margin", flags->margin, "Device memory to keep free (default 3 %, at least 512 MiB)");
  command.add_option("--mmproj", flags->mmproj, "Multimodal projector: file or size");
  command.add_option("--draft", flags->draft,
                     "Draft model: catalogue name or GGUF file (its cache counts), or size");
  command.add_option("--draft-weights", flags->draft_weights, "Weights of the draft model, as --weights");
  command.add_option("--draft-pair", flags->draft_pair, "Cache types of the draft model")
      ->capture_default_str();
  command.add_option("--mtp", flags->mtp, "Next-token prediction layers in use: their cache counts");
  command.add_option("--recurrent-copies", flags->recurrent_copies,
                     "Recurrent states kept per sequence beside the running one, for speculative decoding");
}

// How llama.cpp runs.
void AddLlamaFlags(CLI::App& command, PlanFlags* flags) {
  command.add_option("--ubatch", flags->ubatch, "llama.cpp: physical batch")->capture_default_str();
  command.add_flag("--separate-caches", flags->separate_caches,
                   "llama.cpp: one cache per sequence (no -kvu)");
  command.add_flag("--swa-full", flags->swa_full, "llama.cpp: full-size caches for sliding layers");
  command.add_flag("--no-rewrites", flags->no_rewrites,
                   "llama.cpp turboquant: silent changes of types turned off");
  command.add_option("--flash-attn", flags->flash_attention, "llama.cpp: on, off or auto (-fa)")
      ->capture_default_str();
  command.add_flag_callback(
      "--no-flash-attention", [flags] { flags->flash_attention = "off"; }, "llama.cpp: -fa off");
}

// How vLLM runs, and SGLang where it has the same.
void AddVllmFlags(CLI::App& command, PlanFlags* flags) {
  command.add_option("--block-size", flags->block_size, "vLLM: tokens per block")->capture_default_str();
  command.add_option("--max-batched-tokens", flags->max_batched_tokens,
                     "vLLM: tokens per step (default 2048; 8192 on GPUs of 70 GiB and more)");
  command.add_option("--gpu-memory-utilization", flags->gpu_memory_utilization, "vLLM: share of the device")
      ->capture_default_str();
  command.add_flag("--dp-attention", flags->dp_attention,
                   "vLLM, SGLang: every GPU attends for sequences of its own, experts are divided");
  command.add_flag("--enforce-eager,--disable-cuda-graph", flags->enforce_eager,
                   "vLLM, SGLang: no CUDA graphs");
}

// How SGLang runs.
void AddSglangFlags(CLI::App& command, PlanFlags* flags) {
  command.add_option(
      "--mem-fraction-static", flags->mem_fraction_static,
      "SGLang: share of the device for weights and pools (default: by memory, as SGLang does)");
  command.add_option("--max-total-tokens", flags->max_total_tokens, "SGLang: tokens of the pool at most");
  command.add_option("--page-size", flags->page_size, "SGLang: tokens per page")->capture_default_str();
  command.add_option("--chunked-prefill-size", flags->chunked_prefill,
                     "SGLang: tokens per prefill step (default: by memory)");
  command
      .add_option("--swa-full-tokens-ratio", flags->swa_full_tokens_ratio,
                  "SGLang: tokens of sliding layers per token of full ones")
      ->capture_default_str();
}

}  // namespace

void AddPlanFlags(CLI::App& command, PlanFlags* flags) {
  flags->given = [&command](const char* name) { return command.get_option(name)->count() > 0; };
  AddEngineFlags(command, flags);
  AddLlamaServerFlags(command, flags);
  AddDemandFlags(command, flags);
  AddQualityFlags(command, flags);
  AddMemoryFlags(command, flags);
  AddLlamaFlags(command, flags);
  AddVllmFlags(command, flags);
  AddSglangFlags(command, flags);
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
  KVTIDE_RETURN_IF_ERROR(Flag("--engine", planner::ParseEngine(flags.engine).status()));
  planner::LoadedModel model;
  KVTIDE_FLAG(model, "--model",
              planner::LoadModel(flags.model, {flags.ignore_unknown_fields}, FilesOf(flags)));
  request.model = std::move(model.geometry);
  if (model.weights.has_value()) request.weights = *model.weights;
  if (!flags.weights.empty()) {
    double number = 0;  // without a unit it is neither a size nor a name
    if (absl::SimpleAtod(flags.weights, &number)) {
      KVTIDE_RETURN_IF_ERROR(Flag("--weights", planner::ParseBytes(flags.weights).status()));
    }
    KVTIDE_FLAG(request.weights, "--weights",
                planner::LoadWeights(flags.weights, request.model, FilesOf(flags)));
  } else if (!model.weights.has_value()) {
    KVTIDE_FLAG(request.weights, "--weights", DefaultWeights(flags, request.model, flags.model));
  }
  KVTIDE_RETURN_IF_ERROR(SetDevice(flags, &request));
  KVTIDE_RETURN_IF_ERROR(SetEngine(flags, &request));
  if (request.engine.engine == planner::Engine::kLlamaCpp &&
      request.device.memory == planner::DeviceMemory::kOwn)
    planner::LeaveEmbeddingOnHost(&request.weights);
  KVTIDE_RETURN_IF_ERROR(SetProfile(flags, &request));
  KVTIDE_RETURN_IF_ERROR(SetQuality(flags, &request));
  KVTIDE_FLAG(request.workload.contexts, "--context", ParseContexts(flags.contexts));
  KVTIDE_FLAG(request.pairs, "--pairs", planner::ParsePairs(flags.pairs));
  if (!flags.cache_type_k.empty() || !flags.cache_type_v.empty()) {
    request.pairs = {{flags.cache_type_k.empty() ? "f16" : flags.cache_type_k,
                      flags.cache_type_v.empty() ? "f16" : flags.cache_type_v}};
  }
  for (planner::TypePair& pair : request.pairs) pair = planner::InOwnWords(request.engine.engine, pair);
  KVTIDE_RETURN_IF_ERROR(Annotate(CheckTypes(request), "--pairs"));
  request.workload.concurrency = flags.concurrency;
  KVTIDE_RETURN_IF_ERROR(SetServerWords(flags, &request));
  request.workload.shared_prefix_tokens = flags.shared_prefix;
  if (!flags.margin.empty()) KVTIDE_FLAG(request.margin_bytes, "--margin", planner::ParseBytes(flags.margin));
  if (!flags.mmproj.empty())
    KVTIDE_FLAG(request.workload.mmproj_bytes, "--mmproj", ParseBytesOrFile(flags.mmproj));
  KVTIDE_RETURN_IF_ERROR(SetDraft(flags, &request));
  return request;
}

}  // namespace kvtide::cli
