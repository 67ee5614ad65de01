#include "clients/cli/eval/eval_captured.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <map>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "clients/cli/capture/captured_file.h"
#include "clients/cli/eval/state_file.h"
#include "clients/cli/run_facts.h"
#include "clients/cli/terminal/progress.h"
#include "kernels/base/status.h"
#include "kernels/base/thread_pool.h"
#include "kernels/format/block_layout.h"
#include "nlohmann/json.hpp"

namespace kvtide::cli {
namespace {

using nlohmann::json;

constexpr int kCountedQueries = 64;

// Errors by pair and layer.
using Results = std::map<std::pair<std::string, int>, LayerError>;

json ToJson(const Results& results) {
  json entries = json::array();
  for (const auto& [where, e] : results) {
    entries.push_back(
        {{"pair", where.first},
         {"layer", where.second},
         {"error", {e.key, e.value, e.logit, e.output, e.output_cosine, e.weight_kld, e.weight_top1}}});
  }
  return entries;
}

// Throws json::exception for entries of another form.
Results FromJson(const json& entries) {
  Results results;
  for (const json& entry : entries) {
    const json& e = entry.at("error");
    results[{entry.at("pair"), entry.at("layer")}] = {e.at(0), e.at(1), e.at(2), e.at(3),
                                                      e.at(4), e.at(5), e.at(6)};
  }
  return results;
}

absl::StatusOr<std::vector<CachePair>> ChoosePairs(const std::vector<std::string>& wanted) {
  std::vector<CachePair> pairs;
  const auto add = [&](CachePair pair) {
    if (std::find(pairs.begin(), pairs.end(), pair) == pairs.end()) pairs.push_back(pair);
  };
  for (const std::string& text : wanted) {
    KVTIDE_ASSIGN_OR_RETURN(const CachePair pair, ParseCachePair(text));
    if (Info(pair.k).calibrated)
      return absl::InvalidArgumentError(
          absl::StrCat("pair '", text, "': ", Name(pair.k),
                       " needs a profile of the model; measure it with --model and --profile"));
    add(pair);
  }
  if (!wanted.empty()) return pairs;
  const CacheType q8 = *ParseCacheType("q8_0");
  for (const CacheType type : AllCacheTypes()) add({type, type});
  for (const CacheType type : AllCacheTypes()) {
    if (Info(type).bits < 8 && Info(type).storage == Storage::kCodes) add({q8, type});
  }
  return pairs;
}

// Of all layers of a sequence with the file's tokens.
double BitsPerValue(const CapturedFile& file, CachePair pair, const WindowPolicy& policy) {
  double bits = 0, values = 0;
  for (const CapturedLayer& layer : file.layers()) {
    const GroupShape shape{1, layer.shape.kv_heads, layer.shape.head_dim_k, layer.shape.head_dim_v};
    const BlockCounts blocks = policy.Count(layer.tokens);
    bits += 8.0 * (static_cast<double>(blocks.exact) * BlockLayout(shape, ExactPair()).block_bytes() +
                   static_cast<double>(blocks.coded) * BlockLayout(shape, pair).block_bytes());
    values += static_cast<double>(layer.tokens) * layer.shape.kv_heads *
              (layer.shape.head_dim_k + layer.shape.head_dim_v);
  }
  return bits / values;
}

class CapturedRun {
 public:
  CapturedRun(const CapturedOptions& options, CapturedFile file)
      : options_(options), file_(std::move(file)) {}

  absl::StatusOr<CapturedReport> Run(const std::atomic<bool>& stop) {
    const auto start = std::chrono::steady_clock::now();
    KVTIDE_ASSIGN_OR_RETURN(policy_, ParseWindowPolicy(options_.window_policy));
    KVTIDE_ASSIGN_OR_RETURN(pairs_, ChoosePairs(options_.pairs));
    KVTIDE_RETURN_IF_ERROR(Measure(stop));
    CapturedReport report = MakeReport();
    report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return report;
  }

 private:
  std::string StateKey() const {
    return absl::StrCat("captured ", absl::Hex(file_.Hash()), ", window ", options_.window_policy,
                        ", centring ", static_cast<int>(options_.key_centring), ", equalising ",
                        static_cast<int>(options_.key_equalising), ", version ", KVTIDE_VERSION);
  }

  absl::Status Measure(const std::atomic<bool>& stop) {
    const std::string key = options_.state_file.empty() ? "" : StateKey();
    KVTIDE_ASSIGN_OR_RETURN(const json saved, ReadStateFile(options_.state_file, key, "results"));
    try {
      if (!saved.is_null()) results_ = FromJson(saved);
    } catch (const json::exception& error) {
      return NotAState(options_.state_file, error.what());
    }
    ThreadPool pool(options_.threads);
    const int layers = static_cast<int>(file_.layers().size());
    std::optional<Progress> progress;
    if (options_.show_progress)
      progress.emplace("eval", static_cast<double>(layers) * pairs_.size(), "layers");
    for (int l = 0; l < layers; ++l) {
      std::vector<CachePair> todo;
      for (const CachePair pair : pairs_) {
        if (results_.count({PairName(pair), l}) == 0) todo.push_back(pair);
      }
      if (progress) progress->Skip(static_cast<double>(pairs_.size() - todo.size()));
      if (todo.empty()) continue;
      KVTIDE_ASSIGN_OR_RETURN(const LayerVectors vectors, file_.Read(l));
      const LayerProbe probe(file_.layers()[static_cast<size_t>(l)].shape, vectors, pool);
      for (const CachePair pair : todo) {
        if (stop) return absl::CancelledError("stopped by the user");
        results_[{PairName(pair), l}] = probe.Measure(
            pair, KeyProfileOptions(pair.k, policy_, options_.key_centring, options_.key_equalising), policy_,
            pool);
        if (progress) progress->Add(1);
      }
      KVTIDE_RETURN_IF_ERROR(WriteStateFile(options_.state_file, key, "results", ToJson(results_)));
    }
    if (progress) progress->Finish();
    return absl::OkStatus();
  }

  CapturedReport MakeReport() const {
    CapturedReport report;
    report.file = std::filesystem::path(options_.file).filename().string();
    report.model = file_.Metadata(kCaptureModel);
    report.text = file_.Metadata(kCaptureText);
    report.tokens = file_.tokens();
    report.queries = std::min<int64_t>(kCountedQueries, file_.layers().front().queries);
    report.window_policy = options_.window_policy;
    report.key_centring = ChoiceName(options_.key_centring);
    report.key_equalising = ChoiceName(options_.key_equalising);
    report.version = KVTIDE_VERSION;
    report.date = Today();
    report.machine = Machine();
    for (const CachePair pair : pairs_) {
      CapturedRow row;
      row.pair = PairName(pair);
      row.bits_per_value = BitsPerValue(file_, pair, policy_);
      for (int l = 0; l < static_cast<int>(file_.layers().size()); ++l)
        row.layers.push_back(results_.at({row.pair, l}));
      row.mean = MeanError(row.layers);
      report.rows.push_back(std::move(row));
    }
    SortAndMark(&report.rows);
    return report;
  }

  const CapturedOptions& options_;
  const CapturedFile file_;
  WindowPolicy policy_;
  std::vector<CachePair> pairs_;
  Results results_;
};

}  // namespace

absl::StatusOr<CapturedReport> RunEvalCaptured(const CapturedOptions& options,
                                               const std::atomic<bool>& stop) {
  KVTIDE_ASSIGN_OR_RETURN(CapturedFile file, CapturedFile::Open(options.file));
  return CapturedRun(options, std::move(file)).Run(stop);
}

}  // namespace kvtide::cli
