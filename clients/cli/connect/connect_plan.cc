#include "clients/cli/connect/connect_plan.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "clients/cli/terminal/json_text.h"
#include "clients/cli/terminal/shell_words.h"
#include "kernels/base/status.h"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

using planner::Candidate;
using planner::FormatBytes;
using planner::kMiB;

template <class Value>
struct Named {
  Value value;
  const char* name;
};

constexpr Named<ServingEngine> kEngines[] = {{ServingEngine::kVllm, "vllm"},
                                             {ServingEngine::kSglang, "sglang"},
                                             {ServingEngine::kTransformers, "transformers"},
                                             {ServingEngine::kLlamaCpp, "llama.cpp"}};
constexpr Named<Way> kWays[] = {{Way::kCache, "cache"}, {Way::kPages, "pages"}, {Way::kBoth, "both"}};

template <class Value, size_t N>
const char* NameOf(const Named<Value> (&all)[N], Value value) {
  for (const auto& one : all)
    if (one.value == value) return one.name;
  return "";
}

template <class Value, size_t N>
absl::StatusOr<Value> Parse(const Named<Value> (&all)[N], const char* what, const std::string& name) {
  std::vector<std::string> known;
  for (const auto& one : all) {
    if (name == one.name) return one.value;
    known.emplace_back(one.name);
  }
  return absl::InvalidArgumentError(absl::StrCat(what, " '", name, "'; known: ", absl::StrJoin(known, ", ")));
}

std::string HarmWords(const planner::Harm& harm) {
  if (!harm.measured) return "harm not measured: kvtide eval measures it";
  if (harm.model.empty()) return "no harm";
  return absl::StrFormat("%+.2f %% perplexity on %s%s", harm.ppl_change_percent, harm.model,
                         harm.proxy ? ", another model" : "");
}

PairChoice Describe(const Candidate& candidate, std::string reason, const ConnectRequest& request) {
  return {candidate.asked.Name(), std::move(reason), candidate.bits_per_value, candidate.ratio_to_f16,
          candidate.kv_bytes * request.gpus / request.sequences};
}

bool Caches(Way way) { return way != Way::kPages; }
bool OwnsPages(Way way) { return way != Way::kCache; }

// Over an engine's pages calibrated K types (tide) need transforms of keys after RoPE: a profile that was
// made so, which is for who names the pair.
bool IsCalibratedPages(const Candidate& candidate, const ConnectRequest& request) {
  return OwnsPages(request.way) && absl::StartsWith(candidate.asked.k, "tide");
}

bool Measured(const Candidate& candidate) {
  return candidate.harm.measured && candidate.harm.expected_percent <= kMostHarmPercent &&
         candidate.support.level != planner::SupportLevel::kRefused;
}

// Keys of the connectors' own configuration.
nlohmann::ordered_json StoreSettings(const ConnectRequest& request, const PairChoice& choice) {
  return {{"address", request.address}, {"pair", choice.pair}};
}

std::vector<std::string> DaemonCommand(const ConnectRequest& request, const PairChoice& choice) {
  // Blocks of servers rest in the tiers below the device; sequences of libraries are attended in the first
  // one.
  const bool sequences =
      request.engine == ServingEngine::kTransformers || request.engine == ServingEngine::kLlamaCpp;
  const std::string size = absl::StrCat(request.host_bytes / kMiB, "MiB");
  std::vector<std::string> words = {"kvtided",
                                    "--listen",
                                    request.address,
                                    "--device",
                                    "cpu",
                                    "--device-memory",
                                    sequences ? size : "64MiB",
                                    "--host-memory",
                                    sequences ? "0" : size};
  if (!request.disk.empty()) words.insert(words.end(), {"--disk", request.disk});
  words.insert(words.end(), {"--default-pair", choice.pair});
  return words;
}

