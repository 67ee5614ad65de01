#include "clients/cli/bench/bench_command.h"

#include <cstdio>
#include <memory>
#include <string>

#include "clients/cli/bench/bench_report.h"
#include "clients/cli/bench/bench_run.h"
#include "clients/cli/terminal/command_status.h"
#include "clients/cli/terminal/interrupt.h"
#include "kernels/base/status.h"

namespace kvtide::cli {
namespace {

struct BenchFlags {
  BenchOptions options;
  std::string output = "table";
  bool no_progress = false;
};

absl::Status Bench(BenchFlags& flags) {
  flags.options.show_progress = !flags.no_progress;
  KVTIDE_ASSIGN_OR_RETURN(const BenchReport report, RunBench(flags.options, StopAtInterrupt()));
  const std::string text = flags.output == "json" ? RenderJson(report) : RenderTable(report, Terminal::Of(1));
  Say(text);
  return absl::OkStatus();
}

}  // namespace

void AddBenchCommand(CLI::App& app, int* exit_code) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* bench = app.add_subcommand(
      "bench", "Measure latency and bandwidth by way and by tier, beside what this machine can do");
  bench->footer(
      "Examples:\n"
      "  kvtide bench                                   a kvtided of its own, 20 seconds\n"
      "  kvtide bench --device cuda:0 --disk-folder /nvme\n"
      "  kvtide bench --address unix:/run/kvtide/kvtided.sock --seconds 5     a running one; it needs 200 "
      "MiB\n"
      "  kvtide bench --output json > bench.json\n"
      "Ways are embedded, direct, shared memory and gRPC. Every number is held against what the machine does "
      "without\n"
      "kvtide in the same run: copies and reads of memory, a file on the tier's disk, a Unix socket, copies "
      "of the GPU.\n"
      "Exit codes: 0 measured, 1 a call failed, 2 bad flags, 130 stopped.");
  BenchOptions& o = flags->options;
  CLI::Option* address =
      bench->add_option("--address", o.address,
                        "Measure this running daemon (unix:/path or host:port) instead of starting one");
  bench->add_option(
      "--tls-ca", o.credentials.tls_ca,
      "TLS: PEM file with the CA of kvtided's certificate, or system (default: $KVTIDE_TLS_CA)");
  bench->add_option("--tls-cert", o.credentials.tls_cert,
                    "mTLS: PEM file with your certificate (default: $KVTIDE_TLS_CERT)");
  bench->add_option("--tls-key", o.credentials.tls_key, "PEM file with its key (default: $KVTIDE_TLS_KEY)");
  bench->add_option("--token-file", o.credentials.token_file,
                    "File with a bearer token (default: $KVTIDE_TOKEN_FILE)");
  bench->add_option("--kvtided", o.daemon_program, "The daemon's program; default: beside kvtide, or in PATH")
      ->excludes(address);
  bench->add_option("--device", o.device, "First tier of the daemon that is started: auto, cpu, cuda:0, ...")
      ->capture_default_str()
      ->excludes(address);
  bench->add_option(
      "--disk-folder", o.disk_folder,
      "Where files are written: on the disk whose tier is measured. Default: the folder for temporary "
      "files, or that of the running daemon's tier");
  bench->add_option("--pair", o.pair, "Pair of the blocks that tiers attend and move; default: the daemon's");
  bench->add_option("--seconds", o.seconds, "For all measurements; starting and filling come on top")
      ->capture_default_str()
      ->check(CLI::Range(0.5, 3600.0));
  bench->add_option("--output", flags->output, "table or json")
      ->check(CLI::IsMember({"table", "json"}))
      ->capture_default_str();
  bench->add_flag("--no-progress", flags->no_progress, "No progress bar");
  bench->callback([flags, exit_code] {
    const absl::Status status = Bench(*flags);
    SayFailed("kvtide bench", status);
    *exit_code = ExitCode(status);
  });
}

}  // namespace kvtide::cli
