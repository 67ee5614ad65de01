// What a call to kvtided costs: starts a daemon of its own (device cpu, one compute thread by default) and
// measures round trips as an engine makes them, with one client, by unary calls and on a session; then how
// many calls of many clients at once it answers, with clients on bare HTTP/2 that leave the processors to the
// daemon, of the daemon and of the same server with a handler that does nothing (what gRPC takes); then what
// a client that keeps many calls in flight does to another one.
//   rpc_bench [--kvtided PATH] [--calls N] [--clients N] [--only one|many|fair] [--json FILE]
// Prints a table; --json writes the same numbers with hardware, date and command.
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "clients/cli/daemon_process.h"
#include "clients/cpp/client.h"
#include "daemon/service/address.h"
#include "daemon/service/connections.h"
#include "daemon/service/listener.h"
#include "daemon/service/rpc_loop.h"
#include "grpcpp/server_builder.h"
#include "grpcpp/server_posix.h"
#include "kvtide/v1/sequence.pb.h"
#include "tests/wire/http2_client.h"

namespace {

using kvtide::client::TensorRef;

// An 8B model's layer: 8 KV heads, 32 query heads, head dim 128.
constexpr int kKvHeads = 8, kHeads = 32, kDim = 128;

struct Result {
  std::string call, transport;
  double p50_us = 0, p99_us = 0;
  int64_t bytes = 0;            // of tensors, both ways
  double calls_per_second = 0;  // of all clients together; 0 = one call after the other
  double daemon_us = 0;         // processor time of the daemon for a call; 0 = not measured
  double client_us = 0;         // the same of the clients
};

void Check(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "rpc_bench: %s\n", status.ToString().c_str());
  std::exit(1);
}

// Times `call` after some calls to warm up.
Result Measure(const std::string& name, const std::string& transport, int calls, int64_t bytes,
               const std::function<absl::Status(int)>& call) {
  std::vector<double> times;
  const int warm = std::min(calls / 10 + 1, 50);
  for (int i = 0; i < warm + calls; i++) {
    const auto start = std::chrono::steady_clock::now();
    Check(call(i));
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
    if (i >= warm) times.push_back(time.count());
  }
  std::sort(times.begin(), times.end());
  return {name, transport, times[times.size() / 2], times[times.size() * 99 / 100], bytes};
}

// A sequence with `tokens` tokens in layer 0, and what it takes to append to it.
class Stream {
 public:
  Stream(kvtide::Client* client, const std::string& pair, int64_t tokens) : client_(client) {
    kvtide::client::SequenceOptions options;
    options.pair = pair;
    const auto sequence = client->CreateSequence("bench", options);
    Check(sequence.status());
    sequence_ = *sequence;
    while (length_ < tokens) Check(Append(std::min<int64_t>(512, tokens - length_)));
  }
  ~Stream() { client_->CloseSequence(sequence_).IgnoreError(); }

  absl::Status Append(int64_t tokens) {
    const std::vector<float> rows(static_cast<size_t>(tokens * kKvHeads * kDim), 0.25f);
    const TensorRef tensor = TensorRef::F32(rows, {tokens, kKvHeads, kDim});
    const kvtide::client::LayerTokens layer{0, tensor, tensor};
    const absl::Status status = client_->Append(sequence_, length_, std::span(&layer, 1)).status();
    if (status.ok()) length_ += tokens;
    return status;
  }

  absl::Status AppendAttend(int64_t tokens) {
    const std::vector<float> rows(static_cast<size_t>(tokens * kHeads * kDim), 0.25f);
    std::vector<float> output(rows.size());
    kvtide::client::AppendAttendItem item;
    item.sequence = sequence_;
    item.start_position = length_;
    item.q = TensorRef::F32(rows, {tokens, kHeads, kDim});
    item.k = item.v = TensorRef::F32(rows, {tokens, kKvHeads, kDim});
    item.output = output;
    const absl::Status status = client_->AppendAttend(0, std::span(&item, 1));
    if (status.ok()) length_ += tokens;
    return status;
  }