void ConnectVllm(const ConnectRequest& request, Connection* out) {
  out->install = {"pip install 'kvtide[vllm]'     # into the environment of vLLM (0.29 or newer)"};
  out->command = {"vllm",
                  "serve",
                  request.model,
                  "--max-model-len",
                  absl::StrCat(request.context),
                  "--max-num-seqs",
                  absl::StrCat(request.sequences),
                  "--block-size",
                  "64"};
  if (request.gpus > 1)
    out->command.insert(out->command.end(), {"--tensor-parallel-size", absl::StrCat(request.gpus)});
  if (OwnsPages(request.way)) {
    out->environment.emplace_back("KVTIDE_PAIR", out->choice.pair);
    if (!request.profile.empty()) out->environment.emplace_back("KVTIDE_PROFILE", request.profile);
    if (request.gpu) out->command.insert(out->command.end(), {"--attention-backend", "CUSTOM"});
    out->verify = {"# vLLM's log at the start: GPU KV cache size: ... tokens"};
  }
  if (Caches(request.way)) {
    out->settings = {{"kv_connector", "KvtideConnector"},
                     {"kv_connector_module_path", "kvtide.vllm.connector"},
                     {"kv_role", "kv_both"},
                     {"kv_load_failure_policy", "recompute"},
                     {"kv_connector_extra_config", StoreSettings(request, out->choice)}};
    out->command.insert(out->command.end(), {"--kv-transfer-config", out->settings.dump()});
    out->verify.insert(out->verify.end(),
                       {"# vLLM's log at the start: kvtide: blocks of 64 tokens ... rest in kvtided at ...",
                        "# and while it serves: External prefix cache hit rate: ...%"});
    out->notes.push_back("every vLLM of one model and one pair that names this address shares what it holds");
    if (request.gpu)
      out->notes.push_back(
          "kvtided --host-sharing: blocks come from where they lie in its host memory, at the rate of the "
          "bus; its "
          "engines can then read what all tenants have cached there");
  }
  out->verify.insert(
      out->verify.begin(),
      absl::StrCat("kvtide doctor --engine vllm",
                   Caches(request.way) ? absl::StrCat(" --address ", ShellQuoted(request.address)) : ""));
}

void ConnectSglang(const ConnectRequest& request, Connection* out) {
  out->install = {"pip install kvtide     # into the environment of SGLang"};
  out->settings = {{"backend_name", "kvtide"},
                   {"module_path", "kvtide.sglang"},
                   {"class_name", "KvtideHiCache"},
                   {"interface_v1", 1},
                   {"allocator", "shm"}};
  out->settings.update(StoreSettings(request, out->choice));
  out->command = {"python3",
                  "-m",
                  "sglang.launch_server",
                  "--model-path",
                  request.model,
                  "--context-length",
                  absl::StrCat(request.context),
                  "--max-running-requests",
                  absl::StrCat(request.sequences),
                  "--tp-size",
                  absl::StrCat(request.gpus),
                  "--page-size",
                  "64",
                  "--enable-hierarchical-cache",
                  "--hicache-mem-layout",
                  "page_first",
                  "--hicache-storage-backend",
                  "dynamic",
                  "--hicache-storage-backend-extra-config",
                  out->settings.dump()};
  out->verify = {absl::StrCat("kvtide doctor --engine sglang --address ", ShellQuoted(request.address)),
                 "# SGLang's log at the start: kvtide: pages of 64 tokens ... rest in kvtided at ..."};
}

void ConnectTransformers(const ConnectRequest& request, Connection* out) {
  out->install = {"pip install 'kvtide[transformers]'"};
  const nlohmann::json model = request.model, address = request.address, pair = out->choice.pair,
                       profile = request.profile;
  out->code = {
      "import kvtide",
      "from transformers import AutoModelForCausalLM, AutoTokenizer",
      "from kvtide.transformers import KvtideCache",
      "",
      absl::StrCat("name = ", model.dump()),
      "tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)",
      "model.set_attn_implementation(\"kvtide\")     # attends where the keys lie; leave it out and they "
      "come back decoded",
      absl::StrCat("pool = kvtide.connect(", address.dump(), ")"),
      absl::StrCat("cache = KvtideCache(model, pool=pool, pair=", pair.dump(),
                   request.profile.empty() ? "" : absl::StrCat(", profile=", profile.dump()), ")"),
      "inputs = tokenizer(\"...\", return_tensors=\"pt\")",
      "model.generate(**inputs, past_key_values=cache)"};
  out->verify = {absl::StrCat("kvtide doctor --engine transformers --address ", ShellQuoted(request.address)),
                 "# print(cache.stored_bytes) after generate"};
  out->notes.push_back("kvtide.connect(\"embedded\") keeps the pool in this process and needs no daemon");
}

