#include "clients/cli/capture/capture.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "clients/cli/bundled.h"
#include "clients/cli/capture/capture_writer.h"
#include "clients/cli/capture/captured_file.h"
#include "clients/cli/terminal/command_status.h"
#include "clients/cli/terminal/file_checks.h"
#include "clients/cli/terminal/interrupt.h"
#include "clients/cli/terminal/number_checks.h"
#include "clients/cli/terminal/progress.h"
#include "clients/cli/terminal/terminal.h"
#include "clients/engine/capture_kv_store.h"
#include "clients/engine/local_kv_store.h"
#include "clients/engine/tokenizer.h"
#include "kernels/base/status.h"

namespace kvtide::cli {
namespace {

constexpr int kChunk = 512;

struct CaptureFlags {
  std::string model_folder, text_file, out_file, dtype = "f32";
  int tokens = 512, queries = 0, threads = 0;
  bool no_progress = false;
};

// The first tokens of the text, as `kvtide eval` reads it.
absl::StatusOr<std::vector<int32_t>> ReadTokens(const std::string& folder, const std::string& text_file,
                                                const engine::ModelConfig& config, int wanted) {
  KVTIDE_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(text_file));
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<engine::Tokenizer> tokenizer,
                          engine::Tokenizer::Load(folder));
  KVTIDE_ASSIGN_OR_RETURN(std::vector<int32_t> tokens, tokenizer->EncodeText(text));
  if (static_cast<int64_t>(tokens.size()) < wanted) {
    return absl::InvalidArgumentError(
        absl::StrCat(text_file, " has ", tokens.size(), " tokens, fewer than --tokens ", wanted));
  }
  if (wanted > config.max_positions) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tokens ", wanted, " is more than the model's ", config.max_positions));
  }
  tokens.resize(static_cast<size_t>(wanted));
  return tokens;
}

absl::Status RunCapture(CaptureFlags flags, const std::atomic<bool>& stop) {
  if (flags.model_folder.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(flags.model_folder, BundledModelFolder());
  }
  if (flags.text_file.empty()) {
    KVTIDE_ASSIGN_OR_RETURN(flags.text_file, BundledTextFile());
  }
  ThreadPool pool(flags.threads);
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<engine::LlamaModel> model,
                          engine::LlamaModel::Load(flags.model_folder, pool));
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens,
                          ReadTokens(flags.model_folder, flags.text_file, model->config(), flags.tokens));
  const engine::KvGeometry geometry = model->kv_geometry();
  CaptureShape shape{geometry, flags.tokens,
                     flags.queries > 0 ? std::min(flags.queries, flags.tokens) : flags.tokens,
                     flags.dtype == "f16"    ? DataType::kF16
                     : flags.dtype == "bf16" ? DataType::kBf16
                                             : DataType::kF32};
  namespace fs = std::filesystem;
  std::map<std::string, std::string> metadata = {
      {"format", "kvtide-capture-1"},
      {kCaptureModel,
       fs::path(flags.model_folder + "/").lexically_normal().parent_path().filename().string()},
      {kCaptureText, fs::path(flags.text_file).filename().string()},
      {kCaptureRope, "applied"},
      {kCaptureScale, absl::StrFormat("%.9g", geometry.scale())}};
  if (!geometry.layer_windows.empty() || geometry.softcap > 0)
    return absl::UnimplementedError(
        "kvtide capture: the file's format has one window for all layers and no soft-cap; this model has "
        "more");
  if (geometry.sliding_window > 0) metadata[kCaptureWindow] = absl::StrCat(geometry.sliding_window);
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<CaptureWriter> writer,
                          CaptureWriter::Create(flags.out_file, shape, metadata));
  engine::LocalKvStore exact(geometry, DataType::kF32, pool);
  absl::Status written;
  engine::CaptureKvStore store(
      exact, [&](int layer, int64_t start, int n, const float* q, const float* k, const float* v) {
        written.Update(writer->Write(layer, start, n, q, k, v));
      });
  KVTIDE_ASSIGN_OR_RETURN(const engine::SequenceId sequence, store.CreateSequence());
  std::optional<Progress> progress;
  if (!flags.no_progress) progress.emplace("capture", static_cast<double>(tokens.size()), "tokens");
  std::vector<float> hidden;
  for (size_t at = 0; at < tokens.size(); at += kChunk) {
    if (stop) return absl::CancelledError("stopped by the user");
    const size_t n = std::min<size_t>(kChunk, tokens.size() - at);
    KVTIDE_RETURN_IF_ERROR(
        model->Forward(store, sequence, static_cast<int64_t>(at), {tokens.data() + at, n}, &hidden));
    KVTIDE_RETURN_IF_ERROR(written);
    if (progress) progress->Add(static_cast<double>(n));
  }
  KVTIDE_RETURN_IF_ERROR(writer->Finish());
  if (progress) progress->Finish();
  std::printf("%s: %d layers, %d tokens, queries of the last %d, %s, %.1f MiB\n",
              Printable(flags.out_file).c_str(), geometry.layers, flags.tokens,
              static_cast<int>(shape.queries), DataTypeName(shape.type),
              static_cast<double>(writer->bytes()) / (1 << 20));
  return absl::OkStatus();
}

}  // namespace

void AddCaptureCommand(CLI::App& app, int* exit_code) {
  auto flags = std::make_shared<CaptureFlags>();
  CLI::App* capture = app.add_subcommand("capture", "Keep the keys, values and queries of a text in a file");
  capture->footer(
      "Examples:\n"
      "  kvtide capture --model ~/Llama-3.2-1B --text book.txt --tokens 4096 --queries 64 --dtype f16 "
      "--output "
      "book.safetensors\n"
      "  kvtide eval --captured book.safetensors --pairs q8_0/turbo4,turbo3/turbo3");
  capture->add_option("--model", flags->model_folder,
                      "Hugging Face folder (Llama family, safetensors); default: the bundled tidelm-7m");
  capture->add_option("--text", flags->text_file, "UTF-8 text; default: the bundled slice of WikiText-2");
  capture->add_option("--tokens", flags->tokens, "Tokens from the start of the text")
      ->check(Positive())
      ->capture_default_str();
  capture->add_option("--queries", flags->queries, "Keep the queries of the last N tokens only; default: all")
      ->check(Positive());
  capture->add_option("--output", flags->out_file, "The safetensors file to write")
      ->required()
      ->check(WritableFile());
  capture->add_option("--dtype", flags->dtype, "f32, f16 or bf16")
      ->check(CLI::IsMember({"f32", "f16", "bf16"}))
      ->capture_default_str();
  capture->add_option("--threads", flags->threads, "Threads of the engine; default: one per core")
      ->check(Positive());
  capture->add_flag("--no-progress", flags->no_progress, "No progress bar");
  capture->callback([flags, exit_code] {
    const absl::Status status = RunCapture(*flags, StopAtInterrupt());
    *exit_code = ExitCode(status);
    SayFailed("kvtide capture", status);
  });
}

}  // namespace kvtide::cli