 private:
  kvtide::Client* client_;
  kvtide::client::SequenceId sequence_ = 0;
  int64_t length_ = 0;
};

std::vector<Result> MeasureAll(kvtide::Client* client, const std::string& transport, int calls) {
  constexpr int64_t kRow = kDim * static_cast<int64_t>(sizeof(float));
  std::vector<Result> results;
  kvtide::client::Model model;
  model.name = "bench";
  kvtide::client::ModelLayer layer;
  layer.kv_heads = kKvHeads;
  layer.head_dim_k = layer.head_dim_v = kDim;
  layer.query_heads = kHeads;
  model.layers.push_back(layer);
  Check(client->RegisterModel(model));
  results.push_back(Measure("create + close sequence", transport, calls, 0, [&](int) {
    auto sequence = client->CreateSequence("bench");
    return sequence.ok() ? client->CloseSequence(*sequence) : sequence.status();
  }));
  for (const char* pair : {"f16/f16", "turbo4/turbo4"}) {
    for (const int64_t context : {64, 4096}) {
      Stream stream(client, pair, context);
      results.push_back(Measure("append + attend 1 token after " + std::to_string(context) + ", " + pair,
                                transport, calls, (2 * kHeads + 2 * kKvHeads) * kRow,
                                [&](int) { return stream.AppendAttend(1); }));
    }
    Stream stream(client, pair, 0);
    results.push_back(Measure("append 256 tokens, " + std::string(pair), transport, std::min(calls, 60),
                              256 * 2 * kKvHeads * kRow, [&](int) { return stream.Append(256); }));
  }
  return results;
}

// Processor time that a process has used, in microseconds.
double ProcessorTime(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::istringstream fields(text.substr(text.rfind(')') + 1));
  std::string field;
  double ticks = 0;
  for (int i = 3; fields >> field && i <= 15; i++)
    if (i >= 14) ticks += std::stod(field);
  return ticks * 1e6 / static_cast<double>(::sysconf(_SC_CLK_TCK));
}

// A small layer, so that the call and not the attention is measured.
constexpr int kTinyKvHeads = 2, kTinyHeads = 4, kTinyDim = 64;
constexpr char kAppendAttend[] = "/kvtide.v1.KvCacheService/AppendAttend";

kvtide::client::Model TinyModel() {
  kvtide::client::ModelLayer layer;
  layer.kv_heads = kTinyKvHeads;
  layer.head_dim_k = layer.head_dim_v = kTinyDim;
  layer.query_heads = kTinyHeads;
  return {"tiny", {layer}};
}

// A connection that keeps calls of AppendAttend in flight, one token each, every one on a sequence of its
// own; without a client those of a server that does not look at them.
class Load {
 public:
  Load(kvtide::Client* client, const std::string& socket, int in_flight)
      : client_(client),
        connection_(kvtide::wire::Http2Client::Connect(socket)),
        lanes_(static_cast<size_t>(in_flight)) {
    if (connection_ == nullptr) Check(absl::UnavailableError("no connection to " + socket));
    for (Lane& lane : lanes_) {
      if (client != nullptr) {
        const auto sequence = client->CreateSequence("tiny", {.pair = "f16/f16"});
        Check(sequence.status());
        lane.sequence = *sequence;
      }
      lane.request.set_layer(0);
      kvtide::v1::AppendAttendItem* item = lane.request.add_items();
      item->set_sequence_id(lane.sequence);
      Fill(item->mutable_q(), kTinyHeads);
      Fill(item->mutable_k(), kTinyKvHeads);
      Fill(item->mutable_v(), kTinyKvHeads);
    }
  }
  ~Load() {
    if (client_ == nullptr) return;
    for (const Lane& lane : lanes_) client_->CloseSequence(lane.sequence).IgnoreError();
  }

  int fd() const { return connection_->fd(); }

