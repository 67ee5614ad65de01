// What Prometheus costs a daemon that is full: 1,000 sequences of 100 blocks, 10 tenants' worth of calls,
// scraped over HTTP as Prometheus does (gzip), alone and beside a client that attends all the time.
//   kvtide_bench_scrape [--sequences 1000] [--blocks 100] [--seconds 20] [--json FILE]
// Windows with ten scrapes a second and without take turns, so that other load of the machine meets both.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "clients/cli/daemon_process.h"
#include "clients/cli/run_facts.h"
#include "clients/cpp/pool.h"
#include "tests/bench/must.h"
#include "tests/bench/result_file.h"
#include "tests/bench/samples.h"

namespace kvtide::bench {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kDim = 64, kHeads = 4, kBlockTokens = 64;

int FreePort() {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in name{};
  name.sin_family = AF_INET;
  name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(name);
  if (::bind(fd, reinterpret_cast<sockaddr*>(&name), size) != 0) std::exit(1);
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&name), &size);
  ::close(fd);
  return ntohs(name.sin_port);
}

// One scrape; its bytes as they travel.
size_t Scrape(int port, const char* encoding) {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in name{};
  name.sin_family = AF_INET;
  name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  name.sin_port = htons(static_cast<uint16_t>(port));
  size_t bytes = 0;
  if (::connect(fd, reinterpret_cast<sockaddr*>(&name), sizeof(name)) == 0) {
    const std::string request = absl::StrCat(
        "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAccept-Encoding: ", encoding,
        "\r\n\r\n");
    if (::send(fd, request.data(), request.size(), MSG_NOSIGNAL) > 0) {
      static char buffer[1 << 16];
      for (ssize_t got; (got = ::recv(fd, buffer, sizeof(buffer), 0)) > 0;) bytes += static_cast<size_t>(got);
    }
  }
  ::close(fd);
  if (bytes < 1000) {
    std::fprintf(stderr, "scrape_bench: no metrics at port %d\n", port);
    std::exit(1);
  }
  return bytes;
}

// Processor time of a process, in seconds.
double ProcessorTime(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  std::string text;
  std::getline(file, text);
  std::istringstream rest(text.substr(text.rfind(')') + 2));
  std::string skipped;
  for (int i = 0; i < 11; i++) rest >> skipped;
  double user = 0, system = 0;
  rest >> user >> system;
  return (user + system) / static_cast<double>(::sysconf(_SC_CLK_TCK));
}

