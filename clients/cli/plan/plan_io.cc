#include "clients/cli/plan/plan_io.h"

#include <netdb.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide::cli {
namespace {

constexpr size_t kMaxFileBytes = size_t{256} << 20;
constexpr size_t kMaxReplyBytes = size_t{64} << 20;
constexpr int kHttpSeconds = 5;

absl::StatusOr<std::string> ReadStream(std::istream& stream, const std::string& name) {
  std::string text;
  char piece[65536];
  while (stream.read(piece, sizeof(piece)) || stream.gcount() > 0) {
    text.append(piece, static_cast<size_t>(stream.gcount()));
    if (text.size() > kMaxFileBytes)
      return absl::InvalidArgumentError(absl::StrCat(name, ": larger than 256 MiB"));
  }
  return text;
}

absl::StatusOr<int> Connect(const std::string& host, const std::string& port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), port.c_str(), &hints, &found) != 0) {
    return absl::UnavailableError(absl::StrCat(host, ": unknown host"));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> list(found, &freeaddrinfo);
  for (const addrinfo* entry = found; entry != nullptr; entry = entry->ai_next) {
    const int fd = socket(entry->ai_family, entry->ai_socktype | SOCK_CLOEXEC, entry->ai_protocol);
    if (fd < 0) continue;
    const timeval timeout{kHttpSeconds, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
    if (connect(fd, entry->ai_addr, entry->ai_addrlen) == 0) return fd;
    close(fd);
  }
  return absl::UnavailableError(absl::StrCat(host, ":", port, ": no connection: ", std::strerror(errno)));
}

}  // namespace

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  if (path == "-") return ReadStream(std::cin, "standard input");
  std::error_code error;
  if (std::filesystem::is_directory(path, error))
    return absl::InvalidArgumentError(absl::StrCat(path, ": is a folder, not a file"));
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
  KVTIDE_ASSIGN_OR_RETURN(std::string text, ReadStream(file, path));
  if (text.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": is empty"));
  return text;
}

absl::Status FlushOutput() {
  errno = 0;
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("the answer could not be written: ",
                                          errno != 0 ? std::strerror(errno) : "standard output failed"));
}

bool IsWriteError(const absl::Status& status) {
  return absl::IsDataLoss(status) || absl::IsPermissionDenied(status);
}

absl::Status WriteFile(const std::string& path, const std::string& text) {
  const std::string part = absl::StrCat(path, ".part");
  std::ofstream file(part, std::ios::binary);
  file << text;
  file.close();
  if (!file || std::rename(part.c_str(), path.c_str()) != 0) {
    std::remove(part.c_str());
    return absl::PermissionDeniedError(absl::StrCat(path, ": cannot be written"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> HttpGet(const std::string& url) {
  const std::string scheme = "http://";
  if (!absl::StartsWith(url, scheme))
    return absl::InvalidArgumentError(absl::StrCat(url, ": expected http://host:port/path"));
  const std::string rest = url.substr(scheme.size());
  const size_t slash = rest.find('/');
  const std::string address = rest.substr(0, slash),
                    path = slash == std::string::npos ? "/metrics" : rest.substr(slash);
  const size_t colon = address.rfind(':');
  const std::string host = address.substr(0, colon),
                    port = colon == std::string::npos ? "80" : address.substr(colon + 1);
  KVTIDE_ASSIGN_OR_RETURN(const int fd, Connect(host, port));
  const auto closer = absl::MakeCleanup([fd] { close(fd); });
  const std::string request =
      absl::StrCat("GET ", path, " HTTP/1.0\r\nHost: ", address, "\r\nConnection: close\r\n\r\n");
  if (send(fd, request.data(), request.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(request.size())) {
    return absl::UnavailableError(absl::StrCat(url, ": cannot send"));
  }
  std::string reply;
  char piece[65536];
  for (ssize_t n = 0; (n = recv(fd, piece, sizeof(piece), 0)) != 0;) {
    if (n < 0) return absl::UnavailableError(absl::StrCat(url, ": ", std::strerror(errno)));
    reply.append(piece, static_cast<size_t>(n));
    if (reply.size() > kMaxReplyBytes)
      return absl::InvalidArgumentError(absl::StrCat(url, ": more than 64 MiB"));
  }
  const size_t body = reply.find("\r\n\r\n");
  const std::string status_line = reply.substr(0, reply.find("\r\n"));
  if (body == std::string::npos || !absl::StrContains(status_line, " 200")) {
    return absl::UnavailableError(absl::StrCat(url, ": ", status_line.empty() ? "no answer" : status_line));
  }
  return reply.substr(body + 4);
}

bool UseColor() {
  const char* no_color = std::getenv("NO_COLOR");
  return isatty(STDOUT_FILENO) != 0 && (no_color == nullptr || *no_color == '\0');
}

}  // namespace kvtide::cli