  // Takes the answers that are there, notes their times, and starts the next calls while `go`.
  void Progress(bool go, std::vector<double>* times) {
    // Sending may receive too: until nothing has ended any more.
    for (bool again = true; again;) {
      connection_->Move();
      again = false;
      const auto now = std::chrono::steady_clock::now();
      for (Lane& lane : lanes_) {
        if (lane.call != 0 && !connection_->answer(lane.call).ended) continue;
        if (lane.call != 0) Take(&lane, now, times);
        if (go) Begin(&lane, now);
        again = again || go;
      }
    }
  }
  bool Idle() const {
    return std::all_of(lanes_.begin(), lanes_.end(), [](const Lane& lane) { return lane.call == 0; });
  }

 private:
  static constexpr int kTokens = 256;
  struct Lane {
    kvtide::client::SequenceId sequence = 0;
    kvtide::v1::AppendAttendRequest request;
    int32_t call = 0;
    int64_t tokens = 0;
    std::chrono::steady_clock::time_point start;
  };
  using Time = std::chrono::steady_clock::time_point;
  void Take(Lane* lane, Time now, std::vector<double>* times) {
    const kvtide::wire::Answer& answer = connection_->answer(lane->call);
    if (answer.code != 0) Check(absl::InternalError(answer.text));
    if (times != nullptr)
      times->push_back(std::chrono::duration<double, std::micro>(now - lane->start).count());
    connection_->Forget(lane->call);
    lane->call = 0;
    lane->tokens++;
  }
  void Begin(Lane* lane, Time now) {
    if (lane->tokens == kTokens) {  // the attention stays small
      if (client_ != nullptr) Check(client_->TruncateSequence(lane->sequence, 0));
      lane->tokens = 0;
    }
    lane->request.mutable_items(0)->set_start_position(lane->tokens);
    lane->start = now;
    lane->call = connection_->Call(kAppendAttend, {.bytes = lane->request.SerializeAsString()});
  }
  static void Fill(kvtide::v1::Tensor* tensor, int heads) {
    tensor->set_dtype(kvtide::v1::DATA_TYPE_F32);
    for (const int64_t dimension : {1, heads, kTinyDim}) tensor->add_shape(dimension);
    const std::vector<float> values(static_cast<size_t>(heads * kTinyDim), 0.25f);
    tensor->set_data(values.data(), values.size() * sizeof(float));
  }

  kvtide::Client* client_;
  std::unique_ptr<kvtide::wire::Http2Client> connection_;
  std::vector<Lane> lanes_;
};

// Runs all loads for so many seconds; the times of the first `watched` of them.
std::vector<double> RunLoads(const std::vector<std::unique_ptr<Load>>& loads, size_t watched,
                             double seconds) {
  std::vector<double> times;
  std::vector<pollfd> waits;
  for (const auto& load : loads) waits.push_back({load->fd(), POLLIN, 0});
  for (const auto& load : loads) load->Progress(true, nullptr);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  for (bool go = true, idle = false; !idle;) {
    ::poll(waits.data(), waits.size(), 100);
    go = go && std::chrono::steady_clock::now() < end;
    idle = !go;
    for (size_t i = 0; i < loads.size(); i++) {
      if (waits[i].revents != 0) loads[i]->Progress(go, i < watched ? &times : nullptr);
      idle = idle && loads[i]->Idle();
    }
  }
  std::sort(times.begin(), times.end());
  if (times.empty()) times.push_back(0);
  return times;
}

constexpr int64_t kTinyBytes =
    (2 * kTinyHeads + 2 * kTinyKvHeads) * kTinyDim * static_cast<int64_t>(sizeof(float));

Result MeasureMany(kvtide::Client* client, const std::string& name, const std::string& socket, pid_t daemon,
                   int clients, double seconds) {
  std::vector<std::unique_ptr<Load>> loads;
  for (int i = 0; i < clients; i++) loads.push_back(std::make_unique<Load>(client, socket, 1));
  RunLoads(loads, 0, seconds / 10);
  const double before = ProcessorTime(daemon), own_before = ProcessorTime(::getpid());
  const auto start = std::chrono::steady_clock::now();
  const std::vector<double> times = RunLoads(loads, loads.size(), seconds);
  const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - start;
  const auto calls = static_cast<double>(times.size());
  return {name + ", " + std::to_string(clients) + " clients",
          "http2",
          times[times.size() / 2],
          times[times.size() * 99 / 100],
          kTinyBytes,
          calls / wall.count(),
          (ProcessorTime(daemon) - before) / calls,
          (ProcessorTime(::getpid()) - own_before) / calls};
}

