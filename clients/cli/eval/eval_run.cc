#include "clients/cli/eval/eval_run.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <optional>

#include "absl/strings/str_cat.h"
#include "clients/cli/bundled.h"
#include "clients/cli/daemon_process.h"
#include "clients/cli/eval/eval_state.h"
#include "clients/cli/eval/fp8_kv_store.h"
#include "clients/cli/run_facts.h"
#include "clients/cli/terminal/progress.h"
#include "clients/cpp/pool.h"
#include "clients/engine/daemon_kv_store.h"
#include "clients/engine/key_profile.h"
#include "clients/engine/tokenizer.h"
#include "kernels/base/status.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/tide_maker.h"

namespace kvtide::cli {
namespace {

constexpr char kYardstick[] = "f16/f16";
constexpr int64_t kDefaultMemoryLimit = int64_t{4} << 30;
constexpr int kLayerErrorTokens = 512;
constexpr uint64_t kNeedleSeed = 20260;

uint64_t HashTokens(std::span<const int32_t> tokens) {
  uint64_t hash = 1469598103934665603u;  // FNV-1a
  for (const int32_t token : tokens) {
    for (int i = 0; i < 4; ++i)
      hash = (hash ^ (static_cast<uint32_t>(token) >> (8 * i) & 0xFF)) * 1099511628211u;
  }
  return hash;
}

// Stops the run from inside when the user asks.
absl::Status CheckStop(const std::atomic<bool>& stop) {
  return stop ? absl::CancelledError("stopped by the user") : absl::OkStatus();
}

class EvalRun {
 public:
  EvalRun(const EvalOptions& options, const std::atomic<bool>& stop)
      : options_(options), stop_(stop), pool_(options.threads) {}

  absl::StatusOr<EvalReport> Run() {
    absl::StatusOr<EvalReport> report = Measure();
    // Calls to a daemon that has gone fail in many ways; say what happened. A lost connection is the first
    // that is heard of a death.
    const auto patience = std::chrono::seconds(absl::IsUnavailable(report.status()) ? 2 : 0);
    if (!report.ok() && daemon_ != nullptr && daemon_->EndsWithin(patience)) {
      return absl::UnavailableError(absl::StrCat(
          "the kvtided that was started for this run has died (", report.status().message(),
          "); its last words: ", daemon_->LogTail(),
          options_.state_file.empty() ? ""
                                      : absl::StrCat("\nFinished windows are in ", options_.state_file)));
    }
    return report;
  }

 private:
  absl::StatusOr<EvalReport> Measure() {
    const auto start = std::chrono::steady_clock::now();
    KVTIDE_RETURN_IF_ERROR(Load());
    KVTIDE_RETURN_IF_ERROR(Connect());
    KVTIDE_RETURN_IF_ERROR(ChoosePairs());
    KVTIDE_RETURN_IF_ERROR(Score());
    KVTIDE_RETURN_IF_ERROR(MeasureLayers());
    KVTIDE_RETURN_IF_ERROR(MeasureNeedles());
    EvalReport report = MakeReport();
    report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return report;
  }

  // Where the keys and values of one pair live.
  struct Store {
    std::unique_ptr<engine::KvStore> kv;
    engine::DaemonKvStore* daemon = nullptr;  // kv, when it is one
    double bits = 0;                          // per value, of one that is not
  };

