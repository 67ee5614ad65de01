#include "clients/cli/demo/demo_run.h"

#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <iostream>
#include <memory>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "clients/cli/bundled.h"
#include "clients/cli/daemon_process.h"
#include "clients/cli/demo/demo_plan.h"
#include "clients/cli/terminal/progress.h"
#include "clients/cpp/pool.h"
#include "clients/engine/daemon_kv_store.h"
#include "clients/engine/llama_model.h"
#include "clients/engine/local_kv_store.h"
#include "clients/engine/sampler.h"
#include "clients/engine/tokenizer.h"
#include "clients/engine/vector_math.h"
#include "kernels/base/status.h"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

using engine::SequenceId;
using planner::FormatBytes;

constexpr int kPromptChunk = 128;
constexpr int kProbeTokens = 16;  // of a continuation that is compared across tiers
constexpr int64_t kMiB = int64_t{1} << 20;

class Stopwatch {
 public:
  void Start() { start_ = std::chrono::steady_clock::now(); }
  void Stop() {
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  double seconds() const { return seconds_; }

 private:
  std::chrono::steady_clock::time_point start_;
  double seconds_ = 0;
};

class DemoRun {
 public:
  explicit DemoRun(const DemoOptions& options)
      : options_(options),
        pool_(options.threads),
        sampler_({options.temperature, 40, options.seed}),
        out_(Terminal::Of(1)) {}

  absl::StatusOr<DemoReport> Run() {
    KVTIDE_RETURN_IF_ERROR(Load());
    KVTIDE_RETURN_IF_ERROR(Plan());
    KVTIDE_RETURN_IF_ERROR(StartDaemon());
    KVTIDE_RETURN_IF_ERROR(ReadPrompt());
    KVTIDE_RETURN_IF_ERROR(GenerateText());
    KVTIDE_RETURN_IF_ERROR(LookAtMemory());
    KVTIDE_RETURN_IF_ERROR(ForkParkResumeEvict());
    KVTIDE_RETURN_IF_ERROR(MeasureReference());
    KVTIDE_RETURN_IF_ERROR(ReusePrefix());
    return report_;
  }

 private:
  void Say(const std::string& text) const {
    if (options_.narrate) std::cout << PrintableLines(text) << std::flush;
  }
  void Heading(const std::string& text) const {
    Say(absl::StrCat("\n", out_.Painted(text, Paint::kBold), "\n"));
  }

  absl::Status Load() {
    std::string folder = options_.model_folder;
    if (folder.empty()) {
      KVTIDE_ASSIGN_OR_RETURN(folder, BundledModelFolder());
    }
    KVTIDE_ASSIGN_OR_RETURN(tokenizer_, engine::Tokenizer::Load(folder));
    std::optional<Progress> progress;
    if (options_.show_progress) progress.emplace("loading", 100, "%");
    KVTIDE_ASSIGN_OR_RETURN(model_, engine::LlamaModel::Load(folder, pool_, [&](double share) {
                              if (progress) progress->Update(100 * share);
                            }));
    if (progress) progress->Finish();
    report_.model = std::filesystem::path(folder + "/").lexically_normal().parent_path().filename().string();
    report_.parameters = model_->parameters();
    report_.seed = options_.seed;
    return ReadText();
  }

  absl::Status ReadText() {
    std::string text = options_.prompt;
    report_.text = "--prompt";
    if (text.empty()) {
      std::string file = options_.text_file;
      if (file.empty()) {
        KVTIDE_ASSIGN_OR_RETURN(file, BundledTextFile());
      }
      KVTIDE_ASSIGN_OR_RETURN(text, ReadTextFile(file));
      report_.text = std::filesystem::path(file).filename().string();
    }
    KVTIDE_ASSIGN_OR_RETURN(prompt_, tokenizer_->EncodeText(text));
    const engine::ModelConfig& config = model_->config();
    context_ = options_.context > 0 ? options_.context : std::min(4096, config.max_positions);
    if (context_ > config.max_positions) {
      return absl::InvalidArgumentError(absl::StrCat("--context ", context_, " is more than the ",
                                                     config.max_positions, " tokens of the model"));
    }
    // Behind the prompt: the generated text twice (two branches) and the compared continuations.
    const int behind = 2 * options_.generate + kProbeTokens + 1;
    if (options_.generate < 1 || context_ < behind + 2) {
      return absl::InvalidArgumentError(absl::StrCat("--context ", context_,
                                                     " leaves no room for a prompt before ", behind,
                                                     " tokens; raise it or lower --generate"));
    }
    prompt_.resize(std::min<size_t>(prompt_.size(), context_ - behind));
    report_.context = context_;
    report_.prompt_tokens = static_cast<int64_t>(prompt_.size());
    return absl::OkStatus();
  }

