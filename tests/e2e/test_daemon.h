// A real kvtided in a process of its own, for tests: on a Unix socket in a private folder, with small tiers
// on the CPU or on what KVTIDE_TEST_DEVICE names. The process is stopped with the object. Also the model,
// rows and reference that the tests use.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "clients/cpp/client.h"

namespace kvtide::e2e {

class TestDaemon {
 public:
  struct Result {
    bool started = false;  // printed its ready line
    int exit_code = -1;    // when it did not: its exit code, 128 + signal
    std::string output;    // stderr and stdout
  };

  // `arguments` come after --listen (the private socket), --device TestDevice() and small tiers, and win over
  // them. ulimit: options of the shell's ulimit that the daemon starts under, as "-n 64"; empty = none.
  static std::unique_ptr<TestDaemon> Start(const std::vector<std::string>& arguments = {},
                                           int compute_threads = 2, const std::string& ulimit = "");
  // For daemons that are expected to fail: only the given arguments.
  static Result RunToEnd(const std::vector<std::string>& arguments, const std::string& ulimit = "");
  ~TestDaemon();

  const std::string& folder() const { return folder_; }
  std::string socket_path() const { return folder_ + "/run/kvtided.sock"; }
  std::string address() const { return "unix:" + socket_path(); }
  const std::string& ready_line() const { return ready_line_; }
  // "127.0.0.1:PORT" of the metrics, when they were asked for.
  std::string metrics_address() const;
  pid_t pid() const { return pid_; }
  bool Alive() const;
  // SIGTERM and wait; the exit code.
  int Stop();
  // Waits for it to end by itself; the exit code.
  int Wait();
  // SIGKILL and wait.
  void Kill();
  std::string Log() const;

  // A client that is expected to connect.
  std::unique_ptr<Client> Connect(client::ClientOptions options = {}) const;

 private:
  TestDaemon() = default;
  std::string folder_, ready_line_;
  pid_t pid_ = -1;
};

// "cpu", or the first device of KVTIDE_TEST_DEVICE, which is a device of kvtided or a list of them.
std::string TestDevice();
// Two devices: all of KVTIDE_TEST_DEVICE if it is a list, else TestDevice() and the CPU.
std::string TestDevices();
// The path of "kvtided", "kvtide" or "kvtide_e2e_appender": in the folder KVTIDE_TEST_PROGRAMS, else as
// built.
std::string Program(const std::string& name);

// Starts a program with its output in `log`; -1 when it cannot be started.
pid_t StartProgram(const std::vector<std::string>& command, const std::string& log);
// The exit code, 128 + signal, or -1 when it runs longer than `seconds` (it is killed then).
int WaitForExit(pid_t pid, int seconds);
// What `body` answers, run by a process of user `uid`, who may reach the daemon's shared memory; 9 where this
// process may not become somebody else.
int AnswerAs(uid_t uid, const TestDaemon& daemon, const std::function<int()>& body);
std::string MakeFolder();
std::string ReadWhole(const std::string& path);

// Two layers, 2 KV heads, 4 query heads, head dim 64: an f16 block has 64 KiB.
constexpr int kLayers = 2, kKvHeads = 2, kHeads = 4, kDim = 64;
client::Model SmallModel(const std::string& name = "small");

// Deterministic rows [tokens][heads][kDim], the same for the same seed and position.
std::vector<float> Rows(int seed, int64_t first, int64_t tokens, int heads);

// New tokens of all layers of the small model, as they are appended.
struct Tokens {
  std::vector<std::vector<float>> k, v;  // by layer
  std::vector<client::LayerTokens> layers;
  Tokens(int seed, int64_t first, int64_t tokens);
};

// Causal attention of rows q (the last `queries` positions) over k and v rounded to f16, in double.
std::vector<float> ReferenceAttention(const std::vector<float>& q, const std::vector<float>& k,
                                      const std::vector<float>& v, int64_t tokens, int64_t queries);
double LargestDifference(const std::vector<float>& a, const std::vector<float>& b);

}  // namespace kvtide::e2e