  absl::Status Load() {
    KVTIDE_ASSIGN_OR_RETURN(policy_, ParseWindowPolicy(options_.window_policy));
    folder_ = options_.model_folder;
    if (folder_.empty()) {
      KVTIDE_ASSIGN_OR_RETURN(folder_, BundledModelFolder());
    }
    text_file_ = options_.text_file;
    if (text_file_.empty()) {
      KVTIDE_ASSIGN_OR_RETURN(text_file_, BundledTextFile());
    }
    KVTIDE_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(text_file_));
    KVTIDE_ASSIGN_OR_RETURN(tokenizer_, engine::Tokenizer::Load(folder_));
    KVTIDE_ASSIGN_OR_RETURN(tokens_, tokenizer_->EncodeText(text));
    KVTIDE_ASSIGN_OR_RETURN(model_, engine::LlamaModel::Load(folder_, pool_));
    geometry_ = model_->kv_geometry();
    key_centring_ = options_.key_centring;
    if (!options_.profile_file.empty()) {
      KVTIDE_ASSIGN_OR_RETURN(const engine::KeyProfile profile,
                              engine::ReadKeyProfile(options_.profile_file));
      KVTIDE_RETURN_IF_ERROR(engine::CheckKeyProfile(profile, geometry_));
      KVTIDE_ASSIGN_OR_RETURN(profile_, engine::FormatProfile(profile));
      engine::UseKeyProfile(profile, &geometry_);
      key_centring_ = client::KeyCentring::kCalibrated;
      key_profile_ = profile.text;
      after_rope_ = profile.after_rope;
    }
    const engine::ModelConfig& config = model_->config();
    context_ = options_.context > 0 ? options_.context : std::min(4096, config.max_positions);
    if (context_ > config.max_positions) {
      return absl::InvalidArgumentError(
          absl::StrCat("--context ", context_, " is more than the model's ", config.max_positions));
    }
    if (context_ < 2 || options_.windows < 1)
      return absl::InvalidArgumentError("--context and --windows must be positive");
    windows_ = static_cast<int>(
        std::min<int64_t>(options_.windows, static_cast<int64_t>(tokens_.size()) / context_));
    if (windows_ < options_.windows) {
      return absl::InvalidArgumentError(absl::StrCat(text_file_, " has ", tokens_.size(),
                                                     " tokens: enough for ", windows_, " windows of ",
                                                     context_, ", not ", options_.windows));
    }
    // Chunks of one block see exactly what token by token decoding would see: the blocks of the exact window
    // and their own. When everything is coded at once the chunk changes nothing.
    chunk_ = options_.chunk > 0     ? options_.chunk
             : policy_.seal_at_once ? 512
                                    : static_cast<int>(kBlockTokens);
    return absl::OkStatus();
  }

  int64_t SequenceBytes() const {
    const engine::KvGeometry& g = geometry_;
    const BlockLayout exact({g.layers, g.kv_heads, g.head_dim, g.head_dim}, ExactPair());
    // The blocks of the context, and those that a chunk passes through before they are sealed.
    return static_cast<int64_t>(exact.block_bytes()) * ((context_ + chunk_) / kBlockTokens + 3);
  }

  absl::Status Connect() {
    std::string address = options_.address;
    if (address.empty()) {
      const int64_t limit = options_.memory_bytes > 0 ? options_.memory_bytes : kDefaultMemoryLimit;
      const int64_t asked = options_.pairs.empty() ? 64 : static_cast<int64_t>(options_.pairs.size()) + 1;
      DaemonOptions daemon;
      daemon.program = options_.daemon_program;
      daemon.device_bytes = std::min(limit, asked * SequenceBytes() + (int64_t{16} << 20));
      memory_bytes_ = daemon.device_bytes;
      KVTIDE_ASSIGN_OR_RETURN(daemon_, DaemonProcess::Start(daemon));
      address = daemon_->address();
    }
    client::PoolOptions options;
    options.client.timeout = absl::Minutes(10);
    KVTIDE_ASSIGN_OR_RETURN(client_, client::Pool::Connect("auto:" + address, options));
    KVTIDE_ASSIGN_OR_RETURN(info_, client_->GetServerInfo());
    if (memory_bytes_ == 0) {
      for (const client::TierInfo& tier : info_.tiers) memory_bytes_ += tier.capacity_bytes;
    }
    if (memory_bytes_ < 2 * SequenceBytes()) {
      return absl::ResourceExhaustedError(absl::StrCat("two sequences of ", context_, " tokens need ",
                                                       2 * SequenceBytes(), " bytes, the daemon has ",
                                                       memory_bytes_, "; raise --memory"));
    }
    return absl::OkStatus();
  }