// A server as the daemon's is, whose handler answers so many bytes as a tiny call's answer has and does
// nothing. Until it is killed.
int ServeNothing(const std::string& socket) {
  using namespace kvtide::service;
  class Nothing final : public Rpc::Reactions {
   public:
    Nothing(Rpc* rpc, const grpc::ByteBuffer& answer) : rpc_(rpc), answer_(answer) {}
    void Start() { rpc_->Read(&request_); }
    void OnReadDone(bool ok) override {
      if (ok) {
        rpc_->WriteAndFinish(answer_);
      } else {
        rpc_->Finish(grpc::Status::CANCELLED);
      }
    }
    void OnWriteDone(bool) override {}
    void OnCancel() override {}
    void OnDone() override { delete this; }

   private:
    Rpc* const rpc_;
    grpc::ByteBuffer request_, answer_;
  };
  const auto address = ParseAddress("unix:" + socket);
  Check(address.status());
  const auto claim = AddressClaim::Take(*address);
  Check(claim.status());
  const grpc::Slice bytes(std::string((kTinyHeads * kTinyDim + kTinyHeads) * sizeof(float) + 30, 'x'));
  const grpc::ByteBuffer answer(&bytes, 1);
  grpc::ServerBuilder builder;
  builder.AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  RpcLoop loop(&builder, [&](Rpc* rpc) {
    auto* const call = new Nothing(rpc, answer);
    rpc->Bind(call);
    call->Start();
  });
  const auto server = builder.BuildAndStart();
  loop.Start(2, [] { return size_t{64}; });
  Connections connections;
  Listener::Options options;
  options.sockets.assign((*claim)->sockets().begin(), (*claim)->sockets().end());
  options.max_connections = 1000;
  options.serve = [&](int fd, bool) { grpc::AddInsecureChannelFromFd(server.get(), fd); };
  options.tick = [](const auto&) {};
  const Listener listener(&connections, std::move(options));
  for (;;) ::pause();
}

