// What somebody who behaves notices of those who do not: small attentions of one client, alone and beside
// crowds of idle connections, slow ones, compressed bombs and a flood over a quota. Each crowd comes twice:
// to the client's own daemon, and to another one beside it on the same machine, which shows what the crowd
// costs by using the processors alone.
//   kvtide_bench_crowd [--connections 1000] [--rounds 10] [--json FILE]
// Rounds of all cases, a second each; of each case the median of the rounds.
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "clients/cli/daemon_process.h"
#include "clients/cli/run_facts.h"
#include "clients/cpp/pool.h"
#include "kvtide/v1/kv_cache_service.pb.h"
#include "tests/bench/must.h"
#include "tests/bench/result_file.h"
#include "tests/bench/samples.h"
#include "tests/wire/http2_client.h"

namespace kvtide::bench {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kDim = 64, kHeads = 4;

// A connection that says how an HTTP/2 client begins, and no more.
class Idler {
 public:
  explicit Idler(const std::string& path) : fd_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::strncpy(name.sun_path, path.c_str(), sizeof(name.sun_path) - 1);
    if (::connect(fd_, reinterpret_cast<const sockaddr*>(&name), sizeof(name)) == 0)
      Send(std::string("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 33));
  }
  Idler(const Idler&) = delete;
  ~Idler() { ::close(fd_); }
  void Send(const std::string& bytes) {
    if (::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
      // The daemon has let it go.
    }
  }

 private:
  const int fd_;
};

// A crowd at a socket: what it does again and again until it goes. Destroyed = gone.
using Crowd = std::function<void()>;
struct Kind {
  const char* name;
  std::function<Crowd(const std::string& path)> come;
};

struct Daemon {
  std::unique_ptr<cli::DaemonProcess> process;
  std::string path() const { return process->address().substr(5); }
};

// Small attentions of one client by one way.
class Bystander {
 public:
  explicit Bystander(const std::string& address) : pool_(Must(Pool::Connect(address))) {
    client::ModelLayer layer;
    layer.kv_heads = 2;
    layer.head_dim_k = layer.head_dim_v = kDim;
    layer.query_heads = kHeads;
    const std::string model = absl::StrCat("bystander-", address.substr(0, 3));
    Must(pool_->RegisterModel({model, {layer}}));
    item_.sequence = Must(pool_->CreateSequence(model, {.pair = "f16/f16"}));
    rows_.assign(64 * 2 * kDim, 0.25f);
    client::LayerTokens append;
    append.k = append.v = client::TensorRef::F32(rows_, {64, 2, kDim});
    Must(pool_->Append(item_.sequence, 0, {&append, 1}).status());
    output_.resize(kHeads * kDim);
    item_.q = client::TensorRef::F32(std::span(rows_).first(kHeads * kDim), {1, kHeads, kDim});
    item_.output = output_;
  }
  std::vector<double> Call(double seconds) {
    std::vector<double> times;
    const auto start = Clock::now();
    while (SecondsSince(start) < seconds) {
      const auto call = Clock::now();
      Must(pool_->Attend(0, {&item_, 1}));
      times.push_back(SecondsSince(call));
    }
    return times;
  }