  absl::Status ChoosePairs() {
    std::vector<std::string> wanted = options_.pairs;
    if (wanted.empty()) {
      for (const client::CacheTypeDescription& type : info_.cache_types)
        wanted.push_back(type.name + "/" + type.name);
      for (const client::CacheTypeDescription& type : info_.cache_types) {
        if (type.bits < 8) wanted.push_back("q8_0/" + type.name);
      }
    }
    for (const std::string& text : wanted) {
      KVTIDE_ASSIGN_OR_RETURN(const std::optional<Fp8Pair> fp8, ParseFp8Pair(text));
      if (fp8.has_value() && !policy_.seal_at_once) {
        return absl::InvalidArgumentError(
            absl::StrCat("pair '", text,
                         "': servers with an fp8 cache code every token at once and keep no exact window; "
                         "measure it with --exact-window none"));
      }
      std::string name = fp8.has_value() ? fp8->Name() : "";
      if (!fp8.has_value()) {
        KVTIDE_ASSIGN_OR_RETURN(const CachePair pair, ParseCachePair(text));
        if (Info(pair.k).calibrated && geometry_.key_transforms.empty())
          return absl::InvalidArgumentError(absl::StrCat(
              "pair '", text, "': ", Name(pair.k),
              " needs --profile with transforms of this model's keys; `kvtide calibrate` makes one"));
        name = PairName(pair);
      }
      if (name != kYardstick && std::find(pairs_.begin(), pairs_.end(), name) == pairs_.end())
        pairs_.push_back(name);
    }
    return absl::OkStatus();
  }

  // Vectors of the first tokens of the text, with exact keys and values.
  absl::Status Capture() {
    if (!vectors_.empty()) return absl::OkStatus();
    const size_t n = std::min<size_t>(kLayerErrorTokens, context_);
    KVTIDE_ASSIGN_OR_RETURN(vectors_, CaptureVectors(*model_, pool_, {tokens_.data(), n}));
    return absl::OkStatus();
  }

  absl::StatusOr<Store> MakeStore(const std::string& pair) {
    KVTIDE_ASSIGN_OR_RETURN(const std::optional<Fp8Pair> fp8, ParseFp8Pair(pair));
    if (fp8.has_value()) {
      std::vector<Fp8Scales> scales;
      if (fp8->k == Fp8Side::kCalibrated || fp8->v == Fp8Side::kCalibrated) {
        KVTIDE_RETURN_IF_ERROR(Capture());
        scales = CalibratedScales(vectors_);
      }
      return Store{MakeFp8KvStore(model_->kv_geometry(), *fp8, scales, pool_), nullptr, fp8->bits()};
    }
    client::SequenceOptions sequence;
    sequence.pair = pair;
    sequence.exact_window = policy_.window;
    // The yardstick is exact everywhere: there is nothing to code.
    sequence.seal_at_once = policy_.seal_at_once && pair != kYardstick;
    sequence.key_centring = key_centring_;
    sequence.key_equalising = options_.key_equalising;
    KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<engine::DaemonKvStore> store,
                            engine::DaemonKvStore::Create(*client_, ModelName(), geometry_, sequence));
    engine::DaemonKvStore* daemon = store.get();
    return Store{std::move(store), daemon, 0};
  }

  double ValuesPerToken() const {
    const engine::KvGeometry g = model_->kv_geometry();
    return 2.0 * g.layers * static_cast<double>(g.kv_width());
  }

  std::string ModelName() const {
    return std::filesystem::path(folder_ + "/").lexically_normal().parent_path().filename().string();
  }

  std::string StateKey() const {
    return absl::StrCat(ModelName(), " ", model_->parameters(), " parameters, text ",
                        absl::Hex(HashTokens(tokens_)), ", context ", context_, ", chunk ", chunk_,
                        ", window ", options_.window_policy, ", centring ", static_cast<int>(key_centring_),
                        profile_.hash == 0 ? "" : absl::StrCat(" by ", absl::Hex(profile_.hash)),
                        ", equalising ", static_cast<int>(options_.key_equalising), ", version ",
                        info_.version);
  }

  absl::Status Score() {
    KVTIDE_ASSIGN_OR_RETURN(EvalState state, EvalState::Open(options_.state_file, StateKey()));
    const int per_batch = static_cast<int>(std::max<int64_t>(1, memory_bytes_ / SequenceBytes() - 1));
    const double total =
        static_cast<double>(windows_) * context_ * static_cast<double>(std::max<size_t>(1, pairs_.size()));
    std::optional<Progress> progress;
    if (options_.show_progress) progress.emplace("eval", total, "tokens");
    for (int w = 0; w < windows_; ++w) {
      std::vector<std::string> todo;
      for (const std::string& pair : pairs_) {
        if (!state.Has(pair, w)) todo.push_back(pair);
      }
      if (progress)
        progress->Skip(static_cast<double>(context_) * static_cast<double>(pairs_.size() - todo.size()));
      if (todo.empty() && state.Has(kYardstick, w)) continue;
      for (size_t first = 0; first == 0 || first < todo.size(); first += per_batch) {
        std::vector<std::string> batch = {kYardstick};
        const size_t end = std::min(todo.size(), first + per_batch);
        batch.insert(batch.end(), todo.begin() + static_cast<std::ptrdiff_t>(first),
                     todo.begin() + static_cast<std::ptrdiff_t>(end));
        KVTIDE_RETURN_IF_ERROR(ScoreBatch(w, batch, &state, progress ? &*progress : nullptr));
      }
      KVTIDE_RETURN_IF_ERROR(state.Save());
    }
    if (progress) progress->Finish();
    for (const std::string& pair : pairs_) Collect(state, pair);
    Collect(state, kYardstick);
    return absl::OkStatus();
  }