  absl::Status Plan() {
    const engine::KvGeometry g = model_->kv_geometry();
    const int64_t f16 = ExactBlockBytes(g) * ((context_ + 63) / 64);
    const auto up = [](int64_t bytes) { return (bytes + kMiB - 1) / kMiB * kMiB; };
    report_.device_memory_bytes =
        options_.device_bytes > 0 ? options_.device_bytes : up(f16 / 2 + 4 * ExactBlockBytes(g));
    report_.host_memory_bytes = options_.host_bytes > 0 ? options_.host_bytes : up(3 * f16);
    std::string asked;
    if (!options_.cache_type_k.empty() || !options_.cache_type_v.empty()) {
      const std::string& k = options_.cache_type_k.empty() ? options_.cache_type_v : options_.cache_type_k;
      asked = absl::StrCat(k, "/", options_.cache_type_v.empty() ? k : options_.cache_type_v);
    }
    KVTIDE_ASSIGN_OR_RETURN(
        const DemoPlan plan,
        PlanDemo(report_.model, g, context_, report_.device_memory_bytes, report_.host_memory_bytes, asked));
    report_.pair = plan.pair;
    report_.pair_reason = plan.reason;
    report_.pair_measured = plan.measured;
    report_.f16_bytes = plan.f16_bytes;
    report_.planned_bytes = plan.pair_bytes;
    report_.f16_bytes_per_token = ExactBlockBytes(g) / 64;
    Heading("Plan");
    Say(absl::StrCat(report_.model, ", ", CountText(static_cast<double>(report_.parameters)), " parameters, ",
                     context_, " tokens of context, ", FormatBytes(report_.device_memory_bytes),
                     " device tier, ", FormatBytes(report_.host_memory_bytes), " host tier\n"));
    Say(absl::StrCat("  f16/f16  ", FormatBytes(plan.f16_bytes),
                     plan.f16_fits ? ": fits the device tier\n" : ": does not fit the device tier\n"));
    std::string harm = "harm not measured";
    if (plan.measured) harm = absl::StrFormat("measured harm %+.2f %% perplexity", plan.change_percent);
    Say(absl::StrCat("  ", out_.Painted(plan.pair, Paint::kGreen), "  ", FormatBytes(plan.pair_bytes), ": ",
                     plan.reason, plan.fits ? ", " : " and does not fit the device tier, ", harm, "\n"));
    return absl::OkStatus();
  }

  absl::Status StartDaemon() {
    DaemonOptions daemon;
    daemon.program = options_.daemon_program;
    daemon.device_bytes = report_.device_memory_bytes;
    daemon.host_bytes = report_.host_memory_bytes;
    KVTIDE_ASSIGN_OR_RETURN(daemon_, DaemonProcess::Start(daemon));
    client::PoolOptions pool;
    pool.client.timeout = absl::Minutes(10);
    KVTIDE_ASSIGN_OR_RETURN(client_, client::Pool::Connect("auto:" + daemon_->address(), pool));
    report_.way = client::WayName(client_->way());
    client::SequenceOptions sequence;
    sequence.pair = report_.pair;
    sequence.allow_drop = true;
    KVTIDE_ASSIGN_OR_RETURN(
        store_, engine::DaemonKvStore::Create(*client_, report_.model, model_->kv_geometry(), sequence));
    Say(absl::StrCat("kvtided runs as process ", daemon_->pid(), " on ", daemon_->address(), ", reached by ",
                     report_.way, "\n"));
    return absl::OkStatus();
  }

