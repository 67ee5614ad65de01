#include "tests/e2e/test_daemon.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "gtest/gtest.h"
#include "kernels/base/float16.h"

extern char** environ;

namespace kvtide::e2e {
namespace {

// Long, for builds with sanitizers on busy machines; a healthy daemon is ready in a fraction of a second.
constexpr int kPatienceSeconds = 60;

// The daemon's program, under a limit if one is given.
std::vector<std::string> Command(const std::string& ulimit) {
  if (ulimit.empty()) return {Program("kvtided")};
  return {"/bin/sh", "-c", "ulimit " + ulimit + " && exec \"$0\" \"$@\"", Program("kvtided")};
}

void Nap() { std::this_thread::sleep_for(std::chrono::milliseconds(5)); }

}  // namespace

std::string TestDevices() {
  const char* text = std::getenv("KVTIDE_TEST_DEVICE");
  const std::string device = text == nullptr || *text == 0 ? "cpu" : text;
  return device.find(',') == std::string::npos ? device + ",cpu" : device;
}

std::string TestDevice() {
  const std::string devices = TestDevices();
  return devices.substr(0, devices.find(','));
}

std::string Program(const std::string& name) {
  const char* folder = std::getenv("KVTIDE_TEST_PROGRAMS");
  if (folder != nullptr && *folder != 0) return std::string(folder) + "/" + name;
  return name == "kvtided" ? KVTIDED_PROGRAM : name == "kvtide" ? KVTIDE_PROGRAM : APPENDER_PROGRAM;
}

pid_t StartProgram(const std::vector<std::string>& command, const std::string& log) {
  std::vector<char*> arguments;
  for (const std::string& argument : command) arguments.push_back(const_cast<char*>(argument.c_str()));
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 1, log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
  posix_spawn_file_actions_adddup2(&actions, 1, 2);
  pid_t pid = -1;
  if (posix_spawn(&pid, command[0].c_str(), &actions, nullptr, arguments.data(), environ) != 0) pid = -1;
  posix_spawn_file_actions_destroy(&actions);
  return pid;
}

int AnswerAs(uid_t uid, const TestDaemon& daemon, const std::function<int()>& body) {
  for (const std::string& folder : {daemon.folder(), daemon.folder() + "/run"})
    std::filesystem::permissions(folder, std::filesystem::perms(0755));
  std::filesystem::permissions(daemon.socket_path() + ".ring", std::filesystem::perms(0666));
  const pid_t child = ::fork();
  if (child == 0) ::_exit(::setuid(uid) == 0 ? body() : 9);
  return WaitForExit(child, 60);
}

int WaitForExit(pid_t pid, int seconds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  int status = 0;
  while (waitpid(pid, &status, WNOHANG) == 0) {
    if (std::chrono::steady_clock::now() > end) {
      kill(pid, SIGKILL);
      waitpid(pid, &status, 0);
      return -1;
    }
    Nap();
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

std::string MakeFolder() {
  std::string folder = "/tmp/kvtide-e2e-XXXXXX";
  return mkdtemp(folder.data()) == nullptr ? "" : folder;
}

std::string ReadWhole(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

std::unique_ptr<TestDaemon> TestDaemon::Start(const std::vector<std::string>& arguments, int compute_threads,
                                              const std::string& ulimit) {
  std::unique_ptr<TestDaemon> daemon(new TestDaemon);
  daemon->folder_ = MakeFolder();
  std::vector<std::string> command = Command(ulimit);
  for (const std::string& argument : {std::string("--listen"), daemon->address(),
                                      std::string("--compute-threads"), std::to_string(compute_threads)})
    command.push_back(argument);
  const std::vector<std::pair<std::string, std::string>> kDefaults = {{"--device", TestDevice()},
                                                                      {"--device-memory", "4MiB"},
                                                                      {"--host-memory", "8MiB"},
                                                                      {"--metrics-address", "off"}};
  for (const auto& [flag, value] : kDefaults) {
    if (std::find(arguments.begin(), arguments.end(), flag) != arguments.end()) continue;
    command.push_back(flag);
    command.push_back(value);
  }
  // A flag with an empty value is left out, and the default above with it.
  for (size_t i = 0; i < arguments.size(); i++) {
    if (i + 1 < arguments.size() && arguments[i + 1].empty()) {
      i++;
    } else {
      command.push_back(arguments[i]);
    }
  }
  daemon->pid_ = StartProgram(command, daemon->folder_ + "/log");
  for (int i = 0; i < kPatienceSeconds * 200 && daemon->Alive(); i++) {
    std::istringstream lines(daemon->Log());
    for (std::string line; std::getline(lines, line);) {
      if (line.find(" ready:") != std::string::npos && !lines.eof()) daemon->ready_line_ = line;
    }
    if (!daemon->ready_line_.empty()) return daemon;
    Nap();
  }
  ADD_FAILURE() << "kvtided did not start: " << daemon->Log();
  return daemon;
}

TestDaemon::Result TestDaemon::RunToEnd(const std::vector<std::string>& arguments,
                                        const std::string& ulimit) {
  const std::string folder = MakeFolder();
  std::vector<std::string> command = Command(ulimit);
  command.insert(command.end(), arguments.begin(), arguments.end());
  const pid_t pid = StartProgram(command, folder + "/log");
  Result result;
  result.exit_code = WaitForExit(pid, kPatienceSeconds);
  result.output = ReadWhole(folder + "/log");
  result.started = result.output.find(" ready:") != std::string::npos;
  std::filesystem::remove_all(folder);
  return result;
}

TestDaemon::~TestDaemon() {
  if (pid_ > 0) Kill();
  std::error_code error;
  std::filesystem::remove_all(folder_, error);
}

std::string TestDaemon::metrics_address() const {
  const std::string mark = "http://";
  const size_t begin = ready_line_.find(mark) + mark.size();
  return ready_line_.substr(begin, ready_line_.find("/metrics") - begin);
}

bool TestDaemon::Alive() const {
  siginfo_t info{};  // left as it is, with pid 0, while the child runs
  return pid_ > 0 && waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG | WNOWAIT) == 0 &&
         info.si_pid == 0;
}

int TestDaemon::Stop() {
  kill(pid_, SIGTERM);
  return Wait();
}

int TestDaemon::Wait() {
  const int code = WaitForExit(pid_, kPatienceSeconds);
  pid_ = -1;
  return code;
}

void TestDaemon::Kill() {
  kill(pid_, SIGKILL);
  WaitForExit(pid_, kPatienceSeconds);
  pid_ = -1;
}

std::string TestDaemon::Log() const { return ReadWhole(folder_ + "/log"); }

std::unique_ptr<Client> TestDaemon::Connect(client::ClientOptions options) const {
  options.connect_timeout = absl::Seconds(kPatienceSeconds);
  auto client = Client::Connect(address(), options);
  EXPECT_TRUE(client.ok()) << client.status() << Log();
  return client.ok() ? std::move(client).value() : nullptr;
}

client::Model SmallModel(const std::string& name) {
  client::ModelLayer layer;
  layer.kv_heads = kKvHeads;
  layer.head_dim_k = layer.head_dim_v = kDim;
  layer.query_heads = kHeads;
  return {name, std::vector<client::ModelLayer>(kLayers, layer)};
}

std::vector<float> Rows(int seed, int64_t first, int64_t tokens, int heads) {
  std::vector<float> rows(static_cast<size_t>(tokens * heads * kDim));
  const size_t row = static_cast<size_t>(heads * kDim);
  for (size_t i = 0; i < rows.size(); i++) {
    // A hash of seed and place, spread over -1..1.
    uint64_t x =
        static_cast<uint64_t>(seed) * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(first) * row + i + 1;
    x ^= x >> 31;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    x ^= x >> 31;
    rows[i] = static_cast<float>(static_cast<double>(x >> 11) / 4503599627370496.0 - 1.0);
  }
  return rows;
}

Tokens::Tokens(int seed, int64_t first, int64_t tokens) {
  for (int layer = 0; layer < kLayers; layer++) {
    k.push_back(Rows(seed * 100 + layer, first, tokens, kKvHeads));
    v.push_back(Rows(seed * 100 + 50 + layer, first, tokens, kKvHeads));
  }
  for (int layer = 0; layer < kLayers; layer++) {
    const std::vector<int64_t> shape = {tokens, kKvHeads, kDim};
    layers.push_back({layer, client::TensorRef::F32(k[static_cast<size_t>(layer)], shape),
                      client::TensorRef::F32(v[static_cast<size_t>(layer)], shape)});
  }
}

std::vector<float> ReferenceAttention(const std::vector<float>& q, const std::vector<float>& k,
                                      const std::vector<float>& v, int64_t tokens, int64_t queries) {
  std::vector<float> output(static_cast<size_t>(queries * kHeads * kDim));
  const auto row = [](const std::vector<float>& all, int64_t token, int heads, int head, int i) {
    return all[static_cast<size_t>((token * heads + head) * kDim + i)];
  };
  for (int64_t query = 0; query < queries; query++) {
    const int64_t visible = tokens - queries + query + 1;
    for (int head = 0; head < kHeads; head++) {
      const int kv_head = head / (kHeads / kKvHeads);
      std::vector<double> weights(static_cast<size_t>(visible));
      double largest = -INFINITY, sum = 0;
      for (int64_t t = 0; t < visible; t++) {
        double logit = 0;
        for (int i = 0; i < kDim; i++) {
          logit += static_cast<double>(row(q, query, kHeads, head, i)) *
                   F16ToF32(F32ToF16(row(k, t, kKvHeads, kv_head, i)));
        }
        weights[static_cast<size_t>(t)] = logit / std::sqrt(static_cast<double>(kDim));
        largest = std::max(largest, weights[static_cast<size_t>(t)]);
      }
      for (double& weight : weights) sum += weight = std::exp(weight - largest);
      for (int i = 0; i < kDim; i++) {
        double value = 0;
        for (int64_t t = 0; t < visible; t++) {
          value += weights[static_cast<size_t>(t)] * F16ToF32(F32ToF16(row(v, t, kKvHeads, kv_head, i)));
        }
        output[static_cast<size_t>((query * kHeads + head) * kDim + i)] = static_cast<float>(value / sum);
      }
    }
  }
  return output;
}

double LargestDifference(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return INFINITY;
  double largest = 0;
  for (size_t i = 0; i < a.size(); i++) {
    const double difference = std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (!(difference <= largest)) largest = difference;  // a NaN wins
  }
  return largest;
}

}  // namespace kvtide::e2e