// The same load on a process of this program that serves nothing.
void MeasureNothing(const std::string& folder, int clients, double seconds, std::vector<Result>* results) {
  const std::string socket = folder + "/nothing.sock";
  const pid_t server = ::fork();
  if (server == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::execl("/proc/self/exe", "rpc_bench", "--serve-nothing", socket.c_str(), nullptr);
    ::_exit(127);
  }
  while (kvtide::wire::Http2Client::Connect(socket) == nullptr) ::usleep(10'000);
  for (const int count : {1, clients})
    results->push_back(MeasureMany(nullptr, "a handler that does nothing", socket, server, count, seconds));
  ::kill(server, SIGKILL);
  ::waitpid(server, nullptr, 0);
}

// One client with a call in flight, alone and beside one with 64.
void MeasureFairness(kvtide::Client* client, const std::string& socket, double seconds,
                     std::vector<Result>* results) {
  for (const int beside : {0, 64}) {
    std::vector<std::unique_ptr<Load>> loads;
    loads.push_back(std::make_unique<Load>(client, socket, 1));
    if (beside > 0) loads.push_back(std::make_unique<Load>(client, socket, beside));
    RunLoads(loads, 0, seconds / 10);
    const std::vector<double> times = RunLoads(loads, 1, seconds);
    results->push_back(
        {"append + attend 1 token, tiny model, beside " + std::to_string(beside) + " in flight of another",
         "http2", times[times.size() / 2], times[times.size() * 99 / 100], kTinyBytes});
  }
}

std::string Processor() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 10, "model name") == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Round trips to kvtided.");
  kvtide::cli::DaemonOptions daemon_options;
  daemon_options.device_bytes = int64_t{512} << 20;
  daemon_options.compute_threads = 1;
  int calls = 500;
  std::string json_file, only, nothing;
  int clients = 64;
  double seconds = 3;
  app.add_option("--kvtided", daemon_options.program, "the daemon's program");
  app.add_option("--compute-threads", daemon_options.compute_threads, "threads that attend");
  app.add_option("--calls", calls, "calls of each kind")->check(CLI::Range(10, 1000000));
  app.add_option("--clients", clients, "clients at once of the second part")->check(CLI::Range(1, 1000));
  app.add_option("--seconds", seconds, "how long clients at once are measured")
      ->check(CLI::Range(0.1, 600.0));
  app.add_option("--only", only, "one part: one, many or fair")
      ->check(CLI::IsMember({"one", "many", "fair"}));
  app.add_option("--json", json_file, "write the results here too");
  app.add_option("--serve-nothing", nothing, "")->group("");  // for itself
  CLI11_PARSE(app, argc, argv);
  if (!nothing.empty()) return ServeNothing(nothing);
  auto daemon = kvtide::cli::DaemonProcess::Start(daemon_options);
  Check(daemon.status());
  std::vector<Result> results;
  for (const bool session : {false, true}) {
    if (!only.empty() && only != "one") break;
    kvtide::client::ClientOptions options;
    options.session = session;
    auto client = kvtide::Client::Connect((*daemon)->address(), options);
    Check(client.status());
    const std::vector<Result> some = MeasureAll(client->get(), session ? "session" : "unary", calls);
    results.insert(results.end(), some.begin(), some.end());
  }
  auto client = kvtide::Client::Connect((*daemon)->address());
  Check(client.status());
  Check((*client)->RegisterModel(TinyModel()));
  const std::string socket = (*daemon)->address().substr(std::string("unix:").size());
  if (only.empty() || only == "many") {
    const std::string name = "append + attend 1 token, tiny model";
    for (const int count : {1, clients})
      results.push_back(MeasureMany(client->get(), name, socket, (*daemon)->pid(), count, seconds));
    MeasureNothing(socket.substr(0, socket.rfind('/')), clients, seconds, &results);
  }
  if (only.empty() || only == "fair") MeasureFairness(client->get(), socket, seconds, &results);
  std::printf("%-66s %-8s %9s %9s %12s %9s %9s %9s\n", "call", "by", "p50 us", "p99 us", "tensor bytes",
              "calls/s", "daemon us", "client us");
  nlohmann::json rows = nlohmann::json::array();
  for (const Result& r : results) {
    std::printf("%-66s %-8s %9.1f %9.1f %12lld %9.0f %9.1f %9.1f\n", r.call.c_str(), r.transport.c_str(),
                r.p50_us, r.p99_us, static_cast<long long>(r.bytes), r.calls_per_second, r.daemon_us,
                r.client_us);
    rows.push_back({{"call", r.call},
                    {"by", r.transport},
                    {"p50_us", r.p50_us},
                    {"p99_us", r.p99_us},
                    {"tensor_bytes", r.bytes}});
    if (r.calls_per_second > 0) {
      rows.back()["calls_per_second"] = r.calls_per_second;
      rows.back()["daemon_us_per_call"] = r.daemon_us;
      rows.back()["client_us_per_call"] = r.client_us;
    }
  }
  if (json_file.empty()) return 0;
  const std::time_t now = std::time(nullptr);
  char date[32];
  std::strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  std::string command;
  for (int i = 0; i < argc; i++) command += (i == 0 ? "" : " ") + std::string(i == 0 ? "rpc_bench" : argv[i]);
  double load = 0;  // of the last minute: on a busy machine the numbers are upper bounds
  std::ifstream("/proc/loadavg") >> load;
  std::ofstream(json_file) << nlohmann::json{{"benchmark", "rpc"},
                                             {"hardware", Processor()},
                                             {"processors", ::sysconf(_SC_NPROCESSORS_ONLN)},
                                             {"date", date},
                                             {"command", command},
                                             {"socket", "unix"},
                                             {"load_average", load},
                                             {"results", rows}}
                                  .dump(1)
                           << "\n";
  return 0;
}