  absl::Status ScoreBatch(int window, const std::vector<std::string>& batch, EvalState* state,
                          Progress* progress) {
    std::vector<Store> stores;
    WindowRun run;
    run.tokens = {tokens_.data() + static_cast<size_t>(window) * context_, static_cast<size_t>(context_)};
    run.chunk = chunk_;
    for (const std::string& pair : batch) {
      KVTIDE_ASSIGN_OR_RETURN(Store store, MakeStore(pair));
      run.stores.push_back(store.kv.get());
      stores.push_back(std::move(store));
    }
    int before = 0;
    run.progress = [&](int tokens) {
      if (progress != nullptr)
        progress->Add((tokens - before) * static_cast<double>(std::max<size_t>(1, batch.size() - 1)));
      before = tokens;
      return CheckStop(stop_);
    };
    run.finished = [&](size_t s, engine::SequenceId sequence, PredictionScore* score) -> absl::Status {
      if (stores[s].daemon == nullptr) {
        score->stored_tokens = context_;
        score->stored_bytes = static_cast<int64_t>(stores[s].bits / 8 * ValuesPerToken() * context_);
        return absl::OkStatus();
      }
      KVTIDE_ASSIGN_OR_RETURN(const client::SequenceInfo info, stores[s].daemon->Describe(sequence));
      for (const client::TierShare& tier : info.tiers) score->stored_bytes += tier.bytes;
      score->stored_tokens = info.tokens;
      return absl::OkStatus();
    };
    absl::StatusOr<std::vector<PredictionScore>> scores = ScoreWindow(*model_, pool_, run);
    if (!scores.ok()) return Annotate(scores.status(), absl::StrCat("window ", window));
    for (size_t s = 0; s < batch.size(); ++s) state->Put(batch[s], window, (*scores)[s]);
    return absl::OkStatus();
  }

  void Collect(const EvalState& state, const std::string& pair) {
    PredictionScore total;
    for (int w = 0; w < windows_; ++w) total.Merge(state.Get(pair, w));
    totals_.emplace_back(pair, total);
  }

  absl::Status MeasureLayers() {
    if (!options_.layer_errors) return absl::OkStatus();
    KVTIDE_RETURN_IF_ERROR(Capture());
    std::vector<LayerProbe> probes;
    for (size_t l = 0; l < vectors_.size(); ++l)
      probes.emplace_back(ShapeOf(model_->kv_geometry(), static_cast<int>(l)), vectors_[l], pool_);
    for (const auto& [name, score] : totals_) {
      KVTIDE_RETURN_IF_ERROR(CheckStop(stop_));
      KVTIDE_ASSIGN_OR_RETURN(const std::optional<Fp8Pair> fp8, ParseFp8Pair(name));
      if (fp8.has_value()) {  // a probe codes with the formats of the pools
        layers_.emplace_back();
        continue;
      }
      KVTIDE_ASSIGN_OR_RETURN(const CachePair pair, ParseCachePair(name));
      const ProfileOptions profile =
          KeyProfileOptions(pair.k, policy_, key_centring_, options_.key_equalising);
      const bool calibrated = profile_.hash != 0 && Info(pair.k).storage != Storage::kHalf;
      std::vector<LayerError> errors;
      for (size_t l = 0; l < probes.size(); ++l) {
        std::span<const HeadProfile> heads;
        if (calibrated)
          heads = std::span(profile_.k)
                      .subspan(l * static_cast<size_t>(geometry_.kv_heads),
                               static_cast<size_t>(geometry_.kv_heads));
        errors.push_back(probes[l].Measure(pair, profile, policy_, pool_, heads));
      }
      layers_.push_back(std::move(errors));
    }
    return absl::OkStatus();
  }

