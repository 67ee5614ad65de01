// A real redis-server in a process of its own, on a Unix socket in a private folder, without persistence; it
// is killed with the object. And a proxy before it that stands still, trickles or lets through.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "daemon/remote/remote_options.h"

namespace kvtide::testing {

class RedisServer {
 public:
  // `more`: further arguments of redis-server. Returns when it answers; a failure of the test if it does not.
  explicit RedisServer(std::vector<std::string> more = {});
  ~RedisServer();
  RedisServer(const RedisServer&) = delete;
  RedisServer& operator=(const RedisServer&) = delete;

  const std::string& folder() const { return folder_; }
  std::string path() const { return folder_ + "/redis.sock"; }
  RemoteAddress address() const;
  void Kill();
  void Start();
  // It keeps its sockets and answers nothing.
  void Stand(bool still);
  // A command's reply as text, lists as lines; errors as they come.
  std::string Command(const std::vector<std::string>& words) const;
  std::vector<std::string> Names(const std::string& pattern = "*") const;

 private:
  std::vector<std::string> more_;
  std::string folder_;
  pid_t pid_ = -1;
};

class Proxy {
 public:
  enum Mode { kPass, kStandStill, kTrickle };  // kTrickle: one byte of the answers every 2 ms
  explicit Proxy(std::string target);
  ~Proxy();
  std::string path() const { return folder_ + "/proxy.sock"; }
  RemoteAddress address() const;
  void Set(Mode mode) { mode_ = mode; }

 private:
  void Run();

  const std::string target_;
  std::string folder_;
  int listener_ = -1;
  std::atomic<Mode> mode_{kPass};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace kvtide::testing
