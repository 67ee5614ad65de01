#include "tests/daemon/remote/redis_server.h"

#include <fcntl.h>
#include <hiredis/hiredis.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <stdexcept>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "daemon/remote/resp_connection.h"
#include "gtest/gtest.h"

extern char** environ;

namespace kvtide::testing {
namespace {

std::string MakeFolder() {
  std::string folder = "/tmp/kvtide-redis-XXXXXX";
  return mkdtemp(folder.data()) == nullptr ? "" : folder;
}

std::string TextOf(const redisReply& reply) {
  if (reply.type == REDIS_REPLY_INTEGER) return absl::StrCat(reply.integer);
  if (reply.type == REDIS_REPLY_NIL) return "(nil)";
  if (reply.type != REDIS_REPLY_ARRAY) return {reply.str, reply.len};
  std::string text;
  for (size_t i = 0; i < reply.elements; i++)
    absl::StrAppend(&text, i > 0 ? "\n" : "", TextOf(*reply.element[i]));
  return text;
}

int Connect(const std::string& path) {
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::copy(path.begin(), path.end(), address.sun_path);
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) return fd;
  close(fd);
  return -1;
}

}  // namespace

RedisServer::RedisServer(std::vector<std::string> more) : more_(std::move(more)), folder_(MakeFolder()) {
  Start();
}

RedisServer::~RedisServer() {
  Kill();
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

RemoteAddress RedisServer::address() const {
  RemoteAddress address;
  address.path = path();
  return address;
}

void RedisServer::Start() {
  std::vector<std::string> command = {
      "redis-server", "--port", "0",     "--unixsocket", path(),      "--save",        "",
      "--appendonly", "no",     "--dir", folder_,        "--logfile", folder_ + "/log"};
  command.insert(command.end(), more_.begin(), more_.end());
  std::vector<char*> arguments;
  for (std::string& word : command) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 1, (folder_ + "/out").c_str(), O_WRONLY | O_CREAT | O_APPEND,
                                   0600);
  posix_spawn_file_actions_adddup2(&actions, 1, 2);
  const int spawned = posix_spawnp(&pid_, "redis-server", &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  // Ends the test at once: without a server each of its calls would wait for one.
  if (spawned != 0) {
    pid_ = -1;
    throw std::runtime_error("redis-server is not installed (deploy/install_packages.sh)");
  }
  for (int i = 0; i < 6000; i++) {
    if (const int fd = Connect(path()); fd >= 0) {
      close(fd);
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  throw std::runtime_error("redis-server does not answer");
}

void RedisServer::Kill() {
  if (pid_ < 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

void RedisServer::Stand(bool still) { kill(pid_, still ? SIGSTOP : SIGCONT); }

std::string RedisServer::Command(const std::vector<std::string>& words) const {
  const RespConnection::Limits limits{absl::Now() + absl::Seconds(30), absl::Seconds(30), nullptr};
  auto connection = RespConnection::Connect(address(), "", limits);
  if (!connection.ok()) return connection.status().ToString();
  std::string text;
  const absl::Status status =
      (*connection)->Run({{words, 0, {}}}, limits, [&](size_t, const redisReply& reply) {
        text = TextOf(reply);
      });
  return status.ok() ? text : status.ToString();
}

std::vector<std::string> RedisServer::Names(const std::string& pattern) const {
  std::vector<std::string> names = absl::StrSplit(Command({"KEYS", pattern}), '\n', absl::SkipEmpty());
  std::sort(names.begin(), names.end());
  return names;
}

Proxy::Proxy(std::string target) : target_(std::move(target)), folder_(MakeFolder()) {
  listener_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string at = path();
  std::copy(at.begin(), at.end(), address.sun_path);
  EXPECT_EQ(bind(listener_, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  EXPECT_EQ(listen(listener_, 16), 0);
  thread_ = std::thread([this] { Run(); });
}

Proxy::~Proxy() {
  stop_ = true;
  thread_.join();
  close(listener_);
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

RemoteAddress Proxy::address() const {
  RemoteAddress address;
  address.path = path();
  return address;
}

void Proxy::Run() {
  std::map<int, int> peers;  // client and server, both ways
  std::map<int, bool> from_server;
  std::vector<char> buffer(65536);
  const auto end = [&](int fd) {
    const int other = peers.at(fd);
    for (const int each : {fd, other}) {
      peers.erase(each);
      from_server.erase(each);
      close(each);
    }
  };
  while (!stop_) {
    std::vector<pollfd> polls = {{listener_, POLLIN, 0}};
    if (mode_ != kStandStill)
      for (const auto& [fd, other] : peers) polls.push_back({fd, POLLIN, 0});
    if (poll(polls.data(), polls.size(), 5) <= 0) continue;
    if (polls[0].revents != 0) {
      const int client = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      const int server = Connect(target_);
      if (server < 0) {
        close(client);
      } else {
        peers[client] = server;
        peers[server] = client;
        from_server[server] = true;
      }
    }
    for (size_t i = 1; i < polls.size(); i++) {
      const int fd = polls[i].fd;
      if (polls[i].revents == 0 || !peers.contains(fd)) continue;
      const bool trickle = mode_ == kTrickle && from_server.contains(fd);
      const ssize_t got = recv(fd, buffer.data(), trickle ? 1 : buffer.size(), 0);
      if (got <= 0) {
        end(fd);
        continue;
      }
      bool sent = true;
      for (ssize_t at = 0; at < got && sent;) {
        const ssize_t done =
            send(peers.at(fd), buffer.data() + at, static_cast<size_t>(got - at), MSG_NOSIGNAL);
        sent = done > 0;
        at += std::max<ssize_t>(done, 0);
      }
      if (!sent) end(fd);
      if (trickle) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
  while (!peers.empty()) end(peers.begin()->first);
}

}  // namespace kvtide::testing