  // Feeds the prompt; returns the sum of the losses of its tokens and leaves the logits behind the last one.
  absl::StatusOr<double> Feed(engine::KvStore& store, SequenceId sequence, const std::string& label,
                              Stopwatch* watch) {
    std::optional<Progress> progress;
    if (options_.show_progress) progress.emplace(label, static_cast<double>(prompt_.size()), "tokens");
    const size_t vocab = model_->config().vocab_size;
    const std::span<const int32_t> prompt = prompt_;
    std::vector<float> hidden, logits(kPromptChunk * vocab);
    double loss = 0;
    for (size_t at = 0; at < prompt.size(); at += kPromptChunk) {
      const size_t n = std::min<size_t>(kPromptChunk, prompt.size() - at);
      watch->Start();
      KVTIDE_RETURN_IF_ERROR(model_->Forward(store, sequence, at, prompt.subspan(at, n), &hidden));
      watch->Stop();
      model_->Logits(hidden.data(), static_cast<int>(n), logits.data());
      for (size_t i = 0; i < n && at + i + 1 < prompt.size(); ++i) {
        const float* row = logits.data() + i * vocab;
        loss += engine::LogSumExp(row, vocab) - row[prompt[at + i + 1]];
      }
      last_logits_.assign(logits.begin() + static_cast<std::ptrdiff_t>((n - 1) * vocab),
                          logits.begin() + static_cast<std::ptrdiff_t>(n * vocab));
      if (progress) progress->Update(static_cast<double>(at + n));
    }
    if (progress) progress->Finish();
    return loss;
  }

  double PromptPerplexity(double loss) const {
    return prompt_.size() > 1 ? std::exp(loss / static_cast<double>(prompt_.size() - 1)) : 0;
  }

  absl::Status ReadPrompt() {
    Heading("Prompt");
    Say(absl::StrCat(report_.text, ", ", prompt_.size(), " tokens\n"));
    KVTIDE_ASSIGN_OR_RETURN(main_, store_->CreateSequence());
    Stopwatch watch;
    KVTIDE_ASSIGN_OR_RETURN(const double loss, Feed(*store_, main_, "prompt", &watch));
    report_.perplexity = PromptPerplexity(loss);
    report_.prompt_tokens_per_second = static_cast<double>(prompt_.size()) / watch.seconds();
    length_ = static_cast<int64_t>(prompt_.size());
    return absl::OkStatus();
  }

  // The logits behind `token` at `position` of a sequence.
  absl::StatusOr<std::vector<float>> Step(SequenceId sequence, int64_t position, int32_t token) {
    std::vector<float> hidden, logits(model_->config().vocab_size);
    KVTIDE_RETURN_IF_ERROR(model_->Forward(*store_, sequence, position, {&token, 1}, &hidden));
    model_->Logits(hidden.data(), 1, logits.data());
    return logits;
  }

  // Goes on from last_logits_ for up to `n` tokens, printed as they come; the last picked token is not
  // appended.
  absl::StatusOr<int32_t> Continue(SequenceId sequence, int64_t* length, int n, engine::Sampler* sampler,
                                   std::string* text, int64_t* generated) {
    engine::TextStream stream(*tokenizer_);
    int32_t token = sampler->Pick(last_logits_);
    for (int i = 0; i < n; ++i) {
      const std::string part = stream.Add(token);
      *text += part;
      Say(part);
      KVTIDE_ASSIGN_OR_RETURN(last_logits_, Step(sequence, (*length)++, token));
      ++*generated;
      token = sampler->Pick(last_logits_);
      const std::vector<int32_t>& ends = model_->config().eos_tokens;
      if (std::find(ends.begin(), ends.end(), token) != ends.end()) break;
    }
    *text += stream.Finish();
    return token;
  }

  absl::Status GenerateText() {
    Heading("Generated");
    Say(out_.Painted(
        "... " + tokenizer_->Decode({prompt_.data() + prompt_.size() - std::min<size_t>(24, prompt_.size()),
                                     std::min<size_t>(24, prompt_.size())}),
        Paint::kDim));
    Stopwatch watch;
    watch.Start();
    KVTIDE_ASSIGN_OR_RETURN(next_, Continue(main_, &length_, options_.generate, &sampler_, &report_.generated,
                                            &report_.generated_tokens));
    watch.Stop();
    report_.generated_tokens_per_second = static_cast<double>(report_.generated_tokens) / watch.seconds();
    Say("\n");
    return absl::OkStatus();
  }