 private:
  std::unique_ptr<Pool> pool_;
  std::vector<float> rows_, output_;
  client::AttendItem item_;
};

int Main(int argc, char** argv) {
  CLI::App app("What somebody who behaves notices of those who do not.");
  int connections = 1000, rounds = 10;
  std::string json_file;
  app.add_option("--connections", connections)->check(CLI::Range(1, 10000));
  app.add_option("--rounds", rounds)->check(CLI::Range(1, 1000));
  app.add_option("--json", json_file);
  CLI11_PARSE(app, argc, argv);
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
  ::setenv("KVTIDE_MAX_CONNECTIONS", std::to_string(connections + 100).c_str(), 1);
  ::setenv("KVTIDE_QUOTA", "default:sequences=8", 1);

  Daemon own, neighbour;
  for (Daemon* daemon : {&own, &neighbour}) {
    cli::DaemonOptions options;
    options.device = "cpu";
    options.device_bytes = int64_t{32} << 20;
    options.compute_threads = 1;
    daemon->process = Must(cli::DaemonProcess::Start(options));
    client::ModelLayer layer;
    layer.kv_heads = layer.query_heads = 1;
    layer.head_dim_k = layer.head_dim_v = kDim;
    Must(Must(Client::Connect(daemon->process->address()))->RegisterModel({"flood", {layer}}));
  }
  const std::string bomb = wire::GzipOfZeros(int64_t{1} << 30);
  const std::vector<Kind> kinds = {
      {"nobody",
       [](const std::string&) -> Crowd {
         return [] { std::this_thread::sleep_for(std::chrono::milliseconds(10)); };
       }},
      {"idle connections",
       [&](const std::string& path) -> Crowd {
         auto crowd = std::make_shared<std::vector<std::unique_ptr<Idler>>>();
         for (int i = 0; i < connections; i++) crowd->push_back(std::make_unique<Idler>(path));
         return [crowd] { std::this_thread::sleep_for(std::chrono::milliseconds(10)); };
       }},
      // Half of them say nothing, half a frame of headers that never ends, a byte ten times a second.
      {"slow connections",
       [&](const std::string& path) -> Crowd {
         auto crowd = std::make_shared<std::vector<std::unique_ptr<Idler>>>();
         for (int i = 0; i < 200; i++) {
           crowd->push_back(std::make_unique<Idler>(path));
           if (i % 2 == 0) crowd->back()->Send(std::string("\0\x3e\x80\1\4\0\0\0\1", 9));
         }
         return [crowd] {
           for (size_t i = 0; i < crowd->size(); i += 2) (*crowd)[i]->Send("x");
           std::this_thread::sleep_for(std::chrono::milliseconds(100));
         };
       }},
      {"connections that come and go",
       [&](const std::string& path) -> Crowd {
         return [path] {
           for (int i = 0; i < 5; i++) Idler idler(path);
           std::this_thread::sleep_for(std::chrono::milliseconds(5));
         };
       }},
      {"compressed bombs",
       [&](const std::string& path) -> Crowd {
         std::shared_ptr<wire::Http2Client> wire = wire::Http2Client::Connect(path);
         return [wire, &bomb] {
           const int32_t call =
               wire->Call("/kvtide.v1.KvCacheService/Append", {.bytes = bomb, .compressed = true});
           wire->Until([&] { return wire->answer(call).ended; }, 10);
           wire->Forget(call);
         };
       }},
      // Sixteen at a time, all of them refused.
      {"a flood over its quota",
       [&](const std::string& path) -> Crowd {
         std::shared_ptr<wire::Http2Client> wire = wire::Http2Client::Connect(path);
         v1::CreateSequenceRequest request;
         request.set_model("flood");
         const std::string bytes = request.SerializeAsString();
         return [wire, bytes] {
           std::vector<int32_t> calls;
           for (int i = 0; i < 16; i++)
             calls.push_back(wire->Call("/kvtide.v1.KvCacheService/CreateSequence", {.bytes = bytes}));
           for (const int32_t call : calls) {
             wire->Until([&] { return wire->answer(call).ended; }, 10);
             wire->Forget(call);
           }
         };
       }},
  };
  const std::vector<std::pair<const char*, std::string>> ways = {
      {"gRPC", own.process->address()}, {"shared memory", "shm:" + own.process->address()}};
  struct Numbers {
    std::vector<double> p50, p99;
  };
  // By way, kind and whose daemon it comes to.
  std::map<std::tuple<size_t, size_t, bool>, Numbers> all;
  std::vector<Bystander> bystanders;
  bystanders.reserve(ways.size());
  for (const auto& way : ways) bystanders.emplace_back(way.second);
  for (int round = 0; round < rounds; round++) {
    for (size_t kind = 0; kind < kinds.size(); kind++) {
      for (const bool at_own : {true, false}) {
        if (kind == 0 && !at_own) continue;
        std::atomic<bool> there{false}, done{false};
        std::thread crowd([&, path = at_own ? own.path() : neighbour.path()] {
          const Crowd act = kinds[kind].come(path);
          there = true;
          while (!done) act();
        });
        while (!there) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        for (size_t way = 0; way < ways.size(); way++) {
          const std::vector<double> times = bystanders[way].Call(0.5);
          Numbers& numbers = all[{way, kind, at_own}];
          numbers.p50.push_back(At(times, 0.5));
          numbers.p99.push_back(At(times, 0.99));
        }
        done = true;
        crowd.join();
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
      }
    }
  }

  Result rows = Result::array();
  std::printf("%-14s %-30s %10s %10s %8s   %s\n", "way", "beside", "p50 us", "p99 us", "p99 is",
              "the crowd at another daemon");
  for (size_t way = 0; way < ways.size(); way++) {
    const double quiet = At(all[{way, 0, true}].p99, 0.5);
    for (size_t kind = 0; kind < kinds.size(); kind++) {
      const Numbers& own_numbers = all[{way, kind, true}];
      const double p50 = At(own_numbers.p50, 0.5), p99 = At(own_numbers.p99, 0.5);
      Result row = {{"way", ways[way].first},
                    {"beside", kinds[kind].name},
                    {"p50_us", Tenth(1e6 * p50)},
                    {"p99_us", Tenth(1e6 * p99)},
                    {"p99_of_quiet", Tenth(p99 / quiet)}};
      std::printf("%-14s %-30s %10.1f %10.1f %7.1fx", ways[way].first, kinds[kind].name, 1e6 * p50, 1e6 * p99,
                  p99 / quiet);
      if (kind > 0) {
        const Numbers& other = all[{way, kind, false}];
        const double other_p99 = At(other.p99, 0.5);
        std::printf("   p50 %.1f, p99 %.1f (%.1fx)", 1e6 * At(other.p50, 0.5), 1e6 * other_p99,
                    other_p99 / quiet);
        row["p50_us_crowd_elsewhere"] = Tenth(1e6 * At(other.p50, 0.5));
        row["p99_us_crowd_elsewhere"] = Tenth(1e6 * other_p99);
        row["p99_of_quiet_crowd_elsewhere"] = Tenth(other_p99 / quiet);
      }
      std::printf("\n");
      rows.push_back(row);
    }
  }
  std::string command = "kvtide_bench_crowd";
  for (int i = 1; i < argc; i++) absl::StrAppend(&command, " ", argv[i]);
  double load = 0;
  std::ifstream("/proc/loadavg") >> load;
  return WriteResult({{"benchmark", "crowd"},
                      {"hardware", cli::Machine()},
                      {"date", cli::Today()},
                      {"command", command},
                      {"load_average", load},
                      {"connections", connections},
                      {"results", rows}},
                     json_file);
}

}  // namespace
}  // namespace kvtide::bench

int main(int argc, char** argv) { return kvtide::bench::Main(argc, argv); }