  absl::Status MeasureNeedles() {
    if (options_.needles == 0) return absl::OkStatus();
    KVTIDE_ASSIGN_OR_RETURN(const NeedleTask task,
                            MakeNeedleTask(*tokenizer_, tokens_, context_, options_.needles, kNeedleSeed));
    std::optional<Progress> progress;
    if (options_.show_progress) progress.emplace("needles", static_cast<double>(totals_.size()), "pairs");
    for (const auto& [pair, score] : totals_) {
      KVTIDE_RETURN_IF_ERROR(CheckStop(stop_));
      KVTIDE_ASSIGN_OR_RETURN(const Store store, MakeStore(pair));
      KVTIDE_ASSIGN_OR_RETURN(std::vector<NeedleScore> scores, AskNeedles(*model_, *store.kv, task, chunk_));
      needles_.push_back(std::move(scores));
      if (progress) progress->Add(1);
    }
    if (progress) progress->Finish();
    return absl::OkStatus();
  }

  EvalReport MakeReport() const {
    EvalReport report;
    report.model = ModelName();
    report.way = client::WayName(client_->way());
    report.text = std::filesystem::path(text_file_).filename().string();
    report.parameters = model_->parameters();
    report.tokens = static_cast<int64_t>(windows_) * context_;
    report.windows = windows_;
    report.context = context_;
    report.chunk = chunk_;
    report.window_policy = options_.window_policy;
    report.key_centring = ChoiceName(key_centring_);
    report.key_equalising = ChoiceName(options_.key_equalising);
    report.key_profile = key_profile_;
    report.after_rope = after_rope_;
    report.version = info_.version;
    report.date = Today();
    report.machine = Machine();
    const PredictionScore& base = totals_.back().second;
    const double values_per_token = ValuesPerToken();
    for (size_t i = 0; i < totals_.size(); ++i) {
      const auto& [pair, score] = totals_[i];
      EvalRow row;
      row.pair = pair;
      row.perplexity = score.Perplexity();
      row.change_percent = 100 * (score.Perplexity() / base.Perplexity() - 1);
      row.kld_mean = score.MeanDivergence();
      row.kld_p99 = score.divergences.Quantile(0.99);
      row.top1_agreement = score.TopAgreement();
      row.bits_per_value = 8.0 * static_cast<double>(score.stored_bytes) /
                           (static_cast<double>(score.stored_tokens) * values_per_token);
      if (!layers_.empty()) row.layers = layers_[i];
      if (!needles_.empty()) row.needles = needles_[i];
      report.rows.push_back(std::move(row));
    }
    SortAndMark(&report.rows);
    return report;
  }

  const EvalOptions& options_;
  const std::atomic<bool>& stop_;
  ThreadPool pool_;
  WindowPolicy policy_;
  std::string folder_, text_file_;
  std::unique_ptr<engine::Tokenizer> tokenizer_;
  std::unique_ptr<engine::LlamaModel> model_;
  engine::KvGeometry geometry_;  // with the profile
  Profile profile_;              // hash 0 = none
  std::string key_profile_;      // its text
  bool after_rope_ = false;      // it codes keys after RoPE
  client::KeyCentring key_centring_ = client::KeyCentring::kDefault;
  std::vector<int32_t> tokens_;
  std::vector<LayerVectors> vectors_;  // of the first tokens, once somebody needs them
  int context_ = 0, windows_ = 0, chunk_ = 0;
  std::unique_ptr<DaemonProcess> daemon_;
  std::unique_ptr<client::Pool> client_;
  client::ServerInfo info_;
  int64_t memory_bytes_ = 0;
  std::vector<std::string> pairs_;                               // without the yardstick
  std::vector<std::pair<std::string, PredictionScore>> totals_;  // pairs_, then the yardstick
  std::vector<std::vector<LayerError>> layers_;                  // as totals_
  std::vector<std::vector<NeedleScore>> needles_;                // as totals_
};

}  // namespace

absl::StatusOr<EvalReport> RunEval(const EvalOptions& options, const std::atomic<bool>& stop) {
  return EvalRun(options, stop).Run();
}

}  // namespace kvtide::cli