  absl::Status LookAtMemory() {
    KVTIDE_ASSIGN_OR_RETURN(const client::SequenceInfo info, store_->Describe(main_));
    for (const client::TierShare& tier : info.tiers) report_.stored_bytes += tier.bytes;
    report_.stored_tokens = info.tokens;
    KVTIDE_ASSIGN_OR_RETURN(const DemoPlan plan,
                            PlanDemo(report_.model, model_->kv_geometry(), info.tokens,
                                     report_.device_memory_bytes, report_.host_memory_bytes, report_.pair));
    report_.predicted_bytes = plan.pair_bytes;
    KVTIDE_ASSIGN_OR_RETURN(const client::ServerStats stats, client_->GetStats());
    for (const client::TierStats& tier : stats.tiers) {
      report_.tiers.push_back({tier.name, tier.capacity_bytes, tier.used_bytes, tier.blocks});
    }
    KVTIDE_ASSIGN_OR_RETURN(probe_, Probe());
    return absl::OkStatus();
  }

  // The greedy continuation of the main branch, on a fork that is closed again.
  absl::StatusOr<std::vector<int32_t>> Probe() {
    KVTIDE_ASSIGN_OR_RETURN(const SequenceId fork, store_->Fork(main_));
    std::vector<int32_t> tokens;
    int32_t token = next_;
    for (int i = 0; i < kProbeTokens; ++i) {
      KVTIDE_ASSIGN_OR_RETURN(const std::vector<float> logits, Step(fork, length_ + i, token));
      token = engine::ArgMax(logits);
      tokens.push_back(token);
    }
    KVTIDE_RETURN_IF_ERROR(store_->Close(fork));
    return tokens;
  }

  // Compares the continuation with that from before all steps.
  absl::Status Check(DemoStep* step) {
    KVTIDE_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, Probe());
    step->checked = true;
    step->same_tokens = tokens == probe_;
    return absl::OkStatus();
  }

  absl::Status AddStep(DemoStep step) {
    const bool good = !step.checked || step.same_tokens;
    Say(absl::StrCat(
        "  ", out_.Painted(absl::StrFormat("%-8s", step.name), good ? Paint::kCyan : Paint::kRed), step.what,
        !step.checked ? ""
        : good        ? "; same continuation"
                      : "; THE CONTINUATION DIFFERS",
        "\n"));
    report_.steps.push_back(std::move(step));
    return absl::OkStatus();
  }

  absl::Status CheckAndAdd(DemoStep step) {
    KVTIDE_RETURN_IF_ERROR(Check(&step));
    return AddStep(std::move(step));
  }

  absl::Status ForkParkResumeEvict() {
    Heading("Fork, park, resume, evict");
    KVTIDE_ASSIGN_OR_RETURN(const SequenceId branch, store_->Fork(main_));
    KVTIDE_RETURN_IF_ERROR(GrowBranch(branch));
    KVTIDE_RETURN_IF_ERROR(Park(branch));
    KVTIDE_RETURN_IF_ERROR(Resume(branch));
    KVTIDE_RETURN_IF_ERROR(Evict(branch));
    KVTIDE_ASSIGN_OR_RETURN(const client::ServerStats stats, client_->GetStats());
    report_.moves = stats.moves;
    report_.moved_bytes = stats.moved_bytes;
    return absl::OkStatus();
  }

  absl::Status GrowBranch(SequenceId branch) {
    KVTIDE_ASSIGN_OR_RETURN(const client::SequenceInfo before, store_->Describe(branch));
    engine::Sampler sampler({options_.temperature > 0 ? options_.temperature : 0.8f, 40, options_.seed + 1});
    branch_length_ = length_;
    std::string text;
    int64_t generated = 0;
    const bool narrate = options_.narrate;
    options_.narrate = false;
    const absl::StatusOr<int32_t> next =
        Continue(branch, &branch_length_, options_.generate, &sampler, &text, &generated);
    options_.narrate = narrate;
    KVTIDE_RETURN_IF_ERROR(next.status());
    branch_next_ = *next;
    return CheckAndAdd({"fork", absl::StrCat("a second branch shares ", before.shared_blocks,
                                             " blocks and went on by ", generated, " tokens of its own")});
  }