void ConnectLlamaCpp(const ConnectRequest& request, Connection* out) {
  out->install = {
      "pip install kvtide     # for slot files and llama-cpp-python; llama-server itself needs nothing"};
  out->command = {"llama-server", "-m", request.model};
  for (const absl::string_view word :
       absl::StrSplit(request.llama_arguments, absl::ByAnyChar(" \n"), absl::SkipEmpty()))
    out->command.emplace_back(word);
  out->command.insert(out->command.end(), {"--slot-save-path", "slots/"});
  const nlohmann::json model = request.model, address = request.address, pair = out->choice.pair;
  out->code = {"import kvtide",
               "from llama_cpp import Llama",
               "from kvtide.llama_cpp import KvtideCache",
               "",
               absl::StrCat("llama = Llama(", model.dump(), ", n_ctx=", request.context, ")"),
               absl::StrCat("llama.set_cache(KvtideCache(llama, pool=kvtide.connect(", address.dump(),
                            "), pair=", pair.dump(), "))")};
  out->verify = {absl::StrCat("kvtide doctor --engine llama.cpp --address ", ShellQuoted(request.address)),
                 absl::StrCat("# a saved slot into kvtided: KVTIDE_ADDRESS=", ShellQuoted(request.address),
                              " python3 -m kvtide.llama_cpp save slots/chat.bin --model MODEL --pair ",
                              out->choice.pair)};
  out->notes.push_back(
      "slot files and states keep the first and the last blocks exact; llama-server's own cache stays in the "
      "types "
      "of its flags");
}

std::string Environment(const Connection& connection) {
  std::string text;
  for (const auto& [name, value] : connection.environment)
    absl::StrAppend(&text, name, "=", ShellQuoted(value), " ");
  return text;
}

}  // namespace

const char* ServingEngineName(ServingEngine engine) { return NameOf(kEngines, engine); }
absl::StatusOr<ServingEngine> ParseServingEngine(const std::string& name) {
  if (name == "llama-server" || name == "llama_cpp" || name == "llamacpp") return ServingEngine::kLlamaCpp;
  return Parse(kEngines, "engine", name);
}

const char* WayName(Way way) { return NameOf(kWays, way); }
absl::StatusOr<Way> ParseWay(const std::string& name) { return Parse(kWays, "--way", name); }

absl::StatusOr<PairChoice> ChoosePair(const ConnectRequest& request) {
  const planner::ContextPlan& plan = request.plan.contexts.front();
  if (request.pair != "auto") {
    for (const Candidate& candidate : plan.candidates) {
      if (candidate.asked.Name() != request.pair) continue;
      if (IsCalibratedPages(candidate, request) && request.profile.empty())
        return absl::InvalidArgumentError(absl::StrCat("--pair ", request.pair, ": ", candidate.asked.k,
                                                       " keys over vLLM's pages need a --profile of keys "
                                                       "after RoPE: make one with kvtide calibrate --keys "
                                                       "after-rope, or take turbo4, turbo3 or turbo2"));
      return Describe(candidate, absl::StrCat("as asked, ", HarmWords(candidate.harm)), request);
    }
    return absl::NotFoundError(absl::StrCat("--pair: the plan has no pair '", request.pair, "'"));
  }
  const bool pages = OwnsPages(request.way);
  const Candidate* best = nullptr;
  const Candidate* smallest = nullptr;
  const auto less_harm = [](const Candidate& a, const Candidate& b) {
    return a.harm.expected_percent != b.harm.expected_percent
               ? a.harm.expected_percent < b.harm.expected_percent
               : a.kv_bytes < b.kv_bytes;
  };
  for (const Candidate& candidate : plan.candidates) {
    if (!Measured(candidate) || IsCalibratedPages(candidate, request)) continue;
    if (smallest == nullptr || candidate.kv_bytes < smallest->kv_bytes ||
        (candidate.kv_bytes == smallest->kv_bytes && less_harm(candidate, *smallest)))
      smallest = &candidate;
    const bool fits = pages ? candidate.fits : candidate.kv_bytes <= request.host_bytes / request.gpus;
    if (fits && (best == nullptr || less_harm(candidate, *best))) best = &candidate;
  }
  const std::string what =
      absl::StrCat(request.sequences, " x ", planner::FormatTokens(plan.context), " tokens");
  const std::string where =
      pages ? "the device" : absl::StrCat(FormatBytes(request.host_bytes), " of host memory");
  if (best != nullptr) {
    return Describe(
        *best,
        absl::StrCat("least measured harm with which ", what, " fit ", where, ", ", HarmWords(best->harm)),
        request);
  }
  if (smallest == nullptr) {
    return absl::FailedPreconditionError(
        "no pair was measured on a model like this one: choose one with --pair, such as q8_0/turbo4, and "
        "measure it "
        "with kvtide eval");
  }
  return Describe(*smallest,
                  absl::StrFormat("smallest pair below %g %% harm (%s fit %s with none), %s",
                                  kMostHarmPercent, what, where, HarmWords(smallest->harm)),
                  request);
}

