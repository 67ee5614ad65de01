#include "clients/cli/ops/seq_command.h"

#include <cstdio>
#include <fstream>
#include <memory>
#include <span>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "clients/cli/ops/daemon_flags.h"
#include "clients/cli/ops/persist_command.h"
#include "clients/cli/ops/seq_verbs.h"
#include "clients/cli/terminal/command_status.h"
#include "clients/cli/terminal/file_checks.h"
#include "clients/cli/terminal/terminal.h"
#include "clients/engine/safetensors_writer.h"
#include "kernels/base/status.h"

namespace kvtide::cli {
namespace {

// NumPy's format, version 1.0: the header fills up to 64 bytes.
std::string NpyHeader(DataType type, std::span<const int64_t> shape) {
  std::string text =
      absl::StrCat("{'descr': '", type == DataType::kF32 ? "<f4" : "<f2",
                   "', 'fortran_order': False, 'shape': (", absl::StrJoin(shape, ", "), "), }");
  text.resize((10 + text.size() + 1 + 63) / 64 * 64 - 10 - 1, ' ');
  text.push_back('\n');
  std::string header("\x93NUMPY\x01\x00", 8);
  header.push_back(static_cast<char>(text.size() & 0xFF));
  header.push_back(static_cast<char>(text.size() >> 8));
  return header + text;
}

absl::Status WriteNpy(const std::string& path, const engine::TensorToWrite& tensor) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  const std::string header = NpyHeader(tensor.type, tensor.shape);
  out.write(header.data(), static_cast<std::streamsize>(header.size()));
  out.write(reinterpret_cast<const char*>(tensor.bytes.data()),
            static_cast<std::streamsize>(tensor.bytes.size()));
  out.close();
  return out ? absl::OkStatus() : engine::FailedWrite(path);
}

}  // namespace

absl::StatusOr<std::string> ReadSequence(client::Client& client, const SeqReadOptions& options) {
  const bool npy = absl::EndsWith(options.out_file, ".npy");
  if (!npy && !absl::EndsWith(options.out_file, ".safetensors")) {
    return absl::InvalidArgumentError(
        absl::StrCat("--out ", options.out_file, ": its name must end in .safetensors or .npy"));
  }
  if (npy && (options.layers.size() != 1 || options.part.empty()))
    return absl::InvalidArgumentError("a .npy file has one array: name one of --layers, and --part k or v");
  if (npy && options.type == DataType::kBf16)
    return absl::InvalidArgumentError("NumPy has no bf16: use --dtype f16 or f32, or a .safetensors file");
  KVTIDE_ASSIGN_OR_RETURN(const client::SequenceInfo info, FindSequence(client, options.sequence));
  const int64_t count = options.tokens >= 0 ? options.tokens : info.tokens - options.first;
  if (count <= 0) {
    return absl::OutOfRangeError(absl::StrCat("sequence ", info.id, " has ", info.tokens,
                                              " tokens: nothing from ", options.first, " on"));
  }
  KVTIDE_ASSIGN_OR_RETURN(
      const std::vector<client::LayerRows> layers,
      client.ReadTokens(options.sequence, options.layers, options.first, count, options.type));
  std::vector<engine::TensorToWrite> tensors;
  for (const client::LayerRows& layer : layers) {
    tensors.push_back({absl::StrCat("layers.", layer.layer, ".k"),
                       options.type,
                       {count, layer.kv_heads, layer.head_dim_k},
                       layer.k});
    tensors.push_back({absl::StrCat("layers.", layer.layer, ".v"),
                       options.type,
                       {count, layer.kv_heads, layer.head_dim_v},
                       layer.v});
  }
  if (npy) {
    KVTIDE_RETURN_IF_ERROR(WriteNpy(options.out_file, tensors[options.part == "k" ? 0 : 1]));
  } else {
    KVTIDE_RETURN_IF_ERROR(engine::WriteSafetensors(options.out_file, tensors,
                                                    {{"format", "kvtide-sequence-1"},
                                                     {"model", info.model},
                                                     {"pair", info.pair},
                                                     {"first", absl::StrCat(options.first)},
                                                     {"tokens", absl::StrCat(count)}}));
  }
  return absl::StrCat(Printable(options.out_file), ": ", layers.size(),
                      layers.size() == 1 ? " layer" : " layers", ", ", count, " tokens of sequence ", info.id,
                      " (", Printable(info.model), ", ", info.pair, ")");
}

void AddSeqCommand(CLI::App& app, int* exit_code) {
  struct Flags {
    DaemonFlags daemon;
    SeqReadOptions options;
    std::string dtype = "f16";
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* seq = app.add_subcommand(
      "seq", "List, look into, fork, evict, persist and close sequences of a running kvtided");
  seq->require_subcommand(1);
  AddSeqVerbs(seq, exit_code);
  AddPersistCommand(*seq, exit_code);
  CLI::App* read = seq->add_subcommand("read", "Write keys and values, decoded, into a file");
  read->footer(
      "Examples:\n"
      "  kvtide status                                      lists sequences and their ids\n"
      "  kvtide seq read 8812934 --out chat.safetensors     layers.N.k and layers.N.v "
      "[tokens][kv_heads][head_dim]\n"
      "  kvtide seq read 8812934 --layers 3 --part k --start 1000 --tokens 64 --out k3.npy");
  SeqReadOptions& o = flags->options;
  flags->daemon.AddTo(read);
  read->add_option("id", o.sequence, "The sequence's id")->required();
  read->add_option("--out", o.out_file, "The file to write: .safetensors or .npy")
      ->required()
      ->check(WritableFile());
  read->add_option("--layers", o.layers, "Layers, comma-separated; default: all")
      ->delimiter(',')
      ->check(CLI::NonNegativeNumber);
  read->add_option("--part", o.part, "k or v, for .npy")->check(CLI::IsMember({"k", "v"}));
  read->add_option("--start", o.first, "First token")->check(CLI::NonNegativeNumber)->capture_default_str();
  read->add_option("--tokens", o.tokens, "How many; default: all from the first on")
      ->check(CLI::PositiveNumber);
  read->add_option("--dtype", flags->dtype, "f16, bf16 or f32")
      ->check(CLI::IsMember({"f16", "bf16", "f32"}))
      ->capture_default_str();
  read->callback([flags, exit_code] {
    SeqReadOptions& options = flags->options;
    options.type = flags->dtype == "f32"    ? DataType::kF32
                   : flags->dtype == "bf16" ? DataType::kBf16
                                            : DataType::kF16;
    const auto run = [&]() -> absl::StatusOr<std::string> {
      KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<client::Client> client, flags->daemon.Connect());
      return ReadSequence(*client, options);
    };
    const absl::StatusOr<std::string> done = run();
    if (done.ok()) {
      Say(*done + "\n");
    } else {
      SayFailed("kvtide seq read", done.status());
    }
    *exit_code = ExitCode(done.status());
  });
}

}  // namespace kvtide::cli