  absl::Status Park(SequenceId branch) {
    KVTIDE_ASSIGN_OR_RETURN(const client::MoveResult own, client_->EvictSequences({{branch}}));
    KVTIDE_RETURN_IF_ERROR(CheckAndAdd(
        {"park",
         absl::StrCat("the branch rests: ", own.blocks, " blocks of its own (", FormatBytes(own.bytes),
                      ") went to the host tier, ", own.shared_blocks,
                      " shared ones stay for the main branch (evict both together to park those too)"),
         own.blocks, own.bytes}));
    KVTIDE_ASSIGN_OR_RETURN(const client::MoveResult all, client_->EvictSequences({{main_, branch}}));
    KVTIDE_ASSIGN_OR_RETURN(const client::ServerStats parked, client_->GetStats());
    const int64_t promoted_before = PromotedBlocks(parked);
    DemoStep step{"park",
                  absl::StrCat("both rest: ", all.blocks, " more blocks (", FormatBytes(all.bytes),
                               ") went to the host tier"),
                  all.blocks, all.bytes};
    KVTIDE_RETURN_IF_ERROR(Check(&step));
    KVTIDE_ASSIGN_OR_RETURN(const client::ServerStats after, client_->GetStats());
    promoted_ = PromotedBlocks(after) - promoted_before;
    absl::StrAppend(&step.what, ", attended there (",
                    after.attended_blocks_below_first_tier - parked.attended_blocks_below_first_tier,
                    " block reads)");
    return AddStep(std::move(step));
  }

  static int64_t PromotedBlocks(const client::ServerStats& stats) {
    return stats.tiers.empty() ? 0 : stats.tiers[0].promoted_blocks;
  }

  absl::Status Resume(SequenceId branch) {
    KVTIDE_ASSIGN_OR_RETURN(const client::MoveResult back, client_->PrefetchSequences({{main_, branch}}));
    DemoStep step{
        "resume",
        absl::StrCat(back.blocks, " blocks (", FormatBytes(back.bytes), ") came back to the device tier"),
        back.blocks, back.bytes};
    if (promoted_ > 0)
      absl::StrAppend(&step.what, " behind ", promoted_, " that came back by themselves when they were used");
    if (back.blocks_left > 0) absl::StrAppend(&step.what, ", ", back.blocks_left, " stayed for want of room");
    return CheckAndAdd(std::move(step));
  }

  absl::Status Evict(SequenceId branch) {
    client::EvictOptions drop;
    drop.drop = true;
    KVTIDE_ASSIGN_OR_RETURN(const client::MoveResult gone, client_->EvictSequences({{branch}}, drop));
    const absl::Status attended = Step(branch, branch_length_, branch_next_).status();
    if (gone.dropped_blocks > 0 && attended.code() != absl::StatusCode::kDataLoss) {
      return absl::InternalError(
          absl::StrCat("attending over dropped tokens gave ", attended.ToString(), " instead of DATA_LOSS"));
    }
    KVTIDE_RETURN_IF_ERROR(store_->Close(branch));
    return CheckAndAdd(
        {"evict",
         absl::StrCat("the branch's own ", gone.dropped_blocks, " blocks were dropped; attending it is ",
                      absl::StatusCodeToString(attended.code()), ", the main branch lost nothing"),
         gone.dropped_blocks, 0});
  }

  absl::Status MeasureReference() {
    if (!options_.reference) return absl::OkStatus();
    engine::LocalKvStore local(model_->kv_geometry(), DataType::kF16, pool_);
    KVTIDE_ASSIGN_OR_RETURN(const SequenceId sequence, local.CreateSequence());
    Stopwatch watch;
    KVTIDE_ASSIGN_OR_RETURN(const double loss, Feed(local, sequence, "the same text with f16", &watch));
    report_.f16_perplexity = PromptPerplexity(loss);
    return absl::OkStatus();
  }