absl::StatusOr<Connection> MakeConnection(const ConnectRequest& request) {
  if (OwnsPages(request.way) && request.engine != ServingEngine::kVllm) {
    return absl::InvalidArgumentError(absl::StrCat("--way ", WayName(request.way),
                                                   ": only vLLM takes another one's pages; ",
                                                   ServingEngineName(request.engine), " has --way cache"));
  }
  const bool pages_alone = request.engine == ServingEngine::kVllm && request.way == Way::kPages;
  if (!request.profile.empty() && !pages_alone && request.engine != ServingEngine::kTransformers) {
    return absl::InvalidArgumentError(
        "--profile: transformers and vLLM with --way pages code keys by a profile; what rests in kvtided for "
        "others is read by engines that do not have it");
  }
  Connection out;
  out.engine = request.engine;
  out.way = request.way;
  KVTIDE_ASSIGN_OR_RETURN(out.choice, ChoosePair(request));
  if (Caches(request.way)) out.daemon = DaemonCommand(request, out.choice);
  switch (request.engine) {
    case ServingEngine::kVllm:
      ConnectVllm(request, &out);
      break;
    case ServingEngine::kSglang:
      ConnectSglang(request, &out);
      break;
    case ServingEngine::kTransformers:
      ConnectTransformers(request, &out);
      break;
    case ServingEngine::kLlamaCpp:
      ConnectLlamaCpp(request, &out);
      break;
  }
  const int64_t context = request.plan.contexts.front().context;
  const int64_t of_one = out.choice.bytes_of_context;
  if (Caches(request.way) && of_one > 0) {
    out.notes.push_back(
        absl::StrFormat("%s of host memory hold %d tokens, %.2fx of f16: %s for a prompt of %s tokens",
                        FormatBytes(request.host_bytes),
                        static_cast<int64_t>(static_cast<double>(request.host_bytes) /
                                             static_cast<double>(of_one) * static_cast<double>(context)),
                        out.choice.ratio_to_f16, FormatBytes(of_one), planner::FormatTokens(context)));
  }
  return out;
}

std::string RenderConnection(const Connection& connection) {
  std::string text = absl::StrCat("# ", connection.choice.pair, ": ", connection.choice.reason, "\n");
  for (const std::string& note : connection.notes) absl::StrAppend(&text, "# ", note, "\n");
  const auto part = [&text](const char* title) { absl::StrAppend(&text, "\n# ", title, "\n"); };
  part("Install");
  for (const std::string& line : connection.install) absl::StrAppend(&text, line, "\n");
  if (!connection.daemon.empty()) {
    part("Start the daemon");
    absl::StrAppend(&text, ShellLine(connection.daemon), "\n");
  }
  if (!connection.command.empty()) {
    part("Start the engine");
    absl::StrAppend(&text, Environment(connection), ShellLine(connection.command), "\n");
  }
  if (!connection.code.empty()) {
    part("In Python");
    for (const std::string& line : connection.code) absl::StrAppend(&text, line, "\n");
  }
  part("Verify");
  for (const std::string& line : connection.verify) absl::StrAppend(&text, line, "\n");
  return text;
}

std::string RenderConnectionJson(const Connection& connection) {
  nlohmann::ordered_json environment = nlohmann::ordered_json::object();
  for (const auto& [name, value] : connection.environment) environment[name] = value;
  const nlohmann::ordered_json json = {
      {"engine", ServingEngineName(connection.engine)},
      {"way", WayName(connection.way)},
      {"pair", connection.choice.pair},
      {"reason", connection.choice.reason},
      {"bits_per_value", connection.choice.bits_per_value},
      {"ratio_to_f16", connection.choice.ratio_to_f16},
      {"environment", environment},
      {"command", connection.command},
      {"daemon", connection.daemon},
      {"settings", connection.settings},
      {"code", connection.code},
      {"install", connection.install},
      {"verify", connection.verify},
      {"notes", connection.notes},
  };
  return JsonText(json);
}

}  // namespace kvtide::cli