int Main(int argc, char** argv) {
  CLI::App app("What scrapes cost a full daemon.");
  int sequences = 1000, blocks = 100, seconds = 20;
  std::string json_file;
  app.add_option("--sequences", sequences)->check(CLI::Range(1, 100000));
  app.add_option("--blocks", blocks, "of each sequence")->check(CLI::Range(4, 10000));
  app.add_option("--seconds", seconds, "of attention, half of them beside scrapes")
      ->check(CLI::Range(2, 600));
  app.add_option("--json", json_file);
  CLI11_PARSE(app, argc, argv);

  cli::DaemonOptions options;
  options.device = "cpu";
  options.compute_threads = 1;
  options.device_bytes = int64_t{sequences} * (blocks * 3072 + 262144) + (int64_t{64} << 20);
  const int port = FreePort();
  options.metrics_address = absl::StrCat("127.0.0.1:", port);
  const auto daemon = Must(cli::DaemonProcess::Start(options));
  const auto pool = Must(Pool::Connect("shm:" + daemon->address()));
  client::ModelLayer layer;
  layer.kv_heads = 1;
  layer.head_dim_k = layer.head_dim_v = kDim;
  layer.query_heads = kHeads;
  Must(pool->RegisterModel({"bench", {layer}}));
  const int64_t tokens = int64_t{blocks} * kBlockTokens;
  std::vector<float> rows(static_cast<size_t>(tokens * kDim));
  for (size_t i = 0; i < rows.size(); i++)
    rows[i] = static_cast<float>((i * 2654435761u >> 20) % 1000) / 500 - 1;
  client::LayerTokens append;
  append.k = append.v = client::TensorRef::F32(rows, {tokens, 1, kDim});
  client::SequenceId first = 0;
  for (int i = 0; i < sequences; i++) {
    const client::SequenceId id = Must(pool->CreateSequence("bench", {.pair = "turbo2/turbo2"}));
    Must(pool->Append(id, 0, {&append, 1}).status());
    if (i == 0) first = id;
  }
  const client::ServerStats stats = Must(pool->GetStats());
  int64_t stored = 0;
  for (const client::TierStats& tier : stats.tiers) stored += tier.blocks;

  // Alone.
  std::vector<double> times;
  const double before = ProcessorTime(daemon->pid());
  constexpr int kScrapes = 300;
  size_t bytes = 0;
  for (int i = 0; i < kScrapes; i++) {
    const auto start = Clock::now();
    bytes = Scrape(port, "gzip");
    times.push_back(SecondsSince(start));
  }
  const double processor = (ProcessorTime(daemon->pid()) - before) / kScrapes;
  const size_t plain = Scrape(port, "identity");

  // Beside attention.
  std::vector<float> q(kHeads * kDim, 0.25f), output(q.size());
  const client::AttendItem item{
      first, std::nullopt, client::TensorRef::F32(q, {1, kHeads, kDim}), output, {}};
  std::atomic<bool> scraping{false}, done{false};
  std::vector<double> beside_times;
  std::thread scraper([&] {
    while (!done) {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      if (!scraping) continue;
      const auto start = Clock::now();
      Scrape(port, "gzip");
      beside_times.push_back(SecondsSince(start));
    }
  });
  std::vector<double> ratios, rate[2], p99[2];
  for (int window = 0; window < seconds; window++) {
    // Which of a pair comes first changes.
    const bool with = (window % 4 == 1) || (window % 4 == 2);
    scraping = with;
    std::vector<double> calls;
    const auto start = Clock::now();
    while (SecondsSince(start) < 1) {
      const auto call = Clock::now();
      Must(pool->Attend(0, {&item, 1}));
      calls.push_back(SecondsSince(call));
    }
    rate[with].push_back(static_cast<double>(calls.size()) / SecondsSince(start));
    p99[with].push_back(At(calls, 0.99));
    if (rate[0].size() == rate[1].size()) ratios.push_back(rate[1].back() / rate[0].back());
  }
  done = true;
  scraper.join();

  const double kept = At(ratios, 0.5);
  std::printf(
      "%lld blocks of %d sequences: a scrape p50 %.2f ms, p99 %.2f ms, %.2f ms of the daemon's processor "
      "time, %zu bytes (%zu plain)\n",
      static_cast<long long>(stored), sequences, 1e3 * At(times, 0.5), 1e3 * At(times, 0.99), 1e3 * processor,
      bytes, plain);
  std::printf(
      "attends: %.0f /s alone, %.0f /s beside 10 scrapes a second (median of pairs %.1f %%), p99 %.0f and "
      "%.0f us; scrapes beside them p50 %.2f ms, p99 %.2f ms\n",
      At(rate[0], 0.5), At(rate[1], 0.5), 100 * kept, 1e6 * At(p99[0], 0.5), 1e6 * At(p99[1], 0.5),
      1e3 * At(beside_times, 0.5), 1e3 * At(beside_times, 0.99));
  std::string command = "kvtide_bench_scrape";
  for (int i = 1; i < argc; i++) absl::StrAppend(&command, " ", argv[i]);
  double load = 0;
  std::ifstream("/proc/loadavg") >> load;
  const auto rounded = [](double value) { return std::round(value * 1000) / 1000; };
  return WriteResult({{"benchmark", "scrape"},
                      {"hardware", cli::Machine()},
                      {"date", cli::Today()},
                      {"command", command},
                      {"load_average", load},
                      {"sequences", sequences},
                      {"blocks", stored},
                      {"scrape_p50_ms", rounded(1e3 * At(times, 0.5))},
                      {"scrape_p99_ms", rounded(1e3 * At(times, 0.99))},
                      {"daemon_processor_ms", rounded(1e3 * processor)},
                      {"processor_percent_every_15_s", rounded(100 * processor / 15)},
                      {"gzip_bytes", bytes},
                      {"plain_bytes", plain},
                      {"attends_per_second", Tenth(At(rate[0], 0.5))},
                      {"attends_per_second_beside_10_scrapes_a_second", Tenth(At(rate[1], 0.5))},
                      {"kept_percent_beside_10_scrapes_a_second", Tenth(100 * kept)},
                      {"attend_p99_us", Tenth(1e6 * At(p99[0], 0.5))},
                      {"attend_p99_us_beside", Tenth(1e6 * At(p99[1], 0.5))},
                      {"scrape_p50_ms_beside_attends", rounded(1e3 * At(beside_times, 0.5))},
                      {"scrape_p99_ms_beside_attends", rounded(1e3 * At(beside_times, 0.99))}},
                     json_file);
}

}  // namespace
}  // namespace kvtide::bench

int main(int argc, char** argv) { return kvtide::bench::Main(argc, argv); }