  // A prompt that begins with seven eighths of the demo's, in a daemon of its own with a disk tier.
  absl::Status ReusePrefix() {
    constexpr size_t kLeast = 8 * 64, kExact = 2 * 64;  // the end of a sequence is not shared
    if (!options_.reuse || prompt_.size() < kLeast) return absl::OkStatus();
    const size_t shared = std::min(prompt_.size() * 7 / 8, prompt_.size() - kExact) / 64 * 64;
    std::vector<int32_t> asked(prompt_.begin(), prompt_.begin() + static_cast<std::ptrdiff_t>(shared));
    // Another end: the text's beginning once more.
    asked.insert(asked.end(), prompt_.begin(),
                 prompt_.begin() + static_cast<std::ptrdiff_t>(prompt_.size() - shared));
    DemoReuse& reuse = report_.reuse;
    reuse.prompt_tokens = static_cast<int64_t>(asked.size());
    reuse.shared_tokens = static_cast<int64_t>(shared);
    Heading("Prefix reuse");
    Say(absl::StrCat(asked.size(), " tokens, of which the first ", shared,
                     " are those of an earlier prompt\n"));

    std::string folder = (std::filesystem::temp_directory_path() / "kvtide-demo-XXXXXX").string();
    if (mkdtemp(folder.data()) == nullptr)
      return absl::InternalError(absl::StrCat("cannot make a folder ", folder));
    struct Folder {
      std::string path;
      ~Folder() {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
      }
    } const disk{folder};
    store_.reset();
    client_.reset();
    daemon_.reset();
    KVTIDE_RETURN_IF_ERROR(StartReuseDaemon(disk.path));
    {
      KVTIDE_ASSIGN_OR_RETURN(const SequenceId alone, store_->CreateSequence());
      KVTIDE_ASSIGN_OR_RETURN(const FirstToken computed, TimeFirstToken(alone, asked, 0));
      KVTIDE_RETURN_IF_ERROR(ForgetModel(alone));
      reuse.computed_seconds = computed.seconds;
      reuse.computed_perplexity = computed.perplexity;
    }
    Say(absl::StrFormat("  %-8s the first token after %.2f s: all %d tokens are computed\n", "alone",
                        reuse.computed_seconds, asked.size()));
    // The earlier prompt: computed, made durable, closed.
    KVTIDE_ASSIGN_OR_RETURN(const SequenceId earlier, store_->CreateSequence());
    KVTIDE_RETURN_IF_ERROR(TimeFirstToken(earlier, prompt_, 0).status());
    KVTIDE_RETURN_IF_ERROR(client_->PersistSequences({{earlier}}).status());
    KVTIDE_RETURN_IF_ERROR(store_->Close(earlier));
    KVTIDE_RETURN_IF_ERROR(TimeReuse(asked, shared, "in the same daemon"));
    store_.reset();
    client_.reset();
    daemon_.reset();
    KVTIDE_RETURN_IF_ERROR(StartReuseDaemon(disk.path));
    return TimeReuse(asked, shared, "after a restart");
  }

  absl::Status StartReuseDaemon(const std::string& disk) {
    DaemonOptions daemon;
    daemon.program = options_.daemon_program;
    daemon.device_bytes = 4 * report_.f16_bytes;
    daemon.host_bytes = report_.host_memory_bytes;
    daemon.disk = absl::StrCat(disk, ":", 4 * report_.f16_bytes);
    KVTIDE_ASSIGN_OR_RETURN(daemon_, DaemonProcess::Start(daemon));
    client::PoolOptions pool;
    pool.client.timeout = absl::Minutes(10);
    KVTIDE_ASSIGN_OR_RETURN(client_, client::Pool::Connect("auto:" + daemon_->address(), pool));
    return MakeStore();
  }

  absl::Status MakeStore() {
    client::SequenceOptions sequence;
    sequence.pair = report_.pair;
    KVTIDE_ASSIGN_OR_RETURN(
        store_, engine::DaemonKvStore::Create(*client_, report_.model, model_->kv_geometry(), sequence));
    return absl::OkStatus();
  }

  // Nothing of the sequence is cached afterwards.
  absl::Status ForgetModel(SequenceId sequence) {
    KVTIDE_RETURN_IF_ERROR(store_->Close(sequence));
    KVTIDE_RETURN_IF_ERROR(client_->UnregisterModel(report_.model));
    return MakeStore();
  }

  struct FirstToken {
    double seconds = 0;     // to the logits behind the last token
    double perplexity = 0;  // of the last eighth
  };
  // Appends the tokens from `at` on.
  absl::StatusOr<FirstToken> TimeFirstToken(SequenceId sequence, std::span<const int32_t> tokens, size_t at) {
    std::optional<Progress> progress;
    if (options_.show_progress) progress.emplace("tokens", static_cast<double>(tokens.size()), "tokens");
    const size_t vocab = model_->config().vocab_size, width = model_->config().hidden_size;
    const size_t scored = tokens.size() * 7 / 8 / 64 * 64;
    std::vector<float> hidden, logits(kPromptChunk * vocab), tail;
    Stopwatch watch;
    for (size_t n = 0; at < tokens.size(); at += n) {
      n = std::min<size_t>(kPromptChunk, tokens.size() - at);
      watch.Start();
      KVTIDE_RETURN_IF_ERROR(
          model_->Forward(*store_, sequence, static_cast<int64_t>(at), tokens.subspan(at, n), &hidden));
      if (at + n == tokens.size()) model_->Logits(hidden.data() + (n - 1) * width, 1, logits.data());
      watch.Stop();
      for (size_t i = 0; i < n; i++)
        if (at + i >= scored)
          tail.insert(tail.end(), hidden.begin() + static_cast<std::ptrdiff_t>(i * width),
                      hidden.begin() + static_cast<std::ptrdiff_t>((i + 1) * width));
      if (progress) progress->Update(static_cast<double>(at + n));
    }
    if (progress) progress->Finish();
    double loss = 0;
    const size_t rows = tail.size() / width;
    for (size_t from = 0; from < rows; from += kPromptChunk) {
      const size_t n = std::min<size_t>(kPromptChunk, rows - from);
      model_->Logits(tail.data() + from * width, static_cast<int>(n), logits.data());
      for (size_t i = 0; i < n; i++) {
        const size_t next = scored + from + i + 1;
        if (next < tokens.size())
          loss += engine::LogSumExp(logits.data() + i * vocab, vocab) -
                  logits[i * vocab + static_cast<size_t>(tokens[next])];
      }
    }
    return FirstToken{watch.seconds(), rows > 1 ? std::exp(loss / static_cast<double>(rows - 1)) : 0};
  }

  absl::Status TimeReuse(std::span<const int32_t> asked, size_t shared, const std::string& what) {
    Stopwatch watch;
    watch.Start();
    KVTIDE_ASSIGN_OR_RETURN(const engine::DaemonKvStore::Begun begun, store_->Begin(asked));
    watch.Stop();
    if (begun.tokens != static_cast<int64_t>(shared))
      return absl::InternalError(absl::StrCat("the daemon has ", begun.tokens, " tokens of the prompt ", what,
                                              ", expected ", shared));
    KVTIDE_ASSIGN_OR_RETURN(const FirstToken first,
                            TimeFirstToken(begun.sequence, asked, static_cast<size_t>(begun.tokens)));
    KVTIDE_RETURN_IF_ERROR(store_->Close(begun.sequence));
    DemoReuse& reuse = report_.reuse;
    DemoReuse::Way& way = reuse.ways.emplace_back();
    way.what = what;
    way.tier = begun.tiers.empty() ? "" : begun.tiers.back().first;
    way.reused_tokens = begun.tokens;
    way.seconds = watch.seconds() + first.seconds;
    way.perplexity = first.perplexity;
    Say(absl::StrFormat(
        "  %-8s %s the first token after %.2f s (%.0f %%): %d tokens come from the %s tier; perplexity "
        "of the others %.4f, computed %.4f\n",
        "reuse", what, way.seconds, 100 * way.seconds / reuse.computed_seconds, begun.tokens, way.tier,
        way.perplexity, reuse.computed_perplexity));
    return absl::OkStatus();
  }

  DemoOptions options_;
  ThreadPool pool_;
  engine::Sampler sampler_;
  const Terminal out_;
  DemoReport report_;
  std::unique_ptr<engine::Tokenizer> tokenizer_;
  std::unique_ptr<engine::LlamaModel> model_;
  std::vector<int32_t> prompt_;
  int context_ = 0;
  std::unique_ptr<DaemonProcess> daemon_;
  std::unique_ptr<client::Pool> client_;
  std::unique_ptr<engine::DaemonKvStore> store_;
  SequenceId main_ = 0;
  int64_t length_ = 0, branch_length_ = 0;  // tokens of the two branches
  int32_t next_ = 0, branch_next_ = 0;      // picked, not yet appended
  std::vector<float> last_logits_;
  std::vector<int32_t> probe_;
  int64_t promoted_ = 0;  // blocks that attention brought back while both rested
};

}  // namespace

absl::StatusOr<DemoReport> RunDemo(const DemoOptions& options) { return DemoRun(options).Run(); }

}  // namespace kvtide::cli
